"""Golden requests: written with the checkpoint, asked again by whoever loads it."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import tiny_checkpoint, tiny_knowledge, tiny_prepared

from llm4msr import storage
from llm4msr.golden import GOLDEN_FILE, TOLERANCE, check_golden
from llm4msr.ranker import Ranker


@pytest.fixture(scope="module", params=["int64", "string"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    prepared = tiny_prepared(str(folder / "prepared"), user_key_type=request.param)
    return folder / tiny_checkpoint(str(folder / "checkpoint"), prepared, tiny_knowledge())


def golden(checkpoint):
    return json.loads((checkpoint / GOLDEN_FILE).read_text())


def test_every_scenario_has_known_users_and_a_stranger(checkpoint):
    rows, ranker = golden(checkpoint), Ranker.from_checkpoint(str(checkpoint))
    assert [row["scenario"] for row in rows] == ["rec"] * 3 + ["search"] * 3
    known = set(ranker.checkpoint.users["key"].to_pylist())
    assert [row["user"] in known for row in rows] == [True, True, False] * 2
    assert all(len(set(row["items"])) == len(row["scores"]) == 20 for row in rows)
    scores = [score for row in rows for score in row["scores"]]
    assert min(scores) < max(scores) and all(0 < score < 1 for score in scores)
    check_golden(ranker)


def test_other_weights_are_found_out(checkpoint):
    ranker = Ranker.from_checkpoint(str(checkpoint))
    with torch.no_grad():
        ranker.checkpoint.model.backbone.auxiliary[-1].bias += 0.01
    with pytest.raises(storage.StorageError, match=r"golden\.json: user .* 'rec': item 70.. has the score 0\."):
        check_golden(ranker)


@pytest.mark.parametrize("shift", [TOLERANCE / 2, -2 * TOLERANCE, float("nan")])
def test_rounding_is_no_difference(checkpoint, tmp_path, shift):
    rows = golden(checkpoint)
    rows[-1]["scores"][-1] += shift
    ranker = Ranker.from_checkpoint(str(checkpoint))
    place = checkpoint / GOLDEN_FILE
    kept = place.read_text()
    place.write_text(json.dumps(rows))
    try:
        if abs(shift) < TOLERANCE:
            check_golden(ranker)
        else:
            with pytest.raises(storage.StorageError, match="scenario 'search'"):
                check_golden(ranker)
    finally:
        place.write_text(kept)


def test_a_checkpoint_without_them_cannot_be_checked(checkpoint):
    ranker = Ranker.from_checkpoint(str(checkpoint))
    place = checkpoint / GOLDEN_FILE
    kept = place.read_text()
    place.unlink()
    try:
        with pytest.raises(storage.StorageError, match=r"golden\.json: no such file: .* train it again"):
            check_golden(ranker)
    finally:
        place.write_text(kept)
