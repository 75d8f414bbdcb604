"""The published files of KuaiSAR as the generator writes them: columns of each release, category names, CSV text.

Left out: anything random (see `llm4msr.data.synthetic`) and reading (see `llm4msr.data.kuaisar`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llm4msr import storage

FILES = ("rec_inter", "src_inter", "user_features", "item_features", "social_network")
BEIJING_MS = 8 * 3_600_000

_SLICE_ROWS = 1 << 18

# First level, then its second level: English and Chinese names.
TAXONOMY = (
    (("Food", "美食"), "Baking 烘焙|Home Cooking 家常菜|Street Food 街头小吃|Restaurants 探店|Tea and Coffee 茶与咖啡"),
    (("Sports", "体育"), "Basketball 篮球|Football 足球|Running 跑步|Swimming 游泳|Table Tennis 乒乓球"),
    (
        ("Film, Television, and Short Dramas", "影视短剧"),
        "Anime 动漫|Costume Drama 古装剧|Crime Series 刑侦剧|Film Reviews 影评|Romance Drama 爱情剧",
    ),
    (("Music and Dance", "音乐舞蹈"), "Piano 钢琴|Guitar 吉他|Singing 唱歌|Street Dance 街舞|Ballet 芭蕾"),
    (
        ("Games", "游戏"),
        "Shooters 射击游戏|Chess 象棋|Racing Games 竞速游戏|Card Games 纸牌|Role-Playing Games 角色扮演",
    ),
    (("Pets and Animals", "宠物动物"), "Cats 猫|Dogs 狗|Aquarium Fish 观赏鱼|Birds 鸟|Wild Animals 野生动物"),
    (("Travel", "旅游"), "Mountains and Hiking 登山|Beaches 海滩|Old Towns 古镇|Camping 露营|Train Journeys 火车旅行"),
    (("Fashion and Beauty", "时尚美妆"), "Makeup 化妆|Hairstyles 发型|Skin Care 护肤|Clothes 穿搭|Nail Art 美甲"),
)
_FIRST = [names for names, _ in TAXONOMY]
_SECOND = [tuple(text.rsplit(" ", 1)) for _, texts in TAXONOMY for text in texts.split("|")]
_THIRD = [(f"{en} {e}", zh + z) for en, zh in _SECOND for e, z in (("Lessons", "教程"), ("Highlights", "精选"))]
_FOURTH = [(f"{en} for Beginners", zh + "入门") for en, zh in _THIRD]
LEVELS = (("first", _FIRST), ("second", _SECOND), ("third", _THIRD), ("fourth", _FOURTH))
NUM_CATEGORIES = len(_SECOND)
PER_FIRST = NUM_CATEGORIES // len(_FIRST)


def _category_columns(*kinds: str) -> list[str]:
    return [f"{level}_level_category_{kind}" for level, _ in LEVELS for kind in kinds]


# Columns of each file in the order of the release.
HEADERS: dict[str, dict[str, list[str]]] = {
    release: {name: " ".join(texts).split() for name, texts in files.items()}
    for release, files in {
        "small": {
            "rec_inter": (
                "user_id item_id duration_ms playing_time timestamp forward like follow search_item_related search",
                "click time",
            ),
            "src_inter": (
                "keyword item_id click_cnt search_session_id item_type user_id search_session_timestamp",
                "search_source search_session_time",
            ),
            "user_features": ("user_id onehot_feat1 onehot_feat2 search_active_level reco_active_level",),
            "item_features": (
                "item_id caption author_id item_type upload_time upload_type music_id",
                *_category_columns("id", "name"),
                *_category_columns("name_en"),
            ),
            "social_network": ("user_id user_follow_id",),
        },
        "full": {
            "rec_inter": (
                "user_id item_id duration_ms playing_time timestamp forward like follow search_photo_related search",
                "click time",
            ),
            "src_inter": (
                "user_id search_session_id search_session_timestamp search_session_source keyword item_id click_cnt",
                "item_type time",
            ),
            "user_features": ("user_id onehot_feat1 onehot_feat2 search_active_level rec_active_level",),
            "item_features": (
                "item_id",
                *_category_columns("id", "name"),
                "caption author_id item_type upload_time upload_type",
                *_category_columns("name_en"),
            ),
            "social_network": ("user_id user_follow_id",),
        },
    }.items()
}


def quote(text: str) -> str:
    """Quotes a CSV value where it needs quotes."""
    return f'"{text}"' if "," in text else text


def pick(index: np.ndarray, texts: Sequence[str]) -> pa.Array:
    """Returns ``texts[index]`` (n,) as a dictionary array."""
    return pa.DictionaryArray.from_arrays(pa.array(index.astype(np.int32)), pa.array(texts, pa.string()))


def number_lists(lengths: np.ndarray, numbers: np.ndarray) -> pa.Array:
    """Returns quoted texts such as ``"[12, 7]"``: the flat `numbers`, cut into `lengths` (n,)."""
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    joined = pc.binary_join(pa.ListArray.from_arrays(offsets, pa.array(numbers).cast(pa.string())), ", ")
    return pc.binary_join_element_wise('"[', joined, ']"', "")


def beijing_time(timestamp_ms: np.ndarray) -> pa.Array:
    """Returns Unix times as wall clock times in Beijing, to the second."""
    return pa.array(((timestamp_ms + BEIJING_MS) // 1000).astype("datetime64[s]"))


def write_csv(raw_uri: str, name: str, release: str, columns: Mapping[str, pa.Array], num_shards: int) -> None:
    """Writes one file of the layout, or a folder of `num_shards` files with consecutive rows.

    Args:
        raw_uri: Folder of the data set.
        name: One of `FILES`.
        release: Whose header is written.
        columns: At least the header's columns, equally long. Strings stand in the file as they are, so values that
            need quotes come quoted; floats are whole numbers and get ``.0``; nulls are empty.
        num_shards: 1 writes ``name.csv``, more write ``name/part-00000.csv`` and so on.
    """
    header = HEADERS[release][name]
    table = pa.table([columns[column] for column in header], names=header)
    bounds = np.linspace(0, table.num_rows, num_shards + 1).astype(np.int64).tolist()
    for shard, (begin, end) in enumerate(pairwise(bounds)):
        file_name = f"{name}.csv" if num_shards == 1 else f"{name}/part-{shard:05d}.csv"
        with storage.atomic_write(storage.join(raw_uri, file_name)) as file:
            file.write((",".join(header) + "\n").encode())
            for start in range(begin, end, _SLICE_ROWS):
                file.write(_csv_lines(table.slice(start, min(_SLICE_ROWS, end - start))))


def _csv_lines(table: pa.Table) -> memoryview:
    """Returns the rows as CSV: the values of one string array, whose buffer is the file's text already."""
    texts = []
    for column in table.combine_chunks().columns:
        array = column.combine_chunks()
        if pa.types.is_dictionary(array.type):
            text = array.dictionary.take(array.indices)
        elif pa.types.is_floating(array.type):
            text = pc.binary_join_element_wise(array.cast(pa.int64()).cast(pa.string()), ".0", "")
        else:
            text = array.cast(pa.string())
        texts.append(text.fill_null(""))
    texts[-1] = pc.binary_join_element_wise(texts[-1], "\n", "")
    lines = pc.binary_join_element_wise(*texts, ",")
    return memoryview(lines.buffers()[2])[: pc.sum(pc.binary_length(lines)).as_py()]
