"""More requests at once than one replica can answer: over HTTP, with scoring that keeps the event loop busy."""

from __future__ import annotations

import asyncio
import http.client
import json
import time
from collections import Counter

import httpx
import pytest
from live_site import Site
from tiny import tiny_checkpoint, tiny_knowledge, tiny_prepared

from serve.api import Limits, build_api
from serve.gate import Gate
from serve.served import Served

BODY = {"user": 1000, "scenario": "rec", "items": [7000, 7001, 7002]}
MAX_IN_FLIGHT, SCORING_S, CROWD = 8, 0.02, 120


class Slow(Served):
    """Scores as slowly as a large model."""

    def rank(self, request):
        time.sleep(SCORING_S)
        return super().rank(request)


class Eventful(Served):
    """Has something happen in the middle of some rankings, while the event loop is busy.

    Attributes:
        events: By the number of the ranking, from 0.
        num_rankings: How many there were.
    """

    def __init__(self):
        super().__init__()
        self.events, self.num_rankings = {}, 0

    def rank(self, request):
        event = self.events.pop(self.num_rankings, None)
        self.num_rankings += 1
        if event is not None:
            event()
        return super().rank(request)


@pytest.fixture(scope="module")
def checkpoint_uri(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crowd")
    return tiny_checkpoint(str(folder / "checkpoint"), tiny_prepared(str(folder / "p")), tiny_knowledge())


def test_who_is_too_much_is_told_at_once_and_nobody_waits_long(checkpoint_uri):
    served = Slow()
    served.change({"checkpoint_uri": checkpoint_uri})
    records = []
    site = Site(Gate(build_api(served, Limits()), None, 2**20, MAX_IN_FLIGHT, records.append))

    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(f"{site.url}v1/rank", json=BODY)

    async def crowd() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=CROWD, max_keepalive_connections=CROWD)
        async with httpx.AsyncClient(limits=limits, timeout=60) as client:
            return await asyncio.gather(*(ask(client) for _ in range(CROWD)))

    try:
        answers = asyncio.run(crowd())
    finally:
        site.close()
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses.keys() == {200, 503}
    assert {answer.headers.get("retry-after") for answer in answers if answer.status_code == 503} == {"1"}
    # Whoever was accepted waited for as many as may be in flight, not for the whole crowd.
    slowest = max(record["ms"] for record in records if record["status"] == 200)
    assert slowest < SCORING_S * 1000 * CROWD / 2
    assert statuses[503] > MAX_IN_FLIGHT


def connect(site: Site) -> http.client.HTTPConnection:
    """A connection that the server has accepted already: what is sent over it needs only to be read."""
    connection = http.client.HTTPConnection(site.url.split("/")[2], timeout=60)
    ask(connection, "/healthz")
    assert answered(connection) == 200
    return connection


def ask(connection: http.client.HTTPConnection, path: str, body: dict | None = None) -> None:
    content = None if body is None else json.dumps(body).encode()
    connection.request("POST" if body else "GET", path, content, {"content-type": "application/json"})


def answered(connection: http.client.HTTPConnection) -> int:
    answer = connection.getresponse()
    answer.read()
    return answer.status


@pytest.mark.parametrize(
    ("crowd", "later", "status"),
    [
        ([("/v1/rank", BODY)] * MAX_IN_FLIGHT, [("/healthz", None)], 200),
        ([("/v1/rank", BODY)] * MAX_IN_FLIGHT, [("/v1/rank", BODY)] * MAX_IN_FLIGHT, 503),
        ([("/v1/rank:batch", {"requests": [BODY] * MAX_IN_FLIGHT})], [("/healthz", None)], 200),
    ],
    ids=["a probe", "too many", "a probe beside a batch"],
)
def test_the_network_is_looked_at_between_two_rankings(checkpoint_uri, crowd, later, status):
    """The order of answers, not their time: what a crowd sends in the middle of one ranking is read after it, all at
    once, and what is sent in the middle of the crowd's first ranking is seen before its last."""
    served, answers = Eventful(), []
    served.change({"checkpoint_uri": checkpoint_uri})
    site = Site(
        Gate(
            build_api(served, Limits()),
            None,
            2**20,
            MAX_IN_FLIGHT,
            lambda record: answers.append((record["path"], record["status"], served.num_rankings)),
            max_wait_ms=60_000,
        )
    )
    try:
        first, *others = [connect(site) for _ in (0, *crowd, *later)]
        early, late = others[: len(crowd)], others[len(crowd) :]
        answers.clear()
        served.events = {
            0: lambda: [ask(one, *asked) for one, asked in zip(early, crowd, strict=True)],
            1: lambda: [ask(one, *asked) for one, asked in zip(late, later, strict=True)],
        }
        ask(first, "/v1/rank", BODY)
        assert [answered(one) for one in (first, *early)] == [200] * (1 + len(early))
        assert status in [answered(one) for one in late]
    finally:
        site.close()
    rankings_before = next(
        number for path, found, number in answers if number > 1 and (path, found) == (later[0][0], status)
    )
    assert rankings_before <= 4, answers
