"""MovieLens: both layouts from hand-made files, every bad input by name, and the real 100K."""

from __future__ import annotations

import pickle
from pathlib import Path

import pyarrow as pa
import pytest

from llm4msr.config import DataConfig, MovieLensConfig
from llm4msr.data.adapters import build_adapter
from llm4msr.data.movielens import MovieLensAdapter
from llm4msr.data.source import DataError
from llm4msr.schema import REJECTS, Scenario, events_schema

GENRES = ("unknown", "Action", "Animation", "Comedy")
FILES_100K = {
    "u.data": "1\t10\t5\t881250949\n2\t10\t3\t881250950\n3\t11\t4\t881250951\n2\t99\t4\t881250952\n",
    "u.user": "1|24|M|technician|85711\n2|25|F|other|94043\n3|35|M|writer|T8H1N\n",
    "u.item": (
        "10|Café Été (1995)|01-Jan-1995||http://x|0|0|1|1\n"
        '11|"Quoted" Title (1999)|||http://y|0|1|0|0\n'
        "12|unknown||||1|0|0|0\n"
        "13|||||0|0|0|0\n"
    ),
    "u.genre": "".join(f"{name}|{i}\n" for i, name in enumerate(GENRES)) + "\n",
}
FILES_1M = {
    "ratings.dat": "1::10::5::978300760\n2::11::1::978300761\n",
    "users.dat": "1::F::1::10::48067\n2::M::56::16::70072-1234\n3::M::25::77::02460\n",
    "movies.dat": "10::Café (1995)::Animation|Children's\n11::L'Été: Part::Drama\n",
}


def write(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_bytes(text.encode("latin-1"))
    return folder


def adapter(folder: Path, **settings) -> MovieLensAdapter:
    config = DataConfig(kind="movielens", raw_uri=str(folder), movielens=MovieLensConfig(**settings))
    built = build_adapter(config)
    assert isinstance(built, MovieLensAdapter)
    return built


def read_events(built: MovieLensAdapter) -> tuple[pa.Table, pa.Table]:
    (shard,) = [s for s in built.shards() if built.is_events(s)]
    blocks = list(built.parse_events(shard))
    return pa.concat_tables([b.table for b in blocks]), pa.concat_tables([b.rejects for b in blocks])


def read_entities(built: MovieLensAdapter, source: str) -> tuple[list[dict], pa.Table]:
    blocks = list(built.parse_entities(source))
    return pa.concat_tables([b.table for b in blocks]).to_pylist(), pa.concat_tables([b.rejects for b in blocks])


def test_100k_events(tmp_path):
    built = adapter(write(tmp_path, FILES_100K))
    assert built.scenarios == (
        Scenario("under-25", "Movies rated by viewers younger than 25."),
        Scenario("25-34", "Movies rated by viewers aged 25 to 34."),
        Scenario("35-plus", "Movies rated by viewers aged 35 or older."),
    )
    events, rejects = read_events(built)
    assert rejects.num_rows == 0 and rejects.schema == REJECTS
    assert events.schema == events_schema("int64", "int64")
    assert events.to_pydict() == {
        "user_id": [1, 2, 3, 2],
        "item_id": [10, 10, 11, 99],
        "scenario": [0, 1, 2, 1],
        "label": [1, 0, 1, 1],
        "timestamp_ms": [881250949000, 881250950000, 881250951000, 881250952000],
        "position": [1, 2, 3, 4],
        "split": [None] * 4,
    }
    assert built.merge(events) is events


def test_100k_entities(tmp_path):
    built = adapter(write(tmp_path, FILES_100K))
    users, rejects = read_entities(built, "user")
    assert rejects.num_rows == 0
    assert users == [
        {
            "key": 1,
            "text": "24 years old, male, technician",
            "gender": "M",
            "occupation": "technician",
            "zip_region": "8",
            "age": 24.0,
        },
        {
            "key": 2,
            "text": "25 years old, female, other",
            "gender": "F",
            "occupation": "other",
            "zip_region": "9",
            "age": 25.0,
        },
        {
            "key": 3,
            "text": "35 years old, male, writer",
            "gender": "M",
            "occupation": "writer",
            "zip_region": "T",
            "age": 35.0,
        },
    ]
    items, rejects = read_entities(built, "item")
    assert rejects.num_rows == 0
    assert items == [
        {
            "key": 10,
            "text": "Café Été (1995): Animation, Comedy",
            "genres": ["Animation", "Comedy"],
            "release_year": 1995.0,
        },
        {"key": 11, "text": '"Quoted" Title (1999): Action', "genres": ["Action"], "release_year": None},
        {"key": 12, "text": "unknown", "genres": [], "release_year": None},
        {"key": 13, "text": "", "genres": [], "release_year": None},
    ]


def test_1m_layout(tmp_path):
    built = adapter(write(tmp_path, FILES_1M))
    assert [s.role for s in built.shards()] == ["events", "users", "items"]
    events, rejects = read_events(built)
    assert rejects.num_rows == 0
    assert events.select(["user_id", "item_id", "scenario", "label", "timestamp_ms"]).to_pydict() == {
        "user_id": [1, 2],
        "item_id": [10, 11],
        "scenario": [0, 2],
        "label": [1, 0],
        "timestamp_ms": [978300760000, 978300761000],
    }
    users, _ = read_entities(built, "user")
    assert [u["text"] for u in users] == [
        "under 18 years old, female, K-12 student",
        "56 or more years old, male, self-employed",
        "25-34 years old, male, 77",
    ]
    assert [(u["occupation"], u["zip_region"], u["age"]) for u in users] == [
        ("K-12 student", "4", 1.0),
        ("self-employed", "7", 56.0),
        ("77", "0", 25.0),
    ]
    items, _ = read_entities(built, "item")
    assert items == [
        {
            "key": 10,
            "text": "Café (1995): Animation, Children's",
            "genres": ["Animation", "Children's"],
            "release_year": 1995.0,
        },
        {"key": 11, "text": "L'Été: Part: Drama", "genres": ["Drama"], "release_year": None},
    ]


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        ("1\t10\t6\t881250949", "rating out of range", "column 'rating': found 6.0"),
        ("1\t10\t0\t881250949", "rating out of range", "column 'rating': found 0.0"),
        ("7\t10\t5\t881250949", "unknown user", "column 'user': found 7"),
        ("1\t10\t5\t99999999999999", "not a time", "column 'timestamp': found 99999999999999"),
        ("1\t10\tfive\t881250949", "not a number", "column 'rating': found 'five'"),
        ("1\t10\t5\t", "missing value", "column 'timestamp': found ''"),
        ("1\t10\t5", "wrong column count", "expected 4 columns, found 3"),
    ],
)
def test_bad_rating_is_rejected(tmp_path, line, reason, detail):
    text = f"1\t10\t5\t881250949\n{line}\n2\t10\t3\t881250950\n"
    events, rejects = read_events(adapter(write(tmp_path, FILES_100K | {"u.data": text})))
    assert events["position"].to_pylist() == [1, 3]
    assert rejects.to_pylist() == [
        {"file": str(tmp_path / "u.data"), "line": 2, "reason": reason, "detail": detail, "raw": line}
    ]


def test_bad_entities_are_rejected(tmp_path):
    users = "1|24|M|writer|1\n2|0|M|writer|1\n1|30|F|other|2\n3|131|F|other|2\n"
    items = FILES_100K["u.item"] + "10|Again (1995)|||u|0|0|0|0\n"
    built = adapter(write(tmp_path, FILES_100K | {"u.user": users, "u.item": items}))
    kept, rejects = read_entities(built, "user")
    assert [(u["key"], u["age"]) for u in kept] == [(1, 24.0)]
    assert rejects.select(["line", "reason"]).to_pylist() == [
        {"line": 2, "reason": "age out of range"},
        {"line": 3, "reason": "duplicate key"},
        {"line": 4, "reason": "age out of range"},
    ]
    kept, rejects = read_entities(built, "item")
    assert [i["key"] for i in kept] == [10, 11, 12, 13]
    assert rejects.select(["line", "reason", "detail"]).to_pylist() == [
        {"line": 5, "reason": "duplicate key", "detail": "column 'item': found 10"}
    ]
    assert read_events(built)[1]["reason"].to_pylist() == ["unknown user"] * 3


def test_age_bands(tmp_path):
    names = lambda *bands: [s.name for s in adapter(tmp_path, age_bands=bands).scenarios]  # noqa: E731
    assert names() == ["all-ages"]
    assert names(18) == ["under-18", "18-plus"]
    assert names(18, 25, 50) == ["under-18", "18-24", "25-49", "50-plus"]
    for bands in ((35, 25), (25, 25), (0, 25), (25, 200)):
        with pytest.raises(DataError, match=r"age_bands = .* first ages must rise and lie in 2\.\.130"):
            adapter(tmp_path, age_bands=bands)


def test_bands_through_age_groups_of_1m_warn(tmp_path, caplog):
    write(tmp_path, FILES_1M)
    read_events(adapter(tmp_path, age_bands=(25, 35)))
    assert not caplog.records
    read_events(adapter(tmp_path, age_bands=(30,)))
    assert "[30] cut through age groups of the 1M release" in caplog.text


def test_incomplete_and_ambiguous_folders(tmp_path):
    write(tmp_path, {"u.data": "", "u.user": ""})
    with pytest.raises(DataError) as error:
        adapter(tmp_path).shards()
    assert str(error.value) == (
        f"{tmp_path} holds no complete release of MovieLens: needed are ['u.data', 'u.user', 'u.item', 'u.genre'] "
        "(100K) or ['ratings.dat', 'users.dat', 'movies.dat'] (1M); found ['u.data', 'u.user']"
    )
    write(tmp_path, FILES_100K | FILES_1M)
    with pytest.raises(DataError, match="holds both releases"):
        adapter(tmp_path).shards()


def test_damaged_genre_list(tmp_path):
    built = adapter(write(tmp_path, FILES_100K | {"u.genre": "unknown|0\nAction|2\n"}))
    with pytest.raises(DataError, match=r"u\.genre: expected one line .* found numbers \[0, 2\]"):
        read_entities(built, "item")


def test_positive_rating_and_pickling(tmp_path):
    built = adapter(write(tmp_path, FILES_100K), positive_rating=5.0)
    built.shards()
    copied = pickle.loads(pickle.dumps(built))
    assert read_events(copied)[0]["label"].to_pylist() == [1, 0, 0, 0]


@pytest.mark.shared
def test_real_100k(shared):
    built = adapter(shared / "data" / "ml-100k")
    events, rejects = read_events(built)
    assert (events.num_rows, rejects.num_rows) == (100_000, 0)
    assert events["label"].to_numpy().sum() == 55_375  # 34,174 fours and 21,201 fives
    counts = {c["values"]: c["counts"] for c in events["scenario"].value_counts().to_pylist()}
    assert counts == {0: 26_551, 1: 35_444, 2: 38_005}
    users, rejects = read_entities(built, "user")
    assert (len(users), len({u["key"] for u in users}), rejects.num_rows) == (943, 943, 0)
    items, rejects = read_entities(built, "item")
    assert (len(items), rejects.num_rows) == (1682, 0)
    assert items[0]["text"] == "Toy Story (1995): Animation, Children's, Comedy"
    assert [i["key"] for i in items if i["release_year"] is None] == [267]
    assert max(len(i["genres"]) for i in items) == 6
