"""Searches the learning rate and the widths of the meta networks: Ray Tune runs the trials, ASHA ends the bad ones.

Below ``runs/tune-<digest>``:

* trials/<run>/trial.json     how a trial ended; written when it has
* trials/<run>/               its run: TensorBoard, checkpoints while it trains, the finished checkpoint if it was not
                              ended early
* tune/                       Ray Tune's own records, with a table of settings for TensorBoard; never read here
* best.toml                   the given configuration with the best trial's values
* manifest.json               the finished search; written last

Not Tune's own restore: it forgets up to ten seconds of results and all that ASHA knew. All trials are known before the
first starts (`llm4msr.training.trials`), so a rerun tells ASHA of those that have ended and trains the others, which go
on from their training checkpoints.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import ray
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from llm4msr import logs, storage
from llm4msr.config import Config, ConfigError, digest
from llm4msr.data.prepared import PreparedData
from llm4msr.placement import alive_nodes, most_cpus, num_fitting
from llm4msr.training.device import gpus_per_process, open_device
from llm4msr.training.loop import train_worker
from llm4msr.training.run import MOST_CPUS_BESIDE_GPU
from llm4msr.training.signals import sigterm_event
from llm4msr.training.state import load_state, newest_state
from llm4msr.training.task import TrainingDiverged, TrainingError, TrainingInterrupted, TrainTask
from llm4msr.training.trials import TUNE_VERSION, Trial, make_record, plan_search, shown, write_recipe

logger = logging.getLogger("llm4msr.tune")


def search(config: Config) -> dict[str, Any]:
    """Runs the search, goes on with it, or finds it finished; Ray must be initialised.

    Returns:
        uri; recipe_uri, where the best values were written; trials, best first: name, values, state (finished, stopped,
        diverged, failed), valid_auc (mean over scenarios of the best epoch; None where diverged or failed), epochs,
        curve ([epochs, best AUC so far] of each epoch), message (why it diverged or failed). A diverged trial does not
        end the search; a failed one neither, but the next call tries it again.

    Raises:
        ConfigError: A trial needs more than this machine has.
        TrainingError: No trial could be trained.
        TrainingInterrupted: SIGTERM came; the same call goes on.
    """
    planned = plan_search(config)
    if storage.is_finished(planned.uri):
        logger.info("%s: already searched", planned.uri)
        records = storage.read_manifest(planned.uri, "")["trials"]
    else:
        ended = [storage.read_json(t.record_uri) for t in planned.trials if storage.exists(t.record_uri)]
        known = {record["name"] for record in ended}
        left = [trial for trial in planned.trials if trial.task.name not in known]
        logger.info("%s: %d trials, %d of them have ended", planned.uri, len(planned.trials), len(ended))
        records = ended + (_run_trials(config, planned.uri, left, ended) if left else [])
        records.sort(key=lambda record: (record["valid_auc"] or 0.0, record["epochs"]), reverse=True)
    if records[0]["valid_auc"] is None:
        raise TrainingError(
            f"{planned.uri}: none of {len(records)} trials could be trained with learning rates in "
            f"{list(config.tune.learning_rate_range)}; the first: {records[0]['message']}"
        )
    recipe_uri = write_recipe(config, planned.uri, records[0])
    if not storage.is_finished(planned.uri) and all(record["state"] != "failed" for record in records):
        storage.write_manifest(planned.uri, {"kind": "search", "version": TUNE_VERSION, "trials": records})
    return {"uri": planned.uri, "recipe_uri": recipe_uri, "trials": records}


def _run_trials(
    config: Config, uri: str, trials: Sequence[Trial], ended: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Trains the trials; returns their records, those of failed ones included, which are not written."""
    resources = trial_resources(config, len(trials))
    filesystem, path = storage.arrow_filesystem(uri)
    by_name = {trial.task.name: trial for trial in trials}
    # Flat and plain, so that TensorBoard's table of settings shows them.
    settings = [{"name": t.task.name} | {k: shown(v) for k, v in t.values.items()} for t in trials]
    at_once = config.tune.max_concurrent
    with sigterm_event() as stop:
        recorder = _Recorder(by_name, len(trials) + len(ended), len(ended), stop)
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(_train_trial, tasks=by_name), resources),
            param_space={"trial": tune.grid_search(settings)},
            tune_config=tune.TuneConfig(
                scheduler=_scheduler(config, ended),
                max_concurrent_trials=None if at_once == "auto" else at_once,
                trial_dirname_creator=_trial_name,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=tune.FailureConfig(max_failures=config.train.max_failures),
                callbacks=[recorder],
                verbose=0,
            ),
        )
        results = tuner.fit()
    records = [storage.read_json(trial.record_uri) for trial in trials if storage.exists(trial.record_uri)]
    known = {record["name"] for record in records}
    for result in (results[i] for i in range(len(results))):
        assert result.config is not None
        if (name := result.config["trial"]["name"]) not in known:
            message = str(result.error).strip().splitlines()[-1] if result.error else "ended without a result"
            logger.warning("%s failed; the same command tries it again: %s", name, message)
            records.append(make_record(by_name[name], "failed", {}, message))
    return records


def trial_resources(config: Config, num_trials: int) -> dict[str, float]:
    """Returns the processors and GPUs of one trial: those configured, or what lets as many run at once as may.

    Raises:
        ConfigError: No node of this machine's own cluster has as much, or device and GPUs contradict each other.
    """
    section, nodes = config.tune, alive_nodes(ray.nodes())
    num_gpus = sum(node.num_gpus for node in nodes)
    gpus = gpus_per_process(config.train.device, section.gpus_per_trial, num_gpus, "tune.gpus_per_trial")
    at_once = num_trials if section.max_concurrent == "auto" else min(section.max_concurrent, num_trials)
    cpus = section.cpus_per_trial
    if cpus == "auto":
        # More at once than there is room for, even at a CPU each, wait for their turn.
        at_once = max(min(at_once, num_fitting(nodes, 1, gpus)), 1)
        cpus = most_cpus(nodes, at_once, gpus, MOST_CPUS_BESIDE_GPU if gpus else None)
    most = {kind: max([getattr(node, f"num_{kind}") for node in nodes], default=0) for kind in ("cpus", "gpus")}
    for kind, wanted in (("cpus", cpus), ("gpus", gpus)):
        # A cluster may grow; this machine does not, and Ray Tune would wait for ever.
        if wanted > most[kind] and not os.environ.get("RAY_ADDRESS"):
            raise ConfigError(f"tune.{kind}_per_trial: {wanted:g} are needed, this machine has {most[kind]}")
    return {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}


def _scheduler(config: Config, ended: Sequence[dict[str, Any]]) -> TrialScheduler:
    """Returns ASHA, told of the trials that have ended already; it stops no trial that has its last epoch behind it."""
    grace, last = config.tune.grace_epochs, config.train.max_epochs - 1
    if grace > last:
        return FIFOScheduler()
    scheduler = ASHAScheduler(
        time_attr="epochs",
        metric="valid_auc",
        mode="max",
        max_t=last,
        grace_period=grace,
        reduction_factor=config.tune.reduction_factor,
        stop_last_trials=False,  # after its last epoch a trial ends by itself, and writes its checkpoint
    )
    for record in ended:
        # Of the trial it reads the id alone, of the controller nothing.
        nobody: Any = None
        trial: Any = SimpleNamespace(trial_id=record["name"])
        scheduler.on_trial_add(nobody, trial)
        for epochs, auc in record["curve"]:
            scheduler.on_trial_result(nobody, trial, {"epochs": epochs, "valid_auc": auc})
    return scheduler


def _train_trial(settings: dict[str, Any], tasks: dict[str, Trial]) -> None:
    """One trial, in a process of its own: reports the best AUC so far after each epoch, those before a crash too."""
    task = tasks[settings["trial"]["name"]].task
    resources = tune.get_context().get_trial_resources().required_resources
    torch.set_num_threads(int(resources["CPU"]))
    best, epochs = 0.0, 0

    def report(metrics: dict[str, Any]) -> None:
        nonlocal best, epochs
        best, epochs = max(best, metrics["valid_auc"]), metrics["epoch"] + 1
        tune.report({"epochs": epochs, "valid_auc": best, "loss": metrics["loss"]})

    finished = storage.is_finished(task.checkpoint_uri)
    for metrics in _history(task, finished):
        report(metrics)
    if finished:
        return
    try:
        with logs.about(stage="tune", run=task.name):
            train_worker(task, 0, 1, open_device(bool(resources.get("GPU"))), report)
    except TrainingDiverged as error:
        tune.report({"epochs": epochs + 1, "valid_auc": 0.0, "diverged": str(error)})


def _history(task: TrainTask, finished: bool) -> list[dict[str, Any]]:
    """Returns the metrics of the epochs that the trial has behind it."""
    if finished:
        history: list[dict[str, Any]] = storage.read_json(storage.join(task.checkpoint_uri, "metadata.json"))["history"]
        return history
    schema = digest(PreparedData.open(task.prepared_uri).schema.to_json())
    place = newest_state(task.training_uri, task.name, schema)
    return load_state(place, task.name, schema).state.history if place else []


class _Recorder(tune.Callback):
    """On the driver: writes down how each trial ended, and ends the search when SIGTERM came."""

    def __init__(self, trials: dict[str, Trial], num_trials: int, num_ended: int, stop: threading.Event) -> None:
        self.trials, self.num_trials, self.num_ended, self.stop = trials, num_trials, num_ended, stop
        self.curves: dict[str, dict[int, float]] = {name: {} for name in trials}

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles what it was given, for a restore that is not used; an event cannot be pickled."""
        return {name: value for name, value in self.__dict__.items() if name != "stop"}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Notes an epoch; a trial that is started again reports its epochs again."""
        self.curves[_trial_name(trial)][result["epochs"]] = result["valid_auc"]

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Writes the trial's record."""
        name = _trial_name(trial)
        planned, curve = self.trials[name], self.curves[name]
        message = trial.last_result.get("diverged", "")
        state = "finished" if storage.is_finished(planned.task.checkpoint_uri) else "stopped"
        state = "diverged" if message else state
        storage.remove(planned.task.training_uri)  # first: the record says that nothing is left to do
        storage.write_json(planned.record_uri, make_record(planned, state, curve, message))
        self.num_ended += 1
        logger.info(
            "trial %d of %d %s: valid AUC %.4f after %d epochs: %s",
            self.num_ended,
            self.num_trials,
            state,
            max(curve.values()),
            max(curve),
            message or f"{name} {shown(planned.values)}",
        )

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Ends the search when asked to."""
        if self.stop.is_set():
            raise TrainingInterrupted(
                f"stopped as asked after {self.num_ended} of {self.num_trials} trials; the same command goes on, "
                "unfinished trials from their last checkpoints"
            )


def _trial_name(trial: Any) -> str:
    return str(trial.config["trial"]["name"])
