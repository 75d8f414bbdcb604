"""Named tensors in safetensors files at any place: written whole or not at all, read back by size and digest."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llm4msr import storage


def write_tensors(uri: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Writes one file, by way of a temporary one.

    Returns:
        What `read_tensors` checks: {"bytes": size, "sha256": digest}.
    """
    # Beside a local place: the system's temporary folder may be small, or in memory.
    beside = storage.local_path(uri).parent if storage.is_local(uri) else None
    if beside:
        beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=beside) as folder:
        path = Path(folder) / "tensors"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
        written = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        storage.copy(str(path), uri)
    return written


def read_tensors(uri: str, expected: Mapping[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """Reads a file to the CPU.

    Args:
        uri: The file.
        expected: What `write_tensors` returned; None reads without a check of the content.

    Raises:
        StorageError: It is missing, is not what was written, or is not safetensors.
    """
    if storage.is_local(uri):
        return _read(uri, storage.local_path(uri), expected)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tensors"
        try:
            storage.copy(uri, str(path))
        except FileNotFoundError as error:
            raise storage.StorageError(f"{uri}: no such file") from error
        return _read(uri, path, expected)


def _read(uri: str, path: Path, expected: Mapping[str, Any] | None) -> dict[str, torch.Tensor]:
    try:
        if expected is not None:
            if path.stat().st_size != expected["bytes"]:
                raise storage.StorageError(f"{uri}: {path.stat().st_size} bytes, {expected['bytes']} were written")
            if _sha256(path) != expected["sha256"]:
                raise storage.StorageError(f"{uri}: damaged, its content is not what was written (sha256)")
        return load_file(path)
    except FileNotFoundError as error:
        raise storage.StorageError(f"{uri}: no such file") from error
    except SafetensorError as error:
        raise storage.StorageError(f"{uri}: not readable safetensors: {error}") from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
