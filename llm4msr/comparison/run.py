"""Trains and evaluates the runs of a comparison as Ray tasks, one process and one run at a time each.

First every model's learning rates with one seed; as soon as those of a model have ended, all seeds at the best of them.
A run that fails is noted and the others go on; the next call tries it again. A learning rate that is too high is not a
failure where the model has another one. A run that was stopped, by whatever, goes
on from its last checkpoint. What a run's evaluation found lies beside its checkpoint, so a finished run costs a look.
"""

from __future__ import annotations

import logging
import os
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import ray
import torch

from llm4msr import logs, storage
from llm4msr.comparison.plan import (
    DETAIL_FILE,
    EVALUATION_FILE,
    Choice,
    Comparison,
    Failure,
    Model,
    Outcome,
    choose,
    mean_valid_auc,
    write_plan,
)
from llm4msr.config import Config, ConfigError
from llm4msr.evaluation import EVALUATION_VERSION, evaluate_in_detail, evaluate_item_mean
from llm4msr.placement import alive_nodes
from llm4msr.training.device import gpus_per_process, open_device
from llm4msr.training.loop import train_worker
from llm4msr.training.signals import sigterm_event
from llm4msr.training.stop import asking, start_flag
from llm4msr.training.task import TrainingDiverged, TrainingError, TrainingInterrupted, TrainTask

logger = logging.getLogger("llm4msr.compare")

POLL_S = 0.5
ITEM_MEAN_FILE = "item_mean.json"


def train_all(comparison: Comparison) -> Outcome:
    """Does what is missing of a comparison; Ray must be initialised.

    Raises:
        ConfigError: A run needs more than this machine has.
        TrainingError: No run could be trained.
        TrainingInterrupted: SIGTERM came; the same call goes on.
    """
    with sigterm_event() as stop:
        running = _Running(comparison)
        write_plan(comparison)
        outcome = running.until_done(stop)
    if all(choice.learning_rate is None for choice in outcome.choices):
        failures = list(outcome.failures.values())
        raise TrainingError(f"{comparison.uri}: none of {len(failures)} runs could be trained: {failures[0].message}")
    return outcome


def item_mean(comparison: Comparison) -> list[dict[str, Any]]:
    """Returns the report rows of the item-mean baseline, kept beside the comparison's report."""
    place = storage.join(comparison.uri, ITEM_MEAN_FILE)
    if not storage.exists(place):
        rows = ray.get(ray.remote(num_cpus=1)(evaluate_item_mean).remote(comparison.prepared_uri))
        storage.write_json(place, rows)
    baseline: list[dict[str, Any]] = storage.read_json(place)
    return baseline


def run_resources(config: Config) -> dict[str, float]:
    """Returns the processors and GPUs of one run.

    Raises:
        ConfigError: No node of this machine's own cluster has as much, or device and GPUs contradict each other.
    """
    section, nodes = config.compare, alive_nodes(ray.nodes())
    num_gpus = sum(node.num_gpus for node in nodes)
    gpus = gpus_per_process(config.train.device, section.gpus_per_run, num_gpus, "compare.gpus_per_run")
    most = {kind: max([getattr(node, f"num_{kind}") for node in nodes], default=0) for kind in ("cpus", "gpus")}
    for kind, wanted in (("cpus", section.cpus_per_run), ("gpus", gpus)):
        # A cluster may grow; this machine does not, and the task would wait for ever.
        if wanted > most[kind] and not os.environ.get("RAY_ADDRESS"):
            raise ConfigError(f"compare.{kind}_per_run: {wanted:g} are needed, this machine has {most[kind]}")
    return {"num_cpus": section.cpus_per_run, "num_gpus": gpus}


def is_done(task: TrainTask, cold_max_rows: int) -> bool:
    """Tells whether a run is trained and evaluated, by this code and with this threshold of cold users and items."""
    place = storage.join(task.run_uri, DETAIL_FILE)
    if not (
        storage.is_finished(task.checkpoint_uri)
        and storage.exists(storage.join(task.run_uri, EVALUATION_FILE))
        and storage.exists(place)
    ):
        return False
    detail = storage.read_json(place)
    return (detail.get("version"), detail["cold_max_rows"]) == (EVALUATION_VERSION, cold_max_rows)


def train_and_evaluate(
    task: TrainTask, device: torch.device, cold_max_rows: int, should_stop: Callable[[], bool]
) -> None:
    """Trains one run in this process unless that is done, and writes down its evaluation.

    Raises:
        TrainingError: Training cannot go on.
        TrainingInterrupted: `should_stop` said so.
    """
    train_worker(task, 0, 1, device, lambda metrics: None, should_stop)
    storage.remove(task.training_uri)  # of a process that died at the end of its training
    rows, detail = evaluate_in_detail(task.checkpoint_uri, task.prepared_uri, cold_max_rows)
    storage.write_json(storage.join(task.run_uri, EVALUATION_FILE), rows)
    storage.write_json(storage.join(task.run_uri, DETAIL_FILE), detail)


class _Running:
    """The runs that wait, are under way, and have ended."""

    def __init__(self, comparison: Comparison) -> None:
        config = comparison.config
        self.comparison, self.section = comparison, config.compare
        self.resources = run_resources(config)
        # max_calls: else every run on a GPU would have a process of its own.
        options: dict[str, Any] = {"max_calls": 0, "max_retries": config.train.max_failures, **self.resources}
        self.run = ray.remote(**options)(_run)
        self.waiting: deque[TrainTask] = deque()
        self.under_way: dict[ray.ObjectRef[Any], TrainTask] = {}
        self.ended: dict[str, Failure | None] = {}  # None: finished
        self.known: set[str] = set()
        self.open = dict(enumerate(comparison.models))
        self.choices: dict[int, Choice] = {}
        self.num_runs = comparison.num_runs

    def until_done(self, stop: threading.Event) -> Outcome:
        self.flag = start_flag()
        for model in self.comparison.models:
            self._want(model.tuning.values())
        self._choose()
        logger.info("%s: %d runs, %d done before", self.comparison.uri, self.num_runs, len(self.ended))
        while self.waiting or self.under_way:
            if stop.is_set():
                self._end()
            self._start()
            self._collect()
            self._choose()
        choices = tuple(self.choices[i] for i in range(len(self.choices)))
        failures = {name: failure for name, failure in self.ended.items() if failure}
        diverged = self._too_high(choices) & {name for name, failure in failures.items() if failure.diverged}
        return Outcome(
            choices,
            {name: failure for name, failure in failures.items() if name not in diverged},
            {name: failure for name, failure in failures.items() if name in diverged},
        )

    def _too_high(self, choices: Sequence[Choice]) -> set[str]:
        """Returns the runs at learning rates that were tried and not chosen, another one being there."""
        return {
            task.name
            for model, choice in zip(self.comparison.models, choices, strict=True)
            for rate, task in model.tuning.items()
            if choice.learning_rate not in (None, rate)
        }

    def _want(self, tasks: Any) -> None:
        for task in tasks:
            if task.name in self.known:
                continue
            self.known.add(task.name)
            if is_done(task, self.section.cold_max_rows):
                self.ended[task.name] = None
            else:
                self.waiting.append(task)

    def _start(self) -> None:
        most = self.section.max_concurrent
        while self.waiting and (most == "auto" or len(self.under_way) < most):
            task = self.waiting.popleft()
            gpu = self.resources["num_gpus"] > 0
            reference = self.run.options(name=task.name).remote(
                task, self.section.cpus_per_run, gpu, self.section.cold_max_rows, self.flag
            )
            self.under_way[reference] = task

    def _collect(self) -> None:
        done, _ = ray.wait(list(self.under_way), timeout=POLL_S)
        for reference in done:
            task = self.under_way.pop(reference)
            try:
                failure = ray.get(reference)
            except ray.exceptions.RayError as error:  # the process died, again and again
                failure = Failure(" ".join(str(error).split())[:500])
            self.ended[task.name] = failure
            if failure:
                how = "diverged" if failure.diverged else "failed; the same command tries it again"
                logger.warning("%s %s: %s", task.name, how, failure.message)
            else:
                logger.info("run %d of %d: %s: %s", len(self.ended), self.num_runs, task.name, _valid(task))

    def _choose(self) -> None:
        """Chooses the learning rates of the models whose runs for it have ended, and wants their seeds."""
        for index, model in list(self.open.items()):
            if all(task.name in self.ended for task in model.tuning.values()):
                del self.open[index]
                self.choices[index] = choice = choose(self._valid_auc(model))
                if choice.learning_rate is None:
                    logger.warning("%s %s: no learning rate could be trained", model.backbone, model.variant)
                else:
                    logger.info("%s %s: learning rate %g", model.backbone, model.variant, choice.learning_rate)
                    self._want(model.runs[choice.learning_rate])

    def _valid_auc(self, model: Model) -> dict[float, float | None]:
        return {
            rate: None if self.ended[task.name] else mean_valid_auc(read_evaluation(task))
            for rate, task in model.tuning.items()
        }

    def _end(self) -> None:
        """Lets the runs under way write a checkpoint, and raises."""
        ray.get(self.flag.set.remote())
        if self.under_way:
            ray.wait(list(self.under_way), num_returns=len(self.under_way))
        raise TrainingInterrupted(
            f"stopped as asked after {len(self.ended)} of {self.num_runs} runs; the same command goes on, "
            "unfinished runs from their last checkpoints"
        )


def read_evaluation(task: TrainTask) -> list[dict[str, Any]]:
    """Returns the report rows of a finished run."""
    rows: list[dict[str, Any]] = storage.read_json(storage.join(task.run_uri, EVALUATION_FILE))
    return rows


def _valid(task: TrainTask) -> str:
    return f"valid AUC {mean_valid_auc(read_evaluation(task)):.4f}"


def _run(task: TrainTask, num_threads: int, gpu: bool, cold_max_rows: int, flag: Any) -> Failure | None:
    """One run; returns why it failed, if it did."""
    torch.set_num_threads(num_threads)
    try:
        with asking(flag) as should_stop, logs.about(stage="compare", run=task.name):
            if should_stop():
                raise TrainingInterrupted(f"{task.name}: not started")
            train_and_evaluate(task, open_device(gpu), cold_max_rows, should_stop)
    except (TrainingError, TrainingInterrupted, storage.StorageError) as error:
        return Failure(str(error).removeprefix(f"{task.name}: "), diverged=isinstance(error, TrainingDiverged))
    except Exception as error:
        return Failure(f"{type(error).__name__}: {error}", traceback.format_exc())
    return None
