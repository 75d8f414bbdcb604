"""Reads MovieLens 100K and 1M as published; scenarios are the viewers' age bands.

The two releases hold the same facts in different files, so that one adapter serves both; which one it is, the files
tell. A row's label says whether the rating is at least `MovieLensConfig.positive_rating`. Later releases (10M, 20M,
25M) are left out: they publish no users file, hence no age and no scenario.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llm4msr import storage
from llm4msr.config import DataConfig
from llm4msr.data.columns import join_text, to_time_ms
from llm4msr.data.csv import LINE, Column, ColumnType, read_csv
from llm4msr.data.source import Block, DataError, RawFeature, Shard
from llm4msr.data.tabular import DUPLICATE_KEY, NOT_A_TIME, BlockBuilder, first_seen
from llm4msr.schema import KeyType, Scenario, Source

RATING_OUT_OF_RANGE = "rating out of range"
UNKNOWN_USER = "unknown user"
AGE_OUT_OF_RANGE = "age out of range"

logger = logging.getLogger(__name__)

_ENCODING = "latin-1"
_MAX_AGE = 130
_NO_GENRE = "unknown"
_YEAR_IN_TITLE = r"\((?P<year>[0-9]{4})\)\s*$"
_YEAR_IN_DATE = r"-(?P<year>[0-9]{4})$"
_GENDERS = {"M": "male", "F": "female"}


@dataclass(frozen=True)
class _Release:
    """One release's files; `columns` are the names of the cells of a line, in order."""

    name: str
    files: dict[str, str]
    delimiters: dict[str, str]
    columns: dict[str, tuple[str, ...]]


_RATING = ("user", "item", "rating", "timestamp")
_100K = _Release(
    "100K",
    {"events": "u.data", "users": "u.user", "items": "u.item", "genres": "u.genre"},
    {"events": "\t", "users": "|", "items": "|", "genres": "|"},
    {
        "events": _RATING,
        "users": ("user", "age", "gender", "occupation", "zip"),
        "items": ("item", "title", "release_date", "video_date", "url"),  # then one 0/1 column per genre
        "genres": ("genre", "index"),
    },
)
_1M = _Release(
    "1M",
    {"events": "ratings.dat", "users": "users.dat", "items": "movies.dat"},
    {"events": "::", "users": "::", "items": "::"},
    {
        "events": _RATING,
        "users": ("user", "gender", "age", "occupation", "zip"),
        "items": ("item", "title", "genres"),
    },
)
# 1M publishes age groups by their first year and occupations by number.
_1M_AGES = {
    1: "under 18 years old",
    18: "18-24 years old",
    25: "25-34 years old",
    35: "35-44 years old",
    45: "45-49 years old",
    50: "50-55 years old",
    56: "56 or more years old",
}
_1M_OCCUPATIONS = (
    "other",
    "academic/educator",
    "artist",
    "clerical/admin",
    "college/grad student",
    "customer service",
    "doctor/health care",
    "executive/managerial",
    "farmer",
    "homemaker",
    "K-12 student",
    "lawyer",
    "programmer",
    "retired",
    "sales/marketing",
    "scientist",
    "self-employed",
    "technician/engineer",
    "tradesman/craftsman",
    "unemployed",
    "writer",
)


class MovieLensAdapter:
    """Reads a folder with the files of MovieLens 100K or 1M.

    Args:
        config: ``data`` section with kind = movielens.

    Raises:
        DataError: The age bands do not rise.
    """

    user_key_type: KeyType = "int64"
    item_key_type: KeyType = "int64"
    features = (
        RawFeature("gender", "user", "categorical"),
        RawFeature("occupation", "user", "categorical"),
        RawFeature("zip_region", "user", "categorical"),
        RawFeature("age", "user", "numeric"),
        RawFeature("genres", "item", "sequence", max_length=6),
        RawFeature("release_year", "item", "numeric"),
    )

    def __init__(self, config: DataConfig) -> None:
        assert config.raw_uri is not None, "the configuration asks for raw_uri"
        self._raw_uri = storage.absolute(config.raw_uri)
        self._positive_rating = config.movielens.positive_rating
        self._bands = config.movielens.age_bands
        if list(self._bands) != sorted(set(self._bands)) or any(not 1 < age <= _MAX_AGE for age in self._bands):
            raise DataError(
                f"data.movielens.age_bands = {list(self._bands)}: first ages must rise and lie in 2..{_MAX_AGE},"
                " such as [25, 35]"
            )
        self.scenarios: tuple[Scenario, ...] = _scenarios(self._bands)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what was read of the files."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_release", "_user_bands")}

    def shards(self) -> list[Shard]:
        """Lists the files; see `Adapter.shards`. The list of genres of 100K has the role "genres"."""
        shards = []
        for role in self._release.files:
            ((uri, size),) = storage.list_files(self._uri(role))
            shards.append(Shard(uri, role, size))
        return shards

    def is_events(self, shard: Shard) -> bool:
        """Tells whether a shard holds ratings."""
        return shard.role == "events"

    def parse_events(self, shard: Shard) -> Iterator[Block]:
        """Parses the ratings; who is not in the users file has no age, hence no scenario."""
        users, bands = self._user_bands
        types: dict[str, ColumnType] = {"user": "int64", "item": "int64", "rating": "float64", "timestamp": "int64"}
        for block in self._read("events", shard.uri, [Column(name, kind) for name, kind in types.items()]):
            raw, rows = block.table.combine_chunks(), BlockBuilder(block, shard.uri)
            rating = raw["rating"].to_numpy()
            rows.reject((rating < 1) | (rating > 5), RATING_OUT_OF_RANGE, "rating")
            scenario = bands.take(pc.index_in(raw["user"].combine_chunks(), users))
            rows.require(scenario, "user", UNKNOWN_USER)
            rows.add("user_id", raw["user"])
            rows.add("item_id", raw["item"])
            rows.add("scenario", scenario)
            rows.add("label", pa.array((rating >= self._positive_rating).astype(np.int8)))
            times, bad = to_time_ms(raw["timestamp"], "s", "UTC")
            rows.reject(bad, NOT_A_TIME, "timestamp")
            rows.add("timestamp_ms", times)
            rows.add("position", raw[LINE])
            rows.add("split", pa.nulls(len(raw), pa.int8()))
            yield rows.build()

    def parse_entities(self, source: Source) -> Iterator[Block]:
        """Parses the users or the movies; of rows with the same key the first one stays."""
        role = {"user": "users", "item": "items"}[source]
        uri = self._uri(role)
        seen: set[Hashable] = set()
        genres = self._genres() if (role, self._release) == ("items", _100K) else ()
        columns = {"users": _USER_COLUMNS, "items": _item_columns(self._release, len(genres))}[role]
        for block in self._read(role, uri, columns, len(genres)):
            raw, rows = block.table.combine_chunks(), BlockBuilder(block, uri)
            key = raw[source].combine_chunks()
            if source == "user":
                age = raw["age"].to_numpy()
                rows.reject((age < 1) | (age > _MAX_AGE), AGE_OUT_OF_RANGE, "age")
            good = rows.good
            good[good] = ~first_seen(key.filter(pa.array(good)).to_pylist(), seen)
            rows.reject(good, DUPLICATE_KEY, source)
            rows.add("key", key)
            parsed = _users(raw, self._release) if source == "user" else _movies(raw, genres)
            for name, values in parsed.items():
                rows.add(name, values)
            yield rows.build()

    def merge(self, events: pa.Table) -> pa.Table:
        """Returns the rows as they are: each rating is an event of its own."""
        return events

    def negative_pools(self) -> None:
        """Returns None: this layout has negatives of its own."""

    @cached_property
    def _release(self) -> _Release:
        there = [uri.rsplit("/", 1)[-1] for uri, _ in storage.list_files(self._raw_uri)]
        complete = [release for release in (_100K, _1M) if set(release.files.values()) <= set(there)]
        if len(complete) == 1:
            return complete[0]
        problem = "holds both releases of MovieLens" if complete else "holds no complete release of MovieLens"
        raise DataError(
            f"{self._raw_uri} {problem}: needed are {list(_100K.files.values())} (100K) or "
            f"{list(_1M.files.values())} (1M); found {sorted(there)[:40]}"
        )

    @cached_property
    def _user_bands(self) -> tuple[pa.Array, pa.Array]:
        """User ids and, in the same order, their scenario indices."""
        users = pa.concat_tables([block.table.select(["key", "age"]) for block in self.parse_entities("user")])
        if self._release is _1M and not set(self._bands) <= set(_1M_AGES):
            logger.warning(
                "%s: age_bands %s cut through age groups of the 1M release, which count as their first year: %s",
                self._raw_uri,
                list(self._bands),
                list(_1M_AGES),
            )
        bands = np.searchsorted(np.array(self._bands), users["age"].to_numpy(), side="right")
        return users["key"].combine_chunks(), pa.array(bands, pa.int32())

    def _uri(self, role: str) -> str:
        return storage.join(self._raw_uri, self._release.files[role])

    def _read(self, role: str, uri: str, columns: list[Column], num_genres: int = 0) -> Iterator[Block]:
        header = [*self._release.columns[role], *(f"genre_{i}" for i in range(num_genres))]
        delimiter = self._release.delimiters[role]
        return read_csv(uri, columns, delimiter=delimiter, quoting=False, header=header, encoding=_ENCODING)

    def _genres(self) -> tuple[str, ...]:
        """Names of the genre columns of 100K's movies, in order.

        Raises:
            DataError: The numbers beside the names are not 0, 1, 2, ...
        """
        uri = self._uri("genres")
        blocks = list(self._read("genres", uri, [Column("genre", "string"), Column("index", "int64")]))
        table = pa.concat_tables([block.table for block in blocks]).sort_by("index")
        index = table["index"].to_pylist()
        if not index or index != list(range(len(index))) or any(len(block.rejects) for block in blocks):
            raise DataError(f"{uri}: expected one line 'name|number' for each of 0, 1, 2, ...; found numbers {index}")
        return tuple(table["genre"].to_pylist())


_USER_COLUMNS = [
    Column("user", "int64"),
    Column("age", "int64"),
    Column("gender", "string", nullable=True),
    Column("occupation", "string", nullable=True),
    Column("zip", "string", nullable=True),
]


def _item_columns(release: _Release, num_genres: int) -> list[Column]:
    columns = [Column("item", "int64"), Column("title", "string", nullable=True)]
    if release is _1M:
        return [*columns, Column("genres", "string", nullable=True)]
    columns.append(Column("release_date", "string", nullable=True))
    return columns + [Column(f"genre_{i}", "int64") for i in range(num_genres)]


def _scenarios(bands: tuple[int, ...]) -> tuple[Scenario, ...]:
    if not bands:
        return (Scenario("all-ages", "Movies rated by viewers of any age."),)
    scenarios = [Scenario(f"under-{bands[0]}", f"Movies rated by viewers younger than {bands[0]}.")]
    for first, end in pairwise(bands):
        scenarios.append(Scenario(f"{first}-{end - 1}", f"Movies rated by viewers aged {first} to {end - 1}."))
    scenarios.append(Scenario(f"{bands[-1]}-plus", f"Movies rated by viewers aged {bands[-1]} or older."))
    return tuple(scenarios)


def _users(raw: pa.Table, release: _Release) -> dict[str, pa.Array | pa.ChunkedArray]:
    age, gender, occupation = raw["age"], raw["gender"], raw["occupation"]
    told = pc.binary_join_element_wise(age.cast(pa.string()), "years old", " ")
    if release is _1M:
        codes = [str(code) for code in range(len(_1M_OCCUPATIONS))]
        occupation = _translate(occupation, dict(zip(codes, _1M_OCCUPATIONS, strict=True)))
        groups = {str(age): text for age, text in _1M_AGES.items()}
        told = pc.coalesce(_translate(age.cast(pa.string()), groups, keep=False), told)
    words = [told, _translate(gender, _GENDERS, keep=False), occupation]
    return {
        "text": join_text(words, ", "),
        "gender": gender,
        "occupation": occupation,
        "zip_region": pc.utf8_slice_codeunits(raw["zip"], 0, 1),
        "age": age.cast(pa.float64()),
    }


def _movies(raw: pa.Table, genre_names: tuple[str, ...]) -> dict[str, pa.Array | pa.ChunkedArray]:
    title = raw["title"]
    if genre_names:
        flags = np.column_stack([raw[f"genre_{i}"].to_numpy() for i in range(len(genre_names))])
        row, genre = np.nonzero((flags == 1) & (np.array(genre_names) != _NO_GENRE))
        offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(raw)))])
        genres = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(genre_names).take(pa.array(genre)))
        year = pc.extract_regex(raw["release_date"], _YEAR_IN_DATE)
    else:
        genres = pc.split_pattern(raw["genres"].combine_chunks(), "|")
        year = pc.extract_regex(title, _YEAR_IN_TITLE)
    listed = pc.binary_join(genres, ", ")
    listed = pc.if_else(pc.equal(listed, ""), None, listed)
    return {
        "text": join_text([title, listed], ": "),
        "genres": genres,
        "release_year": pc.struct_field(year, "year").cast(pa.float64()),
    }


def _translate(text: pa.ChunkedArray, names: dict[str, str], keep: bool = True) -> pa.ChunkedArray:
    """Replaces known values; others are kept, or null."""
    known = pa.array(list(names.values())).take(pc.index_in(text, pa.array(list(names))))
    return pc.coalesce(known, text) if keep else known
