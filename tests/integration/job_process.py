"""A job as a process that can be killed, and the recipe that it reads."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]


def write_recipe(path: Path, tree: dict[str, Any]) -> Path:
    """Writes a tree as TOML: its plain values are written as in JSON."""

    def lines(section: str, values: dict[str, Any]) -> Iterator[str]:
        if section:
            yield f"[{section}]"
        yield from (f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict))
        for key, value in values.items():
            if isinstance(value, dict):
                yield from lines(f"{section}.{key}".strip("."), value)

    path.write_text("\n".join(lines("", tree)) + "\n")
    return path


def wait_until(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """Waits until something is true and returns it; fails after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {timeout_s} s for {what}"
        time.sleep(0.2)
    return found


class Job:
    """``python -m MODULE`` as a process of its own, and all processes that belong to it.

    Every process that it starts inherits RAY_TMPDIR, by which it is found however it is re-parented or renamed.
    """

    def __init__(self, module: str, recipe_path: Path, project: Path = REPOSITORY, **environment: str) -> None:
        # Unix socket names are limited to about 100 bytes.
        self._folder = tempfile.mkdtemp(prefix="k", dir="/tmp")
        self.log = Path(self._folder) / "log"
        inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with self.log.open("w") as log:
            self.driver = psutil.Popen(
                [sys.executable, "-m", module, "--config", str(recipe_path)],
                cwd=project,
                env=inherited | {"RAY_TMPDIR": self._folder, "PYTHONPATH": str(project)} | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def running(self) -> bool:
        return self.driver.poll() is None

    def processes(self) -> list[psutil.Process]:
        """The driver first, then everything of its Ray that lives."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid != self.driver.pid and process.environ().get("RAY_TMPDIR") == self._folder:
                    found.append(process)
        return ([self.driver] if self.running() else []) + found

    def named(self, kind: str) -> list[psutil.Process]:
        """Its living processes of one kind: driver, raylet, everything, or workers by a part of their title."""
        processes = self.processes()
        if kind == "everything":
            return processes
        if kind == "driver":
            return processes[:1] if self.running() else []
        return titled("/raylet/raylet" if kind == "raylet" else kind, processes)

    def kill(self, kind: str, chance: random.Random) -> None:
        """Sends SIGKILL: to one worker of a title, or to all processes of another kind in any order."""
        found = self.named(kind)
        assert found, f"no {kind} to kill:\n{self.log.read_text()}"
        many = kind in ("driver", "raylet", "everything")
        for process in chance.sample(found, len(found)) if many else [chance.choice(found)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

    def wait(self, timeout_s: float = 120.0) -> int:
        """Waits for the driver to end and returns its exit status."""
        return self.driver.wait(timeout_s)

    def clean(self) -> None:
        """Kills what is left of it, by process id, and removes its folder."""
        end = time.monotonic() + 30
        while left := self.processes():
            assert time.monotonic() < end, left
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            if self.running():
                self.driver.wait(10)
            time.sleep(0.05)
        shutil.rmtree(self._folder, ignore_errors=True)


def titled(title: str, processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those whose title or program has such a part; Ray names its workers after what they run."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if title in (process.cmdline() or [""])[0]:
                found.append(process)
    return found


@contextlib.contextmanager
def started(module: str, recipe_path: Path, project: Path = REPOSITORY, **environment: str) -> Iterator[Job]:
    """A running job; nothing of it is left afterwards."""
    job = Job(module, recipe_path, project, **environment)
    try:
        yield job
    finally:
        job.clean()


def run_job(module: str, recipe_path: Path, project: Path = REPOSITORY) -> tuple[int, str]:
    """Runs the job to its end; returns its exit status and what it printed."""
    with started(module, recipe_path, project) as job:
        return job.wait(), job.log.read_text()
