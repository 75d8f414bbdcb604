"""Explanations, comparisons and examples over HTTP, without Ray; and the page's files."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from pathlib import Path

import httpx
import numpy as np
import pytest
from explained_workspace import USERS, build
from tiny import NUM_ITEMS, tiny_checkpoint, tiny_config, tiny_knowledge, tiny_prepared

from llm4msr import storage
from llm4msr.config import ConfigError
from llm4msr.data.prepared import PreparedData
from llm4msr.knowledge import place
from llm4msr.knowledge.table import KnowledgeTable
from llm4msr.workspace import prepared_pointer_uri
from serve.api import Limits, build_api
from serve.app import build_app, parse_args
from serve.explain import KnowledgeSource
from serve.gate import OPEN_PATHS, Gate
from serve.page import PAGES
from serve.served import Served
from serve.tokens import Tokens

STATIC = Path(__file__).resolve().parents[2] / "serve" / "static"
BIG = 2**53 + 1
EVERYTHING = {"knowledge": {"levels": ["scenario", "user", "item"]}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A workspace with data, an extraction of them and a checkpoint trained with it."""
    root = str(tmp_path_factory.mktemp("explain") / "ws")
    prepared = tiny_prepared(storage.join(root, "prepared", "data"))
    build(root, levels=("scenario", "user", "item"), prepared=prepared)
    table = KnowledgeTable.load(storage.join(root, "knowledge", "k1"))
    tiny_checkpoint(storage.join(root, "checkpoint"), prepared, table, **EVERYTHING)
    tiny_checkpoint(storage.join(root, "other"), prepared, table, seed=1, **EVERYTHING)
    return root


def serve(root, name="checkpoint", source=None, **choice):
    served = Served()
    served.change({"checkpoint_uri": storage.join(root, name), **choice})
    return served, build_api(served, Limits(max_candidates=50, candidate_sets={"new": [7003, 7001]}), source)


def sender(app):
    def send(method: str, path: str, **content) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://ranker") as client:
                return await client.request(method, path, **content)

        return asyncio.run(call())

    return send


@pytest.fixture(scope="module")
def send(root):
    return sender(serve(root, source=KnowledgeSource(storage.join(root, "knowledge", "k1")))[1])


def explain(send, user="1000", scenario="rec", item="7001", **params):
    answer = send("GET", "/v1/explain", params={"user": user, "scenario": scenario, "item": item, **params})
    assert answer.status_code == 200, answer.text
    return answer.json()


def ranked(send, **body):
    answer = send("POST", "/v1/rank", json=body)
    assert answer.status_code == 200, answer.text
    return {one["item"]: one["score"] for one in answer.json()["results"]}


# ---------------------------------------------------------------- one score


@pytest.mark.parametrize("user", [1000, 1030, -7])
@pytest.mark.parametrize("item", [7001, BIG, -7])
def test_the_score_is_that_of_a_ranking(send, user, item):
    for scenario in ("rec", "search"):
        (score,) = ranked(send, user=user, scenario=scenario, items=[item]).values()
        found = explain(send, str(user), scenario, str(item))
        assert (found["score"], found["item"]["item"], found["user"]["user"]) == (score, str(item), str(user))
        assert len({one["score"] for one in found["without"]}) > 1


CONTEXT = {"search_source": "box", "price": 9.5}


@pytest.mark.parametrize("user", [1000, -7])
def test_the_score_is_that_of_a_ranking_with_the_same_context(send, user):
    (score,) = ranked(send, user=user, scenario="rec", items=[7001], context=CONTEXT).values()
    found, plain = explain(send, str(user), context=json.dumps(CONTEXT)), explain(send, str(user))
    assert found["score"] == score != plain["score"]
    assert 1 / (1 + np.exp(-found["logit"])) == pytest.approx(score, abs=1e-6)
    for one, other in zip(found["without"], plain["without"], strict=True):
        assert (one["score"] is None) == (other["score"] is None) and (one["score"] is None or one != other)
    assert explain(send, str(user), context="{}") == plain


def test_a_comparison_has_a_context_too(send):
    body = {"user": 1000, "items": [7001, 7004], "scenarios": ["search"], "context": CONTEXT}
    rows = send("POST", "/v1/compare", json=body).json()["rankings"]["search"]
    scores = ranked(send, user=1000, scenario="search", items=[7001, 7004], context=CONTEXT)
    assert [row["score"] for row in rows] == [scores[7001], scores[7004]]
    for row in rows:
        without = explain(send, "1000", "search", row["item"], context=json.dumps(CONTEXT))["without"]
        assert row["score_without"] == pytest.approx(without[-1]["score"], abs=1e-6)


def test_all_that_is_known_of_a_score(send):
    found = explain(send)
    assert (found["scenario"], found["model_version"], found["knowledge"]) == ("rec", "tiny-0", "llm")
    assert found["item"]["text"].startswith("genre ") and found["item"]["knowledge_known"]
    assert [one["part"] for one in found["without"]][-1] == "all"
    assert found["user_level"]["value"] > 0 and found["scenario_level"]["value"]
    assert found["match"] == {"value": None, "reason": "this model does not compare user and item"}
    assert [one["name"] for one in found["scenarios"]] == ["search"]
    words = found["user"]["words"]
    assert words == {"prompt": USERS[0][1].text(), "text": "likes 1000", "model": "embedded", "reason": None}
    assert found["item_words"]["text"] == "likes 7001" and found["item_words"]["prompt"].startswith("Item: a pan")
    assert found["scenario_words"]["prompt"] == "Scenario rec\nWhat?" and found["scenario_words"]["text"] == "likes rec"
    nearest = found["user"]["nearest"]
    assert [(one["users"], one["similarity"]) for one in nearest["users"][:2]] == [
        (["1001", "1002"], 0.8),
        (["1003"], 0),
    ]
    assert (nearest["num_vectors"], nearest["num_compared"]) == (4, 4)


def test_whoever_is_absent_has_a_reason(send):
    unknown, failed, without = (explain(send, user)["user"] for user in ("-7", "1004", "1030"))
    assert unknown["words"]["reason"] == "the data do not have this user" and not unknown["known"]
    assert failed["words"]["reason"] == "the tokenizer raised" and failed["words"]["prompt"]
    assert without["words"]["reason"] == "no liked training row, so there is no prompt"
    for one in (unknown, failed, without):
        assert one["nearest"]["reason"] and one["liked_reason"] and not one["knowledge_known"]


@pytest.mark.parametrize(
    ("ask", "loc", "message"),
    [
        (
            {"user": "u1"},
            ["query", "user"],
            "'u1' is not a 64-bit integer: ids of this data are integers, such as 1000",
        ),
        ({"user": str(2**63)}, ["query", "user"], "9223372036854775808 is not a 64-bit integer"),
        ({"item": "1.5"}, ["query", "item"], "'1.5' is not a 64-bit integer"),
        ({"item": ""}, ["query", "item"], "'' is not a 64-bit integer"),
        ({"scenario": "x"}, ["query", "scenario"], "no scenario 'x'; valid: rec, search"),
        ({"scenario": None}, ["query", "scenario"], "Field required"),
        ({"context": '{"price"'}, ["query", "context"], "give a JSON object of values by name: Invalid JSON: EOF"),
        ({"context": "[]"}, ["query", "context"], "give a JSON object of values by name: Input should be"),
        ({"context": ""}, ["query", "context"], "give a JSON object of values by name: Invalid JSON"),
        (
            {"context": '{"price": null}'},
            ["query", "context"],
            "give a JSON object of values by name: price: a context",
        ),
        (
            {"context": '{"colour": 1}'},
            ["query", "context"],
            "no context feature 'colour'; valid: price, search",
        ),
        ({"context": '{"price": "high"}'}, ["query", "context"], "price is numeric, found 'high'"),
    ],
)
def test_what_cannot_be_explained(send, ask, loc, message):
    params = {"user": "1000", "scenario": "rec", "item": "7001"} | ask
    answer = send("GET", "/v1/explain", params={name: value for name, value in params.items() if value is not None})
    assert answer.status_code == 422
    (error,) = answer.json()["detail"]
    assert error["loc"] == loc and error["msg"].startswith(message)


def test_text_ids_are_text(tmp_path):
    prepared = tiny_prepared(str(tmp_path / "prepared"), user_key_type="string")
    tiny_checkpoint(str(tmp_path / "c"), prepared, tiny_knowledge())
    send = sender(serve(str(tmp_path), "c")[1])
    assert explain(send, "u003")["user"]["known"] and not explain(send, "1003")["user"]["known"]
    assert explain(send, "u003")["score"] == ranked(send, user="u003", scenario="rec", items=[7001])[7001]


def test_a_users_canary_explains_what_it_answers(root):
    canary = {"checkpoint_uri": storage.join(root, "other"), "share": 0.5, "mode": "answer"}
    served, api = serve(root, canary=canary)
    send = sender(api)
    versions = set()
    for user in range(1000, 1012):
        found = explain(send, str(user))
        assert found["score"] == ranked(send, user=user, scenario="rec", items=[7001])[7001]
        versions.add(found["model_version"])
    assert versions == {"tiny-0", "tiny-1"}
    served.change({"checkpoint_uri": storage.join(root, "other")})
    assert explain(send)["model_version"] == "tiny-1"


# ---------------------------------------------------------------- where the prompts are


def words_of(root, source):
    return explain(sender(serve(root, source=source)[1]))["user"]["words"]


def test_a_server_that_was_not_told_where_the_prompts_are(root):
    words = words_of(root, None)
    assert words["prompt"] is None and "start it with knowledge_uri" in words["reason"]


def test_a_backbone_alone_and_a_control_have_no_prompts(root, tmp_path):
    uri = str(tmp_path / "control")
    shutil.copytree(storage.join(root, "checkpoint"), uri)
    metadata = storage.read_json(f"{uri}/metadata.json")
    storage.write_json(f"{uri}/metadata.json", metadata | {"knowledge": "shuffled"})
    prepared = PreparedData.open(storage.join(root, "prepared", "data"))
    tiny_checkpoint(str(tmp_path / "alone"), prepared, None)
    source = KnowledgeSource(storage.join(root, "knowledge", "k1"))
    for name, reason in (("control", "its knowledge is shuffled"), ("alone", "a backbone alone")):
        send = sender(serve(str(tmp_path), name, source)[1])
        words = explain(send)["user"]["words"]
        assert words["prompt"] is None and reason in words["reason"]


def test_the_workspace_knows_where_the_prompts_are(root):
    assert "no data prepared with this data configuration" in words_of(root, KnowledgeSource(None, root))["reason"]
    config = tiny_config(workspace_uri=root, **EVERYTHING)
    storage.write_json(prepared_pointer_uri(config), {"directory": "data"})
    storage.write_json(place.knowledge_pointer_uri(config), {"directory": "k1"})
    assert words_of(root, KnowledgeSource(None, root))["text"] == "likes 1000"


def test_an_extraction_of_other_data_or_a_damaged_one(root, tmp_path):
    build(str(tmp_path), name="k2")
    manifest = storage.join(str(tmp_path), "knowledge", "k2", "manifest.json")
    tree = storage.read_json(manifest)
    shutil.copytree(tmp_path / "prepared" / "data", tmp_path / "prepared" / "another")
    storage.write_json(manifest, tree | {"prepared": "another"})
    source = KnowledgeSource(storage.join(str(tmp_path), "knowledge", "k2"))
    assert words_of(root, source)["reason"].endswith("from the data another, the model was trained on data")
    storage.write_json(manifest, tree)
    for file in (tmp_path / "knowledge" / "k2" / "prompts").glob("*.parquet"):
        file.write_bytes(b"damaged")
    words = words_of(root, source)
    assert words["prompt"] is None and words["reason"]


def test_a_wrong_place_ends_before_anything_is_deployed(root):
    for wrong in ("knowledge/nothing", "prepared/data"):
        args = {"checkpoint_uri": f"{root}/checkpoint", "knowledge_uri": f"{root}/{wrong}", "auth": "off"}
        with pytest.raises((ConfigError, storage.StorageError), match=r"k1|WORKSPACE/knowledge/NAME"):
            build_app(args)
    assert parse_args({"workspace_uri": root, "knowledge_uri": "x"}).knowledge_uri == "x"


# ---------------------------------------------------------------- what knowledge changes


def test_a_comparison_has_the_scores_of_both_scenarios(send):
    items = [7004, 7001, BIG, -5, 7001]
    answer = send("POST", "/v1/compare", json={"user": 1000, "items": items, "scenarios": ["search", "rec"]})
    assert answer.status_code == 200, answer.text
    rankings = answer.json()["rankings"]
    assert list(rankings) == ["search", "rec"]
    for scenario, rows in rankings.items():
        assert [row["item"] for row in rows] == ["7004", "7001", str(BIG), "-5"]
        scores = ranked(send, user=1000, scenario=scenario, items=items[:4])
        assert [row["score"] for row in rows] == [scores[item] for item in items[:4]]
        for row in rows:
            (alone,) = (one for one in explain(send, "1000", scenario, row["item"])["without"] if one["part"] == "all")
            assert row["score_without"] == pytest.approx(alone["score"], abs=1e-6)
        for rank, score in (("rank", "score"), ("rank_without", "score_without")):
            best_first = sorted(rows, key=lambda row: -row[score])
            assert [row[rank] for row in best_first] == [1, 2, 3, 4]
    assert any(row["rank"] != row["rank_without"] for rows in rankings.values() for row in rows)


def test_a_comparison_within_the_servers_limits(send):
    body = {"user": 1000, "scenarios": ["rec"]}
    named = send("POST", "/v1/compare", json={**body, "candidate_set": "new"}).json()["rankings"]["rec"]
    assert [row["item"] for row in named] == ["7003", "7001"]
    for wrong, message in (
        ({"items": list(range(51))}, "51 candidates: at most 50"),
        ({}, "give either items or candidate_set"),
        ({"items": [1], "scenarios": ["rec"] * 11}, "List should have at most 10 items"),
        ({"items": [1], "scenarios": ["x"]}, "no scenario 'x'"),
        ({"items": [1], "user": "a"}, "'a' is not a 64-bit integer"),
    ):
        answer = send("POST", "/v1/compare", json={**body, **wrong})
        assert answer.status_code == 422 and answer.json()["detail"][0]["msg"].startswith(message), answer.text


# ---------------------------------------------------------------- what to try


def test_examples_are_bounded(send):
    users = send("GET", "/v1/users", params={"scenario": "rec", "limit": 10}).json()
    assert users["counted"] == "training rows" and len(users["users"]) == 10
    assert {one["kind"] for one in users["users"]} == {"active", "without knowledge"}  # five have knowledge
    assert len(send("GET", "/v1/users").json()["users"]) == 12
    items = send("GET", "/v1/items", params={"limit": 7}).json()["items"]
    assert len(items) == 7 and all(one["text"].startswith("genre") and one["known"] for one in items)
    assert len(send("GET", "/v1/items", params={"limit": 100}).json()["items"]) == NUM_ITEMS
    for path, params in (
        ("/v1/users", {"limit": 101}),
        ("/v1/users", {"limit": 0}),
        ("/v1/users", {"scenario": "x"}),
        ("/v1/items", {"limit": 101}),
        ("/v1/items", {"item": ["1"] * 101}),
        ("/v1/items", {"item": "a"}),
        ("/v1/user", {"user": "a"}),
        ("/v1/user", {}),
    ):
        answer = send("GET", path, params=params)
        assert answer.status_code == 422 and answer.json()["detail"][0]["loc"][0] == "query", answer.text


def test_items_and_users_that_are_named(send):
    found = send("GET", "/v1/items", params={"item": [str(BIG), "-5"]}).json()["items"]
    assert [(one["item"], one["known"]) for one in found] == [(str(BIG), True), ("-5", False)]
    user = send("GET", "/v1/user", params={"user": "1000"}).json()
    assert user == explain(send)["user"]


def test_explanations_leave_rankings_their_turn(send):
    """They are made beside the event loop: a ranking asked later is answered earlier."""
    api = send.__closure__[0].cell_contents

    async def race() -> list[str]:
        transport = httpx.ASGITransport(api)
        order = []
        async with httpx.AsyncClient(transport=transport, base_url="http://ranker") as client:

            async def one(name, *call, **content):
                assert (await client.request(*call, **content)).status_code == 200
                order.append(name)

            many = {"user": 1000, "items": list(range(7000, 7029)), "scenarios": ["rec", "search"] * 5}
            slow = [asyncio.create_task(one("slow", "POST", "/v1/compare", json=many)) for _ in range(8)]
            await asyncio.sleep(0.01)
            body = {"user": 1000, "scenario": "rec", "items": [7001]}
            await one("rank", "POST", "/v1/rank", json=body)
            await asyncio.gather(*slow)
        return order

    assert asyncio.run(race())[-1] == "slow"


# ---------------------------------------------------------------- the page


def test_the_page_needs_no_token_and_the_api_does(root):
    token = "a-token-of-the-page-01"
    gate = Gate(serve(root)[1], Tokens({"LLM4MSR_TOKENS": token}), 10_000, 8, lambda record: None)
    send = sender(gate)
    assert set(PAGES) <= OPEN_PATHS
    for path, (_, media_type) in PAGES.items():
        answer = send("GET", path)
        assert (answer.status_code, answer.headers["content-type"]) == (200, media_type)
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'") and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    for path in ("/v1/users", "/v1/explain", "/static/page.js", "/page.html"):
        assert send("GET", path).status_code == 401
    assert send("GET", "/v1/users", headers={"authorization": f"Bearer {token}"}).status_code == 200


def test_the_page_brings_all_it_needs():
    """Nothing from elsewhere, nothing inline that its policy would stop, and no markup made of data."""
    assert {path.name for path in STATIC.iterdir()} == {name for name, _ in PAGES.values()}
    texts = {name: (STATIC / name).read_text(encoding="utf-8") for name, _ in PAGES.values()}
    html = texts["index.html"]
    js = "\n".join(text for name, text in texts.items() if name.endswith(".js"))
    assert set(re.findall(r'from "\./([^"]+)"', js)) == {name for name in texts if name.endswith(".js")} - {"page.js"}
    for text in texts.values():
        assert not re.search(r"https?://|//cdn|@import|url\(", text)
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script>", html)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", js)
    ids = set(re.findall(r'\bid="([^"]+)"', html))
    used = set(re.findall(r'\bat\("([^"]+)"\)', js))
    assert used <= ids, f"the script names what the page lacks: {used - ids}"
    assert set(re.findall(r'\b(?:for|aria-describedby|aria-labelledby)="([^"]+)"', html)) <= ids
    assert max(len(text.splitlines()) for text in texts.values()) <= 150


def test_the_description_of_the_api_has_the_endpoints(send):
    paths = json.loads(send("GET", "/openapi.json").text)["paths"]
    assert {"/v1/explain", "/v1/compare", "/v1/user", "/v1/users", "/v1/items"} <= set(paths)
    assert not set(PAGES) & set(paths)
    names = {one["name"]: one for one in paths["/v1/explain"]["get"]["parameters"]}
    assert set(names) == {"user", "scenario", "item", "context"} and not names["context"]["required"]
