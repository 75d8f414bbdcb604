"""The quick start and the page about own data, typed into bash as they stand there, from the top to the end.

Each command is a process of its own: `make demo`, the jobs, `make serve` with curl beside it, and so on. What differs
from a reader's: the demo has fewer users, by variables of the environment; the jobs share the session's Ray, by
RAY_ADDRESS, as jobs of a cluster do; the server takes a free port. What a page marks with what it needs is left out.
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
import tempfile
import time
from pathlib import Path

import documented_commands as documents
import psutil
import pyarrow.dataset as ds
import pytest
from documented_commands import REPOSITORY, Command

VENV = Path(sys.prefix)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (VENV / "bin" / "activate").exists(), reason="needs a virtual environment, as make setup makes"
    ),
]
FEW = {
    "LLM4MSR_DATA__SYNTHETIC__NUM_USERS": "150",
    "LLM4MSR_DATA__SYNTHETIC__NUM_ITEMS": "300",
    "LLM4MSR_DATA__SYNTHETIC__REC_ROWS_PER_USER": "24",
    "LLM4MSR_DATA__SYNTHETIC__SEARCH_ROWS_PER_USER": "16",
    "LLM4MSR_KNOWLEDGE__MAX_EVENTS_PER_SCENARIO": "4",
    "LLM4MSR_TRAIN__MAX_EPOCHS": "3",
    "LLM4MSR_TRAIN__BATCH_SIZE": "256",
}
CHECKOUT = ("Makefile", "pyproject.toml", "constraints.txt", "jobs", "llm4msr", "serve")
COMMAND_S, START_S, STOP_S = 900, 600, 300


class Reader:
    """Types the commands of a page, in a checkout of their own.

    Attributes:
        printed: What each command printed, by its text.
    """

    def __init__(self, folder: Path, ray_address: str, **environment: str) -> None:
        self.folder, self.printed = folder, {}
        for name in CHECKOUT:
            (folder / name).symlink_to(REPOSITORY / name)
        # The suite's own packages, installed just now: make has nothing to do.
        (folder / ".venv").mkdir()
        for path in VENV.iterdir():
            if path.name != ".installed":
                (folder / ".venv" / path.name).symlink_to(path)
        (folder / ".venv" / ".installed").touch()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._ray_folder = tempfile.mkdtemp(prefix="d", dir="/tmp")  # sockets lie there: a short name
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("LLM4MSR_", "MAKE"))}
        cache = {"LLM4MSR_CACHE": os.environ["LLM4MSR_CACHE"]}
        self._environment = inherited | cache | {"RAY_ADDRESS": ray_address, "PORT": str(self._port)} | environment
        self._before: list[str] = []
        self._server: subprocess.Popen | None = None

    def type(self, command: Command) -> None:
        """Runs one command to its end; a server stays."""
        text = command.text.replace("127.0.0.1:8000", f"127.0.0.1:{self._port}").replace("curl -s ", "curl -sS --fail ")
        words = command.simple()[0]
        if words[0] == "source":
            self._before.append(text)
        elif words[:2] == ["make", "serve"]:
            self._serve(text)
        else:
            done = subprocess.run(
                self._bash(text),
                cwd=self.folder,
                env=self._environment,
                capture_output=True,
                text=True,
                timeout=COMMAND_S,
            )
            assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
            self.printed[command.text] = done.stdout + done.stderr

    def _bash(self, text: str) -> list[str]:
        return ["bash", "-c", "\n".join(["set -e", *self._before, text])]

    def _serve(self, text: str) -> None:
        own = {name: value for name, value in self._environment.items() if name != "RAY_ADDRESS"}
        log = self.folder / "server.log"
        with log.open("w") as out:
            self._server = subprocess.Popen(
                self._bash(f"exec {text}"),
                cwd=self.folder,
                env=own | {"RAY_TMPDIR": self._ray_folder},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the foreground group of a terminal, to which Ctrl-C goes
            )
        end = time.monotonic() + START_S
        while "Stop:      Ctrl-C" not in log.read_text():
            assert self._server.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)

    def close(self) -> None:
        """Stops the server as Ctrl-C does, and sees that it ends well."""
        try:
            if self._server is not None:
                started = psutil.Process(self._server.pid).children(recursive=True)
                os.killpg(self._server.pid, signal.SIGINT)
                self._server.wait(STOP_S)
                _, left = psutil.wait_procs(started, STOP_S)
                assert not left, [process.cmdline() for process in left]
                assert "Stopping." in (self.folder / "server.log").read_text()
        finally:
            shutil.rmtree(self._ray_folder, ignore_errors=True)


def walk(page: str, folder: Path, ray, **environment: str) -> Reader:
    """Types all commands of a page that are not marked."""
    reader = Reader(folder, ray.get_runtime_context().gcs_address, **environment)
    try:
        for command in documents.read_page(page):
            if command.mark is None:
                reader.type(command)
    finally:
        reader.close()
    return reader


def printed_by(reader: Reader, part: str) -> str:
    (text,) = [printed for command, printed in reader.printed.items() if part in command]
    return text


def test_quick_start(ray_cluster, tmp_path):
    reader = walk("docs/quickstart.md", tmp_path, ray_cluster, **FEW)

    assert "star + LLM4MSR (shuffled)" in printed_by(reader, "make demo")
    assert "mmoe + LLM4MSR" in printed_by(reader, "--model.backbone mmoe")
    assert "Prompt (" in printed_by(reader, "jobs.explain")
    ranked = json.loads(printed_by(reader, "/v1/rank"))
    assert ranked["scenario"] == "search" and len(ranked["results"]) == 5
    # What the page's table says is left there.
    page = (REPOSITORY / "docs" / "quickstart.md").read_text(encoding="utf-8")
    for name in ("prepared/", "knowledge/", "runs/", "report.json"):
        assert f"`{name}`" in page and (tmp_path / "workspace" / "demo" / name).exists()


def test_own_data(ray_cluster, tmp_path):
    reader = walk("docs/own-data.md", tmp_path, ray_cluster)
    page = (REPOSITORY / "docs" / "own-data.md").read_text(encoding="utf-8")

    (said,) = re.findall(r"says `(\d+ rows of \d+ raw rows)`", page)
    assert said in printed_by(reader, "python -m jobs.prepare")
    refused = printed_by(reader, "rejects.parquet")
    (shown,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    assert re.findall(r"(data/mine/.*)", shown) == re.findall(r"(data/mine/.*)", refused)
    report = json.loads((tmp_path / "workspace" / "mine" / "report.json").read_text())
    auc = {
        (r["scenario"], r["knowledge"]): r["auc"]
        for r in report["results"]
        if r["backbone"] == "star" and r["split"] == "test"
    }
    for scenario in ("home", "search"):
        assert auc[scenario, "llm"] > max(auc[scenario, "none"], auc[scenario, "shuffled"]), auc
    ranked = json.loads(printed_by(reader, "/v1/rank"))
    assert ranked["user_known"] and all(item["known"] for item in ranked["results"])
    (folder,) = (tmp_path / "workspace" / "mine" / "scores").iterdir()
    scored = ds.dataset(sorted((folder / "scores").glob("*.parquet"))).to_table()
    assert len(scored) >= 400
