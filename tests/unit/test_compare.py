"""A comparison's choice, statistics and slices: hand-computed, without Ray."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score
from tiny import tiny_checkpoint, tiny_knowledge, tiny_prepared

from llm4msr import storage
from llm4msr.comparison.plan import choose, mean_valid_auc
from llm4msr.comparison.results import COLUMNS, control_summaries, scenario_summaries, slice_summaries, tidy_rows
from llm4msr.comparison.statistics import compare_pairs, paired_gain, summarise
from llm4msr.config import CONTROLS
from llm4msr.data.prepared import ITEMS_FILE, USERS_FILE
from llm4msr.evaluation import (
    EVALUATION_VERSION,
    _training_rows,
    activity_slices,
    evaluate_checkpoint,
    evaluate_in_detail,
    reliability,
)
from llm4msr.ranker import Ranker
from llm4msr.schema import feature_table_schema
from llm4msr.training.reader import read_split

# ---------------------------------------------------------------- statistics


def test_paired_gain_by_hand():
    """Differences 0.02, 0.03, 0.07: mean 0.04, variance 0.0007, t = 0.04 / sqrt(0.0007 / 3); p of 2 degrees exactly."""
    gain = paired_gain({0: 0.72, 1: 0.74, 2: 0.79, 7: 0.99}, {2: 0.72, 1: 0.71, 0: 0.70, 9: 0.1})
    t = 0.04 / math.sqrt(0.0007 / 3)
    assert gain.num_seeds == 3
    assert gain.mean == pytest.approx(0.04)
    assert gain.std == pytest.approx(math.sqrt(0.0007))
    assert gain.rela_impr == pytest.approx(0.25 / 0.21 - 1)
    assert gain.p == pytest.approx(1 - t / math.sqrt(2 + t * t)) == pytest.approx(0.1201, abs=1e-4)


def test_paired_gain_where_it_is_not_defined():
    two = paired_gain({0: 0.6, 1: 0.7}, {0: 0.5, 1: 0.5})
    assert two.p == pytest.approx(1 - 2 / math.pi * math.atan(3))  # t = 0.15 / (sqrt(0.005) / sqrt(2)) = 3
    assert two.rela_impr is None  # the reference does not rank
    assert paired_gain({0: 0.6}, {0: 0.45}).rela_impr is None  # worse than chance: the ratio would change its sign
    one = paired_gain({0: 0.6}, {0: 0.55})
    assert (one.num_seeds, one.std, one.p) == (1, None, None)
    assert one.rela_impr == pytest.approx(1.0)
    assert paired_gain({0: 0.6, 1: 0.7}, {0: 0.6, 1: 0.7}).p is None
    assert paired_gain({0: 0.6}, {1: 0.6}) is None
    worse = paired_gain({0: 0.45, 1: 0.45}, {0: 0.6, 1: 0.7})
    assert worse.rela_impr == pytest.approx(-0.05 / 0.15 - 1) and worse.mean == pytest.approx(-0.2)


def row(backbone, variant, seed, auc, **more):
    metrics = {"gauc": None, "log_loss": 0.5, "calibration": 1.0, "num_rows": 10, "num_positives": 4}
    return {"backbone": backbone, "variant": variant, "seed": seed, "auc": auc, **metrics, **more}


def test_summaries_compare_within_the_backbone():
    rows = [row("a", "none", s, auc) for s, auc in ((0, 0.6), (1, 0.7))]
    rows += [row("a", "llm", s, auc, log_loss=0.1 * s) for s, auc in ((0, 0.7), (1, 0.9), (2, 0.5))]
    rows += [row("b", "llm", 0, 0.8), row("c", "llm", 0, None)]
    models = [("a", "none"), ("a", "llm"), ("b", "none"), ("b", "llm"), ("c", "llm")]
    none, llm, other, undefined = summarise(rows, models, "none")
    assert (none["variant"], none["gain"], none["num_seeds"]) == ("none", None, 2)
    assert none["auc"] == pytest.approx(0.65) and none["auc_std"] == pytest.approx(math.sqrt(0.005))
    assert llm["auc"] == pytest.approx(0.7) and llm["num_seeds"] == 3  # its own seeds, all of them
    assert llm["gain"]["mean"] == pytest.approx(0.15) and llm["gain"]["num_seeds"] == 2  # those that both have
    assert llm["log_loss"] == pytest.approx(0.1)
    assert llm["gauc"] is llm["gauc_std"] is None
    assert (other["backbone"], other["gain"], other["auc_std"]) == ("b", None, None)
    assert (undefined["auc"], undefined["gain"]) == (None, None)


def test_controls_are_compared_by_seed_within_the_backbone():
    """Differences to shuffled 0.1, 0.3: mean 0.2, t = 0.2 / (sqrt(0.02) / sqrt(2)) = 2; p of 1 degree exactly."""
    rows = [row("a", "llm", s, auc) for s, auc in ((0, 0.7), (1, 0.8), (2, 0.99))]
    rows += [row("a", "shuffled", s, auc) for s, auc in ((1, 0.5), (0, 0.6))]
    rows += [row("b", "llm", 0, 0.9), row("b", "random", 0, 0.65), row("b", "random", 1, 0.1)]
    pairs = [("a", "llm", "shuffled"), ("a", "llm", "random"), ("b", "llm", "random")]
    shuffled, absent, other = compare_pairs(rows, pairs)
    assert [(r["backbone"], r["variant"], r["control"]) for r in (shuffled, absent, other)] == pairs
    gain = shuffled["gain"]
    assert (gain["num_seeds"], gain["mean"], gain["std"]) == (2, pytest.approx(0.2), pytest.approx(math.sqrt(0.02)))
    assert gain["p"] == pytest.approx(1 - 2 / math.pi * math.atan(2))
    assert gain["rela_impr"] == pytest.approx(0.25 / 0.05 - 1)
    assert absent["gain"] is None
    assert (other["gain"]["mean"], other["gain"]["num_seeds"], other["gain"]["p"]) == (pytest.approx(0.25), 1, None)


# ---------------------------------------------------------------- slices


def test_activity_joins_parts_without_rows():
    counts = np.array([0, 1, 3, 4, 10, 11, 30, 31, 500])
    slices = {name: counts[mask].tolist() for name, mask in activity_slices(counts)}
    assert slices == {"0": [0], "1-3": [1, 3], "4-10": [4, 10], "11-30": [11, 30], "31+": [31, 500]}
    assert [name for name, _ in activity_slices(np.array([2, 12, 12]))] == ["0-3", "4+"]
    assert [name for name, _ in activity_slices(np.array([0, 99]))] == ["0", "1+"]
    assert [name for name, _ in activity_slices(np.array([7]))] == ["0+"]
    assert activity_slices(np.array([], int)) == []


def test_reliability_bins_hold_equally_many_rows():
    score = np.arange(20) / 20
    label = (np.arange(20) >= 10).astype(np.int8)
    bins = reliability(label, score)
    assert [b["num_rows"] for b in bins] == [2] * 10
    assert [b["mean_label"] for b in bins] == [0.0] * 5 + [1.0] * 5
    assert [b["mean_score"] for b in bins] == pytest.approx([(4 * n + 1) / 40 for n in range(10)])
    shuffled = np.random.default_rng(0).permutation(20)
    assert [b == pytest.approx(a) for a, b in zip(bins, reliability(label[shuffled], score[shuffled]), strict=True)]


def test_equal_scores_lie_in_one_bin():
    (only,) = reliability(np.array([0, 1, 1, 1]), np.full(4, 0.3))
    assert (only["mean_score"], only["mean_label"], only["num_rows"]) == (pytest.approx(0.3), 0.75, 4)
    bins = reliability(np.array([0] * 6 + [1] * 4), np.array([0.1] * 6 + [0.6] * 4))
    assert [(b["mean_label"], b["num_rows"]) for b in bins] == [(0.0, 6), (1.0, 4)]
    assert reliability(np.array([]), np.array([])) == []


def test_drawn_negatives_are_no_training_rows(tmp_path):
    prepared = tiny_prepared(str(tmp_path / "logged"))
    users = prepared.users().to_pydict() | {"num_train_rows": list(range(40))}
    table = pa.table(users, schema=feature_table_schema(prepared.schema, "user"))
    storage.write_parquet(storage.join(prepared.uri, USERS_FILE), table)
    user_N, item_N, counted = _training_rows(prepared.uri)
    assert (counted, user_N.tolist(), item_N.tolist()) == ("rows", [0, *range(40)], [0] + [1] * 30)

    drawn = tiny_prepared(str(tmp_path / "drawn"))
    manifest = drawn.manifest | {"data": drawn.manifest["data"] | {"drawn_negatives": 5}}
    storage.write_manifest(drawn.uri, manifest)
    user_N, item_N, counted = _training_rows(drawn.uri)
    train = pa.concat_tables(storage.read_parquet(uri) for uri, _ in drawn.files("train"))
    positives = train.filter(pa.compute.equal(train["label"], 1))
    assert counted == "positives" and len(user_N) == 41 and len(item_N) == 31
    for count_N, column in ((user_N, "user_row"), (item_N, "item_row")):
        assert count_N.tolist() == np.bincount(positives[column], minlength=len(count_N)).tolist()


# ---------------------------------------------------------------- the learning rate


def evaluation(valid, test):
    rows = [("valid", "all", 0.99), ("test", "all", 0.01), ("valid", "food", valid), ("valid", "home", valid + 0.2)]
    return [{"split": s, "scenario": c, "auc": auc} for s, c, auc in [*rows, ("test", "food", test)]]


def test_learning_rate_is_chosen_on_valid_alone():
    assert mean_valid_auc(evaluation(0.5, 0.1)) == mean_valid_auc(evaluation(0.5, 0.9)) == pytest.approx(0.6)
    found = {1e-3: evaluation(0.5, 0.9), 1e-2: evaluation(0.6, 0.1), 1e-1: evaluation(0.4, 0.95)}
    choice = choose({rate: mean_valid_auc(rows) for rate, rows in found.items()})
    assert (choice.learning_rate, choice.tied) == (1e-2, (1e-2,))


def test_the_edge_of_the_learning_rates():
    assert choose({0.1: 0.6, 0.01: 0.7, 0.3: 0.5}).at_edge  # the lowest, wherever it is listed
    assert choose({0.1: 0.6, 0.01: 0.4, 0.3: 0.7}).at_edge
    assert not choose({0.1: 0.8, 0.01: 0.7, 0.3: 0.5}).at_edge
    assert not choose({0.1: 0.8, 0.01: None, 0.3: None}).at_edge  # what lies beyond was tried
    assert not choose({0.1: 0.8}).at_edge  # there was no choice
    assert not choose({0.1: None, 0.2: None}).at_edge


def test_ties_and_failures_of_learning_rates():
    assert choose({0.1: 0.6, 0.2: 0.7, 0.3: 0.7}).learning_rate == 0.2
    assert choose({0.1: 0.6, 0.2: 0.7, 0.3: 0.7}).tied == (0.2, 0.3)
    assert choose({0.1: None, 0.2: 0.5}).learning_rate == 0.2
    nothing = choose({0.1: None, 0.2: None})
    assert (nothing.learning_rate, nothing.tied, nothing.valid_auc) == (None, (), {0.1: None, 0.2: None})


# ---------------------------------------------------------------- knowledge of noise


def test_controls_are_known():
    assert CONTROLS == ("shuffled", "random")


def test_noise_has_mean_and_deviation_of_the_vectors():
    table = tiny_knowledge(width=4, items=True)
    users = np.random.default_rng(0).normal(size=(4001, 4)) * [1, 0.1, 5, 0] + [0, 3, -20, 7]
    users[0] = 0
    index = np.arange(4001, dtype=np.int32)
    index[-1] = 0
    table = type(table)(users.astype(np.float16), index, table.scenarios_SK, table.items_NK, table.item_index_N)
    noise = table.random(3)
    for name in ("users_NK", "items_NK", "scenarios_SK"):
        before, after = getattr(table, name), getattr(noise, name)
        assert (before.shape, before.dtype) == (after.shape, after.dtype)
        same = (before == after).mean(0)
        assert (same[:3] < 0.1).all() if name == "users_NK" else same.max() < 0.2
    assert not noise.users_NK[0].any() and not noise.items_NK[0].any()
    np.testing.assert_array_equal(noise.user_index_N, table.user_index_N)  # who has none still has none
    np.testing.assert_array_equal(noise.item_index_N, table.item_index_N)
    np.testing.assert_allclose(noise.user_statistics()[0], table.user_statistics()[0], atol=0.3)
    np.testing.assert_allclose(noise.user_statistics()[1], table.user_statistics()[1], rtol=0.06, atol=1e-3)
    correlation = np.corrcoef(noise.users_NK[1:, 0].astype(float), users[1:, 0])[0, 1]
    assert abs(correlation) < 0.06  # standard error 0.016
    assert not np.array_equal(noise.users_NK[:50], table.random(4).users_NK[:50])
    np.testing.assert_array_equal(noise.users_NK, table.random(3).users_NK)


def test_noise_of_a_level_without_vectors_and_of_a_single_scenario():
    table = tiny_knowledge(width=4)
    one = type(table)(table.users_NK, table.user_index_N, table.scenarios_SK[:1], table.items_NK, table.item_index_N)
    noise = one.random(0)
    assert not noise.has_items
    np.testing.assert_array_equal(noise.scenarios_SK, table.scenarios_SK[:1])
    absent = type(table)(table.users_NK, table.user_index_N, table.scenarios_SK * 0, table.items_NK, table.item_index_N)
    assert not absent.random(0).scenarios_SK.any()


def test_noise_block_by_block_is_the_same(monkeypatch):
    whole = tiny_knowledge(items=True).random(1)
    monkeypatch.setattr("llm4msr.knowledge.table.STATISTICS_BLOCK_BYTES", 64 * 3)
    parts = tiny_knowledge(items=True).random(1)
    np.testing.assert_allclose(parts.users_NK, whole.users_NK, rtol=2e-3, atol=2e-3)


# ---------------------------------------------------------------- tidy rows


def record(variant, seed, auc, chosen=True):
    metrics = {"gauc": None, "log_loss": 0.5, "calibration": 1.0, "num_rows": 10, "num_positives": 4}
    rows = [{"split": s, "scenario": c, "auc": auc, **metrics} for s in ("valid", "test") for c in ("all", "food")]
    slices = [
        {"split": "test", "scenario": "all", "kind": "user", "slice": name, "auc": auc - 0.1, **metrics}
        for name in ("cold", "warm")
    ]
    bins = [{"split": "test", "scenario": "all", "mean_score": 0.1, "mean_label": 0.2, "num_rows": 5}] * 2
    return {
        "run": f"star-{variant}-{seed}-{chosen}",
        **{"backbone": "star", "variant": variant, "knowledge": "llm", "seed": seed},
        **{"learning_rate": 0.1, "chosen": chosen, "evaluation": rows, "best_epoch": 0},
        "detail": {"counted": "rows", "slices": slices, "reliability": bins},
        "history": [{"epoch": 0, "valid_auc": 0.6, "valid_auc_by_scenario": {"food": 0.6}}],
    }


def test_tidy_rows_name_every_figure_once():
    rows = list(tidy_rows([record("none", 0, 0.6), record("llm", 0, 0.7)]))
    assert all(tuple(row) == COLUMNS or set(row) == set(COLUMNS) for row in rows)
    keys = [tuple(row[c] for c in COLUMNS if c != "value") for row in rows]
    assert len(set(keys)) == len(keys) == 2 * (4 * 6 + 2 * 6 + 2 * 3 + 1)
    value = {key: row["value"] for key, row in zip(keys, rows, strict=True)}
    about = ("star-llm-0-True", "star", "llm", "llm", 0, 0.1, True)
    assert value[(*about, "test", "food", "everything", "everything", "auc")] == 0.7
    assert value[(*about, "test", "all", "user", "cold", "auc")] == pytest.approx(0.6)
    assert value[(*about, "test", "all", "score bin", "2", "mean_label")] == 0.2
    assert value[(*about, "valid", "food", "epoch", "1", "auc")] == 0.6


def test_runs_that_only_tried_a_learning_rate_do_not_count():
    records = [record("none", 0, 0.6), record("llm", 0, 0.7), record("llm", 0, 0.9, chosen=False)]
    models = [("star", "none"), ("star", "llm")]
    found = {(r["scenario"], r["variant"]): r for r in scenario_summaries(records, models, "none")}
    assert list(found) == [("food", "none"), ("food", "llm"), ("all", "none"), ("all", "llm")]
    assert found["all", "llm"]["auc"] == 0.7 and found["all", "llm"]["gain"]["mean"] == pytest.approx(0.1)
    cold, warm = (r for r in slice_summaries(records, models, "none", ["user"]) if r["variant"] == "llm")
    assert (cold["slice"], warm["slice"], cold["num_seeds"]) == ("cold", "warm", 1)
    assert cold["auc"] == pytest.approx(0.6)
    assert slice_summaries(records, models, "none", ["item"]) == []
    controls = control_summaries(records, [("star", "llm", "none")])
    assert [r["scenario"] for r in controls] == ["food", "all"]
    assert [r["gain"]["mean"] for r in controls] == pytest.approx([0.1, 0.1])


# ---------------------------------------------------------------- a run's evaluation


def test_slices_hold_the_rows_they_name(tmp_path):
    """Against scikit-learn, on rows picked by hand from the users' and items' tables."""
    prepared = tiny_prepared(str(tmp_path / "prepared"), num_rows=6000)
    counts = {"user": np.arange(40) % 9, "item": np.arange(30) % 5}
    for source, name, table in (("user", USERS_FILE, prepared.users()), ("item", ITEMS_FILE, prepared.items())):
        changed = table.to_pydict() | {"num_train_rows": counts[source].tolist()}
        schema = feature_table_schema(prepared.schema, source)
        storage.write_parquet(storage.join(prepared.uri, name), pa.table(changed, schema=schema))
    checkpoint = tiny_checkpoint(str(tmp_path / "checkpoint"), prepared, None)
    results, detail = evaluate_in_detail(checkpoint, prepared.uri, cold_max_rows=3)
    assert results == evaluate_checkpoint(checkpoint, prepared.uri)
    about = (detail["version"], detail["cold_max_rows"], detail["counted"])
    assert about == (EVALUATION_VERSION, 3, "rows")
    found = {(r["split"], r["scenario"], r["kind"], r["slice"]): r for r in detail["slices"]}
    whole = {(r["split"], r["scenario"]): r["num_rows"] for r in results}
    for kind, names in (("user", ["cold", "warm"]), ("item", ["cold", "warm"]), ("user activity", ["0", "1-3", "4+"])):
        for place, num_rows in whole.items():
            assert sum(found[(*place, kind, name)]["num_rows"] for name in names) == num_rows

    ranker = Ranker.from_checkpoint(checkpoint)
    rows = read_split(prepared.files("test"))
    score = ranker.score(rows)
    for kind, name, mask in (
        ("user", "cold", counts["user"][rows["user_row"] - 1] <= 3),
        ("user", "warm", counts["user"][rows["user_row"] - 1] > 3),
        ("item", "cold", counts["item"][rows["item_row"] - 1] <= 3),
        ("user activity", "1-3", np.isin(counts["user"][rows["user_row"] - 1], (1, 2, 3))),
    ):
        for scenario, here in (("all", mask), ("search", mask & (rows["scenario"] == 1))):
            row = found["test", scenario, kind, name]
            assert row["num_rows"] == here.sum() > 20
            assert row["auc"] == pytest.approx(roc_auc_score(rows["label"][here], score[here]))
    curve = [r for r in detail["reliability"] if (r["split"], r["scenario"]) == ("test", "rec")]
    assert sum(r["num_rows"] for r in curve) == whole["test", "rec"] and len(curve) == 10
    json.dumps(detail)
