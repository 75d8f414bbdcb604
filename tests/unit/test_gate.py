"""What every request passes: ids, tokens, bounds, the log."""

from __future__ import annotations

import asyncio
import json
import logging

import httpx
import pytest
from fastapi import FastAPI, Request

from serve.gate import FACTS, Gate
from serve.tokens import Tokens

TOKEN = "a-valid-token-0123456"
AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}


class World:
    """An application behind a gate."""

    def __init__(self, tokens=None, max_body_bytes=100, max_in_flight=2, max_wait_ms=250):
        api, self.seen, self.release = FastAPI(), [], asyncio.Event()

        @api.post("/echo")
        async def echo(request: Request) -> dict:
            body = await request.body()
            request.scope["state"][FACTS]["scenario"] = "rec"
            return {"length": len(body)}

        @api.post("/ranking")
        async def ranking(request: Request) -> dict:
            request.scope["state"][FACTS]["rankings"] = [{"timings_ms": {"total": 15}}, {"timings_ms": {"total": 25}}]
            return {}

        @api.post("/slow")
        async def slow() -> dict:
            await self.release.wait()
            return {}

        @api.get("/healthz")
        async def healthz() -> dict:
            return {}

        @api.post("/broken")
        async def broken() -> dict:
            raise RuntimeError("secret")

        self.gate = Gate(api, tokens, max_body_bytes, max_in_flight, self.seen.append, max_wait_ms)

    def client(self):
        transport = httpx.ASGITransport(self.gate, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://ranker")

    def send(self, method, path, **content):
        async def call():
            async with self.client() as client:
                return await client.request(method, path, **content)

        return asyncio.run(call())


def test_a_request_id_is_echoed_or_made():
    world = World()
    answer = world.send("POST", "/echo", content=b"abc", headers={"x-request-id": "order-7:a.b_c"})
    assert (answer.json(), answer.headers["x-request-id"]) == ({"length": 3}, "order-7:a.b_c")
    made = {world.send("POST", "/echo").headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3 and all(len(one) == 32 for one in made)
    for bad in ("a b", "x" * 129, "a;b", ""):
        assert world.send("POST", "/echo", headers={"x-request-id": bad}).headers["x-request-id"] != bad
    assert world.send("POST", "/broken", headers={"x-request-id": "r1"}).headers["x-request-id"] == "r1"


def test_one_json_line_for_every_request_without_the_callers_text(caplog):
    world = World(Tokens({"LLM4MSR_TOKENS": TOKEN}))
    with caplog.at_level(logging.INFO, "llm4msr.access"):
        world.send("POST", "/echo?q=private", content=b"private", headers={**AUTHORIZED, "x-request-id": "r1"})
        world.send("POST", "/private", headers=AUTHORIZED)
        world.send("POST", "/broken", headers=AUTHORIZED)
        world.send("POST", "/echo", headers={"authorization": "Bearer private"})
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "llm4msr.access"]
    by_status = {line["status"]: line for line in lines}
    assert set(by_status) == {200, 404, 500, 401}
    first = by_status[200]
    assert (first["request_id"], first["method"], first["path"], first["scenario"]) == ("r1", "POST", "/echo", "rec")
    assert first["ms"] > 0 and first["time"] > 1.7e9
    assert by_status[404]["path"] is None and by_status[500]["path"] == "/broken"
    assert "private" not in json.dumps(lines) and "secret" not in json.dumps(lines)
    assert [record["status"] for record in world.seen] == [200, 404, 500, 401]


def test_a_token_is_asked_for_but_not_by_probes():
    world = World(Tokens({"LLM4MSR_TOKENS": TOKEN}))
    refused = world.send("POST", "/echo")
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
    assert refused.json()["detail"][0]["msg"] == "send a valid token: Authorization: Bearer TOKEN"
    assert "x-request-id" in refused.headers
    assert world.send("POST", "/echo", headers={"authorization": "Bearer wrong"}).status_code == 401
    assert world.send("POST", "/echo", headers=AUTHORIZED).status_code == 200
    assert world.send("GET", "/healthz").status_code == 200
    assert world.send("GET", "/nothing").status_code == 401  # what there is is nobody's business either


async def pieces(size, number):
    for _ in range(number):
        yield b"x" * size


@pytest.mark.parametrize(
    ("content", "status"),
    [(b"x" * 100, 200), (b"x" * 101, 413), (pieces(10, 10), 200), (pieces(10, 11), 413), (pieces(1000, 1), 413)],
)
def test_a_body_is_read_up_to_the_bound(content, status):
    answer = World().send("POST", "/echo", content=content)
    assert answer.status_code == status
    if status == 413:
        assert answer.json()["detail"][0]["msg"] == "the body is larger than 100 bytes: split the request"
    else:
        assert answer.json() == {"length": 100}


def test_a_length_that_is_a_lie_does_not_help():
    answer = World().send("POST", "/echo", content=pieces(10, 20), headers={"content-length": "5"})
    assert answer.status_code == 413


def test_what_is_too_much_is_told_to_come_back_and_the_others_are_answered():
    async def crowd():
        world = World(max_in_flight=2)
        async with world.client() as client:
            accepted = [asyncio.create_task(client.post("/slow")) for _ in range(2)]
            while world.gate.in_flight < 2:
                await asyncio.sleep(0)
            refused = await client.post("/slow")
            healthy = await client.get("/healthz")
            world.release.set()
            answers = await asyncio.gather(*accepted)
            after = await client.post("/slow")
        return world, refused, healthy, answers, after

    world, refused, healthy, answers, after = asyncio.run(crowd())
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert "2 requests are being answered here" in refused.json()["detail"][0]["msg"]
    assert [answer.status_code for answer in (healthy, *answers, after)] == [200] * 4
    assert world.gate.in_flight == 0


def test_who_would_wait_too_long_is_told_to_come_back():
    """Rankings of 40 ms: where one may wait for 100 ms, eight are in hand at most, however many places there are."""

    async def crowd():
        world = World(max_in_flight=64, max_wait_ms=100)
        async with world.client() as client:
            for _ in range(60):
                await client.post("/ranking")
            accepted = [asyncio.create_task(client.post("/slow")) for _ in range(8)]
            while world.gate.in_flight < 8:
                await asyncio.sleep(0)
            refused = await client.post("/slow")
            world.release.set()
            return world, refused, await asyncio.gather(*accepted), await client.post("/ranking")

    world, refused, answers, after = asyncio.run(crowd())
    assert world.gate.mean_cost_ms == pytest.approx(40, rel=0.01)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert [answer.status_code for answer in (*answers, after)] == [200] * 9


def test_a_failure_gives_its_place_back():
    world = World(max_in_flight=1)
    assert [world.send("POST", "/broken").status_code for _ in range(3)] == [500] * 3
    assert world.send("POST", "/echo").status_code == 200
