"""LLM4MSR_LOG_FORMAT=json in real jobs: every line of driver, extraction actors and training workers is one object."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
NATIVE = re.compile(r"\[\d{4}-\d\d-\d\d .* [IWEC] \d+ \d+\] ")  # Ray's own C++ writes past all of Python's logging
FIELDS = {"time", "level", "logger", "message", "job", "run", "stage", "rank", "pid"}
SMALL = {
    "data.synthetic.num_users": "60",
    "data.synthetic.num_items": "200",
    "knowledge.max_events_per_scenario": "3",
    "knowledge.num_actors": "1",
    "model.embedding_dim": "4",
    "model.hidden_dims": "[8]",
    "train.max_epochs": "1",
    "train.num_workers": "1",
    "train.cpus_per_worker": "1",
    "train.batch_size": "256",
    "experiment.knowledge": '["llm"]',
}


def run(module: str, *flags: str) -> tuple[int, list[dict], str]:
    """Runs a job; returns its exit status, the objects on its stderr, and its stdout."""
    folder = tempfile.mkdtemp(prefix="k", dir="/tmp")  # names of sockets are limited to about 100 bytes
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_TMPDIR": folder, "PYTHONPATH": str(REPOSITORY), "LLM4MSR_LOG_FORMAT": "json"}
    command = [sys.executable, "-m", module, "--config", "jobs/recipes/demo.toml", *flags]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = []
    for line in done.stderr.splitlines():
        if NATIVE.match(line):
            continue
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            pytest.fail(f"no JSON: {line}\n{done.stderr[-3000:]}")
        assert isinstance(found[-1], dict) and set(found[-1]) >= FIELDS, line
    return done.returncode, found, done.stdout


@pytest.mark.slow
def test_every_line_of_a_job_and_its_workers_is_one_object(tmp_path):
    root = str(tmp_path / "ws")
    flags = (part for key, value in SMALL.items() for part in (f"--{key}", value))
    status, lines, out = run("jobs.pipeline", "--workspace_uri", root, *flags)
    assert status == 0, lines[-5:]
    assert "Report:" in out
    assert {line["job"] for line in lines} == {"jobs.pipeline"}
    (driver,) = {line["pid"] for line in lines if line["message"] == "== prepare"}
    stages = {line["stage"] for line in lines if line["pid"] == driver}
    assert {"prepare", "extract", "train", "evaluate"} <= stages
    first = next(line for line in lines if line["logger"] == "llm4msr.jobs")
    assert (first["level"], first["run"], first["rank"]) == ("INFO", root, None)
    actors = [line for line in lines if line["message"].startswith("language model loaded")]
    assert actors and all((a["stage"], a["run"], a["rank"]) == ("extract", root, None) for a in actors)
    assert driver not in {actor["pid"] for actor in actors}
    (name,) = [path.name for path in (tmp_path / "ws" / "runs").iterdir()]
    (epoch,) = [line for line in lines if " epoch 0: loss" in line["message"]]
    assert (epoch["logger"], epoch["stage"], epoch["rank"]) == ("llm4msr.training", "train", 0)
    assert epoch["run"] == name and epoch["pid"] != driver


def test_why_a_job_ends_is_one_object(tmp_path):
    status, (line,), out = run("jobs.train", "--workspace_uri", str(tmp_path), "--train.learning_rat", "1")
    assert (status, out, line["level"], line["job"]) == (2, "", "ERROR", "jobs.train")
    assert "Did you mean train.learning_rate?" in line["message"]
