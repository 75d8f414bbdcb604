"""The API without Ray: refusals that need no cluster, and what a client sees of an error of our own."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
import torch
from tiny import NUM_ITEMS, tiny_checkpoint, tiny_knowledge, tiny_prepared

from serve.api import Limits, build_api
from serve.served import Served

GOOD = {"user": 1000, "scenario": "rec", "items": [7000, 7001]}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    prepared = tiny_prepared(str(folder / "prepared"))
    uri = tiny_checkpoint(str(folder / "checkpoint"), prepared, tiny_knowledge())
    served = Served()
    served.change({"checkpoint_uri": uri})
    return served


@pytest.fixture(scope="module")
def send(served):
    """Sends one request to the application."""
    limits = Limits(max_candidates=50, max_batch=3, candidate_sets={"new": [7003, 7001], "text": ["a"]})
    api = build_api(served, limits)

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


def test_an_error_of_our_own_shows_no_trace(served, send, caplog):
    """A weight that is not a number gives no score: the caller learns that it failed, the log learns why."""
    ranker = served.ranker
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
    for_people = {"/v1/explain", "/v1/compare", "/v1/user", "/v1/users", "/v1/items"}
    assert set(openapi["paths"]) == {"/v1/rank", "/v1/rank:batch", "/v1/model", "/healthz", "/readyz"} | for_people
    assert openapi["components"]["schemas"]["RankBody"]["examples"][0]["scenario"] == "search"
    assert "422" in openapi["paths"]["/v1/rank"]["post"]["responses"]


# ---------------------------------------------------------------- batches and candidate sets


def ranked(answer):
    """An answer without its timings."""
    assert answer.status_code == 200, answer.text
    return {name: value for name, value in answer.json().items() if name != "timings_ms"}


def test_a_batch_answers_as_its_requests_one_by_one(send):
    asked = [GOOD, {**GOOD, "user": 1001, "scenario": "search", "top_k": 1}, {**GOOD, "user": -5}]
    answer = send("POST", "/v1/rank:batch", json={"requests": asked})

    assert answer.status_code == 200
    rankings = answer.json()["rankings"]
    for ranking in rankings:
        del ranking["timings_ms"]
    assert rankings == [ranked(send("POST", "/v1/rank", json=one)) for one in asked]


@pytest.mark.parametrize(
    ("requests", "loc", "message"),
    [
        ([GOOD] * 4, ["body", "requests"], "4 rankings: at most 3 in one request"),
        ([], ["body", "requests"], "List should have at least 1 item"),
        ([GOOD, {**GOOD, "scenario": "x"}], ["body", "requests", 1, "scenario"], "no scenario 'x'; valid: rec, search"),
        ([GOOD, {**GOOD, "itms": []}], ["body", "requests", 1, "itms"], "no such field; valid: user, scenario, items"),
        ([GOOD, 3], ["body", "requests", 1], "each request must be a JSON object"),
    ],
)
def test_a_batch_that_cannot_be_answered_names_the_request(send, requests, loc, message):
    answer = send("POST", "/v1/rank:batch", json={"requests": requests})

    assert answer.status_code == 422
    (error,) = answer.json()["detail"]
    assert error["loc"] == loc and error["msg"].startswith(message)


def test_an_unknown_field_beside_the_requests(send):
    (error,) = send("POST", "/v1/rank:batch", json={"requests": [GOOD], "x": 1}).json()["detail"]
    assert (error["loc"], error["msg"]) == (["body", "x"], "no such field; valid: requests")


def test_a_named_candidate_set_stands_for_its_items(send):
    body = {"user": 1000, "scenario": "rec"}
    named = ranked(send("POST", "/v1/rank", json={**body, "candidate_set": "new"}))
    assert named == ranked(send("POST", "/v1/rank", json={**body, "items": [7003, 7001]}))
    assert send("GET", "/v1/model").json()["candidate_sets"] == {"new": 2, "text": 1}
    for wrong, loc, message in (
        ({}, "items", "give either items or candidate_set"),
        ({"items": [7001], "candidate_set": "new"}, "items", "give either items or candidate_set"),
        ({"candidate_set": "old"}, "candidate_set", "no candidate set 'old'; valid: new, text"),
        ({"candidate_set": "text"}, "items", "'a' is not a 64-bit integer"),
    ):
        (error,) = send("POST", "/v1/rank", json={**body, **wrong}).json()["detail"]
        assert error["loc"] == ["body", loc] and error["msg"].startswith(message)
