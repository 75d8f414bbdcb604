"""The API without Ray: refusals that need no cluster, and what a client sees of an error of our own."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
import torch
from tiny import NUM_ITEMS, tiny_checkpoint, tiny_knowledge, tiny_prepared

from llm4msr.ranker import Ranker
from serve.api import build_api

GOOD = {"user": 1000, "scenario": "rec", "items": [7000, 7001]}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def ranker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    prepared = tiny_prepared(str(folder / "prepared"))
    return Ranker.from_checkpoint(tiny_checkpoint(str(folder / "checkpoint"), prepared, tiny_knowledge()))


@pytest.fixture(scope="module")
def send(ranker):
    """Sends one request to the application."""
    api = build_api(ranker, max_candidates=50)

    def send(method: str, path: str, **content) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(api, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://ranker") as client:
                return await client.request(method, path, **content)

        return asyncio.run(call())

    return send


@pytest.mark.parametrize(
    ("content", "headers", "message"),
    [
        (b'{"user": 1,', JSON, "not JSON: Expecting property name enclosed in double quotes at character 11"),
        (b"", JSON, "the request has no body: send a JSON object"),
        (b"[]", JSON, "the body must be a JSON object"),
        (json.dumps(GOOD).encode(), {}, "send JSON, with the header content-type: application/json"),
        (b"user=1", {"content-type": "application/x-www-form-urlencoded"}, "send JSON, with the header content-type"),
    ],
)
def test_a_body_that_is_no_json_object(send, content, headers, message):
    answer = send("POST", "/v1/rank", content=content, headers=headers)

    assert answer.status_code == 422
    (error,) = answer.json()["detail"]
    assert error["loc"] == ["body"]
    assert error["msg"].startswith(message)


def test_many_errors_are_counted_not_listed(send):
    answer = send("POST", "/v1/rank", json={**GOOD, "items": [None] * 45})

    errors = answer.json()["detail"]
    assert [e["loc"] for e in errors[:20]] == [["body", "items", i] for i in range(20)]
    assert errors[20:] == [{"type": "more", "loc": ["body"], "msg": "and 25 more errors"}]


def test_what_was_sent_comes_back_cut(send):
    errors = send("POST", "/v1/rank", json={**GOOD, "top_k": "x" * 1000, "items": {"a": 1}}).json()["detail"]

    assert {tuple(e["loc"]): e.get("input") for e in errors} == {("body", "top_k"): "x" * 200, ("body", "items"): None}


@pytest.mark.parametrize("field", ["user", "scenario", "\ud800"])
def test_text_that_utf8_cannot_express(send, field):
    """JSON may hold half of a surrogate pair; the answer must not fail on it."""
    answer = send("POST", "/v1/rank", content=json.dumps({**GOOD, field: "\ud800"}), headers=JSON)

    assert answer.status_code == 422
    assert "ud800" in answer.text or "unicode" in answer.text


def test_numbers_that_json_cannot_express(send):
    answer = send("POST", "/v1/rank", content=b'{"user": NaN, "scenario": "rec", "items": [7000]}', headers=JSON)

    assert answer.status_code == 422
    assert answer.json()["detail"] == [
        {"type": "id_type", "loc": ["body", "user"], "msg": "an id is a whole number or text"}
    ]


def test_an_error_of_our_own_shows_no_trace(ranker, send, caplog):
    """A weight that is not a number gives no score: the caller learns that it failed, the log learns why."""
    weights = ranker.checkpoint.model.embedding.tables[1].weight
    index = ranker.checkpoint.items["item_id"][NUM_ITEMS - 1].as_py()
    kept = weights[index].clone()
    with torch.no_grad():
        weights[index] = torch.nan
    try:
        answer = send("POST", "/v1/rank", json={**GOOD, "items": [2**53 + 1]})
    finally:
        with torch.no_grad():
            weights[index] = kept

    assert answer.status_code == 500
    assert answer.json() == {"detail": "internal error: the server's log has the cause"}
    assert "POST /v1/rank failed" in caplog.text
    assert "finite_number" in caplog.text


def test_pages_that_load_scripts_from_elsewhere_are_off(send):
    assert send("GET", "/docs").status_code == 404
    assert send("GET", "/redoc").status_code == 404
    openapi = send("GET", "/openapi.json").json()
    assert set(openapi["paths"]) == {"/v1/rank", "/v1/model", "/healthz"}
    assert openapi["components"]["schemas"]["RankBody"]["examples"][0]["scenario"] == "search"
    assert "422" in openapi["paths"]["/v1/rank"]["post"]["responses"]
