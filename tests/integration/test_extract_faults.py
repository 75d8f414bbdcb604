"""What an extraction does when prompts fail, when the endpoint stumbles, and when the model or the logs change."""

from __future__ import annotations

import logging
import random
import re
import shutil

import extract_world as world
import job_process as processes
import pytest
from extract_world import Row, World
from unit.endpoint_server import Reply, Request, error, serve
from unit.tiny_lm import make_model

from llm4msr import storage
from llm4msr.knowledge.engines.model_files import EncoderError
from llm4msr.knowledge.pipeline import extract
from llm4msr.knowledge.place import knowledge_uri
from llm4msr.settings import config_from_dict


@pytest.fixture
def server():
    with serve() as running:
        yield running


def sent(server, since: int = 0) -> list[str]:
    """Every text of the requests since then."""
    return [text for request in server.requests[since:] for text in request.texts]


def refusing(pattern: str):
    """Answers 400 to each request with a text in which the pattern is found."""

    def reply(request: Request) -> Reply | None:
        return error(400, "cannot read this") if any(re.search(pattern, text) for text in request.texts) else None

    return reply


def unfinish(uri: str) -> None:
    """Makes an extraction look as if it had been killed just before its end."""
    storage.remove(storage.join(uri, "manifest.json"))


# --- prompts fail alone


def test_a_few_prompts_without_a_vector_are_named_and_the_rest_goes_on(ray_cluster, tmp_path, server, caplog):
    config = world.make_config(str(tmp_path), server.url, max_error_fraction=0.02)
    world.write_prepared(config, "first", world.many_users(300))
    server.reply = refusing(r"^User: reader (7|100)\.")  # the prompt of users 1007, and of 1100 and 1101
    with caplog.at_level(logging.WARNING, "llm4msr.knowledge"):
        uri = extract(config)
    assert "3 of 299 prompts have no vector; the first: user 1" in caplog.text
    world.check_table(uri, failed=["1007", "1100", "1101"])
    errors = storage.read_parquet(storage.join(uri, "errors.parquet")).to_pylist()
    assert {row["subject_id"] for row in errors} == {"1007", "1100", "1101"}
    assert all(row["level"] == "user" and row["error"] == "400: cannot read this" for row in errors)
    keys = {prompt["subject_id"]: prompt["key"].hex() for prompt in world.prompts(uri)}
    assert all(row["key"] == keys[row["subject_id"]] for row in errors)
    found = world.summary(uri)
    assert (found["num_failed"], found["num_users_with_knowledge"], found["failures"]) == (3, 294, errors)

    # The next run tries those again, and nothing else.
    server.reply = lambda _: None
    unfinish(uri)
    num_requests = len(server.requests)
    assert extract(config) == uri
    assert len(sent(server, num_requests)) == 2
    world.check_table(uri)
    assert (world.summary(uri)["num_failed"], world.summary(uri)["num_encoded"]) == (0, 2)


def test_too_many_failures_end_the_job_early_and_the_rerun_does_the_rest(ray_cluster, tmp_path, server):
    root, settings = str(tmp_path / "ws"), {"max_error_fraction": 0.01, "openai": {"max_in_flight": 4}}
    config = world.make_config(root, server.url, **settings)
    world.write_prepared(config, "first", world.many_users(600))
    path = processes.write_recipe(tmp_path / "recipe.toml", world.recipe(root, server.url, **settings))
    server.reply = refusing(r"^User: reader \d*[02468]\.")
    server.delay_s = lambda _: 0.05
    status, printed = processes.run_job("jobs.extract", path)
    assert status == 2 and "Traceback" not in printed
    assert re.search(
        r"python -m jobs\.extract: \d+ of 596 prompts have no vector; the first: user \d+: .*400: cannot read this"
        r".* \(knowledge\.max_error_fraction allows 0\.01 of them\)",
        printed,
    )
    num_all, tried = 590, len(set(sent(server)))
    assert 6 < tried < num_all / 3
    done = [row["key"] for row in world.stored_rows(config) if row["vector"] is not None]
    assert 0 < len(done) < tried

    server.reply = lambda _: None
    num_requests = len(server.requests)
    uri = extract(config)
    world.check_table(uri)
    again = sent(server, num_requests)
    assert len(again) == len(set(again)) == num_all - len(done)
    texts = {prompt["key"]: prompt["text"] for prompt in world.prompts(uri)}
    assert not set(again) & {texts[key] for key in done}
    keys = [row["key"] for row in world.stored_rows(config) if row["vector"] is not None]
    assert sorted(keys) == sorted(texts)


def test_a_stumbling_endpoint_costs_nothing(ray_cluster, tmp_path, server):
    chance = random.Random(3)
    config = world.make_config(str(tmp_path), server.url, rows_per_commit=64)
    world.write_prepared(config, "first", world.many_users(200))
    kinds = [error(429, retry_after_ms="100"), error(500), Reply(status=0)]
    server.reply = lambda _: chance.choice(kinds) if chance.random() < 0.2 else None
    uri = extract(config)
    world.check_table(uri)
    assert world.summary(uri)["num_failed"] == 0
    assert len(sent(server)) > 1.1 * world.summary(uri)["num_encoded"]


def test_a_scenario_without_a_vector_ends_the_job(ray_cluster, tmp_path, server):
    config = world.make_config(str(tmp_path), server.url)
    world.write_prepared(config, "first", world.many_users(200))
    server.reply = refusing("^Scenario feed")
    with pytest.raises(EncoderError, match="the prompt of scenario 'feed' has no vector: 400: cannot read this"):
        extract(config)
    # It ends after the first unit, which holds the scenarios, and not after all users.
    tried = set(sent(server))
    assert len(tried) < 150
    server.reply = lambda _: None
    num_requests = len(server.requests)
    world.check_table(extract(config))
    again = sent(server, num_requests)
    assert any(text.startswith("Scenario feed:") for text in again) and len(again) == len(set(again))
    assert len(again) < 202, "what was committed is not asked for again"


# --- another model, other logs


def test_what_changes_the_vectors_makes_new_keys(ray_cluster, tmp_path, server):
    def run(expected: int, **settings) -> set[bytes]:
        """Extracts; checks how many texts that takes, that the table is theirs, and that a rerun takes none."""
        config = world.make_config(str(tmp_path), server.url, rows_per_commit=512, **settings)
        world.write_prepared(config, "first", world.many_users(20))
        num_requests = len(server.requests)
        uri = extract(config)
        asked = server.requests[num_requests:]
        assert sum(len(request.texts) for request in asked) == expected
        assert {request.body["model"] for request in asked} <= {config.knowledge.model}
        world.check_table(uri)
        assert world.summary(uri)["num_encoded"] == expected
        return {prompt["key"] for prompt in world.prompts(uri)}

    num_all = 21  # 20 users of whom two are alike, and two scenarios
    keys = [
        run(num_all),
        run(num_all, model="other-model"),
        run(num_all, revision="of-may"),
        run(num_all, max_tokens=255),
        run(num_all, openai={"characters_per_token": 2.9}),
    ]
    assert len(set.union(*keys)) == num_all * len(keys)
    # And back: the store has them all, also where no table is left of it.
    unfinish(knowledge_uri(world.make_config(str(tmp_path), server.url, rows_per_commit=512)))
    assert run(0) == keys[0]
    assert run(0, num_actors=1, openai={"base_url": f"{server.url}/", "max_in_flight": 3}) == keys[0]


def test_another_pooling_makes_new_keys(ray_cluster, tmp_path):
    found, model = [], make_model(tmp_path / "model", positions=512)
    for pooling in ("last_token", "mean", "auto"):  # auto is last_token for a causal LM
        settings = {"model": model, "pooling": pooling, "dtype": "float32", "num_actors": 1, "device": "cpu"}
        config = config_from_dict({"workspace_uri": str(tmp_path / "ws"), "knowledge": settings})
        world.write_prepared(config, "first", world.many_users(20))
        uri = extract(config)
        found.append((world.summary(uri)["num_encoded"], {prompt["key"] for prompt in world.prompts(uri)}))
        unfinish(uri)
    assert [number for number, _ in found] == [21, 21, 0]
    assert found[0][1] == found[2][1] and not found[0][1] & found[1][1]
    assert len(world.stored_rows(config)) == 42


def test_another_prompt_version_makes_new_keys(ray_cluster, tmp_path, server):
    root, settings = str(tmp_path / "ws"), {"rows_per_commit": 512}
    config = world.make_config(root, server.url, **settings)
    world.write_prepared(config, "first", world.many_users(20))
    before = {prompt["key"] for prompt in world.prompts(extract(config))}
    # The project as it will be when PROMPT_VERSION is raised, in all its processes.
    for package in ("llm4msr", "jobs"):
        shutil.copytree(processes.REPOSITORY / package, tmp_path / "later" / package)
    wording = tmp_path / "later" / "llm4msr" / "knowledge" / "prompts.py"
    text, number = re.subn(r"(?m)^PROMPT_VERSION = .*$", "PROMPT_VERSION = 10_000", wording.read_text())
    assert number == 1
    wording.write_text(text)
    path = processes.write_recipe(tmp_path / "recipe.toml", world.recipe(root, server.url, **settings))
    num_requests = len(server.requests)
    status, printed = processes.run_job("jobs.extract", path, project=tmp_path / "later")
    assert status == 0, printed
    assert len(sent(server, num_requests)) == len(before)
    (uri,) = re.findall(r"users in (\S+):", printed)
    assert uri != knowledge_uri(config)
    assert not before & {prompt["key"] for prompt in world.prompts(uri)}
    num_requests = len(server.requests)
    unfinish(knowledge_uri(config))
    assert before == {prompt["key"] for prompt in world.prompts(extract(config))}
    assert len(server.requests) == num_requests


def history(user: int, *likes: tuple[int, int], disliked: int = 0) -> list[Row]:
    """Liked (item, time_ms) rows of one user, and some at the end that were not liked."""
    rows = [Row(user, item, item % 2, 1, time_ms) for item, time_ms in likes]
    return rows + [Row(user, 1, 0, 0, 10_000 + n) for n in range(disliked)]


BEFORE = ((1, 10), (2, 20), (3, 30))
# What each user's logs are later, whether its prompt changes, and whether it then is encoded again at a limit of 2.
LATER = {
    2000: (history(2000, *BEFORE), False, False),
    2001: (history(2001, *BEFORE, disliked=5), False, False),
    2002: (history(2002, *BEFORE, (4, 40)), True, False),
    2003: (history(2003, *BEFORE, (4, 40), (5, 50)), True, True),
    2004: (history(2004, *BEFORE[:2]), True, True),  # no longer a training row: it must not be quoted
    2005: (history(2005, *BEFORE[:2], (4, 25)), True, True),
    2006: (history(2006, *BEFORE[:2], (4, 40)), True, True),
    2007: (history(2007, *BEFORE, (4, 25)), True, False),  # late, but new
}


@pytest.mark.parametrize(("old_buckets", "new_buckets", "limit"), [(2, 4, 2), (6, 4, 2), (4, 1, 2), (2, 4, 0)])
def test_a_refresh_encodes_whom_it_must(old_buckets, new_buckets, limit, ray_cluster, tmp_path, server):
    config = world.make_config(str(tmp_path), server.url, refresh_min_new_events=limit, rows_per_commit=512)
    users = {user: f"reader {user}" for user in (*LATER, *range(2100, 2130))}
    items = [f"item {n}" for n in range(1, 8)]
    unchanged = [row for user in users if user >= 2100 for row in history(user, *BEFORE)]
    rows = [row for user in LATER for row in history(user, *BEFORE)]
    world.write_prepared(config, "before", World(users, items, rows + unchanged), old_buckets)
    before = extract(config)
    old = {prompt["subject_id"]: prompt for prompt in world.prompts(before)}

    rows = [row for rows, _, _ in LATER.values() for row in rows]
    joined = World(users | {1999: "reader new"}, items, rows + unchanged + history(1999, *BEFORE))
    world.write_prepared(config, "later", joined, new_buckets)
    num_requests = len(server.requests)
    after = extract(config)
    assert after != before and extract(config) == after
    new = {prompt["subject_id"]: prompt for prompt in world.prompts(after)}
    expected = {user for user, (_, changed, again) in LATER.items() if again or (changed and not limit)}
    assert {user for user in LATER if new[str(user)]["key"] != old[str(user)]["key"]} == expected
    texts = [new[name]["text"] for name in (*map(str, sorted(expected)), "1999", "search", "feed")]
    assert sorted(sent(server, num_requests)) == sorted(texts)
    table = world.check_table(after)
    assert table.num_users_with_knowledge == len(users) + 1
    found = world.summary(after)
    num_kept = sum(changed and not again for _, changed, again in LATER.values())
    assert found["num_kept"] == (num_kept if limit else 0)
    assert (found["num_encoded"], found["num_distinct_prompts"]) == (len(texts), len(users) + 3)
    assert found["share_encoded"] == pytest.approx(len(texts) / (len(users) + 3), abs=1e-4)


def test_small_news_add_up_over_refreshes(ray_cluster, tmp_path, server):
    config = world.make_config(str(tmp_path), server.url, refresh_min_new_events=2, rows_per_commit=512)
    keys = []
    for number in range(4):
        likes = [(1 + n, 10 * n) for n in range(2 + number)]
        data = World({2000: "reader"}, [f"item {n}" for n in range(1, 8)], history(2000, *likes))
        world.write_prepared(config, f"day-{number}", data)
        keys += [prompt["key"] for prompt in world.prompts(extract(config)) if prompt["level"] == "user"]
    assert keys[0] == keys[1] != keys[2] == keys[3]


def test_items(ray_cluster, tmp_path, server):
    config = world.make_config(str(tmp_path), server.url, levels=["scenario", "user", "item"])
    # Item 3 is in no row, item 4 has no text, items 2 and 5 have the same.
    items = ["green tea", "steel pan", "cold kettle", "", "steel  pan"]
    data = World({2000: "reader"}, items, history(2000, (1, 10), (2, 20), (4, 30), (5, 40)))
    world.write_prepared(config, "first", data)
    uri = extract(config)
    table = world.check_table(uri)
    assert table.item_index_N.tolist() == [0, 1, 2, 3, 0, 2] and len(table.items_NK) == 4
    assert {prompt["subject_id"] for prompt in world.prompts(uri) if prompt["level"] == "item"} == {
        *("i1", "i2", "i3", "i5")
    }
    assert sum(text.startswith("Item: steel pan.") for text in sent(server)) == 1
    found = world.summary(uri)
    assert (found["num_items"], found["num_items_with_knowledge"], found["num_prompts"]) == (5, 4, 7)
    # Items alone: no user prompt is written or encoded.
    without = {"model": {"meta": {"user_level": False, "scenario_level": False}}}
    alone = config_from_dict(world.recipe(str(tmp_path), server.url, levels=["item"]) | without)
    num_requests = len(server.requests)
    table = world.check_table(extract(alone))
    assert table.num_users_with_knowledge == 0 and len(table.items_NK) == 4
    assert len(server.requests) == num_requests
