"""Chooses the engine that a configuration names.

Two run inside the actors and are built here: `engines.encoder` (transformers) and
`engines.endpoint` (HTTP). The third, `engines.vllm`, brings actors of its own. Only the chosen
one is imported: the others may need libraries that are not installed.
"""

from __future__ import annotations

from typing import Any

from llm4msr.config import KnowledgeConfig
from llm4msr.knowledge.engines.interface import Device, Engine


def engine_identity(config: KnowledgeConfig, device: Device = "auto") -> dict[str, Any]:
    """Returns what tells this configuration's vectors from any other's; loads no weights.

    Args:
        config: The language model and its engine.
        device: Where it will run; decides what dtype "auto" means.

    Raises:
        EncoderError: The model is not to be found or does not fit the configuration.
    """
    if config.engine == "openai":
        from llm4msr.knowledge.engines.endpoint import endpoint_identity

        return endpoint_identity(config)
    if config.engine == "vllm":
        from llm4msr.knowledge.engines.vllm import vllm_identity

        return vllm_identity(config)
    from llm4msr.knowledge.engines.encoder import encoder_identity

    return encoder_identity(config, device)


def build_engine(
    config: KnowledgeConfig, device: Device = "auto", num_threads: int | None = None, num_actors: int = 1
) -> Engine:
    """Returns the engine that runs inside an actor.

    Args:
        config: The language model and its engine: transformers or openai.
        device: "auto" takes a GPU where there is one.
        num_threads: CPU threads of torch in this process; None leaves them as they are.
        num_actors: Actors that share the rate limits of an endpoint.

    Raises:
        EncoderError: The model is not to be found, cannot be loaded, or does not fit the configuration.
    """
    if config.engine == "openai":
        from llm4msr.knowledge.engines.endpoint import Endpoint

        return Endpoint(config, num_actors)
    assert config.engine == "transformers", config.engine
    from llm4msr.knowledge.engines.encoder import Encoder

    return Encoder(config, device, num_threads)
