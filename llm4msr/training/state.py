"""Checkpoints of a running training: all that the rest of the run depends on, so that it can go on elsewhere.

Below ``<run>/training``:

* step-000001234/model.safetensors       weights and buffers after that many steps
* step-000001234/optimizer.safetensors   each optimizer's tensors, named after their parameters
* step-000001234/state.json              `TrainState`
* step-000001234/manifest.json           size and sha256 of the files; written last
* best-00003.safetensors                 the weights of the best epoch so far, named by state.json

Random numbers are not stored: those of a step follow from seed, epoch, step and rank. Tables that are sharded over
workers are written as one, so the files do not tell how a run was distributed.

Not Ray Train's checkpoints: a state is there as soon as its manifest is, whatever becomes of the driver; a damaged one
falls back to the one before it; and steps need no barrier with the controller (docs/decisions/0008).
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from llm4msr import storage
from llm4msr.training.tensors import read_tensors, write_tensors

logger = logging.getLogger("llm4msr.training")

STATE_VERSION = 1
MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "optimizer.safetensors", "state.json"


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


def save_state(
    uri: str,
    state: TrainState,
    model: dict[str, torch.Tensor],
    optimizer: dict[str, torch.Tensor],
    num_to_keep: int,
) -> str:
    """Writes a state, its manifest last, then removes what is older than the newest `num_to_keep`.

    Args:
        uri: The run's training directory.
        state: Where the run is.
        model: Weights and buffers.
        optimizer: The optimizers' tensors.
        num_to_keep: At least 1.

    Returns:
        The directory of the state.
    """
    place = storage.join(uri, f"step-{state.step:09d}")
    storage.remove(place)  # of an attempt that did not end
    written = {
        MODEL_FILE: write_tensors(storage.join(place, MODEL_FILE), model),
        OPTIMIZER_FILE: write_tensors(storage.join(place, OPTIMIZER_FILE), optimizer),
    }
    manifest = {"kind": "training", "version": STATE_VERSION, "run": state.run, "schema": state.schema}
    storage.write_json(storage.join(place, STATE_FILE), asdict(state))
    storage.write_manifest(place, manifest | {"files": written})
    _prune(uri, state, place, num_to_keep)
    return place


def save_best(uri: str, epoch: int, model: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Writes the weights of the best epoch so far; returns what a state names them by."""
    name = f"best-{epoch:05d}.safetensors"
    return {"file": name, **write_tensors(storage.join(uri, name), model)}


def newest_state(uri: str, run: str, schema: str) -> str | None:
    """Returns the directory of the newest state that can be gone on from, or None.

    One that is unfinished, damaged, or of another run or version is refused with a warning that says why, and the one
    before it is looked at.
    """
    for place in sorted(_states(uri), reverse=True):
        try:
            load_state(place, run, schema)
        except storage.StorageError as error:
            logger.warning("checkpoint refused, looking at the one before it: %s", error)
        else:
            return place
    return None


def load_state(place: str, run: str, schema: str) -> Loaded:
    """Reads a state and checks it whole: files, digests, whose it is, and the best weights that it names.

    Raises:
        StorageError: It cannot be used; the message says why.
    """
    manifest = storage.read_manifest(place, "its writer was stopped")
    found = {name: manifest.get(name) for name in ("kind", "version", "run", "schema")}
    wanted = {"kind": "training", "version": STATE_VERSION, "run": run, "schema": schema}
    for name, value in wanted.items():
        if found[name] != value:
            raise storage.StorageError(f"{place}: {name} is {found[name]!r}, this run's is {value!r}")
    tree = storage.read_json(storage.join(place, STATE_FILE))
    names = {f.name for f in fields(TrainState)}
    if not isinstance(tree, dict) or set(tree) != names:
        raise storage.StorageError(f"{storage.join(place, STATE_FILE)}: not a training state: needs {sorted(names)}")
    state = TrainState(**tree)
    tensors = [read_tensors(storage.join(place, n), manifest["files"][n]) for n in (MODEL_FILE, OPTIMIZER_FILE)]
    if state.best_file is not None:
        read_tensors(storage.join(place.rsplit("/", 1)[0], state.best_file["file"]), state.best_file)
    return Loaded(place, state, *tensors)


def _states(uri: str) -> list[str]:
    """Returns the directories of states, finished or not, in order of steps."""
    base = storage.absolute(uri).rstrip("/")
    found = {name[len(base) :].strip("/").split("/")[0] for name, _ in storage.list_files(uri)}
    return sorted(storage.join(uri, name) for name in found if name.startswith("step-"))


def _prune(uri: str, state: TrainState, place: str, num_to_keep: int) -> None:
    """Removes old states, those of later steps (they were refused), and weights of epochs that no kept state names."""
    places = _states(uri)
    current = places.index(place)
    kept = places[max(current + 1 - num_to_keep, 0) : current + 1]
    for other in set(places) - set(kept):
        storage.remove(other)
    used = {state.best_file["file"]} if state.best_file else set()
    for other in kept[:-1]:
        if storage.is_finished(other) and (best := storage.read_json(storage.join(other, STATE_FILE))["best_file"]):
            used.add(best["file"])
    for name, _ in storage.list_files(uri, ".safetensors"):
        base = name.rsplit("/", 1)[-1]
        if base.startswith("best-") and base not in used:
            storage.remove(name)
