"""Writes small KuaiSAR folders of either release and reads them back, for the tests of the adapter."""

from __future__ import annotations

import gzip

import pyarrow as pa

from llm4msr.config import DataConfig
from llm4msr.data.kuaisar import KuaisarAdapter

SMALL = {
    "rec_inter": "user_id,item_id,duration_ms,playing_time,timestamp,forward,like,follow,search_item_related,search,"
    "click,time",
    "src_inter": "keyword,item_id,click_cnt,search_session_id,item_type,user_id,search_session_timestamp,search_source,"
    "search_session_time",
    "user_features": "user_id,onehot_feat1,onehot_feat2,search_active_level,reco_active_level",
    "item_features": "item_id,caption,author_id,item_type,upload_time,upload_type,music_id,first_level_category_id,"
    "first_level_category_name,second_level_category_id,second_level_category_name,third_level_category_id,"
    "third_level_category_name,fourth_level_category_id,fourth_level_category_name,first_level_category_name_en,"
    "second_level_category_name_en,third_level_category_name_en,fourth_level_category_name_en",
}
FULL = {
    "rec_inter": "user_id,item_id,duration_ms,playing_time,timestamp,forward,like,follow,search_photo_related,search,"
    "click,time",
    "src_inter": "user_id,search_session_id,search_session_timestamp,search_session_source,keyword,item_id,click_cnt,"
    "item_type,time",
    "user_features": "user_id,onehot_feat1,onehot_feat2,search_active_level,rec_active_level",
    "item_features": "item_id,first_level_category_id,first_level_category_name,second_level_category_id,"
    "second_level_category_name,third_level_category_id,third_level_category_name,fourth_level_category_id,"
    "fourth_level_category_name,caption,author_id,item_type,upload_time,upload_type,first_level_category_name_en,"
    "second_level_category_name_en,third_level_category_name_en,fourth_level_category_name_en",
}
DAY = "2023-05-22 15:53:20"
REC = {
    "user_id": "7",
    "item_id": "11",
    "duration_ms": "45400.0",
    "playing_time": "60792.0",
    "timestamp": "1.684742e+12",
    "forward": "0",
    "like": "0",
    "follow": "0",
    "search_item_related": "0",
    "search_photo_related": "0",
    "search": "0",
    "click": "1",
    "time": DAY,
}
SRC = {
    "keyword": '"[20, 34, 3]"',
    "item_id": "12",
    "click_cnt": "0",
    "search_session_id": "900",
    "item_type": "VIDEO",
    "user_id": "7",
    "search_session_timestamp": "1684763932919",
    "search_source": "USER_INPUT",
    "search_session_source": "USER_INPUT",
    "search_session_time": DAY,
    "time": DAY,
}
USER = {
    "user_id": "7",
    "onehot_feat1": "7",
    "onehot_feat2": "2",
    "search_active_level": "6",
    "reco_active_level": "3",
    "rec_active_level": "3",
}
ITEM = {
    "item_id": "11",
    "caption": '"[2077636, 5]"',
    "author_id": "44552",
    "item_type": "NORMAL",
    "upload_time": "2015-09-24",
    "upload_type": "ShortImport",
    "music_id": "81",
    "first_level_category_id": "9",
    "first_level_category_name": "搞笑",
    "second_level_category_id": "136",
    "second_level_category_name": "搞笑段子",
    "third_level_category_id": "0",
    "third_level_category_name": "空",
    "fourth_level_category_id": "0",
    "fourth_level_category_name": "空",
    "first_level_category_name_en": "Funny",
    "second_level_category_name_en": "Funny joke",
    "third_level_category_name_en": "empty",
    "fourth_level_category_name_en": "",
}
BASE = {"rec_inter": REC, "src_inter": SRC, "user_features": USER, "item_features": ITEM}
SEARCH_POSITION = 1 << 40  # the second interactions file starts here


def write_release(folder, headers=SMALL, bags=(), **files):
    """Writes for each file the rows that differ from its base row (default: the base row alone)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, header in headers.items():
        rows = [r if isinstance(r, str) else line(name, header, **r) for r in files.get(name, [{}])]
        (folder / f"{name}.csv").write_text("\n".join([header, *rows, ""]), encoding="utf-8")
    return KuaisarAdapter(DataConfig(kind="kuaisar", raw_uri=str(folder), kuaisar={"bags": bags}))


def line(name, header, **changes):
    return ",".join((BASE[name] | changes)[column] for column in header.split(","))


def tables(blocks):
    blocks = list(blocks)
    return pa.concat_tables([b.table for b in blocks]), pa.concat_tables([b.rejects for b in blocks])


def parse(adapter, role):
    parts = [tables(adapter.parse_events(shard)) for shard in adapter.shards() if shard.role == role]
    return pa.concat_tables([p[0] for p in parts]), pa.concat_tables([p[1] for p in parts])


def damage(rejects):
    return [(r["file"].rsplit("/", 1)[-1], r["line"], r["reason"], r["detail"]) for r in rejects.to_pylist()]


def merged(adapter):
    events = pa.concat_tables([parse(adapter, "rec_inter")[0], parse(adapter, "src_inter")[0]])
    return adapter.merge(events)


def shard_folder(adapter, folder, packed=False):
    """Turns each single file into a folder of two shards, the second one perhaps gzipped."""
    for name in SMALL:
        path = folder / f"{name}.csv"
        header, *rows = path.read_text(encoding="utf-8").splitlines()
        path.unlink()
        (folder / name).mkdir()
        (folder / name / "part-00000.csv").write_text("\n".join([header, rows[0], ""]), encoding="utf-8")
        rest = "\n".join([header, *rows[1:], ""]).encode()
        target = folder / name / f"part-00001.csv{'.gz' if packed else ''}"
        target.write_bytes(gzip.compress(rest) if packed else rest)
    return KuaisarAdapter(DataConfig(kind="kuaisar", raw_uri=str(folder)))
