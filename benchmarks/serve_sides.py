"""Servers that the benchmarks of serving measure, each in processes of its own, and the load on them.

``serve``: a Ray of its own, started and deployed to as in production, through HAProxy or Ray Serve's default proxy.
``bare``: the same application, gate included, behind uvicorn alone. Both have one replica, one torch thread, the same
checkpoint and no tokens. The load comes from wrk (Debian's package ``wrk``), which picks from a file of requests.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from benchmarks.harness import REPOSITORY
from benchmarks.train_world import World
from llm4msr.training.checkpoint import load_checkpoint

START_TIMEOUT_S, STOP_TIMEOUT_S = 180, 60
NUM_BODIES = 2_000
COME_BACK = "503 with Retry-After"
HA_PROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": "6",
}
# What is no 200 is counted by what it is: in each thread, and added up at the end. Who is told to come back (503 with
# Retry-After) is apart: that is how a replica says that it has enough to do.
LUA = """
local bodies = {}
for line in io.lines(os.getenv("WRK_BODIES")) do bodies[#bodies + 1] = line end
local pause = tonumber(os.getenv("WRK_PAUSE_MS") or "0")
local threads = {}
function setup(thread) table.insert(threads, thread) end
function init() math.randomseed(os.time()); kinds = {} end
function request()
  return wrk.format("POST", nil, {["content-type"] = "application/json"}, bodies[math.random(#bodies)])
end
function response(status, headers)
  if status == 200 then return end
  local kind = tostring(status)
  if headers["retry-after"] or headers["Retry-After"] then kind = kind .. " with Retry-After" end
  kinds[kind] = (kinds[kind] or 0) + 1
end
if pause > 0 then function delay() return math.floor(pause * (0.5 + math.random())) end end
function done(summary, latency)
  local all = {}
  for _, kind in ipairs({"connect", "read", "write", "timeout"}) do all[kind] = summary.errors[kind] end
  for _, thread in ipairs(threads) do
    for kind, number in pairs(thread:get("kinds")) do all[kind] = (all[kind] or 0) + number end
  end
  local told = {}
  for kind, number in pairs(all) do table.insert(told, string.format('"%s": %d', kind, number)) end
  io.write(string.format(
    'RESULT {"requests": %d, "kinds": {%s}, "seconds": %f, "p50_ms": %f, "p95_ms": %f, "p99_ms": %f, "max_ms": %f}\\n',
    summary.requests, table.concat(told, ", "), summary.duration / 1e6, latency:percentile(50) / 1e3,
    latency:percentile(95) / 1e3, latency:percentile(99) / 1e3, latency.max / 1e3))
end
"""


@dataclass(frozen=True)
class Load:
    """What wrk saw.

    Attributes:
        requests_per_s: Answers a second, of any kind.
        failed: Requests without the answer that was asked for, but for those told to come back.
        told_to_come_back: 503 with Retry-After.
        kinds: How many of each kind that is no 200: statuses, and what broke a connection.
        p50_ms: Latency, as its percentiles below.
    """

    requests_per_s: float
    failed: int
    told_to_come_back: int
    kinds: dict[str, int]
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float


def missing_tool() -> str | None:
    """Returns why no load can be made here; None where it can."""
    return None if shutil.which("wrk") else "wrk is not installed (Debian: apt-get install wrk)"


def served_world(short: bool) -> World:
    """Returns the data behind the model that is served: items and users count, its rows hardly."""
    return World(2_000, 500, 3_000, 200) if short else World(num_rows=2_000, num_valid_rows=200)


def write_bodies(checkpoint_uri: str, path: Path, num_candidates: int) -> None:
    """Writes requests of random users and candidates, one JSON object a line."""
    checkpoint, rng = load_checkpoint(checkpoint_uri), np.random.default_rng(0)
    users, items = checkpoint.users["key"].to_pylist(), checkpoint.items["key"].to_pylist()
    scenarios = checkpoint.schema.scenario_names
    with path.open("w", encoding="utf-8") as file:
        for i in range(NUM_BODIES):
            chosen = [items[j] for j in rng.choice(len(items), num_candidates, replace=False)]
            body = {"user": users[rng.integers(len(users))], "scenario": scenarios[i % len(scenarios)], "items": chosen}
            file.write(json.dumps(body | {"top_k": 20}) + "\n")


def load(url: str, bodies: Path, seconds: int, connections: int, pause_ms: float = 0) -> Load:
    """Asks for so many seconds over so many connections, with a pause (on average) after each answer of each.

    Raises:
        RuntimeError: wrk failed.
    """
    script = bodies.with_suffix(".lua")
    script.write_text(LUA, encoding="utf-8")
    environment = os.environ | {"WRK_BODIES": str(bodies), "WRK_PAUSE_MS": str(pause_ms)}
    command = [
        "wrk",
        "-t1",
        f"-c{connections}",
        f"-d{seconds}s",
        "--timeout",
        "30s",
        "-s",
        str(script),
        f"{url}/v1/rank",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    found = re.search(r"^RESULT (.*)$", done.stdout, re.MULTILINE)
    if done.returncode or found is None:
        raise RuntimeError(f"wrk ended with {done.returncode}: {done.stdout[-500:]} {done.stderr[-500:]}")
    told = json.loads(found[1])
    rate = told["requests"] / told["seconds"]
    kinds = {kind: number for kind, number in told["kinds"].items() if number}
    shed = kinds.get(COME_BACK, 0)
    latencies = (told[name] for name in ("p50_ms", "p95_ms", "p99_ms", "max_ms"))
    return Load(rate, sum(kinds.values()) - shed, shed, kinds, *latencies)


@contextmanager
def bare(folder: Path, checkpoint_uri: str) -> Iterator[str]:
    """Runs the application behind uvicorn alone; yields its address."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "benchmarks.serve_bare", checkpoint_uri, str(port)]
    with (folder / "bare.log").open("w") as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(url, folder / "bare.log", process)
        yield url
    finally:
        process.kill()
        process.wait()


class Cluster:
    """A Ray of its own with the deployment of serve/config.yaml, changed where a benchmark needs it.

    Args:
        folder: For configuration and Ray's files; a short path, as Ray puts sockets there.
        checkpoint_uri: What to serve.
        ha_proxy: Through HAProxy, else through the default proxy.
        num_cpus: Of the node.
        deployment: What to change of the deployment's configuration.
        token: That callers need; None lets everybody in.
    """

    def __init__(
        self,
        folder: Path,
        checkpoint_uri: str,
        ha_proxy: bool,
        num_cpus: int = 2,
        deployment: dict | None = None,
        token: str | None = None,
    ) -> None:
        gcs, dashboard, agent, metrics, stats, proxy_metrics, self.port = free_ports(7)
        self.folder, self.mark = folder, f"SERVE_BENCHMARK_MARK={folder}"
        self.address, self.url = f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{self.port}"
        self.gcs_address = f"127.0.0.1:{gcs}"
        self.environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.environment |= (HA_PROXY if ha_proxy else {}) | dict([self.mark.split("=", 1)])
        self.environment |= {
            "RAY_AUTH_MODE": "disabled",
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",  # 60 are too few on a busy machine
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(proxy_metrics),
            "PYTHONPATH": str(REPOSITORY),
        }
        self.start_command = [
            *(_tool("ray"), "start", "--head", f"--num-cpus={num_cpus}", f"--port={gcs}", "--include-dashboard=true"),
            *("--node-ip-address=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={folder / 'r'}"),
            *(f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"),
            "--object-store-memory=200000000",
        ]
        config = yaml.safe_load((REPOSITORY / "serve" / "config.yaml").read_text(encoding="utf-8"))
        config["http_options"] |= {"host": "127.0.0.1", "port": self.port}
        (application,) = config["applications"]
        application["args"] |= {"workspace_uri": None, "checkpoint_uri": checkpoint_uri, "access_log": False}
        if token is None:
            application["args"]["auth"] = "off"
        else:
            self.environment["LLM4MSR_TOKENS"] = token
        config["logging_config"] = {"enable_access_log": False, "log_level": "WARNING"}
        (found,) = application["deployments"]
        found |= {"ray_actor_options": {"num_cpus": 1}} | (deployment or {})
        if "num_replicas" in found:
            del found["autoscaling_config"]
        self.config = config

    def __enter__(self) -> Cluster:
        try:
            self.run(self.start_command)
            self.deploy()
            self.wait()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def wait(self) -> None:
        """Waits until the deployment answers.

        Raises:
            RuntimeError: It does not within three minutes.
        """
        _wait(self.url, None, None)

    def status(self) -> dict:
        """Returns what Ray Serve says of the application: status, message, replicas by state."""
        try:  # not by `serve status`, whose start takes a second of a processor that is being measured
            with urllib.request.urlopen(f"{self.address}/api/serve/applications/", timeout=30) as answer:
                found = json.load(answer)["applications"].get("ranker", {})
        except OSError:
            found = {}
        deployment = found.get("deployments", {}).get("ranker", {})
        return {
            "status": found.get("status"),
            "message": f"{found.get('message', '')}\n{deployment.get('message', '')}".strip(),
            "replicas": dict(Counter(replica["state"] for replica in deployment.get("replicas", ()))),
        }

    def replicas(self) -> list[int]:
        """Returns the processes of the deployment's replicas."""
        return [pid for pid, command in self.processes().items() if command.startswith("ray::ServeReplica:ranker")]

    def deploy(self) -> None:
        """Deploys the configuration, again where it has changed."""
        file = self.folder / "config.yaml"
        file.write_text(yaml.safe_dump(self.config), encoding="utf-8")
        self.run([_tool("serve"), "deploy", "-a", self.address, str(file)])

    def run(self, command: list[str], expected: int = 0) -> str:
        """Runs a command against this cluster; returns what it printed.

        Raises:
            RuntimeError: It ended with another exit status.
        """
        done = subprocess.run(command, env=self.environment, cwd=REPOSITORY, capture_output=True, text=True)
        printed = done.stdout + done.stderr
        if done.returncode != expected:
            raise RuntimeError(f"{command[:3]} ended with {done.returncode}: {printed[-3000:]}")
        return printed

    def rollout(self, *argv: str, expected: int = 0) -> str:
        """Changes what is served with `serve.rollout`; returns what it printed."""
        command = [sys.executable, "-m", "serve.rollout", "--address", self.address, "--url", self.url]
        return self.run([*command, *argv], expected)

    def processes(self) -> dict[int, str]:
        """Returns command lines of all processes of this cluster, by pid."""
        found = {}
        for place in Path("/proc").iterdir():
            try:
                if place.name.isdigit() and self.mark.encode() in (place / "environ").read_bytes():
                    found[int(place.name)] = (place / "cmdline").read_text().replace("\0", " ").strip()
            except OSError:  # ended meanwhile, or not ours to read
                continue
        return {pid: command for pid, command in found.items() if command}

    def end(self) -> None:
        """Ends every process, also those that one starts before it ends itself."""
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while (pids := self.processes()) and time.monotonic() < deadline:
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.1)


def free_ports(number: int) -> list[int]:
    """Returns ports that nobody listens on now."""
    probes = [socket.socket() for _ in range(number)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _wait(url: str, log: Path | None, process: subprocess.Popen | None) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (OSError, urllib.error.URLError):
            pass
        if time.monotonic() > deadline or (process is not None and process.poll() is not None):
            raise RuntimeError(f"{url} does not answer: {log.read_text()[-2000:] if log else ''}")
        time.sleep(0.2)
