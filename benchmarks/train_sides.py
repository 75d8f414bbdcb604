"""Sides of the benchmarks of training, each in a process of its own: the whole loop, the bare loop, the feed alone.

* train: the project's training as it is. With workers through Ray Train, with 0 workers in this process without Ray.
* floor: the same model and the same optimizers stepped over the same batches, which lie ready in memory. Nothing is
  read, encoded, logged, checked or validated.
* feed: batches of an epoch, and no training: our reader and collator, or Ray Data in its two ways (`train_feed`).

A process prints one line of JSON; memory is that of the process that trains, its high-water mark as the kernel keeps
it (VmHWM).

Axes: B rows, U distinct users of a batch + 1, K knowledge width.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import REPOSITORY
from llm4msr.config import Config

SAMPLE_SECONDS = 0.1
WORKER_TITLE = "RayTrainWorker"  # in the title of a process of Ray Train's group


@dataclass(frozen=True)
class Side:
    """What one process does.

    Attributes:
        step: train, floor, or a kind of feed (`train_feed.FEEDS`).
        prepared_uri: The data.
        knowledge_uri: The knowledge table; None trains the backbone alone.
        config: Configuration as a tree: sections model and train.
        threads: Of torch in each process that trains.
    """

    step: str
    prepared_uri: str
    knowledge_uri: str | None
    config: dict[str, Any]
    threads: int


def default_threads() -> int:
    """Returns how many threads torch gets beside the one that reads and collates: one less than there are cores."""
    return max(1, len(os.sched_getaffinity(0)) - 1)


def config_of(side: Side) -> Config:
    """Returns the configuration of a side; what it does not name is as a user gets it."""
    from llm4msr.settings import config_from_dict

    tree = {"workspace_uri": "unused", **side.config}
    tree["experiment"] = {"knowledge": ["llm" if side.knowledge_uri else "none"]}
    # A worker of several processors leaves one to the thread that reads and collates.
    cpus = side.threads + 1 if side.threads > 1 else 1
    tree["train"] = {**tree.get("train", {}), "cpus_per_worker": cpus}
    return config_from_dict(tree)


def run_side(side: Side) -> dict[str, Any]:
    """Runs one side in a process of its own.

    Returns:
        What the step returns (see `train_here`, `floor_here` and `train_feed.feed_here`), and peak_rss_bytes: of the
        largest process that trains.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(side.threads)}  # Ray's workers inherit it
    command = [sys.executable, "-m", "benchmarks.train_sides", json.dumps(asdict(side))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, **pipes) as process:
        peak = _PeakMemory(psutil.Process(process.pid))
        printed, errors = process.communicate()
        peak_bytes = peak.stop()
    if process.returncode:
        raise RuntimeError(f"side {side.step} ended with exit code {process.returncode}: {errors[-4000:]}")
    return json.loads(printed.splitlines()[-1]) | {"peak_rss_bytes": peak_bytes}


def train_here(side: Side) -> dict[str, Any]:
    """Trains in this process, or in workers below it.

    Returns:
        rows_per_s, wait_s, valid_auc: of each epoch; num_rows: of an epoch; startup_s: all time outside the epochs'
        training, such as Ray's start, the tables, validation and checkpoints; num_parameters.
    """
    import torch

    from jobs.session import ray_session
    from llm4msr.data.prepared import PreparedData
    from llm4msr.training.loop import train_worker
    from llm4msr.training.run import train
    from llm4msr.training.task import TrainTask

    config = config_of(side)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="llm4msr-run-") as folder:
        knowledge = "llm" if side.knowledge_uri else "none"
        task = TrainTask(config, side.prepared_uri, side.knowledge_uri, knowledge, 0, folder, "benchmark")
        if config.train.num_workers == 0:
            torch.set_num_threads(side.threads)
            metadata = train_worker(task, 0, 1, torch.device("cpu"), lambda metrics: None)
        else:
            with ray_session():
                metadata = train(task)
    seconds = time.perf_counter() - started
    num_rows = PreparedData.open(side.prepared_uri).num_rows("train")
    rates = [epoch["rows_per_s"] for epoch in metadata["history"]]
    return {
        "rows_per_s": rates,
        "wait_s": [epoch["data_wait_s"] for epoch in metadata["history"]],
        "valid_auc": [epoch["valid_auc"] for epoch in metadata["history"]],
        "num_rows": num_rows,
        "startup_s": seconds - sum(num_rows / rate for rate in rates),
        "num_parameters": metadata["num_parameters"],
    }


def floor_here(side: Side) -> dict[str, Any]:
    """Steps over batches that are ready; as many epochs as train.max_epochs.

    Returns:
        rows_per_s: of each epoch; num_rows; subjects: mean distinct vectors of users in a batch.
    """
    import torch

    from llm4msr.data.prepared import PreparedData
    from llm4msr.knowledge.table import KnowledgeTable

    torch.set_num_threads(side.threads)
    config, prepared = config_of(side), PreparedData.open(side.prepared_uri)
    knowledge = KnowledgeTable.load(side.knowledge_uri) if side.knowledge_uri else None
    batches = list(collated_batches(config, prepared, knowledge))
    loop = BareLoop(config, prepared.schema, knowledge)
    num_rows = sum(map(len, batches))
    rates = [num_rows / loop.seconds(batches) for _ in range(config.train.max_epochs)]
    subjects = sum(len(b.knowledge_UK) - 1 for b in batches) / len(batches) if knowledge else 0
    return {"rows_per_s": rates, "num_rows": num_rows, "subjects": subjects}


class BareLoop:
    """The model and the optimizers of a run, stepped over batches that are ready, in this process.

    Args:
        config: Of the run: in float32, a batch in one part.
        schema: Features and scenarios.
        knowledge: What the batches were collated with; None makes the backbone alone.
    """

    def __init__(self, config: Config, schema: Any, knowledge: Any) -> None:
        import torch

        from llm4msr.models.llm4msr import build_model, set_knowledge
        from llm4msr.training.sparse import embedding_parameters
        from llm4msr.training.trainer import SPARSE_OPTIMIZERS

        train = config.train
        assert train.precision == "float32" and train.accumulate_steps == 1, train
        torch.manual_seed(0)
        self.model = build_model(schema, config.model, knowledge.width if knowledge else None, False)
        if knowledge:
            set_knowledge(self.model, knowledge)
        tables = embedding_parameters(self.model)
        dense = [p for name, p in self.model.named_parameters() if name not in tables]
        self._optimizers = [
            torch.optim.AdamW(dense, lr=train.learning_rate, weight_decay=train.weight_decay, fused=True),
            SPARSE_OPTIMIZERS[train.embedding_optimizer](tables.values(), lr=train.learning_rate),
        ]
        self.model.train()

    def seconds(self, batches: Sequence[Any]) -> float:
        """Takes a step over each batch: forward pass, loss, backward pass, optimizers; returns the seconds of all."""
        from torch import nn

        started = time.perf_counter()
        for batch in batches:
            logit_B, _ = self.model(batch)
            loss = nn.functional.binary_cross_entropy_with_logits(logit_B, batch.label_B)
            for optimizer in self._optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in self._optimizers:
                optimizer.step()
        return time.perf_counter() - started


def make_collator(prepared: Any, knowledge: Any) -> Any:
    """Returns the collator of a data set."""
    from llm4msr.batch import Collator, EntityFeatures

    users, items = prepared.users(), prepared.items()
    return Collator(
        prepared.schema,
        EntityFeatures.from_table(users, prepared.schema, "user"),
        EntityFeatures.from_table(items, prepared.schema, "item"),
        knowledge,
    )


def make_reader(config: Config, prepared: Any, columns: Sequence[str]) -> Any:
    """Returns the reader of a run with one worker."""
    from llm4msr.training.reader import TrainReader, list_row_groups

    train = config.train
    return TrainReader(
        list_row_groups(prepared.files("train")),
        batch_size=train.batch_size,
        num_lanes=train.num_lanes,
        rank=0,
        world_size=1,
        seed=0,
        buffer_rows=train.shuffle_buffer_rows,
        rows_per_user=train.rows_per_user,
        columns=columns,
    )


def collated_batches(config: Config, prepared: Any, knowledge: Any, epoch: int = 0) -> Iterator[Any]:
    """Yields the batches of one epoch as a run with one worker sees them, collated in a thread of their own."""
    from llm4msr.training.reader import prefetch

    collator = make_collator(prepared, knowledge)
    return prefetch(make_reader(config, prepared, collator.columns).epoch(epoch), collator)


class _PeakMemory:
    """Watches the high-water marks of a process and all below it, until they end."""

    def __init__(self, process: psutil.Process) -> None:
        self._process, self._own, self._workers = process, 0, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Returns bytes of the largest worker of Ray Train; of the process itself where there is none."""
        self._ended.set()
        self._thread.join()
        return self._workers or self._own

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            try:
                self._own = max(self._own, high_water_bytes(self._process.pid))
                for child in self._process.children(recursive=True):
                    if WORKER_TITLE in " ".join(child.cmdline()[:1]):
                        self._workers = max(self._workers, high_water_bytes(child.pid))
            except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError, ProcessLookupError):
                continue  # one of them ended meanwhile


def high_water_bytes(pid: int) -> int:
    """Returns the most resident memory that a process ever had; 0 for one that has ended and not been waited for."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> int:
    """Runs the side that the command line holds as JSON."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("side")
    side = Side(**json.loads(options.parse_args().side))
    if side.step == "train":
        found = train_here(side)
    elif side.step == "floor":
        found = floor_here(side)
    else:
        from benchmarks.train_feed import feed_here

        found = feed_here(side)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
