"""A finished extraction, opened to be looked into: its manifest, table, prompts and the data and store behind it.

Training and serving need the vectors alone, by `llm4msr.knowledge.place.knowledge_uri` and `KnowledgeTable`; this is
for people's questions, and so needs no configuration, only the workspace.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from llm4msr import storage, workspace
from llm4msr.data.prepared import ITEMS_FILE, USERS_FILE, PreparedData
from llm4msr.knowledge import place
from llm4msr.knowledge.prompts import Level
from llm4msr.knowledge.store import KnowledgeStore
from llm4msr.knowledge.table import KnowledgeTable
from llm4msr.settings import config_from_dict

_READ_THREADS = 16
_ENTITY_FILES = {"user": USERS_FILE, "item": ITEMS_FILE}


@dataclass(frozen=True)
class Extraction:
    """A finished knowledge directory and what it refers to.

    Attributes:
        uri: The directory.
        manifest: As the extraction wrote it.
        chosen: Why this one.
        prepared: The data it was extracted from.
        table: Its vectors.
        store: Where the vectors came from, with the texts and counts.
    """

    uri: str
    manifest: dict[str, Any]
    chosen: str
    prepared: PreparedData
    table: KnowledgeTable
    store: KnowledgeStore

    @classmethod
    def open(cls, workspace_uri: str, name: str | None = None) -> Extraction:
        """Opens the knowledge of a workspace.

        Args:
            workspace_uri: The workspace, local or s3://.
            name: Of the directory; None for the newest finished one.

        Raises:
            StorageError: There is no finished knowledge, none of this name, or a part of it is missing.
        """
        config = config_from_dict({"workspace_uri": workspace_uri})
        root = workspace.knowledge_root(config)
        finished = _finished(root)
        if not finished:
            raise storage.StorageError(f"{root} holds no finished knowledge: run jobs.extract first")
        if name is not None and name not in finished:
            raise storage.StorageError(
                f"{root} holds no finished knowledge {name!r}; there is "
                + ", ".join(f"{other} of {manifest['created_at']}" for other, manifest in finished.items())
            )
        chosen = "as asked" if name else f"the newest of {len(finished)}" if len(finished) > 1 else "the only one"
        name = name or next(iter(finished))
        uri, manifest = storage.join(root, name), finished[name]
        return cls(
            uri,
            manifest,
            chosen,
            PreparedData.open(storage.join(workspace.prepared_root(config), manifest["prepared"])),
            KnowledgeTable.load(uri),
            KnowledgeStore(place.store_root(config), manifest["encoder"]),
        )

    def entities(self, level: Level, columns: Sequence[str]) -> pa.Table:
        """Returns columns of the users' or items' feature table; record i is table row i + 1."""
        return storage.read_parquet(storage.join(self.prepared.uri, _ENTITY_FILES[level]), columns)

    def prompts(self, level: Level, rows: Sequence[int], columns: Sequence[str]) -> dict[int, pa.Table]:
        """Returns the prompts of some subjects as tables of one record, by subject_row; those without are left out.

        The subject_row of every file of the level is read, and the columns of the files that hold one of them.
        """
        root = storage.join(self.uri, place.PROMPTS_DIRECTORY)
        files = storage.read_manifest(root, "run jobs.extract again")["files"]
        uris = [storage.join(root, file["file"]) for file in files if file["level"] == level]

        def find(uri: str) -> tuple[np.ndarray, np.ndarray]:
            row_N = storage.read_parquet(uri, ["subject_row"])["subject_row"].to_numpy()
            record_M = np.flatnonzero(np.isin(row_N, rows))
            return record_M, row_N[record_M]

        found: dict[int, pa.Table] = {}
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            for uri, (record_M, row_M) in zip(uris, pool.map(find, uris), strict=True):
                if len(record_M):
                    table = storage.read_parquet(uri, columns).take(record_M)
                    found |= {row: table.slice(at, 1) for at, row in enumerate(row_M.tolist())}
        return found


def _finished(root: str) -> dict[str, dict[str, Any]]:
    """Returns the manifest of each finished knowledge directory by its name, newest first."""
    if not storage.exists(root):
        return {}
    fs, path = storage.filesystem(root)
    with storage.told(root, "listed"):
        entries = fs.ls(path, detail=True)
    names = [entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry["type"] == "directory"]
    manifests = {
        name: storage.read_json(storage.join(root, name, storage.MANIFEST))
        for name in sorted(names)
        if storage.is_finished(storage.join(root, name))
    }
    found = [(name, manifest) for name, manifest in manifests.items() if manifest.get("kind") == "knowledge"]
    return dict(sorted(found, key=lambda entry: entry[1]["created_at"], reverse=True))
