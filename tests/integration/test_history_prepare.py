"""Histories through prepare: raw files in, and every prepared row's history against a search through the raw rows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llm4msr import storage
from llm4msr.config import ConfigError
from llm4msr.data.history import read_logs
from llm4msr.data.pipeline import prepare
from llm4msr.data.prepared import PreparedData
from llm4msr.data.source import DataError
from llm4msr.schema import SPLITS, Feature
from llm4msr.settings import config_from_dict

NUM_ROWS, SCENARIOS = 600, ("home", "search")
HISTORY = [
    {"name": "liked", "max_length": 4},
    {"name": "found", "scenario": "search", "pooling": "attention"},
    {"name": "more", "max_length": 50},
]
TIMES = {"split": {"kind": "time"}, "table": {"timestamp_column": "time", "timestamp_unit": "ms", "label_column": "y"}}
ORDER = {"split": {"kind": "per_user_last"}, "table": {"position_column": "order", "label_column": "y"}}


def random_rows(positives_only: bool = False) -> list[tuple]:
    """user, item, scenario, label, time, order, words: rows share their moment, and items come again."""
    rng = np.random.default_rng(0)
    time = rng.integers(0, 60, NUM_ROWS)
    columns = (
        [f"u{i}" for i in rng.integers(0, 12, NUM_ROWS)],
        [f"i{i}" for i in rng.integers(0, 90, NUM_ROWS)],
        [SCENARIOS[i] for i in rng.integers(0, 2, NUM_ROWS)],
        [1 if positives_only else int(i) for i in rng.integers(0, 2, NUM_ROWS)],
        time.tolist(),
        (time // 3).tolist(),
        [
            "|".join(f"w{w}" for w in rng.integers(0, 9, n) * (1 + t // 54 * 10))
            for n, t in zip(rng.integers(0, 4, NUM_ROWS), time, strict=True)
        ],
    )
    return list(dict.fromkeys(zip(*columns, strict=True)))


def run(tmp_path: Path, rows: list[tuple], name: str = "ws", num_files: int = 2, **data) -> PreparedData:
    folder = tmp_path / name / "raw" / "log"
    folder.mkdir(parents=True)
    for n in range(num_files):
        lines = [",".join(map(str, row)) for row in rows[n::num_files]]
        (folder / f"part-{n}.csv").write_text("\n".join(["user_id,item_id,scenario,y,time,order,words", *lines, ""]))
    data["table"] = {"interactions": "log"} | data["table"]
    raw = {"kind": "table", "raw_uri": str(tmp_path / name / "raw"), "num_buckets": 3, "history": HISTORY}
    return PreparedData.open(prepare(config_from_dict({"workspace_uri": str(tmp_path / name), "data": raw | data})))


def histories(data: PreparedData) -> list[tuple[str, tuple, dict[str, tuple]]]:
    """Of each prepared row: split; user, item, scenario, label; what its user had liked, by log."""
    users, items = (["", *table["key"].to_pylist()] for table in (data.users(), data.items()))
    logs, found = read_logs(data.uri, data.schema), []
    for split in SPLITS:
        for uri, _ in data.files(split):
            for row in storage.read_parquet(uri).to_pylist():
                liked = {}
                for name, column in data.schema.history_columns.items():
                    begin = logs[name].offset_U[row["user_row"]]
                    liked[name] = tuple(items[i] for i in logs[name].item_row_N[begin : begin + row[column]])
                what = (users[row["user_row"]], items[row["item_row"]], SCENARIOS[row["scenario"]], row["label"])
                found.append((split, what, liked))
    return found


def expected(rows: list[tuple], place: int, scenario: str | None) -> Counter:
    """Each row with what its user liked at smaller values of the column `place`, in order."""
    out = Counter()
    for row in rows:
        likes = [r for r in rows if r[0] == row[0] and r[3] == 1 and r[place] < row[place] and scenario in (None, r[2])]
        out[row[:4], tuple(r[1] for r in sorted(likes, key=lambda r: (r[place], r[1], r[2])))] += 1
    return out


@pytest.mark.usefixtures("ray_cluster")
class TestPrepare:
    def test_each_row_holds_all_earlier_likes_and_no_other(self, tmp_path):
        """With times, and with an order alone; train, valid and test rows alike; whatever the order of the files."""
        rows = random_rows()
        for name, data, place in (("times", TIMES, 4), ("order", ORDER, 5)):
            # Likes of one time are in the order of lines: give them an order that the search can know.
            table = data["table"] | {"position_column": "order"}
            shuffled = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
            one = run(tmp_path, rows, name, **data | {"table": table})
            other = run(tmp_path, shuffled, f"{name}-shuffled", num_files=3, **data | {"table": table})
            for prepared in (one, other):
                found = histories(prepared)
                assert {split for split, _, _ in found} == set(SPLITS)
                for log, scenario in (("all", None), ("search", "search")):
                    assert Counter((what, liked[log]) for _, what, liked in found) == expected(rows, place, scenario)
        assert one.schema.select("history") == (
            Feature("liked", "history", "user", max_length=4, log="all"),
            Feature("found", "history", "user", max_length=20, log="search", pooling="attention"),
            Feature("more", "history", "user", max_length=50, log="all"),
        )
        assert [f.source for f in one.schema.features] == ["user"] * 4 + ["item"]

    def test_drawn_negatives_stand_where_their_positive_stands(self, tmp_path):
        rows = random_rows(positives_only=True)
        prepared = run(tmp_path, rows, negatives_per_positive=2, **TIMES)
        found = histories(prepared)
        place = {0: Counter(), 1: Counter()}
        for split, (user, _, scenario, label), liked in found:
            place[label][split, user, scenario, liked["all"], liked["search"]] += 1
        assert place[0] == {key: 2 * n for key, n in place[1].items()}
        logs = read_logs(prepared.uri, prepared.schema)
        assert len(logs["all"].item_row_N) == len(rows)  # positives alone

    def test_lists_of_the_context(self, tmp_path):
        """The vocabulary is that of train rows; other words are unseen, no words are padding."""
        feature = {"name": "words", "source": "context", "kind": "sequence", "max_length": 2}
        prepared = run(tmp_path, random_rows(), **TIMES | {"table": TIMES["table"] | {"features": [feature]}})
        moment = prepared.manifest["data"]["split"]["valid_from_ms"]
        words = [row[6].split("|")[:2] for row in random_rows() if row[4] < moment]
        counts = Counter(word for row in words for word in row if word)
        assert prepared.vocabulary("words").to_pylist() == sorted(counts, key=lambda w: (-counts[w], w))
        index = {word: i for i, word in enumerate(prepared.vocabulary("words").to_pylist(), start=2)}
        found = Counter()
        for split in SPLITS:
            for uri, _ in prepared.files(split):
                table = storage.read_parquet(uri)
                found.update(
                    zip(table["timestamp_ms"].to_pylist(), map(tuple, table["words"].to_pylist()), strict=True)
                )
        encoded = [(row[4], [index.get(w, 1) for w in row[6].split("|")[:2] if w]) for row in random_rows()]
        assert found == Counter((time, (*ids, 0, 0)[:2]) for time, ids in encoded)
        assert any(1 in ids for _, ids in found)

    def test_splits_that_are_out_of_order_are_refused(self, tmp_path):
        rows = [(*row[:6], SPLITS[i % 3]) for i, row in enumerate(random_rows())]
        table = TIMES["table"]
        with pytest.raises(DataError, match=r"data\.history: \d+ rows come after likes of a later split"):
            run(tmp_path, rows, split={"kind": "column", "column": "words"}, table=table)
        run(tmp_path, rows, "without", split={"kind": "column", "column": "words"}, table=table, history=[])

    def test_an_unknown_scenario_is_named(self, tmp_path):
        with pytest.raises(ConfigError, match=r"'x' is of scenario 'hom', which is not there; valid: \['home'"):
            run(tmp_path, random_rows(), history=[{"name": "x", "scenario": "hom"}], **TIMES)

    def test_without_histories_there_is_no_trace_of_them(self, tmp_path):
        prepared = run(tmp_path, random_rows(), history=[], **TIMES)
        assert not storage.list_files(storage.join(prepared.uri, "history"))
        names = storage.parquet_metadata(prepared.files("train")[0][0]).schema.names
        assert names == ["row_id", "user_row", "item_row", "scenario", "label", "timestamp_ms", "position", "moment"]
