"""What each row's history holds, against a search through all rows: nothing of its own moment, nothing later."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SEQUENCES, tiny_prepared, tiny_schema

from llm4msr import storage
from llm4msr.batch import Collator, EntityFeatures
from llm4msr.config import ConfigError, DataConfig
from llm4msr.data import history
from llm4msr.data.history import LikeLog, Moments
from llm4msr.data.source import DataError, RawFeature
from llm4msr.data.splits import NO_TIME
from llm4msr.schema import Feature, FeatureSchema, SchemaError, rows_schema
from llm4msr.settings import config_from_dict
from llm4msr.training.reader import list_row_groups, read_row_group, to_columns

NUM_USERS = 4
COMPARED = (("user_row", np.equal), ("timestamp_ms", np.less))
LOGS = {"history:all": None, "history:1": 1}

rows_of_logs = st.lists(
    st.tuples(
        st.integers(1, NUM_USERS),  # user
        st.integers(1, 5),  # item
        st.integers(0, 1),  # scenario
        st.integers(0, 1),  # label
        st.sampled_from([NO_TIME, 10, 20, 30]),  # time: many ties, some rows without
        st.integers(0, 3),  # position: ties too
    ),
    max_size=40,
)


def place(rows: list[tuple]) -> tuple[list[tuple], pa.Table, pa.Table]:
    """Sorted rows, the same as a table with their places, and the likes."""
    rows = sorted(rows, key=lambda r: (r[0], r[4], r[5]))
    columns = np.array(rows, np.int64).reshape(-1, 6).T
    names = ("user_row", "item_row", "scenario", "label")
    table = pa.table(dict(zip(names, columns.astype(np.int32), strict=False)))
    table = table.append_column("split", pa.array(np.zeros(len(rows), np.int8)))
    placed = history.place_rows(table, Moments(columns[0], columns[4], columns[5]), LOGS)
    return rows, placed, history.likes(placed, columns[4], columns[5])


def moment(row: tuple) -> tuple:
    return (row[4], row[5]) if row[4] == NO_TIME else (row[4],)


def expected(row: tuple, rows: list[tuple], scenario: int | None) -> list[int]:
    """Items that the row's user liked at earlier moments, in order."""
    liked = [r for r in rows if r[0] == row[0] and r[3] == 1 and scenario in (None, r[2]) and moment(r) < moment(row)]
    return [r[1] for r in sorted(liked, key=lambda r: (r[4], r[5], r[1], r[2]))]


@settings(deadline=None)
@given(rows_of_logs, st.randoms(use_true_random=False))
def test_a_row_sees_all_likes_of_earlier_moments_and_no_other(tmp_path_factory, rows, random):
    uri = str(tmp_path_factory.mktemp("logs"))
    schema = tiny_schema(more=SEQUENCES)
    ordered, placed, likes = place(rows)
    history.write_logs(uri, likes, NUM_USERS, LOGS)
    logs = history.read_logs(uri, schema)
    for name, column, scenario in (("all", "history:all", None), ("search", "history:1", 1)):
        log = logs[name]
        assert len(log.offset_U) == NUM_USERS + 2
        assert log.num_likes(np.array([0])).tolist() == [0]
        for row, num_before in zip(ordered, placed[column].to_pylist(), strict=True):
            begin = log.offset_U[row[0]]
            assert log.item_row_N[begin : begin + num_before].tolist() == expected(row, ordered, scenario)
        sizes = [sum(r[0] == user and r[3] and scenario in (None, r[2]) for r in rows) for user in range(NUM_USERS + 1)]
        assert log.num_likes(np.arange(NUM_USERS + 1)).tolist() == sizes
    shuffled = list(rows)
    random.shuffle(shuffled)
    again, placed_again, likes_again = place(shuffled)
    assert likes_again.equals(likes)
    found = zip(again, placed_again["history:all"].to_pylist(), strict=True)
    assert sorted(found) == sorted(zip(ordered, placed["history:all"].to_pylist(), strict=True))


@given(rows_of_logs, st.integers(0, 9))
def test_the_largest_value_of_earlier_moments(rows, seed):
    rows = sorted(rows, key=lambda r: (r[0], r[4], r[5]))
    columns = np.array(rows, np.int64).reshape(-1, 6).T
    values = np.random.default_rng(seed).integers(0, 3, len(rows))
    found = Moments(columns[0], columns[4], columns[5]).largest_before(values)
    for row, largest in zip(rows, found, strict=True):
        before = [v for r, v in zip(rows, values, strict=True) if r[0] == row[0] and moment(r) < moment(row)]
        assert largest == max(before, default=0)


def test_buckets_may_come_in_any_order(tmp_path):
    one = pa.table({"user_row": [3, 3], "item_row": [7, 5], "scenario": [1, 0]})
    other = pa.table({"user_row": [1, 4, 4], "item_row": [9, 2, 1], "scenario": [0, 1, 1]})
    schema = tiny_schema(more=SEQUENCES)
    for name, parts in (("a", [one, other]), ("b", [other, one])):
        history.write_logs(str(tmp_path / name), pa.concat_tables(parts), 5, LOGS)
        logs = history.read_logs(str(tmp_path / name), schema)
        assert logs["all"].item_row_N.tolist() == [9, 7, 5, 2, 1]
        assert logs["all"].offset_U.tolist() == [0, 0, 1, 1, 3, 5, 5]
        assert logs["search"].item_row_N.tolist() == [7, 2, 1]


def test_a_like_of_a_later_split_must_not_lie_before_a_row():
    rows = pa.table(
        {
            "user_row": pa.array([1, 1, 2, 2], pa.int32()),
            "scenario": [0, 0, 0, 0],
            "label": [1, 0, 0, 1],
            "split": pa.array([2, 1, 2, 0], pa.int8()),
        }
    )
    order = np.array([1, 1, 2, 2]), np.array([5, 6, 5, 6]), np.zeros(4, int)
    with pytest.raises(
        DataError, match=r"1 rows come after likes of a later split.* such as a valid row of user row 1"
    ):
        history.place_rows(rows, Moments(*order), {})
    tied = order[0], np.array([6, 6, 5, 6]), order[2]
    assert history.place_rows(rows, Moments(*tied), {}).num_rows == 4


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tiny_prepared(str(tmp_path_factory.mktemp("data") / "prepared"), more=SEQUENCES)


def collator_of(schema, items, logs):
    users = EntityFeatures(np.ones((3, 1), np.int32), np.zeros((3, 1), np.float32), ())
    return Collator(schema, users, items, None, logs)


@pytest.mark.parametrize(
    ("num_before", "liked", "found"),
    [
        (0, [0, 0, 0, 0, 0], [0, 0, 0]),
        (1, [13, 0, 0, 0, 0], [13, 0, 0]),
        (3, [13, 1, 11, 0, 0], [13, 1, 11]),
        (4, [13, 1, 11, 12, 0], [1, 11, 12]),
        (5, [13, 1, 11, 12, 13], [11, 12, 13]),
        (6, [1, 11, 12, 13, 12], [12, 13, 12]),
    ],
)
def test_the_last_items_are_kept_oldest_first_and_padded_at_the_end(prepared, num_before, liked, found):
    """Of no, one, exactly T and more likes; item row r has index r + 10, but row 4, which is unseen."""
    item_ids = np.array([1, 11, 12, 13, 1], np.int32)
    items = EntityFeatures(np.stack([item_ids, item_ids], 1), np.zeros((5, 0), np.float32), (np.zeros((5, 3), int),))
    log = LikeLog(np.array([0, 0, 2, 8]), np.array([1, 1, 3, 4, 1, 2, 3, 2], np.int32))
    collate = collator_of(prepared.schema, items, {"all": log, "search": log})
    rows = dict(to_columns(rows_schema(prepared.schema).empty_table()))
    size = {name: (1, *column.shape[1:]) for name, column in rows.items()}
    rows = {name: np.zeros(size[name], column.dtype) for name, column in rows.items()}
    rows |= {"user_row": np.array([2]), "history:all": np.array([num_before]), "history:1": np.array([num_before])}
    batch = collate(rows)
    assert [index_BT.tolist() for index_BT in batch.histories] == [[liked], [found]]
    # The unknown user has none, and likes that are given stand in place of the log.
    unknown = collate(rows | {name: np.array([0]) for name in ("user_row", *LOGS)})
    assert not any(index_BT.any() for index_BT in unknown.histories)
    given = {"all": np.array([2, 0], np.int32), "search": np.array([], np.int32)}
    histories = collate.features(rows, given).histories
    assert [index_BT.tolist() for index_BT in histories] == [[[12, 1, 0, 0, 0]], [[0, 0, 0]]]


def test_rows_of_a_file_hold_the_likes_that_lie_before_them(prepared):
    """Through files, reader and collator: train, valid and test rows alike."""
    tables = (prepared.users(), "user"), (prepared.items(), "item")
    entities = [EntityFeatures.from_table(table, prepared.schema, source) for table, source in tables]
    collate = Collator(prepared.schema, *entities, None, history.read_logs(prepared.uri, prepared.schema))
    groups = [g for split in ("train", "valid", "test") for g in list_row_groups(prepared.files(split))]
    pieces = [read_row_group(group) for group in groups]
    rows = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    batch = collate(rows)
    for feature, index_BT in zip(prepared.schema.select("history"), batch.histories, strict=True):
        assert index_BT.shape == (len(rows["row_id"]), feature.max_length)
        liked = (rows["label"] == 1) & ((rows["scenario"] == 1) | (feature.log == "all"))
        for i in range(0, len(index_BT), 7):
            same_user, earlier = (compare(rows[name], rows[name][i]) for name, compare in COMPARED)
            places = np.flatnonzero(liked & same_user & earlier)
            places = places[np.argsort(rows["timestamp_ms"][places])][-feature.max_length :]
            items = (rows["item_row"][places] + 1).tolist()  # item row r has index r + 1 in tiny data
            assert index_BT[i].tolist() == items + [0] * (feature.max_length - len(items))
    assert (batch.sequences[1].numpy() == rows["words"]).all()
    assert rows["words"].any()


def test_a_missing_log_is_named(prepared):
    items = EntityFeatures.from_table(prepared.items(), prepared.schema, "item")
    with pytest.raises(AssertionError, match="all"):
        collator_of(prepared.schema, items, None)
    with pytest.raises(storage.StorageError, match=r"history/all\.parquet"):
        history.read_logs("nowhere", prepared.schema)


class TestNames:
    def features(self, *wanted: dict):
        data = DataConfig(history=wanted)
        return history.history_features(data.history, [RawFeature("tags", "item", "sequence", 3)], ("home", "a.b/c"))

    def test_features_and_logs(self):
        found = self.features(
            {"name": "x"},
            {"name": "y", "scenario": "a.b/c", "max_length": 7, "pooling": "attention"},
            {"name": "z", "max_length": 3},
        )
        assert found == (
            Feature("x", "history", "user", max_length=20, log="all"),
            Feature("y", "history", "user", max_length=7, log="a.b/c", pooling="attention"),
            Feature("z", "history", "user", max_length=3, log="all"),
        )
        assert history.log_columns(found, ("home", "a.b/c")) == {"history:all": None, "history:1": 1}

    @pytest.mark.parametrize("name", ["tags", "item_id", "user_id"])
    def test_a_name_that_is_taken(self, name):
        with pytest.raises(ConfigError, match=rf"data\.history: '{name}' is the name of another feature"):
            self.features({"name": name})

    def test_an_unknown_scenario(self):
        with pytest.raises(ConfigError, match=r"'x' is of scenario 'hom', which is not there; valid: \['home', 'a"):
            self.features({"name": "x", "scenario": "hom"})

    @pytest.mark.parametrize(
        ("features", "message"),
        [
            ([{"name": "x"}, {"name": "x"}], "data.history: the name 'x' is given to more than one feature"),
            (
                [{"name": "x", "max_length": 0}],
                r"data.history.0.max_length: Input should be greater than or equal to 1",
            ),
            ([{"name": ""}], "data.history.0.name"),
            ([{"name": "x", "pooling": "sum"}], "data.history.0.pooling: Input should be 'mean' or 'attention'"),
        ],
    )
    def test_configuration(self, features, message):
        with pytest.raises(ConfigError, match=message):
            config_from_dict({"data": {"history": features}})

    def test_sharded_tables_are_refused(self):
        tree = {
            "data": {"history": [{"name": "liked"}]},
            "model": {"embedding_sharding": "sharded"},
            "train": {"embedding_optimizer": "rowwise_adagrad", "num_workers": 1},
        }
        with pytest.raises(ConfigError, match=r"data\.history names \['liked'\] and model\.embedding_sharding"):
            config_from_dict(tree)


class TestSchema:
    def test_round_trip_and_older_schemas(self):
        schema = tiny_schema(more=SEQUENCES)
        assert FeatureSchema.from_json(schema.to_json()) == schema
        old = tiny_schema().to_json()
        for feature in old["features"]:
            del feature["log"], feature["pooling"]
        assert FeatureSchema.from_json(old) == tiny_schema()
        assert tiny_schema().history_columns == {}

    @pytest.mark.parametrize(
        "feature",
        [
            Feature("x", "history", "user", max_length=5, log="elsewhere"),
            Feature("x", "history", "user", max_length=0, log="all"),
            Feature("x", "history", "context", max_length=5, log="all"),
        ],
    )
    def test_what_a_history_must_be(self, feature):
        with pytest.raises(SchemaError, match="history 'x' must be of source user"):
            tiny_schema(more=(feature,))

    def test_columns_of_rows(self):
        schema = tiny_schema(more=SEQUENCES)
        names = rows_schema(schema).names
        assert names[6:] == ["position", "moment", "history:all", "history:1", "search_source", "price", "words"]
        assert rows_schema(schema).field("words").type == pa.list_(pa.int32(), 2)
        assert rows_schema(tiny_schema()).names == [n for n in names if not n.startswith("history:") and n != "words"]


def test_moments_are_numbered_within_each_user():
    user_row_B = np.array([1, 1, 1, 1, 2, 2, 2, 3])
    time_B = np.array([5, 5, 7, 9, NO_TIME, NO_TIME, NO_TIME, 4])
    position_B = np.array([0, 3, 1, 2, 4, 4, 6, 0])
    assert Moments(user_row_B, time_B, position_B).number().tolist() == [0, 0, 1, 2, 0, 0, 1, 0]
    nothing = np.zeros(0, np.int64)
    assert Moments(nothing, nothing, nothing).number().tolist() == []
