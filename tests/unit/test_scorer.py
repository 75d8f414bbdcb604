"""Tables are scored as requests are: lists, pairs, and users with many candidates; bad rows become errors."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from tiny import SEQUENCES, tiny_checkpoint, tiny_knowledge, tiny_prepared

from llm4msr.ranker import Ranker
from llm4msr.request import RankRequest, RequestError
from llm4msr.scoring import scorer as module
from llm4msr.scoring.scorer import Scorer, best_first
from llm4msr.scoring.tables import ERRORS, list_results, pair_results

TOLERANCE = 1e-6
MATCH = {
    "model": {"knowledge_match": True, "meta": {"trunk_dims": [8]}},
    "knowledge": {"levels": ["scenario", "user", "item"], "user_vectors": "items"},
}


@pytest.fixture(scope="module", params=["alone", "knowledge", "everything"])
def ranker(request, tmp_path_factory):
    """A backbone alone with text ids; LLM4MSR; LLM4MSR with items' vectors, a match, histories and lists."""
    folder, everything = tmp_path_factory.mktemp("score"), request.param == "everything"
    key_type = "string" if request.param == "alone" else "int64"
    prepared = tiny_prepared(str(folder / "data"), user_key_type=key_type, more=SEQUENCES if everything else ())
    knowledge = None if request.param == "alone" else tiny_knowledge(items=everything)
    return Ranker.from_checkpoint(
        tiny_checkpoint(str(folder / "checkpoint"), prepared, knowledge, **(MATCH if everything else {}))
    )


@pytest.fixture(params=["together", "alone in blocks"])
def scorer(request, ranker, monkeypatch):
    """Tiny checkpoints have few items: what is few, and a block, is made smaller."""
    if request.param == "alone in blocks":
        monkeypatch.setattr(module, "FEW_CANDIDATES", 0)
    monkeypatch.setattr(module, "BLOCK_CANDIDATES", 7)
    monkeypatch.setattr(module, "BATCH_CANDIDATES", 50)
    return Scorer(ranker)


def known(ranker):
    """Users that the model knows, the last of them without knowledge, and items."""
    return [ranker.checkpoint.users["key"].to_pylist(), ranker.checkpoint.items["key"].to_pylist()]


def stranger(ranker):
    return "nobody" if ranker.checkpoint.schema.user_key_type == "string" else 5


def agree(ranker, row, request, tolerance=TOLERANCE):
    """Whether one row of lists is the ranker's answer."""
    results = ranker.rank(request).results
    assert row["items"] == [result.item for result in results]
    np.testing.assert_allclose(row["scores"], [result.score for result in results], rtol=0, atol=tolerance)
    assert (row["user"], row["scenario"]) == (request.user, request.scenario)


class TestLists:
    def test_rows_are_ranked_as_requests_are(self, scorer):
        ranker, rng = scorer.ranker, np.random.default_rng(0)
        users, items = known(ranker)
        asked = [
            RankRequest(
                user, name, rng.permutation(items)[: rng.integers(1, 31)].tolist(), [None, 3, 40][rng.integers(3)]
            )
            for user in (*users[:5], users[-1], stranger(ranker))
            for name in ("rec", "search")
        ]
        rows = [{"user": r.user, "scenario": r.scenario, "items": r.items, "top_k": r.top_k} for r in asked]

        scored = scorer.score_lists(pa.Table.from_pylist(rows), first_row=100)

        assert scored.results.schema == list_results(ranker.checkpoint.schema)
        assert scored.results["row"].to_pylist() == [*range(100, 100 + len(asked))]
        for row, request in zip(scored.results.to_pylist(), asked, strict=True):
            agree(ranker, row, request)
        assert scored.num_candidates == sum(len(request.items) for request in asked)
        assert scored.errors.schema == ERRORS and len(scored.errors) == 0

    def test_equal_scores_keep_the_order_of_the_row(self, scorer):
        _, items = known(scorer.ranker)
        user, listed = stranger(scorer.ranker), [999, *items[:10], 998, items[3], 997]
        table = pa.table({"user": [user], "scenario": ["rec"], "items": [listed]})

        (row,) = scorer.score_lists(table).results.to_pylist()

        agree(scorer.ranker, row, RankRequest(user, "rec", listed))
        assert [item for item in row["items"] if item > 990 and item < 1000] == [999, 998, 997]
        score = dict(zip(row["items"], row["scores"], strict=True))
        assert score[999] == score[998] == score[997]

    def test_context_is_read(self, scorer):
        users, items = known(scorer.ranker)
        contexts = [{"search_source": "box", "price": 9.0}, {"search_source": None, "price": 1.0}, None]
        rows = [{"user": users[0], "scenario": "search", "items": items[:9], "context": c} for c in contexts]

        scored = scorer.score_lists(pa.Table.from_pylist(rows)).results.to_pylist()

        for row, context in zip(scored, contexts, strict=True):
            given = {name: value for name, value in (context or {}).items() if value is not None}
            agree(scorer.ranker, row, RankRequest(users[0], "search", items[:9], context=given))
        assert len({tuple(row["scores"]) for row in scored}) == 3

    def test_bad_rows_are_told_and_the_others_scored(self, scorer):
        users, items = known(scorer.ranker)
        table = pa.table(
            {
                "user": [users[0], None, users[1], users[2], users[3], users[4], users[5]],
                "scenario": ["rec", "rec", "shop", "rec", "rec", "rec", None],
                "items": [items[:3], items[:3], items[:3], [], None, [items[0], None], items[:3]],
                "top_k": pa.array([None, 1, 1, 1, 1, 1, 1]),
            }
        )

        scored = scorer.score_lists(table, first_row=10)

        assert scored.results["row"].to_pylist() == [10]
        errors = {row["row"]: (row["user"], row["message"]) for row in scored.errors.to_pylist()}
        assert errors.keys() == {*range(11, 17)}
        assert errors[12] == (str(users[1]), "no scenario 'shop'; valid: rec, search")
        assert errors[13] == (str(users[2]), "no candidates: give at least one item")
        assert errors[14][1] == errors[13][1]
        assert errors[11][0] is None and "None is not a" in errors[11][1] and "None is not a 64-bit" in errors[15][1]
        table = pa.table({"user": users[:1], "scenario": ["rec"], "items": [items[:3]], "top_k": [0]})
        assert "0 results are not possible" in scorer.score_lists(table).errors["message"][0].as_py()

    def test_a_wrong_value_of_context_is_told(self, scorer):
        users, items = known(scorer.ranker)
        rows = [
            {"user": users[0], "scenario": "rec", "items": items[:2], "context": {"price": price}}
            for price in (1.0, float("nan"))
        ]
        scored = scorer.score_lists(pa.Table.from_pylist(rows))
        assert scored.errors["row"].to_pylist() == [1]
        assert scored.errors["message"][0].as_py().startswith("price is nan")


class TestUsers:
    @pytest.mark.parametrize("top_k", [1, 4, 1000])
    def test_each_user_has_the_best_in_each_scenario(self, scorer, top_k):
        users, items = known(scorer.ranker)
        table = pa.table({"user": [*users[:4], stranger(scorer.ranker)]})

        scored = scorer.score_users(table, scorer.candidates(items), ["search", "rec"], top_k, first_row=7)

        rows = scored.results.to_pylist()
        asked = [(i, user, name) for i, user in enumerate(table["user"].to_pylist()) for name in ("search", "rec")]
        for row, (i, user, name) in zip(rows, asked, strict=True):
            assert row["row"] == 7 + i
            agree(scorer.ranker, row, RankRequest(user, name, items, top_k))
        assert scored.num_candidates == 5 * 2 * len(items)

    def test_a_bad_user_is_told_once(self, scorer):
        users, items = known(scorer.ranker)
        table = pa.table({"user": [users[0], None]})
        scored = scorer.score_users(table, scorer.candidates(items), ["search", "rec"], 2, first_row=3)
        assert scored.results["row"].to_pylist() == [3, 3]
        assert scored.errors["row"].to_pylist() == [4]

    def test_candidates_are_needed_and_checked(self, scorer):
        with pytest.raises(RequestError, match="no candidates"):
            scorer.candidates([])
        with pytest.raises(RequestError, match="'x' is not a 64-bit integer"):
            scorer.candidates(["x"])


class TestPairs:
    def test_each_row_has_its_score_in_its_place(self, scorer):
        ranker, rng = scorer.ranker, np.random.default_rng(1)
        users, items = known(ranker)
        pairs = [
            {
                "user": ([*users, stranger(ranker)])[rng.integers(len(users) + 1)],
                "scenario": ["rec", "search"][rng.integers(2)],
                "item": int(([*items, 999])[rng.integers(len(items) + 1)]),
                "context": [None, {"search_source": "box", "price": 2.0}][rng.integers(2)],
            }
            for _ in range(120)
        ]

        scored = scorer.score_pairs(pa.Table.from_pylist(pairs), first_row=1000)

        assert scored.results.schema == pair_results(ranker.checkpoint.schema)
        assert scored.results["row"].to_pylist() == [*range(1000, 1120)]
        for found, pair in zip(scored.results.to_pylist(), pairs, strict=True):
            assert all(found[name] == pair[name] for name in ("user", "scenario", "item"))
            request = RankRequest(pair["user"], pair["scenario"], [pair["item"]], context=pair["context"])
            assert found["score"] == pytest.approx(ranker.rank(request).results[0].score, abs=TOLERANCE)

    def test_bad_rows_keep_their_place_without_a_score(self, scorer):
        users, items = known(scorer.ranker)
        table = pa.table(
            {
                "user": [users[0], None, users[1], users[2], users[3]],
                "scenario": ["rec", "rec", "shop", "rec", "search"],
                "item": pa.array([items[0], items[0], items[0], None, items[1]]),
            }
        )

        scored = scorer.score_pairs(table)

        assert scored.results.select(["user", "scenario", "item"]) == table
        assert scored.results["score"].is_valid().to_pylist() == [True, False, False, False, True]
        errors = scored.errors.to_pylist()
        assert [row["row"] for row in errors] == [1, 2, 3]
        assert errors[1]["message"] == "no scenario 'shop'; valid: rec, search" and errors[1]["user"] == str(users[1])
        assert scored.num_candidates == 2

    def test_ids_of_another_type_are_told(self, scorer):
        users, items = known(scorer.ranker)
        table = pa.table({"user": users[:2], "scenario": ["rec"] * 2, "item": [str(item) for item in items[:2]]})
        scored = scorer.score_pairs(table)
        assert scored.results["score"].null_count == scored.results["item"].null_count == 2
        assert f"{str(items[0])!r} is not a 64-bit integer" in scored.errors["message"][0].as_py()

    def test_ids_in_other_arrow_types_are_read(self, scorer):
        users, items = known(scorer.ranker)
        plain = pa.table({"user": users[:3], "scenario": ["rec"] * 3, "item": items[:3]})
        item = pa.array([items[0], items[1], 2**64 - 1], pa.uint64())
        other = pa.table(
            {
                "user": plain["user"].combine_chunks().dictionary_encode(),
                "scenario": plain["scenario"].cast(pa.large_string()),
                "item": item,
            }
        )
        one, two = scorer.score_pairs(plain), scorer.score_pairs(other)
        assert two.results.drop(["score"]).slice(0, 2) == one.results.drop(["score"]).slice(0, 2)
        np.testing.assert_allclose(two.results["score"][:2], one.results["score"][:2], rtol=0, atol=TOLERANCE)
        assert two.results["item"][2].as_py() is None and two.errors["row"].to_pylist() == [2]


class TestBestFirst:
    @pytest.mark.parametrize("top_k", [None, 1, 5, 37, 100, 101])
    def test_is_the_head_of_a_stable_sort(self, top_k):
        rng = np.random.default_rng(0)
        for levels in (1, 2, 9, 1000):
            score_N = rng.integers(0, levels, 100) / levels
            assert best_first(score_N, top_k).tolist() == np.argsort(-score_N, kind="stable")[:top_k].tolist()
