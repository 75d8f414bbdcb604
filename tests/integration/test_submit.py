"""`make submit` against a real head with a second node and a token: every job, its exit, its id, its cancellation."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import pytest

from benchmarks.serve_sides import free_ports
from llm4msr import storage

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (REPOSITORY / ".venv" / ".installed").exists(), reason="needs the .venv that make setup makes"
    ),
]
MOST_UPLOADED_BYTES = 5_000_000
TINY = {
    "data.synthetic.num_users": "150",
    "data.synthetic.num_items": "300",
    "knowledge.max_events_per_scenario": "4",
    "model.embedding_dim": "8",
    "model.hidden_dims": "[32]",
    "train.max_epochs": "2",
    "train.batch_size": "256",
    "experiment.knowledge": '["llm"]',
}


class Head:
    """A head and a worker node, as `ray start` makes them, with Ray's token asked for."""

    def __init__(self) -> None:
        # Short names: Ray's sockets lie there. Two folders: nodes unpack what is uploaded, each for itself.
        self.folder, worker_folder = (Path(tempfile.mkdtemp(prefix="s", dir="/tmp")) for _ in range(2))
        gcs, self.dashboard, agent, worker_agent, metrics, worker_metrics = free_ports(6)
        self.mark = f"SUBMIT_TEST_MARK={self.folder}"
        self.token = secrets.token_hex(16)
        inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.environment = inherited | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard}",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # the nodes' python
            **dict([self.mark.split("=", 1)]),
        }
        node = ["--num-cpus=2", "--object-store-memory=150000000", "--disable-usage-stats"]
        head = ["--head", f"--port={gcs}", f"--dashboard-port={self.dashboard}", "--include-dashboard=true"]
        head += ["--node-ip-address=127.0.0.1", f"--temp-dir={self.folder}"]
        self.ray("start", *head, *node, f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}")
        worker = [f"--address=127.0.0.1:{gcs}", "--node-ip-address=127.0.0.1", f"--temp-dir={worker_folder}"]
        worker += [f"--dashboard-agent-listen-port={worker_agent}", f"--metrics-export-port={worker_metrics}"]
        self.ray("start", *worker, *node)

    def ray(self, *arguments: str) -> str:
        done = subprocess.run(
            [str(Path(sys.executable).parent / "ray"), *arguments],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, job: str, workspace_uri: str, name: str, **changes: str) -> subprocess.Popen:
        """Types ``make submit``."""
        flags = TINY | {"workspace_uri": workspace_uri} | changes
        arguments = " ".join(f"--{key} '{value}'" for key, value in flags.items())
        return subprocess.Popen(
            ["make", "submit", f"JOB={job}", f"ID={name}", f"ARGS={arguments}"],
            env=self.environment,
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def submit(self, job: str, workspace_uri: str, name: str, **changes: str) -> tuple[int, str]:
        """Types ``make submit`` and waits; returns its exit status and what it printed."""
        process = self.start(job, workspace_uri, name, **changes)
        printed, _ = process.communicate(timeout=300)
        return process.returncode, printed

    def get(self, path: str, token: str | None = None) -> httpx.Response:
        headers = {"authorization": f"Bearer {token or self.token}"} if token != "" else {}
        return httpx.get(f"http://127.0.0.1:{self.dashboard}{path}", headers=headers, timeout=30)

    def job(self, name: str) -> dict:
        return next(job for job in self.get("/api/jobs/").json() if job["submission_id"] == name)

    def end(self) -> None:
        for place in Path("/proc").iterdir():
            try:
                if place.name.isdigit() and self.mark.encode() in (place / "environ").read_bytes():
                    os.kill(int(place.name), signal.SIGKILL)
            except OSError:  # ended meanwhile, or not ours to read
                continue


@pytest.fixture(scope="module")
def head(s3_server):
    head = Head()
    yield head
    head.end()


@pytest.fixture(scope="module")
def workspace_uri(s3_server) -> str:
    s3_server.create_bucket(Bucket="submitted")
    return "s3://submitted/workspace"


def test_the_jobs_run_one_after_another(head, workspace_uri):
    assert head.get("/api/jobs/", token="").status_code == 401
    assert head.get("/api/jobs/", token="wrong").status_code in (401, 403)
    nodes = head.get("/nodes?view=summary").json()["data"]["summary"]
    assert sum(node["raylet"]["state"] == "ALIVE" for node in nodes) == 2
    for job in ("prepare", "extract", "train", "evaluate", "pipeline", "score"):
        status, printed = head.submit(job, workspace_uri, f"first-{job}")
        assert status == 0 and "succeeded" in printed, printed[-3000:]
    report = storage.read_json(f"{workspace_uri}/report.json")
    assert {row["knowledge"] for row in report["results"]} == {"none", "llm"}  # none: the item mean
    assert storage.list_files(f"{workspace_uri}/scores")


def test_little_is_uploaded(head, workspace_uri):
    status, printed = head.submit("prepare", workspace_uri, "uploaded")
    assert status == 0, printed
    packages = [p for p in head.folder.glob("session_latest/runtime_resources/working_dir_files/*") if p.is_dir()]
    assert packages
    for folder in packages:
        files = [path for path in folder.rglob("*") if path.is_file()]
        top = {path.relative_to(folder).parts[0] for path in files}
        assert sum(path.stat().st_size for path in files) < MOST_UPLOADED_BYTES
        assert top >= {"jobs", "llm4msr", "serve"}
        assert not top & {".git", ".venv", "tests", "docs", "build", "benchmarks"}


def test_an_id_is_taken_once(head, workspace_uri):
    assert head.submit("prepare", workspace_uri, "once")[0] == 0
    status, printed = head.submit("prepare", workspace_uri, "once")
    assert status != 0 and "once" in printed


def test_a_mistake_ends_with_its_message(head, workspace_uri):
    status, printed = head.submit("train", workspace_uri, "mistake", **{"train.learning_rte": "1"})
    assert status != 0
    assert "train.learning_rate" in printed
    job = head.job("mistake")
    assert (job["status"], job["driver_exit_code"]) == ("FAILED", 2)


def test_a_job_that_is_stopped_goes_on(head, workspace_uri):
    assert head.submit("prepare", workspace_uri, "before-it")[0] == 0
    long = {"train.max_epochs": "200", "train.patience": "200", "experiment.knowledge": '["none"]'}
    assert stopped_epoch(head, workspace_uri, "stopped", at_least=3, **long) == 3
    assert stopped_epoch(head, workspace_uri, "again", at_least=0, **long) >= 3  # it went on, and did not begin anew


def stopped_epoch(head: Head, workspace_uri: str, name: str, at_least: int, **settings: str) -> int:
    """Starts a training, stops it as soon as it tells of an epoch, and returns the epoch's number."""
    process = head.start("train", workspace_uri, name, **settings)
    printed, found = [], None
    for line in process.stdout:
        printed.append(line)
        found = re.search(r"epoch (\d+)", line)
        if found and int(found[1]) >= at_least:
            break
    else:
        pytest.fail("".join(printed)[-3000:])
    head.ray("job", "stop", name)
    process.communicate(timeout=120)  # its exit status is 0: Ray's command takes a stopped job for no failure
    assert head.job(name)["status"] == "STOPPED"
    return int(found[1])
