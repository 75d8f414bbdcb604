"""Training runs under Ray Train: in process, one and two workers; what they leave; what stops them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import NUM_ITEMS, tiny_config, tiny_knowledge, tiny_prepared

from llm4msr import storage, workspace
from llm4msr.config import ConfigError
from llm4msr.data.prepared import ITEMS_FILE, PreparedData
from llm4msr.evaluation import evaluate_checkpoint, evaluate_item_mean
from llm4msr.knowledge.place import knowledge_pointer_uri
from llm4msr.ranker import Ranker
from llm4msr.schema import UNSEEN_INDEX
from llm4msr.training.loop import train_worker
from llm4msr.training.run import plan_runs, train
from llm4msr.training.task import TrainingError, TrainTask, load_knowledge


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    tiny_prepared(str(root / "prepared"), num_rows=16_000)
    tiny_knowledge().save(str(root / "knowledge"))
    return root


def make_task(root, name, knowledge="llm", seed=0, **tree):
    tree = {"train": {"max_epochs": 6, "batch_size": 128, "learning_rate": 0.02}} | tree
    uri = None if knowledge == "none" else str(root / "knowledge")
    return TrainTask(tiny_config(**tree), str(root / "prepared"), uri, knowledge, seed, str(root / name), name)


def test_any_number_of_workers_reaches_the_same_quality(places, ray_cluster):
    test_auc = {}
    for num_workers in (0, 1, 2):
        settings = {"max_epochs": 10, "batch_size": 128, "learning_rate": 0.01}
        settings |= {"num_workers": num_workers, "cpus_per_worker": 1}
        task = make_task(places, f"workers{num_workers}", train=settings)
        metadata = train(task)
        assert metadata["world_size"] == max(num_workers, 1)
        rows = evaluate_checkpoint(task.checkpoint_uri, task.prepared_uri)
        test_auc[num_workers] = next(r["auc"] for r in rows if (r["split"], r["scenario"]) == ("test", "all"))
    assert test_auc[0] == pytest.approx(test_auc[1], abs=1e-6)  # the same steps in the same order
    assert test_auc[2] == pytest.approx(test_auc[0], abs=0.015)
    assert min(test_auc.values()) > 0.75


def test_more_workers_than_processors_are_refused(places, ray_cluster):
    task = make_task(places, "many", train={"num_workers": 8})
    with pytest.raises(ConfigError, match=r"train\.num_workers: 8 workers need as many CPUs, this machine has 4"):
        train(task)
    task = make_task(places, "large", train={"num_workers": 2, "cpus_per_worker": 3})
    with pytest.raises(ConfigError, match=r"cpus_per_worker: 2 workers of 3 CPUs do not fit on this machine, 1 would"):
        train(task)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_workers": "auto"}, ConfigError, r"train\.num_workers = 'auto': the cluster has no GPU now.*\[1, 4\]"),
        ({"num_workers": 2}, ConfigError, r"train\.num_workers: 2 workers need as many GPUs, this machine has 0"),
        ({"num_workers": 0}, TrainingError, r"train\.device: a GPU is asked for, and this process on .* sees none"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpus_that_are_not_there_are_refused(places, ray_cluster, settings, error, message):
    with pytest.raises(error, match=message):
        train(make_task(places, "no-gpu", train=settings | {"device": "cuda"}))


def test_a_run_says_on_what_it_was_computed(places, ray_cluster):
    task = make_task(places, "on-cpu", "none", train={"device": "cpu", "max_epochs": 2})
    assert train(task)["devices"] == ["cpu"]
    found = storage.read_json(storage.join(task.checkpoint_uri, "metadata.json"))
    assert found["devices"] == ["cpu"] and [epoch["device"] for epoch in found["history"]] == ["cpu", "cpu"]


def test_a_finished_run_is_not_trained_again(places, ray_cluster):
    task = make_task(places, "once", "none")
    first = train(task)
    before = storage.fingerprint(storage.join(task.checkpoint_uri, "model.safetensors"))
    assert train(task) == json.loads(json.dumps(first))
    assert storage.fingerprint(storage.join(task.checkpoint_uri, "model.safetensors")) == before


def test_same_seed_same_model_and_other_seed_another(places, ray_cluster):
    scores = []
    rows = None
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        task = make_task(places, f"seed-{name}", seed=seed, train={"max_epochs": 1})
        train(task)
        ranker = Ranker.from_checkpoint(task.checkpoint_uri)
        rows = rows or next(iter_test_rows(task.prepared_uri))
        scores.append(ranker.score(rows))
    np.testing.assert_array_equal(scores[0], scores[1])
    assert np.abs(scores[0] - scores[2]).max() > 1e-3


def iter_test_rows(prepared_uri):
    from llm4msr.training.reader import list_row_groups, read_row_group

    yield read_row_group(list_row_groups(PreparedData.open(prepared_uri).files("test"))[0])


def test_early_stop_keeps_the_best_epoch(places, ray_cluster):
    """It stops `patience` epochs after the best one, whose weights the checkpoint holds."""
    tiny_prepared(str(places / "few" / "prepared"), num_rows=1200)
    tiny_knowledge().save(str(places / "few" / "knowledge"))
    task = make_task(places / "few", "best", train={"max_epochs": 100, "patience": 2, "learning_rate": 0.05})
    metadata = train(task)
    history = [h["valid_auc"] for h in metadata["history"]]
    assert metadata["valid_auc"] == max(history) == history[metadata["best_epoch"]]
    assert len(history) == metadata["best_epoch"] + 3 < 100
    exact = [r["auc"] for r in evaluate_checkpoint(task.checkpoint_uri, task.prepared_uri) if r["split"] == "valid"][1:]
    assert np.mean(exact) == pytest.approx(max(history), abs=1e-3)
    assert abs(max(history) - history[-1]) > 2e-3


def test_tensorboard_scalars(places, ray_cluster):
    task = make_task(places, "scalars", train={"max_epochs": 2, "log_every_steps": 20, "batch_size": 128})
    train(task)
    events = EventAccumulator(str(places / "scalars" / "tensorboard"))
    events.Reload()
    assert {
        "train/loss",
        "train/loss_rec",
        "train/loss_search",
        "train/rows_per_s",
        "train/data_wait_fraction",
        "epoch/loss",
        "epoch/rows_per_s",
        "epoch/data_wait_s",
        "valid/auc_mean",
        "valid/auc_rec",
        "valid/auc_search",
        "valid/gauc_rec",
        "valid/gauc_search",
        "valid/log_loss_rec",
        "valid/log_loss_search",
    } == set(events.Tags()["scalars"])
    assert len(events.Scalars("valid/auc_rec")) == 2
    assert all(0 < e.value < 1 for e in events.Scalars("valid/auc_rec"))


def test_shuffled_knowledge_gives_every_user_and_item_another_vector(places):
    tiny_knowledge(items=True).save(str(places / "with-items"))
    task = replace(make_task(places, "unused", "shuffled"), knowledge_uri=str(places / "with-items"))
    true, control = tiny_knowledge(items=True), load_knowledge(task)
    for name in ("user_index_N", "item_index_N"):
        before, after = getattr(true, name), getattr(control, name)
        known = before > 0
        np.testing.assert_array_equal(after > 0, known)
        assert (after[known] != before[known]).all()
        assert sorted(after[known]) == sorted(before[known])


def write_cold_items(root, num_warm=20):
    """Labels follow the item's cluster, and only its knowledge tells which; valid and test hold cold items alone."""
    prepared = tiny_prepared(str(root / "prepared"), num_rows=8000)
    rng = np.random.default_rng(5)
    cluster = rng.permutation(np.arange(NUM_ITEMS) % 2)
    cluster[num_warm:] = np.arange(NUM_ITEMS - num_warm) % 2
    items = prepared.items().to_pydict()
    items["genre"], items["tags"] = [UNSEEN_INDEX] * NUM_ITEMS, [[0, 0, 0]] * NUM_ITEMS
    items["item_id"][num_warm:] = [UNSEEN_INDEX] * (NUM_ITEMS - num_warm)
    storage.write_parquet(storage.join(prepared.uri, ITEMS_FILE), pa.table(items, schema=prepared.items().schema))
    for split in ("train", "valid", "test"):
        for uri, num_rows in prepared.files(split):
            table = storage.read_parquet(uri)
            low, high = (0, num_warm) if split == "train" else (num_warm, NUM_ITEMS)
            item = rng.integers(low, high, num_rows)
            label = rng.random(num_rows) < np.where(cluster[item], 0.8, 0.2)
            changed = table.to_pydict() | {"item_row": item + 1, "label": label.astype(np.int8)}
            storage.write_parquet(uri, pa.table(changed, schema=table.schema), row_group_size=100)
    vectors_NK = np.zeros((NUM_ITEMS + 1, 8))
    vectors_NK[1:] = np.outer(cluster - 0.5, rng.normal(size=8)) + rng.normal(size=(NUM_ITEMS, 8)) * 0.2
    index_N = np.arange(NUM_ITEMS + 1, dtype=np.int32)
    table = replace(tiny_knowledge(), items_NK=vectors_NK.astype(np.float16), item_index_N=index_N)
    table.save(str(root / "knowledge"))


def test_item_knowledge_ranks_items_that_training_never_saw(tmp_path):
    """In process, without Ray; item knowledge alone and with the meta layers, against the backbone alone."""
    write_cold_items(tmp_path)
    levels = {
        "none": ("none", {}, ["scenario", "user"]),
        "items": ("llm", {"user_level": False, "scenario_level": False}, ["item"]),
        "all": ("llm", {}, ["scenario", "user", "item"]),
    }
    auc = {}
    for name, (knowledge, meta, extracted) in levels.items():
        train_settings = {"max_epochs": 3, "batch_size": 128, "learning_rate": 0.01}
        tree = {"train": train_settings, "model": {"meta": meta}, "knowledge": {"levels": extracted}}
        task = replace(make_task(tmp_path, name, knowledge), config=tiny_config(**tree))
        train_worker(task, 0, 1, torch.device("cpu"), lambda metrics: None)
        rows = evaluate_checkpoint(task.checkpoint_uri, task.prepared_uri)
        auc[name] = next(r["auc"] for r in rows if (r["split"], r["scenario"]) == ("test", "all"))
    assert auc["none"] == pytest.approx(0.5, abs=0.06)  # standard error of 1200 rows: 0.017
    assert min(auc["items"], auc["all"]) > 0.72  # the cluster alone gives 0.8


def test_a_run_depends_on_the_levels_it_uses(tmp_path):
    """The run of the backbone alone stays the same whatever is extracted; item widths matter with items alone."""

    def names(knowledge, levels, **model):
        tree = {"knowledge": {"levels": levels}, "model": model, "experiment": {"knowledge": [knowledge]}}
        config = tiny_config(workspace_uri=str(tmp_path), **tree)
        for pointer_uri, name in ((workspace.prepared_pointer_uri, "data"), (knowledge_pointer_uri, "table")):
            pointer = pointer_uri(config)
            storage.write_json(pointer, {"directory": name})
            storage.write_manifest(storage.join(pointer.rsplit("/", 1)[0], name), {"kind": name})
        return plan_runs(config)[0].name

    two, three = ["scenario", "user"], ["scenario", "user", "item"]
    assert names("none", two) == names("none", three) == names("none", three, item_knowledge_dims=[4])
    assert names("llm", two) == names("llm", two, item_knowledge_dims=[4])
    assert names("llm", three) == names("llm", ["item", "user", "scenario"])
    llm = [names("llm", two), names("llm", three), names("llm", three, item_knowledge_dims=[4])]
    assert len(set(llm)) == 3
    alone = {"meta": {"user_level": False}}
    assert names("llm", ["scenario"], **alone) != names("llm", two, **alone)


def test_a_loss_that_is_not_finite_stops_the_run(places, ray_cluster):
    task = make_task(places, "nan", "none", train={"learning_rate": 1e30, "log_every_steps": 1})
    said = r"loss is (nan|inf) at epoch 0, step \d+ \(by scenario: .*; lower train.learning_rate"
    with pytest.raises(TrainingError, match=said):
        train(task)
    assert not storage.exists(task.checkpoint_uri)


def test_item_mean_by_hand(places):
    """(positives + 10 * scenario mean) / (rows + 10), recomputed from the files with a plain loop."""
    prepared = PreparedData.open(str(places / "prepared"))
    train_rows = [r for uri, _ in prepared.files("train") for r in storage.read_parquet(uri).to_pylist()]
    test_rows = [r for uri, _ in prepared.files("test") for r in storage.read_parquet(uri).to_pylist()]
    mean = {s: np.mean([r["label"] for r in train_rows if r["scenario"] == s]) for s in (0, 1)}
    by_item = {}
    for r in train_rows:
        n, p = by_item.get(r["item_row"], (0, 0))
        by_item[r["item_row"]] = (n + 1, p + r["label"])
    score = [
        (by_item.get(r["item_row"], (0, 0))[1] + 10 * mean[r["scenario"]])
        / (by_item.get(r["item_row"], (0, 0))[0] + 10)
        for r in test_rows
    ]
    from sklearn.metrics import log_loss, roc_auc_score

    label = [r["label"] for r in test_rows]
    row = next(r for r in evaluate_item_mean(prepared.uri) if (r["split"], r["scenario"]) == ("test", "all"))
    assert row["backbone"] == "item_mean" and row["seed"] is None
    assert row["auc"] == pytest.approx(roc_auc_score(label, score))
    assert row["log_loss"] == pytest.approx(log_loss(label, score))


def test_a_checkpoint_of_other_data_is_refused(places, ray_cluster, tmp_path):
    task = make_task(places, "other", "none", train={"max_epochs": 1})
    train(task)
    tiny_prepared(str(tmp_path / "elsewhere"), num_rows=300)
    with pytest.raises(storage.StorageError, match=r"was trained on prepared, not on .*elsewhere"):
        evaluate_checkpoint(task.checkpoint_uri, str(tmp_path / "elsewhere"))


def test_loop_needs_no_ray():
    """The worker's loop is torch alone; only run.py knows Ray."""
    code = "import sys, llm4msr.training.loop, llm4msr.ranker; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
