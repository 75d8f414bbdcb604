"""Processes of an extraction are killed while it encodes: every key is there once, and little is done twice."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import re
import shutil
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import extract_world as world
import job_process as processes
import psutil
import pytest
from unit.endpoint_server import EndpointServer, serve, vector_of

from llm4msr import storage
from llm4msr.config import Config
from llm4msr.knowledge.pipeline import extract
from llm4msr.knowledge.place import knowledge_uri, store_root
from llm4msr.knowledge.store import KnowledgeStore
from llm4msr.knowledge.table import KnowledgeTable
from llm4msr.settings import config_from_dict

pytestmark = pytest.mark.slow

NUM_USERS, ROWS_PER_COMMIT, NUM_ACTORS = 480, 16, 2
ACTOR = "EncodeUnit"
KILLS = ("driver", ACTOR, ACTOR, "raylet", "everything")
REQUEST_S = 0.5  # two requests at once are one unit
MAX_DELAY_S = 1.5  # from the first commit to the kill


@pytest.fixture
def chance() -> random.Random:
    """Another seed each time; EXTRACT_KILL_SEED repeats one. pytest shows it where a test fails."""
    seed = int(os.environ.get("EXTRACT_KILL_SEED", time.time_ns() % 1_000_000))
    print(f"\nEXTRACT_KILL_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def server() -> Iterator[EndpointServer]:
    with serve() as running:
        yield running


@pytest.mark.parametrize("place", ["local", "s3"])
def test_killed_at_five_moments(place, ray_cluster, tmp_path, server, chance, request):
    root = str(tmp_path / "ws") if place == "local" else f"s3://{request.getfixturevalue('bucket')}/ws"
    kills = chance.sample(KILLS, len(KILLS))
    server.delay_s = lambda _: REQUEST_S
    settings = {"num_actors": NUM_ACTORS, "rows_per_commit": ROWS_PER_COMMIT, "openai": {"max_in_flight": 2}}
    config = world.make_config(root, server.url, **settings)
    world.write_prepared(config, "first", world.many_users(NUM_USERS))
    path = processes.write_recipe(tmp_path / "recipe.toml", world.recipe(root, server.url, **settings))
    committed = run_until_finished(path, config, kills, chance)
    num_units = check_store(config)
    world.check_table(knowledge_uri(config))
    check_work(server, config, len(kills))
    print(f"{len(kills)} kills, after {committed} of {num_units} commits")
    assert sum(number < num_units for number in committed) >= 4, "the kills fell after the encoding"

    num_requests = len(server.requests)
    assert extract(config) == knowledge_uri(config)
    assert len(server.requests) == num_requests


def run_until_finished(path: Path, config: Config, kills: list[str], chance: random.Random) -> list[int]:
    """Runs and kills the job, `kills` one by one, then lets it finish; returns the commits there were at each kill."""
    committed = []
    waiting = list(kills)
    while True:
        with processes.started("jobs.extract", path) as job:
            while waiting:
                before = len(world.part_files(config))
                processes.wait_until(
                    lambda n=before, j=job: len(world.part_files(config)) > n or not j.running(), 90, "work"
                )
                assert job.running(), f"it ended before it was killed:\n{job.log.read_text()}"
                time.sleep(chance.uniform(0, MAX_DELAY_S))
                kind = waiting.pop(0)
                job.kill(kind, chance)
                committed.append(len(world.part_files(config)))
                print(f"killed {kind} after {committed[-1]} commits")
                if kind != ACTOR:
                    leave_half_a_part(config)
                    break
            else:
                status = job.wait()
                assert status == 0, job.log.read_text()
                return committed
            assert job.wait() != 0


def leave_half_a_part(config: Config) -> None:
    """Leaves on a local disk what a kill in the middle of a commit does, which these kills seldom hit."""
    if storage.is_local(store_root(config)):
        part = Path(world.part_files(config)[0])
        part.with_name(f".{part.name}.{uuid.uuid4().hex}").write_bytes(part.read_bytes()[:100])


def check_store(config: Config) -> int:
    """Checks the parts as plain files against the prompts; returns how many commits make them."""
    prompts = {prompt["key"]: prompt["text"] for prompt in world.prompts(knowledge_uri(config))}
    rows = world.stored_rows(config)
    assert Counter(row["key"] for row in rows) == Counter(dict.fromkeys(prompts, 1))
    assert all(row["error"] is None and row["vector"] == vector_of(prompts[row["key"]]) for row in rows)
    (identity,) = {name.rsplit("/", 2)[-2] for name in world.part_files(config)}
    stored = storage.read_json(storage.join(store_root(config), identity, "identity.json"))
    index = KnowledgeStore(store_root(config), stored).index()
    assert sorted(index.keys_N.tolist()) == sorted(key.rstrip(b"\0") for key in prompts)
    assert [uri.rsplit("/", 1)[-1] for uri in index.parts] == [n.rsplit("/", 1)[-1] for n in world.part_files(config)]
    return math.ceil(len(prompts) / ROWS_PER_COMMIT)


def check_work(server: EndpointServer, config: Config, num_kills: int) -> None:
    """Checks by the endpoint's count how much was done more than once."""
    times = Counter(text for request in server.requests for text in request.texts)
    assert set(times) == {prompt["text"] for prompt in world.prompts(knowledge_uri(config))}
    num_repeated = sum(times.values()) - len(times)
    print(f"{len(times)} texts, {num_repeated} embedded again")
    assert num_repeated <= num_kills * NUM_ACTORS * ROWS_PER_COMMIT


@contextlib.contextmanager
def killing(title: str, config: Config) -> Iterator[None]:
    """Kills one of this session's Ray processes with such a title once there are two commits."""

    def kill() -> None:
        processes.wait_until(lambda: len(world.part_files(config)) >= 2, 90, "the first commits")
        processes.titled(title, psutil.Process().children(recursive=True))[0].kill()

    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill)
        yield
        killed.result()


def test_a_dead_actor_is_replaced(ray_cluster, tmp_path, caplog):
    config = config_from_dict(
        {
            "workspace_uri": str(tmp_path),
            "knowledge": {"num_actors": 2, "cpus_per_actor": 1, "rows_per_commit": 32, "dtype": "float32"},
        }
    )
    world.write_prepared(config, "first", world.many_users(600))
    with caplog.at_level(logging.INFO, "llm4msr.knowledge"), killing("EncodeUnit", config):
        uri = extract(config)
    found = world.summary(uri)
    assert (found["num_failed"], found["num_actors"], found["num_encoded"]) == (0, 3, found["num_distinct_prompts"])
    rows = world.stored_rows(config)
    assert sorted(row["key"] for row in rows) == sorted({prompt["key"] for prompt in world.prompts(uri)})
    assert KnowledgeTable.load(uri).num_users_with_knowledge == 594
    (num_done,) = re.findall(r"encoded (\d+) prompts in", caplog.text)
    assert 0 <= int(num_done) - found["num_encoded"] <= 32


def test_without_the_figures_the_work_goes_on(ray_cluster, tmp_path, server):
    """The actor that adds up what is done holds nothing that the table needs."""
    config = world.make_config(str(tmp_path), server.url, openai={"max_in_flight": 2})
    world.write_prepared(config, "first", world.many_users(200))
    server.delay_s = lambda _: 0.2
    with killing("_Tally", config):
        uri = extract(config)
    world.check_table(uri)
    found = world.summary(uri)
    assert found["num_encoded"] == found["num_distinct_prompts"]
    assert 0 < found["prompts_per_second"] < 400 and found["encode_seconds"] < 60


def test_a_lost_node_costs_its_units_only(tmp_path, server, monkeypatch):
    """Two nodes as processes of this machine, one actor on each; the second goes without a word."""
    from ray.cluster_utils import Cluster

    server.delay_s = lambda _: 0.4
    settings = {"num_actors": [1, 2], "cpus_per_actor": 1, "openai": {"max_in_flight": 2}}
    config = world.make_config(str(tmp_path / "ws"), server.url, **settings)
    world.write_prepared(config, "first", world.many_users(400))
    path = processes.write_recipe(tmp_path / "recipe.toml", world.recipe(config.workspace_uri, server.url, **settings))
    monkeypatch.setenv("PYTHONPATH", str(processes.REPOSITORY))  # of the second node's workers
    folder = tempfile.mkdtemp(prefix="n", dir="/tmp")  # Unix socket names are limited to about 100 bytes
    cluster = Cluster(True, head_node_args={"num_cpus": 1, "include_dashboard": False, "temp_dir": folder})
    try:
        lost = cluster.add_node(num_cpus=1)
        raylet = psutil.Process(lost.all_processes["raylet"][0].process.pid)
        with processes.started("jobs.extract", path, RAY_ADDRESS=cluster.address) as job:
            processes.wait_until(
                lambda: len(world.part_files(config)) >= 4 or not job.running(), 90, "the first commits"
            )
            assert job.running(), job.log.read_text()
            assert processes.titled("EncodeUnit", raylet.children())
            cluster.remove_node(lost, allow_graceful=False)
            status = job.wait(200)
            assert status == 0, job.log.read_text()
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    uri = knowledge_uri(config)
    world.check_table(uri)
    keys = [row["key"] for row in world.stored_rows(config)]
    assert sorted(keys) == sorted({prompt["key"] for prompt in world.prompts(uri)})
    num_sent = sum(len(request.texts) for request in server.requests)
    assert num_sent - len(keys) <= config.knowledge.rows_per_commit
