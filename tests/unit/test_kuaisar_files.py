"""The KuaiSAR adapter: damaged rows, and the ways in which the files may lie in a folder."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from kuaisar_release import DAY, SEARCH_POSITION, SMALL, damage, line, parse, shard_folder, tables, write_release

from llm4msr.config import DataConfig
from llm4msr.data.kuaisar import KuaisarAdapter, _Seen
from llm4msr.data.source import DataError, Shard


@pytest.fixture
def write(tmp_path):
    def write(headers=SMALL, folder=tmp_path / "raw", **files):
        return write_release(folder, headers, **files)

    return write


@pytest.mark.parametrize(
    ("role", "change", "reason", "detail"),
    [
        ("rec_inter", {"user_id": ""}, "missing key", "column 'user_id': found nothing"),
        ("rec_inter", {"item_id": " "}, "missing key", "column 'item_id': found nothing"),
        ("rec_inter", {"item_id": "U1"}, "not a number", "column 'item_id': found 'U1'"),
        ("rec_inter", {"timestamp": "nan"}, "not a number", "column 'timestamp': found 'nan'"),
        ("rec_inter", {"timestamp": ""}, "missing value", "column 'timestamp': found ''"),
        ("rec_inter", {"click": ""}, "missing value", "column 'click': found ''"),
        ("rec_inter", {"click": "2"}, "unknown value", "column 'click': found 2"),
        ("rec_inter", {"click": "-1"}, "unknown value", "column 'click': found -1"),
        ("rec_inter", {"click": "0.5"}, "not a number", "column 'click': found '0.5'"),
        ("rec_inter", {"time": f"{DAY},1"}, "wrong column count", "expected 12 columns, found 13"),
        ("src_inter", {"user_id": ""}, "missing key", "column 'user_id': found nothing"),
        ("src_inter", {"click_cnt": ""}, "missing value", "column 'click_cnt': found ''"),
        ("src_inter", {"click_cnt": "-1"}, "unknown value", "column 'click_cnt': found -1"),
        ("src_inter", {"search_session_timestamp": "x"}, "not a number", "column 'timestamp': found 'x'"),
        ("src_inter", {"keyword": "[20, 34, 3]"}, "wrong column count", "expected 9 columns, found 11"),
    ],
)
def test_damaged_event_row(write, role, change, reason, detail):
    table, rejects = parse(write(**{role: [{}, change, {}]}), role)
    assert damage(rejects) == [(f"{role}.csv", 3, reason, detail)]
    assert rejects["raw"].to_pylist() == [line(role, SMALL[role], **change)]
    assert [p % SEARCH_POSITION for p in table["position"].to_pylist()] == [2, 4]


def test_unclosed_keyword_costs_its_line_only(write):
    rows = [{}, {"keyword": '"[20, 34'}, {"item_id": "13"}]
    table, rejects = parse(write(src_inter=rows), "src_inter")
    assert table["item_id"].to_pylist() == [12, 13]
    assert [d[:3] for d in damage(rejects)] == [("src_inter.csv", 3, "bad quoting")]


def test_rejects_are_in_order_of_lines(write):
    rows = [{"click": "7"}, {"user_id": ""}, "1,2", {"item_id": "x"}, {"item_id": ""}]
    _, rejects = parse(write(rec_inter=rows), "rec_inter")
    assert [d[1:3] for d in damage(rejects)] == [
        (2, "unknown value"),
        (3, "missing key"),
        (4, "wrong column count"),
        (5, "not a number"),
        (6, "missing key"),
    ]


@pytest.mark.parametrize(("source", "role"), [("user", "user_features"), ("item", "item_features")])
def test_damaged_entity_rows(write, source, role):
    key = f"{source}_id"
    rows = [{key: "1"}, {key: ""}, {key: "2"}, {key: "1"}, {key: "x"}, "1,2"]
    table, rejects = tables(write(**{role: rows}).parse_entities(source))
    assert table["key"].to_pylist() == [1, 2]
    width = len(SMALL[role].split(","))
    assert damage(rejects) == [
        (f"{role}.csv", 3, "missing key", f"column '{key}': found nothing"),
        (f"{role}.csv", 5, "duplicate key", f"column '{key}': found 1"),
        (f"{role}.csv", 6, "not a number", f"column '{key}': found 'x'"),
        (f"{role}.csv", 7, "wrong column count", f"expected {width} columns, found 2"),
    ]


def test_text_where_the_author_id_belongs(write):
    table, rejects = tables(write(item_features=[{"author_id": "Tom"}]).parse_entities("item"))
    assert table.num_rows == 0
    assert damage(rejects) == [("item_features.csv", 2, "not a number", "column 'author_id': found 'Tom'")]


def test_seen_keys_over_many_blocks():
    rng = np.random.default_rng(0)
    blocks = [rng.integers(0, 500, size) for size in (1, 40, 0, 200, 7, 300, 300)]
    seen, met = _Seen(), set()
    for block in blocks:
        expected = [not (key in met or met.add(key)) for key in block.tolist()]
        assert seen.add(block).tolist() == expected


@pytest.mark.parametrize("packed", [False, True])
def test_folders_of_shards(write, tmp_path, packed):
    rows = [{"item_id": "1"}, {"item_id": "2"}, {"item_id": "3"}]
    single = write(rec_inter=rows, src_inter=rows, item_features=[*rows, {"item_id": "1"}])
    adapter = shard_folder(single, tmp_path / "raw", packed)
    assert [s.uri.split("raw/")[1] for s in adapter.shards()][:2] == [
        "rec_inter/part-00000.csv",
        f"rec_inter/part-00001.csv{'.gz' if packed else ''}",
    ]
    assert [adapter.is_events(s) for s in adapter.shards()] == [True] * 4 + [False] * 4
    rec, search = parse(adapter, "rec_inter")[0], parse(adapter, "src_inter")[0]
    assert rec["position"].to_pylist() == [2, (1 << 40) + 2, (1 << 40) + 3]
    assert search["position"].to_pylist() == [(2 << 40) + 2, (3 << 40) + 2, (3 << 40) + 3]
    items, rejects = tables(adapter.parse_entities("item"))
    assert items["key"].to_pylist() == [1, 2, 3]
    assert [d[1:3] for d in damage(rejects)] == [(4, "duplicate key")]


@pytest.mark.parametrize("release", ["KuaiSAR_final", "KuaiSAR_v2"])
def test_parent_of_the_unpacked_archive(write, tmp_path, release):
    write(folder=tmp_path / "parent" / release)
    (tmp_path / "parent" / "readme.txt").write_text("hello")
    adapter = KuaisarAdapter(DataConfig(kind="kuaisar", raw_uri=f"{tmp_path}/parent/"))
    assert [s.uri for s in adapter.shards()] == [f"{tmp_path}/parent/{release}/{name}.csv" for name in SMALL]


def test_both_releases_in_one_parent(write, tmp_path):
    for release in ("KuaiSAR_final", "KuaiSAR_v2"):
        write(folder=tmp_path / "parent" / release)
    with pytest.raises(DataError, match=r"holds rec_inter in \['KuaiSAR_final/', 'KuaiSAR_v2/'\]"):
        KuaisarAdapter(DataConfig(kind="kuaisar", raw_uri=f"{tmp_path}/parent")).shards()


def test_social_network_and_strangers_are_ignored(write, tmp_path):
    adapter = write()
    for name in ("social_network.csv", "rec_inter.csv.crc", "_SUCCESS", ".rec_inter.csv", "notes.csv"):
        (tmp_path / "raw" / name).write_text("x")
    assert [s.role for s in adapter.shards()] == list(SMALL)


def test_one_file_in_two_forms_would_be_read_twice(write, tmp_path):
    adapter = write()
    (tmp_path / "raw" / "src_inter.csv.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"\['src_inter.csv', 'src_inter.csv.gz'\] repeat each other"):
        adapter.shards()


@pytest.mark.parametrize("name", list(SMALL))
def test_missing_file(write, tmp_path, name):
    adapter = write()
    (tmp_path / "raw" / f"{name}.csv").unlink()
    with pytest.raises(DataError) as error:
        adapter.shards()
    found = sorted(f"{other}.csv" for other in SMALL if other != name)
    wanted = f"no {name}.csv, {name}.csv.gz or a folder {name}/ with *.csv or *.csv.gz; found {found}"
    assert str(error.value) == f"{tmp_path}/raw: {wanted}"


def test_missing_folder(tmp_path):
    with pytest.raises(DataError, match=r"no rec_inter\.csv.* found no file at all"):
        KuaisarAdapter(DataConfig(kind="kuaisar", raw_uri=str(tmp_path / "none"))).shards()


def test_missing_column_is_found_when_shards_are_listed(write):
    adapter = write(SMALL | {"src_inter": SMALL["src_inter"].replace(",search_source", "")})
    with pytest.raises(DataError, match=r"src_inter.csv: no column 'search_source' or 'search_session_source' in"):
        adapter.shards()


def test_raw_uri_argument_overrides_the_configuration(write, tmp_path):
    write(folder=tmp_path / "other")
    adapter = KuaisarAdapter(DataConfig(kind="synthetic"), raw_uri=str(tmp_path / "other"))
    assert len(adapter.shards()) == 4
    with pytest.raises(DataError, match=r"data\.raw_uri is not set"):
        KuaisarAdapter(DataConfig(kind="synthetic"))


def test_adapter_travels_as_a_pickle(write):
    adapter = write()
    shards = adapter.shards()
    copy = pickle.loads(pickle.dumps(adapter))
    assert tables(copy.parse_events(shards[1])) == tables(adapter.parse_events(shards[1]))
    assert isinstance(shards[0], Shard)


def test_object_store(write, tmp_path, s3_server, bucket):
    local = shard_folder(write(rec_inter=[{}, {"click": "9"}]), tmp_path / "raw", packed=True)
    for shard in local.shards():
        s3_server.upload_file(shard.uri, bucket, "kuai/" + shard.uri.split("raw/")[1])
    adapter = KuaisarAdapter(DataConfig(kind="kuaisar", raw_uri=f"s3://{bucket}/kuai/"))
    assert adapter.shards()[0].uri == f"s3://{bucket}/kuai/rec_inter/part-00000.csv"
    for shard, local_shard in zip(adapter.shards(), local.shards(), strict=True):
        assert (shard.role, shard.num_bytes) == (local_shard.role, local_shard.num_bytes)
    table, rejects = parse(adapter, "rec_inter")
    assert table == parse(local, "rec_inter")[0]
    assert rejects["file"].to_pylist() == [f"s3://{bucket}/kuai/rec_inter/part-00001.csv.gz"]
    assert tables(adapter.parse_entities("item"))[0] == tables(local.parse_entities("item"))[0]
