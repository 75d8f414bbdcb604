"""More requests at once than one replica can answer: over HTTP, with scoring that keeps the event loop busy."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import httpx
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


def test_who_is_too_much_is_told_at_once_and_nobody_waits_long(tmp_path):
    served = Slow()
    served.change(
        {
            "checkpoint_uri": tiny_checkpoint(
                str(tmp_path / "checkpoint"), tiny_prepared(str(tmp_path / "p")), tiny_knowledge()
            )
        }
    )
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
