"""A cluster of its own, deployed as in production, changed under load through both kinds of proxy."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
import yaml
from tiny import tiny_checkpoint, tiny_knowledge, tiny_prepared

from llm4msr.ranker import Ranker
from llm4msr.request import RankRequest

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
TOKEN = "a-valid-token-0123456"
BODY = {"user": 1000, "scenario": "rec", "items": [7000, 7001, 7002, 7003]}
START_TIMEOUT_S, NUM_CLIENTS = 120, 4
HA_PROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}


def free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Cluster:
    """A head node started by `ray start`, the deployment of serve/config.yaml on it, and what was started for it."""

    def __init__(self, folder: Path, checkpoint_uri: str, more_environment: dict[str, str]) -> None:
        self.folder, self.checkpoint_uri = folder, checkpoint_uri
        gcs, dashboard, agent, metrics, stats, proxy_metrics, self.port = free_ports(7)
        self.mark = f"ROLLOUT_TEST_MARK={folder}"
        self.address, self.url = f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{self.port}"
        kept = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "LLM4MSR_TOKENS_FILE")}
        self.environment = kept | more_environment | dict([self.mark.split("=", 1)])
        self.environment |= {
            "RAY_AUTH_MODE": "disabled",
            "LLM4MSR_TOKENS": TOKEN,
            "PYTHONPATH": str(REPOSITORY),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(proxy_metrics),
        }
        command = [BIN / "ray", "start", "--head", "--num-cpus=2", f"--port={gcs}", "--node-ip-address=127.0.0.1"]
        command += [
            f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={agent}",
            "--include-dashboard=true",
        ]
        command += [f"--metrics-export-port={metrics}", "--object-store-memory=200000000", f"--temp-dir={folder / 'r'}"]
        self.command = command

    def start(self) -> None:
        self.run(self.command)
        config = yaml.safe_load((REPOSITORY / "serve" / "config.yaml").read_text())
        config["http_options"] |= {"host": "127.0.0.1", "port": self.port}
        (application,) = config["applications"]
        application["args"] |= {"workspace_uri": None, "checkpoint_uri": self.checkpoint_uri}
        (deployment,) = application["deployments"]
        deployment["ray_actor_options"] = {"num_cpus": 0.5}
        deployment["autoscaling_config"] |= {"min_replicas": 2, "max_replicas": 2}
        file = self.folder / "config.yaml"
        file.write_text(yaml.safe_dump(config))
        self.run([BIN / "serve", "deploy", "-a", self.address, file])
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.status() != 200:
            assert time.monotonic() < deadline, "the deployment does not answer"
            time.sleep(0.3)

    def run(self, command, expected: int = 0) -> subprocess.CompletedProcess:
        done = subprocess.run(
            list(map(str, command)), env=self.environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == expected, (
            f"{command}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        )
        return done

    def rollout(self, *argv: str, expected: int = 0) -> str:
        command = [sys.executable, "-m", "serve.rollout", "--address", self.address, "--url", self.url, *argv]
        done = self.run(command, expected)
        return done.stdout + done.stderr

    def status(self) -> int:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5).status_code
        except httpx.HTTPError:
            return 0

    def model(self) -> dict:
        return httpx.get(f"{self.url}/v1/model", headers=AUTHORIZED, timeout=10).json()

    def end(self) -> None:
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and self.mark.encode() in (folder / "environ").read_bytes():
                    os.kill(int(folder.name), signal.SIGKILL)
            except OSError:  # ended meanwhile, or not ours to read
                continue


AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}


class Load:
    """Clients that ask all the time, until the end of the block; then what they got."""

    def __init__(self, url: str) -> None:
        self.url, self.answers, self.stop = url, [], threading.Event()
        self.threads = [threading.Thread(target=self.ask) for _ in range(NUM_CLIENTS)]

    def ask(self) -> None:
        with httpx.Client(headers=AUTHORIZED, timeout=30) as client:
            while not self.stop.is_set():
                try:
                    answer = client.post(f"{self.url}/v1/rank", json=BODY)
                    found = answer.json() if answer.status_code == 200 else {}
                    self.answers.append((answer.status_code, found.get("model_version"), scores(found)))
                except httpx.HTTPError as error:
                    self.answers.append((type(error).__name__, None, ()))

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()


def scores(answer: dict) -> tuple:
    return tuple((r["item"], round(r["score"], 5)) for r in answer.get("results", ()))


@pytest.fixture(scope="module")
def uris(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollout")
    prepared = tiny_prepared(str(folder / "prepared"))
    uris = {
        name: tiny_checkpoint(str(folder / name), prepared, tiny_knowledge(), seed=seed)
        for seed, name in enumerate(("first", "second", "damaged"))
    }
    (folder / "damaged" / "model.safetensors").write_bytes(b"{}")
    return uris


@pytest.mark.parametrize("proxy", ["haproxy", "default"])
def test_nobody_notices_a_new_model_a_refused_one_and_the_way_back(uris, tmp_path_factory, proxy):
    expected = {}
    for name in ("first", "second"):
        answer = Ranker.from_checkpoint(uris[name]).rank(RankRequest(**BODY))
        expected[answer.model_version] = tuple((r.item, round(r.score, 5)) for r in answer.results)
    folder = tmp_path_factory.mktemp(proxy[:2])
    cluster = Cluster(folder, uris["first"], HA_PROXY if proxy == "haproxy" else {})
    try:
        cluster.start()
        assert httpx.post(f"{cluster.url}/v1/rank", json=BODY, timeout=10).status_code == 401
        with Load(cluster.url) as load:
            assert "tiny-1 is served. Back: " in cluster.rollout("--checkpoint_uri", uris["second"])
            after_first = len(load.answers)
            refused = cluster.rollout("--checkpoint_uri", uris["damaged"], expected=2)
            assert "model.safetensors" in refused and cluster.model()["model_version"] == "tiny-1"
            shadow = cluster.rollout("--canary_uri", uris["first"], "--share", "1")
            assert "tiny-1 is served, beside it" in shadow and cluster.model()["canary"]["model_version"] == "tiny-0"
            middle = len(load.answers)
            assert "tiny-0 is served" in cluster.rollout("--back")
            time.sleep(1)
        print(Counter((status, version) for status, version, _ in load.answers))
        assert {status for status, _, _ in load.answers} == {200}
        assert {version for _, version, _ in load.answers} == set(expected)
        assert all(found == expected[version] for _, version, found in load.answers)  # none is of two models
        assert {version for _, version, _ in load.answers[after_first:middle]} == {"tiny-1"}
        assert {version for _, version, _ in load.answers[-5:]} == {"tiny-0"}
    finally:
        cluster.end()
