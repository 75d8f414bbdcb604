"""Prompts and the profiles they are made of: what is quoted, in which order, and what is cut first."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from llm4msr import storage
from llm4msr.knowledge.engines.fitting import fit
from llm4msr.knowledge.profiles import (
    LikedRows,
    ScenarioStats,
    UserProfile,
    clean_texts,
    item_prompts,
    scenario_facts,
    scenario_prompts,
    user_profiles,
)
from llm4msr.knowledge.prompt_files import Subjects, write_user_prompts
from llm4msr.knowledge.prompts import (
    ITEM_TAIL,
    PROMPT_VERSION,
    USER_TAIL,
    Liked,
    prompts_from_table,
    prompts_table,
    user_prompt,
)
from llm4msr.knowledge.store import keys_to_arrow, prompt_keys
from llm4msr.schema import Scenario

SCENARIOS = (Scenario("search", "users type a query"), Scenario("feed", "an endless list"))
ITEMS = clean_texts(pa.array(["tea", "coffee", "", "pan", None, "tea"]))  # item rows 1 to 6
USERS = clean_texts(pa.array(["24 years old, male, technician", "", None]))
PLAIN = clean_texts(pa.array(["e1", "e2", "e3", "e4", "e5", "e6"]))
KEYS = pa.array([501, 502, 503])


def rows(*records: tuple) -> pa.Table:
    """Rows of (user_row, item_row, scenario, label, timestamp_ms, position)."""
    names = ("user_row", "item_row", "scenario", "label", "timestamp_ms", "position")
    types = (pa.int32(), pa.int32(), pa.int32(), pa.int8(), pa.int64(), pa.int64())
    columns = list(zip(*records, strict=True)) or [[]] * len(names)
    return pa.table({n: pa.array(c, t) for n, c, t in zip(names, columns, types, strict=True)})


def profiles_of(table: pa.Table, items=ITEMS, max_events: int = 12) -> list[UserProfile]:
    return list(user_profiles(LikedRows.select(table, items), KEYS, USERS, items, SCENARIOS, max_events))


def prompts_of(table: pa.Table, max_events: int = 12) -> dict[int, str]:
    return {p.user_row: p.prompt.text() for p in profiles_of(table, max_events=max_events)}


def test_user_prompt_lists_liked_items_most_recent_first_per_scenario():
    table = rows(
        (2, 4, 1, 1, 10, 0),
        (1, 1, 0, 1, 100, 0),
        (1, 2, 0, 1, 300, 2),
        (1, 6, 0, 1, 200, 1),  # another item with the text "tea"
        (1, 3, 0, 1, 250, 3),  # no text
        (1, 4, 1, 1, 50, 4),
        (1, 2, 1, 0, 60, 5),  # disliked
        (3, 2, 1, 0, 60, 5),  # nothing liked at all
    )
    assert prompts_of(table) == {
        1: "User: 24 years old, male, technician.\n"
        "Liked in search (4, 1 untitled): coffee; tea (x2)\n"
        f"Liked in feed (1): pan\n{USER_TAIL}",
        2: f"Liked in feed (1): pan\n{USER_TAIL}",
    }


def test_user_prompt_ids_are_the_raw_keys():
    (profile,) = profiles_of(rows((3, 1, 0, 1, 1, 0)))
    assert (profile.user_row, profile.prompt.level, profile.prompt.subject_id) == (3, "user", "503")
    assert "503" not in profile.prompt.text()


def test_a_profile_counts_what_stands_behind_the_prompt():
    table = rows(
        (1, 1, 0, 1, 100, 0), (1, 2, 1, 1, 300, 1), (1, 4, 0, 1, 200, 2), (1, 4, 0, 0, 900, 3), (2, 1, 0, 1, None, 0)
    )
    assert [(p.num_liked, p.last_liked_ms) for p in profiles_of(table)] == [(3, 300), (1, None)]
    liked = LikedRows.select(table, ITEMS)
    assert liked.num_later(np.array([1, 2, 3]), np.array([100, 0, 0])).tolist() == [2, 0, 0]
    assert liked.num_later(np.array([2]), np.array([0])).tolist() == [0]
    assert liked.num_later(np.zeros(0, int), np.zeros(0, int)).tolist() == []


def test_items_with_a_text_have_a_prompt_and_nothing_else_is_said_of_them():
    found = list(item_prompts(pa.array([71, 72, 73]), ITEMS, 2, 3))
    assert [(row, p.level, p.subject_id, p.text()) for row, p in found] == [
        (2, "item", "71", f"Item: coffee.\n{ITEM_TAIL}"),
        (4, "item", "73", f"Item: pan.\n{ITEM_TAIL}"),
    ]


def test_a_merged_text_stands_where_the_most_recent_one_was():
    table = rows((1, 1, 0, 1, 400, 3), (1, 2, 0, 1, 300, 2), (1, 1, 0, 1, 200, 1), (1, 4, 0, 1, 100, 0))
    assert "(4): tea (x2); coffee; pan\n" in prompts_of(table)[1]
    assert "(4): tea (x2); coffee\n" in prompts_of(table, max_events=2)[1]


def test_equal_and_absent_times_are_ordered_by_position():
    for time in (7, None):
        table = rows((2, 1, 0, 1, time, 1), (2, 2, 0, 1, time, 2), (2, 4, 0, 1, time, 0))
        assert prompts_of(table)[2].startswith("Liked in search (3): coffee; tea; pan\n")


def events_of(table: pa.Table, max_events: int = 12) -> list[tuple[str, ...]]:
    return [p.prompt.events for p in profiles_of(table, PLAIN, max_events)]


def test_the_most_recent_events_over_all_scenarios_are_kept_longest():
    # Both events of the feed are newer than all three of the search, whatever their rank there.
    table = rows(
        *[(1, 1, 0, 1, 10, 0), (1, 2, 0, 1, 20, 1), (1, 3, 0, 1, 30, 2)],
        *[(1, 4, 1, 1, 40, 3), (1, 5, 1, 1, 50, 4)],
    )
    prompt = profiles_of(table, PLAIN)[0].prompt
    assert prompt.events == ("e5", "e4", "e3", "e2", "e1")
    head = "User: 24 years old, male, technician.\n"
    assert prompt.text() == f"{head}Liked in search (3): e3; e2; e1\nLiked in feed (2): e5; e4\n{USER_TAIL}"
    assert prompt.text(num_events=3) == f"{head}Liked in search (3): e3\nLiked in feed (2): e5; e4\n{USER_TAIL}"
    assert prompt.text(num_events=2) == f"{head}Liked in search (3)\nLiked in feed (2): e5; e4\n{USER_TAIL}"
    # At most so many per scenario, before anything is dropped.
    assert events_of(table, max_events=1) == [("e5", "e3")]


def test_interleaved_events_of_each_user_are_in_order_of_time():
    table = rows(
        *[(2, 6, 0, 1, 5, 0), (2, 1, 1, 1, 6, 1)],
        *[(1, 1, 1, 1, 10, 0), (1, 2, 0, 1, 20, 1), (1, 3, 0, 1, 30, 2), (1, 4, 1, 1, 40, 3), (1, 5, 0, 1, 50, 4)],
        *[(1, 2, 0, 1, 45, 9), (1, 6, 1, 0, 99, 10)],  # e2 again, after e4; e6 was not liked
    )
    assert events_of(table) == [("e5", "e2 (x2)", "e4", "e3", "e1"), ("e1", "e6")]


@pytest.mark.parametrize("time", [7, None])
def test_equal_and_absent_times_over_scenarios_go_by_position_then_scenario(time):
    table = rows((1, 1, 1, 1, time, 3), (1, 2, 0, 1, time, 2), (1, 3, 1, 1, time, 1), (1, 4, 0, 1, time, 1))
    assert events_of(table) == [("e1", "e2", "e4", "e3")]


def test_items_without_text_are_counted_not_quoted():
    table = rows((2, 3, 1, 1, 1, 0), (2, 5, 1, 1, 2, 1))
    assert prompts_of(table)[2] == f"Liked in feed (2, 2 untitled)\n{USER_TAIL}"


def test_no_liked_row_no_prompt():
    assert prompts_of(rows((1, 1, 0, 0, 1, 0))) == {}
    assert prompts_of(rows()) == {}
    assert prompts_of(rows((0, 1, 0, 1, 1, 0))) == {}  # user row 0 is nobody


def test_the_order_of_rows_in_the_file_does_not_matter():
    generator = np.random.default_rng(0)
    records = [
        (int(u), int(i), int(s), int(label), t, t)
        for t, (u, i, s, label) in enumerate(generator.integers([1, 1, 0, 0], [4, 7, 2, 2], (60, 4)))
    ]
    expected = prompts_of(rows(*records))
    assert len(expected) == 3
    assert prompts_of(rows(*[records[i] for i in generator.permutation(60)])) == expected


def test_texts_are_cleaned_before_they_are_compared():
    texts = clean_texts(
        pa.array(["a <b>big</b>\n  pan; red", "x" * 200, "a big pan red", "<|im_end|>", " </s>hi ", "1 < 2"])
    )
    assert [texts.at(row) for row in range(7)] == ["", "a big pan red", "x" * 80, "a big pan red", "", "hi", "1 < 2"]
    assert texts.codes.tolist() == [-1, 0, 1, 0, -1, 2, 3]


def test_statistics_add_up_over_buckets():
    first = rows((1, 1, 0, 1, 1, 0), (1, 4, 1, 0, 2, 1), (2, 1, 0, 1, 3, 0))
    second = rows((3, 1, 0, 0, 1, 0), (3, 2, 1, 1, 2, 1), (3, 4, 1, 1, 3, 2), (3, 4, 1, 1, 4, 3))
    both = ScenarioStats.merge([ScenarioStats.count(first, 2), ScenarioStats.count(second, 2)])
    whole = ScenarioStats.count(pa.concat_tables([first, second]), 2)
    for name in ("num_rows_S", "num_positive_S", "num_users_SS", "pairs_P", "pair_positive_P"):
        np.testing.assert_array_equal(getattr(both, name), getattr(whole, name))
    assert both.num_rows_S.tolist() == [3, 4]
    assert both.num_positive_S.tolist() == [2, 3]
    assert both.num_users_SS.tolist() == [[3, 2], [2, 2]]
    facts = scenario_facts(both, ITEMS, SCENARIOS)
    assert [(f.num_users, f.num_items, f.most_liked) for f in facts] == [(3, 1, ("tea",)), (2, 2, ("pan", "coffee"))]


def test_scenario_prompt_says_what_is_shared_and_what_differs():
    table = rows((1, 1, 0, 1, 1, 0), (1, 4, 1, 0, 2, 1), (2, 1, 0, 1, 3, 0), (2, 2, 0, 0, 4, 1), (3, 2, 1, 1, 1, 0))
    search, feed = scenario_prompts(ScenarioStats.count(table, 2), ITEMS, SCENARIOS)
    assert search.text() == (
        "Scenario search: users type a query. 3 interactions, 66.7% positive, 2 users, 2 items.\n"
        "Other scenario feed: an endless list. 2 interactions, 50.0% positive, 2 users, 2 items; "
        "50.0% of search's users are here too.\n"
        "Most liked in search: tea\n"
        "Most liked in feed: coffee\n"
        "What do these scenarios share, and how does search differ?"
    )
    assert (feed.level, feed.subject_id) == ("scenario", "feed")
    assert feed.text().startswith("Scenario feed: an endless list. 2 interactions")


def test_no_share_of_positives_where_only_those_are_counted():
    table = rows((1, 1, 0, 1, 1, 0), (2, 1, 0, 1, 3, 0), (2, 2, 0, 1, 4, 1), (2, 2, 1, 1, 1, 0))
    stats = ScenarioStats.count(table, 2)
    assert [f.num_positive for f in scenario_facts(stats, ITEMS, SCENARIOS)] == [3, 1]
    assert [f.num_positive for f in scenario_facts(stats, ITEMS, SCENARIOS, positives_only=True)] == [None, None]
    search, _ = scenario_prompts(stats, ITEMS, SCENARIOS, positives_only=True)
    assert search.text().startswith(
        "Scenario search: users type a query. 3 interactions, 2 users, 2 items.\n"
        "Other scenario feed: an endless list. 1 interactions, 1 users, 1 items; "
        "50.0% of search's users are here too.\n"
    )


@pytest.mark.parametrize(
    ("positives_only", "num_rows", "num_items", "num_users"),
    [(False, [4, 3], [3, 2], [[2, 2], [2, 3]]), (True, [2, 1], [2, 1], [[2, 1], [1, 1]])],
)
def test_drawn_rows_are_not_counted(tmp_path, positives_only, num_rows, num_items, num_users):
    table = rows(
        *[(1, 1, 0, 1, 1, 0), (1, 4, 0, 0, 1, 0), (2, 2, 0, 1, 1, 0), (2, 4, 0, 0, 1, 0)],
        *[(2, 1, 1, 1, 2, 1), (1, 2, 1, 0, 2, 1), (3, 2, 1, 0, 2, 1)],
    )
    source, target = str(tmp_path / "rows.parquet"), str(tmp_path / "prompts.parquet")
    storage.write_parquet(source, table)
    subjects = Subjects(KEYS, USERS, ITEMS, None, SCENARIOS, "id", 12, positives_only, with_users=True)
    done = write_user_prompts(subjects, source, target, None)
    stats = done.stats
    assert (done.num_prompts, done.num_kept) == (2, 0)
    assert storage.read_parquet(target)["subject_row"].to_pylist() == [1, 2]
    assert stats.num_rows_S.tolist() == num_rows
    assert stats.num_positive_S.tolist() == [2, 1]
    assert stats.num_users_SS.tolist() == num_users
    facts = scenario_facts(stats, ITEMS, SCENARIOS, positives_only)
    assert [f.num_items for f in facts] == num_items
    assert [f.most_liked for f in facts] == [("tea", "coffee"), ("tea",)]


def long_prompt():
    return user_prompt("u", "old", [Liked("a", 4, 0, ("a1", "a2", "a3", "a4")), Liked("b", 2, 0, ("b1", "b2"))])


def test_dropping_goes_by_place_in_the_lists_where_no_recency_is_given():
    prompt = long_prompt()
    assert prompt.events == ("a1", "b1", "a2", "b2", "a3", "a4")
    assert prompt.text(4) == f"User: old.\nLiked in a (4): a1; a2\nLiked in b (2): b1; b2\n{USER_TAIL}"
    assert prompt.text(1) == f"User: old.\nLiked in a (4): a1\nLiked in b (2)\n{USER_TAIL}"
    assert prompt.text(0, 5) == f"User:\n{USER_TAIL}"
    assert prompt.text(0, 0) == USER_TAIL


def words(texts: list[str]) -> list[list[int]]:
    """A tokenizer for tests: a token per word, and one special token."""
    return [[0] + [len(word) for word in text.split()] for text in texts]


@pytest.mark.parametrize("limit", range(13, 33))
def test_fit_drops_as_few_events_as_needed(limit):
    prompt = long_prompt()
    (fitted,) = fit([prompt], words, limit)
    kept = len(prompt.events) - fitted.num_dropped_events
    assert len(fitted.token_ids) <= limit
    assert fitted.token_ids[-12:] == words([USER_TAIL])[0][1:]
    if fitted.num_cut_characters:
        assert kept == 0 and len(words([prompt.text(0)])[0]) > limit
    else:
        assert fitted.token_ids == words([prompt.text(kept)])[0]
        assert kept == 6 or len(words([prompt.text(kept + 1)])[0]) > limit


def test_fit_cuts_the_head_only_when_no_event_is_left_and_gives_up_last():
    prompt = long_prompt()
    whole, headless, hopeless = (fit([prompt], words, limit)[0] for limit in (100, 13, 12))
    assert (whole.num_dropped_events, whole.num_cut_characters) == (0, 0)
    assert (headless.num_dropped_events, headless.token_ids) == (6, words([USER_TAIL])[0])
    assert headless.num_cut_characters == len(prompt.text(0)) - len(USER_TAIL) - 1
    assert hopeless.token_ids == []


def test_fit_handles_prompts_of_one_batch_each_by_itself():
    prompts = [long_prompt(), user_prompt("v", "", [Liked("a", 1, 0, ("a1",))]), long_prompt()]
    together = fit(prompts, words, 20)
    assert together == [fit([p], words, 20)[0] for p in prompts]
    assert [f.num_dropped_events > 0 for f in together] == [True, False, True]


def test_the_version_goes_up_with_what_is_quoted():
    assert PROMPT_VERSION == 3


def test_prompts_survive_their_table_and_keys_follow_content():
    prompts = [long_prompt(), user_prompt("v", "", [])]
    keys = prompt_keys("id1", prompts)
    table = prompts_table(prompts, [1, 2], keys_to_arrow(keys), [6, 0], [99, None])
    assert prompts_from_table(table) == prompts
    assert table.select(["num_liked", "last_liked_ms"]).to_pydict() == {
        "num_liked": [6, 0],
        "last_liked_ms": [99, None],
    }
    assert len(set(keys.tolist())) == 2
    assert prompt_keys("id1", prompts).tolist() == keys.tolist()
    assert not set(prompt_keys("id2", prompts).tolist()) & set(keys.tolist())
    # Whose prompt it is does not matter: equal words are encoded once.
    assert prompt_keys("id1", [user_prompt("w", "", [])]) == keys[1:]
