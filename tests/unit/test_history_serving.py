"""Histories and lists of the context in requests: as the rows have them, from the model's logs, and given afresh."""

from __future__ import annotations

import asyncio

import httpx
import numpy as np
import pytest
import torch
from tiny import SEQUENCES, WORDS, tiny_checkpoint, tiny_config, tiny_knowledge, tiny_prepared

from llm4msr import storage
from llm4msr.data.history import read_logs
from llm4msr.data.prepared import HISTORY_DIRECTORY
from llm4msr.evaluation import evaluate_checkpoint
from llm4msr.ranker import Ranker
from llm4msr.request import LikedItem, RankRequest, RequestError
from llm4msr.training.checkpoint import load_checkpoint
from llm4msr.training.loop import train_worker
from llm4msr.training.reader import list_row_groups, read_row_group
from llm4msr.training.task import TrainTask
from serve.api import Limits, build_api
from serve.served import Served

TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tiny_prepared(str(tmp_path_factory.mktemp("data") / "prepared"), more=SEQUENCES)


@pytest.fixture(scope="module")
def ranker(prepared, tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("run") / "checkpoint")
    return Ranker.from_checkpoint(tiny_checkpoint(uri, prepared, tiny_knowledge()))


@pytest.fixture(scope="module")
def rows(prepared):
    """All rows of all splits."""
    groups = [g for split in ("train", "valid", "test") for g in list_row_groups(prepared.files(split))]
    pieces = [read_row_group(group) for group in groups]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


@pytest.fixture(scope="module")
def scores(ranker, rows):
    return ranker.score(rows)


def likes_before(prepared, rows, user_row, time) -> list[LikedItem]:
    """What a user liked before a moment, oldest first."""
    keys = prepared.items()["key"].to_pylist()
    places = np.flatnonzero((rows["user_row"] == user_row) & (rows["label"] == 1) & (rows["timestamp_ms"] < time))
    places = places[np.argsort(rows["timestamp_ms"][places])]
    names = prepared.schema.scenario_names
    return [LikedItem(keys[rows["item_row"][i] - 1], names[rows["scenario"][i]]) for i in places]


def request(prepared, rows, i, **changes) -> RankRequest:
    """The request that a prepared row stands for, but for its history."""
    user, item = (t["key"][int(rows[f"{n}_row"][i]) - 1].as_py() for n, t in zip(*entities(prepared), strict=True))
    source, words = rows["search_source"][i], [index for index in rows["words"][i] if index]
    context = {
        "price": float(rows["price"][i]) * 2 + 5,
        "words": [WORDS[index - 2] if index > 1 else "another" for index in words],
        "search_source": None if source == 0 else ["box", "suggestion"][source - 2],
    }
    scenario = prepared.schema.scenario_names[rows["scenario"][i]]
    return RankRequest(**{"user": user, "scenario": scenario, "items": [item], "context": context, **changes})


def entities(prepared):
    return ("user", "item"), (prepared.users(), prepared.items())


def score(ranker, asked: RankRequest) -> float:
    return ranker.rank(asked).results[0].score


def test_a_history_given_scores_as_the_row_does(prepared, ranker, rows, scores):
    differ = 0
    for i in range(0, len(scores), 23):
        history = likes_before(prepared, rows, rows["user_row"][i], rows["timestamp_ms"][i])
        given = score(ranker, request(prepared, rows, i, history=history))
        assert given == pytest.approx(scores[i], abs=TOLERANCE)
        differ += abs(score(ranker, request(prepared, rows, i)) - given) > 1e-5  # the whole log knows more by now
    assert differ > 10


def test_without_a_history_the_whole_log_is_used(prepared, ranker, rows):
    for i in range(0, 400, 40):
        everything = likes_before(prepared, rows, rows["user_row"][i], 10**15)
        plain = score(ranker, request(prepared, rows, i))
        assert plain == pytest.approx(score(ranker, request(prepared, rows, i, history=everything)), abs=TOLERANCE)


def test_what_a_history_tells(prepared, ranker, rows):
    def ask(*likes, **changes):
        history = [LikedItem(item, scenario) for item, scenario in likes]
        return score(ranker, request(prepared, rows, 0, history=history, **changes))

    nothing, one = ask(), ask((7000, "rec"))
    assert abs(one - nothing) > 1e-6
    assert abs(ask((7000, "search")) - one) > 1e-6  # the scenario's own log sees it too
    # Only the last ones are read: five of all, three of search.
    last = [(7000 + i, "search") for i in range(5)]
    assert ask((7010, "rec"), (7011, "search"), *last) == pytest.approx(ask(*last), abs=TOLERANCE)
    # Unknown items are unseen, whichever they are; an unknown user is one without likes.
    assert ask((1, "search")) == pytest.approx(ask((2, "search")), abs=TOLERANCE)
    assert ask((1, "search")) != pytest.approx(nothing, abs=TOLERANCE)
    stranger = score(ranker, request(prepared, rows, 0, user=5))
    assert stranger == pytest.approx(ask(user=5), abs=TOLERANCE)
    assert ask((7000, "rec"), user=5) != pytest.approx(stranger, abs=TOLERANCE)


def test_words_left_out_are_absent(prepared, ranker, rows):
    def ask(words):
        return score(ranker, request(prepared, rows, 0, context={"words": words}))

    assert ask(None) == ask([]) == score(ranker, request(prepared, rows, 0, context=None))
    assert ask(["red", "new", "blue"]) == ask(("red", "other"))  # the first two are read; both others are unseen
    assert ask(["red"]) != pytest.approx(ask(["blue"]), abs=TOLERANCE)


LIKE = LikedItem(7000, "rec")


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"history": [LikedItem("7000", "rec")]}, "history", "'7000' is not a 64-bit integer"),
        ({"history": [LIKE, LikedItem(7000, "home")]}, "history", "no scenario 'home'; valid: rec, search"),
        ({"context": {"words": "red"}}, "context", "words is a list of values, found 'red'"),
        ({"context": {"words": ["red", True]}}, "context", "words is a list of text or numbers, found True in it"),
        ({"context": {"words": [None]}}, "context", "words is a list of text or numbers, found None in it"),
        ({"context": {"search_source": ["box"]}}, "context", "search_source is one value, found a list of 1"),
        ({"context": {"price": [1.0, 2.0]}}, "context", "price is one value, found a list of 2"),
    ],
)
def test_refusals(ranker, change, field, message):
    with pytest.raises(RequestError) as error:
        ranker.rank(RankRequest(**{"user": 1000, "scenario": "rec", "items": [7000], **change}))
    assert (error.value.field, message in str(error.value)) == (field, True), str(error.value)


def test_a_model_without_histories_refuses_one(tmp_path):
    prepared = tiny_prepared(str(tmp_path / "prepared"))
    ranker = Ranker.from_checkpoint(tiny_checkpoint(str(tmp_path / "c"), prepared, None))
    with pytest.raises(RequestError, match="this model reads no history of the user: leave history out"):
        ranker.rank(RankRequest(1000, "rec", [7000], history=[LIKE]))


def test_over_http(prepared, ranker, rows):
    served = Served()
    served.change({"checkpoint_uri": ranker.checkpoint.uri})
    api = build_api(served, Limits())

    def post(**body) -> httpx.Response:
        async def call() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://ranker") as client:
                if not body:
                    return await client.get("/v1/model")
                return await client.post("/v1/rank", json={"user": 1000, "scenario": "rec", "items": [7000], **body})

        return asyncio.run(call())

    features = {f["name"]: f for f in post().json()["features"]}
    assert features["liked"] == {"name": "liked", "kind": "history", "source": "user", "max_length": 5}
    assert features["words"] == {"name": "words", "kind": "sequence", "source": "context", "max_length": 2}
    answer = post(history=[{"item": 7001, "scenario": "search"}], context={"words": ["red", "blue"]}).json()
    asked = RankRequest(1000, "rec", [7000], None, {"words": ["red", "blue"]}, [LikedItem(7001, "search")])
    assert answer["results"][0]["score"] == score(ranker, asked)
    for body, place, message in (
        ({"history": [{"item": 7001}]}, ["history", 0, "scenario"], "Field required"),
        ({"history": [{"item": 1.5, "scenario": "rec"}]}, ["history", 0, "item"], "an id is a whole number or text"),
        ({"history": [7001]}, ["history", 0], "each like must be a JSON object"),
        ({"history": {"rec": [1]}}, ["history"], "Input should be a valid list"),
        (
            {"history": [{"item": 1, "scenario": "rec", "label": 1}]},
            ["history", 0, "label"],
            "no such field; valid: item, scenario",
        ),
        ({"history": [{"item": 1, "scenario": "rec"}] * 1001}, ["history"], "List should have at most 1000 items"),
        ({"history": [{"item": "x", "scenario": "rec"}]}, ["history"], "'x' is not a 64-bit integer"),
        ({"context": {"words": [["red"]]}}, ["context", "words"], "a context value is a number, text, or a list"),
    ):
        reply = post(**body)
        (error,) = reply.json()["detail"]
        assert (reply.status_code, error["loc"]) == (422, ["body", *place])
        assert error["msg"].startswith(message), error


def test_training_evaluation_and_checkpoint(prepared, tmp_path):
    """A run with histories learns, and what it leaves scores as it validated; with lanes and parts of a step."""
    task = TrainTask(
        tiny_config(train={"max_epochs": 2, "accumulate_steps": 2, "checkpoint_every_steps": 7}),
        prepared.uri,
        None,
        "none",
        0,
        str(tmp_path / "run"),
        "run",
    )
    metadata = train_worker(task, 0, 1, torch.device("cpu"), lambda metrics: None)
    results = evaluate_checkpoint(task.checkpoint_uri, prepared.uri)
    exact = [r["auc"] for r in results if r["split"] == "valid" and r["scenario"] != "all"]
    assert np.mean(exact) == pytest.approx(metadata["valid_auc"], abs=1e-3)
    checkpoint = load_checkpoint(task.checkpoint_uri)
    for name, log in read_logs(prepared.uri, prepared.schema).items():
        np.testing.assert_array_equal(checkpoint.collator.logs[name].item_row_N, log.item_row_N)
        np.testing.assert_array_equal(checkpoint.collator.logs[name].offset_U, log.offset_U)
    storage.remove(storage.join(task.checkpoint_uri, HISTORY_DIRECTORY, "all.parquet"))
    with pytest.raises(storage.StorageError, match=r"history/all\.parquet"):
        load_checkpoint(task.checkpoint_uri)
