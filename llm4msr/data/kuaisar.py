"""Reads KuaiSAR, both releases: search and recommendation logs of the same users (and the synthetic copy of them).

The small release (`KuaiSAR_final`) and the full one (`KuaiSAR_v2`) name and order their columns differently; columns
are found by name. Scenario 0 is recommendation, scenario 1 is search; a label says whether the item was clicked.

Features are what was known before the item was shown: the user's two one-hot fields and activity levels, the item's
author, categories, types and music, and where a search was typed; with data.kuaisar.bags also the words of the item's
caption and of the query. Words are anonymised numbers. playing_time, forward, like, follow and the two search columns
of the recommendation log are never read: they are outcomes of the same impression and would give the label away. Also
left out: upload_time, duration_ms and the social network.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llm4msr import storage
from llm4msr.config import DataConfig
from llm4msr.data.csv import LINE, Column, find_columns, read_csv, read_header, reject_rows
from llm4msr.data.source import Block, DataError, RawFeature, Shard
from llm4msr.schema import KeyType, Kind, Scenario, Source, events_schema

RECOMMENDATION, SEARCH = 0, 1
SCENARIOS = (
    Scenario("recommendation", "Short videos that the app recommends in a feed, watched one after another."),
    Scenario("search", "Videos, users and other results that the app returns for a query that the user has typed."),
)

MISSING_KEY = "missing key"
UNKNOWN_VALUE = "unknown value"
DUPLICATE_KEY = "duplicate key"

_RELEASES = ("KuaiSAR_final", "KuaiSAR_v2")
_EVENT_ROLES = ("rec_inter", "src_inter")
_ENTITY_ROLES: dict[Source, str] = {"user": "user_features", "item": "item_features"}

# Ids are declared nullable so that an empty one is rejected here as a missing key, not as some missing value.
_USER_ID, _ITEM_ID = Column("user_id", "int64", nullable=True), Column("item_id", "int64", nullable=True)
_LEVELS = ("first", "second", "third", "fourth")
_CATEGORY_IDS = tuple(f"{level}_level_category_id" for level in _LEVELS)
_NAMES = tuple(f"{level}_level_category_name" for level in _LEVELS)
_ENGLISH_NAMES = tuple(f"{name}_en" for name in _NAMES)
_COLUMNS: dict[str, tuple[Column, ...]] = {
    "rec_inter": (_USER_ID, _ITEM_ID, Column("timestamp", "int64"), Column("click", "int64")),
    "src_inter": (
        _USER_ID,
        _ITEM_ID,
        Column("timestamp", "int64", ("search_session_timestamp",)),
        Column("click_cnt", "int64"),
        Column("search_source", "string", ("search_source", "search_session_source"), nullable=True),
        Column("session_id", "string", ("search_session_id",), nullable=True),
        Column("keyword", "string", nullable=True),
    ),
    "user_features": (
        _USER_ID,
        Column("onehot_feat1", "string", nullable=True),
        Column("onehot_feat2", "string", nullable=True),
        Column("search_active_level", "string", nullable=True),
        Column("rec_active_level", "string", ("rec_active_level", "reco_active_level"), nullable=True),
    ),
    "item_features": (
        _ITEM_ID,
        Column("author_id", "int64", nullable=True),
        *(Column(name, "int64", nullable=True) for name in _CATEGORY_IDS),
        Column("item_type", "string", nullable=True),
        Column("upload_type", "string", nullable=True),
        Column("music_id", "int64", required=False, nullable=True),
        *(Column(name, "string", required=False, nullable=True) for name in _NAMES + _ENGLISH_NAMES),
    ),
}
_USER_FEATURES = ("onehot_feat1", "onehot_feat2", "search_active_level", "rec_active_level")
_ITEM_FEATURES = ("author_id", *_CATEGORY_IDS, "item_type", "upload_type")
_PADDED_WITH_0 = frozenset({"author_id", *_CATEGORY_IDS, "music_id"})
_NO_NAME = pa.array(["empty", "空"])
# Words kept, the first ones: of captions, and of queries.
_CAPTION = RawFeature("caption", "item", "sequence", max_length=16)
_KEYWORD = RawFeature("keyword", "context", "sequence", max_length=8)
_NO_WORD = r"[^0-9]+"

# Columns that events carry from `parse_events` to `merge`; query_text is the keyword as it stands in the file.
_MERGE_COLUMNS = [("session_id", pa.string()), ("query_text", pa.string())]
# position = (place of the shard << this) + line: unique, and in the order of files and lines.
_LINE_BITS = 40


class KuaisarAdapter:
    """Adapter of both releases. Opens nothing until asked; files are listed once.

    Args:
        config: Names the raw folder: one with rec_inter.csv, src_inter.csv, user_features.csv and item_features.csv
            (also .csv.gz, or folders of such files), or its parent as the published archive unpacks.
        raw_uri: The raw folder, instead of the configured one.
    """

    scenarios: tuple[Scenario, ...] = SCENARIOS
    user_key_type: KeyType = "int64"
    item_key_type: KeyType = "int64"

    def __init__(self, config: DataConfig, raw_uri: str | None = None) -> None:
        uri = raw_uri or config.raw_uri
        if uri is None:
            raise DataError(f"data.raw_uri is not set: kind = {config.kind!r} reads its files from there")
        self.raw_uri = storage.absolute(uri).rstrip("/")
        self._bags = config.kuaisar.bags

    @cached_property
    def features(self) -> tuple[RawFeature, ...]:
        """Features beyond the ids; music_id only where a file has it, as the full release does not."""
        items = [shard.uri for shard in self._shards if shard.role == "item_features"]
        music = ("music_id",) if any("music_id" in read_header(uri) for uri in items) else ()
        return (
            *(RawFeature(name, "user", "categorical") for name in _USER_FEATURES),
            *(RawFeature(name, "item", "categorical") for name in _ITEM_FEATURES + music),
            *(feature for feature in (_CAPTION,) if feature.name in self._bags),
            RawFeature("search_source", "context", "categorical"),
            *(feature for feature in (_KEYWORD,) if feature.name in self._bags),
        )

    def _columns(self, role: str) -> tuple[Column, ...]:
        caption = role == "item_features" and _CAPTION.name in self._bags
        return _COLUMNS[role] + ((Column(_CAPTION.name, "string", nullable=True),) if caption else ())

    @property
    def _events(self) -> pa.Schema:
        context: tuple[tuple[str, Kind], ...] = (("search_source", "categorical"), (_KEYWORD.name, _KEYWORD.kind))
        return events_schema("int64", "int64", context[: 2 if _KEYWORD.name in self._bags else 1])

    def shards(self) -> list[Shard]:
        """Lists the raw files and looks at the header of each.

        Raises:
            DataError: A file or column is missing; names what was looked for and what was found.
        """
        for shard in self._shards:
            find_columns(self._columns(shard.role), read_header(shard.uri), shard.uri)
        return list(self._shards)

    def is_events(self, shard: Shard) -> bool:
        """Tells whether a shard holds interactions."""
        return shard.role in _EVENT_ROLES

    def parse_events(self, shard: Shard) -> Iterator[Block]:
        """Parses one rec_inter or src_inter file; tables also carry session_id and query_text for `merge`."""
        schema = pa.schema([*self._events, *(pa.field(*column) for column in _MERGE_COLUMNS)])
        label, scenario = ("click", RECOMMENDATION) if shard.role == "rec_inter" else ("click_cnt", SEARCH)
        base = [s.uri for s in self._shards].index(shard.uri) << _LINE_BITS
        for block in read_csv(shard.uri, _COLUMNS[shard.role]):
            table, rejects = block.table, [block.rejects]
            for column in ("user_id", "item_id"):
                table, bad = reject_rows(table, pc.is_null(table[column]), MISSING_KEY, column, shard.uri)
                rejects.append(bad)
            below = pc.less(table[label], 0)
            wrong = pc.or_(below, pc.greater(table[label], 1)) if scenario == RECOMMENDATION else below
            table, bad = reject_rows(table, wrong, UNKNOWN_VALUE, label, shard.uri)
            columns = {
                "user_id": table["user_id"],
                "item_id": table["item_id"],
                "scenario": pa.repeat(pa.scalar(scenario, pa.int32()), len(table)),
                "label": pc.cast(pc.greater(table[label], 0), pa.int8()),
                "timestamp_ms": table["timestamp"],
                "position": pc.add(table[LINE], base),
            }
            if scenario == SEARCH:
                columns |= {name: table[name] for name in ("search_source", "session_id")}
                columns["query_text"] = table["keyword"]
                if _KEYWORD.name in self._bags:
                    columns[_KEYWORD.name] = _words(table["keyword"])
            parsed = pa.table(
                [columns.get(field.name, pa.nulls(len(table), field.type)) for field in schema], schema=schema
            )
            yield Block(parsed, pa.concat_tables([*rejects, bad]).sort_by(LINE))

    def parse_entities(self, source: Source) -> Iterator[Block]:
        """Parses all user_features or item_features files; of rows with the same id the first is kept."""
        role, key = _ENTITY_ROLES[source], f"{source}_id"
        features = [feature.name for feature in self.features if feature.source == source]
        seen = _Seen()
        for shard in self._shards:
            if shard.role != role:
                continue
            english = any(name in read_header(shard.uri) for name in _ENGLISH_NAMES)
            for block in read_csv(shard.uri, self._columns(role)):
                table, missing = reject_rows(block.table, pc.is_null(block.table[key]), MISSING_KEY, key, shard.uri)
                repeated = pa.array(~seen.add(table[key].to_numpy()))
                table, duplicates = reject_rows(table, repeated, DUPLICATE_KEY, key, shard.uri)
                text = pa.repeat("", len(table)) if source == "user" else _text(table, english)
                columns = {"key": table[key], "text": text}
                columns |= {
                    name: _words(table[name]) if name == _CAPTION.name else _tokens(table[name], name)
                    for name in features
                }
                parsed = pa.table(columns)
                yield Block(parsed, pa.concat_tables([block.rejects, missing, duplicates]).sort_by(LINE))

    def negative_pools(self) -> None:
        """Returns None: this layout has negatives of its own."""

    def merge(self, events: pa.Table) -> pa.Table:
        """Merges repeated rows of one search result; a click on any of them counts.

        Search rows are one event where user, session id, timestamp, keyword, source and item are the same (the session
        id alone does not tell searches apart); the first position is kept. Repeated recommendations are separate.

        Args:
            events: All rows of some users, as parsed.

        Returns:
            Rows as `schema.events_schema`: first the recommendations as they were, then the searches.
        """
        is_search = pc.equal(events["scenario"], SEARCH)
        keys = ["user_id", "item_id", "scenario", "timestamp_ms", "split", "search_source", "session_id", "query_text"]
        groups = events.filter(is_search).group_by(keys, use_threads=False)
        search = groups.aggregate([("label", "max"), ("position", "min")])
        names = {"label_max": "label", "position_min": "position"}
        search = search.rename_columns([names.get(name, name) for name in search.column_names])
        if _KEYWORD.name in self._bags:
            search = search.append_column(_KEYWORD.name, _words(search["query_text"]))
        others = events.filter(pc.invert(is_search)).select(self._events.names)
        return pa.concat_tables([others, search.select(self._events.names)])

    @cached_property
    def _shards(self) -> tuple[Shard, ...]:
        files = {uri[len(self.raw_uri) :].lstrip("/"): (uri, size) for uri, size in storage.list_files(self.raw_uri)}
        roots = [r for r in ("", *(f"{name}/" for name in _RELEASES)) if _shard_files(files, f"{r}rec_inter")]
        if len(roots) > 1:
            raise DataError(f"{self.raw_uri}: holds rec_inter in {roots}; data.raw_uri must name one of these folders")
        root = roots[0] if roots else ""
        shards = []
        for role in _COLUMNS:
            names = _shard_files(files, root + role)
            if not names:
                place = storage.join(self.raw_uri, root) if root else self.raw_uri
                wanted = f"{role}.csv, {role}.csv.gz or a folder {role}/ with *.csv or *.csv.gz"
                found = sorted(files)[:20]
                raise DataError(f"{place}: no {wanted}; found {found if found else 'no file at all'}")
            whole = [name for name in names if not name.startswith(f"{root}{role}/")]
            if (whole and len(names) > 1) or len({name.removesuffix(".gz") for name in names}) < len(names):
                raise DataError(f"{self.raw_uri}: {names} repeat each other; keep one file or one folder of shards")
            shards += [Shard(files[name][0], role, files[name][1]) for name in names]
        return tuple(shards)


def _shard_files(files: dict[str, tuple[str, int]], name: str) -> list[str]:
    """Returns the paths of one file, or of the shards in the folder of that name, in order."""
    whole = (f"{name}.csv", f"{name}.csv.gz")
    return sorted(p for p in files if p in whole or (p.startswith(f"{name}/") and p.endswith((".csv", ".csv.gz"))))


def _tokens(values: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """Returns a feature column as text, null where the value stands for nothing."""
    if name in _PADDED_WITH_0:
        values = pc.if_else(pc.equal(values, 0), pa.scalar(None, values.type), values)
    if pa.types.is_integer(values.type):
        return pc.cast(values, pa.string())
    return pc.replace_substring_regex(values, r"^([0-9]+)\.0+$", r"\1")


def _words(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns the numbers in texts such as ``[20, 34, 3]`` as lists of text; what is no number separates them."""
    trimmed = pc.utf8_trim(pc.replace_substring_regex(texts, _NO_WORD, " "), " ")
    words = pc.split_pattern(pc.if_else(pc.equal(trimmed, ""), None, trimmed), " ")
    return words.cast(pa.list_(pa.string()))


def _text(table: pa.Table, english: bool) -> pa.ChunkedArray:
    """Returns the category names from the widest to the narrowest, as in ``Film > Comedy``."""
    columns = [table[name] for name in (_ENGLISH_NAMES if english else _NAMES)]
    text = pa.repeat("", len(table))
    for column in columns:
        name = pc.if_else(pc.is_in(column, _NO_NAME), "", pc.fill_null(column, ""))
        separator = pc.if_else(pc.or_(pc.equal(name, ""), pc.equal(text, "")), "", " > ")
        text = pc.binary_join_element_wise(text, separator, name, "")
    return text


class _Seen:
    """The keys met so far, as sorted runs that are merged when alike in length: 8 bytes a key."""

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def add(self, keys: np.ndarray) -> np.ndarray:
        """Adds keys and tells of each whether it is the first of its kind."""
        distinct, first = np.unique(keys, return_index=True)
        new = np.ones(len(distinct), bool)
        for run in self._runs:
            place = np.minimum(np.searchsorted(run, distinct), len(run) - 1)
            new &= run[place] != distinct
        mask = np.zeros(len(keys), bool)
        mask[first[new]] = True
        if new.any():
            self._runs.append(distinct[new])
        while len(self._runs) > 1 and len(self._runs[-2]) <= 2 * len(self._runs[-1]):
            self._runs[-2:] = [np.sort(np.concatenate(self._runs[-2:]), kind="stable")]
        return mask
