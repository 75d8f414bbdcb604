"""Checkpoints of a running training: written whole, refused with a reason, the one before used, old ones removed."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from llm4msr import storage
from llm4msr.training.state import TrainState, check_owner, load_state, newest_state, save_best, save_state, take_over

MODEL = {"w": torch.arange(6.0).view(2, 3), "count": torch.tensor(3)}
OPTIMIZER = {"dense.w.exp_avg": torch.ones(2, 3) / 3}


def write(uri, step, num_to_keep=5, **changes):
    state = TrainState("star-llm-1", "abc", epoch=1, epoch_step=step % 10, step=step, **changes)
    return save_state(uri, state, MODEL, OPTIMIZER, num_to_keep, {"config": {}})


def names(uri):
    return sorted({name.split("/training/")[1].split("/")[0] for name, _ in storage.list_files(uri)})


@pytest.fixture(params=["local", "s3"])
def uri(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "training")
    return f"s3://{request.getfixturevalue('bucket')}/training"


def test_what_is_written_is_read(uri):
    best = save_best(uri, 0, MODEL)
    history = [{"epoch": 0, "loss": 0.1 + 0.2, "gauc": None}]
    place = write(uri, 7, best_epoch=0, best_auc=2 / 3, best_file=best, history=history, sums_S2=[[1 / 3, 4.0]])
    assert newest_state(uri, "star-llm-1", "abc") == place
    loaded = load_state(place, "star-llm-1", "abc")
    assert (loaded.state.best_auc, loaded.state.history, loaded.state.sums_S2) == (2 / 3, history, [[1 / 3, 4.0]])
    assert (loaded.state.epoch, loaded.state.epoch_step, loaded.state.step) == (1, 7, 7)
    for written, read in ((MODEL, loaded.model), (OPTIMIZER, loaded.optimizer)):
        assert written.keys() == read.keys()
        assert all(torch.equal(written[name], read[name]) for name in written)


def test_old_ones_are_removed_and_the_best_weights_they_named(uri):
    for step, best in ((10, 0), (20, 1), (30, 1), (40, 2)):
        write(uri, step, num_to_keep=2, best_epoch=best, best_file=save_best(uri, best, MODEL))
    assert names(uri) == [
        "best-00001.safetensors",
        "best-00002.safetensors",
        "step-000000030-epoch-00001",
        "step-000000040-epoch-00001",
    ]


def test_nothing_there(uri):
    assert newest_state(uri, "star-llm-1", "abc") is None


def damage_content(place: Path):
    file = place / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def cut_short(place: Path):
    file = place / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def of_another_run(place: Path):
    manifest = json.loads((place / "manifest.json").read_text()) | {"run": "mmoe-none-9"}
    (place / "manifest.json").write_text(json.dumps(manifest))


def of_another_version(place: Path):
    manifest = json.loads((place / "manifest.json").read_text()) | {"version": 99}
    (place / "manifest.json").write_text(json.dumps(manifest))


def another_position(place: Path):
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["state"]["epoch_step"] += 1
    (place / "manifest.json").write_text(json.dumps(manifest))


def of_other_features(place: Path):
    manifest = json.loads((place / "manifest.json").read_text()) | {"schema": "xyz"}
    (place / "manifest.json").write_text(json.dumps(manifest))


def without_best(place: Path):
    (place.parent / "best-00001.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            damage_content,
            r"20-epoch-00001/model.safetensors: damaged, its content is not what was written \(sha256\)",
        ),
        (cut_short, r"20-epoch-00001/optimizer.safetensors: \d+ bytes, \d+ were written"),
        (
            lambda place: (place / "manifest.json").unlink(),
            r"20-epoch-00001 is unfinished \(no manifest.json\)",
        ),
        (
            lambda place: (place / "manifest.json").write_text("{"),
            r"20-epoch-00001/manifest.json: not JSON",
        ),
        (another_position, r"20-epoch-00001/manifest.json: damaged, its digest is not its state's"),
        (
            lambda place: (place / "manifest.json").write_text("{}"),
            r"not the manifest of a training state",
        ),
        (
            lambda place: (place / "model.safetensors").unlink(),
            r"20-epoch-00001/model.safetensors: no such file",
        ),
        (of_another_run, r"20-epoch-00001: run is 'mmoe-none-9', this run's is 'star-llm-1'"),
        (of_another_version, r"20-epoch-00001: version is 99, this run's is 1"),
        (of_other_features, r"20-epoch-00001: schema is 'xyz', this run's is 'abc'"),
        (without_best, r"best-00001.safetensors: no such file"),
    ],
)
def test_one_that_cannot_be_used_is_refused_and_the_one_before_it_is_used(tmp_path, caplog, spoil, reason):
    uri = str(tmp_path / "training")
    first = write(uri, 10, best_epoch=0, best_file=save_best(uri, 0, MODEL))
    second = write(uri, 20, best_epoch=1, best_file=save_best(uri, 1, MODEL))
    spoil(Path(second))
    with caplog.at_level(logging.WARNING, "llm4msr.training"):
        assert newest_state(uri, "star-llm-1", "abc") == first
    (record,) = caplog.records
    with pytest.raises(storage.StorageError, match=reason):
        raise storage.StorageError(record.getMessage())
    # What was refused is gone, and does not count among those kept.
    third = write(uri, 25, num_to_keep=2, best_epoch=0, best_file=save_best(uri, 0, MODEL))
    kept = ["best-00000.safetensors", "step-000000010-epoch-00001", "step-000000025-epoch-00001"]
    assert [name for name in names(uri) if name != "best-00001.safetensors"] == kept
    assert newest_state(uri, "star-llm-1", "abc") == third


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    uri = str(tmp_path / "training")
    write(uri, 10)
    half = tmp_path / "training" / "step-000000020-epoch-00001"
    half.mkdir()
    (half / ".model.safetensors.123").write_bytes(b"half")
    assert newest_state(uri, "star-llm-1", "abc").endswith("step-000000010-epoch-00001")
    assert not half.exists()


def test_only_who_started_last_may_write(tmp_path):
    uri = str(tmp_path / "training")
    first = take_over(uri)
    check_owner(uri, first)
    second = take_over(uri)
    check_owner(uri, second)
    with pytest.raises(storage.StorageError, match="another process has taken over"):
        check_owner(uri, first)
