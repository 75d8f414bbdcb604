"""A data set downloaded to a real S3 server over broken connections, and read from there."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest
from file_server import serving

from llm4msr import storage
from llm4msr.config import DataConfig
from llm4msr.config.data import AmazonConfig
from llm4msr.data.adapters import build_adapter
from llm4msr.data.archives import ArchiveError
from llm4msr.data.catalogue import DataSet, RemoteFile
from llm4msr.data.download import download
from llm4msr.data.http import Patience

QUICK = Patience(attempts=4, first_wait_s=0.001, timeout_s=5)


def reviews(name: str) -> bytes:
    records = [
        {
            "overall": 1 + i % 5,
            "reviewerID": f"U{i % 7}",
            "asin": f"{name}{i % 50}",
            "unixReviewTime": 1_400_000_000 + i,
        }
        for i in range(20_000)
    ]
    return gzip.compress("\n".join(map(json.dumps, records)).encode(), mtime=0)


def zipped(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def test_downloaded_to_s3_and_read_there(bucket, tmp_path):
    first, second = reviews("A"), reviews("B")
    with serving() as server:
        server.files = {"/A_5.json.gz": first, "/B.zip": zipped({"deep/B_5.json.gz": second})}
        known = {path: hashlib.sha256(data).hexdigest() for path, data in server.files.items()}
        files = tuple(RemoteFile(server.url + path, sha256=digest) for path, digest in known.items())
        server.faults = [len(first) // 2, None, 1000]
        place = download(DataSet("two", files, "", ""), f"s3://{bucket}/raw", cache=tmp_path, patience=QUICK)
        assert place == f"s3://{bucket}/raw/two"
        assert len(server.requests) == 4 and server.requests[1][1] == f"bytes={len(first) // 2}-"
        assert not any(path.is_file() for path in tmp_path.rglob("*"))
        assert download(DataSet("two", files, "", ""), f"s3://{bucket}/raw/", cache=tmp_path, patience=QUICK) == place
        assert len(server.requests) == 4
    sizes = {"A_5.json.gz": len(first), "deep/B_5.json.gz": len(second)}
    assert storage.read_manifest(place, "")["files"] == sizes
    amazon = AmazonConfig(categories={"a": "A_5", "b": "deep"})
    adapter = build_adapter(DataConfig(kind="amazon", raw_uri=place, amazon=amazon))
    shards = adapter.shards()
    assert [shard.uri for shard in shards] == [f"{place}/{name}" for name in sizes]
    for scenario, shard in enumerate(shards):
        blocks = list(adapter.parse_events(shard))
        events = adapter.merge(pa.concat_tables([block.table for block in blocks]))
        assert events.num_rows == 20_000 and not any(len(block.rejects) for block in blocks)
        assert set(events["scenario"].to_pylist()) == {scenario} and sum(events["label"].to_pylist()) == 8000


def test_a_hostile_archive_leaves_nothing_in_s3(bucket, s3_server, tmp_path):
    with serving() as server:
        server.files = {"/B.zip": zipped({"good": b"1", "../../out": b"2"})}
        data_set = DataSet("bad", (RemoteFile(f"{server.url}/B.zip"),), "", "")
        with pytest.raises(ArchiveError, match="is no path inside the archive"):
            download(data_set, f"s3://{bucket}/raw", cache=Path(tmp_path), patience=QUICK)
    assert "Contents" not in s3_server.list_objects_v2(Bucket=bucket)
