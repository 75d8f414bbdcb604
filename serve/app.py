"""The ranker on Ray Serve.

`build_app` is an application builder: ``serve run serve.app:build_app workspace_uri=workspace/demo``, the import path
of ``serve/config.yaml``, or ``python -m serve`` for one machine. It loads and tries the checkpoint itself before
anything is deployed, so that a bad one ends with its own message and not with replicas that crash and restart.

What is served is the deployment's ``user_config``: a new report in the workspace is served after the next deployment or
`serve.rollout`, never by a replica that happened to restart. The API itself is in `serve.api`, without Ray.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from typing import Annotated, Any, Literal

import ray
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ray import serve as ray_serve

from llm4msr import logs, storage
from llm4msr.config import ConfigError
from llm4msr.request import RequestError
from llm4msr.workspace import reported_checkpoint_uri
from serve.api import Limits, build_api
from serve.candidates import read_candidate_sets
from serve.explain import KnowledgeSource
from serve.gate import Gate, access_log, describe_tokens
from serve.metrics import Metrics
from serve.served import Served, load_ranker
from serve.tokens import Tokens


class ServeArgs(BaseModel):
    """Arguments of `build_app`; text is converted, because ``serve run NAME=VALUE`` gives text only."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    checkpoint_uri: str | None = None
    """Checkpoint to serve, local or s3://. Every node must be able to read it."""
    workspace_uri: str | None = None
    """Instead of checkpoint_uri: serve what the last pipeline of this workspace reported."""
    knowledge_uri: str | None = None
    """Where jobs.extract left the model's knowledge, WORKSPACE/knowledge/NAME: explanations show its prompts. Left out,
    workspace_uri is looked into."""
    auth: Literal["tokens", "off"] = "tokens"
    """tokens: callers need one of those in LLM4MSR_TOKENS or the file LLM4MSR_TOKENS_FILE, on every node. off: none."""
    max_candidates: Annotated[int, Field(ge=1)] = 2000
    """Most candidates in one ranking."""
    max_batch: Annotated[int, Field(ge=1)] = 100
    """Most rankings in one POST /v1/rank:batch."""
    candidate_sets: dict[str, str] = {}
    """By name, a JSON file with a list of items that a request may name instead of sending them."""
    max_body_bytes: Annotated[int, Field(ge=1)] = 2**22
    """Largest body of a request."""
    max_in_flight: Annotated[int, Field(ge=1)] = 64
    """Requests that a replica answers at a time; more are told to come back (503, Retry-After)."""
    max_wait_ms: Annotated[float, Field(gt=0)] = 500
    """Refused in the same way is who would wait longer than this for the requests in flight."""
    access_log: bool = True
    """Whether every request leaves a JSON line in the replica's log."""
    num_replicas: Annotated[int, Field(ge=1)] | None = None
    """Fixed number of replicas; 1 when neither this nor min_replicas and max_replicas are given."""
    min_replicas: Annotated[int, Field(ge=1)] | None = None
    """Autoscaling: fewest replicas; goes with max_replicas."""
    max_replicas: Annotated[int, Field(ge=1)] | None = None
    """Autoscaling: most replicas; goes with min_replicas."""
    num_cpus: Annotated[float, Field(gt=0)] = 1
    """CPUs of a replica, and (rounded down, at least 1) its torch threads."""

    @model_validator(mode="after")
    def _check(self) -> ServeArgs:
        if (self.checkpoint_uri is None) == (self.workspace_uri is None):
            raise ValueError("give either checkpoint_uri or workspace_uri")
        if (self.min_replicas is None) != (self.max_replicas is None):
            raise ValueError("min_replicas and max_replicas go together: give both or neither")
        if self.min_replicas is not None and self.num_replicas is not None:
            raise ValueError("num_replicas is for a fixed number, min_replicas and max_replicas for autoscaling")
        if self.min_replicas is not None and self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}")
        return self


def parse_args(args: dict[str, Any]) -> ServeArgs:
    """Checks the arguments of an application.

    Raises:
        ConfigError: An argument is unknown, not valid, or does not go with the others.
    """
    try:
        return ServeArgs.model_validate(args)
    except ValidationError as error:
        lines = []
        for found in error.errors():
            name = ".".join(map(str, found["loc"]))
            if found["type"] == "extra_forbidden":
                lines.append(f"{name}: no such argument; valid: {', '.join(ServeArgs.model_fields)}")
            elif not name:
                lines.append(found["msg"].removeprefix("Value error, "))
            else:
                lines.append(f"{name}: {found['msg']} (found {found['input']!r})")
        raise ConfigError("\n".join(lines)) from error


def find_checkpoint(args: ServeArgs) -> str:
    """Returns the place of the checkpoint to serve; a local one as an absolute path.

    Raises:
        StorageError: The workspace holds no report.
    """
    if args.checkpoint_uri is not None:
        return storage.absolute(args.checkpoint_uri)
    return reported_checkpoint_uri(args.workspace_uri)


@ray_serve.deployment(
    name="ranker",
    # Above max_in_flight, so that the replica itself refuses what is too much, with Retry-After.
    max_ongoing_requests=100,
    # Beyond this the caller is told at once (503) instead of waiting for an answer that comes too late.
    max_queued_requests=200,
    # Start the new replica before the old one stops; with the default 0 a single replica is gone for a while.
    max_surge_percent=100,
    graceful_shutdown_timeout_s=10,
)
@ray_serve.ingress()
class RankerService:
    """One replica: what is served, and its API. Its model is in its ``user_config``: see `serve.served.Choice`.

    Args:
        args: As of `build_app`.
    """

    def __init__(self, args: dict[str, Any]) -> None:
        # The replica's own share: a deployment file may give it other CPUs than build_app was told.
        num_cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
        torch.set_num_threads(max(1, int(num_cpus)))
        self.args = parse_args(args)
        self.tokens = None if self.args.auth == "off" else Tokens(os.environ)
        self.limits = make_limits(self.args)
        self.served = Served()
        if self.args.access_log:
            log_to_stderr(access_log)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serves what the configuration says, while requests go on; Ray Serve calls it before the first one too."""
        await asyncio.to_thread(self.served.change, user_config)

    def __serve_build_asgi_app__(self) -> Gate:
        """Returns the API of this replica; Ray Serve calls it once, after the constructor."""
        source = KnowledgeSource(self.args.knowledge_uri, self.args.workspace_uri)
        api = build_api(self.served, self.limits, source)
        if self.tokens is not None:
            describe_tokens(api)
        args = self.args
        return Gate(api, self.tokens, args.max_body_bytes, args.max_in_flight, Metrics(), args.max_wait_ms)


def make_limits(args: ServeArgs) -> Limits:
    """Returns what a request may ask.

    Raises:
        ConfigError: A candidate set cannot be used.
    """
    sets = read_candidate_sets(args.candidate_sets, args.max_candidates)
    return Limits(args.max_candidates, args.max_batch, sets)


def log_to_stderr(log: logging.Logger) -> None:
    """Makes a logger write bare lines to stderr, and nowhere else; `llm4msr.logs` says how, if as JSON."""
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logs.formatter("%(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def build_app(args: dict[str, Any]) -> ray_serve.Application:
    """Builds the application that Ray Serve deploys.

    Args:
        args: As in `ServeArgs`.

    Raises:
        ConfigError: The arguments cannot be used.
        StorageError: The checkpoint is missing, unfinished or damaged.
    """
    checked = parse_args(args)
    checkpoint_uri = find_checkpoint(checked)
    ranker, limits = load_ranker(checkpoint_uri), make_limits(checked)
    for name, items in limits.candidate_sets.items():
        try:
            ranker.item_rows(items, name)
        except RequestError as error:
            raise ConfigError(f"candidate_sets.{name}: {error}") from error
    if checked.knowledge_uri is not None:
        KnowledgeSource(checked.knowledge_uri).open(ranker)  # a wrong place ends here, not in every explanation
    if checked.min_replicas is not None:
        scaling = {
            "autoscaling_config": {
                "min_replicas": checked.min_replicas,
                "max_replicas": checked.max_replicas,
                "target_ongoing_requests": 4,
            }
        }
    else:
        scaling = {"num_replicas": checked.num_replicas or 1}
    service = RankerService.options(
        ray_actor_options={"num_cpus": checked.num_cpus}, user_config={"checkpoint_uri": checkpoint_uri}, **scaling
    )
    # Replicas have another working directory.
    places = {name: getattr(checked, name) for name in ("workspace_uri", "knowledge_uri")}
    absolute = {name: storage.absolute(uri) for name, uri in places.items() if uri is not None}
    return service.bind(checked.model_dump() | absolute)
