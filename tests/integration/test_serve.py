"""Real HTTP to a real Ray Serve: the deployment file on the session's Ray, and the command with a Ray of its own."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pytest
import yaml
from tiny import tiny_checkpoint, tiny_knowledge, tiny_prepared

from llm4msr import storage
from llm4msr.ranker import Ranker

REPOSITORY = Path(__file__).resolve().parents[2]
DEPLOY_TIMEOUT_S = 300  # a busy machine starts Ray and two replicas in minutes
STOP_TIMEOUT_S = 60
GOOD = {"user": 1000, "scenario": "rec", "items": [7000, 7001, 7002]}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tiny_prepared(str(tmp_path_factory.mktemp("prepared")))


@pytest.fixture(scope="module")
def checkpoint_uri(prepared, tmp_path_factory) -> str:
    return tiny_checkpoint(str(tmp_path_factory.mktemp("run") / "checkpoint"), prepared, tiny_knowledge())


@pytest.fixture(scope="module")
def text_checkpoint_uri(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("text")
    prepared = tiny_prepared(str(folder / "prepared"), user_key_type="string")
    return tiny_checkpoint(str(folder / "checkpoint"), prepared, tiny_knowledge(), seed=1)


@pytest.fixture(scope="module")
def client(ray_cluster, checkpoint_uri, text_checkpoint_uri):
    """serve/config.yaml as it stands, but for what is served and the port; a second application with text ids."""
    from ray import serve as ray_serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load((REPOSITORY / "serve" / "config.yaml").read_text())
    config["http_options"] |= {"host": "127.0.0.1", "port": free_port()}
    (application,) = config["applications"]
    application["args"] = {
        "checkpoint_uri": checkpoint_uri,
        "max_candidates": 100,
        "auth": "off",
        "max_wait_ms": 60_000,
    }
    text = {"name": "text", "route_prefix": "/text", "import_path": application["import_path"]}
    text["args"] = {"checkpoint_uri": text_checkpoint_uri, "num_cpus": 0.5, "auth": "off"}
    config["applications"].append(text)
    ray_serve.start(http_options=config["http_options"])
    try:
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))
        base_url = f"http://127.0.0.1:{config['http_options']['port']}"
        with httpx.Client(base_url=base_url, timeout=30) as client:
            deadline = time.monotonic() + DEPLOY_TIMEOUT_S
            while {s.status for s in ray_serve.status().applications.values()} != {"RUNNING"}:
                assert time.monotonic() < deadline, ray_serve.status()
                time.sleep(0.2)
            while client.get("/healthz").status_code != 200 or client.get("/text/healthz").status_code != 200:
                assert time.monotonic() < deadline, "the proxy has no route to the applications"
                time.sleep(0.1)
            yield client
    finally:
        ray_serve.shutdown()


def test_health(client):
    answer = client.get("/healthz")

    assert (answer.status_code, answer.json()) == (200, {"status": "ok", "model_version": "tiny-0"})


def test_model(client):
    model = client.get("/v1/model").json()

    assert model["model_version"] == "tiny-0"
    assert (model["backbone"], model["knowledge"]) == ("star", "llm")
    assert model["scenarios"] == [
        {"name": "rec", "description": "Recommended items."},
        {"name": "search", "description": "Searched items."},
    ]
    assert model["features"][0] == {"name": "user_id", "kind": "categorical", "source": "user", "max_length": 0}
    assert [f["name"] for f in model["features"] if f["source"] == "context"] == ["search_source", "price"]
    assert (model["user_key_type"], model["item_key_type"]) == ("int64", "int64")
    assert (model["num_users"], model["num_items"], model["max_candidates"]) == (40, 30, 100)
    assert model["training"] == {"seed": 0, "prepared": model["training"]["prepared"], "valid_auc": 0.5}
    assert client.post("/v1/rank", json=model["example"]).status_code == 200


def test_openapi_without_pages(client):
    assert client.get("/openapi.json").json()["info"]["title"] == "llm4msr ranker"
    assert client.get("/docs").status_code == 404


def test_rank(client):
    answer = client.post("/v1/rank", json={**GOOD, "items": [7000, 5, 7001, 2**53 + 1, 2**53], "top_k": 4}).json()

    results = answer.pop("results")
    assert min(answer.pop("timings_ms").values()) > 0
    assert answer == {
        "model_version": "tiny-0",
        "scenario": "rec",
        "user": 1000,
        "user_known": True,
        "knowledge_known": True,
    }
    assert len(results) == 4
    assert [r["score"] for r in results] == sorted((r["score"] for r in results), reverse=True)
    known = {7000: True, 7001: True, 2**53 + 1: True, 5: False, 2**53: False}
    assert all(known[r["item"]] is r["known"] for r in results)


@pytest.mark.parametrize(("user", "flags"), [(1000, (True, True)), (1039, (True, False)), (1, (False, False))])
def test_flags_of_the_user(client, user, flags):
    answer = client.post("/v1/rank", json={**GOOD, "user": user}).json()

    assert (answer["user_known"], answer["knowledge_known"]) == flags
    assert len(answer["results"]) == 3


def test_a_served_score_is_that_of_evaluation(client, prepared, checkpoint_uri):
    """Rows of the test split, asked for by raw ids and raw context, against the same rows scored in one batch."""
    table = pa.concat_tables([storage.read_parquet(uri) for uri, _ in prepared.files("test")]).slice(0, 60)
    rows = {name: table[name].to_numpy() for name in table.column_names}
    expected = Ranker.from_checkpoint(checkpoint_uri).score(rows)
    users, items = prepared.users()["key"].to_pylist(), prepared.items()["key"].to_pylist()
    sources = dict(enumerate(prepared.vocabulary("search_source").to_pylist(), start=2))

    served = []
    for row in table.to_pylist():
        context = {"price": row["price"] * 2.0 + 5.0}
        if row["search_source"] in sources:
            context["search_source"] = sources[row["search_source"]]
        body = {
            "user": users[row["user_row"] - 1],
            "scenario": ("rec", "search")[row["scenario"]],
            "items": [items[row["item_row"] - 1]],
            "context": context,
        }
        served.append(client.post("/v1/rank", json=body).json()["results"][0]["score"])

    assert expected.std() > 0.01
    np.testing.assert_allclose(served, expected, rtol=0, atol=1e-6)


def test_text_ids(client):
    body = {**GOOD, "user": "u003"}

    assert client.post("/text/v1/rank", json=body).json()["user_known"] is True
    assert client.post("/text/v1/rank", json={**body, "user": "1000"}).json()["user_known"] is False
    refused = client.post("/text/v1/rank", json={**body, "user": 1000})
    assert refused.status_code == 422
    assert refused.json()["detail"] == [
        {
            "type": "request_error",
            "loc": ["body", "user"],
            "msg": "1000 is not a text id: ids of this data are text, such as 'u000'",
        }
    ]


@pytest.mark.parametrize(
    ("change", "place", "message"),
    [
        ({"scenario": "home"}, ["scenario"], "no scenario 'home'; valid: rec, search"),
        ({"scenario": 1}, ["scenario"], "Input should be a valid string"),
        ({"user": "1000"}, ["user"], "'1000' is not a 64-bit integer: ids of this data are integers, such as 1000"),
        ({"user": 1000.0}, ["user"], "an id is a whole number or text"),
        ({"user": True}, ["user"], "an id is a whole number or text"),
        ({"user": None}, ["user"], "an id is a whole number or text"),
        ({"user": 2**63}, ["user"], f"{2**63} is not a 64-bit integer"),
        ({"items": []}, ["items"], "List should have at least 1 item after validation, not 0"),
        ({"items": 7000}, ["items"], "Input should be a valid list"),
        ({"items": [7000, "7001"]}, ["items"], "'7001' is not a 64-bit integer"),
        ({"items": [7000, 1.5]}, ["items", 1], "an id is a whole number or text"),
        ({"items": [7000] * 101}, ["items"], "101 candidates: at most 100 in one request"),
        ({"top_k": 0}, ["top_k"], "Input should be greater than or equal to 1"),
        ({"top_k": "2"}, ["top_k"], "Input should be a valid integer"),
        ({"context": {"prise": 1}}, ["context"], "no context feature 'prise'; valid: price, search_source"),
        ({"context": {"price": "5"}}, ["context"], "price is numeric, found '5'"),
        ({"context": {"price": 1e300}}, ["context"], "price is 1e+300, more than 1e+06 standard deviations"),
        ({"context": {"price": None}}, ["context", "price"], "a context value is a number, text, or a list of them"),
        ({"k": 3}, ["k"], "no such field; valid: user, scenario, items, candidate_set, top_k, context"),
    ],
)
def test_refusals(client, change, place, message):
    answer = client.post("/v1/rank", json={**GOOD, **change})

    assert answer.status_code == 422
    (error,) = answer.json()["detail"]
    assert error["loc"] == ["body", *place]
    assert error["msg"].startswith(message)


def test_missing_fields_are_all_named(client):
    answer = client.post("/v1/rank", json={})

    assert answer.status_code == 422
    assert [e["loc"] for e in answer.json()["detail"]] == [["body", "user"], ["body", "scenario"]]
    answer = client.post("/v1/rank", json={"user": 1000, "scenario": "rec"})
    (error,) = answer.json()["detail"]
    assert (error["loc"], error["msg"]) == (["body", "items"], "give either items or candidate_set")


def test_what_is_not_json(client):
    answer = client.post("/v1/rank", content=b'{"user": 1000', headers={"content-type": "application/json"})

    assert answer.status_code == 422
    assert answer.json()["detail"][0]["msg"].startswith("not JSON: ")


def test_fifty_at_once(client):
    """Answers of concurrent requests are not mixed up: each equals what the same request gets alone."""
    bodies = [
        {"user": 1000 + i % 45, "scenario": ("rec", "search")[i % 2], "items": [7000 + i % 29, 7029]} for i in range(50)
    ]
    alone = [client.post("/v1/rank", json=body).json() for body in bodies]

    async def together() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=client.base_url, timeout=30) as concurrent:
            return await asyncio.gather(*(concurrent.post("/v1/rank", json=body) for body in bodies))

    answers = asyncio.run(together())

    assert [a.status_code for a in answers] == [200] * 50
    for body, answer, expected in zip(bodies, answers, alone, strict=True):
        assert answer.json()["user"] == body["user"]
        assert {**answer.json(), "timings_ms": 0} == {**expected, "timings_ms": 0}


def processes_of(mark: str) -> dict[int, str]:
    """Returns the processes that carry a mark in their environment, as everything started by ours does."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark.encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ").strip()
        except OSError:  # ended meanwhile, or not ours to read
            continue
    return {pid: command for pid, command in found.items() if command}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_the_command(checkpoint_uri, tmp_path, number):
    """Starts, says what to do, answers what it proposed, and leaves nothing running; once with tokens, once without."""
    shutil.copytree(checkpoint_uri, tmp_path / "runs" / "x")
    storage.write_json(str(tmp_path / "report.json"), {"checkpoint": "runs/x"})
    port, mark = free_port(), f"SERVE_TEST_MARK={tmp_path}"
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment |= dict([mark.split("=", 1)])
    command = [sys.executable, "-m", "serve", "--workspace_uri", str(tmp_path), "--port", str(port)]
    if number == signal.SIGTERM:
        environment["LLM4MSR_TOKENS"] = "a-valid-token-0123456"
    else:
        command += ["--auth", "off"]
    output = tmp_path / "output.txt"
    with output.open("w") as file:
        server = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        deadline = time.monotonic() + DEPLOY_TIMEOUT_S
        while "Ctrl-C" not in output.read_text():
            assert server.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.1)
        said = output.read_text()
        assert f"Serving tiny-0 (40 users, 30 items) at http://127.0.0.1:{port}\n" in said
        proposed = re.search(
            r"Ask: +curl -s (\S+)( -H '(.+): (.+)')? -H 'content-type: application/json' -d '(.*)'\n", said
        )
        headers, body = {}, json.loads(proposed[5])
        if number == signal.SIGTERM:
            assert httpx.post(proposed[1], json=body, timeout=30).status_code == 401
            headers[proposed[3]] = proposed[4].replace("YOUR-TOKEN", environment["LLM4MSR_TOKENS"])
        answer = httpx.post(proposed[1], json=body, headers=headers, timeout=30).json()
        assert len(answer["results"]) == 5
        assert answer["user_known"] and all(r["known"] for r in answer["results"])

        assert any("raylet" in command for command in processes_of(mark).values())

        # A terminal sends Ctrl-C to the whole foreground group, a service manager SIGTERM to the process.
        (os.killpg if number == signal.SIGINT else os.kill)(server.pid, number)

        assert server.wait(STOP_TIMEOUT_S) == 0, output.read_text()
    finally:
        if server.poll() is None:
            server.kill()
    deadline = time.monotonic() + 5
    while (left := processes_of(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == {}
    assert output.read_text().endswith("Stopping.\n"), output.read_text()
    assert "Traceback" not in output.read_text()
