"""Where the knowledge of a configuration lies, for those who only look it up: no Ray, no language model.

What an encoder is (the commit of a Hugging Face id, the digests of its files, the dtype of its device) is known where
it runs. So `jobs.extract` leaves a small file that names what it finished, as `jobs.prepare` does, and training reads
that. A second one names the last extraction of an application, whatever its data was then: what a refresh starts from.
"""

from __future__ import annotations

from typing import Any

from llm4msr import storage, workspace
from llm4msr.config import Config, digest
from llm4msr.knowledge.prompts import PROMPT_VERSION

PROMPTS_DIRECTORY = "prompts"
SUMMARY_FILE = "summary.json"
ERRORS_FILE = "errors.parquet"
# Fields of `KnowledgeConfig` that say how the work is done, not what comes out.
_HOW: dict[str, bool | set[str]] = {
    **dict.fromkeys(("attention", "compile", "batch_tokens", "device", "num_actors", "gpus_per_actor"), True),
    **dict.fromkeys(("cpus_per_actor", "rows_per_commit", "max_error_fraction"), True),
    "openai": {"base_url", "api_key_env", "max_in_flight", "requests_per_minute", "timeout_s", "max_retries"},
}


def store_root(config: Config) -> str:
    """Returns the directory of all knowledge stores."""
    return storage.join(workspace.knowledge_root(config), "store")


def knowledge_pointer_uri(config: Config) -> str:
    """Returns the small file that names the current knowledge of this configuration's prepared data.

    Raises:
        StorageError: The data was not prepared yet.
    """
    prepared = workspace.prepared_uri(config).rsplit("/", 1)[-1]
    settings = config.knowledge.model_dump(mode="json", exclude=_HOW)
    name = digest({"prepared": prepared, "knowledge": settings, "prompt_version": PROMPT_VERSION})
    return storage.join(workspace.knowledge_root(config), f"{name}.json")


def last_pointer_uri(config: Config, source: dict[str, Any]) -> str:
    """Returns the small file that names the last extraction from the same logs with the same encoder and prompts.

    The same logs: the same data configuration but for the moments that divide it, which move on as the logs grow.

    Args:
        config: Says which workspace and which logs.
        source: What the extraction depends on, as its manifest says; its prepared data does not count here.
    """
    logs = config.data.model_dump(mode="json", exclude={"split": {"valid_from", "test_from", "test_until"}})
    name = digest({"logs": logs, **{k: source[k] for k in ("version", "encoder_digest", "max_events", "scenarios")}})
    return storage.join(workspace.knowledge_root(config), f"last-{name}.json")


def knowledge_uri(config: Config) -> str:
    """Returns the finished knowledge of this configuration: where `KnowledgeTable.load` finds its files.

    Raises:
        StorageError: The data was not prepared, or its knowledge not extracted yet.
    """
    pointer = knowledge_pointer_uri(config)
    if not storage.exists(pointer):
        raise storage.StorageError(
            f"{workspace.knowledge_root(config)} holds no knowledge extracted from {workspace.prepared_uri(config)} "
            f"with this knowledge configuration (model {config.knowledge.model!r}): "
            "run jobs.extract with the same configuration first"
        )
    uri = storage.join(workspace.knowledge_root(config), storage.read_json(pointer)["directory"])
    storage.read_manifest(uri, "run jobs.extract again")
    return uri
