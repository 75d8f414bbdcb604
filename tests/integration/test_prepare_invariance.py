"""What may not change prepare's result: order of work, shards, buckets; and what each split and file must hold."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tiny_adapter import HEADER, SCENARIOS, rows_of, run, write

from llm4msr import storage
from llm4msr.data.prepared import PreparedData
from llm4msr.schema import SPLITS


def random_log(num_users: int = 60, num_rows: int = 1500, num_items: int = 40) -> list[str]:
    rng = np.random.default_rng(3)
    user, item = rng.integers(0, num_users, num_rows), rng.integers(0, num_items, num_rows)
    scenario, label = rng.integers(0, 2, num_rows), rng.integers(0, 2, num_rows)
    time = rng.integers(0, 500, num_rows) * 1000
    return [
        f"u{u},{i},{SCENARIOS[s]},{y},{t},{n},d{i % 5},{i}\n"
        for n, (u, i, s, y, t) in enumerate(zip(user, item, scenario, label, time, strict=True))
    ]


def write_shards(tmp_path: Path, lines: list[str], num_shards: int) -> None:
    for shard in range(num_shards):
        write(tmp_path, f"part-{shard}.csv", HEADER + "".join(lines[shard::num_shards]))


def content(data: PreparedData) -> dict[str, list[dict]]:
    tables = {uri.removeprefix(data.uri): uri for split in SPLITS for uri, _ in data.files(split)}
    tables |= {name: storage.join(data.uri, name) for name in ("users.parquet", "items.parquet")}
    return {name: storage.read_parquet(uri).to_pylist() for name, uri in tables.items()}


@pytest.mark.usefixtures("ray_cluster")
class TestInvariance:
    def test_two_runs_are_the_same_row_by_row(self, tmp_path):
        write_shards(tmp_path, random_log(), 3)
        split = {"kind": "per_user_last"}
        options = {"split": split, "num_buckets": 4, "negatives_per_positive": 2}
        first, second = run(tmp_path, "a", **options), run(tmp_path, "b", **options)
        assert first.uri != second.uri
        assert content(first) == content(second)
        assert len(first.files("train")) == 4
        other = run(tmp_path, "a", **options, seed=1)
        assert content(first) != content(other)

    @pytest.mark.parametrize("kind", ["time", "per_user_last"])
    def test_shards_and_buckets_change_no_row(self, tmp_path, kind):
        lines = random_log()
        found = []
        for num_shards, num_buckets in ((1, 1), (3, 1), (3, 4)):
            place = tmp_path / f"{num_shards}-{num_buckets}"
            place.mkdir()
            write_shards(place, lines, num_shards)
            data = run(place, split={"kind": kind}, num_buckets=num_buckets)
            found.append((rows_of(data, "timestamp_ms", "position", "device", "price"), data.schema, data.users()))
        assert len(found[0][0]) == 1500
        assert (
            [row[:-1] for row in found[0][0]] == [row[:-1] for row in found[1][0]] == [row[:-1] for row in found[2][0]]
        )
        for rows, schema, users in found[1:]:
            assert [row[-1] for row in rows] == pytest.approx([row[-1] for row in found[0][0]], abs=1e-6)
            assert users == found[0][2]
            assert [f.num_embeddings for f in schema.features] == [f.num_embeddings for f in found[0][1].features]

    def test_time_quantiles_hold_the_shares_and_tear_no_moment_apart(self, tmp_path):
        write_shards(tmp_path, random_log(), 2)
        data = run(tmp_path, num_buckets=3, split={"kind": "time", "valid_fraction": 0.2, "test_fraction": 0.1})
        moments = {split: {row[-1] for row in rows_of(data, "timestamp_ms") if row[0] == split} for split in SPLITS}
        assert max(moments["train"]) < min(moments["valid"]) <= max(moments["valid"]) < min(moments["test"])
        assert data.manifest["data"]["split"]["valid_from_ms"] == min(moments["valid"])
        assert data.manifest["data"]["split"]["test_from_ms"] == min(moments["test"])
        # 500 moments for 1500 rows: about three rows share one.
        assert data.num_rows("valid") == pytest.approx(300, abs=10)
        assert data.num_rows("test") == pytest.approx(150, abs=10)

    def test_each_user_lies_in_one_file_and_rows_are_shuffled(self, tmp_path):
        write_shards(tmp_path, random_log(), 2)
        data = run(tmp_path, num_buckets=3, split={"kind": "per_user_last"})
        files = [storage.read_parquet(uri)["user_row"].to_pylist() for uri, _ in data.files("train")]
        assert sum(len(set(rows)) for rows in files) == len(set().union(*files))
        assert all(rows != sorted(rows) for rows in files)

    def test_negatives(self, tmp_path):
        lines = [line for line in random_log(num_items=25) if line.split(",")[3] == "1"]
        # "full" has every item of the search scenario; item 99 is in home alone.
        lines += [f"full,{item},search,1,{1000 + item},0,d0,1\n" for item in range(25)]
        lines.append("u0,99,home,1,5,0,d0,1\n")
        write_shards(tmp_path, lines, 2)
        data = run(tmp_path, num_buckets=2, split={"kind": "per_user_last"}, negatives_per_positive=2)
        rows = rows_of(data, "timestamp_ms", "position")
        positives = [row for row in rows if row[4] == 1]
        negatives = [row for row in rows if row[4] == 0]
        block = data.manifest["data"]
        assert len(positives) == len(lines)
        assert block["no_negative_available"] == 50
        assert block["drawn_negatives"] == len(negatives) == 2 * (len(lines) - 25)
        owned = {row[1:3] for row in positives}
        assert not owned & {row[1:3] for row in negatives}
        assert {row[2] for row in negatives if row[3] == SCENARIOS.index("search")} == set(range(25))
        assert 99 in {row[2] for row in negatives if row[3] == SCENARIOS.index("home")}
        # Each stands where its positive stands: split, user, scenario, time and position, twice.
        place = Counter((row[0], row[1], row[3], *row[5:]) for row in positives if row[1] != "full")
        assert Counter((row[0], row[1], row[3], *row[5:]) for row in negatives) == {k: 2 * n for k, n in place.items()}
