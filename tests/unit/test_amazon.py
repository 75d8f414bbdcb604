"""Amazon reviews: layouts from hand-made files, every bad input by name, and the real files against plain counts."""

from __future__ import annotations

import gzip
import json
import logging
import math
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pydantic import ValidationError

from llm4msr.config import DataConfig
from llm4msr.config.data import AmazonConfig
from llm4msr.data.adapters import build_adapter
from llm4msr.data.amazon import AmazonAdapter
from llm4msr.data.json_records import Field, object_keys, read_json
from llm4msr.data.source import DataError
from llm4msr.schema import REJECTS, Scenario, events_schema

DAY = 1_472_688_000


def review(user: str = "U1", item: str = "B1", rating: float = 5.0, day: int = DAY, **others) -> dict:
    return {"overall": rating, "verified": True, "reviewerID": user, "asin": item, "unixReviewTime": day} | others


def lines(*records: dict) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        data = text.encode()
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return folder


def adapter(folder: Path, **settings) -> AmazonAdapter:
    settings = {"categories": {"beauty": "Beauty_5"}} | settings
    built = build_adapter(DataConfig(kind="amazon", raw_uri=str(folder), amazon=AmazonConfig(**settings)))
    assert isinstance(built, AmazonAdapter)
    return built


def read_events(built: AmazonAdapter) -> tuple[pa.Table, pa.Table]:
    blocks = [b for shard in built.shards() if built.is_events(shard) for b in built.parse_events(shard)]
    return pa.concat_tables([b.table for b in blocks]), pa.concat_tables([b.rejects for b in blocks])


def read_items(built: AmazonAdapter) -> tuple[list[dict], pa.Table]:
    blocks = list(built.parse_entities("item"))
    return pa.concat_tables([b.table for b in blocks]).to_pylist(), pa.concat_tables([b.rejects for b in blocks])


def test_events_of_two_categories(tmp_path):
    pretty = "\n".join(json.dumps(r, indent=2) for r in (review("U2", "B2", 3.0), review(rating=4.0, day=DAY + 86400)))
    files = {
        "Beauty_5.json.gz": lines(review(style={"Size:": "7 oz"}, vote="3"), review("U2", "B2", 1)),
        "F.json": pretty,
    }
    built = adapter(
        write(tmp_path, files),
        categories={"beauty": "Beauty_5", "fashion": "F.json"},
        scenario_descriptions={"fashion": "Clothes."},
    )
    assert built.scenarios == (
        Scenario("beauty", "Products of the category named beauty."),
        Scenario("fashion", "Clothes."),
    )
    assert built.features == () and list(built.parse_entities("user")) == [] == list(built.parse_entities("item"))
    assert [(Path(s.uri).name, s.role) for s in built.shards()] == [
        ("Beauty_5.json.gz", "reviews"),
        ("F.json", "reviews"),
    ]
    parsed, rejects = read_events(built)
    assert rejects.num_rows == 0 and rejects.schema == REJECTS
    assert parsed.select(events_schema("string", "string").names).schema == events_schema("string", "string")
    events = built.merge(parsed)
    assert events.schema == events_schema("string", "string")
    assert events.to_pydict() == {
        "user_id": ["U1", "U2", "U2", "U1"],
        "item_id": ["B1", "B2", "B2", "B1"],
        "scenario": [0, 0, 1, 1],
        "label": [1, 0, 0, 1],
        "timestamp_ms": [DAY * 1000, DAY * 1000, DAY * 1000, (DAY + 86400) * 1000],
        "position": [1, 2, (1 << 40) + 1, (1 << 40) + 8],
        "split": [None] * 4,
    }


def test_exact_repeats_count_once(tmp_path):
    first = review(reviewText="great", style={"Color:": "red"})
    other_colour = first | {"style": {"Color:": "blue"}}
    text = lines(first, other_colour, first, review("U2"), first)
    built = adapter(write(tmp_path, {"Beauty_5/1.json": text, "Beauty_5/2.json.gz": lines(first) + json.dumps(first)}))
    parsed, _ = read_events(built)
    assert parsed.num_rows == 7
    assert built.merge(parsed).select(["user_id", "position"]).to_pylist() == [
        {"user_id": "U1", "position": 1},
        {"user_id": "U1", "position": 2},
        {"user_id": "U2", "position": 4},
    ]


@pytest.mark.parametrize("pretty", [False, True])
@pytest.mark.parametrize(
    ("record", "reason", "detail"),
    [
        ({"overall": 6.0}, "rating out of range", "column 'overall': found 6.0"),
        ({"overall": 0}, "rating out of range", "column 'overall': found 0.0"),
        ({"overall": math.nan}, "rating out of range", "column 'overall': found nan"),
        ({"overall": None}, "missing value", "column 'overall': found nothing"),
        ({"overall": "five"}, "wrong type", "field 'overall': found 'five', expected double"),
        ({"overall": True}, "wrong type", "field 'overall': found True, expected double"),
        ({"reviewerID": " "}, "missing key", "column 'reviewerID': found ' '"),
        ({"asin": None}, "missing key", "column 'asin': found nothing"),
        ({"asin": 17}, "wrong type", "field 'asin': found 17, expected string"),
        ({"unixReviewTime": None}, "missing value", "column 'unixReviewTime': found nothing"),
        ({"unixReviewTime": 10**12}, "not a time", "column 'unixReviewTime': found 1000000000000"),
        ({"asin": ["B1"]}, "wrong type", "field 'asin': found ['B1'], expected string"),
        ({"unixReviewTime": 10**30}, "wrong type", f"field 'unixReviewTime': found {10**30}, expected int64"),
        ({"unixReviewTime": 1.5}, "wrong type", "field 'unixReviewTime': found 1.5, expected int64"),
    ],
)
def test_bad_review_is_rejected(tmp_path, record, reason, detail, pretty):
    indent = 1 if pretty else None
    texts = [json.dumps(r, indent=indent) for r in (review(), review() | record, review("U2"))]
    built = adapter(write(tmp_path, {"Beauty_5.json": "\n".join(texts)}))
    events, rejects = read_events(built)
    first = 1 + texts[0].count("\n") + 1
    assert events["position"].to_pylist() == [1, first + texts[1].count("\n") + 1]
    assert rejects.to_pylist() == [
        {
            "file": str(tmp_path / "Beauty_5.json"),
            "line": first,
            "reason": reason,
            "detail": detail,
            "raw": texts[1][:200],
        }
    ]


DAMAGED = {
    '{"overall": 5.0, "reviewerID": "U9", "asi': "Invalid control character at (character 42 of the object)",
    "not json at all": None,
    '{"overall": 5.0} trailing': None,
    "[" * 100_000: "objects must stand one after another, not in a list",
    '"text"': "expected an object {...}, found str",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_costs_itself_alone(tmp_path, damage):
    good = [json.dumps(review(f"U{i}"), indent=2 if i % 2 else None) for i in range(6)]
    text = "\n".join([*good[:3], damage, *good[3:]])
    built = adapter(write(tmp_path, {"Beauty_5.json": text}))
    events, rejects = read_events(built)
    assert events["user_id"].to_pylist() == [f"U{i}" for i in range(6)]
    line = 1 + sum(one.count("\n") + 1 for one in good[:3])
    if damage.endswith("trailing"):
        assert rejects.filter(pc.equal(rejects["reason"], "missing key"))["line"].to_pylist() == [line]
        rejects = rejects.filter(pc.equal(rejects["reason"], "not JSON"))
    assert rejects.select(["line", "reason"]).to_pylist() == [{"line": line, "reason": "not JSON"}]
    if DAMAGED[damage]:
        assert rejects["detail"].to_pylist() == [DAMAGED[damage]]


@pytest.mark.parametrize("half", ["", "\ud83d"])  # half a character is more than pyarrow's reader takes
def test_objects_on_one_line_blank_lines_and_marks(tmp_path, half):
    first, second = json.dumps(review()), json.dumps(review("Ü2" + half))
    text = "\ufeff\r\n" + first + "\r\n\r\n  " + second + first + "\r\n\n" + json.dumps(review("U3"))
    events, rejects = read_events(adapter(write(tmp_path, {"Beauty_5.json": text})))
    assert rejects.num_rows == 0
    assert events["user_id"].to_pylist() == ["U1", "Ü2?" if half else "Ü2", "U1", "U3"]
    assert events["position"].to_pylist() == [2, 4, 4, 6]


@pytest.mark.parametrize("block_bytes", [1, 700, 1 << 24])
def test_blocks_and_damage_do_not_change_what_is_read(tmp_path, block_bytes):
    rng = np.random.default_rng(0)
    records = [
        review(f"U{rng.integers(9)}", text="x{\n}\"'" * int(rng.integers(9)), style={"a": [1, {"b": None}]})
        for _ in range(60)
    ]
    texts = [json.dumps(r, indent=None if rng.random() < 0.5 else 2) for r in records]
    fields = [Field("reviewerID", pa.string()), Field("overall", pa.float64())]

    def read(text: str) -> tuple[dict, list[int]]:
        (tmp_path / "a.json").write_text(text)
        blocks = list(read_json(str(tmp_path / "a.json"), fields, block_bytes=block_bytes))
        table = pa.concat_tables([b.table for b in blocks])
        assert sum(len(b.rejects) for b in blocks) == ("damage" in text)
        return table.drop_columns("raw").to_pydict(), object_keys(table["raw"]).tolist()

    sound = read("\n".join(texts))
    assert sound[0]["reviewerID"] == [r["reviewerID"] for r in records]
    assert sound[0]["line"] == np.cumsum([1, *(t.count("\n") + 1 for t in texts[:-1])]).tolist()
    assert len(set(sound[1])) == len(set(texts))
    assert read("\n".join([*texts, "damage"])) == sound


def test_literals_of_2014(tmp_path):
    product = {"asin": "B1", "title": "It's", "price": 9.5, "categories": [["Beauty", "Skin"], ["Beauty", "Oil"]]}
    files = {"Beauty_5.json": lines(review()), "meta.json.gz": f"{product}\n{{'asin': __import__('os')}}\n"}
    built = adapter(write(tmp_path, files), metadata={"beauty": "meta"})
    items, rejects = read_items(built)
    assert items == [
        {
            "key": "B1",
            "text": "It's: Beauty, Skin, Oil",
            "title": ["it", "s"],
            "categories": ["Beauty", "Skin", "Oil"],
            "brand": None,
            "log_price": pytest.approx(math.log(10.5)),
        }
    ]
    assert rejects.select(["line", "reason"]).to_pylist() == [{"line": 2, "reason": "not JSON"}]


def test_products(tmp_path, caplog):
    full = {
        "asin": "B1",
        "title": " Lotion &amp; <b>Oil</b>",
        "brand": "by\n    \n    Nivea",
        "price": "$1,234.50",
        "category": ["Beauty", "Beauty", "Skin &amp; Hair", "</span></span>", "Smells nice."],
    }
    bare = {"asin": "B2", "title": '<span class="a-size-medium"', "brand": "", "price": "", "category": []}
    branded = bare | {"asin": "B3", "brand": "Dove"}
    text = lines(full, bare, full, branded, full | {"price": "$1"}, {"title": "No id"})
    files = {"Beauty_5.json": lines(review()), "meta.json": text, "other.json": lines(full)}
    built = adapter(
        write(tmp_path, files | {"Other_5.json": lines(review())}),
        categories={"beauty": "Beauty_5", "other": "Other_5"},
        metadata={"beauty": "meta", "other": "other"},
        max_title_words=3,
    )
    assert [(f.name, f.source, f.kind, f.max_length) for f in built.features] == [
        ("title", "item", "sequence", 3),
        ("categories", "item", "sequence", 6),
        ("brand", "item", "categorical", 0),
        ("log_price", "item", "numeric", 0),
    ]
    with caplog.at_level(logging.INFO):
        items, rejects = read_items(built)
    assert items == [
        {
            "key": "B1",
            "text": "Lotion & Oil, by Nivea: Beauty, Skin & Hair",
            "title": ["lotion", "oil"],
            "categories": ["Beauty", "Skin & Hair"],
            "brand": "Nivea",
            "log_price": pytest.approx(math.log(1235.5)),
        },
        {"key": "B2", "text": "", "title": None, "categories": [], "brand": None, "log_price": None},
        {"key": "B3", "text": "Dove", "title": None, "categories": [], "brand": "Dove", "log_price": None},
    ]
    assert rejects.select(["line", "reason"]).to_pylist() == [
        {"line": 5, "reason": "duplicate key"},
        {"line": 6, "reason": "missing key"},
    ]
    assert "meta.json: dropped 1 records that repeat another exactly" in caplog.text
    assert "other.json: dropped 1 records" in caplog.text


def test_names_files_and_settings(tmp_path):
    write(tmp_path, {"Beauty_5.json": lines(review()), "Twice.json": "{}", "Twice.json.gz": "{}", "x.csv": ""})
    with pytest.raises(DataError, match=r"data.amazon.categories names no category: .*beauty = 'All_Beauty_5.json.gz'"):
        adapter(tmp_path, categories={})
    with pytest.raises(DataError) as error:
        adapter(tmp_path, categories={"b": "beauty_6.json"}).shards()
    assert str(error.value) == (
        f"{tmp_path}/beauty_6.json: no .json, .json.gz file and no folder of such files there "
        f"(data.amazon.categories.b = 'beauty_6.json'); {tmp_path} holds "
        "['Beauty_5.json', 'Twice.json', 'Twice.json.gz']. Did you mean 'Beauty_5.json'?"
    )
    with pytest.raises(DataError, match=r"data.amazon.metadata.b = 'Twice': \[.*\] are there; name one of them"):
        adapter(tmp_path, categories={"b": "Beauty_5"}, metadata={"b": "Twice"}).shards()
    with pytest.raises(DataError, match=r"Beauty_5.json: is the file of 'a' and of 'b'; each needs its own"):
        adapter(tmp_path, categories={"a": "Beauty_5", "b": "Beauty_5.json"}).shards()
    with pytest.raises(ValidationError, match="metadata names 'x', which categories does not"):
        AmazonConfig(categories={"b": "B"}, metadata={"x": "B"})


def test_wrong_empty_and_cut_files(tmp_path):
    write(tmp_path, {"Beauty_5.json": lines({"asin": "B1", "title": "Soap"}), "e.json": ""})
    with pytest.raises(DataError, match=r"Beauty_5.json:1: no field 'reviewerID' in a record of reviews: \{\"asin\""):
        adapter(tmp_path).shards()
    with pytest.raises(DataError, match=r"e.json: the file is empty"):
        adapter(tmp_path, categories={"e": "e"}).shards()
    whole = gzip.compress(lines(*(review(str(i), reviewText=str(hash(str(i)))) for i in range(9000))).encode())
    (tmp_path / "cut.json.gz").write_bytes(whole[: len(whole) // 2])
    built = adapter(tmp_path, categories={"c": "cut"})
    with pytest.raises(DataError, match=r"cut.json.gz: cannot be read after line \d+"):
        list(built.parse_events(built.shards()[0]))


def test_positive_rating_and_pickling(tmp_path):
    text = lines(review(rating=5.0), review(rating=4.0))
    built = adapter(write(tmp_path, {"Beauty_5.json": text}), positive_rating=5.0)
    built.shards()
    assert read_events(pickle.loads(pickle.dumps(built)))[0]["label"].to_pylist() == [1, 0]


REAL = {
    "fashion": "AMAZON_FASHION_5.json",
    "beauty": "All_Beauty_5.json.gz",
    "gift_cards": "Gift_Cards_5.json.gz",
    "magazines": "Magazine_Subscriptions_5.json.gz",
}
REAL_METADATA = {"gift_cards": "meta_Gift_Cards.json.gz", "magazines": "meta_Magazine_Subscriptions.json.gz"}


def read_plainly(path: Path) -> Iterator[dict]:
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    decoder, position = json.JSONDecoder(), 0
    while text[position:].strip():
        value, position = decoder.raw_decode(text, position + len(text[position:]) - len(text[position:].lstrip()))
        yield value


@pytest.mark.shared
def test_real_reviews(shared):
    folder = shared / "data" / "amazon-2018-5core"
    built = adapter(folder, categories={name: file.split(".")[0] for name, file in REAL.items()})
    parsed, rejects = read_events(built)
    events = built.merge(parsed)
    assert rejects.num_rows == 0
    assert (parsed.num_rows, events.num_rows) == (13_792, 12_655)
    for index, (name, file) in enumerate(REAL.items()):
        data = (folder / file).read_bytes()
        text = (gzip.decompress(data) if file.endswith(".gz") else data).decode()
        pieces = text.split("\n{") if name == "fashion" else text.splitlines()
        records = [json.loads("{" * (piece[0] != "{") + piece) for piece in pieces]
        assert len(records) == (3176, 5269, 2972, 2375)[index]
        distinct = {json.dumps(r, sort_keys=True): r for r in records}
        assert len(distinct) == (3108, 4242, 2972, 2333)[index]
        wanted = sorted(
            (r["reviewerID"], r["asin"], r["unixReviewTime"] * 1000, int(r["overall"] > 3)) for r in distinct.values()
        )
        mine = events.filter(pa.array(events["scenario"].to_numpy() == index))
        columns = (mine[c].to_pylist() for c in ("user_id", "item_id", "timestamp_ms", "label"))
        assert sorted(zip(*columns, strict=True)) == wanted
    users = [set(events.filter(events["scenario"].to_numpy() == s)["user_id"].to_pylist()) for s in range(4)]
    assert len(set.union(*users)) == 2197 == sum(map(len, users)) - 6


@pytest.mark.shared
def test_real_metadata(shared):
    built = adapter(shared / "data" / "amazon-2018-5core", categories=REAL, metadata=REAL_METADATA)
    items, rejects = read_items(built)
    assert rejects.num_rows == 0
    assert len(items) == len({i["key"] for i in items}) == 1547 + 2320
    titled = [i for i in items if i["title"] is not None]
    assert len(items) - len(titled) == 2163  # the page's source in place of the title, all of them magazines
    assert not any("<" in i["text"] or "&#" in i["text"] or "&amp;" in i["text"] for i in items)
    by_key = {i["key"]: i for i in items}
    assert by_key["B001BKEWF2"]["text"] == "Serendipity 3 $100.00 Gift Card, by Serendipity 3: Gift Cards"
    assert sum(i["log_price"] is not None for i in items) == 358
    assert max(len(i["categories"]) for i in items) == 7
