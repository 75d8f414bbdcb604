"""Fixtures of the whole suite: the shared data folder, one S3 server and one Ray cluster per session."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import uuid
from pathlib import Path

import pytest

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "1")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"

# Copies of checkpoints that replicas and actors map: the suite's own, gone with it.
os.environ["LLM4MSR_CACHE"] = tempfile.mkdtemp(prefix="llm4msr-tests-")
atexit.register(shutil.rmtree, os.environ["LLM4MSR_CACHE"], ignore_errors=True)

# Tiny tensors on shared cores: more threads only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and a tiny model; tests that need it are skipped where it is absent."""
    path = (REPOSITORY / os.environ.get("LLM4MSR_SHARED", "../shared")).resolve()
    if not (path / "data").is_dir():
        pytest.skip(f"needs the shared data folder, not found at LLM4MSR_SHARED={path}")
    return path


@pytest.fixture(scope="session")
def s3_server():
    """A real S3 API server on this machine, which the AWS settings of this process and of Ray's workers name."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    yield boto3.client("s3")
    server.stop()


@pytest.fixture
def bucket(s3_server) -> str:
    """The name of a fresh, empty bucket."""
    name = f"test-{uuid.uuid4().hex}"
    s3_server.create_bucket(Bucket=name)
    return name


@pytest.fixture(scope="session")
def ray_cluster(s3_server):
    """One local Ray for the whole session; its workers know the S3 server, as they read its address when they start."""
    import ray

    # Unix socket names are limited to about 100 bytes, so Ray's directory must have a short name.
    temp_dir = tempfile.mkdtemp(prefix="r", dir="/tmp")
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        object_store_memory=300 * 2**20,
        _temp_dir=temp_dir,
    )
    yield ray
    ray.shutdown()
    shutil.rmtree(temp_dir, ignore_errors=True)
