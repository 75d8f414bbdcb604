"""Whole stages and jobs on a store that stumbles, lags or refuses: the same result, or one line and status 2."""

from __future__ import annotations

import os
import random
import re

import extract_world as extracting
import job_process as processes
import pytest
import torch
import train_world as training
from s3_faults import DENIED, EXPIRED, Fault, faulty, fresh, slow_down
from unit.endpoint_server import serve

from llm4msr import storage, workspace
from llm4msr.knowledge.place import knowledge_uri
from llm4msr.settings import config_from_dict
from llm4msr.training.state import TrainState, load_state, newest_state, save_best, save_state

pytestmark = pytest.mark.slow


@pytest.fixture
def store(s3_server):
    """The proxy alone: who is to go through it is told its address."""
    with faulty(os.environ["AWS_ENDPOINT_URL"]) as running:
        yield running


@pytest.fixture
def through(store, monkeypatch):
    """This process goes through the proxy, with two tries of each request."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    fresh()
    yield store
    monkeypatch.undo()
    fresh()


class Stumbling(list):
    """Faults that come by chance, to every eighth request, one of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.chance = random.Random(7)

    def __iter__(self):
        if self.chance.random() < 1 / 8:
            code = {"status": 500, "code": "InternalError", "message": "We encountered an internal error."}
            kinds = [
                Fault("error"),
                Fault("error", **code),
                Fault("reset"),
                Fault("lost"),
                Fault("cut", ("GetObject",)),
            ]
            return iter([self.chance.choice(kinds)])
        return iter([])


def prepare_recipe(root: str) -> dict:
    data = {"kind": "synthetic", "num_buckets": 2}
    return {"workspace_uri": root, "data": data | {"synthetic": {"num_users": 60, "num_items": 40, "num_shards": 2}}}


def tables(uri: str) -> dict:
    """What a prepared directory holds, by name."""
    found = {name.removeprefix(uri): storage.read_parquet(name) for name, _ in storage.list_files(uri, ".parquet")}
    return found | {"rows": storage.read_manifest(uri, "")["data"]["rows"]}


def test_a_stumbling_store_changes_nothing_prepared_or_extracted(store, bucket, tmp_path):
    root = f"s3://{bucket}/ws"
    store.faults = Stumbling()
    through = {"AWS_ENDPOINT_URL": store.url, "AWS_MAX_ATTEMPTS": "10"}
    with serve() as endpoint:
        recipes = {
            uri: prepare_recipe(uri) | {"knowledge": extracting.recipe(uri, endpoint.url)["knowledge"]}
            for uri in (root, str(tmp_path / "ws"))
        }
        for uri, recipe in recipes.items():
            path = processes.write_recipe(tmp_path / "recipe.toml", recipe)
            for job in ("jobs.prepare", "jobs.extract"):
                with processes.started(job, path, **(through if uri == root else {})) as running:
                    assert running.wait(500) == 0, running.log.read_text()
    assert len(store.given) > 20 and {"GetObject", "PutObject"} <= {request.verb for request in store.given}
    there, here = (config_from_dict(recipe) for recipe in recipes.values())
    assert tables(workspace.prepared_uri(there)) == tables(workspace.prepared_uri(here))
    names = [storage.list_files(knowledge_uri(config), ".npy") for config in (there, here)]
    assert len(names[0]) == len(names[1]) > 0
    for (one, _), (other, _) in zip(*names, strict=True):
        with storage.open_file(one) as a, storage.open_file(other) as b:
            assert a.read() == b.read(), one


def test_a_training_goes_on_over_a_stumbling_store(store, bucket, tmp_path):
    root = f"s3://{bucket}/ws"
    task, path = training.make_workspace(root, tmp_path, num_rows=1000, max_epochs=2)
    store.faults = Stumbling()
    with processes.started("jobs.train", path, AWS_ENDPOINT_URL=store.url, AWS_MAX_ATTEMPTS="10") as running:
        assert running.wait(500) == 0, running.log.read_text()
    assert len(store.given) > 10
    local, _ = training.make_workspace(str(tmp_path / "ws"), tmp_path, num_rows=1000, max_epochs=2)
    with processes.started("jobs.train", tmp_path / "recipe.toml") as running:
        assert running.wait(500) == 0, running.log.read_text()
    assert training.outcome(task) == training.outcome(local)
    assert training.weights(task) == training.weights(local)


@pytest.mark.parametrize(
    ("job", "fault", "said"),
    [
        (
            "jobs.prepare",
            EXPIRED,
            r"\(ExpiredToken\) .*: The provided token has expired\.; the credentials have",
        ),
        ("jobs.train", DENIED, r"\(AccessDenied\) .*: Access Denied; these credentials may not do this: list, read, w"),
        ("jobs.train", slow_down(None), r"\((SlowDown|503)\) .*; the store throttles: run fewer processes at once"),
        (
            "jobs.prepare",
            Fault("reset", times=None),
            r"\w+Error: .*; the store or the way to it is disturbed: see",
        ),
    ],
    ids=["expired", "denied", "throttled", "reset"],
)
def test_a_store_that_refuses_for_ever_is_one_line_and_status_2(job, fault, said, store, bucket, tmp_path):
    root = f"s3://{bucket}/ws"
    path = processes.write_recipe(tmp_path / "recipe.toml", prepare_recipe(root))
    if job == "jobs.train":
        _, path = training.make_workspace(root, tmp_path, num_rows=300)
    store.faults = [fault]
    with processes.started(job, path, AWS_ENDPOINT_URL=store.url, AWS_MAX_ATTEMPTS="2") as running:
        status, printed = running.wait(300), running.log.read_text()
    assert status == 2 and "Traceback" not in printed, printed
    last = printed.splitlines()[-1]
    assert re.fullmatch(rf"python -m {job}: {root}/\S+ cannot be \w+; object store: .*{said}.*", last), printed


def test_keys_that_run_out_in_the_middle_lose_nothing(store, bucket, tmp_path):
    """Of a training, on its way: the line names the place, and with new keys the same command goes on."""
    task, path = training.make_workspace(f"s3://{bucket}/ws", tmp_path, num_rows=2000, max_epochs=3)
    settings = {"AWS_ENDPOINT_URL": store.url, "AWS_MAX_ATTEMPTS": "2"}
    with processes.started("jobs.train", path, **settings) as running:
        processes.wait_until(lambda: training.states(task) or not running.running(), 300, "the first checkpoint")
        store.faults = [EXPIRED]
        status, printed = running.wait(300), running.log.read_text()
    assert status == 2 and "Traceback" not in printed, printed
    assert "ExpiredToken" in printed.splitlines()[-1] and "get new ones" in printed.splitlines()[-1]
    left = training.states(task)
    assert left
    store.faults = []
    with processes.started("jobs.train", path, **settings) as running:
        assert running.wait(500) == 0, running.log.read_text()
    straight, _ = training.make_workspace(str(tmp_path / "ws"), tmp_path, num_rows=2000, max_epochs=3)
    with processes.started("jobs.train", tmp_path / "recipe.toml") as running:
        assert running.wait(500) == 0, running.log.read_text()
    assert training.weights(task) == training.weights(straight)


# ---------------------------------------------------------------- states of a training, read and written here


def state_of(step: int, best: dict | None) -> TrainState:
    return TrainState(run="run", schema="schema", step=step, epoch=step, best_epoch=step, best_file=best)


def save(uri: str, step: int) -> str:
    model = {"w": torch.full((4,), float(step))}
    best = save_best(uri, step, model)
    return save_state(uri, state_of(step, best), model, {"m": torch.zeros(4)}, 1, {})


def test_a_listing_that_lags_costs_no_checkpoint(through, bucket):
    uri = f"s3://{bucket}/training"
    save(uri, 1)
    through.faults = [Fault("stale", ("ListObjects",), None, hidden="step-000000002")]
    place = save(uri, 2)
    through.faults = []
    assert newest_state(uri, "run", "schema") == place
    assert load_state(place, "run", "schema").model["w"].tolist() == [2.0] * 4


@pytest.mark.parametrize("fault", [EXPIRED, slow_down(None), Fault("cut", ("GetObject",), None)])
def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_a_damaged_one(fault, through, bucket):
    uri = f"s3://{bucket}/training"
    place = save(uri, 1)
    through.faults = [Fault(**(vars(fault) | {"verbs": ("GetObject",), "times": None}))]
    with pytest.raises(storage.RemoteError, match=rf"{place}/\S+ cannot be read; object store"):
        newest_state(uri, "run", "schema")
    through.faults = []
    assert newest_state(uri, "run", "schema") == place


# ---------------------------------------------------------------- a listing that lags, in the stages that list


@pytest.mark.parametrize("hidden", ["events/bucket-00000/00001", "users/00001"])
def test_prepare_misses_no_row_that_is_listed_late(hidden, store, bucket, tmp_path):
    root = f"s3://{bucket}/ws"
    path = processes.write_recipe(tmp_path / "recipe.toml", prepare_recipe(root))
    store.faults = [Fault("stale", ("ListObjects",), None, hidden=hidden)]
    with processes.started("jobs.prepare", path, AWS_ENDPOINT_URL=store.url) as running:
        status, printed = running.wait(300), running.log.read_text()
    assert status == 2 and "Traceback" not in printed, printed
    assert re.search(
        r"jobs.prepare: .*\.staging: \d+ (files|rows) were written, \d+ were found again: the store lists late",
        printed.splitlines()[-1],
    )
    assert not any(name.endswith("manifest.json") for name, _ in storage.list_files(f"{root}/prepared"))


def test_an_extraction_misses_no_part_that_is_listed_late(store, bucket, tmp_path):
    root = f"s3://{bucket}/ws"
    with serve() as endpoint:
        config = extracting.make_config(root, endpoint.url)
        extracting.write_prepared(config, "first", extracting.many_users(60))
        path = processes.write_recipe(tmp_path / "recipe.toml", extracting.recipe(root, endpoint.url))
        store.faults = [Fault("stale", ("ListObjects",), None, hidden="part-[0-7]")]
        with processes.started("jobs.extract", path, AWS_ENDPOINT_URL=store.url) as running:
            status, printed = running.wait(300), running.log.read_text()
        assert status == 2 and "Traceback" not in printed, printed
        assert "have neither vector nor error though all were encoded" in printed.splitlines()[-1]
        num_asked = len(endpoint.requests)
        store.faults = []
        with processes.started("jobs.extract", path, AWS_ENDPOINT_URL=store.url) as running:
            assert running.wait(300) == 0, running.log.read_text()
        assert len(endpoint.requests) == num_asked  # nothing was lost, so nothing is done again
    extracting.check_table(knowledge_uri(config))
