"""What the tests of a disturbed extraction share: prepared data by hand, its recipe, and a job that can be killed."""

from __future__ import annotations

import contextlib
import io
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
from typing import Any, NamedTuple

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from unit.endpoint_server import WIDTH, vector_of

from llm4msr import storage, workspace
from llm4msr.config import Config
from llm4msr.data.prepared import ITEMS_FILE, SCHEMA_FILE, USERS_FILE, bucket_file
from llm4msr.data.splits import bucket_of
from llm4msr.knowledge.place import store_root
from llm4msr.knowledge.table import KnowledgeTable
from llm4msr.schema import Feature, FeatureSchema, Scenario, feature_table_schema, rows_schema
from llm4msr.settings import config_from_dict

REPOSITORY = Path(__file__).resolve().parents[2]
SCHEMA = FeatureSchema(
    (Scenario("search", "users type a query"), Scenario("feed", "an endless list")),
    (Feature("user_id", "categorical", "user", 9), Feature("item_id", "categorical", "item", 9)),
    "int64",
    "string",
)
MODEL = "served-model"


class Row(NamedTuple):
    """One training row; `user` is the raw id, `item` counts from 1."""

    user: int
    item: int
    scenario: int
    label: int
    time_ms: int


class World(NamedTuple):
    """Raw users with their texts, items (row 1 first), and what happened."""

    users: dict[int, str]
    items: list[str]
    rows: list[Row]


def many_users(number: int) -> World:
    """Users 1000 to 1000 + number: every 100th is like the one before it but for the id, every 97th likes nothing."""
    items = [f"item {letter}{digit}" for letter in "abcdefgh" for digit in range(5)]
    users, rows = {}, []
    for i in range(number):
        twin, likes = i - (i % 100 == 1), i % 97 != 50
        users[1000 + i] = f"reader {twin}"
        for event in range(3):
            rows.append(Row(1000 + i, 1 + (twin * 7 + event * 11) % 40, event % 2, int(likes), 100 * event))
    return World(users, items, rows)


def write_prepared(config: Config, name: str, world: World, num_buckets: int = 4) -> None:
    """Writes what `jobs.prepare` would have written, train alone, and points to it."""
    uri = storage.join(workspace.prepared_root(config), name)
    keys = sorted(world.users)
    users = {"key": keys, "text": [world.users[key] for key in keys]}
    items = {"key": [f"i{n}" for n in range(1, len(world.items) + 1)], "text": world.items}
    for source, columns, file in (("user", users, USERS_FILE), ("item", items, ITEMS_FILE)):
        count = len(columns["key"])
        columns = columns | {"num_train_rows": [0] * count, f"{source}_id": list(range(2, count + 2))}
        storage.write_parquet(storage.join(uri, file), pa.table(columns, schema=feature_table_schema(SCHEMA, source)))
    bucket = bucket_of(pa.array([row.user for row in world.rows], pa.int64()), num_buckets)
    row_of = {key: i + 1 for i, key in enumerate(keys)}
    files = []
    for number in np.unique(bucket).tolist():
        rows = [world.rows[i] for i in np.flatnonzero(bucket == number)]
        columns = {
            "row_id": np.flatnonzero(bucket == number),
            "user_row": [row_of[row.user] for row in rows],
            "item_row": [row.item for row in rows],
            "scenario": [row.scenario for row in rows],
            "label": [row.label for row in rows],
            "timestamp_ms": [row.time_ms for row in rows],
            "position": list(range(len(rows))),
        }
        file = bucket_file("train", number)
        storage.write_parquet(storage.join(uri, file), pa.table(columns).cast(rows_schema(SCHEMA)))
        files.append({"file": file, "num_rows": len(rows)})
    storage.write_json(storage.join(uri, SCHEMA_FILE), SCHEMA.to_json())
    manifest = {"kind": "prepared", "files": {"train": files}, "num_buckets": num_buckets, "data": {}}
    storage.write_manifest(uri, manifest)
    storage.write_json(workspace.prepared_pointer_uri(config), {"directory": name})


def recipe(root: str, url: str, **knowledge: Any) -> dict[str, Any]:
    """The tree of a configuration whose vectors come from the endpoint at `url`."""
    settings = {"engine": "openai", "model": MODEL, "num_actors": 2, "rows_per_commit": 16} | knowledge
    settings["openai"] = {"base_url": url} | settings.get("openai", {})
    return {"workspace_uri": root, "knowledge": settings}


def make_config(root: str, url: str, **knowledge: Any) -> Config:
    return config_from_dict(recipe(root, url, **knowledge))


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


def summary(uri: str) -> dict[str, Any]:
    return storage.read_json(storage.join(uri, "summary.json"))


def prompts(uri: str) -> list[dict[str, Any]]:
    """The prompts of an extraction: level, subject_id, subject_row, key and text of each."""
    names = ["level", "subject_id", "subject_row", "key", "text"]
    return storage.read_parquet(storage.join(uri, "prompts"), names).to_pylist()


def part_files(config: Config) -> list[str]:
    """Every finished part of every store, found without the project's own listing."""
    fs, path = storage.filesystem(store_root(config))
    fs.invalidate_cache()
    found = fs.find(path) if fs.exists(path) else []
    return sorted(name for name in found if name.rsplit("/", 1)[-1].startswith("part-"))


def stored_rows(config: Config) -> list[dict[str, Any]]:
    """Every row of every part, read as plain Parquet files."""
    fs, _ = storage.filesystem(store_root(config))
    return [row for name in part_files(config) for row in pq.read_table(io.BytesIO(fs.cat_file(name))).to_pylist()]


def check_table(uri: str, failed: Sequence[str] = ()) -> KnowledgeTable:
    """Compares every vector of a table with what the endpoint answers to the prompt; subjects in `failed` have none."""
    table = KnowledgeTable.load(uri)
    given = {"user": np.zeros_like(table.user_index_N), "item": np.zeros_like(table.item_index_N)}
    for prompt in prompts(uri):
        row, expected = prompt["subject_row"], np.array(vector_of(prompt["text"]), np.float16)
        if prompt["subject_id"] in failed:
            expected = np.zeros(WIDTH, np.float16)
        else:
            given.get(prompt["level"], np.zeros(len(SCHEMA.scenarios)))[row] = 1
        vectors, index = {
            "user": (table.users_NK, table.user_index_N),
            "item": (table.items_NK, table.item_index_N),
            "scenario": (table.scenarios_SK, np.arange(len(SCHEMA.scenarios))),
        }[prompt["level"]]
        np.testing.assert_array_equal(vectors[index[row]], expected, err_msg=prompt["text"])
    np.testing.assert_array_equal(table.user_index_N > 0, given["user"])
    np.testing.assert_array_equal(table.item_index_N > 0, given["item"])
    return table


def wait_until(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """Waits until something is true and returns it; fails after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {timeout_s} s for {what}"
        time.sleep(0.2)
    return found


class Job:
    """``python -m jobs.extract`` as a process of its own, and all processes that belong to it.

    Every process that it starts inherits RAY_TMPDIR, by which it is found however it is re-parented or renamed.
    """

    def __init__(self, recipe_path: Path, project: Path = REPOSITORY, **environment: str) -> None:
        # Unix socket names are limited to about 100 bytes.
        self._folder = tempfile.mkdtemp(prefix="k", dir="/tmp")
        self.log = Path(self._folder) / "log"
        inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with self.log.open("w") as log:
            self.driver = psutil.Popen(
                [sys.executable, "-m", "jobs.extract", "--config", str(recipe_path)],
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
        """Its living processes of one kind: driver, actor, raylet, everything."""
        processes = self.processes()
        if kind == "everything":
            return processes
        if kind == "driver":
            return processes[:1] if self.running() else []
        return titled({"actor": "EncodeUnit", "raylet": "/raylet/raylet"}[kind], processes)

    def kill(self, kind: str, chance: random.Random) -> None:
        """Sends SIGKILL: to one actor, or to all processes of another kind in any order."""
        found = self.named(kind)
        assert found, f"no {kind} to kill:\n{self.log.read_text()}"
        for process in [chance.choice(found)] if kind == "actor" else chance.sample(found, len(found)):
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
def started(recipe_path: Path, project: Path = REPOSITORY, **environment: str) -> Iterator[Job]:
    """A running job; nothing of it is left afterwards."""
    job = Job(recipe_path, project, **environment)
    try:
        yield job
    finally:
        job.clean()


def run_job(recipe_path: Path, project: Path = REPOSITORY) -> tuple[int, str]:
    """Runs the job to its end; returns its exit status and what it printed."""
    with started(recipe_path, project) as job:
        return job.wait(), job.log.read_text()
