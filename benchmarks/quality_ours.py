"""One training by this project for `quality_peers`, without any knowledge, in a process of its own and without Ray.

Trains as `jobs.train` does with ``train.num_workers = 0``, scores valid and test with the checkpoint through `Ranker`,
and writes the scores to the run's folder, as the peers' scripts do.

Axes: R rows of a split.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import REPOSITORY
from llm4msr.data.prepared import PreparedData
from llm4msr.ranker import Ranker
from llm4msr.settings import config_from_dict
from llm4msr.training.loop import train_worker
from llm4msr.training.reader import read_split
from llm4msr.training.run import TRAIN_VERSION
from llm4msr.training.task import TrainTask

SCORE_BATCH_SIZE = 8192


def code_version() -> dict[str, Any]:
    """Returns what tells one state of our training from another: its version, and a digest of its sources."""
    folder, found = REPOSITORY / "llm4msr", hashlib.sha256()
    for path in sorted([*folder.glob("models/**/*.py"), *folder.glob("training/**/*.py"), folder / "batch.py"]):
        content = path.read_bytes()
        found.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return {"train_version": TRAIN_VERSION, "sources": found.hexdigest()[:16]}


def score_split(ranker: Ranker, prepared: PreparedData, split: str) -> np.ndarray:
    """Returns score_R."""
    rows = read_split(prepared.files(split))
    parts = range(0, len(rows["label"]), SCORE_BATCH_SIZE)
    return np.concatenate([ranker.score({n: c[i : i + SCORE_BATCH_SIZE] for n, c in rows.items()}) for i in parts])


def main() -> int:
    """Trains as the JSON file named on the command line says, and writes the scores of the best epoch."""
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    config, prepared = config_from_dict(spec["config"]), PreparedData.open(spec["prepared_uri"])
    with tempfile.TemporaryDirectory(prefix="llm4msr-run-") as run_uri:
        task = TrainTask(config, spec["prepared_uri"], None, "none", spec["seed"], run_uri, spec["model"])
        metadata = train_worker(task, 0, 1, torch.device("cpu"), lambda metrics: None)
        ranker = Ranker.from_checkpoint(task.checkpoint_uri)
        for split in ("valid", "test"):
            np.save(Path(spec["folder"]) / f"{split}.npy", score_split(ranker, prepared, split))
    print(json.dumps({"epochs": len(metadata["history"])}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
