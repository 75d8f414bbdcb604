"""Named candidate sets: lists of items that a request names instead of sending them."""

from __future__ import annotations

from collections.abc import Mapping

from llm4msr import storage
from llm4msr.config import ConfigError
from llm4msr.request import Key


def read_candidate_sets(uris: Mapping[str, str], max_candidates: int) -> dict[str, list[Key]]:
    """Reads the sets.

    Args:
        uris: By name, a JSON file with a list of raw item ids, local or s3://.
        max_candidates: Most items of a set.

    Raises:
        ConfigError: A file is missing or not a list of distinct ids of one kind, or it is too long.
    """
    return {name: _read(f"candidate_sets.{name}", uri, max_candidates) for name, uri in uris.items()}


def _read(key: str, uri: str, max_candidates: int) -> list[Key]:
    try:
        items = storage.read_json(storage.absolute(uri))
    except storage.StorageError as error:
        raise ConfigError(f"{key}: {error}") from error
    if not isinstance(items, list) or not items or type(items[0]) not in (int, str):
        raise ConfigError(f"{key}: {uri}: a JSON list of item ids is needed, text or whole numbers")
    for place, item in enumerate(items):
        if type(item) is not type(items[0]):
            raise ConfigError(f"{key}: {uri}: item {place} is {item!r}, item 0 {items[0]!r}: ids are of one kind")
    if len(items) > max_candidates:
        raise ConfigError(f"{key}: {uri}: {len(items)} items; max_candidates is {max_candidates}")
    if len(set(items)) < len(items):
        raise ConfigError(f"{key}: {uri}: {len(items) - len(set(items))} items are there more than once")
    return items
