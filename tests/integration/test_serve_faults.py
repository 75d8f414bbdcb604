"""What callers see when something breaks: a deployment as in production, with both kinds of proxy, and real faults.

The table in docs/serving.md was written down from what these tests print.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import boto3
import httpx
import pytest
import s3fs
from moto.server import ThreadedMotoServer
from serve_load import AUTHORIZED, BODY, TOKEN, Load
from tiny import tiny_checkpoint, tiny_knowledge, tiny_prepared

from benchmarks.serve_sides import Cluster, free_ports

pytestmark = pytest.mark.slow
DEADLINE_S = 240
# What a caller may see of a replica that dies with its request: the proxy's error, or a connection that ends.
BROKEN = {500, 502, 503, "RemoteProtocolError", "ReadError"}
TWICE_THE_STORE = """
import sys, time
import numpy as np
import ray
ray.init(address=sys.argv[1], log_to_driver=False)
held = [ray.put(np.zeros(10_000_000, np.uint8)) for _ in range(40)]
print("full", flush=True)
time.sleep(600)
"""


class Store:
    """An S3 server whose content stays when it goes away."""

    def __init__(self) -> None:
        (self.port,) = free_ports(1)
        self.server = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self.server.start()

    def stop(self) -> None:
        if self.server is not None:
            self.server.stop()
        self.server = None


def until(true: Callable[[], bool], what: Callable[[], object] = lambda: "") -> float:
    """Waits; returns the seconds it took."""
    started = time.monotonic()
    while not true():
        assert time.monotonic() - started < DEADLINE_S, what()
        time.sleep(0.2)
    return time.monotonic() - started


@pytest.fixture(scope="module", params=["haproxy", "default"])
def world(request, tmp_path_factory):
    """A deployment of two replicas whose checkpoints lie in an S3 server that was away when it was deployed."""
    folder, store = tmp_path_factory.mktemp(request.param[:2]), Store()
    settings = {
        "AWS_ENDPOINT_URL": store.url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "2",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ |= settings
    s3fs.S3FileSystem.clear_instance_cache()  # of another store's address
    store.start()
    bucket = f"faults-{request.param}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    prepared = tiny_prepared(str(folder / "prepared"))
    uris = [tiny_checkpoint(f"s3://{bucket}/{seed}", prepared, tiny_knowledge(), seed=seed) for seed in range(2)]
    store.stop()
    deployment = {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0.5}}
    cluster = Cluster(folder, uris[0], request.param == "haproxy", deployment=deployment, token=TOKEN)
    try:
        cluster.run(cluster.start_command)
        yield cluster, store, uris
    finally:
        cluster.end()
        store.stop()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def cluster(world) -> Cluster:
    """The deployment, whole and answering."""
    cluster, store, _ = world
    if store.server is None:
        store.start()
    if cluster.status()["status"] != "RUNNING":
        cluster.deploy()
        cluster.wait()
    until(lambda: cluster.status()["replicas"] == {"RUNNING": 2}, cluster.status)
    return cluster


def test_the_store_is_away_at_the_start(world):
    cluster, store, _ = world
    cluster.deploy()
    until(lambda: cluster.status()["status"] == "DEPLOY_FAILED", cluster.status)
    assert store.url in cluster.status()["message"]
    try:
        seen = httpx.post(f"{cluster.url}/v1/rank", json=BODY, headers=AUTHORIZED, timeout=10).status_code
    except httpx.ConnectError:
        seen = "ConnectError"
    print("before anything is deployed, callers see", seen)
    assert seen in (404, 503, "ConnectError")

    store.start()
    cluster.deploy()
    cluster.wait()
    assert httpx.post(f"{cluster.url}/v1/rank", json=BODY, headers=AUTHORIZED, timeout=10).status_code == 200


def test_the_store_goes_away_later(cluster, world):
    _, store, uris = world
    with Load(cluster.url) as load:
        store.stop()
        refused = cluster.rollout("--checkpoint_uri", uris[1], expected=2)
        assert store.url in refused
        time.sleep(2)
        assert load.counts().keys() == {200}

        (victim, *_) = cluster.replicas()
        os.kill(victim, signal.SIGKILL)
        time.sleep(15)  # its successor cannot load the model, and the other one answers
        after = time.monotonic()
        time.sleep(3)
        assert load.counts(since=after).keys() == {200}
        assert cluster.status()["replicas"].get("RUNNING") == 1

        store.start()
        until(lambda: cluster.status()["replicas"] == {"RUNNING": 2}, cluster.status)
    print("the store goes away, then a replica:", load.counts())
    assert load.counts().keys() <= {200} | BROKEN
    assert sum(number for status, number in load.counts().items() if status != 200) <= 20
    assert {answer.version for answer in load.answers} <= {"tiny-0", None}


def test_a_replica_is_killed(cluster):
    with Load(cluster.url) as load:
        time.sleep(2)
        (victim, *_) = cluster.replicas()
        killed = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        took = until(lambda: victim not in cluster.replicas() and len(cluster.replicas()) == 2)
        until(lambda: cluster.status()["replicas"] == {"RUNNING": 2}, cluster.status)
        calm = time.monotonic()
        time.sleep(3)
    failed = [answer for answer in load.answers if answer.status != 200]
    last = max((answer.at - killed for answer in failed), default=0)
    print(f"a replica is killed: {load.counts()}, the last error {last:.1f} s later, replaced after {took:.1f} s")
    assert load.counts().keys() <= {200} | BROKEN
    assert len(failed) <= 20
    assert load.counts(since=calm).keys() == {200}


def test_a_replica_hangs(cluster):
    with Load(cluster.url, num_clients=8) as load:
        time.sleep(2)
        (victim, *_) = cluster.replicas()
        hung = time.monotonic()
        os.kill(victim, signal.SIGSTOP)
        took = until(lambda: victim not in cluster.replicas())
        until(lambda: cluster.status()["replicas"] == {"RUNNING": 2}, cluster.status)
        calm = time.monotonic()
        time.sleep(3)
    failed = [answer for answer in load.answers if answer.status != 200]
    last = max((answer.at - hung for answer in failed), default=0)
    slowest = max(answer.seconds for answer in load.answers)
    print(
        f"a replica hangs: {load.counts()}, slowest {slowest:.1f} s, last error {last:.1f} s, gone after {took:.1f} s"
    )
    assert load.counts().keys() <= {200, 408, 504, "ReadTimeout"} | BROKEN
    assert load.counts()[200] > len(failed)  # the other replica goes on
    assert load.counts(since=calm).keys() == {200}


def test_the_object_store_is_full(cluster, world, tmp_path):
    script = tmp_path / "fill.py"
    script.write_text(TWICE_THE_STORE)
    with Load(cluster.url) as load:
        time.sleep(2)
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, str(script), cluster.gcs_address],
            env=cluster.environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout.readline().strip() == "full"
            full = time.monotonic()
            time.sleep(3)
            assert "tiny-1 is served" in cluster.rollout("--checkpoint_uri", world[2][1])
            assert "tiny-0 is served" in cluster.rollout("--back")
        finally:
            process.kill()
            process.wait()
    print(f"the object store is full after {full - started:.1f} s: {load.counts()}")
    assert load.counts().keys() == {200}


def test_more_than_it_can_answer(cluster):
    with Load(cluster.url) as calm:
        time.sleep(3)
    body = BODY | {"items": [7000 + i % 4 for i in range(2000)]}
    with Load(cluster.url, num_clients=120, body=body) as load:
        time.sleep(8)
    answered = sorted(answer.seconds for answer in load.answers if answer.status == 200)
    refused = [answer for answer in load.answers if answer.status == 503]
    told = sum(answer.retry_after is not None for answer in refused)
    median = {"calm": sorted(a.seconds for a in calm.answers)[len(calm.answers) // 2]}
    print(
        f"overload: {load.counts()}, {told} of {len(refused)} told when to come again; answered: median "
        f"{answered[len(answered) // 2]:.2f} s, longest {answered[-1]:.2f} s; calm {median['calm']:.3f} s"
    )
    assert load.counts().keys() <= {200, 503}
    assert refused and told
    assert answered[-1] < 10
