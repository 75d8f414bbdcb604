"""Other libraries as sides of `train_throughput`: a virtual environment of each's own, its data, and one training.

An environment is made once, below ``build/peers`` (not in the repository): it sees the packages of the environment
that runs the benchmark, torch with them, and gets only what is missing there, at the versions of constraints.txt.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.harness import REPOSITORY
from benchmarks.train_world import SCENARIOS, joined_table
from llm4msr.config import Config
from llm4msr.data.prepared import PreparedData

ENVIRONMENTS = REPOSITORY / "build" / "peers"
ENVIRONMENT_VARIABLES = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}


@dataclass(frozen=True)
class Peer:
    """One library.

    Attributes:
        package: Name on PyPI.
        version: Exact.
        script: What trains with it, beside this file.
        network: What of it is trained, in words.
        data_format: What it reads, in words of its own.
    """

    package: str
    version: str
    script: str
    network: str
    data_format: str

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.package}=={self.version}"


PEERS = {
    "torch-rechub": Peer(
        "torch-rechub",
        "0.9.0",
        "train_peer_rechub.py",
        "SharedBottom with one tower (batch normalisation after each dense layer), MTLTrainer, Adam",
        "columns in memory (DataGenerator)",
    ),
    "fuxictr": Peer(
        "fuxictr",
        "2.3.10",
        "train_peer_fuxictr.py",
        "FeatureEmbedding and MLP_Block (hidden and tower widths in one stack) under BaseModel.fit, Adam",
        "parquet",
    ),
}


def make_environment(peer: Peer, folder: Path = ENVIRONMENTS) -> Path:
    """Returns the Python of a peer's environment, made where it is not there yet.

    Raises:
        RuntimeError: It could not be made; the message holds what pip said.
    """
    place = folder / f"{peer.package}-{peer.version}"
    python, ready = place / "bin" / "python", place / "ready"
    if ready.exists():
        return python
    shutil.rmtree(place, ignore_errors=True)
    run = {"check": True, "capture_output": True, "text": True}
    try:
        subprocess.run([sys.executable, "-m", "venv", str(place)], **run)
        own = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
        (place / own / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
        install = [str(python), "-m", "pip", "install", "-c", str(REPOSITORY / "constraints.txt"), peer.requirement]
        subprocess.run(install, **run)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"no environment for {peer.requirement}: {(error.stderr or '').strip()[-2000:]}") from error
    ready.touch()
    return python


def write_tables(prepared: PreparedData, folder: Path) -> dict[str, Any]:
    """Writes train and valid as flat Parquet files and describes them; what all peers read."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "valid"):
        pq.write_table(joined_table(prepared, split), folder / f"{split}.parquet")
    features = [
        {"name": f.name, "kind": f.kind, "num_embeddings": f.num_embeddings, "max_length": f.max_length}
        for f in prepared.schema.features
    ]
    features.append({"name": "scenario", "kind": "categorical", "num_embeddings": len(SCENARIOS), "max_length": 0})
    return {split: str(folder / f"{split}.parquet") for split in ("train", "valid")} | {"features": features}


def train_peer(
    name: str, python: Path, tables: dict[str, Any], config: Config, folder: Path, threads: int
) -> dict[str, Any]:
    """Runs one training in a process of its own.

    Args:
        name: Key of `PEERS`.
        python: Of its environment.
        tables: As `write_tables` returns them.
        config: Widths, batch size, learning rate and number of epochs are taken from it.
        folder: Where it may write.
        threads: Of torch.

    Returns:
        epoch_s: seconds of each epoch; load_s: seconds of loading before; auc: on valid, after the last.
    """
    peer, model, train = PEERS[name], config.model, config.train
    folder.mkdir(parents=True, exist_ok=True)
    spec = tables | {
        "folder": str(folder),
        "data_format": peer.data_format,
        "embedding_dim": model.embedding_dim,
        "hidden_dims": model.hidden_dims,
        "tower_dims": model.tower_dims,
        "dropout": model.dropout,
        "batch_size": train.batch_size,
        "learning_rate": train.learning_rate,
        "weight_decay": train.weight_decay,
        "num_epochs": train.max_epochs,
        "num_loaders": 1,  # one process beside the training, as our reader is one thread beside it
    }
    (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    environment = os.environ | ENVIRONMENT_VARIABLES | {"OMP_NUM_THREADS": str(threads)}
    command = [str(python), str(Path(__file__).parent / peer.script), str(folder / "spec.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{peer.requirement} ended with exit code {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
