"""Archives that try to get out, that lie, and that are damaged."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Iterator

import pytest
from file_server import FileServer, serving
from published import DATA, QUICK, data_set, tarred, tree, zipped

from llm4msr.data import download as engine
from llm4msr.data.archives import ArchiveError, Limits, unpack


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving() as files:
        yield files


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def sparse(name: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.pax_headers = 1, {"GNU.sparse.map": "0,1", "GNU.sparse.size": "1000"}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(b"1"))
    return out.getvalue()


def zip_link() -> bytes:
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(info, "/etc/passwd")
    return out.getvalue()


def encrypted() -> bytes:
    data = bytearray(zipped({"a": b"1"}))
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    return bytes(data)


ESCAPES = ("../out", "a/../../out", "/out", "//out", "C:/out", "..\\out", "a\\..\\..\\out", "a//b", "x\ny")
HOSTILE = {f"zip {name!r}": ("zip", zipped({"a": b"1", name: b"2"}), "is no path inside") for name in ESCAPES}
HOSTILE |= {f"tar {name!r}": ("tar.gz", tarred((name, b"2")), "is no path inside") for name in ESCAPES}
HOSTILE |= {
    "zip zero byte": ("zip", zipped({"bXc": b"1"}).replace(b"bXc", b"b\0c"), "is no path inside"),
    "zip link": ("zip", zip_link(), "'link' is a link; only plain files are unpacked"),
    "zip encrypted": ("zip", encrypted(), "'a' is encrypted"),
    "zip bomb": ("zip", zipped({"a": bytes(10**7)}), "unpacks to more than"),
    "zip twice": ("zip", zipped({"a": b"1", "A": b"2"}), "'A' is in it twice"),
    "zip manifest": ("zip", zipped({"manifest.json": b"{}"}), "would stand where a finished download is marked"),
    "zip cut": ("zip", zipped({"a": DATA})[:5000], "cannot be unpacked"),
    "zip bytes": ("zip", zipped({"a": DATA}).replace(DATA[500:600], bytes(100)), "cannot be unpacked: Bad CRC"),
    "tar symbolic link": ("tar.gz", tarred(link("a", "/etc/passwd", tarfile.SYMTYPE)), "'a' is a link"),
    "tar hard link": ("tar.gz", tarred(("b", b"1"), link("a", "b", tarfile.LNKTYPE)), "'a' is a link"),
    "tar device": ("tar.gz", tarred(link("a", "", tarfile.CHRTYPE)), "'a' is a special file"),
    "tar pipe": ("tar.gz", tarred(link("a", "", tarfile.FIFOTYPE)), "'a' is a special file"),
    "tar holes": ("tar.gz", sparse("a"), "'a' is a file with holes"),
    "tar bomb": ("tar.gz", tarred(("a", bytes(10**7))), "unpacks to more than"),
    "tar manifest": ("tar.gz", tarred(("./manifest.json", b"{}")), "would stand where"),
    "tar cut": ("tar.gz", tarred(("a", DATA))[:500_000], "cannot be unpacked"),
    "tar none": ("tar.gz", b"not a tar", "cannot be unpacked"),
    "zip none": ("zip", b"not a zip", "cannot be unpacked"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_and_damaged_archives_leave_nothing(server, tmp_path, case):
    suffix, data, message = HOSTILE[case]
    tiny = data_set(server, f"t.{suffix}", data, sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(ArchiveError, match=f"t.{suffix}: .*{message}".replace("(", r"\(")):
        engine.download(tiny, str(tmp_path / "deep" / "to"), patience=QUICK)
    assert tree(tmp_path) == {f"deep/to/tiny/.download/t.{suffix}": data}
    unverified = data_set(server, f"t.{suffix}", data)
    with pytest.raises(ArchiveError):
        engine.download(unverified, str(tmp_path / "deep" / "to"), patience=QUICK)
    assert tree(tmp_path) == {}  # it is fetched anew next time


@pytest.mark.parametrize("size", [10, 2000])
def test_a_size_that_lies_is_found_out(tmp_path, size):
    data = bytearray(zipped({"a": bytes(1000)}))
    for marker, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = data.index(marker) + offset
        data[at : at + 4] = size.to_bytes(4, "little")
    (tmp_path / "t.zip").write_bytes(data)
    with pytest.raises(ArchiveError):
        list(unpack(tmp_path / "t.zip", str(tmp_path / "to")))
    assert not [p for p in tree(tmp_path) if p.startswith("to/")]


def test_limits_and_good_archives(tmp_path):
    (tmp_path / "t.tar.gz").write_bytes(tarred(("./d/a", b"12"), ("d/b", b"345"), ("d/.hidden", b"")))
    for limits in (Limits(max_bytes=4), Limits(max_files=1), Limits(max_ratio=0.01)):
        with pytest.raises(ArchiveError, match="unpacks to more than"):
            list(unpack(tmp_path / "t.tar.gz", str(tmp_path / "to"), limits))
    target = str(tmp_path / "good")
    assert dict(unpack(tmp_path / "t.tar.gz", target, Limits(5, 100, 2))) == {"d/a": 2, "d/b": 3}
    assert tree(tmp_path / "good") == {"d/a": b"12", "d/b": b"345"}
