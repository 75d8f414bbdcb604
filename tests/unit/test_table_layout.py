"""Files, columns and types of the user's own tables that cannot be used: the message says what would be."""

from __future__ import annotations

import gzip
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm4msr.config import DataConfig
from llm4msr.data.adapters import build_adapter
from llm4msr.data.source import DataError
from llm4msr.data.table import TableAdapter

HEADER = "user_id,item_id,scenario,timestamp\n"


def adapter(folder: Path, **table) -> TableAdapter:
    return TableAdapter(DataConfig(kind="table", raw_uri=str(folder), table={"timestamp_column": "timestamp"} | table))


def test_missing_files_and_columns(tmp_path):
    (tmp_path / "interaction.csv").write_text(f"{HEADER}u,i,x,1\n")
    with pytest.raises(DataError) as error:
        adapter(tmp_path).shards()
    assert str(error.value) == (
        f"{tmp_path}/interactions.csv: no .csv, .csv.gz, .tsv, .tsv.gz, .parquet file there (data.table.interactions "
        f"= 'interactions.csv'); {tmp_path} holds ['interaction.csv']. Did you mean 'interaction.csv'?"
    )
    with pytest.raises(DataError) as error:
        adapter(tmp_path, interactions="interaction.csv", user_column="User_Id ").shards()
    assert str(error.value) == (
        f"{tmp_path}/interaction.csv: no column 'User_Id ' (data.table.user_column); found "
        "['user_id', 'item_id', 'scenario', 'timestamp']. Did you mean 'user_id'?"
    )
    with pytest.raises(DataError, match=r"items\.csv: no .* file there \(data\.table\.items = 'items\.csv'\)"):
        adapter(tmp_path, interactions="interaction.csv", items="items.csv").shards()
    with pytest.raises(DataError, match=r"no column 'zzz' \(data\.table\.features\); found .*'timestamp'\]\.$"):
        adapter(
            tmp_path,
            interactions="interaction.csv",
            features=[{"name": "zzz", "source": "context", "kind": "numeric"}],
        ).shards()
    (tmp_path / "interaction.csv.gz").write_bytes(gzip.compress(b"x"))
    with pytest.raises(DataError, match="would be read twice"):
        adapter(tmp_path, interactions="").shards()


@pytest.mark.parametrize(
    ("column", "values", "table", "message"),
    [
        ("user_id", pa.array([1.5]), {}, r"'user_id' has type double, .* read as key; valid: integer or string"),
        ("scenario", pa.array([{"a": 1}]), {}, r"'scenario' has type struct<a: int64>, .* read as categorical"),
        ("timestamp", pa.array([date(2024, 1, 1)]), {}, r"has type date32.*set table\.timestamp_unit = 'iso'"),
        ("timestamp", pa.array([1]), {"timestamp_unit": "iso"}, r"has type int64.* valid: string, timestamp or date"),
        ("label", pa.array([[1]]), {"label_column": "label"}, r"'label' has type list<.*int64>"),
    ],
)
def test_parquet_types_that_cannot_be_read(tmp_path, column, values, table, message):
    good = {"user_id": pa.array(["u"]), "item_id": pa.array(["i"]), "scenario": pa.array(["x"]), "timestamp": [1]}
    if table.get("timestamp_unit") == "iso":
        good["timestamp"] = pa.array(["2024-01-01"])
    pq.write_table(pa.table(good | {column: values}), tmp_path / "interactions.parquet")
    with pytest.raises(DataError, match=message) as error:
        adapter(tmp_path, interactions="interactions.parquet", **table).shards()
    assert str(error.value).startswith(f"{tmp_path}/interactions.parquet: column {column!r}")


def test_damaged_parquet(tmp_path):
    (tmp_path / "interactions.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"interactions\.parquet: not a readable Parquet file"):
        adapter(tmp_path, interactions="interactions.parquet").shards()


def test_scenario_errors(tmp_path):
    (tmp_path / "interactions.csv").write_text(f"{HEADER}u,i,food,1\nu,i,kitchen,1\n")
    built = adapter(tmp_path, scenario_descriptions={"kitchn": "Pots."})
    with pytest.raises(DataError) as error:
        _ = built.scenarios
    assert str(error.value) == (
        "data.table.scenario_descriptions names 'kitchn', which is no scenario of column 'scenario'; "
        "valid: ['food', 'kitchen']. Did you mean 'kitchen'?"
    )
    (tmp_path / "interactions.csv").write_text(f"{HEADER}u,i,,1\n")
    with pytest.raises(DataError, match="no row has a value in the scenario column 'scenario'"):
        _ = adapter(tmp_path).scenarios


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["label"], "a feature cannot be named 'label'"),
        (["hour", "hour"], "'hour' is named 2 times"),
        (["line"], "no column of events may be named 'line'"),
    ],
)
def test_feature_names_that_cannot_be_used(tmp_path, names, message):
    features = [{"name": name, "source": "context", "kind": "numeric"} for name in names]
    with pytest.raises(DataError, match=message):
        adapter(tmp_path, features=features)


def test_build_adapter_needs_a_folder(tmp_path):
    with pytest.raises(DataError, match=r"data\.raw_uri is unset for kind = 'synthetic'"):
        build_adapter(DataConfig(kind="synthetic"))
    assert build_adapter(DataConfig(kind="synthetic"), str(tmp_path)).raw_uri == str(tmp_path)
