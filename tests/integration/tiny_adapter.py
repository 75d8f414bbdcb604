"""A tiny raw layout of its own, and what the tests of prepare do with it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import ray

from llm4msr import storage, workspace
from llm4msr.config import Config
from llm4msr.data.pipeline import prepare
from llm4msr.data.prepared import PreparedData
from llm4msr.data.source import Block, RawFeature, Shard
from llm4msr.schema import REJECTS, SPLITS, Scenario, rows_schema
from llm4msr.settings import config_from_dict

# Workers cannot import a test module, so what is defined here travels to them by value.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

HEADER = "user,item,scenario,label,time,position,device,price\n"
SCENARIOS = ("home", "search")


@dataclass
class TinyAdapter:
    """Reads part-*.csv (`HEADER`) and users.csv; another label than 0 and 1 rejects a row, repeated rows are merged."""

    raw_uri: str
    scenarios: tuple[Scenario, ...] = tuple(Scenario(name, name) for name in SCENARIOS)
    user_key_type: str = "string"
    item_key_type: str = "int64"
    features: tuple[RawFeature, ...] = field(
        default=(
            RawFeature("city", "user", "categorical"),
            RawFeature("device", "context", "categorical"),
            RawFeature("price", "context", "numeric"),
        )
    )

    def shards(self) -> list[Shard]:
        return [
            Shard(uri, "users" if uri.endswith("users.csv") else "events", size)
            for uri, size in storage.list_files(self.raw_uri, ".csv")
        ]

    def is_events(self, shard: Shard) -> bool:
        return shard.role == "events"

    def parse_events(self, shard: Shard) -> Iterator[Block]:
        text = {name: pa.string() for name in ("user", "device", "label")}
        options = pa_csv.ConvertOptions(column_types=text, strings_can_be_null=True, quoted_strings_can_be_null=True)
        table = pa_csv.read_csv(storage.local_path(shard.uri), convert_options=options)
        bad = pc.invert(pc.is_in(table["label"], pa.array(["0", "1"])))
        line = pa.array(np.arange(2, 2 + len(table)))
        num_bad = pc.sum(bad).as_py() or 0
        rejects = pa.table(
            [
                pa.array([shard.uri] * num_bad, pa.string()),
                line.filter(bad.combine_chunks()),
                pa.array(["label is not 0 or 1"] * num_bad, pa.string()),
                table["label"].filter(bad),
                pa.nulls(num_bad, pa.string()),
            ],
            schema=REJECTS,
        )
        table = table.filter(pc.invert(bad))
        events = pa.table(
            {
                "user_id": table["user"],
                "item_id": table["item"],
                "scenario": pc.index_in(table["scenario"].cast(pa.string()), pa.array(SCENARIOS)),
                "label": table["label"].cast(pa.int8()),
                "timestamp_ms": table["time"].cast(pa.int64()),
                "position": table["position"],
                "split": pa.nulls(len(table), pa.int8()),
                "device": table["device"],
                "price": table["price"].cast(pa.float64()),
                "kept_for_merge": table["position"],
            }
        )
        half = len(events) // 2
        yield Block(events.slice(0, half), rejects)
        yield Block(events.slice(half), REJECTS.empty_table())

    def parse_entities(self, source: str) -> Iterator[Block]:
        path = Path(self.raw_uri) / "users.csv"
        if source == "user" and path.exists():
            table = pa_csv.read_csv(path, convert_options=pa_csv.ConvertOptions(strings_can_be_null=True))
            yield Block(table.rename_columns(["key", "city", "text"]), REJECTS.empty_table())

    def merge(self, events: pa.Table) -> pa.Table:
        repeated = events.group_by(events.column_names, use_threads=False).aggregate([])
        return repeated.drop_columns(["kept_for_merge"])

    def negative_pools(self) -> None:
        """None: the items seen in a scenario are drawn from."""


class UnreadableAdapter(TinyAdapter):
    """As if the driver had code that the workers lack."""

    def __reduce__(self):
        return _fail_to_unpickle, ()


def _fail_to_unpickle() -> None:
    raise ModuleNotFoundError("not on this node")


def config_of(tmp_path: Path, workspace_name: str = "ws", **data) -> Config:
    data = {"kind": "table", "raw_uri": str(tmp_path / "raw")} | data
    return config_from_dict({"workspace_uri": str(tmp_path / workspace_name), "data": data})


def write(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / "raw" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def run(tmp_path: Path, workspace_name: str = "ws", **data) -> PreparedData:
    config = config_of(tmp_path, workspace_name, **data)
    uri = prepare(config, TinyAdapter(str(tmp_path / "raw")))
    assert workspace.prepared_uri(config) == uri
    assert not storage.exists(f"{uri}.staging")
    return PreparedData.open(uri)


def rows_of(data: PreparedData, *names: str) -> list[tuple]:
    """All rows with their raw ids, as sorted tuples: split, user, item, scenario, label, then `names`."""
    users, items = data.users()["key"], data.items()["key"]
    out = []
    for split in SPLITS:
        for uri, num_rows in data.files(split):
            table = storage.read_parquet(uri)
            assert table.schema.equals(rows_schema(data.schema)) and table.num_rows == num_rows
            for row in table.to_pylist():
                ids = users[row["user_row"] - 1].as_py(), items[row["item_row"] - 1].as_py()
                out.append((split, *ids, row["scenario"], row["label"], *(row[name] for name in names)))
    return sorted(out, key=str)
