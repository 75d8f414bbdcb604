"""The ranker on Ray Serve.

`build_app` is an application builder: ``serve run serve.app:build_app workspace_uri=workspace/demo``, the import path
of ``serve/config.yaml``, or ``python -m serve`` for one machine. It loads and tries the checkpoint itself before
anything is deployed, so that a bad one ends with its own message and not with replicas that crash and restart.

A deployed version is one checkpoint: a new report in the workspace is served after the next deployment, never by a
replica that happened to restart. The API itself is in `serve.api`, without Ray.
"""

from __future__ import annotations

from typing import Annotated, Any

import ray
import torch
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ray import serve as ray_serve

from llm4msr import storage
from llm4msr.config import ConfigError
from llm4msr.ranker import Ranker
from serve.api import build_api, example_request

NUM_WARM_UP_ITEMS = 100


class ServeArgs(BaseModel):
    """Arguments of `build_app`; text is converted, because ``serve run NAME=VALUE`` gives text only."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    checkpoint_uri: str | None = None
    """Checkpoint to serve, local or s3://. Every node must be able to read it."""
    workspace_uri: str | None = None
    """Instead of checkpoint_uri: serve what the last pipeline of this workspace reported."""
    max_candidates: Annotated[int, Field(ge=1)] = 2000
    """Most candidates in one request."""
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
    report_uri = storage.join(storage.absolute(args.workspace_uri), "report.json")
    if not storage.exists(report_uri):
        raise storage.StorageError(
            f"{report_uri}: no such file, so there is nothing to serve: run make demo, or python -m jobs.pipeline "
            "with this workspace_uri, first"
        )
    report = storage.read_json(report_uri)
    if not isinstance(report, dict) or "checkpoint" not in report:
        raise storage.StorageError(f"{report_uri}: names no checkpoint: it was not written by jobs.pipeline")
    return storage.join(storage.absolute(args.workspace_uri), report["checkpoint"])


def load_ranker(checkpoint_uri: str) -> Ranker:
    """Loads a checkpoint and scores one request with it, so that the first caller does not pay for torch's start.

    Raises:
        StorageError: The checkpoint is missing, unfinished or damaged.
    """
    ranker = Ranker.from_checkpoint(checkpoint_uri)
    ranker.rank(example_request(ranker, NUM_WARM_UP_ITEMS))
    return ranker


@ray_serve.deployment(
    name="ranker",
    # A replica scores one request at a time; more than a few waiting there are better sent to another replica.
    max_ongoing_requests=16,
    # Beyond this the caller is told at once (503) instead of waiting for an answer that comes too late.
    max_queued_requests=200,
    # Start the new replica before the old one stops; with the default 0 a single replica is gone for a while.
    max_surge_percent=100,
    graceful_shutdown_timeout_s=10,
)
@ray_serve.ingress()
class RankerService:
    """One replica: a ranker and its API.

    Args:
        checkpoint_uri: What to serve.
        max_candidates: Most candidates in one request.
    """

    def __init__(self, checkpoint_uri: str, max_candidates: int) -> None:
        # The replica's own share: a deployment file may give it other CPUs than build_app was told.
        num_cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
        torch.set_num_threads(max(1, int(num_cpus)))
        self.max_candidates = max_candidates
        self.ranker = load_ranker(checkpoint_uri)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Returns the API of this replica; Ray Serve calls it once, after the constructor."""
        return build_api(self.ranker, self.max_candidates)


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
    load_ranker(checkpoint_uri)
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
    service = RankerService.options(ray_actor_options={"num_cpus": checked.num_cpus}, **scaling)
    return service.bind(checkpoint_uri, checked.max_candidates)
