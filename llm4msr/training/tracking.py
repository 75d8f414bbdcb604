"""Scalars of a run in MLflow, where ``MLFLOW_TRACKING_URI`` names a server, through MLflow's own client.

MLflow's own variables configure it; the experiment is ``MLFLOW_EXPERIMENT_NAME``, else llm4msr. They belong into the
environment of the training workers, whose rank 0 writes. A server that does not answer never ends a training:
TensorBoard has everything, MLflow a copy.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from llm4msr.config import digest
from llm4msr.training.task import TrainingError, TrainingInterrupted, TrainTask

logger = logging.getLogger("llm4msr.training")

SEND_SECONDS = 2.0
PARAM_LENGTH = 6000  # MLflow refuses a longer value, such as a preamble of prompts
RUN_TAG = "llm4msr.run_uri"
# MLflow's own defaults let a server that is down hold up a training for minutes at every point.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


def trackers(task: TrainTask, first_step: int) -> list[Tracker]:
    """Returns the run's place in MLflow; none where no server is named.

    Args:
        task: The run.
        first_step: Steps already taken: 0 begins a new MLflow run, else the newest one of this run is gone on with.

    Raises:
        TrainingError: MLflow is not installed.
    """
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        return []
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    try:
        import mlflow  # noqa: F401
    except ImportError as error:
        raise TrainingError(
            f"MLFLOW_TRACKING_URI = {os.environ['MLFLOW_TRACKING_URI']!r} is set, but MLflow is not installed: "
            "pip install 'llm4msr[mlflow]' on all nodes, or unset it"
        ) from error
    return [Tracker(task, first_step)]


class Tracker:
    """One run in MLflow.

    Args:
        task: The run.
        first_step: As of `trackers`.
    """

    def __init__(self, task: TrainTask, first_step: int) -> None:
        from mlflow import MlflowClient

        self.name = task.name
        self.run_id: str | None = None
        self.waiting: list[Any] = []
        self.sent = time.monotonic()
        try:
            self.client = MlflowClient()
            self.run_id = self._begin(task, first_step)
        except Exception as error:
            self._give_up(error)

    def _begin(self, task: TrainTask, first_step: int) -> str:
        from mlflow.entities import Param

        experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or "llm4msr")
        # The filter knows no way to write a quote, which an address may hold.
        place = digest(task.run_uri)
        if first_step:
            found = self.client.search_runs([experiment], f"tags.`{RUN_TAG}.digest` = '{place}'", max_results=1)
            if found:
                self.client.update_run(found[0].info.run_id, status="RUNNING")
                return str(found[0].info.run_id)
        tags = {
            RUN_TAG: task.run_uri,
            f"{RUN_TAG}.digest": place,
            "llm4msr.backbone": task.config.model.backbone,
            "llm4msr.knowledge": task.knowledge,
            "llm4msr.seed": str(task.seed),
        }
        run = self.client.create_run(experiment, run_name=task.name, tags=tags)
        params = [Param(key, str(value)[:PARAM_LENGTH]) for key, value in flat(task.config.model_dump(mode="json"))]
        self.client.log_batch(run.info.run_id, params=params)
        return str(run.info.run_id)

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self.client.create_experiment(name))
            except MlflowException:  # another run was first
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Sends one point of each scalar, together with others of the last seconds."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.waiting += [Metric(metric_name(name), float(value), now, step) for name, value in scalars.items()]
        if time.monotonic() - self.sent >= SEND_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Sends what waits."""
        waiting, self.waiting, self.sent = self.waiting, [], time.monotonic()
        if self.run_id is None or not waiting:
            return
        try:
            self.client.log_batch(self.run_id, metrics=waiting)
        except Exception as error:
            self._give_up(error)

    def close(self, error: BaseException | None = None) -> None:
        """Ends the run as finished, as killed where it was asked to stop, or as failed."""
        self.flush()
        if self.run_id is None:
            return
        status = "FINISHED" if error is None else "KILLED" if isinstance(error, TrainingInterrupted) else "FAILED"
        try:
            self.client.set_terminated(self.run_id, status)
        except Exception as failure:
            self._give_up(failure)

    def _give_up(self, error: Exception) -> None:
        self.run_id = None
        said = " ".join(str(error).split())
        logger.warning("%s: no more of this run goes to MLflow; TensorBoard has it: %s", self.name, said[:300])


def metric_name(name: str) -> str:
    """Returns a name that MLflow takes: what it refuses becomes an underscore."""
    return re.sub(r"[^\w\-. /:]", "_", name)


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of nested dictionaries by dotted key; empty ones are left out."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield metric_name(f"{prefix}{key}"), value
