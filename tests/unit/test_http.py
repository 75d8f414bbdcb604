"""Fetching one file from a real server that breaks, lies and changes its mind."""

from __future__ import annotations

import fcntl
import gzip
import json
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from file_server import FileServer, serving
from published import DATA, QUICK, tree

from llm4msr.data.http import DownloadError, NotThereError, Patience, fetch, fetch_text

OTHER = DATA[:500_000] + DATA[::-1][500_000:]


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving() as files:
        files.files["/a.bin"] = DATA
        yield files


def test_broken_connections_are_gone_on_with(server, tmp_path):
    server.faults = [300_000, 0, (503, {"Retry-After": "0"}), 1, 300_000]
    fetch(f"{server.url}/a.bin", tmp_path / "a.bin", QUICK)
    assert tree(tmp_path) == {"a.bin": DATA}
    asked = [int(r[6:-1]) if r else 0 for _, r in server.requests]
    assert len(asked) == 6 and asked == sorted(asked)
    assert asked[0] == 0 and 200_000 < asked[1] <= 300_000 and asked[5] > 400_000
    fetch(f"{server.url}/a.bin", tmp_path / "a.bin", QUICK)
    assert len(server.requests) == 6


def test_a_later_run_goes_on(server, tmp_path):
    server.faults = [500_000, *[0] * 9]
    with pytest.raises(DownloadError) as error:
        fetch(f"{server.url}/a.bin", tmp_path / "a.bin", QUICK)
    kept = (tmp_path / "a.bin.part").stat().st_size
    assert 400_000 < kept <= 500_000
    assert str(error.value).startswith(f"{server.url}/a.bin: failed 4 times in a row, the last time with: ")
    assert str(error.value).endswith(f"; {tmp_path}/a.bin.part keeps {kept:,} bytes: run again to go on")
    server.faults = []
    fetch(f"{server.url}/a.bin", tmp_path / "a.bin", QUICK)
    assert server.requests[-1] == ("/a.bin", f"bytes={kept}-")
    assert tree(tmp_path) == {"a.bin": DATA}


@pytest.mark.parametrize("version", ["ETag", "Last-Modified"])
def test_a_file_that_changed_begins_anew(server, tmp_path, version):
    server.version = version
    server.faults = [500_000, lambda: server.files.update({"/a.bin": OTHER})]
    fetch(f"{server.url}/a.bin", tmp_path / "a.bin", QUICK)
    assert server.requests[1][1] is not None  # the rest was asked for
    assert tree(tmp_path) == {"a.bin": OTHER}


def test_a_change_that_the_server_does_not_admit_begins_anew(server, tmp_path):
    def shorten() -> None:
        server.files["/a.bin"] = DATA[:700_000]

    server.faults = [500_000, (206, {"Content-Range": "bytes 7-9/1000000"}), 600_000, shorten, None]
    fetch(f"{server.url}/a.bin", tmp_path / "a.bin", QUICK)
    assert [r is None for _, r in server.requests] == [True, False, True, False]
    assert tree(tmp_path) == {"a.bin": DATA[:700_000]}
    # A part that is longer than the file has become.
    (tmp_path / "a.bin").rename(tmp_path / "b.bin.part")
    state = {"url": f"{server.url}/b.bin", "validator": '"x"', "total": 800_000}
    (tmp_path / "b.bin.part.json").write_text(json.dumps(state))
    server.files["/b.bin"], server.faults = OTHER, [(416, {"Content-Range": "bytes */600000"})]
    fetch(f"{server.url}/b.bin", tmp_path / "b.bin", QUICK)
    assert tree(tmp_path) == {"b.bin": OTHER}


@pytest.mark.parametrize(("ranges", "version"), [(False, "ETag"), (True, "")])
def test_servers_without_ranges_or_versions_send_the_whole_file_again(server, tmp_path, ranges, version):
    server.ranges, server.version = ranges, version
    server.faults = [500_000, 600_000]
    fetch(f"{server.url}/a.bin", tmp_path / "a.bin", QUICK)
    assert len(server.requests) == 3
    assert tree(tmp_path) == {"a.bin": DATA}
    server.faults = [500_000, 400_000, 450_000] * 9
    with pytest.raises(DownloadError, match="failed 4 times in a row"):
        fetch(f"{server.url}/a.bin", tmp_path / "b.bin", QUICK)
    assert len(server.requests) == 3 + 4  # less than there was once is no progress


def test_a_part_of_another_address_or_without_its_state_is_not_used(server, tmp_path):
    server.faults = [500_000, *[0] * 3]
    with pytest.raises(DownloadError):
        fetch(f"{server.url}/a.bin", tmp_path / "x.bin", QUICK)
    server.files["/other.bin"] = OTHER
    fetch(f"{server.url}/other.bin", tmp_path / "x.bin", QUICK)
    (tmp_path / "y.bin.part").write_bytes(b"anything")
    fetch(f"{server.url}/a.bin", tmp_path / "y.bin", QUICK)
    assert tree(tmp_path) == {"x.bin": OTHER, "y.bin": DATA}
    assert [r for _, r in server.requests[-2:]] == [None, None]


def test_what_will_not_pass_is_told_at_once(server, tmp_path):
    for status, kind, message in (
        (404, NotThereError, "404 Not Found: no such file there"),
        (403, DownloadError, "403 Forbidden"),
    ):
        server.requests.clear()
        server.faults = [(status, {})]
        with pytest.raises(kind, match=f"{server.url}/a.bin: {message}"):
            fetch(f"{server.url}/a.bin", tmp_path / "a.bin", QUICK)
        assert len(server.requests) == 1
    with pytest.raises(DownloadError, match="ftp://x/a"):
        fetch("ftp://x/a", tmp_path / "a.bin", QUICK)
    with pytest.raises(DownloadError, match=r"127.0.0.1:1/a: failed 2 times in a row, the last time with: Conn"):
        fetch("http://127.0.0.1:1/a", tmp_path / "a.bin", Patience(2, 0.001))
    server.files["/big"] = bytes(5 << 20)
    with pytest.raises(DownloadError, match="more than 4,194,304 bytes, where a short text was expected"):
        fetch_text(f"{server.url}/big", QUICK)


def test_a_part_that_another_process_writes_is_left_alone(server, tmp_path):
    with (tmp_path / "a.bin.part").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        with pytest.raises(DownloadError, match=r"a.bin.part: another process is writing it"):
            fetch(f"{server.url}/a.bin", tmp_path / "a.bin", QUICK)


def test_https_is_not_left(server, tmp_path, monkeypatch):
    (tmp_path / "server.pem").write_bytes(own_certificate())
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "server.pem")
    with serving(tls) as safe:
        safe.files["/a.bin"] = DATA
        with pytest.raises(DownloadError, match=r"no safe connection: .*certificate"):
            fetch(f"{safe.url}/a.bin", tmp_path / "a.bin", QUICK)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "server.pem"))
        fetch(f"{safe.url}/a.bin", tmp_path / "a.bin", QUICK)
        assert (tmp_path / "a.bin").read_bytes() == DATA
        safe.faults = [(302, {"Location": f"{server.url}/a.bin"})]
        with pytest.raises(DownloadError, match=f"leads to {server.url}/a.bin, which is not https"):
            fetch(f"{safe.url}/a.bin", tmp_path / "b.bin", QUICK)


def own_certificate() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return certificate.public_bytes(pem) + key.private_bytes(pem, *plain)


def test_compressed_files_stay_compressed(server, tmp_path, monkeypatch):
    server.files["/a.gz"] = gzip.compress(DATA)
    answer = FileServer.answer

    def encoded(self, handler) -> None:
        end = handler.end_headers
        handler.end_headers = lambda: (handler.send_header("Content-Encoding", "gzip"), end())
        answer(self, handler)

    monkeypatch.setattr(FileServer, "answer", encoded)
    fetch(f"{server.url}/a.gz", tmp_path / "a.gz", QUICK)
    assert (tmp_path / "a.gz").read_bytes() == server.files["/a.gz"]
