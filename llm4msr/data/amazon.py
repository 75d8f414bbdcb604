"""Reads Amazon's product reviews as published by category; each category is a scenario.

A label says whether the rating is at least `AmazonConfig.positive_rating`. Users are shared by all categories: the same
reviewerID is the same user. What is read is in the files of 2018 and of 2014 alike: of a review reviewerID, asin,
overall and unixReviewTime; of a product's metadata, where there are any, asin, title, brand, price and its categories
(``category``, in 2014 ``categories``, a list of lists). The times are whole days, so the order of a user's reviews of
one day is that of the file.

Records that repeat another byte for byte, as the published files hold many, count once; a review that was copied to
another size or colour of the product differs in ``style`` and is an event of its own. The number dropped is
``merged_rows`` in the manifest for reviews, and logged for metadata.

All metadata are of the day of the crawl. What says what a product is stays (title, brand, categories, price), though a
price may have been another one when the review was written. What is made of how products sold is left out (ranks, and
related products: also bought, also viewed), as it counts the very purchases that are to be predicted.

Also left out: all that the reviewer wrote or that followed from it (text, summary, votes, images, verified, style),
which was not known when the product was shown; descriptions; and the release of 2023, which has other fields.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llm4msr import storage
from llm4msr.config import DataConfig
from llm4msr.data.amazon_text import clean_brand, clean_categories, clean_text, parse_price
from llm4msr.data.columns import join_text, to_key, to_time_ms, to_words
from llm4msr.data.csv import LINE, MISSING_VALUE, RAW
from llm4msr.data.json_records import Field, object_keys, read_json
from llm4msr.data.source import Block, DataError, RawFeature, Shard
from llm4msr.data.tabular import DUPLICATE_KEY, NOT_A_TIME, BlockBuilder, nearest
from llm4msr.schema import KeyType, Scenario, Source, events_schema

RATING_OUT_OF_RANGE = "rating out of range"
MISSING_KEY = "missing key"
SUFFIXES = (".json", ".json.gz")

logger = logging.getLogger(__name__)

_TEXTS = pa.list_(pa.string())
_REVIEW = (
    Field("reviewerID", pa.string()),
    Field("asin", pa.string()),
    Field("overall", pa.float64()),
    Field("unixReviewTime", pa.int64()),
)
_PRODUCT = (
    Field("asin", pa.string()),
    Field("title", pa.string()),
    Field("brand", pa.string()),
    Field("price", pa.string(), from_number=True),
    Field("category", _TEXTS),
    Field("categories", pa.list_(_TEXTS)),
)
_EVENTS = events_schema("string", "string")
# What `merge` tells equal records by, beside the columns of events.
_RECORD_KEY = "record_key"
# position = (place of the file << this) + line.
_LINE_BITS = 40


class AmazonAdapter:
    """Reads review files, one or a folder of shards for each category, below ``data.raw_uri``.

    Args:
        config: ``data`` section with kind = amazon.

    Raises:
        DataError: No category is named.
    """

    user_key_type: KeyType = "string"
    item_key_type: KeyType = "string"

    def __init__(self, config: DataConfig) -> None:
        assert config.raw_uri is not None, "the configuration asks for raw_uri"
        self._raw_uri, self._amazon = storage.absolute(config.raw_uri), config.amazon
        if not self._amazon.categories:
            raise DataError(
                "data.amazon.categories names no category: give each a name and its review file below data.raw_uri, "
                "such as beauty = 'All_Beauty_5.json.gz'"
            )
        given = self._amazon.scenario_descriptions
        self.scenarios: tuple[Scenario, ...] = tuple(
            Scenario(name, given.get(name, f"Products of the category named {name}."))
            for name in config.amazon.categories
        )
        self.features: tuple[RawFeature, ...] = ()
        if self._amazon.metadata:
            self.features = (
                RawFeature("title", "item", "sequence", max_length=self._amazon.max_title_words),
                RawFeature("categories", "item", "sequence", max_length=self._amazon.max_categories),
                RawFeature("brand", "item", "categorical"),
                RawFeature("log_price", "item", "numeric"),
            )

    def shards(self) -> list[Shard]:
        """Lists the files and looks at the first records of each; see `Adapter.shards`."""
        for shard, _ in self._shards:
            _check_fields(shard)
        return [shard for shard, _ in self._shards]

    def is_events(self, shard: Shard) -> bool:
        """Tells whether a shard holds reviews."""
        return shard.role == "reviews"

    def parse_events(self, shard: Shard) -> Iterator[Block]:
        """Parses one file of reviews; tables also carry what `merge` tells equal records by."""
        place, scenario = next((i, s) for i, (other, s) in enumerate(self._shards) if other.uri == shard.uri)
        for block in read_json(shard.uri, _REVIEW):
            raw, rows = block.table.combine_chunks(), BlockBuilder(block, shard.uri)
            for name, field in (("user_id", "reviewerID"), ("item_id", "asin")):
                keys = to_key(raw[field], "string")
                rows.require(keys, field, MISSING_KEY)
                rows.add(name, keys)
            rating = raw["overall"].combine_chunks()
            rows.require(rating, "overall", MISSING_VALUE)
            rating = pc.fill_null(rating, np.nan).to_numpy(zero_copy_only=False)
            rows.reject(~((rating >= 1) & (rating <= 5)), RATING_OUT_OF_RANGE, "overall")
            times, bad = to_time_ms(raw["unixReviewTime"], "s", "UTC")
            rows.reject(bad, NOT_A_TIME, "unixReviewTime")
            rows.require(times, "unixReviewTime")
            rows.add("scenario", pa.repeat(pa.scalar(scenario, pa.int32()), len(raw)))
            rows.add("label", pa.array((rating >= self._amazon.positive_rating).astype(np.int8)))
            rows.add("timestamp_ms", times)
            rows.add("position", pc.add(raw[LINE], place << _LINE_BITS))
            rows.add("split", pa.nulls(len(raw), pa.int8()))
            rows.add(_RECORD_KEY, pa.array(object_keys(raw[RAW])))
            yield rows.build()

    def parse_entities(self, source: Source) -> Iterator[Block]:
        """Parses the metadata; users have none. Of records with the same asin the first one stays."""
        if source == "user":
            return
        kept: dict[str, int] = {}
        for shard, _ in self._shards:
            if shard.role != "metadata":
                continue
            num_repeated = 0
            for block in read_json(shard.uri, _PRODUCT):
                raw, rows = block.table.combine_chunks(), BlockBuilder(block, shard.uri)
                key = to_key(raw["asin"], "string")
                rows.require(key, "asin", MISSING_KEY)
                asins, records = key.to_pylist(), object_keys(raw[RAW]).tolist()
                known, repeated = np.zeros((2, len(raw)), bool)
                for row in np.flatnonzero(rows.good):
                    first = kept.get(asins[row])
                    if first is None:
                        kept[asins[row]] = records[row]
                    else:
                        known[row], repeated[row] = True, first == records[row]
                num_repeated += int(repeated.sum())
                rows.reject(known & ~repeated, DUPLICATE_KEY, "asin")
                rows.drop(repeated)
                rows.add("key", key)
                for name, values in _products(raw).items():
                    rows.add(name, values)
                yield rows.build()
            if num_repeated:
                logger.info("%s: dropped %d records that repeat another exactly", shard.uri, num_repeated)

    def merge(self, events: pa.Table) -> pa.Table:
        """Drops the reviews that repeat another one exactly; the first position is kept.

        Args:
            events: All rows of some users, as parsed.

        Returns:
            Rows as `schema.events_schema`.
        """
        keys = [name for name in events.column_names if name != "position"]
        distinct = events.group_by(keys, use_threads=False).aggregate([("position", "min")])
        names = ["position" if name == "position_min" else name for name in distinct.column_names]
        return distinct.rename_columns(names).select(_EVENTS.names)

    def negative_pools(self) -> None:
        """Returns None: this layout has negatives of its own."""

    @cached_property
    def _shards(self) -> tuple[tuple[Shard, int], ...]:
        """The files, reviews first, each with the index of its scenario."""
        found: list[tuple[Shard, int]] = []
        index = {scenario.name: i for i, scenario in enumerate(self.scenarios)}
        for role, setting, names in (
            ("reviews", "categories", self._amazon.categories),
            ("metadata", "metadata", self._amazon.metadata),
        ):
            for scenario, name in names.items():
                for uri, size in self._find(name, f"data.amazon.{setting}.{scenario} = {name!r}"):
                    for other in (other for shard, other in found if shard.uri == uri):
                        first = self.scenarios[other].name
                        raise DataError(f"{uri}: is the file of {first!r} and of {scenario!r}; each needs its own")
                    found.append((Shard(uri, role, size), index[scenario]))
        return tuple(found)

    def _find(self, name: str, setting: str) -> list[tuple[str, int]]:
        """Returns the file of that name, with or without its suffix, or the files of the folder of that name."""
        uri = storage.join(self._raw_uri, name)
        found = [files for suffix in ("", *SUFFIXES) if (files := storage.list_files(uri + suffix, SUFFIXES))]
        if len(found) == 1:
            return found[0]
        if found:
            both = [path for files in found for path, _ in files]
            raise DataError(f"{setting}: {both} are there; name one of them, or move the others away")
        prefix = len(self._raw_uri.rstrip("/")) + 1
        there = [path[prefix:] for path, _ in storage.list_files(self._raw_uri, SUFFIXES)]
        raise DataError(
            f"{uri}: no {', '.join(SUFFIXES)} file and no folder of such files there ({setting}); "
            f"{self._raw_uri} holds {there[:40]}.{nearest(name, there)}"
        )


def _check_fields(shard: Shard) -> None:
    """Looks at the first sound record of a file.

    Raises:
        DataError: It lacks a field that every record has.
    """
    fields, needed = {"reviews": (_REVIEW, 4), "metadata": (_PRODUCT, 1)}[shard.role]
    for block in read_json(shard.uri, fields, block_bytes=1 << 16):
        if len(block.table):
            row = block.table.slice(0, 1).to_pylist()[0]
            if missing := [field.name for field in fields[:needed] if row[field.name] is None]:
                begin = row[RAW][:200]
                raise DataError(
                    f"{shard.uri}:{row[LINE]}: no field {missing[0]!r} in a record of {shard.role}: {begin}"
                )
            return
        if len(block.rejects):
            return  # told in full when the file is parsed


def _products(raw: pa.Table) -> dict[str, pa.Array | pa.ChunkedArray]:
    """Returns text, title words, categories, brand and log_price."""
    titles = pa.array([clean_text(title) for title in raw["title"].to_pylist()], pa.string())
    brands = pa.array([clean_brand(brand) for brand in raw["brand"].to_pylist()], pa.string())
    lists = zip(raw["category"].to_pylist(), raw["categories"].to_pylist(), strict=True)
    categories = pa.array(
        [clean_categories(flat or [name for path in nested or () for name in path or ()]) for flat, nested in lists],
        _TEXTS,
    )
    prices = np.array([parse_price(price) for price in raw["price"].to_pylist()], np.float64)
    listed = pc.binary_join(categories, ", ")
    listed = pc.if_else(pc.equal(listed, ""), None, listed)
    named = join_text([titles, brands], ", by ")
    named = pc.if_else(pc.equal(named, ""), None, named)
    return {
        "text": join_text([named, listed], ": "),
        "title": to_words(pa.chunked_array([titles])),
        "categories": categories,
        "brand": brands,
        "log_price": pa.array(np.log1p(prices), from_pandas=True),
    }
