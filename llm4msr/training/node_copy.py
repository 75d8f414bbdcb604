"""A node's own copy of a checkpoint, laid out so that it can be mapped into memory.

What is large in a checkpoint (weights, feature tables, keys, vectors of the language model) lies in memory once a node
then, in the file system's cache, however many replicas and actors read it. The copy is the node's own because a mapped
file must not change: it lies below ``LLM4MSR_CACHE``, else in a private folder among the temporary files. Whoever comes
first makes it, the others wait; one that nobody has opened for two days goes when the next one is made.

Not shared: what a ranker computes of the vectors of items, and the words of context features.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from llm4msr import storage
from llm4msr.batch import EntityFeatures
from llm4msr.config import digest
from llm4msr.data.prepared import ITEMS_FILE, SCHEMA_FILE, USERS_FILE
from llm4msr.lookup import HashOrder
from llm4msr.schema import FeatureSchema, Source
from llm4msr.training.checkpoint import Checkpoint, assemble, check_manifest

CACHE_VARIABLE = "LLM4MSR_CACHE"
VERSION = 2
KEPT_S = 2 * 24 * 3600
TABLES: dict[Source, str] = {"user": USERS_FILE, "item": ITEMS_FILE}


def map_checkpoint(uri: str) -> Checkpoint:
    """Loads a checkpoint from anywhere by way of this node's copy of it.

    Raises:
        StorageError: It is missing, unfinished or damaged, or there is no room for the copy.
    """
    check_manifest(uri)
    place = node_copy(uri)
    (users, user_order), (items, item_order) = (map_table(place, source) for source in TABLES)
    of_users, of_items = (_map_features(place, source) for source in TABLES)
    orders = {"user": user_order, "item": item_order}
    try:
        mapped = assemble(uri, str(place), users, items, of_users, of_items, mapped=True)
        return replace(mapped, text_orders=orders)
    except storage.StorageError as error:
        raise storage.StorageError(str(error).replace(str(place), uri)) from error


def node_copy(uri: str) -> Path:
    """Returns this node's copy of a checkpoint, made if there is none.

    Raises:
        StorageError: It cannot be read, or not be written.
    """
    uri = storage.absolute(uri)
    sources = {name.removeprefix(f"{uri.rstrip('/')}/"): name for name, _ in storage.list_files(uri)}
    prints = {name: storage.fingerprint(source) for name, source in sources.items()}
    key = digest({"uri": uri, "files": prints, "version": VERSION})
    root = _root()
    place = root / key
    try:
        with _alone(root / f"{key}.lock"):
            if not place.exists():
                _remove_unused(root)
                _make(uri, sources, place)
            os.utime(place)
    except OSError as error:
        if isinstance(error, storage.StorageError):
            raise
        raise storage.StorageError(
            f"{root}: no copy of {uri} can be kept there ({error}): free it, or name another folder with "
            f"{CACHE_VARIABLE}"
        ) from error
    return place


def _root() -> Path:
    given = os.environ.get(CACHE_VARIABLE)
    root = Path(given) if given else Path(tempfile.gettempdir()) / f"llm4msr-{os.getuid()}"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = root.stat().st_uid
    except OSError as error:
        raise storage.StorageError(f"{root}: cannot be made ({error}); name another with {CACHE_VARIABLE}") from error
    if not given and owner != os.getuid():
        raise storage.StorageError(f"{root}: belongs to another user; name another folder with {CACHE_VARIABLE}")
    return root


def _make(uri: str, sources: dict[str, str], place: Path) -> None:
    unfinished = place.with_name(f".{place.name}")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that died
    for name, source in sources.items():
        if name not in TABLES.values():
            storage.copy(source, str(unfinished / name))
    schema = FeatureSchema.from_json(storage.read_json(str(unfinished / SCHEMA_FILE)))
    for source, file in TABLES.items():
        table = write_table(unfinished, source, storage.read_parquet(storage.join(uri, file)))
        features = EntityFeatures.from_table(table, schema, source)
        for name, array in (("ids", features.ids), ("numeric", features.numeric)):
            np.save(unfinished / f"{source}.{name}.npy", array, allow_pickle=False)
        for i, array in enumerate(features.sequences):
            np.save(unfinished / f"{source}.sequence{i}.npy", array, allow_pickle=False)
    unfinished.rename(place)


def write_table(folder: Path, source: Source, table: pa.Table) -> pa.Table:
    """Writes a feature table as it is mapped, and for text ids the order of their hashes.

    Args:
        folder: Of the copy.
        source: Whose table it is.
        table: As prepared; large texts let each column be one array, however many bytes it has.

    Returns:
        The table as it was written.
    """
    fields = [field.with_type(pa.large_string()) if field.type == pa.string() else field for field in table.schema]
    table = table.cast(pa.schema(fields)).combine_chunks()
    with pa.OSFile(str(folder / f"{source}.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
        out.write_table(table)
    if pa.types.is_large_string(table["key"].type):
        order = HashOrder.of(table["key"])
        np.save(folder / f"{source}.hashes.npy", order.hash_N, allow_pickle=False)
        np.save(folder / f"{source}.places.npy", order.place_N, allow_pickle=False)
    return table


def map_table(folder: Path, source: Source) -> tuple[pa.Table, HashOrder | None]:
    """Maps what `write_table` wrote; no order where ids are whole numbers."""
    table = pa.ipc.open_file(pa.memory_map(str(folder / f"{source}.arrow"))).read_all()
    if not (folder / f"{source}.hashes.npy").exists():
        return table, None
    return table, HashOrder(_mapped(folder, source, "hashes"), _mapped(folder, source, "places"))


def _map_features(place: Path, source: str) -> EntityFeatures:
    num_sequences = len(list(place.glob(f"{source}.sequence*.npy")))
    sequences = tuple(_mapped(place, source, f"sequence{i}") for i in range(num_sequences))
    return EntityFeatures(_mapped(place, source, "ids"), _mapped(place, source, "numeric"), sequences)


def _mapped(place: Path, source: str, name: str) -> np.ndarray:
    array: np.ndarray = np.load(place / f"{source}.{name}.npy", mmap_mode="r", allow_pickle=False)
    return array


def _remove_unused(root: Path) -> None:
    """Removes copies that nobody opened lately. Who still has one mapped keeps it until it ends."""
    for path in root.iterdir():
        if path.is_dir() and time.time() - path.stat().st_mtime > KEPT_S:
            shutil.rmtree(path, ignore_errors=True)
            path.with_name(f"{path.name}.lock").unlink(missing_ok=True)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Waits until no other process of this node is in such a block with this file."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
