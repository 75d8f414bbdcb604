"""The benchmarks of training: their data, their sides, and smoke runs of what is cheap; nothing timed is asserted."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import __main__ as all_benchmarks
from benchmarks import train_backbones, train_gpu, train_meta, train_vocabulary
from benchmarks.harness import REPOSITORY
from benchmarks.train_peers import PEERS, Peer, make_environment, write_tables
from benchmarks.train_sides import Side, collated_batches, config_of, high_water_bytes, make_collator, run_side
from benchmarks.train_throughput import Figures, after_first
from benchmarks.train_world import World, joined_table, write_world, zipf_indices
from llm4msr import storage
from llm4msr.data.prepared import PreparedData
from llm4msr.knowledge.table import KnowledgeTable
from llm4msr.models.backbones import BACKBONES
from llm4msr.schema import rows_schema

WORLD = World(num_rows=6000, num_users=50, num_items=300, num_valid_rows=1000, knowledge_width=8)
SMALL = {"model": {"backbone": "star", "embedding_dim": 4, "hidden_dims": [8]}}
TRAIN = {"batch_size": 256, "max_epochs": 2, "patience": 2, "num_workers": 0}


@pytest.fixture(scope="module")
def uris(tmp_path_factory) -> tuple[str, str]:
    return write_world(str(tmp_path_factory.mktemp("world")), WORLD)


def rows_of(prepared: PreparedData, split: str) -> list:
    return [storage.read_parquet(uri) for uri, _ in prepared.files(split)]


def test_a_world_is_a_prepared_directory_as_prepare_would_lay_it_out(uris):
    prepared, knowledge = PreparedData.open(uris[0]), KnowledgeTable.load(uris[1])
    assert WORLD.num_buckets == 2 and World(num_rows=10_000_000).num_buckets == 8
    for split, wanted in (("train", 6000), ("valid", 1000), ("test", 0)):
        tables = rows_of(prepared, split)
        assert sum(map(len, tables)) == sum(n for _, n in prepared.files(split)) == prepared.num_rows(split) == wanted
        for table in tables:
            assert table.schema.equals(rows_schema(prepared.schema))
        users = [set(table["user_row"].to_pylist()) for table in tables]
        assert not users or not set.intersection(*users)  # a user's rows lie in one file
    train = rows_of(prepared, "train")[0]
    user_row = train["user_row"].to_numpy()
    assert (np.diff(user_row) < 0).mean() > 0.3  # shuffled, not user by user
    row_ids = np.concatenate([t["row_id"].to_numpy() for split in ("train", "valid") for t in rows_of(prepared, split)])
    assert sorted(row_ids) == list(range(7000))
    order = np.lexsort((train["position"].to_numpy(), user_row))
    position, user = train["position"].to_numpy()[order], user_row[order]
    assert all(position[user == u].tolist() == list(range((user == u).sum())) for u in np.unique(user))
    assert train["search_source"].to_numpy()[train["scenario"].to_numpy() == 0].max() == 0
    items = prepared.items()
    assert sum(items["num_train_rows"].to_pylist()) == 6000 and prepared.users().num_rows == 50
    assert len(prepared.vocabulary("tags")) == 2000 and len(prepared.vocabulary("item_id")) > 100
    assert np.linalg.norm(knowledge.users_NK[1:].astype(np.float32), axis=1) == pytest.approx(1, abs=1e-2)
    assert not knowledge.has_items and knowledge.scenarios_SK.shape == (2, 8)


def test_row_groups_are_those_of_prepare(tmp_path):
    prepared_uri, _ = write_world(str(tmp_path), World(num_rows=180_000, num_users=500, num_items=300))
    uri, num_rows = max(PreparedData.open(prepared_uri).files("train"), key=lambda file: file[1])
    metadata = pq.ParquetFile(uri).metadata
    assert num_rows > 65_536 and metadata.row_group(0).num_rows == 65_536 and metadata.num_row_groups == 2


def test_activity_and_popularity_are_skewed():
    ranks = zipf_indices(np.random.default_rng(0), 1000, 100_000)
    share = np.bincount(ranks, minlength=1000) / 100_000
    harmonic = (1 / np.arange(1, 1001)).sum()
    assert share[[0, 1, 9]] == pytest.approx(np.array([1, 1 / 2, 1 / 10]) / harmonic, rel=0.05)


def test_flat_rows_hold_what_the_collator_encodes(uris, tmp_path):
    prepared = PreparedData.open(uris[0])
    rows = {name: column.to_numpy() for name, column in zip(*columns_of(prepared), strict=True)}
    batch, flat = make_collator(prepared, None)(rows), joined_table(prepared, "train")
    for column, feature in enumerate(prepared.schema.select("categorical")):
        assert flat[feature.name].to_pylist() == batch.ids_BF[:, column].tolist()
    assert flat["tags"].to_pylist() == batch.sequences[0].tolist()
    assert flat["label"].to_pylist() == batch.label_B.tolist()
    tables = write_tables(prepared, tmp_path)
    assert pq.read_table(tables["valid"]).equals(joined_table(prepared, "valid"))
    assert [f["name"] for f in tables["features"]][-2:] == ["search_source", "scenario"]


def columns_of(prepared: PreparedData) -> tuple:
    import pyarrow as pa

    table = pa.concat_tables(rows_of(prepared, "train"))
    return table.column_names, table.columns


def test_an_environment_that_cannot_be_made_says_what_pip_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    broken = Peer("llm4msr-no-such-package", "0", "x.py", "", "")
    with pytest.raises(
        RuntimeError, match=r"no environment for llm4msr-no-such-package==0: (?s:.*)No matching distribution"
    ):
        make_environment(broken, tmp_path)
    assert not list(tmp_path.glob("*/ready"))


def test_the_peers_scripts_are_there():
    for peer in PEERS.values():
        source = (REPOSITORY / "benchmarks" / peer.script).read_text()
        assert "llm4msr" not in source and "from benchmarks" not in source


def test_a_rate_leaves_the_first_epoch_out():
    assert after_first([1.0, 100.0, 50.0]) == pytest.approx(2 / (1 / 100 + 1 / 50))
    figures = Figures()
    for value in (1.0, 5.0, 2.0):
        figures.add("a", **{"wait s": value})
    assert figures.medians() == {"a: wait s": 2.0}


def test_memory_is_the_high_water_mark():
    resident = psutil.Process().memory_info().rss
    held = np.ones(2**25)  # 256 MiB, given back at once
    del held
    assert high_water_bytes(psutil.Process().pid) > resident + 2**27


def test_loop_and_floor_step_over_the_same_rows_with_the_same_model(uris):
    prepared_uri, knowledge_uri = uris
    loop = run_side(Side("train", prepared_uri, knowledge_uri, SMALL | {"train": TRAIN}, 1))
    floor = run_side(Side("floor", prepared_uri, knowledge_uri, SMALL | {"train": TRAIN}, 1))
    assert loop["num_rows"] == floor["num_rows"] == 6000
    assert len(loop["rows_per_s"]) == len(floor["rows_per_s"]) == len(loop["valid_auc"]) == 2
    assert loop["startup_s"] > 0 and 2**27 < floor["peak_rss_bytes"] < 2**32 and loop["peak_rss_bytes"] > 2**27
    assert 20 < floor["subjects"] <= 50


def test_a_side_that_fails_says_why(uris):
    side = Side("floor", uris[0] + "-gone", None, SMALL | {"train": TRAIN}, 1)
    with pytest.raises(RuntimeError, match=r"side floor ended with exit code 1: (?s:.*)run jobs.prepare first"):
        run_side(side)


def test_rows_of_one_user_together_mean_fewer_users_in_a_batch(uris):
    few, many = (train_meta.make_side(uris, "full", g, 1) for g in (16, 1))
    assert config_of(few).model.meta.weight_form == "full" and config_of(few).train.rows_per_user == 16
    for side in (few, many):
        side.config["train"] |= {"batch_size": 64}
    assert train_meta.users_per_batch(few) < 0.7 * train_meta.users_per_batch(many)
    prepared = PreparedData.open(uris[0])
    batches = list(collated_batches(config_of(many), prepared, None))
    assert sum(map(len, batches)) == 6000 and len(batches[0]) == 64


def test_backbones_smoke_run():
    threads = torch.get_num_threads()
    world = World(num_rows=9000, num_users=50, num_items=300, num_valid_rows=100, knowledge_width=8)
    result = train_backbones.run(world, ("shared_bottom", "hamur"), 2, rounds=2, threads=1, not_judged="short form")
    torch.set_num_threads(threads)
    sides = ["shared_bottom", "LLM4MSR(shared_bottom)", "hamur", "LLM4MSR(hamur)"]
    assert list(result.seconds) == sides and all(len(s) == 2 and min(s) > 0 for s in result.seconds.values())
    for side in sides:
        rates = [8192 / s for s in result.seconds[side]]  # two batches of 4,096 rows
        assert result.medians[f"{side}: rows/s"] == pytest.approx(np.median(rates))
    pairs = {"shared_bottom / shared_bottom": (0, 0), "LLM4MSR(shared_bottom) / shared_bottom": (1, 0)}
    pairs |= {"hamur / shared_bottom": (2, 0), "LLM4MSR(hamur) / hamur": (3, 2)}
    wanted = {
        name: np.median(np.divide(result.seconds[sides[below]], result.seconds[sides[above]]))
        for name, (above, below) in pairs.items()
    }
    assert result.ratios == pytest.approx(wanted)
    assert 40 < result.medians["distinct users in a batch"] <= 50
    written = result.to_json()
    assert written["goals"] == [] and written["met"] is None and "backbone" not in written["config"]["model"]
    table = train_backbones.backbone_table(result)
    assert list(table.columns[0].cells) == ["shared_bottom", "hamur"]
    assert [float(cell) for cell in table.columns[4].cells] == pytest.approx(
        [wanted["LLM4MSR(shared_bottom) / shared_bottom"], wanted["LLM4MSR(hamur) / hamur"]], abs=0.006
    )


def test_each_backbone_is_stepped_alone_and_with_llm4msr(uris):
    prepared, knowledge = PreparedData.open(uris[0]), KnowledgeTable.load(uris[1])
    config = config_of(Side("floor", *uris, SMALL | {"train": TRAIN}, 1))
    loops = train_backbones.make_loops(config, prepared.schema, train_backbones.BACKBONES, knowledge)
    assert list(loops) == [(backbone, knows) for backbone in BACKBONES for knows in (False, True)]
    for (backbone, knows), loop in loops.items():
        assert type(loop.model.backbone) is BACKBONES[backbone]
        assert (loop.model.user_meta is not None) == (loop.model.scenario_meta is not None) == knows
    loop = loops["star", True]
    before = {name: p.detach().clone() for name, p in loop.model.named_parameters()}
    assert loop.seconds(list(collated_batches(config, prepared, knowledge))) > 0
    assert all((p != before[name]).any() for name, p in loop.model.named_parameters())


def test_vocabulary_smoke_run():
    threads = torch.get_num_threads()
    result = train_vocabulary.run((100, 2000), num_steps=2, rounds=1, threads=1, not_judged="short form")
    torch.set_num_threads(threads)
    assert len(result.seconds) == 10 and all(s[0] > 0 for s in result.seconds.values())
    assert len(result.ratios) == 5 and [g.measured is not None for g in result.goals] == [True, True]
    distinct = [
        result.medians[f"{n} items, {ids}: distinct items in a batch"]
        for n in ("100", "2,000")
        for ids in ("zipf", "uniform")
    ]
    assert distinct[0] <= distinct[1] == 100 and distinct[2] < distinct[3]


def test_gpu_smoke_run_needs_no_ray(tmp_path):
    blocked = "import sys; sys.modules |= dict.fromkeys(('ray', 'fsspec', 'psutil', 'transformers', 'safetensors')); "
    call = f"sys.argv[1:] = ['--short', '--json', {str(tmp_path / 'g.json')!r}]; "
    code = blocked + call + "from benchmarks.train_gpu import main; main()"
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    written = json.loads((tmp_path / "g.json").read_text())
    assert written["met"] is None and set(written["seconds"]) == {*train_gpu.SIDES, "copy"}
    medians = written["medians"]
    # 512 rows of 7 ids and 5 of a sequence, 8 bytes each.
    assert medians["low_rank, adam, float32: MB a step, ids"] == pytest.approx(512 * 12 * 8 / 1e6, rel=1e-4)
    assert medians["full, rowwise_adagrad, bfloat16, rows_per_user 16: distinct users in a batch"] == 32
    assert any("ms a step in" in name for name in medians)


def test_all_benchmarks_are_in_the_one_command():
    names = {path.stem for path in (REPOSITORY / "benchmarks").glob("*.py") if "\nNAME = " in path.read_text()}
    assert names == set(all_benchmarks.NAMES)
    readme = (REPOSITORY / "benchmarks" / "README.md").read_text()
    assert all(f"| `{name}` |" in readme for name in names)
