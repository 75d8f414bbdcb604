import email.utils
import random
import socket
import subprocess
import sys
import threading
import time

import endpoint_server
import numpy as np
import pytest
from endpoint_server import Reply, encode, error, expected, make_config, make_prompts, texts_of

from llm4msr.knowledge.engines.endpoint import MAX_TEXTS_PER_REQUEST, Endpoint
from llm4msr.knowledge.engines.model_files import EncoderError

KEY = "sk-very-secret-0123456789"


@pytest.fixture
def server(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with endpoint_server.serve() as running:
        yield running


def test_as_many_requests_are_in_flight_as_allowed(server):
    server.delay_s = lambda request: 0.1
    prompts = make_prompts(96 * MAX_TEXTS_PER_REQUEST)
    engine = Endpoint(make_config(server, {"max_in_flight": 32}))
    started = time.monotonic()
    batch = engine.encode(prompts)
    # One request alone, then 95 in three rounds of 32.
    assert server.peak == 32 and len(server.requests) == 96
    assert time.monotonic() - started < 5
    np.testing.assert_array_equal(batch.vectors, expected(texts_of(prompts)))


def test_throttling_is_waited_for_by_all(server):
    throttled_at = []

    def reply(request):
        if len(server.requests) == 10:
            throttled_at.append(request.time_s)
            return error(429, "slow down", retry_after="1")
        return None

    server.reply, server.delay_s = reply, lambda request: 0.05
    prompts = make_prompts(640)
    batch = encode(server, prompts)
    assert set(batch.errors) == {None}
    np.testing.assert_array_equal(batch.vectors, expected(texts_of(prompts)))
    after = [r.time_s - throttled_at[0] for r in server.requests if r.time_s > throttled_at[0]]
    # Those under way when the answer came may still arrive.
    assert all(wait < 0.5 or wait >= 1 for wait in after), after
    assert sum(wait >= 1 for wait in after) > 20


@pytest.mark.parametrize("header", ["ms", "date"])
def test_retry_after_in_other_forms(server, header):
    def reply(request):
        if len(server.requests) > 1:
            return None
        if header == "ms":
            return error(503, retry_after_ms="400", retry_after="77")
        return error(503, retry_after=email.utils.formatdate(time.time() + 2, usegmt=True))

    server.reply = reply
    assert encode(server, make_prompts(1)).errors == (None,)
    wait = server.requests[1].time_s - server.requests[0].time_s
    assert 0.4 <= wait < 3 if header == "ms" else 0.9 <= wait < 5


def test_without_a_hint_each_wait_is_longer_than_the_last(server):
    released = threading.Event()
    server.delay_s = lambda request: float(len(server.requests) == 1 and released.wait(5))
    server.reply = lambda request: error(500) if len(server.requests) == 2 else None
    try:
        assert encode(server, make_prompts(1), {"timeout_s": 0.5}).errors == (None,)
    finally:
        released.set()
    first, second, third = (request.time_s for request in server.requests)
    assert 1.5 <= second - first < 30 and 2 <= third - second < 30


def test_a_pause_that_is_too_long_is_not_waited_for(server):
    server.reply = lambda request: error(429, "quota", retry_after="3600")
    (said,) = encode(server, make_prompts(1)).errors
    assert said == "429, and to be asked again in 3600 s only, which is too late: quota"
    assert len(server.requests) == 1


def test_nothing_is_lost_among_errors_and_broken_connections(server):
    chance = random.Random(5)

    def reply(request):
        if chance.random() >= 0.2:
            return None
        hint = {"retry_after_ms": "30"}
        return chance.choice([error(500, **hint), error(503, **hint), error(429, **hint), error(408, **hint), Reply(0)])

    server.reply = reply
    prompts = make_prompts(300)
    batch = encode(server, prompts, {"max_in_flight": 64})
    assert set(batch.errors) == {None}
    np.testing.assert_array_equal(batch.vectors, expected(texts_of(prompts)))
    assert len(server.requests) > 60


def test_a_prompt_that_breaks_the_server_each_time_fails_alone(server):
    server.reply = lambda r: error(500, "boom", retry_after_ms="10") if "number 3." in r.texts[0] else None
    batch = encode(server, make_prompts(8), {"max_retries": 2})
    assert [i for i, said in enumerate(batch.errors) if said] == [3]
    assert batch.errors[3] == "500 after 3 attempts: boom"
    assert sum("number 3." in request.texts[0] for request in server.requests) == 3


@pytest.mark.parametrize(("status", "nth"), [(401, 1), (403, 1), (404, 1), (401, 5)])
def test_refused_access_fails_the_job_without_the_key(server, monkeypatch, status, nth):
    monkeypatch.setenv("MY_KEY", KEY)
    server.reply = lambda r: error(status, f"bad key {KEY} or model") if len(server.requests) >= nth else None
    with pytest.raises(EncoderError) as caught:
        encode(server, make_prompts(640), {"api_key_env": "MY_KEY"})
    said = str(caught.value)
    assert server.url in said and f"answered {status}: bad key *** or model" in said and "'embedder'" in said
    assert "environment variable MY_KEY, which is set" in said and KEY not in said
    assert server.requests[0].authorization == f"Bearer {KEY}"
    assert len(server.requests) < 30


@pytest.mark.parametrize(("status", "alone"), [(403, True), (404, False)])
def test_a_refusal_after_answers_fails_its_rows_alone(server, monkeypatch, status, alone):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    bad = "User number 100."

    def reply(request):
        return error(status, f"not this, {KEY}") if any(t.startswith(bad) for t in request.texts) else None

    server.reply = reply
    prompts = make_prompts(160)
    batch = encode(server, prompts)
    said = {i: error for i, error in enumerate(batch.errors) if error}
    # A moderated prompt fails alone; an endpoint that is not ready is not asked about each prompt of the request.
    assert said == dict.fromkeys([100] if alone else range(96, 112), f"{status}: not this, ***")
    good = [i for i in range(160) if i not in said]
    np.testing.assert_array_equal(batch.vectors[good], expected(texts_of(prompts))[good])


def test_answers_in_words_do_not_vouch_for_the_model_of_vectors(server):
    server.reply = lambda r: error(404, "no such model") if "input" in r.body else None
    with pytest.raises(EncoderError, match=r"/embeddings for model 'embedder' answered 404: no such model"):
        encode(server, make_prompts(50), generate=True)
    assert len(server.requests) == 2


def test_the_key_is_in_no_row_either(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.reply = lambda request: error(400, f"{KEY} sent nonsense " * 50)
    (said,) = encode(server, make_prompts(1)).errors
    assert KEY not in said and said.startswith("400: *** sent nonsense") and len(said) < 320


def test_an_endpoint_that_is_not_there_fails_the_job(server):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    started = time.monotonic()
    with pytest.raises(EncoderError, match=rf"POST {url}/embeddings .*no answer after 2 attempts: .*base_url"):
        encode(server, make_prompts(640), {"base_url": url, "max_retries": 1})
    assert 1 <= time.monotonic() - started < 30
    server.reply = lambda request: Reply(0)
    with pytest.raises(EncoderError, match="no answer after 1 attempts"):
        encode(server, make_prompts(640), {"max_retries": 0})
    assert len(server.requests) == 1


def test_a_prompt_that_always_takes_too_long_fails_alone(server):
    server.delay_s = lambda request: 2.0 if "number 3." in request.texts[0] else 0.0
    server.reply = lambda request: Reply(body=b"{" * 20, pause_s=0.1) if "number 5." in request.texts[0] else None
    batch = encode(server, make_prompts(8), {"timeout_s": 1.0, "max_retries": 0})
    said = {i: error for i, error in enumerate(batch.errors) if error}
    assert said == dict.fromkeys([3, 5], "no answer after 1 attempts: none within 1.0 s")


def test_the_rate_limit_holds_over_calls_and_is_shared_by_actors(server):
    engine = Endpoint(make_config(server, {"requests_per_minute": 2400}), num_actors=2)
    prompts = make_prompts(10 * MAX_TEXTS_PER_REQUEST)
    for _ in range(2):
        assert set(engine.encode(prompts).errors) == {None}
    times = [request.time_s for request in server.requests]
    assert len(times) == 20
    # 20 requests a second, in bursts of two: 18 intervals of 50 ms.
    assert 0.85 <= times[-1] - times[0] < 5
    assert max(sum(start <= t < start + 0.5 for t in times) for start in times) <= 15


def test_the_address_may_come_from_the_environment(server, monkeypatch):
    with pytest.raises(EncoderError, match=r"knowledge\.openai\.base_url.*OPENAI_BASE_URL"):
        encode(server, make_prompts(1), {"base_url": None})
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    assert encode(server, make_prompts(1), {"base_url": None}).errors == (None,)


def test_a_missing_library_is_named():
    probe = (
        "import sys; sys.modules['aiolimiter'] = None\n"
        "from llm4msr.config import KnowledgeConfig\n"
        "from llm4msr.knowledge.engines.endpoint import Endpoint\n"
        "assert 'openai' not in sys.modules\n"
        "Endpoint(KnowledgeConfig(engine='openai', model='m'))\n"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert "EncoderError: " in result.stderr and "pip install llm4msr[openai]" in result.stderr
