import random

import endpoint_server
import numpy as np
import pytest
from endpoint_server import (
    Reply,
    answer_of,
    count_tokens,
    encode,
    error,
    expected,
    make_config,
    make_prompts,
    single,
    texts_of,
    vector_of,
)

from llm4msr.config import ConfigError, KnowledgeConfig, OpenAIConfig
from llm4msr.knowledge.engines.build import build_engine, engine_identity
from llm4msr.knowledge.engines.endpoint import Endpoint, endpoint_identity
from llm4msr.knowledge.engines.endpoint_client import EndpointClient
from llm4msr.knowledge.engines.interface import BatchDone
from llm4msr.knowledge.engines.model_files import EncoderError
from llm4msr.knowledge.prompts import PROMPT_VERSION, Prompt
from llm4msr.settings import config_from_dict


@pytest.fixture
def server(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with endpoint_server.serve() as running:
        yield running


def test_vectors_come_in_the_order_of_the_prompts(server):
    server.delay_s = lambda request: random.Random(request.texts[0]).uniform(0, 0.05)
    prompts = make_prompts(100)
    done: list[BatchDone] = []
    engine = Endpoint(make_config(server))
    batch = engine.encode(prompts, done.append)
    np.testing.assert_array_equal(batch.vectors, expected(texts_of(prompts)))
    assert batch.vectors.dtype == np.float32
    assert set(batch.errors) == set(batch.texts) == {None}
    assert not batch.num_dropped_events.any() and not batch.num_cut_characters.any()
    true = [count_tokens(text) for text in texts_of(prompts)]
    assert batch.num_tokens.sum() == sum(true) and np.abs(batch.num_tokens - true).max() <= 1
    total = sum(done, BatchDone())
    assert (total.num_prompts, total.num_failed, total.num_tokens) == (100, 0, sum(true))
    assert 0 < total.busy_s < 5
    assert len(done) == len(server.requests) == 8
    assert {len(request.texts) for request in server.requests} == {13, 9}
    assert {request.authorization for request in server.requests} == {"Bearer EMPTY"}
    assert engine.hardware.device == server.url
    assert engine.encode([]).vectors.shape == (0, 8)


def test_only_the_row_of_a_bad_prompt_fails(server):
    poison, long = "User number 7.", "User number 20."

    def reply(request):
        if any(text.startswith(long) for text in request.texts):
            return error(400, "maximum context length is 512 tokens")
        if any(text.startswith(poison) for text in request.texts):
            return error(422, "cannot be read")
        return None

    server.reply = reply
    prompts = make_prompts(64)
    done: list[BatchDone] = []
    batch = Endpoint(make_config(server)).encode(prompts, done.append)
    failed = {i: said for i, said in enumerate(batch.errors) if said}
    assert failed == {7: "422: cannot be read", 20: "400: maximum context length is 512 tokens"}
    good = [i for i in range(64) if i not in failed]
    np.testing.assert_array_equal(batch.vectors[good], expected(texts_of(prompts[i] for i in good)))
    assert not batch.vectors[[7, 20]].any() and not batch.num_tokens[[7, 20]].any()
    assert sum(done, BatchDone()).num_failed == 2
    assert all(batch.num_tokens[good] == [count_tokens(prompts[i].text()) for i in good])


def test_wrong_answers_are_errors_of_their_rows(server):
    wrong = {
        "nan": '{"data": [{"index": 0, "embedding": [1, NaN, 1, 1, 1, 1, 1, 1]}]}',
        "huge": '{"data": [{"index": 0, "embedding": [1, 1, 70000, 1, 1, 1, 1, 1]}]}',
        "narrow": '{"data": [{"index": 0, "embedding": [1, 2]}]}',
        "none": '{"data": []}',
        "two": '{"data": [{"index": 0, "embedding": [1]}, {"index": 1, "embedding": [1]}]}',
        "twice": '{"data": [{"index": 0, "embedding": [1]}, {"index": 0, "embedding": [1]}]}',
        "odd": '{"data": [{"index": 1, "embedding": [1, 1, 1, 1, 1, 1, 1, 1]}]}',
        "text": '{"data": [{"index": 0, "embedding": "AAAA"}]}',
        "scalar": '{"data": [{"index": 0, "embedding": 3}]}',
        "html": "<html>",
        "list": "[]",
    }
    server.reply = lambda r: Reply(200, wrong[r.texts[0]].encode()) if r.texts[0] in wrong else None
    batch = encode(server, [single(text) for text in ["fine", *wrong]], {"max_in_flight": 64})
    said = dict(zip(["fine", *wrong], batch.errors, strict=True))
    assert said.pop("fine") is None
    assert "largest value nan" in said["nan"] and "largest value 70000" in said["huge"]
    assert said["narrow"] == "embedder gave a vector of width 2, others have 8"
    indices = {"none": [], "two": [0, 1], "twice": [0, 0], "odd": [1]}
    for name, given in indices.items():
        assert said[name] == f"the answer has vectors of index {given} for 1 prompts"
    assert "of numbers" in said["text"] and "no list of numbers" in said["scalar"]
    assert said["html"].startswith("the answer is no JSON") and "of numbers" in said["list"]
    assert not batch.vectors[1:].any()


def test_too_few_vectors_are_asked_for_one_by_one(server):
    def reply(request):
        texts = request.texts
        return Reply(200, {"data": [{"index": 0, "embedding": vector_of(texts[0])}]}) if len(texts) > 1 else None

    server.reply = reply
    prompts = make_prompts(24)
    batch = encode(server, prompts)
    np.testing.assert_array_equal(batch.vectors, expected(texts_of(prompts)))


def test_long_prompts_are_cut_from_their_oldest_events(server):
    events = tuple(f"item {i:03d}" for i in range(100))
    prompts = [
        Prompt("user", "1", "User.", events, "What now?", ("Liked",), (0,) * 100),
        Prompt("user", "2", "long head " * 100, ("film",), "What now?", ("Liked",), (0,)),
        Prompt("user", "3", "Kopf.", (), "Was nun? " * 50),
        Prompt("user", "4", "", (), " "),
        Prompt("user", "5", "头" * 100, (), "问"),
    ]
    done: list[BatchDone] = []
    config = make_config(server, preamble="An app.", max_tokens=64)
    batch = Endpoint(config).encode(prompts, done.append)
    sent = {text for request in server.requests for text in request.texts}
    first, second, third = sorted(sent, key=lambda text: text.split("\n")[1])
    kept = 100 - batch.num_dropped_events[0]
    assert (
        first == "An app.\n" + Prompt("user", "1", "User.", events[:kept], "What now?", ("Liked",), (0,) * kept).text()
    )
    assert 0 < kept < 100 and len(first) <= 64 * 3 < len(first) + 10
    assert second.startswith("An app.\nlong head long") and second.endswith("\nWhat now?") and len(second) == 64 * 3
    assert batch.num_dropped_events[1] == 1
    assert batch.num_cut_characters[1] == len("An app.\n" + prompts[1].text(num_events=0)) - len(second)
    # A Chinese character counts as a token.
    assert 55 < third.count("头") < 64
    np.testing.assert_array_equal(batch.vectors[[0, 1, 4]], expected([first, second, third]))
    assert batch.errors[2] == "the instruction alone exceeds 64 tokens; raise knowledge.max_tokens"
    assert batch.errors[3] == "the prompt is empty"
    assert sum(done, BatchDone()) == BatchDone(5, 2, *[int(batch.num_tokens.sum())] * 2, 0, sum(d.busy_s for d in done))


def test_tokens_are_estimated_where_the_endpoint_does_not_count(server):
    server.reply = lambda r: Reply(200, {"data": [{"index": 0, "embedding": vector_of(r.texts[0])}]})
    assert encode(server, [single("x" * 31)], {"characters_per_token": 3.0}).num_tokens.tolist() == [11]


@pytest.mark.parametrize("state_from", ["prompt", "generated"])
def test_generated_words(server, state_from):
    server.delay_s = lambda request: 0.02
    prompts = make_prompts(20)
    values = {"generate": True, "state_from": state_from, "max_new_tokens": 33, "temperature": 0.5, "seed": 3}
    done: list[BatchDone] = []
    engine = Endpoint(make_config(server, {"chat_model": "writer"}, preamble="An app.", **values))
    batch = engine.encode(prompts, done.append)
    answers = [answer_of(text) for text in texts_of(prompts)]
    assert list(batch.texts) == answers and set(batch.errors) == {None}
    read = answers if state_from == "generated" else [f"An app.\n{text}" for text in texts_of(prompts)]
    np.testing.assert_array_equal(batch.vectors, expected(read))
    assert batch.num_tokens.tolist() == [count_tokens(f"An app. {text}") for text in texts_of(prompts)]
    assert batch.num_generated_tokens.tolist() == [count_tokens(text) for text in answers]
    assert sum(done, BatchDone()).num_generated_tokens == batch.num_generated_tokens.sum()
    assert 4 < server.peak <= 8
    chats = [r.body for r in server.requests if r.path.endswith("/chat/completions")]
    assert len(chats) == 20 and {c["model"] for c in chats} == {"writer"}
    assert {(c["temperature"], c["max_tokens"]) for c in chats} == {(0.5, 33)}
    assert chats[0]["messages"][0] == {"role": "system", "content": "An app."}
    assert [message["role"] for message in chats[0]["messages"]] == ["system", "user"]
    seeds = {c["messages"][1]["content"]: c["seed"] for c in chats}
    assert len(set(seeds.values())) == 20 and all(0 <= seed < 2**31 for seed in seeds.values())
    server.requests.clear()
    engine.encode(prompts[:3])
    again = {r.body["messages"][1]["content"]: r.body["seed"] for r in server.requests if "seed" in r.body}
    assert len(again) == 3 and again.items() <= seeds.items()


def test_empty_and_refused_answers(server):
    def reply(request):
        if "messages" not in request.body:
            return None
        if "number 1." in request.texts[0]:
            return Reply(200, {"choices": [{"message": {"content": None}}]})
        if "number 2." in request.texts[0]:
            return error(400, "filtered")
        return Reply(200, {"choices": []}) if "number 3." in request.texts[0] else None

    server.reply = reply
    batch = encode(server, make_prompts(5), generate=True, state_from="generated")
    assert [said is None for said in batch.errors] == [True, False, False, False, True]
    assert "empty" in batch.errors[1] and batch.errors[2] == "400: filtered" and "choices[0]" in batch.errors[3]
    batch = encode(server, make_prompts(5), generate=True)
    assert batch.texts[1] == "" and [i for i, said in enumerate(batch.errors) if said] == [2, 3]


def test_identity_is_what_a_vector_depends_on(server):
    config = make_config(server)
    identity = engine_identity(config)
    assert identity == {
        "engine": "openai",
        "model": "embedder",
        "revision": None,
        "max_tokens": 256,
        "characters_per_token": 3.0,
        "prompt_version": PROMPT_VERSION,
    }
    assert build_engine(config).identity == identity
    same = {"base_url": "http://elsewhere/v1", "max_in_flight": 1, "timeout_s": 1, "max_retries": 1, "chat_model": "c"}
    for key, value in same.items():
        assert endpoint_identity(make_config(server, {key: value})) == identity, key
    assert endpoint_identity(make_config(server, seed=4, temperature=1, max_new_tokens=5)) == identity
    others = [
        make_config(server, {"characters_per_token": 4.0}),
        make_config(server, revision="2"),
        make_config(server, max_tokens=128),
        make_config(server, preamble="An app."),
        *(
            make_config(server, generate=True, **v)
            for v in ({}, {"seed": 4}, {"temperature": 1}, {"max_new_tokens": 5})
        ),
        make_config(server, generate=True, state_from="generated"),
        make_config(server, {"chat_model": "writer"}, generate=True),
    ]
    found = [str(endpoint_identity(other)) for other in [config, *others]]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("values", [{"model": "embedded"}, {"layer": 3}, {"pooling": "mean"}])
def test_what_an_endpoint_cannot_give_is_refused(values):
    with pytest.raises(EncoderError, match=f"knowledge.{next(iter(values))}"):
        endpoint_identity(KnowledgeConfig(**{"engine": "openai", "model": "m", **values}))


@pytest.mark.parametrize(
    "address",
    [
        "https://user:{}@host/v1",
        "https://user:a/{}@host/v1",
        "user:{}@host:8000/v1",
        "https://host/v1?api-key={}",
        "https://host/v1#{}",
        "https://user:{}@[host/v1",
    ],
)
def test_an_address_with_a_secret_is_refused_at_once_and_not_shown(monkeypatch, address):
    secret = "s3cr3t"
    monkeypatch.setenv("OPENAI_BASE_URL", address.format(secret))
    config = KnowledgeConfig(engine="openai", model="m", openai=OpenAIConfig(api_key_env="MY_KEY"))
    for use in (lambda: engine_identity(config), lambda: EndpointClient(config.openai)):
        with pytest.raises(EncoderError) as caught:
            use()
        said = str(caught.value)
        assert said.startswith("the environment variable OPENAI_BASE_URL holds '")
        assert said.endswith("environment variable named by knowledge.openai.api_key_env, now MY_KEY")
        assert secret not in said and "user" not in said and caught.value.__cause__ is None
    with pytest.raises(ConfigError, match="base_url holds one of") as refused:
        config_from_dict({"knowledge": {"openai": {"base_url": address.format(secret)}}})
    assert secret not in str(refused.value)
