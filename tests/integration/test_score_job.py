"""jobs.score as a user runs it: all kinds of input, on a disk and on S3, killed and gone on with, and with mistakes."""

from __future__ import annotations

import json
import random
import signal

import job_process as processes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import tiny_checkpoint, tiny_knowledge, tiny_prepared

from llm4msr import storage
from llm4msr.config import Config, ConfigError
from llm4msr.data.source import DataError
from llm4msr.ranker import Ranker
from llm4msr.request import RankRequest
from llm4msr.scoring.pipeline import count_actors, score
from llm4msr.settings import config_from_dict

TOLERANCE = 1e-6
NUM_LISTS = 4000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """In a workspace whose report names it."""
    root = tmp_path_factory.mktemp("score") / "workspace"
    prepared = tiny_prepared(str(root / "prepared"))
    storage.write_json(str(root / "report.json"), {"checkpoint": "runs/x/checkpoint"})
    return tiny_checkpoint(str(root / "runs" / "x" / "checkpoint"), prepared, tiny_knowledge())


@pytest.fixture(scope="module")
def ranker(checkpoint):
    return Ranker.from_checkpoint(checkpoint)


def settings(checkpoint: str, **changes) -> dict:
    workspace = checkpoint.removesuffix("/runs/x/checkpoint")
    return {"workspace_uri": workspace, "score": {"num_actors": 2} | changes}


def configure(checkpoint: str, **changes) -> Config:
    return config_from_dict(settings(checkpoint, **changes))


def lists(num_rows: int, num_bad: int = 0) -> pa.Table:
    rng = np.random.default_rng(0)
    rows = [
        {
            "user": int(rng.integers(1000, 1045)),
            "scenario": "shop" if i < num_bad else ["rec", "search"][i % 2],
            "items": rng.permutation(np.arange(7000, 7029))[: 1 + i % 20].tolist(),
            "campaign": f"c{i}",
        }
        for i in range(num_rows)
    ]
    return pa.Table.from_pylist(rows)


def write_shards(uri: str, table: pa.Table, sizes: list[int]) -> None:
    start = 0
    for number, size in enumerate(sizes):
        storage.write_parquet(storage.join(uri, f"shard-{number}.parquet"), table.slice(start, size), row_group_size=70)
        start += size
    assert start == len(table)


def scores(uri: str) -> list[dict]:
    return storage.read_parquet(storage.join(uri, "scores")).to_pylist()


def agree(ranker, row: dict, request: RankRequest) -> None:
    results = ranker.rank(request).results
    assert (row["user"], row["scenario"]) == (request.user, request.scenario)
    assert row["items"] == [result.item for result in results]
    np.testing.assert_allclose(row["scores"], [result.score for result in results], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("place", ["local", "s3"])
def test_lists_in_a_folder(place, ray_cluster, checkpoint, ranker, tmp_path, request):
    root = str(tmp_path) if place == "local" else f"s3://{request.getfixturevalue('bucket')}/x"
    table = lists(500, num_bad=3)
    write_shards(f"{root}/in", table, [200, 0, 299, 1])
    config = configure(checkpoint, input_uri=f"{root}/in", output_uri=f"{root}/out", rows_per_commit=90)

    uri = score(config)

    assert uri == f"{root}/out"
    asked = table.to_pylist()
    rows = scores(uri)
    assert [row["row"] for row in rows] == [*range(3, 500)]
    for row in rows[::7]:
        given = asked[row["row"]]
        agree(ranker, row, RankRequest(given["user"], given["scenario"], given["items"]))
    errors = storage.read_parquet(f"{uri}/errors").to_pylist()
    assert [(row["row"], row["user"]) for row in errors] == [(i, str(asked[i]["user"])) for i in range(3)]
    assert {row["message"] for row in errors} == {"no scenario 'shop'; valid: rec, search"}
    manifest = storage.read_manifest(uri, "jobs.score wrote it")
    figures = {"kind": "scores", "model_version": "tiny-0", "num_rows": 500, "num_failed": 3, "num_files": 8}
    assert manifest | figures == manifest
    files = storage.list_files(f"{uri}/scores")
    assert len(files) == 8
    assert storage.parquet_metadata(files[0][0]).metadata[b"model_version"] == b"tiny-0"

    before = [storage.fingerprint(name) for name, _ in storage.list_files(uri)]
    assert score(config) == uri
    assert [storage.fingerprint(name) for name, _ in storage.list_files(uri)] == before


def test_pairs_keep_their_order(ray_cluster, checkpoint, ranker, tmp_path):
    rng = np.random.default_rng(2)
    table = pa.table(
        {
            "user": rng.integers(1000, 1040, 300),
            "scenario": rng.choice(["rec", "search"], 300),
            "item": rng.integers(7000, 7029, 300),
        }
    )
    pq.write_table(table, tmp_path / "pairs.parquet")
    config = configure(checkpoint, input_uri=str(tmp_path / "pairs.parquet"), rows_per_commit=64)
    uri = score(config)
    assert uri.startswith(f"{config.workspace_uri}/scores/")
    found = storage.read_parquet(f"{uri}/scores")
    assert found.select(["user", "scenario", "item"]) == table
    for row in found.to_pylist()[::13]:
        (result,) = ranker.rank(RankRequest(row["user"], row["scenario"], [row["item"]])).results
        assert row["score"] == pytest.approx(result.score, abs=TOLERANCE)


def test_all_users_with_all_items(ray_cluster, checkpoint, ranker):
    uri = score(configure(checkpoint, top_k=4))
    rows, items = scores(uri), ranker.checkpoint.items["key"].to_pylist()
    asked = [(user, name) for user in ranker.checkpoint.users["key"].to_pylist() for name in ("rec", "search")]
    for row, (user, name) in zip(rows, asked, strict=True):
        agree(ranker, row, RankRequest(user, name, items, 4))
    assert [row["row"] for row in rows] == [i // 2 for i in range(80)]


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_some_users_with_some_items(kind, ray_cluster, checkpoint, ranker, tmp_path):
    items, users = [7003, 7001, 999, 7004, 7001], [1003, 5, 1001]
    candidates = tmp_path / f"items.{kind}"
    if kind == "json":
        candidates.write_text(json.dumps(items))
    else:
        pq.write_table(pa.table({"item": items}), candidates)
    pq.write_table(pa.table({"user": users}), tmp_path / "users.parquet")
    uri = score(
        configure(
            checkpoint,
            users_uri=str(tmp_path / "users.parquet"),
            candidates_uri=str(candidates),
            scenarios=["search"],
            output_uri=str(tmp_path / "out"),
        )
    )
    for row, user in zip(scores(uri), users, strict=True):
        agree(ranker, row, RankRequest(user, "search", [7003, 7001, 999, 7004]))


@pytest.fixture(scope="module")
def whole(checkpoint, ray_cluster, tmp_path_factory):
    """Many lists, and their scores without an interruption."""
    folder = tmp_path_factory.mktemp("whole")
    write_shards(str(folder / "in"), lists(NUM_LISTS, num_bad=9), [NUM_LISTS // 2, NUM_LISTS // 2])
    changes = {"input_uri": str(folder / "in"), "rows_per_commit": 20}
    uri = score(configure(checkpoint, output_uri=str(folder / "out"), **changes))
    return changes, storage.read_parquet(f"{uri}/scores"), storage.read_parquet(f"{uri}/errors")


@pytest.mark.slow
@pytest.mark.parametrize(("place", "kinds"), [("local", ["terminated", "everything"]), ("s3", ["driver"])])
def test_killed_and_gone_on_with(place, kinds, whole, checkpoint, tmp_path, request):
    """In the last run, which finishes, one actor is killed as well."""
    changes, wanted, errors = whole
    root = str(tmp_path / "out") if place == "local" else f"s3://{request.getfixturevalue('bucket')}/out"
    recipe = processes.write_recipe(tmp_path / "recipe.toml", settings(checkpoint, output_uri=root, **changes))
    chance, left = random.Random(0), {}

    def parts() -> list[str]:
        return [name for name, _ in storage.list_files(f"{root}/scores")]

    for kind in [*kinds, "ScoreUnit"]:
        with processes.started("jobs.score", recipe) as job:
            before = len(parts())
            processes.wait_until(lambda n=before, j=job: len(parts()) > n + 3 or not j.running(), 90, "work")
            assert job.running(), job.log.read_text()
            if kind == "terminated":
                job.driver.send_signal(signal.SIGTERM)
            else:
                job.kill(kind, chance)
            assert len(parts()) < NUM_LISTS // 20, "it was killed after its end"
            status = job.wait()
            assert (status == 0) == (kind == "ScoreUnit"), job.log.read_text()
        if status:
            assert not storage.is_finished(root)
            left |= {name: storage.fingerprint(name) for name in parts()}
    assert storage.is_finished(root)
    assert storage.read_parquet(f"{root}/scores") == wanted
    assert storage.read_parquet(f"{root}/errors") == errors
    assert {name: storage.fingerprint(name) for name in left} == left, "what was there was done again"


def test_too_many_bad_rows_stop_the_job(ray_cluster, checkpoint, tmp_path):
    write_shards(str(tmp_path / "in"), lists(300, num_bad=20), [300])
    changes = {"input_uri": str(tmp_path / "in"), "output_uri": str(tmp_path / "out"), "rows_per_commit": 100}
    for _ in range(2):
        with pytest.raises(DataError) as error:
            score(configure(checkpoint, **changes))
        lines = str(error.value).splitlines()
        assert lines[0].startswith("20 of 300 lists cannot be scored, score.max_failed_fraction allows 0.01 of them")
        assert lines[1].startswith("row 0, user 10") and "no scenario 'shop'; valid: rec, search" in lines[1]
        assert lines[-1] == f"All so far: {tmp_path}/out/errors"
        assert not storage.is_finished(str(tmp_path / "out"))
    uri = score(configure(checkpoint, max_failed_fraction=0.07, **changes))
    assert storage.read_manifest(uri, "")["num_failed"] == 20 and len(scores(uri)) == 280


def test_what_lies_at_the_output_is_kept(ray_cluster, checkpoint, tmp_path):
    write_shards(str(tmp_path / "in"), lists(50), [50])
    changes = {"input_uri": str(tmp_path / "in"), "output_uri": str(tmp_path / "out")}
    score(configure(checkpoint, **changes))
    write_shards(str(tmp_path / "in"), lists(60), [60])
    with pytest.raises(ConfigError, match=r"holds other scores: their files is .* give another place, or remove it"):
        score(configure(checkpoint, **changes))
    with pytest.raises(ConfigError, match=r"holds other files, such as .*shard-0.parquet: give a place of its own"):
        score(configure(checkpoint, **changes | {"output_uri": str(tmp_path / "in")}))


def test_a_model_that_scores_otherwise_is_refused(ray_cluster, checkpoint, tmp_path):
    copy = str(tmp_path / "checkpoint")
    for name, _ in storage.list_files(checkpoint):
        storage.copy(name, f"{copy}{name.removeprefix(checkpoint)}")
    golden = storage.read_json(f"{copy}/golden.json")
    golden[0]["scores"][0] += 0.1
    storage.write_json(f"{copy}/golden.json", golden)
    recipe = settings(checkpoint, checkpoint_uri=copy, output_uri=str(tmp_path / "out"))
    status, log = processes.run_job("jobs.score", processes.write_recipe(tmp_path / "recipe.toml", recipe))
    assert status == 2, log
    last = log.splitlines()[-1]
    assert "golden.json: user " in last and "when the checkpoint was written it had" in last


def test_actors_fit_the_processors():
    def count(cpus_of_nodes, **changes):
        return count_actors(config_from_dict({"score": changes}).score, cpus_of_nodes)

    assert (count([2, 5]), count([2, 5], cpus_per_actor=2), count([1], num_actors=9)) == (7, 3, 9)
    with pytest.raises(ConfigError, match=r"score.cpus_per_actor 8: no node has so many CPUs now, the largest has 4"):
        count([4, 2], cpus_per_actor=8)
