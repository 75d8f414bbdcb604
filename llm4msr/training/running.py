"""A run in progress: its position, what it has seen of the epoch, its logs, and its checkpoints.

Axes: K steps, S scenarios.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from llm4msr import storage
from llm4msr.batch import Batch
from llm4msr.config import digest
from llm4msr.data.prepared import PreparedData
from llm4msr.training.device import device_name
from llm4msr.training.reader import TrainReader, list_row_groups, prefetch
from llm4msr.training.scalars import Scalars
from llm4msr.training.state import (
    TrainState,
    check_owner,
    load_state,
    newest_state,
    save_best,
    save_state,
    take_over,
)
from llm4msr.training.task import TrainingDiverged, TrainingError, TrainingInterrupted, TrainTask
from llm4msr.training.tracking import Tracker, trackers
from llm4msr.training.trainer import Trainer

logger = logging.getLogger("llm4msr.training")

PREEMPTION_CHECK_S = 5.0  # Ray Train answers it with a barrier: not at each look


class Run:
    """A run in progress on one worker.

    Args:
        task: What is trained.
        prepared: Its data.
        trainer: Model and optimizers, as they are before the first step; goes back to the newest good checkpoint.
        should_stop: As of `train_worker`.
        preempted: As of `train_worker`.
    """

    def __init__(
        self,
        task: TrainTask,
        prepared: PreparedData,
        trainer: Trainer,
        should_stop: Callable[[], bool],
        preempted: Callable[[], bool],
    ) -> None:
        self.started = self.asked = time.monotonic()
        self.task, self.prepared, self.trainer = task, prepared, trainer
        self.should_stop, self.preempted = should_stop, preempted
        self.train, self.names = task.config.train, prepared.schema.scenario_names
        try:
            self.reader = TrainReader(
                list_row_groups(prepared.files("train")),
                batch_size=self.train.batch_size,
                num_lanes=self.train.num_lanes,
                rank=trainer.rank,
                world_size=trainer.world_size,
                seed=task.seed,
                buffer_rows=self.train.shuffle_buffer_rows,
                rows_per_user=self.train.rows_per_user,
                columns=trainer.collator.columns,
            )
        except ValueError as error:
            if isinstance(error, storage.StorageError):
                raise
            raise TrainingError(f"{task.name}: {error}") from error
        self.pending: list[torch.Tensor] = []  # losses of the steps since the last look
        self.last_saved: str | None = None
        self.state = TrainState(task.name, digest(prepared.schema.to_json()), sums_S2=[[0.0, 0.0] for _ in self.names])
        self._go_on()
        self.state.world_size = trainer.world_size
        self.seconds_before = self.state.seconds
        self.logs: list[Scalars | Tracker] = []
        if trainer.rank == 0:
            self.logs = [Scalars(task.run_uri, self.state.step), *trackers(task, self.state.step)]

    def _go_on(self) -> None:
        """Takes over the newest good checkpoint, the same on all workers."""
        state, trainer, place = self.state, self.trainer, None
        if trainer.rank == 0:
            self.token = take_over(self.task.training_uri)
            place = newest_state(self.task.training_uri, state.run, state.schema)
        place = agreed(trainer.world_size, place)
        if place is None:
            return
        loaded = load_state(place, state.run, state.schema)
        trainer.load(loaded.model, loaded.optimizer)
        self.state, self.last_saved = loaded.state, loaded.uri
        if trainer.rank == 0:
            logger.info(
                "%s: going on from %s: epoch %d, step %d of %d",
                self.task.name,
                loaded.uri,
                self.state.epoch,
                self.state.epoch_step,
                self.reader.steps_per_epoch,
            )

    def close(self, error: BaseException | None) -> None:
        """Ends the logs; `error` is what ended the training, None where it came to its end."""
        for log in self.logs:
            log.close(error)

    def seconds(self) -> float:
        """Time spent, over all starts."""
        return self.seconds_before + time.monotonic() - self.started

    def epoch(self) -> dict[str, Any]:
        """Trains what is left of the current epoch, validates, logs, saves.

        Returns:
            The epoch's metrics, the same on every worker but for data_wait_s.
        """
        state, reader = self.state, self.reader
        number, first_step = state.epoch, state.epoch_step
        self.train_started, self.wait_s, self.num_rows = time.perf_counter(), 0.0, 0
        waited_since = self.train_started
        collate = functools.partial(self.trainer.collate, num_lanes=len(reader.lanes))
        with contextlib.closing(prefetch(reader.epoch(number, first_step), collate)) as steps:
            for batches in steps:
                self.wait_s += time.perf_counter() - waited_since
                self._step(batches)
                waited_since = time.perf_counter()
        train_s = time.perf_counter() - self.train_started
        values = self.trainer.validate(self.prepared)
        self._check_defined(values)
        loss_S, rows_S = np.array(state.sums_S2).T
        metrics = {
            "epoch": number,
            "loss": float(loss_S.sum() / rows_S.sum()),
            "loss_by_scenario": self._named(loss_S / np.maximum(rows_S, 1)),
            "valid_auc": float(np.mean(values["auc"])),
            **{f"valid_{name}_by_scenario": self._named(values[name]) for name in ("auc", "gauc", "log_loss")},
            "valid_auc_bound": max(values["auc_bound"]),
            "rows_per_s": round(self.num_rows / train_s),
            "data_wait_s": round(self.wait_s, 3),
            "device": device_name(self.trainer.device),
        }
        self._finish_epoch(metrics)
        self._log_epoch(metrics)
        return metrics

    def _step(self, batches: list[Batch]) -> None:
        state = self.state
        rows = self.reader.rows_in_step(state.epoch_step)
        torch.manual_seed(step_seed(self.task.seed, state.epoch, state.epoch_step, self.trainer.rank))
        self.pending.append(self.trainer.step(batches, rows))
        self.num_rows += rows
        state.step += 1
        state.epoch_step += 1
        save = state.step % self.train.checkpoint_every_steps == 0
        if save or state.step % self.train.log_every_steps == 0 or state.epoch_step == self.reader.steps_per_epoch:
            stop, warned = self._look()
            if save or stop or warned:
                self._save()
            if stop:
                raise TrainingInterrupted(
                    f"{self.task.name}: stopped as asked at epoch {state.epoch}, step {state.step}; "
                    f"the same command goes on from {self.last_saved}"
                )

    def _look(self) -> tuple[bool, bool]:
        """Adds up the losses since the last look over all workers, checks them, and asks for signals.

        Returns:
            Whether to stop, and whether a preemption was announced.
        """
        ask = time.monotonic() - self.asked > PREEMPTION_CHECK_S
        pending_KS2 = torch.stack(self.pending)
        self.pending = []
        flags = torch.tensor([self.should_stop(), ask and self.trainer.rank == 0], dtype=torch.float64)
        sent = torch.cat([pending_KS2.flatten(), flags.to(pending_KS2.device)])
        if self.trainer.world_size > 1:
            dist.all_reduce(sent)
        sent = sent.cpu()
        stop, ask = (bool(flag) for flag in sent[-2:])
        steps_KS2 = sent[:-2].view(pending_KS2.shape).numpy()
        self._check(steps_KS2)
        self.state.sums_S2 = (np.array(self.state.sums_S2) + steps_KS2.sum(0)).tolist()
        if self.logs:
            loss_S, rows_S = steps_KS2[-1].T
            elapsed_s = time.perf_counter() - self.train_started
            scalars = {
                "train/loss": loss_S.sum() / rows_S.sum(),
                **{f"train/loss_{n}": x / r for n, x, r in zip(self.names, loss_S, rows_S, strict=True) if r},
                "train/rows_per_s": self.num_rows / elapsed_s,
                "train/data_wait_fraction": self.wait_s / elapsed_s,
            }
            for log in self.logs:
                log.write(self.state.step, scalars)
        if not ask:
            return stop, False
        self.asked = time.monotonic()
        return stop, self.preempted()

    def _check(self, steps_KS2: np.ndarray) -> None:
        """Raises for the first step whose loss is not finite or above the limit, before such a state is saved."""
        limit = self.train.max_loss
        with np.errstate(invalid="ignore", divide="ignore"):
            mean_K = steps_KS2[..., 0].sum(1) / steps_KS2[..., 1].sum(1)
            mean_KS = steps_KS2[..., 0] / steps_KS2[..., 1]
        bad_K = np.flatnonzero(~(mean_K <= limit))
        if len(bad_K) == 0:
            return
        first = int(bad_K[0])
        guilty = {n: float(x) for n, x in zip(self.names, mean_KS[first], strict=True) if not (x <= limit)}
        step = self.state.step - len(steps_KS2) + first + 1
        raise self._diverged(
            f"loss is {mean_K[first]:g} at epoch {self.state.epoch}, step {step} "
            f"(by scenario: {guilty}; train.max_loss is {limit:g})"
        )

    def _diverged(self, what: str) -> TrainingDiverged:
        return TrainingDiverged(
            f"{self.task.name}: {what}; lower train.learning_rate (now {self.train.learning_rate}), which makes a new "
            f"run; last good checkpoint: {self.last_saved or 'none yet'}"
        )

    def _check_defined(self, values: dict[str, list[float]]) -> None:
        undefined = [name for name, value in zip(self.names, values["auc"], strict=True) if math.isnan(value)]
        # Rows without one of the labels still have a log loss; scores that are not numbers have none.
        wrong = [name for name, value in zip(self.names, values["log_loss"], strict=True) if math.isnan(value)]
        if wrong and undefined and self._has_rows(wrong):
            raise self._diverged(f"scores of valid are not finite after epoch {self.state.epoch}, in {wrong}")
        if undefined:
            raise TrainingError(
                f"valid has no rows of both labels in {undefined}: AUC is not defined there; move data.split's "
                "thresholds"
            )

    def _has_rows(self, names: list[str]) -> bool:
        return all(self.prepared.num_rows("valid", name) for name in names)

    def _finish_epoch(self, metrics: dict[str, Any]) -> None:
        state, trainer = self.state, self.trainer
        if state.best_auc is None or metrics["valid_auc"] > state.best_auc:
            state.best_auc, state.best_epoch = metrics["valid_auc"], state.epoch
            weights = self._finite(trainer.best_state())
            if trainer.rank == 0:
                check_owner(self.task.training_uri, self.token)
                state.best_file = save_best(self.task.training_uri, state.epoch, weights)
        state.history.append(metrics)
        state.epoch, state.epoch_step = state.epoch + 1, 0
        state.sums_S2 = [[0.0, 0.0] for _ in self.names]
        self._save()

    def _save(self) -> None:
        """Writes a checkpoint of the running training; all workers call it."""
        self.state.seconds = self.seconds()
        model, optimizer = self._finite(self.trainer.model_state()), self.trainer.optimizer_state()
        if self.trainer.rank == 0:
            uri, keep = self.task.training_uri, self.train.num_to_keep
            check_owner(uri, self.token)
            about = {"config": self.task.config.model_dump(mode="json"), "schema": self.prepared.schema.to_json()}
            self.last_saved = save_state(uri, self.state, model, optimizer, keep, about)
            for log in self.logs:
                log.flush()

    def _finite(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the weights, to save them; a gradient may overflow in a step whose loss was still finite."""
        wrong = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
        if wrong := agreed(self.trainer.world_size, wrong):
            raise self._diverged(f"weights are not finite after step {self.state.step}: {', '.join(wrong[:3])}")
        return weights

    def _log_epoch(self, metrics: dict[str, Any]) -> None:
        if not self.logs:
            return
        by_scenario = {
            f"valid/{name}_{scenario}": value
            for name in ("auc", "gauc", "log_loss")
            for scenario, value in metrics[f"valid_{name}_by_scenario"].items()
            if value is not None
        }
        scalars = {
            "epoch/loss": metrics["loss"],
            "epoch/rows_per_s": metrics["rows_per_s"],
            "epoch/data_wait_s": metrics["data_wait_s"],
            "valid/auc_mean": metrics["valid_auc"],
        }
        for log in self.logs:
            log.write(self.state.step, scalars | by_scenario)
        logger.info(
            "%s epoch %d: loss %.4f, valid AUC %s, %s rows/s",
            self.task.name,
            metrics["epoch"],
            metrics["loss"],
            " ".join(f"{name} {value:.4f}" for name, value in metrics["valid_auc_by_scenario"].items()),
            f"{metrics['rows_per_s']:,}",
        )

    def _named(self, values_S: Any) -> dict[str, float | None]:
        pairs = zip(self.names, values_S, strict=True)
        return {name: None if math.isnan(value) else float(value) for name, value in pairs}


def agreed(world_size: int, value: Any) -> Any:
    """Returns rank 0's value on all workers."""
    values = [value]
    if world_size > 1:
        dist.broadcast_object_list(values)
    return values[0]


def step_seed(seed: int, epoch: int, epoch_step: int, rank: int) -> int:
    """Returns the seed of one worker's random numbers (dropout) in one step: a resumed step draws them again."""
    return int(np.random.SeedSequence((seed, epoch, epoch_step, rank)).generate_state(1, np.uint64)[0] >> 1)
