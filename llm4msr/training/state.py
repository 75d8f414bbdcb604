"""Checkpoints of a running training: all that the rest of the run depends on, so that it can go on elsewhere.

Below ``<run>/training``:

* step-000001234-epoch-00002/model.safetensors       weights and buffers after that many steps, in that epoch
* step-000001234-epoch-00002/optimizer.safetensors   each optimizer's tensors, named after their parameters
* step-000001234-epoch-00002/manifest.json           `TrainState`, configuration, schema, size and sha256 of the files;
                                                     written last
* best-00003.safetensors                             the weights of the best epoch so far, which a state names
* owner.json                                         who trains: whoever started last

Random numbers are not stored: those of a step follow from seed, epoch, step and rank. Tables that are sharded over
workers are written as one, so the files do not tell how a run was distributed.

Not Ray Train's checkpoints: a state is there as soon as its manifest is, whatever becomes of the driver; a damaged one
falls back to the one before it; and steps need no barrier with the controller (docs/decisions/0008).
"""

from __future__ import annotations

import logging
import uuid
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from llm4msr import storage
from llm4msr.config import digest
from llm4msr.training.tensors import read_tensors, write_tensors

logger = logging.getLogger("llm4msr.training")

STATE_VERSION = 1
MODEL_FILE, OPTIMIZER_FILE, OWNER_FILE = "model.safetensors", "optimizer.safetensors", "owner.json"


@dataclass
class TrainState:
    """Where a run is.

    Attributes:
        run: Name of the run; it holds the digest of all that its result depends on.
        schema: Digest of the feature schema that the tensors are shaped by.
        epoch: Epoch that the next step belongs to.
        epoch_step: Steps of that epoch already taken.
        step: Steps taken in all.
        sums_S2: This epoch's training loss so far, by scenario: [sum, rows].
        best_epoch: Epoch with the best mean scenario AUC on valid; -1 before the first.
        best_auc: That AUC; None before the first.
        best_file: {"file", "bytes", "sha256"} of its weights.
        history: Metrics of the finished epochs.
        seconds: Time spent, over all starts.
        world_size: Workers that wrote this; any other number may go on.
    """

    run: str
    schema: str
    epoch: int = 0
    epoch_step: int = 0
    step: int = 0
    sums_S2: list[list[float]] = field(default_factory=list)
    best_epoch: int = -1
    best_auc: float | None = None
    best_file: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    world_size: int = 1


@dataclass(frozen=True)
class Loaded:
    """A state that was found good, with its tensors on the CPU."""

    uri: str
    state: TrainState
    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]


def take_over(uri: str) -> str:
    """Makes the caller the one who writes here; returns the token to show when saving.

    A killed driver's workers may live on for some seconds on a lasting cluster: they can write no more.
    """
    token = uuid.uuid4().hex
    storage.write_json(storage.join(uri, OWNER_FILE), {"token": token})
    return token


def check_owner(uri: str, token: str) -> None:
    """Refuses to write where another process has taken over.

    Raises:
        StorageError: It has.
    """
    if storage.read_json(storage.join(uri, OWNER_FILE)).get("token") != token:
        raise storage.StorageError(f"{uri}: another process has taken over this training; this one ends")


def save_state(
    uri: str,
    state: TrainState,
    model: dict[str, torch.Tensor],
    optimizer: dict[str, torch.Tensor],
    num_to_keep: int,
    about: dict[str, Any],
) -> str:
    """Writes a state, its manifest last, then removes what is older than the newest `num_to_keep`.

    A state that is there is never written again: the end of an epoch has another name than its last step.

    Args:
        uri: The run's training directory.
        state: Where the run is.
        model: Weights and buffers.
        optimizer: The optimizers' tensors.
        num_to_keep: At least 1.
        about: Configuration and schema, for whoever looks.

    Returns:
        The directory of the state.
    """
    place = storage.join(uri, f"step-{state.step:09d}-epoch-{state.epoch:05d}")
    written = {
        MODEL_FILE: write_tensors(storage.join(place, MODEL_FILE), model),
        OPTIMIZER_FILE: write_tensors(storage.join(place, OPTIMIZER_FILE), optimizer),
    }
    tree = asdict(state)
    manifest = {"kind": "training", "version": STATE_VERSION, "run": state.run, "schema": state.schema}
    storage.write_manifest(place, manifest | {"state": tree, "digest": digest(tree), "files": written, "about": about})
    _prune(uri, num_to_keep, place)
    return place


def save_best(uri: str, epoch: int, model: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Writes the weights of the best epoch so far; returns what a state names them by."""
    name = f"best-{epoch:05d}.safetensors"
    return {"file": name, **write_tensors(storage.join(uri, name), model)}


def newest_state(uri: str, run: str, schema: str) -> str | None:
    """Returns the directory of the newest state that can be gone on from, or None.

    One that is unfinished, damaged, or of another run or version is refused with a warning that says why, and removed;
    the one before it is looked at.
    """
    for place in reversed(_states(uri)):
        try:
            loaded = load_state(place, run, schema)
            if loaded.state.best_file is not None:
                read_tensors(storage.join(uri, loaded.state.best_file["file"]), loaded.state.best_file)
        except storage.RemoteError:
            raise  # a store that refuses to read it says nothing about the checkpoint
        except storage.StorageError as error:
            logger.warning("checkpoint refused, looking at the one before it: %s", error)
            storage.remove(place)
        else:
            return place
    return None


def load_state(place: str, run: str, schema: str) -> Loaded:
    """Reads a state and checks it: files, digests, and whose it is.

    Raises:
        StorageError: It cannot be used; the message says why.
    """
    manifest = storage.read_manifest(place, "its writer was stopped")
    names = {f.name for f in fields(TrainState)}
    if not isinstance(manifest, dict) or not {"state", "digest", "files"} <= set(manifest):
        raise storage.StorageError(f"{storage.join(place, storage.MANIFEST)}: not the manifest of a training state")
    wanted = {"kind": "training", "version": STATE_VERSION, "run": run, "schema": schema}
    for name, value in wanted.items():
        if manifest.get(name) != value:
            raise storage.StorageError(f"{place}: {name} is {manifest.get(name)!r}, this run's is {value!r}")
    tree, files = manifest["state"], manifest["files"]
    if digest(tree) != manifest["digest"] or set(tree) != names or not {MODEL_FILE, OPTIMIZER_FILE} <= set(files):
        raise storage.StorageError(f"{storage.join(place, storage.MANIFEST)}: damaged, its digest is not its state's")
    tensors = [read_tensors(storage.join(place, name), files[name]) for name in (MODEL_FILE, OPTIMIZER_FILE)]
    return Loaded(place, TrainState(**tree), *tensors)


def _states(uri: str) -> list[str]:
    """Returns the directories of states, finished or not, in order of steps."""
    fs, path = storage.filesystem(uri)
    with storage.told(uri, "listed"):
        found = fs.ls(path, detail=False) if storage.exists(uri) else []
    names = [name.rstrip("/").rsplit("/", 1)[-1] for name in found]
    return sorted(storage.join(uri, name) for name in names if name.startswith("step-"))


def _prune(uri: str, num_to_keep: int, newest: str) -> None:
    """Removes all but the newest states, and weights of epochs that none of those kept names.

    A listing may lag: the newest state counts in any case, or the weights that it alone names would be removed.
    """
    places = sorted({*_states(uri), newest})
    for place in places[:-num_to_keep]:
        storage.remove(place)
    used = set()
    for place in places[-num_to_keep:]:
        if storage.is_finished(place) and (best := storage.read_manifest(place, "")["state"]["best_file"]):
            used.add(best["file"])
    for name, _ in storage.list_files(uri, ".safetensors"):
        base = name.rsplit("/", 1)[-1]
        if base.startswith("best-") and base not in used:
            storage.remove(name)
