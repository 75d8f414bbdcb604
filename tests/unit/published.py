"""Small archives and data sets as somebody might publish them."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from file_server import FileServer

from llm4msr.data.catalogue import DataSet, RemoteFile
from llm4msr.data.http import Patience

QUICK = Patience(attempts=4, first_wait_s=0.001, timeout_s=5)
DATA = np.random.default_rng(0).bytes(1_000_000)


def zipped(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def tarred(*members: tarfile.TarInfo | tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for member in members:
            if isinstance(member, tuple):
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
            else:
                archive.addfile(member)
    return out.getvalue()


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def data_set(server: FileServer, name: str, data: bytes, **known) -> DataSet:
    server.files[f"/{name}"] = data
    return DataSet("tiny", (RemoteFile(f"{server.url}/{name}", **known),), "free", "http://home", "raw")
