"""What a batch consists of: its input is checked before anything runs, and is cut the same way each time."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from tiny import tiny_checkpoint, tiny_knowledge, tiny_prepared

from llm4msr import storage
from llm4msr.config import ConfigError
from llm4msr.data.source import DataError
from llm4msr.scoring import plan
from llm4msr.scoring.units import ScoreUnit, Task
from llm4msr.settings import config_from_dict


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    return tiny_checkpoint(str(folder / "checkpoint"), tiny_prepared(str(folder / "data")), tiny_knowledge())


@pytest.fixture(scope="module")
def model(checkpoint):
    return plan.open_model(config_from_dict({"score": {"checkpoint_uri": checkpoint}}))


def settings(**changes):
    return config_from_dict({"score": changes}).score


def table(**columns):
    return pa.table({"user": [1000, 1001], "scenario": ["rec", "search"], **columns})


LISTS = {"items": [[7000], [7001, 7002]]}
PAIRS = {"item": [7000, 7001]}
CONTEXT = [{"price": 1.0}, {"price": 2.0}]


def write(folder, *tables):
    for number, content in enumerate(tables):
        storage.write_parquet(str(folder / f"{number}.parquet"), content)
    return str(folder)


class TestInput:
    @pytest.mark.parametrize(
        ("columns", "kind", "read"),
        [
            (LISTS, "lists", ["user", "scenario", "items"]),
            (LISTS | {"top_k": [1, None], "note": ["a", "b"]}, "lists", ["user", "scenario", "items", "top_k"]),
            (LISTS | {"context": CONTEXT}, "lists", ["user", "scenario", "items", "context"]),
            (PAIRS | {"top_k": [1, 2]}, "pairs", ["user", "scenario", "item"]),
            (PAIRS | {"context": CONTEXT}, "pairs", ["user", "scenario", "item", "context"]),
        ],
    )
    def test_the_columns_say_what_it_is(self, columns, kind, read, model, tmp_path):
        uri = write(tmp_path, table(**columns), table(**columns))
        found = plan.open_input(settings(input_uri=uri), model)
        assert (found.kind, found.columns, found.num_rows) == (kind, tuple(read), (2, 2))
        assert found.files == (f"{uri}/0.parquet", f"{uri}/1.parquet")

    def test_without_an_input_it_is_users(self, model, tmp_path):
        own = plan.open_input(settings(), model)
        assert (own.kind, own.columns, own.num_rows) == ("users", ("key",), (40,))
        given = plan.open_input(settings(users_uri=write(tmp_path, pa.table({"user": [1, 2, 3]}))), model)
        assert (given.kind, given.columns, given.num_rows) == ("users", ("user",), (3,))

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({}, "0.parquet: neither column items nor item: give lists .* or pairs .*; found: user, scenario"),
            (LISTS | PAIRS, "0.parquet: both columns items and item: give"),
            ({"items": [7000, 7001]}, "column items is int64: a list of item ids is needed"),
            (LISTS | {"top_k": ["1", "2"]}, "column top_k is string: whole numbers are needed"),
            (LISTS | {"context": ["a", "b"]}, "column context is string: a struct of context features is needed"),
            (PAIRS | {"context": [{"prise": 1}] * 2}, "context has 'prise', no .*; valid: search_source, price"),
        ],
    )
    def test_wrong_columns_are_refused(self, columns, message, model, tmp_path):
        with pytest.raises(DataError, match=message):
            plan.open_input(settings(input_uri=write(tmp_path, table(**columns))), model)

    def test_every_file_is_checked(self, model, tmp_path):
        uri = write(tmp_path, table(**LISTS), table(**LISTS).drop(["scenario"]))
        with pytest.raises(DataError, match=r"1.parquet: no column 'scenario'; lists need .*, found: user, items"):
            plan.open_input(settings(input_uri=uri), model)
        with pytest.raises(DataError, match=r"no column 'user'; users need \['user'\], found: id"):
            users = write(tmp_path / "users", pa.table({"id": [1]}))
            plan.open_input(settings(users_uri=users), model)

    def test_missing_and_empty_and_damaged_files(self, model, tmp_path):
        with pytest.raises(storage.StorageError, match=r"nowhere: no Parquet file there"):
            plan.open_input(settings(input_uri=str(tmp_path / "nowhere")), model)
        with pytest.raises(DataError, match="no rows in its 1 files"):
            plan.open_input(settings(input_uri=write(tmp_path, table(**LISTS).slice(0, 0))), model)
        (tmp_path / "9.parquet").write_bytes(b"PAR1")
        with pytest.raises(storage.StorageError, match=r"9.parquet: not a readable Parquet file"):
            plan.open_input(settings(input_uri=str(tmp_path)), model)


class TestModel:
    def test_the_report_names_it(self, checkpoint, model, tmp_path):
        assert (model.uri, model.version, model.num_items) == (checkpoint, "tiny-0", 30)
        root = checkpoint.removesuffix("/checkpoint")
        storage.write_json(f"{root}/report.json", {"checkpoint": "checkpoint"})
        assert plan.open_model(config_from_dict({"workspace_uri": root})) == model
        with pytest.raises(storage.StorageError, match=r"report.json: no such file"):
            plan.open_model(config_from_dict({"workspace_uri": str(tmp_path)}))

    def test_what_is_no_checkpoint_is_refused(self, checkpoint, tmp_path):
        data = checkpoint.replace("/checkpoint", "/data")
        for uri, message in ((data, "a 'prepared' directory, not a checkpoint"), (str(tmp_path), "is unfinished")):
            with pytest.raises(storage.StorageError, match=message):
                plan.open_model(config_from_dict({"score": {"checkpoint_uri": uri}}))


class TestCandidates:
    def test_each_is_taken_once(self, model, tmp_path):
        (tmp_path / "a.json").write_text("[5, 3, 5, 4]")
        storage.write_parquet(str(tmp_path / "b.parquet"), pa.table({"item": [5, 3, 5, 4], "name": list("abcd")}))
        for name in ("a.json", "b.parquet"):
            assert plan.read_candidates(str(tmp_path / name), model.schema) == [5, 3, 4]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"items": [1]}, "a JSON list of item ids is needed"),
            ([], "no items in it"),
            ([1, "2"], "item 1 is '2': ids of this checkpoint are whole numbers"),
            ([[1]], r"item 0 is \[1\]"),
            ([True], "item 0 is True"),
        ],
    )
    def test_others_are_refused(self, content, message, model, tmp_path):
        (tmp_path / "a.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match=message):
            plan.read_candidates(str(tmp_path / "a.json"), model.schema)


class TestUnits:
    def test_all_rows_are_in_one_unit(self):
        rows = plan.Input("lists", ("a", "b", "c"), (5, 0, 4), ())
        units = plan.cut_units(rows, 2).to_pylist()
        assert [tuple(unit.values()) for unit in units] == [
            (0, "a", 0, 2, 0),
            (1, "a", 2, 2, 2),
            (2, "a", 4, 1, 4),
            (3, "c", 0, 2, 5),
            (4, "c", 2, 2, 7),
        ]

    @pytest.mark.parametrize(
        ("kind", "num_rows", "candidates", "expected"),
        [
            ("lists", 10**6, 1, 4096),
            ("lists", 4000, 1, 500),
            ("lists", 100, 1, 64),
            ("users", 10**6, 2**20, 4),
            ("users", 10**6, 2**30, 1),
            ("users", 8, 10, 1),
        ],
    )
    def test_a_unit_is_some_seconds_of_work(self, kind, num_rows, candidates, expected):
        rows = plan.Input(kind, ("a",), (num_rows,), ())
        assert plan.choose_rows_per_unit(settings(), rows, candidates, num_actors=2) == expected
        assert plan.choose_rows_per_unit(settings(rows_per_commit=3), rows, candidates, num_actors=2) == 3

    def test_the_plan_that_lies_there_is_kept(self, model, tmp_path):
        config = config_from_dict({"workspace_uri": str(tmp_path)})
        rows = plan.open_input(config.score, model)
        uri, first = plan.open_plan(config, model, rows, 7)
        assert (uri, first["rows_per_unit"]) == (f"{tmp_path}/scores/{plan.digest(first['identity'])}", 7)
        assert plan.open_plan(config, model, rows, 8) == (uri, first)

    def test_whatever_changes_the_scores_is_another_batch(self, model, tmp_path):
        (tmp_path / "a.json").write_text("[1]")
        users = write(tmp_path / "users", pa.table({"user": [1]}))
        others = [{}, {"top_k": 5}, {"scenarios": ["rec"]}, {"candidates_uri": f"{tmp_path}/a.json"}]
        places = set()
        for changes in (*others, {"users_uri": users}):
            config = config_from_dict({"workspace_uri": str(tmp_path), "score": changes})
            places.add(plan.open_plan(config, model, plan.open_input(config.score, model), 1)[0])
        config = config_from_dict({"workspace_uri": str(tmp_path), "score": {"num_actors": 3}})
        places.add(plan.open_plan(config, model, plan.open_input(config.score, model), 1)[0])
        assert len(places) == len(others) + 1

    def test_an_unknown_scenario_is_refused(self, model):
        with pytest.raises(ConfigError, match=r"has no scenario 'shop'; valid: rec, search"):
            plan.chosen_scenarios(settings(scenarios=["shop"]), model.schema)
        assert plan.chosen_scenarios(settings(), model.schema) == ("rec", "search")


class TestOneUnit:
    """An actor's work, without Ray."""

    @pytest.fixture
    def task(self, checkpoint, tmp_path):
        return Task(str(tmp_path / "out"), checkpoint, "tiny-0", "lists", ("user", "scenario", "items"))

    def test_is_committed_and_the_same_when_done_again(self, task, tmp_path):
        content = table(items=[[7000], []])
        uri = write(tmp_path / "in", pa.concat_tables([table(**LISTS), content]))
        unit = {"unit": 3, "file": f"{uri}/0.parquet", "first": 2, "num_rows": 2, "row": 52}
        done = ScoreUnit(task, 1)(pa.Table.from_pylist([unit], plan.UNITS)).to_pylist()
        assert done == [{"num_rows": 2, "num_failed": 1, "num_candidates": 1, "error": None}]
        files = [name for name, _ in storage.list_files(task.output_uri)]
        assert files == [f"{task.output_uri}/{name}/part-0000003.parquet" for name in ("errors", "scores")]
        assert [storage.read_parquet(name)["row"].to_pylist() for name in files] == [[53], [52]]
        before = [storage.read_parquet(name) for name in files]
        ScoreUnit(task, 1).run(unit)
        assert [storage.read_parquet(name) for name in files] == before

    def test_what_is_wrong_comes_back_as_text(self, task, tmp_path):
        unit = {"unit": 0, "file": f"{tmp_path}/x.parquet", "first": 0, "num_rows": 2, "row": 0}
        units = pa.Table.from_pylist([unit], plan.UNITS)
        (row,) = ScoreUnit(task, 1)(units).to_pylist()
        assert row["error"] == f"{tmp_path}/x.parquet: no such file"
        other = Task(task.output_uri, task.checkpoint_uri, "tiny-1", "lists", task.columns)
        (row,) = ScoreUnit(other, 1)(units).to_pylist()
        assert row["error"].endswith(
            "is tiny-0, the batch was planned for tiny-1: it was replaced meanwhile, or differs between nodes"
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_uri": "a", "users_uri": "b"}, "users_uri = 'b' and input_uri = 'a': the input says itself"),
        ({"input_uri": "a", "scenarios": ["x"]}, "scenarios = .* and input_uri = 'a'"),
        ({"scenarios": ["x", "x"]}, "give each once"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(**changes)
