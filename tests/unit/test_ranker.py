"""The ranker: ids to rows, context to indices, and that a request scores as the same prepared rows do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from tiny import tiny_checkpoint, tiny_knowledge, tiny_prepared

from llm4msr import storage
from llm4msr.data.prepared import ITEMS_FILE
from llm4msr.ranker import Ranker
from llm4msr.request import RankRequest, RequestError
from llm4msr.schema import UNSEEN_INDEX, feature_table_schema

TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tiny_prepared(str(tmp_path_factory.mktemp("prepared")))


@pytest.fixture(scope="module")
def ranker(prepared, tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("run") / "checkpoint")
    return Ranker.from_checkpoint(tiny_checkpoint(uri, prepared, tiny_knowledge()))


@pytest.fixture(scope="module")
def cold_ranker(tmp_path_factory):
    """Items 7020 to 7023 were never in train: alike in all features; the first three have knowledge, two the same."""
    prepared = tiny_prepared(str(tmp_path_factory.mktemp("cold") / "prepared"))
    uri = storage.join(prepared.uri, ITEMS_FILE)
    items = storage.read_parquet(uri).to_pydict()
    for row in range(20, 24):
        items["num_train_rows"][row], items["tags"][row] = 0, [0, 0, 0]
        items["item_id"][row] = items["genre"][row] = UNSEEN_INDEX
    storage.write_parquet(uri, pa.table(items, schema=feature_table_schema(prepared.schema, "item")))
    table = tiny_knowledge(items=True)
    item_index_N = table.item_index_N.copy()
    item_index_N[21:25] = [21, 22, 21, 0]  # item row = place among the keys + 1
    place = str(tmp_path_factory.mktemp("run") / "checkpoint")
    knowledge = replace(table, item_index_N=item_index_N)
    return Ranker.from_checkpoint(tiny_checkpoint(place, prepared, knowledge))


@pytest.fixture(scope="module")
def test_rows(prepared):
    table = pa.concat_tables([storage.read_parquet(uri) for uri, _ in prepared.files("test")])
    return {name: table[name].to_numpy() for name in table.column_names}


def take(rows, places):
    return {name: column[places] for name, column in rows.items()}


class TestScore:
    def test_a_row_scores_alone_as_in_a_batch(self, ranker, test_rows):
        together = ranker.score(test_rows)

        alone = [ranker.score(take(test_rows, [i]))[0] for i in range(50)]

        assert together.std() > 0.01
        np.testing.assert_allclose(alone, together[:50], rtol=0, atol=TOLERANCE)

    def test_a_request_scores_as_the_same_prepared_rows(self, ranker, prepared, test_rows):
        """Ids and raw context values lead to what the prepared row says by rows and indices."""
        expected = ranker.score(test_rows)
        users, items = prepared.users()["key"].to_pylist(), prepared.items()["key"].to_pylist()
        sources = dict(enumerate(prepared.vocabulary("search_source").to_pylist(), start=2))
        for i in range(40):
            row = {name: column[i].item() for name, column in test_rows.items()}
            context = {"price": row["price"] * 2.0 + 5.0}
            if row["search_source"] in sources:
                context["search_source"] = sources[row["search_source"]]
            answer = ranker.rank(
                RankRequest(
                    user=users[row["user_row"] - 1],
                    scenario=("rec", "search")[row["scenario"]],
                    items=[items[row["item_row"] - 1]],
                    context=context,
                )
            )
            assert answer.results[0].score == pytest.approx(expected[i], abs=TOLERANCE)

    def test_every_input_changes_the_score(self, ranker):
        """Without this the equalities above would hold for a model that ignores its inputs."""
        base = {"user": 1000, "scenario": "rec", "items": [7000], "context": {"search_source": "box", "price": 5.0}}
        changes = [
            {"user": 1001},
            {"scenario": "search"},
            {"items": [7001]},
            {"context": {"search_source": "suggestion", "price": 5.0}},
            {"context": {"search_source": "box", "price": 9.0}},
        ]
        score = ranker.rank(RankRequest(**base)).results[0].score
        for change in changes:
            assert abs(ranker.rank(RankRequest(**{**base, **change})).results[0].score - score) > 1e-5, change


class TestRank:
    def ask(self, ranker, **changes):
        return ranker.rank(RankRequest(**{"user": 1000, "scenario": "rec", "items": [7000, 7001, 7002], **changes}))

    def test_sorts_by_score_and_names_the_model(self, ranker):
        answer = self.ask(ranker, items=list(range(7000, 7029)))

        scores = [r.score for r in answer.results]
        assert scores == sorted(scores, reverse=True)
        assert sorted(r.item for r in answer.results) == list(range(7000, 7029))
        assert len(set(scores)) == 29
        assert answer.model_version == "tiny-0"
        timings = answer.timings_ms
        assert 0 < timings.encode + timings.knowledge + timings.model < timings.total < 60_000

    def test_the_order_of_the_candidates_does_not_matter(self, ranker):
        items = list(range(7000, 7029))
        shuffled = [int(k) for k in np.random.default_rng(3).permutation(items)]

        one, other = self.ask(ranker, items=items), self.ask(ranker, items=shuffled)

        assert one.results == other.results

    def test_ties_keep_the_order_of_the_request(self, ranker):
        """All unknown items score alike, wherever they stand, and so does an item that is asked for twice."""
        unknown = [5, 9, 1, 7, 3]

        answer = self.ask(ranker, items=[*unknown, 7000, 7000])

        assert [r.item for r in answer.results if not r.known] == unknown
        assert len({r.score for r in answer.results}) == 2

    def test_top_k_keeps_the_best(self, ranker):
        everything = self.ask(ranker)

        assert self.ask(ranker, top_k=2).results == everything.results[:2]
        assert self.ask(ranker, top_k=99).results == everything.results

    def test_tells_known_from_unknown(self, ranker):
        # Of the 40 users 1000 to 1039 the last five have no knowledge; 2**53 is not an item, 2**53 + 1 is.
        answer = self.ask(ranker, items=[7000, 2**53, 2**53 + 1])
        assert {r.item: r.known for r in answer.results} == {7000: True, 2**53: False, 2**53 + 1: True}
        assert (answer.user_known, answer.knowledge_known) == (True, True)
        known_without_knowledge = self.ask(ranker, user=1035)
        assert (known_without_knowledge.user_known, known_without_knowledge.knowledge_known) == (True, False)
        unknown = self.ask(ranker, user=1)
        assert (unknown.user_known, unknown.knowledge_known) == (False, False)

    def test_cold_items_are_told_apart_by_their_knowledge(self, cold_ranker):
        """Without knowledge a cold item scores as an unknown one: neither has anything that training has seen."""
        cold, unknown = [7020, 7021, 7022, 7023], 5

        answer = self.ask(cold_ranker, items=[*cold, unknown])

        score = {r.item: r.score for r in answer.results}
        assert {r.item: r.known for r in answer.results} == dict.fromkeys(cold, True) | {unknown: False}
        assert abs(score[7020] - score[7021]) > 1e-4
        assert score[7022] == pytest.approx(score[7020], abs=TOLERANCE)
        assert score[7023] == pytest.approx(score[unknown], abs=TOLERANCE)
        assert min(abs(score[unknown] - score[7020]), abs(score[unknown] - score[7021])) > 1e-4
        for item in cold:
            alone = self.ask(cold_ranker, items=[item]).results[0]
            assert alone.score == pytest.approx(score[item], abs=TOLERANCE)

    def test_knowledge_of_a_user_that_no_layer_reads_was_not_used(self, prepared, tmp_path):
        tree = {"model": {"meta": {"user_level": False}}}
        ranker = Ranker.from_checkpoint(tiny_checkpoint(str(tmp_path / "c"), prepared, tiny_knowledge(), **tree))

        answer = self.ask(ranker)

        assert (answer.user_known, answer.knowledge_known) == (True, False)

    def test_a_backbone_alone_uses_no_knowledge(self, prepared, tmp_path):
        ranker = Ranker.from_checkpoint(tiny_checkpoint(str(tmp_path / "c"), prepared, None))

        answer = self.ask(ranker)

        assert (answer.user_known, answer.knowledge_known) == (True, False)

    def test_text_ids(self, tmp_path):
        prepared = tiny_prepared(str(tmp_path / "prepared"), user_key_type="string")
        ranker = Ranker.from_checkpoint(tiny_checkpoint(str(tmp_path / "c"), prepared, tiny_knowledge()))

        assert self.ask(ranker, user="u003").user_known
        assert not self.ask(ranker, user="3").user_known
        with pytest.raises(RequestError, match="3 is not a text id"):
            self.ask(ranker, user=3)

    def test_context_left_out_is_padding_and_not_unseen(self, ranker, test_rows):
        """An absent category has index 0, one that is given but unknown 1; a number that is not given is its mean."""
        row = take(test_rows, [0]) | {
            "user_row": np.array([1], np.int32),
            "item_row": np.array([1], np.int32),
            "scenario": np.array([0], np.int32),
            "price": np.array([0.0], np.float32),
        }
        absent, unseen = (ranker.score(row | {"search_source": np.array([i], np.int32)})[0] for i in (0, 1))
        assert abs(absent - unseen) > 1e-5

        for context in (None, {"price": 5.0}, {"search_source": None}):
            answer = self.ask(ranker, items=[7000], context=context)
            assert answer.results[0].score == pytest.approx(absent, abs=TOLERANCE)
        answer = self.ask(ranker, items=[7000], context={"search_source": "never seen"})
        assert answer.results[0].score == pytest.approx(unseen, abs=TOLERANCE)

    @pytest.mark.parametrize(
        ("change", "field", "message"),
        [
            ({"scenario": "Rec"}, "scenario", "no scenario 'Rec'; valid: rec, search"),
            ({"items": []}, "items", "no candidates: give at least one item"),
            ({"top_k": 0}, "top_k", "0 results are not possible: give 1 or more, or leave it out"),
            ({"user": "1000"}, "user", "'1000' is not a 64-bit integer"),
            ({"items": [7000, "7001"]}, "items", "'7001' is not a 64-bit integer"),
            ({"context": {"prise": 1.0}}, "context", "no context feature 'prise'; valid: price, search_source"),
            ({"context": {"price": "5"}}, "context", "price is numeric, found '5'"),
            ({"context": {"price": float("nan")}}, "context", "price is nan, more than 1e+06 standard deviations"),
            ({"context": {"price": float("inf")}}, "context", "price is inf, more than"),
            ({"context": {"price": -2_000_006}}, "context", "price is -2000006, more than"),
            ({"context": {"price": 10**400}}, "context", "price is 1000"),
        ],
    )
    def test_refuses_what_it_cannot_score(self, ranker, change, field, message):
        with pytest.raises(RequestError) as error:
            self.ask(ranker, **change)
        assert error.value.field == field
        assert message in str(error.value)

    def test_scores_stay_finite_up_to_the_bound(self, ranker):
        answer = self.ask(ranker, context={"price": 2_000_000})

        assert all(0 <= r.score <= 1 for r in answer.results)
