"""cluster/local.yaml on hosts with a network of their own: `ray up`, a pipeline, two hosts lost on its way, `ray down`.

What is run are the files of `cluster/` and the commands of docs/cluster.md. Only the packages are not fetched: the
hosts' environment sees this environment's.
"""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import venv
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import namespace_hosts
import numpy as np
import pyarrow.parquet as pq
import pytest
from cluster_files import REPOSITORY
from namespace_hosts import HOME, Host, Network, network, wait_for

from llm4msr.knowledge.table import KnowledgeTable

WHY_NOT = namespace_hosts.why_not()
pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.timeout(2400),
]
PARTS = ("cluster", "llm4msr", "jobs", "serve", "pyproject.toml", "README.md", "LICENSE", "constraints.txt")
CHECKOUT = f"{HOME}/checkout"
BUCKET = "hosts"
AWS_CONFIG = """[default]
aws_access_key_id = testing
aws_secret_access_key = testing
region = us-east-1
endpoint_url = http://{}:9000
"""
ENVIRONMENT = {
    "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8265",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN_PATH": f"{HOME}/.llm4msr-cluster/auth_token",
    "AWS_CONFIG_FILE": f"{HOME}/.llm4msr-cluster/aws_config",
    "PYTHON": sys.executable,
}
ASK = "import sys, httpx; print(httpx.get(sys.argv[1], headers={'authorization': 'Bearer ' + sys.argv[2]}).text)"
FETCH = "import sys, s3fs; s3fs.S3FileSystem().get(sys.argv[1], sys.argv[2], recursive=True)"
# Prints the objects below a place whose names match, once there are so many.
LIST = """
import re, sys, time, s3fs
store = s3fs.S3FileSystem(use_listings_cache=False)
while True:
    found = {n: f for n, f in store.find(sys.argv[1], detail=True).items() if re.search(sys.argv[2], n)}
    if len(found) >= int(sys.argv[3]): break
    time.sleep(0.2)
for name, file in found.items():
    print(file['LastModified'].isoformat(), name)
"""
# One actor and one worker of training on a host, whatever its processors are. No dropout: it would hide other weights
# with another number of workers.
CPUS = os.cpu_count()
SETTINGS = {
    "data.synthetic.num_users": 800,
    "data.synthetic.num_items": 300,
    "data.synthetic.rec_rows_per_user": 10,
    "data.synthetic.search_rows_per_user": 8,
    "knowledge.num_actors": 3,
    "knowledge.cpus_per_actor": CPUS,
    "knowledge.rows_per_commit": 16,
    "model.embedding_dim": 8,
    "model.hidden_dims": [32],
    "model.dropout": 0.0,
    "model.meta.knowledge_dropout": 0.0,
    "train.num_workers": [1, 2],
    "train.cpus_per_worker": CPUS,
    "train.batch_size": 128,
    "train.max_epochs": 6,
    "train.patience": 8,
    "train.checkpoint_every_steps": 20,
    "experiment.knowledge": ["llm"],
}
# One worker adds in another order than two; seen: 4e-5 after three epochs, and no difference of AUC.
LOSS_TOLERANCE, AUC_TOLERANCE = 1e-3, 5e-3


class Site:
    """The hosts of a cluster, an object store, and the desk at which a person types."""

    def __init__(self, network: Network) -> None:
        self.store, self.desk = network.add("store"), network.add("desk")
        self.head, self.first, self.second = (network.add(name, PIP_NO_INDEX="1") for name in ("head", "one", "two"))
        self.nodes = (self.head, self.first, self.second)
        self.checkout = self.desk.home / "checkout"
        environment = network.folder / "environment"
        make_environment(environment)
        for host in self.nodes:
            shutil.copytree(environment, host.home / "llm4msr-env", symlinks=True)
        self.served = self.store.start(f"{sys.executable} -m moto.server -H 0.0.0.0 -p 9000 >/tmp/moto.log 2>&1")
        secrets = self.desk.home / ".llm4msr-cluster"
        secrets.mkdir()
        (secrets / "aws_config").write_text(AWS_CONFIG.format(self.store.address))
        shutil.copy(network.folder / "key", self.desk.home / ".ssh" / "llm4msr")
        self.check_out()
        self.type(f"{sys.executable} -c 'import s3fs; s3fs.S3FileSystem().mkdir(\"{BUCKET}\")'")

    def check_out(self) -> None:
        """Makes a checkout on the desk, with cluster/local.yaml as docs/cluster.md tells."""
        self.checkout.mkdir()
        for part in (*PARTS, ".gitignore", ".rayignore"):
            source = REPOSITORY / part
            if source.is_dir():
                shutil.copytree(source, self.checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, self.checkout)
        path = self.checkout / "cluster" / "local.yaml"
        text = path.read_text()
        for found, set_to in (
            ("CHANGE-ME-HEAD", self.head.address),
            ("CHANGE-ME-HOST-1", self.first.address),
            ("CHANGE-ME-HOST-2", self.second.address),
            ("CHANGE-ME-USER", namespace_hosts.USER),
            ("# ssh_private_key:", "ssh_private_key:"),
            ("ray start --head --num-cpus=0", "ray start --head"),  # as the file says for few hosts
        ):
            assert found in text
            text = text.replace(found, set_to)
        path.write_text(text)

    def type(self, command: str, timeout_s: float = 600) -> str:
        """Types a command at the desk, in the checkout; returns what it printed."""
        return self.desk.run(command, CHECKOUT, timeout_s, **ENVIRONMENT)

    def submit(self, name: str) -> subprocess.Popen:
        """Submits the pipeline, with a workspace of that name."""
        settings = " ".join(f"--{key} '{json.dumps(value)}'" for key, value in SETTINGS.items())
        return self.desk.start(
            f"ray job submit --submission-id {name} --working-dir . -- python -m jobs.pipeline "
            f"--config jobs/recipes/demo.toml --workspace_uri s3://{BUCKET}/{name} {settings} >~/{name}.log 2>&1",
            CHECKOUT,
            **ENVIRONMENT,
        )

    def log(self, name: str) -> str:
        """Returns what a submitted job has printed."""
        return (self.desk.home / f"{name}.log").read_text()

    def finish(self, job: subprocess.Popen, name: str) -> None:
        """Waits for a submitted job, which must succeed."""
        assert job.wait(1800) == 0, self.log(name)[-6000:]

    def alive(self) -> int:
        """Returns how many nodes the cluster has, as its dashboard says."""
        command = f"{sys.executable} -c \"{ASK}\" '{ENVIRONMENT['RAY_API_SERVER_ADDRESS']}/nodes?view=summary'"
        answer = json.loads(self.type(f"{command} $(cat {ENVIRONMENT['RAY_AUTH_TOKEN_PATH']})"))
        return sum(node["raylet"]["state"] == "ALIVE" for node in answer["data"]["summary"])

    def files(self, place: str, pattern: str, at_least: int) -> dict[str, datetime]:
        """Returns the objects below a place of the bucket whose names match, and when each was written.

        Waits until there are so many.
        """
        command = f"{sys.executable} -c \"{LIST}\" {BUCKET}/{place} '{pattern}' {at_least}"
        lines = (line.split() for line in self.type(command, 1200).splitlines())
        return {name: datetime.fromisoformat(moment) for moment, name in lines}

    def fetch(self, name: str) -> Path:
        """Returns a copy of a job's workspace."""
        self.type(f'{sys.executable} -c "{FETCH}" {BUCKET}/{name} {HOME}/{name}')
        return self.desk.home / name


def make_environment(folder: Path) -> None:
    """Makes what a host has in ~/llm4msr-env: a virtual environment that sees this one's packages."""
    venv.create(folder, symlinks=True)
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "borrowed.pth").write_text(site.getsitepackages()[0])
    code = (Path(sys.executable).parent / "ray").read_text().split("\n", 1)[1]
    (folder / "bin" / "ray").write_text(f"#!{HOME}/llm4msr-env/bin/python\n{code}")
    (folder / "bin" / "ray").chmod(0o755)


def only(found: Iterable[Path]) -> Path:
    """Returns the single one of some places."""
    (place,) = found
    return place


def training(workspace: Path) -> dict[str, Any]:
    """Returns what is kept about a workspace's single run."""
    return json.loads(only(workspace.glob("runs/*/checkpoint/metadata.json")).read_text())


def stored(workspace: Path) -> dict[bytes, list[float]]:
    """Returns every vector of a workspace's store by its key, of which none may be there twice."""
    tables = [pq.read_table(file) for file in workspace.glob("knowledge/store/*/part-*.parquet")]
    rows = [row for table in tables for row in table.select(["key", "vector"]).to_pylist()]
    vectors = {row["key"]: row["vector"] for row in rows}
    assert len(vectors) == len(rows)
    return vectors


def measured(workspace: Path) -> dict[tuple[str, ...], tuple[int, float]]:
    """Returns rows and AUC of each line of a workspace's report."""
    rows = json.loads((workspace / "report.json").read_text())["results"]
    return {(row["knowledge"], row["split"], row["scenario"]): (row["num_rows"], row["auc"]) for row in rows}


def left(host: Host) -> list[str]:
    """Returns what of Ray runs on a host, but for the log monitor, of which docs/cluster.md tells."""
    found = [line for line in host.processes() if "/ray/" in line or line.startswith("ray::")]
    return [line for line in found if "log_monitor" not in line]


@pytest.fixture(scope="module")
def up() -> Iterator[Site]:
    """A cluster that `ray up` made."""
    with network() as hosts:
        made = Site(hosts)
        made.type("cluster/prepare.sh cluster/local.yaml")
        # Again where it failed: Ray gives a node 30 s to start, too few on a busy machine.
        made.type("for i in 1 2 3; do ray up -y --no-config-cache cluster/local.yaml && exit; done; exit 1", 1200)
        made.desk.start("ray dashboard cluster/local.yaml >~/dashboard.log 2>&1", CHECKOUT, **ENVIRONMENT)
        made.type("until (true >/dev/tcp/127.0.0.1/8265) 2>&1; do sleep 1; done")
        wait_for(lambda: made.alive() == 3, 600, "the workers")
        yield made


@pytest.fixture(scope="module")
def calm(up) -> Path:
    """The workspace of a pipeline that nothing disturbed."""
    up.finish(up.submit("calm"), "calm")
    return up.fetch("calm")


def test_the_pipeline_runs_on_hosts(calm):
    assert training(calm)["world_size"] == 2  # on two hosts, as one has room for one
    assert len(training(calm)["history"]) == SETTINGS["train.max_epochs"]


def test_two_lost_hosts_change_nothing(up, calm):
    """The first is lost while it encodes, the second while it trains; neither comes back before the job has ended."""
    job = up.submit("lost")
    up.files("lost/knowledge", "/part-", 3)
    # As Ray names a process that runs a unit of the extraction, and a worker of the training.
    wait_for(lambda: up.first.runs("EncodeUnit)).submit"), 600, "the first host to encode")
    up.first.cut()
    cut_at = datetime.now(UTC)
    up.files("lost/runs", r"/training/.*/manifest\.json$", 1)
    assert up.second.runs("RayTrainWorker")
    up.second.cut()
    up.finish(job, "lost")
    assert "going on from s3://" in up.log("lost")

    # What the first was at work on was done elsewhere, once it had been given up.
    assert max(up.files("lost/knowledge", "/part-", 3).values()) - cut_at > timedelta(seconds=20)
    found = up.fetch("lost")
    assert len(stored(found)) > SETTINGS["data.synthetic.num_users"] / 2
    assert stored(found) == stored(calm)
    tables = [KnowledgeTable.load(str(only(w.glob("knowledge/*/users.npy")).parent)) for w in (found, calm)]
    for name in ("users_NK", "user_index_N", "scenarios_SK"):
        np.testing.assert_array_equal(*(getattr(table, name) for table in tables))

    assert training(found)["world_size"] == 1
    for a, b in zip(training(found)["history"], training(calm)["history"], strict=True):
        assert a["epoch"] == b["epoch"]
        assert a["loss"] == pytest.approx(b["loss"], abs=LOSS_TOLERANCE)
        assert a["valid_auc"] == pytest.approx(b["valid_auc"], abs=AUC_TOLERANCE)
    ours, theirs = measured(found), measured(calm)
    assert ours.keys() == theirs.keys()
    for row, (num_rows, auc) in ours.items():
        assert num_rows == theirs[row][0]
        assert auc == pytest.approx(theirs[row][1], abs=AUC_TOLERANCE), row


def test_hosts_come_back_and_go_down(up):
    for host in (up.first, up.second):
        host.mend()
    wait_for(lambda: up.alive() == 3, 600, "the lost hosts")  # the autoscaler starts Ray there again
    up.type("ray down -y cluster/local.yaml")
    wait_for(lambda: not any(left(host) for host in up.nodes), 300, "the hosts to be empty")
