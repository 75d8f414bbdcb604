"""Another model takes the place of the one that answers, or is refused."""

from __future__ import annotations

import json
import re
import shutil
import threading

import pytest
from tiny import tiny_checkpoint, tiny_knowledge, tiny_prepared

from llm4msr import storage
from llm4msr.config import ConfigError
from llm4msr.ranker import Ranker
from llm4msr.request import RankRequest
from serve.served import Served, example_request, is_among, parse_choice, why_incompatible

ASKED = RankRequest(1000, "rec", [7000, 7001, 7002, 7003], top_k=2)


@pytest.fixture(scope="module")
def uris(tmp_path_factory):
    """Checkpoints: two of the same data, one of data with text ids, a damaged one."""
    folder = tmp_path_factory.mktemp("served")
    prepared = tiny_prepared(str(folder / "prepared"))
    text = tiny_prepared(str(folder / "text"), user_key_type="string")
    uris = {
        "first": tiny_checkpoint(str(folder / "first"), prepared, tiny_knowledge()),
        "second": tiny_checkpoint(str(folder / "second"), prepared, tiny_knowledge(), seed=1),
        "text": tiny_checkpoint(str(folder / "text_run"), text, tiny_knowledge()),
        "damaged": tiny_checkpoint(str(folder / "damaged"), prepared, tiny_knowledge()),
        "other weights": tiny_checkpoint(str(folder / "other"), prepared, tiny_knowledge()),
        "missing": str(folder / "missing"),
    }
    (folder / "damaged" / "users.parquet").write_bytes(b"PAR1")
    (folder / "second" / "model.safetensors").rename(folder / "kept")
    (folder / "other" / "model.safetensors").write_bytes((folder / "kept").read_bytes())
    (folder / "kept").rename(folder / "second" / "model.safetensors")
    return uris


def serving(uris, **choice):
    served = Served()
    served.change({"checkpoint_uri": uris["first"], **choice})
    return served


def test_the_next_request_gets_the_new_model(uris):
    served = serving(uris)
    first, _ = served.rank(ASKED)
    served.change({"checkpoint_uri": uris["second"], "previous_uri": uris["first"]})
    second, _ = served.rank(ASKED)
    assert (first.model_version, second.model_version) == ("tiny-0", "tiny-1")
    assert [r.score for r in first.results] != [r.score for r in second.results]
    served.change({"checkpoint_uri": uris["first"]})
    assert served.rank(ASKED)[0].results == first.results and served.refused is None


def test_what_is_served_already_is_not_loaded_again(uris):
    served = serving(uris)
    ranker = served.ranker
    served.change({"checkpoint_uri": uris["first"], "previous_uri": uris["second"]})
    assert served.ranker is ranker and served.choice.previous_uri == uris["second"]
    served.change({"checkpoint_uri": uris["first"], "canary": {"checkpoint_uri": uris["second"], "share": 1}})
    canary = served.canary
    served.change({"checkpoint_uri": uris["second"]})
    assert served.ranker is canary and served.canary is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "StorageError: .*missing"),
        ("damaged", "StorageError: .*users.parquet"),
        ("other weights", "StorageError: .*golden.json: user .* has the score"),
        (
            "text",
            "ConfigError: .*its user_key_type is string, what is served has int64",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_and_what_was_served_goes_on(uris, name, reason, caplog):
    served = serving(uris)
    before, choice = served.rank(ASKED)[0], served.choice
    served.change({"checkpoint_uri": uris[name]})
    assert served.refused.checkpoint_uri == uris[name] and re.match(reason, served.refused.reason)
    assert served.rank(ASKED)[0].results == before.results and served.choice == choice
    assert "refused" in caplog.text
    served.change({"checkpoint_uri": uris["second"]})
    assert served.refused is None and served.ranker.model_version == "tiny-1"


def test_a_canary_that_cannot_be_served_changes_nothing(uris):
    served = serving(uris)
    served.change({"checkpoint_uri": uris["second"], "canary": {"checkpoint_uri": uris["missing"], "share": 0.5}})
    assert served.ranker.model_version == "tiny-0" and served.canary is None
    assert "missing" in served.refused.reason


@pytest.mark.parametrize(
    ("user_config", "message"),
    [
        ({}, "user_config.checkpoint_uri: Field required"),
        ({"checkpoint_uri": "a", "canry": {}}, "user_config.canry: no such key; valid: checkpoint_uri, previous_uri"),
        (
            {"checkpoint_uri": "a", "canary": {"checkpoint_uri": "b", "share": 2}},
            "user_config.canary.share: Input should be less than or equal to 1",
        ),
        (
            {"checkpoint_uri": "a", "canary": {"checkpoint_uri": "b", "share": 1, "mod": "x"}},
            "user_config.canary.mod: no such key; valid: checkpoint_uri, share, mode",
        ),
        ([], "user_config: "),
    ],
)
def test_a_mistake_in_the_configuration(uris, user_config, message):
    with pytest.raises(ConfigError, match=message):
        parse_choice(user_config)
    served = serving(uris)
    served.change(user_config)
    assert message in served.refused.reason and served.ranker.model_version == "tiny-0"


def test_nothing_to_serve_at_the_start_is_an_error(uris):
    with pytest.raises(storage.StorageError, match="missing"):
        Served().change({"checkpoint_uri": uris["missing"]})
    with pytest.raises(ConfigError, match="Field required"):
        Served().change({})


def test_a_shadow_is_compared_and_does_not_answer(uris):
    alone, _ = serving(uris).rank(ASKED)
    served = serving(uris, canary={"checkpoint_uri": uris["second"], "share": 1})
    answer, shadow = served.rank(ASKED)
    assert answer.results == alone.results and answer.model_version == "tiny-0"
    one, two = (
        {r.item: r.score for r in serving({"first": uris[n]}).rank(RankRequest(1000, "rec", ASKED.items))[0].results}
        for n in ("first", "second")
    )
    assert shadow.model_version == "tiny-1" and shadow.same_first == (next(iter(one)) == next(iter(two)))
    assert shadow.max_difference == pytest.approx(max(abs(one[i] - two[i]) for i in one)) and shadow.max_difference > 0
    same, shadow = serving(uris, canary={"checkpoint_uri": uris["first"], "share": 1}).rank(ASKED)
    assert (shadow.max_difference, shadow.same_first, same.results) == (0, True, alone.results)


def test_a_shadow_that_fails_is_no_matter_of_the_callers(uris, monkeypatch, caplog):
    served = serving(uris, canary={"checkpoint_uri": uris["second"], "share": 1})
    monkeypatch.setattr(served.canary, "rank", lambda request: 1 / 0)
    answer, shadow = served.rank(ASKED)
    assert len(answer.results) == 2 and shadow is None and "the shadow tiny-1 failed" in caplog.text


def test_a_canary_answers_its_share_of_the_users(uris):
    served = serving(uris, canary={"checkpoint_uri": uris["second"], "share": 0.3, "mode": "answer"})
    versions = {user: served.rank(RankRequest(user, "rec", [7000]))[0].model_version for user in range(300)}
    assert versions == {user: "tiny-1" if is_among(user, 0.3) else "tiny-0" for user in range(300)}
    assert 60 < list(versions.values()).count("tiny-1") < 120


def test_a_share_grows_and_never_moves():
    users = [*range(2000), *(f"u{i}" for i in range(2000))]
    small, large = ({user for user in users if is_among(user, share)} for share in (0.1, 0.4))
    assert small < large and abs(len(small) / 4000 - 0.1) < 0.02 and abs(len(large) / 4000 - 0.4) < 0.03
    assert all(is_among(user, 1.0) for user in users)
    assert is_among(1, 0.5) is is_among(1, 0.5)


def test_what_makes_models_incompatible(uris, tmp_path):
    first = serving(uris).ranker
    assert why_incompatible(first, serving({"first": uris["second"]}).ranker) is None
    place = tmp_path / "checkpoint"
    shutil.copytree(uris["first"], place)
    schema = json.loads((place / "schema.json").read_text())
    schema["scenarios"][1]["name"] = "shop"
    (place / "schema.json").write_text(json.dumps(schema))
    other = Ranker.from_checkpoint(str(place))
    assert why_incompatible(first, other) == "it has no scenario 'search'; its scenarios: rec, shop"
    del other.context.features["price"]
    other.checkpoint.schema.scenarios[1].__dict__["name"] = "search"
    assert why_incompatible(first, other) == "it has no context feature 'price', which callers may send"


def test_no_request_sees_half_a_change(uris):
    """Requests of other threads, while the model changes all the time."""
    served, expected = serving(uris), {}
    for name in ("first", "second"):
        served.change({"checkpoint_uri": uris[name]})
        answer, _ = served.rank(ASKED)
        expected[answer.model_version] = [r.score for r in answer.results]
    stop, seen, wrong = threading.Event(), set(), []

    def ask():
        while not stop.is_set():
            answer, _ = served.rank(ASKED)
            seen.add(answer.model_version)
            if [r.score for r in answer.results] != expected[answer.model_version]:
                wrong.append(answer)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for name in ("first", "second", "first", "second"):
        served.change({"checkpoint_uri": uris[name]})
    stop.set()
    for thread in threads:
        thread.join()
    assert seen == {"tiny-0", "tiny-1"} and not wrong


def test_the_example_is_known(uris):
    ranker = serving(uris).ranker
    asked = example_request(ranker, 5)
    answer = ranker.rank(asked)
    assert answer.user_known and answer.num_unknown_items == 0 and len(answer.results) == 5
