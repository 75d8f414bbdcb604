"""prepare end to end: real files in, real Ray, exact rows out."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from tiny_adapter import HEADER, TinyAdapter, UnreadableAdapter, config_of, rows_of, run, write

from llm4msr import storage, workspace
from llm4msr.data.pipeline import prepare
from llm4msr.data.prepared import PreparedData
from llm4msr.data.source import DataError
from llm4msr.schema import SPLITS, Feature
from llm4msr.settings import config_from_dict

# Two users in two scenarios, both labels of each in valid. "u2" has a row twice (merged); "u3" only has a feature row;
# "u2" has none.
HAND_MADE = (
    HEADER
    + "u1,10,home,1,1000,0,phone,1\n"
    + "u1,20,home,0,1000,1,phone,3\n"
    + "u2,10,search,1,1500,0,tv,5\n"
    + "u2,10,search,1,1500,0,tv,5\n"
    + "u2,30,search,0,3000,0,watch,7\n"
    + "u1,10,search,0,2000,0,,\n"
    + "u2,20,home,1,3999,1,phone,1\n"
    + "u1,30,home,1,4000,0,phone,1\n"
    + "u1,20,search,1,2000,1,phone,3\n"
    + "u1,10,home,1,2000,2,phone,3\n"
    + "u1,20,home,0,2000,3,phone,3\n"
)
HAND_MADE_USERS = "key,city,text\nu3,Oslo,third\nu1,Rome,first\n"
MOMENTS = {
    "kind": "time",
    "valid_from": "1970-01-01T00:00:02",
    "test_from": "1970-01-01T00:00:03",
    "test_until": "1970-01-01T00:00:04",
}


@pytest.mark.usefixtures("ray_cluster")
class TestPrepare:
    def test_hand_made_data(self, tmp_path):
        write(tmp_path, "part-0.csv", HAND_MADE)
        write(tmp_path, "users.csv", HAND_MADE_USERS)
        data = run(tmp_path, split=MOMENTS, num_buckets=2)

        # Train is the first three rows: phone twice, tv once; prices 1, 3, 5.
        std = (8 / 3) ** 0.5
        assert data.schema.features == (
            Feature("user_id", "categorical", "user", num_embeddings=4),
            Feature("city", "categorical", "user", num_embeddings=3),
            Feature("item_id", "categorical", "item", num_embeddings=4),
            Feature("device", "categorical", "context", num_embeddings=4),
            Feature("price", "numeric", "context", mean=3.0, std=pytest.approx(std)),
        )
        assert data.vocabulary("device").to_pylist() == ["phone", "tv"]
        assert data.vocabulary("city").to_pylist() == ["Rome"]
        assert data.vocabulary("item_id").to_pylist() == [10, 20]
        assert data.vocabulary("user_id").to_pylist() == ["u1", "u2"]
        assert data.users().to_pylist() == [
            {"key": "u1", "text": "first", "num_train_rows": 2, "user_id": 2, "city": 2},
            {"key": "u2", "text": "", "num_train_rows": 1, "user_id": 3, "city": 1},
            {"key": "u3", "text": "third", "num_train_rows": 0, "user_id": 1, "city": 1},
        ]
        assert data.items().to_pylist() == [
            {"key": 10, "text": "", "num_train_rows": 2, "item_id": 2},
            {"key": 20, "text": "", "num_train_rows": 1, "item_id": 3},
            {"key": 30, "text": "", "num_train_rows": 0, "item_id": 1},
        ]
        assert rows_of(data, "timestamp_ms", "position", "device", "price") == [
            ("test", "u2", 20, 0, 1, 3999, 2, 2, pytest.approx(-2 / std)),
            ("test", "u2", 30, 1, 0, 3000, 1, 1, pytest.approx(4 / std)),
            ("train", "u1", 10, 0, 1, 1000, 0, 2, pytest.approx(-2 / std)),
            ("train", "u1", 20, 0, 0, 1000, 1, 2, 0.0),
            ("train", "u2", 10, 1, 1, 1500, 0, 3, pytest.approx(2 / std)),
            ("valid", "u1", 10, 0, 1, 2000, 4, 2, 0.0),
            ("valid", "u1", 10, 1, 0, 2000, 2, 0, 0.0),
            ("valid", "u1", 20, 0, 0, 2000, 5, 2, 0.0),
            ("valid", "u1", 20, 1, 1, 2000, 3, 2, 0.0),
        ]
        assert sorted(row[-1] for row in rows_of(data, "row_id")) == list(range(9))

        block = data.manifest["data"]
        assert (block["raw_rows"], block["merged_rows"], block["after_test_until"]) == (11, 1, 1)
        assert (block["num_users"], block["num_items"]) == (3, 3)
        assert block["split"]["valid_from_ms"] == 2000
        assert {"split": "train", "scenario": "home", "num_rows": 2, "num_positives": 1} in block["rows"]
        assert (data.num_rows("train"), data.num_rows("train", "search"), data.num_rows("valid", "home")) == (3, 1, 2)
        assert {"split": "test", "scenario": "search", "user_share": 0.0, "item_share": 1.0} in block["unseen"]
        assert {"split": "test", "scenario": "all", "user_share": 0.0, "item_share": 0.5} in block["unseen"]
        assert {"split": "valid", "scenario": "home", "user_share": 0.0, "item_share": 0.0} in block["unseen"]
        assert block["label_share"] == {"home": 3 / 5, "search": 2 / 4, "all": 5 / 9}
        assert data.manifest["scenarios"] == ["home", "search"]

    def test_values_seen_less_than_min_count_share_index_1(self, tmp_path):
        write(tmp_path, "part-0.csv", HAND_MADE)
        data = run(tmp_path, split=MOMENTS, min_count=2)
        assert data.vocabulary("device").to_pylist() == ["phone"]
        assert data.vocabulary("item_id").to_pylist() == [10]
        assert data.items()["item_id"].to_pylist() == [2, 1, 1]

    def test_a_finished_directory_is_kept_and_another_input_gets_another(self, tmp_path):
        write(tmp_path, "part-0.csv", HAND_MADE)
        config = config_of(tmp_path, split=MOMENTS)
        adapter = TinyAdapter(str(tmp_path / "raw"))
        uri = prepare(config, adapter)
        manifest = Path(uri, "manifest.json")
        before = manifest.read_bytes()
        os.remove(workspace.prepared_pointer_uri(config))
        assert prepare(config, adapter) == uri
        assert manifest.read_bytes() == before
        assert workspace.prepared_uri(config) == uri

        # Without its manifest the directory is unfinished: what lies there is not trusted.
        manifest.unlink()
        Path(uri, "train", "bucket-00099.parquet").write_bytes(b"half")
        with pytest.raises(storage.StorageError, match="unfinished"):
            PreparedData.open(uri)
        assert prepare(config, adapter) == uri
        assert not Path(uri, "train", "bucket-00099.parquet").exists()

        write(tmp_path, "part-1.csv", HEADER + "u9,10,home,1,1000,0,phone,1\n")
        other = prepare(config, adapter)
        assert other != uri
        assert workspace.prepared_uri(config) == other
        assert PreparedData.open(other).num_rows("train") == 4

    def test_damaged_rows_are_kept_beside_the_data_and_fail_above_the_limit(self, tmp_path):
        write(tmp_path, "part-0.csv", HAND_MADE.replace("u2,20,home,1", "u2,20,home,maybe"))
        data = run(tmp_path, split=MOMENTS, max_rejected_fraction=0.1)
        assert data.manifest["data"]["rejected"] == [{"role": "events", "reason": "label is not 0 or 1", "num_rows": 1}]
        assert data.manifest["data"]["raw_rows"] == 11
        rejects = storage.read_parquet(storage.join(data.uri, "rejects.parquet")).to_pylist()
        assert [(row["line"], row["detail"]) for row in rejects] == [(8, "maybe")]

        config = config_of(tmp_path, split=MOMENTS, max_rejected_fraction=0.09)
        with pytest.raises(DataError) as caught:
            prepare(config, TinyAdapter(str(tmp_path / "raw")))
        message = str(caught.value)
        assert "events: 1 of 11 rows (9.09%) are damaged; data.max_rejected_fraction allows 9.00%" in message
        assert f"{tmp_path}/raw/part-0.csv:8 label is not 0 or 1 maybe" in message
        kept = message.rsplit(" ", 1)[-1]
        assert storage.read_parquet(kept).num_rows == 1
        assert not storage.exists(kept.removesuffix(".rejects.parquet"))
        with pytest.raises(storage.StorageError, match=r"run jobs\.prepare"):
            workspace.prepared_uri(config)

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            (",2000,", ",1999,", "the valid split has no rows"),
            (
                "u2,10,search,1,1500",
                "u2,10,search,1,2500",
                r"scenario 'search' has no train rows.*valid: home 2, search 3",
            ),
            (
                "u1,20,home,0,2000",
                "u1,20,home,1,2000",
                r"scenario 'home' has 2 positive and 0 negative rows, its AUC is not defined\. Each scenario needs "
                r"rows of both labels in valid: change data\.split\.valid_from and test_from.* with valid_from 1970",
            ),
            (
                "u1,20,search,1,2000",
                "u1,20,search,1,3000",
                r"the valid split cannot stop the training: scenario 'search' has 0 positive and 1 negative rows",
            ),
            ("u1,10,search,0,2000", "u1,10,search,0,", r"1 rows have none, such as user 'u1', item 10"),
        ],
    )
    def test_data_that_cannot_be_trained_on_is_refused(self, tmp_path, old, new, message):
        write(tmp_path, "part-0.csv", HAND_MADE.replace(old, new))
        with pytest.raises(DataError, match=message):
            run(tmp_path, split=MOMENTS)

    def test_events_without_a_row_are_refused_where_negatives_would_be_drawn(self, tmp_path):
        write(tmp_path, "part-0.csv", HEADER)
        with pytest.raises(DataError, match="the train split has no rows"):
            run(tmp_path, split=MOMENTS, negatives_per_positive=1)

    def test_a_scenario_that_lacks_a_label_in_test_is_named_in_the_log(self, tmp_path, caplog):
        write(tmp_path, "part-0.csv", HAND_MADE)
        with caplog.at_level("WARNING", logger="llm4msr.data"):
            run(tmp_path, split=MOMENTS)
        assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
            "test: scenario 'home' has 1 positive and 0 negative rows, its AUC is not defined",
            "test: scenario 'search' has 0 positive and 1 negative rows, its AUC is not defined",
        ]

    def test_an_error_shows_the_damaged_rows_of_the_role_that_has_too_many(self, tmp_path):
        good = "".join(f"u{n % 49},{n % 7},home,{n}\n" for n in range(994))
        write(tmp_path, "interactions.csv", "user_id,item_id,scenario,time\n" + "u0,1,home,soon\n" * 6 + good)
        write(tmp_path, "users.csv", "user_id\n" + "".join(f"u{n}\n" for n in range(49)) + "u7\n")
        config = config_of(
            tmp_path,
            negatives_per_positive=1,
            max_rejected_fraction=0.01,
            table={"timestamp_column": "time", "users": "users.csv"},
        )
        with pytest.raises(DataError) as caught:
            prepare(config)
        lines = str(caught.value).splitlines()
        assert lines[:-1] == [
            "users: 1 of 50 rows (2.00%) are damaged; data.max_rejected_fraction allows 1.00%",
            f"  {tmp_path}/raw/users.csv:51 duplicate key column 'user_id': found 'u7'",
        ]
        assert storage.read_parquet(lines[-1].rsplit(" ", 1)[-1]).num_rows == 7

        write(tmp_path, "interactions.csv", "user_id,item_id,scenario,time\n" + "u0,1,home,soon\n" * 60 + good)
        with pytest.raises(DataError) as caught:
            prepare(config)
        assert [line.split(" ")[2].rsplit(":", 1)[-1] for line in str(caught.value).splitlines()[1:-1]] == list("23456")

    def test_a_worker_that_cannot_read_its_task_is_an_error_not_a_hang(self, tmp_path):
        write(tmp_path, "part-0.csv", HAND_MADE)
        with pytest.raises(RuntimeError, match=r"do all nodes run the same code.*not on this node"):
            prepare(config_of(tmp_path, split=MOMENTS), UnreadableAdapter(str(tmp_path / "raw")))

    def test_an_entity_that_stands_twice_is_refused(self, tmp_path):
        write(tmp_path, "part-0.csv", HAND_MADE)
        write(tmp_path, "users.csv", HAND_MADE_USERS + "u3,Rome,again\n")
        with pytest.raises(DataError, match="the users' files hold user 'u3' more than once"):
            run(tmp_path, split=MOMENTS)


@pytest.mark.usefixtures("ray_cluster")
def test_object_store_to_object_store(bucket):
    """Raw files and workspace in S3."""
    lines = "".join(f"u{n % 4},{n % 30},home,{n}\n" for n in range(40))
    with storage.atomic_write(f"s3://{bucket}/raw/interactions.csv") as file:
        file.write(("user_id,item_id,scenario,time\n" + lines).encode())
    data = {
        "kind": "table",
        "raw_uri": f"s3://{bucket}/raw",
        "num_buckets": 2,
        "negatives_per_positive": 1,
        "table": {"timestamp_column": "time"},
    }
    config = config_from_dict({"workspace_uri": f"s3://{bucket}/ws", "data": data})
    uri = prepare(config)
    assert uri.startswith(f"s3://{bucket}/ws/prepared/")
    assert workspace.prepared_uri(config) == uri == prepare(config)
    prepared = PreparedData.open(uri)
    rows = [
        row for split in SPLITS for file, _ in prepared.files(split) for row in storage.read_parquet(file).to_pylist()
    ]
    assert prepared.users()["key"].to_pylist() == ["u0", "u1", "u2", "u3"]
    assert sum(row["label"] for row in rows) == 40
    assert sorted(row["row_id"] for row in rows) == list(range(len(rows)))
    # 40 rows in order of time: valid from row 32, test from row 36.
    assert Counter(row["timestamp_ms"] for row in rows if row["label"] == 1) == {n * 1000: 1 for n in range(40)}
    objects = [name.removeprefix(uri) for name, _ in storage.list_files(config.workspace_uri)]
    assert not [name for name in objects if "staging" in name]
    assert "/manifest.json" in objects and "/vocab/" not in "".join(objects)


@pytest.mark.shared
@pytest.mark.usefixtures("ray_cluster")
def test_movielens_100k(shared, tmp_path):
    data = {"kind": "movielens", "raw_uri": str(shared / "data" / "ml-100k")}
    prepared = PreparedData.open(prepare(config_from_dict({"workspace_uri": str(tmp_path), "data": data})))
    assert sum(prepared.num_rows(split) for split in SPLITS) == 100_000
    assert (prepared.users().num_rows, prepared.items().num_rows) == (943, 1682)
    assert prepared.num_rows("valid") == pytest.approx(10_000, abs=20)
    assert prepared.num_rows("test") == pytest.approx(10_000, abs=20)
    # The label is a rating of 4 or 5: 34174 + 21201 of them, as u.data has.
    assert prepared.manifest["data"]["label_share"]["all"] == 0.55375
