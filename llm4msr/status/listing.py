"""Listings with times, of any file system: what a place's last write is known from.

A store is asked again, and its refusal told, as by the verbs of `llm4msr.storage`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from llm4msr import storage


@dataclass(frozen=True)
class Entry:
    """A file or folder in a listing.

    Attributes:
        is_folder: On an object store, whether names go on after it.
        time: Of its last write, in seconds since 1970; 0 where the store has none, as of folders.
    """

    is_folder: bool
    time: float


def list_folder(uri: str) -> dict[str, Entry]:
    """Lists one folder by name, hidden files too (a write under way is a write); empty where nothing is there."""
    fs, path = storage.filesystem(uri)
    try:
        with storage.told(uri, "listed"):
            found = fs.ls(path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    names = [(info["name"].rstrip("/").rsplit("/", 1)[-1], info) for info in found]
    return {name: Entry(info["type"] == "directory", _time(info)) for name, info in names if name}


def list_tree(uri: str) -> dict[str, float]:
    """Lists all files below a folder: their times by their names below it; empty where nothing is there."""
    fs, path = storage.filesystem(uri)
    root = path.rstrip("/") + "/"
    with storage.told(uri, "listed"):
        found = fs.find(path, detail=True)
    return {name.removeprefix(root): _time(info) for name, info in found.items()}


def _time(info: dict[str, Any]) -> float:
    """Returns the time of a file: each store's client has its own name and type for it."""
    found = next((info[key] for key in ("mtime", "LastModified", "updated") if info.get(key) is not None), 0.0)
    if isinstance(found, str):
        found = datetime.fromisoformat(found)
    return found.timestamp() if isinstance(found, datetime) else float(found)
