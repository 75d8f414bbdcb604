"""Bring your own tables: exact events and entities from CSV and Parquet, every bad input by its reason or message."""

from __future__ import annotations

import csv
import gzip
import pickle
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm4msr.config import DataConfig
from llm4msr.data import tabular
from llm4msr.data.adapters import build_adapter
from llm4msr.data.source import RawFeature
from llm4msr.data.table import TableAdapter
from llm4msr.schema import REJECTS, Scenario, events_schema
from llm4msr.settings import load_config

HEADER = "user_id,item_id,scenario,timestamp\n"
TIME = {"timestamp_column": "timestamp"}


def adapter(folder: Path, split: dict | None = None, **table) -> TableAdapter:
    tree = {"kind": "table", "raw_uri": str(folder), "table": TIME | table}
    built = build_adapter(DataConfig(**tree | ({"split": split} if split else {})))
    assert isinstance(built, TableAdapter)
    return built


def read_events(built: TableAdapter) -> tuple[pa.Table, list[dict]]:
    blocks = [b for s in built.shards() if built.is_events(s) for b in built.parse_events(s)]
    return pa.concat_tables([b.table for b in blocks]), pa.concat_tables([b.rejects for b in blocks]).to_pylist()


def read_entities(built: TableAdapter, source: str) -> tuple[pa.Table, list[dict]]:
    blocks = list(built.parse_entities(source))
    return pa.concat_tables([b.table for b in blocks]), pa.concat_tables([b.rejects for b in blocks]).to_pylist()


def test_lists_of_the_context(tmp_path):
    (tmp_path / "interactions.csv").write_text(
        HEADER.strip() + ",query,tags\nu,a,web,1,Red  SHOES!,x | y\nu,b,web,2,,|\n"
    )
    features = [
        {"name": "query", "source": "context", "kind": "text", "max_length": 4},
        {"name": "tags", "source": "context", "kind": "sequence"},
    ]
    built = adapter(tmp_path, features=features)
    assert built.features == (
        RawFeature("query", "context", "sequence", 4),
        RawFeature("tags", "context", "sequence", 16),
    )
    events, rejects = read_events(built)
    assert rejects == []
    assert events.schema == events_schema("string", "string", (("query", "sequence"), ("tags", "sequence")))
    assert events["query"].to_pylist() == [["red", "shoes"], None]
    assert events["tags"].to_pylist() == [["x", "y"], []]


def test_events_of_csv(tmp_path):
    (tmp_path / "interactions.csv").write_text(
        "when,user,thing,place,stars,hour,price\n"
        "1700000000,00123,a,web,5,7,1.5\n"
        '1700000001.5,7,"b,""c""",shop,3.9,,\n'
        "1.7e9, 7 ,a,web,4, 8 ,1e2\n"
    )
    built = adapter(
        tmp_path,
        user_column="user",
        item_column="thing",
        scenario_column="place",
        rating_column="stars",
        timestamp_column="when",
        features=[
            {"name": "price", "source": "context", "kind": "numeric"},
            {"name": "hour", "source": "context", "kind": "categorical"},
        ],
        scenario_descriptions={"web": "The web shop."},
    )
    assert built.scenarios == (Scenario("shop", "The scenario named shop."), Scenario("web", "The web shop."))
    assert (built.user_key_type, built.item_key_type) == ("string", "string")
    assert built.features == (
        RawFeature("price", "context", "numeric"),
        RawFeature("hour", "context", "categorical"),
    )
    events, rejects = read_events(built)
    assert rejects == []
    assert events.schema == events_schema("string", "string", (("price", "numeric"), ("hour", "categorical")))
    assert events.to_pydict() == {
        "user_id": ["00123", "7", "7"],
        "item_id": ["a", 'b,"c"', "a"],
        "scenario": [1, 0, 1],
        "label": [1, 0, 1],
        "timestamp_ms": [1700000000000, 1700000001500, 1700000000000],
        "position": [2, 3, 4],  # lines of the file
        "split": [None] * 3,
        "price": [1.5, None, 100.0],
        "hour": ["7", None, "8"],
    }
    assert built.merge(events) is events
    assert list(built.parse_entities("user")) == [] and built.negative_pools() is None


def test_shards_of_a_folder(tmp_path):
    folder = tmp_path / "interactions"
    folder.mkdir()
    with gzip.open(folder / "b.csv.gz", "wt") as file:
        file.write(HEADER + "u2,i1,x,2\n")
    (folder / "a.tsv").write_text(HEADER.replace(",", "\t") + "u1\ti,1\ty\t1\n")
    pq.write_table(
        pa.table({"timestamp": [3], "scenario": ["x"], "item_id": [5], "user_id": [9]}), folder / "c.parquet"
    )
    (folder / "_SUCCESS").write_text("")
    built = adapter(tmp_path, interactions="interactions")
    assert [Path(s.uri).name for s in built.shards()] == ["a.tsv", "b.csv.gz", "c.parquet"]
    assert built.scenarios[0].name == "x" and built.user_key_type == "string"  # not every file has integers
    events, rejects = read_events(built)
    assert rejects == []
    assert events["user_id"].to_pylist() == ["u1", "u2", "9"] and events["item_id"].to_pylist() == ["i,1", "i1", "5"]
    assert events["position"].to_pylist() == [2, (1 << 40) + 2, (2 << 40) + 1]
    assert events["label"].to_pylist() == [1, 1, 1]  # no label and no rating: all are positive


def test_parquet_types(tmp_path):
    pq.write_table(
        pa.table(
            {
                "user_id": pa.array([103656000000, None, 3, 4], pa.int64()),
                "item_id": pa.array([1, 2, 3, 4], pa.int32()),
                "scenario": pa.array(["b", "a", "b", "a"]).dictionary_encode(),
                "label": pa.array([True, False, None, True]),
                "timestamp": pa.array([datetime(2024, 5, 1, 10, 0, 0, 250000)] * 4, pa.timestamp("ns")),
                "position": pa.array([4.0, 3.0, 2.0, 1.5]),
                "device": pa.array([1, None, 2, 2], pa.int8()),
            }
        ),
        tmp_path / "interactions.parquet",
    )
    built = adapter(
        tmp_path,
        split={"timezone": "Asia/Shanghai"},
        interactions="interactions.parquet",
        label_column="label",
        timestamp_unit="iso",
        position_column="position",
        features=[{"name": "device", "source": "context", "kind": "categorical"}],
    )
    assert (built.user_key_type, built.item_key_type) == ("int64", "int64")
    events, rejects = read_events(built)
    assert events.to_pylist() == [
        {
            "user_id": 103656000000,
            "item_id": 1,
            "scenario": 1,
            "label": 1,
            "timestamp_ms": int(datetime(2024, 5, 1, 2, tzinfo=UTC).timestamp() * 1000) + 250,
            "position": 4,
            "split": None,
            "device": "1",
        }
    ]
    assert [(r["line"], r["reason"], r["detail"]) for r in rejects] == [
        (2, "missing key", "column 'user_id': found nothing"),
        (3, "missing value", "column 'label': found nothing"),
        (4, "not a number", "column 'position': found 1.5"),
    ]
    assert rejects[0]["raw"] == ",2,a,false,2024-05-01 10:00:00.250000000,3,"


def test_key_types_agree_over_files(tmp_path):
    table = pa.table({"user_id": [1], "item_id": [2], "scenario": ["x"], "timestamp": [0]})
    pq.write_table(table, tmp_path / "interactions.parquet")
    (tmp_path / "users.csv").write_text("user_id\n1\n")
    pq.write_table(pa.table({"item_id": pa.array([2], pa.uint64())}), tmp_path / "items.parquet")
    built = adapter(tmp_path, interactions="interactions.parquet", users="users.csv", items="items.parquet")
    assert (built.user_key_type, built.item_key_type) == ("string", "string")
    assert read_events(built)[0].select(["user_id", "item_id"]).to_pylist() == [{"user_id": "1", "item_id": "2"}]
    assert read_entities(built, "item")[0].to_pylist() == [{"key": "2", "text": ""}]


@pytest.mark.parametrize(
    ("table", "split", "columns_", "line", "reason", "detail"),
    [
        ({}, None, "", ",i,x,1", "missing key", "column 'user_id': found nothing"),
        ({}, None, "", "u, ,x,1", "missing key", "column 'item_id': found nothing"),
        ({}, None, "", "u,i,,1", "missing value", "column 'scenario': found nothing"),
        ({}, None, "", "u,i,x,", "missing value", "column 'timestamp': found nothing"),
        ({}, None, "", "u,i,x,soon", "not a time", "column 'timestamp': found 'soon'"),
        ({}, None, "", "u,i,x,1700000000000", "not a time", "column 'timestamp': found '1700000000000'"),
        (
            {"timestamp_unit": "s"},
            None,
            "",
            "u,i,x,2024-02-03 10:00",
            "not a time",
            "column 'timestamp': found '2024-02-03 10:00'; set data.table.timestamp_unit = 'iso'",
        ),
        (
            {"timestamp_unit": "ms"},
            None,
            "",
            "u,i,x,2024-02-03",
            "not a time",
            "column 'timestamp': found '2024-02-03'; set data.table.timestamp_unit = 'iso'",
        ),
        (
            {"timestamp_unit": "iso"},
            None,
            "",
            "u,i,x,1700000000",
            "not a time",
            "column 'timestamp': found '1700000000'; set data.table.timestamp_unit = 's' or 'ms'",
        ),
        ({"timestamp_unit": "iso"}, None, "", "u,i,x,20240203", "not a time", "column 'timestamp': found '20240203'"),
        ({}, None, "", "u,i,x", "wrong column count", "expected 4 columns, found 3"),
        (
            {"timestamp_unit": "iso"},
            None,
            "",
            "u,i,x,2024-02-30",
            "not a time",
            "column 'timestamp': found '2024-02-30'",
        ),
        ({"label_column": "l"}, None, ",l", "u,i,x,1,2", "not a label", "column 'l': found '2'"),
        ({"label_column": "l"}, None, ",l", "u,i,x,1,", "missing value", "column 'l': found nothing"),
        ({"rating_column": "l"}, None, ",l", "u,i,x,1,good", "not a number", "column 'l': found 'good'"),
        ({"rating_column": "l"}, None, ",l", "u,i,x,1,", "missing value", "column 'l': found nothing"),
        ({"position_column": "l"}, None, ",l", "u,i,x,1,1.5", "not a number", "column 'l': found '1.5'"),
        (
            {},
            {"kind": "column", "column": "l"},
            ",l",
            "u,i,x,1,dev",
            "unknown split",
            "column 'l': found 'dev'",
        ),
        ({}, {"kind": "column", "column": "l"}, ",l", "u,i,x,1,", "missing value", "column 'l': found nothing"),
        (
            {"features": [{"name": "l", "source": "context", "kind": "numeric"}]},
            None,
            ",l",
            "u,i,x,1,inf",
            "not a number",
            "column 'l': found 'inf'",
        ),
    ],
)
def test_bad_interaction_is_rejected(tmp_path, table, split, columns_, line, reason, detail):
    good = {"": "", ",l": ",train" if split else ",1"}[columns_]
    time = "2024-01-01" if table.get("timestamp_unit") == "iso" else "1"
    (tmp_path / "interactions.csv").write_text(
        f"{HEADER[:-1]}{columns_}\nu,i,x,{time}{good}\n{line}\nv,i,x,{time}{good}\n"
    )
    events, rejects = read_events(adapter(tmp_path, split, **table))
    assert events["user_id"].to_pylist() == ["u", "v"]
    assert rejects == [
        {"file": str(tmp_path / "interactions.csv"), "line": 2 + 1, "reason": reason, "detail": detail, "raw": line}
    ]
    assert events.schema.field("user_id").type == pa.string() and REJECTS.names == list(rejects[0])


def test_a_row_is_rejected_once(tmp_path):
    (tmp_path / "interactions.csv").write_text(f"{HEADER},,,soon\nu,i,x,1\n")
    assert [r["reason"] for r in read_events(adapter(tmp_path))[1]] == ["missing key"]


def test_labels_and_splits(tmp_path):
    labels = ["0", "1", "true", "FALSE", "1.0", "0.0"]
    splits = ["train", "Valid", "TEST", "validation", "val", " train "]
    rows = "".join(f"u,i,x,1,{label},{split}\n" for label, split in zip(labels, splits, strict=True))
    (tmp_path / "interactions.csv").write_text(f"{HEADER[:-1]},l,s\n{rows}")
    events, rejects = read_events(adapter(tmp_path, {"kind": "column", "column": "s"}, label_column="l"))
    assert rejects == []
    assert events["label"].to_pylist() == [0, 1, 1, 0, 1, 0]
    assert events["split"].to_pylist() == [0, 1, 2, 1, 1, 0]


def test_position_without_time(tmp_path):
    (tmp_path / "interactions.csv").write_text("user_id,item_id,scenario,n\nu,i,x,9\nu,j,x,-2\n")
    events, _ = read_events(adapter(tmp_path, {"kind": "per_user_last"}, timestamp_column=None, position_column="n"))
    assert events.select(["timestamp_ms", "position"]).to_pydict() == {
        "timestamp_ms": [None, None],
        "position": [9, -2],
    }


def test_entities(tmp_path):
    (tmp_path / "interactions.csv").write_text(f"{HEADER}u1,i1,x,1\n")
    (tmp_path / "users.csv").write_text("user_id,city,age\nu1,Rome,30\nu2,,\nu1,Oslo,31\n,Bonn,1\nu3,Nice,old\n")
    pq.write_table(
        pa.table(
            {
                "item_id": ["i1", "i2", "i3"],
                "title": ["Red Shoes", None, "Hat"],
                "tags": [["a", "b"], [], None],
                "brand": ["B", "C", None],
                "unused": [{"a": 1}] * 3,
            }
        ),
        tmp_path / "items.parquet",
    )
    built = adapter(
        tmp_path,
        users="users.csv",
        items="items.parquet",
        features=[
            {"name": "tags", "source": "item", "kind": "sequence", "max_length": 3},
            {"name": "title", "source": "item", "kind": "text", "max_length": 5},
            {"name": "age", "source": "user", "kind": "numeric"},
        ],
        user_text_columns=["city"],
        item_text_columns=["title", "brand", "tags"],
    )
    assert built.features == (
        RawFeature("age", "user", "numeric"),
        RawFeature("tags", "item", "sequence", 3),
        RawFeature("title", "item", "sequence", 5),
    )
    users, rejects = read_entities(built, "user")
    assert users.to_pylist() == [{"key": "u1", "text": "Rome", "age": 30.0}, {"key": "u2", "text": "", "age": None}]
    assert [(r["line"], r["reason"], r["detail"]) for r in rejects] == [
        (4, "duplicate key", "column 'user_id': found 'u1'"),
        (5, "missing key", "column 'user_id': found nothing"),
        (6, "not a number", "column 'age': found 'old'"),
    ]
    items, rejects = read_entities(built, "item")
    assert rejects == []
    assert items.to_pylist() == [
        {"key": "i1", "text": "Red Shoes; B; a, b", "tags": ["a", "b"], "title": ["red", "shoes"]},
        {"key": "i2", "text": "C", "tags": [], "title": None},
        {"key": "i3", "text": "Hat", "tags": None, "title": ["hat"]},
    ]


def test_item_scenarios(tmp_path, monkeypatch):
    monkeypatch.setattr(tabular, "_PARQUET_BLOCK_ROWS", 2)
    (tmp_path / "interactions.csv").write_text(f"{HEADER}u1,3,x,1\nu1,3,y,1\nu1,3,z,1\n")
    rows = [(3, "x"), (1, "y"), (3, "y"), (3, "x"), (2, "w"), (4, None), (None, "x"), (2, "x")]
    keys, names = zip(*rows, strict=True)
    pq.write_table(pa.table({"item_id": keys, "where": names, "t": list("abcdefgh")}), tmp_path / "items.parquet")
    built = adapter(tmp_path, items="items.parquet", item_scenario_column="where", item_text_columns=["t"])
    items, rejects = read_entities(built, "item")
    assert items.to_pylist() == [{"key": "3", "text": "a"}, {"key": "1", "text": "b"}, {"key": "2", "text": "h"}]
    assert [(r["line"], r["reason"], r["detail"]) for r in rejects] == [
        (4, "duplicate key", "column 'item_id': found 3"),
        (5, "unknown scenario", "column 'where': found 'w'"),
        (6, "missing value", "column 'where': found nothing"),
        (7, "missing key", "column 'item_id': found nothing"),
    ]
    pools = built.negative_pools()
    assert {index: pool.to_pylist() for index, pool in pools.items()} == {0: ["2", "3"], 1: ["1", "3"], 2: []}
    assert all(pool.type == pa.string() for pool in pools.values())


def test_pickled_adapter_does_not_look_again(tmp_path):
    path = tmp_path / "interactions.csv"
    path.write_text(f"{HEADER}u,i,b,1\nu,i,a,1\n")
    copied = pickle.loads(pickle.dumps(adapter(tmp_path)))
    path.write_text(f"{HEADER}u,i,b,1\n")
    assert [s.name for s in copied.scenarios] == ["a", "b"]
    assert read_events(copied)[0]["scenario"].to_pylist() == [1]


RECIPES = Path(__file__).resolve().parents[2] / "jobs" / "recipes"


@pytest.mark.shared
def test_real_food_kitchen(shared):
    """The published files by the shipped recipe, against the standard library's CSV reader."""
    folder = shared / "data" / "amazon-food-kitchen"
    config = load_config(["--config", str(RECIPES / "amazon_food_kitchen.toml")], environ={}).data
    built = build_adapter(config, str(folder))
    with gzip.open(folder / "interactions.csv.gz", "rt", encoding="utf-8", newline="") as file:
        raw_events = list(csv.DictReader(file))
    with gzip.open(folder / "items.csv.gz", "rt", encoding="utf-8", newline="") as file:
        raw_items = list(csv.DictReader(file))
    assert [s.name for s in built.scenarios] == ["food", "kitchen"]
    events, rejects = read_events(built)
    assert (events.num_rows, rejects) == (133_029, [])
    assert events["user_id"].to_pylist() == [row["user_id"] for row in raw_events]
    assert events["item_id"].to_pylist() == [row["item_id"] for row in raw_events]
    assert events["scenario"].to_pylist() == [("food", "kitchen").index(row["scenario"]) for row in raw_events]
    assert events["position"].to_pylist() == [int(row["position"]) for row in raw_events]
    items, rejects = read_entities(built, "item")
    assert rejects == []
    assert items["key"].to_pylist() == list(dict.fromkeys(row["item_id"] for row in raw_items))
    pools = built.negative_pools()
    for index, scenario in enumerate(built.scenarios):
        listed = {row["item_id"] for row in raw_items if row["scenario"] == scenario.name}
        assert pools[index].to_pylist() == sorted(listed)
    assert set(events["item_id"].to_pylist()) <= set(items["key"].to_pylist())
