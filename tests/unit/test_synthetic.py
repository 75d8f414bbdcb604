"""The generated raw files: layout, quirks, determinism, and the effect that is planted in them."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter, defaultdict
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pytest

from llm4msr import storage
from llm4msr.config import DataConfig, SyntheticConfig
from llm4msr.data import synthetic, synthetic_world
from llm4msr.data.kuaisar import KuaisarAdapter
from llm4msr.data.source import DataError

CATEGORY_IDS_AND_NAMES = (
    "first_level_category_id,first_level_category_name,second_level_category_id,second_level_category_name,"
    "third_level_category_id,third_level_category_name,fourth_level_category_id,fourth_level_category_name"
)
ENGLISH = (
    "first_level_category_name_en,second_level_category_name_en,third_level_category_name_en,"
    "fourth_level_category_name_en"
)
# As published, written out again: a mistake in the generator's own table must not hide itself.
HEADERS = {
    "small": {
        "rec_inter": "user_id,item_id,duration_ms,playing_time,timestamp,forward,like,follow,search_item_related,"
        "search,click,time",
        "src_inter": "keyword,item_id,click_cnt,search_session_id,item_type,user_id,search_session_timestamp,"
        "search_source,search_session_time",
        "user_features": "user_id,onehot_feat1,onehot_feat2,search_active_level,reco_active_level",
        "item_features": f"item_id,caption,author_id,item_type,upload_time,upload_type,music_id,"
        f"{CATEGORY_IDS_AND_NAMES},{ENGLISH}",
        "social_network": "user_id,user_follow_id",
    },
    "full": {
        "rec_inter": "user_id,item_id,duration_ms,playing_time,timestamp,forward,like,follow,search_photo_related,"
        "search,click,time",
        "src_inter": "user_id,search_session_id,search_session_timestamp,search_session_source,keyword,item_id,"
        "click_cnt,item_type,time",
        "user_features": "user_id,onehot_feat1,onehot_feat2,search_active_level,rec_active_level",
        "item_features": f"item_id,{CATEGORY_IDS_AND_NAMES},caption,author_id,item_type,upload_time,upload_type,"
        f"{ENGLISH}",
        "social_network": "user_id,user_follow_id",
    },
}
SIZES = {"num_users": 300, "num_items": 400, "seed": 1}
BEIJING = ZoneInfo("Asia/Shanghai")


def read(folder: Path, name: str) -> list[dict[str, str]]:
    files = [folder / f"{name}.csv"] if (folder / f"{name}.csv").exists() else sorted((folder / name).glob("*.csv"))
    rows = []
    for file in files:
        with file.open(encoding="utf-8", newline="") as text:
            rows += csv.DictReader(text)
    return rows


def search_key(row: dict[str, str]) -> tuple[str, ...]:
    source = row.get("search_source") or row["search_session_source"]
    time = row["search_session_timestamp"]
    return row["user_id"], row["search_session_id"], time, row["keyword"], source, row["item_id"]


@pytest.fixture(scope="module", params=["small", "full"])
def data(request, tmp_path_factory):
    """Folder, truth and release of one generated data set of each release."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, synthetic.generate(SyntheticConfig(release=request.param, **SIZES), str(folder)), request.param


@pytest.fixture(scope="module")
def rows(data):
    """All files of the data set, parsed with the standard library."""
    return {name: read(data[0], name) for name in synthetic.FILES}


def test_headers_are_those_of_the_release(data):
    folder, _, release = data
    for name, header in HEADERS[release].items():
        assert (folder / f"{name}.csv").read_text(encoding="utf-8").split("\n", 1)[0] == header
    assert len(HEADERS["small"]["item_features"].split(",")) == 19
    assert len(HEADERS["full"]["item_features"].split(",")) == 18


def test_counts_are_as_returned(data, rows):
    _, truth, _ = data
    assert truth["users"] == len(rows["user_features"]) == 300
    assert truth["items"] == len(rows["item_features"]) == 400
    assert truth["rec_rows"] == len(rows["rec_inter"])
    assert truth["search_rows"] == len(rows["src_inter"])
    assert truth["rec_clicks"] == sum(row["click"] == "1" for row in rows["rec_inter"])
    merged = defaultdict(int)
    for row in rows["src_inter"]:
        merged[search_key(row)] |= int(row["click_cnt"]) > 0
    assert truth["search_events"] == len(merged)
    assert truth["search_clicks"] == sum(merged.values())
    assert truth["rec_batches"] == len({(row["user_id"], row["timestamp"]) for row in rows["rec_inter"]})
    assert truth["search_sessions"] == len({key[:5] for key in merged})
    listed = {row["item_id"] for row in rows["item_features"]}
    assert truth["rec_rows_of_items_without_features"] == sum(r["item_id"] not in listed for r in rows["rec_inter"])
    assert truth["search_events_of_items_without_features"] == sum(key[5] not in listed for key in merged)
    assert truth == json.loads(json.dumps(truth))


def test_sizes_are_about_those_asked_for(data):
    _, truth, _ = data
    assert truth["rec_rows"] == pytest.approx(300 * 24, rel=0.1)
    assert truth["search_events"] == pytest.approx(300 * 16, rel=0.1)
    assert truth["rec_clicks"] / truth["rec_rows"] == pytest.approx(0.5, abs=0.05)
    assert 0.3 < truth["search_clicks"] / truth["search_events"] < 0.4


def test_rec_rows_are_batches_in_time_order(data, rows):
    *_, release = data
    begin, end = {
        "small": ("2023-05-22 14:50", "2023-05-31 14:50"),
        "full": ("2023-05-22 14:30", "2023-06-10 09:30"),
    }[release]
    rec = rows["rec_inter"]
    assert all(row["timestamp"].endswith(".0") and len(row["timestamp"]) == 15 for row in rec)
    moments = [int(float(row["timestamp"])) for row in rec]
    assert moments == sorted(moments)
    for row, moment in zip(rec, moments, strict=True):
        local = datetime.fromtimestamp(moment // 1000, BEIJING).strftime("%Y-%m-%d %H:%M:%S")
        assert row["time"] == local
        assert begin <= local < end
    sizes = Counter((row["user_id"], row["timestamp"]) for row in rec)
    assert max(sizes.values()) <= 6
    assert sum(size > 1 for size in sizes.values()) > len(sizes) / 2
    users = [row["user_id"] for row in rec]
    assert users != sorted(users)


def test_every_split_has_rows_of_nearly_every_user(data, rows):
    *_, release = data
    test_from = {"small": "2023-05-29", "full": "2023-06-05"}[release]
    time = {"small": "search_session_time", "full": "time"}[release]
    for name, column in (("rec_inter", "time"), ("src_inter", time)):
        train = Counter(row["user_id"] for row in rows[name] if row[column] < "2023-05-28")
        test = Counter(row["user_id"] for row in rows[name] if row[column] >= test_from)
        assert len(train) > 0.9 * 300 if release == "small" else len(train) > 0.7 * 300
        assert len(test) > 0.75 * 300


def test_null_and_odd_durations(data, rows):
    _, truth, _ = data
    rec = rows["rec_inter"]
    assert 0 < truth["rec_null_duration"] == sum(row["duration_ms"] == "" for row in rec)
    assert 0 < truth["rec_null_playing_time"] == sum(row["playing_time"] == "" for row in rec)
    full = [row for row in rec if row["duration_ms"] and row["playing_time"]]
    longer = sum(float(row["playing_time"]) > float(row["duration_ms"]) for row in full)
    assert 0 < truth["rec_playing_above_duration"] == longer
    assert all(row["duration_ms"].endswith(".0") for row in full)


def test_lists_are_quoted_and_of_numbers(data, rows):
    folder, _, _ = data
    for name, column in (("src_inter", "keyword"), ("item_features", "caption")):
        assert '"[' in (folder / f"{name}.csv").read_text(encoding="utf-8")
        values = [json.loads(row[column]) for row in rows[name]]
        assert all(value and all(isinstance(word, int) for word in value) for value in values)
        assert {len(value) for value in values} >= {1, 2, 3, 4}


def test_repeats_are_not_contiguous_and_conflict(data, rows):
    _, truth, _ = data
    places = defaultdict(list)
    for i, row in enumerate(rows["src_inter"]):
        places[search_key(row)].append((i, int(row["click_cnt"]) > 0))
    repeats = [found for found in places.values() if len(found) > 1]
    assert len(repeats) == truth["search_repeats"] > 50
    assert all(second[0] - first[0] > 1 for first, second in repeats)
    conflicts = Counter((first[1], second[1]) for first, second in repeats if first[1] != second[1])
    assert conflicts.total() == truth["search_conflicts"]
    assert set(conflicts) == {(False, True), (True, False)}


def test_session_ids_are_shared_by_users(data, rows):
    _, truth, _ = data
    users = defaultdict(set)
    for row in rows["src_inter"]:
        users[row["search_session_id"]].add(row["user_id"])
    assert truth["search_reused_sessions"] > 0
    assert 0 < sum(len(found) > 1 for found in users.values()) <= truth["search_reused_sessions"]


def test_other_item_types_have_no_feature_row(data, rows):
    _, truth, _ = data
    listed = {row["item_id"] for row in rows["item_features"]}
    others = [row for row in rows["src_inter"] if row["item_type"] != "VIDEO"]
    assert {row["item_type"] for row in others} == set(synthetic_world.OTHER_TYPES)
    assert not listed & {row["item_id"] for row in others}
    assert len({search_key(row) for row in others}) == truth["search_events_of_other_types"]
    videos = {row["item_id"] for row in rows["src_inter"] if row["item_type"] == "VIDEO"}
    assert videos - listed  # and some videos have none either


def test_padding_in_item_features(data, rows):
    _, truth, release = data
    items = rows["item_features"]
    empty = [row for row in items if row["first_level_category_id"] == "0"]
    assert 0 < len(empty) == truth["items_without_category"]
    for row in empty:
        assert {row[f"{level}_level_category_name_en"] for level in ("first", "second", "third", "fourth")} == {"empty"}
        assert row["first_level_category_name"] == {"small": "empty", "full": "空"}[release]
        assert row["fourth_level_category_id"] == "0"
    assert any(row["second_level_category_id"] == "0" != row["first_level_category_id"] for row in items)
    assert 0 < sum(row["author_id"] == "0" for row in items) == truth["items_without_author"]
    assert 0 < sum(row["upload_time"] == "1970-01-01" for row in items) == truth["items_without_upload_time"]
    names = {row["first_level_category_name_en"] for row in items}
    assert "Film, Television, and Short Dramas" in names
    assert {row["first_level_category_name"] for row in items} >= {"美食", "影视短剧"}
    assert len(names - {"empty"}) == 8
    ids = {(row["second_level_category_id"], row["second_level_category_name_en"]) for row in items}
    assert len(ids) == 41  # 40 and the empty one: one id, one name


def test_ids_that_float32_would_merge(data, rows):
    big = {int(row["item_id"]) for row in rows["item_features"] if int(row["item_id"]) > 2**24}
    assert len(big) >= 2
    assert len({float(np.float32(item)) for item in big}) < len(big)
    assert len({row["item_id"] for row in rows["item_features"]}) == 400


def test_one_hot_ranges_are_those_of_the_files_not_of_the_documentation(data, rows):
    *_, release = data
    users = rows["user_features"]
    assert {row["onehot_feat1"] for row in users} == set("01234567")
    assert {row["onehot_feat2"] for row in users} == set("012")
    assert {row["search_active_level"] for row in users} == set("0123456")
    assert {row[{"small": "reco", "full": "rec"}[release] + "_active_level"] for row in users} == set("0123")


def test_clicks_follow_taste_in_each_scenario(data):
    _, truth, release = data
    config = SyntheticConfig(release=release, **SIZES)
    tastes = synthetic_world.draw_tastes(config)
    items = synthetic_world.Items(config)
    category = dict(zip(items.item_id.tolist(), items.category.tolist(), strict=True))
    for scenario, name, label in (("rec", "rec_inter", "click"), ("search", "src_inter", "click_cnt")):
        found = defaultdict(list)
        for row in read(data[0], name):
            liked = tastes[scenario][int(row["user_id"]) - 1]
            second = category[int(row["item_id"])]
            kind = "liked" if second in liked else "near" if second // 5 in liked // 5 and second >= 0 else "other"
            found[kind].append(row[label] != "0")
        rates = {kind: np.mean(clicks) for kind, clicks in found.items()}
        assert rates["liked"] > 0.65 > 0.55 > rates["near"] > 0.3 > 0.25 > rates["other"]
        assert min(len(clicks) for clicks in found.values()) > 300  # exploited and random items alike
        assert 0.8 < truth["oracle_auc"][scenario] < 0.86
        assert truth["quality_auc"][scenario] < 0.65  # what no taste at all would reach


def test_tastes_differ_but_overlap_between_scenarios():
    tastes = synthetic_world.draw_tastes(SyntheticConfig(num_users=500))
    shared = [len(set(rec) & set(search)) for rec, search in zip(tastes["rec"], tastes["search"], strict=True)]
    assert set(shared) == {1}
    first = [len(set(r // 5) & set(s // 5)) for r, s in zip(tastes["rec"], tastes["search"], strict=True)]
    assert set(first) == {1}
    assert all(len(set(row)) == 3 and len(set(row // 5)) == 2 for row in tastes["rec"])
    assert len(np.unique(tastes["rec"], axis=0)) > 450


def test_affinity_by_hand():
    liked = np.array([[0, 1, 37], [0, 1, 37], [0, 1, 37], [0, 1, 37]])
    assert synthetic_world.affinity(liked, np.array([37, 36, 20, -1])).tolist() == [1.0, 0.5, 0.0, 0.0]


def test_auc_by_hand():
    label = np.array([True, False, True, False])
    assert synthetic._auc(np.array([0.9, 0.1, 0.4, 0.4]), label) == 3.5 / 4
    assert synthetic._auc(np.array([0.1, 0.9, 0.2, 0.8]), label) == 0.0
    assert synthetic._auc(np.array([0.1, 0.9]), np.array([True, True])) is None


def test_same_seed_same_bytes_other_seed_other_rows(data, tmp_path):
    folder, truth, release = data
    again = synthetic.generate(SyntheticConfig(release=release, **SIZES), str(tmp_path / "again"))
    assert again == truth
    for name in synthetic.FILES:
        assert (tmp_path / "again" / f"{name}.csv").read_bytes() == (folder / f"{name}.csv").read_bytes()
    synthetic.generate(SyntheticConfig(release=release, **(SIZES | {"seed": 2})), str(tmp_path / "other"))
    other = (tmp_path / "other" / "rec_inter.csv").read_bytes()
    assert other != (folder / "rec_inter.csv").read_bytes()


def test_shards_hold_the_same_rows(data, tmp_path):
    folder, truth, release = data
    assert synthetic.generate(SyntheticConfig(release=release, num_shards=7, **SIZES), str(tmp_path)) == truth
    for name in synthetic.FILES:
        header, *lines = (folder / f"{name}.csv").read_text(encoding="utf-8").splitlines()
        shards = sorted((tmp_path / name).iterdir())
        assert [shard.name for shard in shards] == [f"part-{i:05d}.csv" for i in range(7)]
        found = [shard.read_text(encoding="utf-8").splitlines() for shard in shards]
        assert all(shard[0] == header for shard in found)
        assert [line for shard in found for line in shard[1:]] == lines
    rec = [{line.split(",")[0] for line in s.read_text().splitlines()[1:]} for s in (tmp_path / "rec_inter").iterdir()]
    assert len(set.intersection(*rec)) > 50  # users are spread over shards


def test_tiny_sizes_and_more_shards_than_rows(tmp_path):
    config = SyntheticConfig(num_users=1, num_items=1, rec_rows_per_user=1, search_rows_per_user=1, num_shards=40)
    truth = synthetic.generate(config, str(tmp_path))
    assert len(read(tmp_path, "rec_inter")) == truth["rec_rows"] >= 1
    assert len(read(tmp_path, "user_features")) == 1


def test_finished_folder_is_left_alone_and_a_changed_one_is_written_anew(tmp_path):
    config = SyntheticConfig(num_users=20, num_items=20)
    truth = synthetic.generate(config, str(tmp_path))
    file = tmp_path / "rec_inter.csv"
    original = file.read_bytes()
    file.write_text("left alone")
    assert synthetic.generate(config, str(tmp_path)) == truth
    assert file.read_text() == "left alone"
    (tmp_path / "manifest.json").unlink()  # as if the run had been interrupted
    assert synthetic.generate(config, str(tmp_path)) == truth
    assert file.read_bytes() == original
    synthetic.generate(config.model_copy(update={"num_shards": 2}), str(tmp_path))
    assert not file.exists() and (tmp_path / "rec_inter" / "part-00001.csv").exists()
    manifest = storage.read_manifest(str(tmp_path), "generated data")
    assert manifest["truth"] == truth and manifest["config"]["num_shards"] == 2


@pytest.mark.parametrize("name", ["src_inter.csv", "item_features/a.csv", "manifest.json"])
def test_data_of_others_is_never_overwritten(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=rf"{name.split('/')[0]} was not generated .* left as it is"):
        synthetic.generate(SyntheticConfig(num_users=2, num_items=2), str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == [name.split("/")[0]]
    assert (tmp_path / name).read_text() == "{}"


def adapter_for(folder: Path) -> KuaisarAdapter:
    return KuaisarAdapter(DataConfig(kind="synthetic", raw_uri=str(folder)))


def read_events(adapter: KuaisarAdapter) -> tuple[pa.Table, pa.Table]:
    blocks = [b for shard in adapter.shards() if adapter.is_events(shard) for b in adapter.parse_events(shard)]
    return pa.concat_tables(b.table for b in blocks), pa.concat_tables(b.rejects for b in blocks)


@pytest.mark.parametrize("num_shards", [1, 5])
def test_adapter_reads_all_of_it(data, tmp_path, num_shards):
    folder, truth, release = data
    if num_shards > 1:
        folder = tmp_path
        synthetic.generate(SyntheticConfig(release=release, num_shards=num_shards, **SIZES), str(folder))
    adapter = adapter_for(folder)
    events, rejects = read_events(adapter)
    assert rejects.num_rows == 0
    assert events.num_rows == truth["rec_rows"] + truth["search_rows"]
    merged = adapter.merge(events)
    label, scenario = merged["label"].to_numpy(), merged["scenario"].to_numpy()
    assert (scenario == 0).sum() == truth["rec_rows"] and (scenario == 1).sum() == truth["search_events"]
    assert label[scenario == 0].sum() == truth["rec_clicks"]
    assert label[scenario == 1].sum() == truth["search_clicks"]
    for source, count in (("user", 300), ("item", 400)):
        blocks = list(adapter.parse_entities(source))
        assert sum(b.rejects.num_rows for b in blocks) == 0
        assert sum(b.table.num_rows for b in blocks) == count
    texts = set(pa.concat_tables(b.table for b in blocks)["text"].to_pylist())
    assert "" in texts
    assert any(text.startswith("Film, Television, and Short Dramas > Anime") for text in texts)
    assert not any("empty" in text for text in texts)


def damage(folder: Path, name: str, column: str, values: dict[int, str]) -> None:
    """Writes bad values into a generated file: row (0 is the first below the header) to text."""
    file = folder / f"{name}.csv"
    with file.open(encoding="utf-8", newline="") as text:
        header, *lines = csv.reader(text)
    for row, value in values.items():
        lines[row][header.index(column)] = value
    with file.open("w", encoding="utf-8", newline="") as text:
        csv.writer(text, lineterminator="\n").writerows([header, *lines])


def test_adapter_rejects_exactly_the_damaged_rows(data, tmp_path):
    source, truth, _ = data
    folder = tmp_path / "damaged"
    shutil.copytree(source, folder)
    damage(folder, "rec_inter", "click", {3: "yes", 11: "2"})
    damage(folder, "src_inter", "item_id", {5: "12x"})
    events, rejects = read_events(adapter_for(folder))
    assert events.num_rows == truth["rec_rows"] + truth["search_rows"] - 3
    found = sorted((Path(r["file"]).name, r["line"]) for r in rejects.to_pylist())
    assert found == [("rec_inter.csv", 5), ("rec_inter.csv", 13), ("src_inter.csv", 7)]
