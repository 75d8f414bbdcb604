"""Archives that try to get out, that lie, and that are damaged."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import tracemalloc
import zipfile
from collections.abc import Iterator

import pytest
from file_server import FileServer, serving
from published import DATA, QUICK, data_set, tarred, tree, zipped

from llm4msr.data import download as engine
from llm4msr.data.archives import ArchiveError, Limits, unpack
from llm4msr.data.http import DownloadError


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


def damaged(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def stored(member: tuple[str, bytes]) -> bytes:
    """A .tar.gz whose bytes stand in it as they are, so that a wrong one is seen by the checksum alone."""
    return gzip.compress(gzip.decompress(tarred(member)), compresslevel=0)


def packed(data: bytes, method: int) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr("a", data)
    return out.getvalue()


def with_headers(num_bytes: int, form: int) -> bytes:
    """A .tar.gz with one small file that has an attribute or a name of `num_bytes`."""
    info = tarfile.TarInfo("a" * num_bytes if form == tarfile.GNU_FORMAT else "a")
    info.size, info.pax_headers = 1, {"comment": "c" * num_bytes}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", format=form) as archive:
        archive.addfile(info, io.BytesIO(b"1"))
    return out.getvalue()


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
    "tar bytes": ("tar.gz", damaged(stored(("a", DATA)), 5000), "cannot be unpacked: CRC check failed"),
    "tar last bytes": ("tar.gz", damaged(stored(("a", DATA)), -100), "cannot be unpacked: CRC check failed"),
    "tar sum": ("tar.gz", damaged(tarred(("a", DATA)), -8), "cannot be unpacked: CRC check failed"),
    "zip lzma": ("zip", damaged(packed(DATA, zipfile.ZIP_LZMA), 300), "cannot be unpacked"),
    "zip bzip2": ("zip", damaged(packed(DATA, zipfile.ZIP_BZIP2), 300), "cannot be unpacked"),
    "zip file as folder": ("zip", zipped({"a": b"1", "A/b/c": b"2"}), "'A/b/c' and 'a' cannot both be there"),
    "zip folder as file": ("zip", zipped({"a/b/c": b"1", "a/b": b"2"}), "'a/b' and 'a/b/c' cannot both be there"),
    "tar file as folder": ("tar.gz", tarred(("a", b"1"), ("a/b", b"2")), "'a/b' and 'a' cannot both be there"),
    "tar folder as file": ("tar.gz", tarred(("a/b", b"1"), ("./a", b"2")), "'./a' and 'a/b' cannot both be there"),
    "tar below manifest": ("tar.gz", tarred(("manifest.json/a", b"1")), "would stand where"),
    "tar long name": ("tar.gz", tarred(("a/" * 600 + "a", b"1")), "is too long a name"),
    "zip long part": ("zip", zipped({"a" * 250: b"1"}), "is too long a name"),
    "tar bomb hidden": ("tar.gz", tarred((".a", bytes(10**7))), "unpacks to more than"),
    "tar bomb of macOS": ("tar.gz", tarred(("__MACOSX/a", bytes(10**7))), "unpacks to more than"),
    "tar bomb after the end": (
        "tar.gz",
        gzip.compress(gzip.decompress(tarred(("a", b""))) + bytes(10**7)),
        "unpacks to",
    ),
    "tar headers": ("tar.gz", with_headers(10**6, tarfile.PAX_FORMAT), "more than 65,536 bytes stand before one"),
    "tar headers of GNU": (
        "tar.gz",
        with_headers(10**6, tarfile.GNU_FORMAT),
        "more than 65,536 bytes stand before one",
    ),
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


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_headers_take_no_memory(tmp_path, form):
    (tmp_path / "t.tar.gz").write_bytes(with_headers(20_000_000, form))
    tracemalloc.start()
    with pytest.raises(ArchiveError, match="more than 65,536 bytes stand before one of its members"):
        list(unpack(tmp_path / "t.tar.gz", str(tmp_path / "to"), Limits(max_ratio=1e9)))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 2**20


def test_headers_count(tmp_path):
    members = [link(f"d{i}", "", tarfile.DIRTYPE) for i in range(10_000)]
    (tmp_path / "t.tar.gz").write_bytes(tarred(*members))
    assert list(unpack(tmp_path / "t.tar.gz", str(tmp_path / "to"))) == []
    with pytest.raises(ArchiveError, match="unpacks to more than 1,000,000 bytes"):
        list(unpack(tmp_path / "t.tar.gz", str(tmp_path / "to"), Limits(max_bytes=1_000_000)))


def test_what_cannot_be_written_is_no_damage(server, tmp_path):
    data = zipped({"d": b"1"})
    tiny = data_set(server, "t.zip", data)
    (tmp_path / "tiny" / "d").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        engine.download(tiny, str(tmp_path), patience=QUICK)
    assert tree(tmp_path) == {"tiny/.download/t.zip": data}


def test_what_only_a_mirror_vouches_for_is_fetched_anew(server, tmp_path):
    data = zipped({"a": b"1", "a/b": b"2"})
    tiny = data_set(server, "t.zip", data, md5=None)
    server.files["/t.zip.md5"] = hashlib.md5(data).hexdigest().encode()
    with pytest.raises(ArchiveError, match="cannot both be there"):
        engine.download(tiny, str(tmp_path), mirror=server.url, patience=QUICK)
    assert tree(tmp_path) == {}
    server.files["/t.zip.md5"] = b"0" * 32
    with pytest.raises(DownloadError, match="wrong bytes: md5"):
        engine.download(tiny, str(tmp_path), mirror=server.url, patience=QUICK)


def test_limits_and_good_archives(tmp_path):
    (tmp_path / "t.tar.gz").write_bytes(tarred(("./d/a", b"12"), ("d/b", b"345"), ("d/.hidden", b"")))
    for limits in (Limits(max_bytes=4), Limits(max_members=2), Limits(max_ratio=0.01)):
        with pytest.raises(ArchiveError, match="unpacks to more than"):
            list(unpack(tmp_path / "t.tar.gz", str(tmp_path / "to"), limits))
    target = str(tmp_path / "good")
    assert dict(unpack(tmp_path / "t.tar.gz", target, Limits(5, 100, 3))) == {"d/a": 2, "d/b": 3}
    assert tree(tmp_path / "good") == {"d/a": b"12", "d/b": b"345"}
