"""The KuaiSAR adapter: both releases and every known quirk of their rows, one test each."""

from __future__ import annotations

import pyarrow as pa
import pytest
from kuaisar_release import FULL, SEARCH_POSITION, SMALL, merged, parse, tables, write_release

from llm4msr import schema
from llm4msr.data.source import DataError, RawFeature


@pytest.fixture
def write(tmp_path):
    def write(headers=SMALL, folder=tmp_path / "raw", **files):
        return write_release(folder, headers, **files)

    return write


@pytest.mark.parametrize("headers", [SMALL, FULL], ids=["small", "full"])
class TestBothReleases:
    def test_recommendation_row(self, write, headers):
        table, rejects = parse(write(headers), "rec_inter")
        assert rejects.num_rows == 0
        assert table.to_pylist() == [
            {
                "user_id": 7,
                "item_id": 11,
                "scenario": 0,
                "label": 1,
                "timestamp_ms": 1684742000000,
                "position": 2,
                "split": None,
                "search_source": None,
                "session_id": None,
                "query_text": None,
            }
        ]

    def test_search_row(self, write, headers):
        table, rejects = parse(write(headers, src_inter=[{"click_cnt": "2"}]), "src_inter")
        assert rejects.num_rows == 0
        assert table.to_pylist() == [
            {
                "user_id": 7,
                "item_id": 12,
                "scenario": 1,
                "label": 1,
                "timestamp_ms": 1684763932919,
                "position": SEARCH_POSITION + 2,
                "split": None,
                "search_source": "USER_INPUT",
                "session_id": "900",
                "query_text": "[20, 34, 3]",
            }
        ]

    def test_user_row(self, write, headers):
        table, _ = tables(write(headers).parse_entities("user"))
        assert table.to_pylist() == [
            {
                "key": 7,
                "text": "",
                "onehot_feat1": "7",
                "onehot_feat2": "2",
                "search_active_level": "6",
                "rec_active_level": "3",
            }
        ]

    def test_item_row(self, write, headers):
        table, _ = tables(write(headers).parse_entities("item"))
        expected = {
            "key": 11,
            "text": "Funny > Funny joke",
            "author_id": "44552",
            "first_level_category_id": "9",
            "second_level_category_id": "136",
            "third_level_category_id": None,
            "fourth_level_category_id": None,
            "item_type": "NORMAL",
            "upload_type": "ShortImport",
        }
        assert table.to_pylist() == [expected | ({"music_id": "81"} if headers is SMALL else {})]

    def test_columns_in_any_order(self, write, headers):
        reversed_headers = {name: ",".join(reversed(header.split(","))) for name, header in headers.items()}
        one, other = write(headers), None
        expected = [parse(one, "rec_inter")[0], parse(one, "src_inter")[0], tables(one.parse_entities("item"))[0]]
        other = write(reversed_headers)
        found = [parse(other, "rec_inter")[0], parse(other, "src_inter")[0], tables(other.parse_entities("item"))[0]]
        assert found == expected


def test_schema_of_tables(write):
    adapter = write()
    events = schema.events_schema("int64", "int64", (("search_source", "categorical"),))
    parsed = parse(adapter, "rec_inter")[0].schema
    assert parsed == parse(adapter, "src_inter")[0].schema
    assert parsed.names == [*events.names, "session_id", "query_text"]
    assert merged(adapter).schema == events
    for source in ("user", "item"):
        table = tables(adapter.parse_entities(source))[0]
        names = [f.name for f in adapter.features if f.source == source]
        assert table.schema.names == ["key", "text", *names]
        assert table.schema.types == [pa.int64()] + [pa.string()] * (1 + len(names))


def test_features_are_known_before_the_impression(write):
    names = [f.name for f in write().features]
    outcomes = {"playing_time", "forward", "like", "follow", "search", "search_item_related", "click", "click_cnt"}
    assert outcomes.isdisjoint(names)
    assert names[-2:] == ["music_id", "search_source"]
    assert {f.kind for f in write().features} == {"categorical"}


class TestBags:
    """Words of captions and queries, which are features where data.kuaisar.bags names them."""

    BOTH = ("caption", "keyword")

    @pytest.mark.parametrize("headers", [SMALL, FULL], ids=["small", "full"])
    def test_features_and_values(self, write, headers):
        adapter = write(headers, bags=self.BOTH)
        assert adapter.features[-3:] == (
            RawFeature("caption", "item", "sequence", max_length=16),
            RawFeature("search_source", "context", "categorical"),
            RawFeature("keyword", "context", "sequence", max_length=8),
        )
        assert tables(adapter.parse_entities("item"))[0]["caption"].to_pylist() == [["2077636", "5"]]
        search, rec = parse(adapter, "src_inter")[0], parse(adapter, "rec_inter")[0]
        assert search["keyword"].to_pylist() == [["20", "34", "3"]]
        assert rec["keyword"].to_pylist() == [None]
        context = (("search_source", "categorical"), ("keyword", "sequence"))
        assert merged(adapter).schema == schema.events_schema("int64", "int64", context)
        assert search.schema == rec.schema
        assert merged(adapter)["keyword"].to_pylist() == [None, ["20", "34", "3"]]

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("[7]", ["7"]),
            ('"[1,2,  3]"', ["1", "2", "3"]),
            ("[]", None),
            ("", None),
            ("9007199254740993", ["9007199254740993"]),
            ("[nan]", None),
            ('"[4, 4, 5]"', ["4", "4", "5"]),
        ],
    )
    def test_texts(self, write, text, words):
        adapter = write(bags=self.BOTH, item_features=[{"caption": text}], src_inter=[{"keyword": text}])
        assert tables(adapter.parse_entities("item"))[0]["caption"].to_pylist() == [words]
        assert parse(adapter, "src_inter")[0]["keyword"].to_pylist() == [words]
        assert merged(adapter)["keyword"].to_pylist() == [None, words]

    def test_searches_are_told_apart_by_their_text_as_without_bags(self, write, tmp_path):
        rows = [{"keyword": text} for text in ("[1]", "[2]", "[1]", "", "[]")]
        with_bags = write(bags=self.BOTH, src_inter=rows)
        without = write(folder=tmp_path / "without", src_inter=rows)
        assert merged(with_bags).drop_columns(["keyword"]) == merged(without)
        assert merged(with_bags)["keyword"].to_pylist()[1:] == [["1"], ["2"], None, None]

    def test_a_file_without_captions(self, write):
        header = SMALL | {"item_features": SMALL["item_features"].replace("caption,", "")}
        write(header, bags=("keyword",)).shards()
        with pytest.raises(DataError, match="no column 'caption' in the header"):
            write(header, bags=("caption",)).shards()

    def test_one_alone(self, write):
        names = [f.name for f in write(bags=("caption",)).features if f.kind == "sequence"]
        assert names == ["caption"]
        assert "keyword" not in merged(write(bags=("caption",))).column_names


def test_music_id_is_a_feature_only_where_a_file_has_it(write):
    assert "music_id" not in [f.name for f in write(FULL).features]


def test_scenarios(write):
    adapter = write()
    assert [s.name for s in adapter.scenarios] == ["recommendation", "search"]
    assert (adapter.user_key_type, adapter.item_key_type) == ("int64", "int64")


def test_category_names_with_commas_stay_whole(write):
    name = "Film, Television, and Short Dramas"
    adapter = write(item_features=[{"first_level_category_name_en": f'"{name}"'}])
    assert tables(adapter.parse_entities("item"))[0]["text"].to_pylist() == [f"{name} > Funny joke"]


def test_chinese_names_where_the_english_columns_are_absent(write):
    header = SMALL["item_features"].split(",first_level_category_name_en")[0]
    adapter = write(SMALL | {"item_features": header})
    assert tables(adapter.parse_entities("item"))[0]["text"].to_pylist() == ["搞笑 > 搞笑段子"]


def test_padding_stands_for_nothing(write):
    zeros = dict.fromkeys(["author_id", "music_id", *(f"{x}_level_category_id" for x in ("first", "second"))], "0")
    names = dict.fromkeys([f"{x}_level_category_name_en" for x in ("first", "second")], "empty")
    rows = [zeros | names | {"upload_type": "UNKNOWN"}]
    row = tables(write(item_features=rows).parse_entities("item"))[0].to_pylist()[0]
    assert {name for name, value in row.items() if value is None} == {
        "author_id",
        "music_id",
        *(f"{x}_level_category_id" for x in ("first", "second", "third", "fourth")),
    }
    assert (row["text"], row["upload_type"]) == ("", "UNKNOWN")


def test_zero_one_hot_fields_are_values(write):
    rows = [{"onehot_feat1": "0", "onehot_feat2": "0", "search_active_level": "0", "reco_active_level": ""}]
    row = tables(write(user_features=rows).parse_entities("user"))[0].to_pylist()[0]
    assert list(row.values()) == [7, "", "0", "0", "0", None]


@pytest.mark.parametrize(("feat1", "feat2"), [("7", "2"), ("2", "7")])
def test_either_range_of_the_one_hot_fields(write, feat1, feat2):
    rows = [{"onehot_feat1": feat1, "onehot_feat2": f"{feat2}.0"}]
    table, rejects = tables(write(user_features=rows).parse_entities("user"))
    assert (table["onehot_feat1"].to_pylist(), table["onehot_feat2"].to_pylist()) == ([feat1], [feat2])
    assert rejects.num_rows == 0


def test_upload_time_of_1970_is_harmless(write):
    table, rejects = tables(write(item_features=[{"upload_time": "1970-01-01"}]).parse_entities("item"))
    assert (table.num_rows, rejects.num_rows) == (1, 0)


def test_timestamps_as_floats_and_as_integers(write):
    rows = [{"timestamp": t} for t in ("1.684742e+12", "1684742000001", "1684742000002.0", "1.684742000003E12")]
    table, rejects = parse(write(rec_inter=rows), "rec_inter")
    assert table["timestamp_ms"].to_pylist() == [1684742000000 + i for i in range(4)]
    assert rejects.num_rows == 0


def test_null_playing_time_and_duration_are_harmless(write):
    table, rejects = parse(write(rec_inter=[{"playing_time": "", "duration_ms": ""}]), "rec_inter")
    assert (table.num_rows, rejects.num_rows) == (1, 0)


def test_ids_beyond_float32_stay_exact(write):
    rows = [{"item_id": "103656000000"}, {"item_id": str(2**53 + 1)}, {"item_id": "junk"}]
    assert parse(write(rec_inter=rows), "rec_inter")[0]["item_id"].to_pylist() == [103656000000, 2**53 + 1]


@pytest.mark.parametrize("kind", ["USER", "IMAGE_ATLAS", "LIVE", "COMMODITY", "MUSIC", "ADVERT"])
def test_item_types_that_only_search_returns(write, kind):
    table, rejects = parse(write(src_inter=[{"item_type": kind}]), "src_inter")
    assert (table.num_rows, rejects.num_rows) == (1, 0)


def test_items_without_a_feature_row_are_kept(write):
    adapter = write(rec_inter=[{"item_id": "424242"}])
    assert parse(adapter, "rec_inter")[0]["item_id"].to_pylist() == [424242]
    assert 424242 not in tables(adapter.parse_entities("item"))[0]["key"].to_pylist()


def test_unreadable_bytes_are_replaced(write):
    adapter = write()
    path = f"{adapter.raw_uri}/item_features.csv"
    with open(path, "rb") as file:
        data = file.read()
    with open(path, "wb") as file:
        file.write(data.replace(b"Funny joke", b"Funny \xe4\xb8joke"))
    table, rejects = tables(adapter.parse_entities("item"))
    assert (table["text"].to_pylist(), rejects.num_rows) == (["Funny > Funny \ufffdjoke"], 0)


def test_very_long_caption(write):
    caption = '"[' + "2077636, " * 2_500_000 + '1]"'  # 22 MB, longer than a block
    table, rejects = tables(write(item_features=[{"caption": caption}, {"item_id": "12"}]).parse_entities("item"))
    assert (table["key"].to_pylist(), rejects.num_rows) == ([11, 12], 0)


def test_search_label_is_any_click(write):
    rows = [{"click_cnt": n} for n in ("0", "1", "3", "1.0")]
    assert parse(write(src_inter=rows), "src_inter")[0]["label"].to_pylist() == [0, 1, 1, 1]


def test_merge_repeats_that_do_not_follow_each_other_and_disagree(write):
    rows = [{"item_id": "1"}, {"item_id": "2", "click_cnt": "1"}, {"item_id": "1", "click_cnt": "2"}, {"item_id": "2"}]
    rows.append({"item_id": "3"})
    table = merged(write(rec_inter=[], src_inter=rows))
    assert table.select(["item_id", "label", "position"]).to_pylist() == [
        {"item_id": 1, "label": 1, "position": SEARCH_POSITION + 2},
        {"item_id": 2, "label": 1, "position": SEARCH_POSITION + 3},
        {"item_id": 3, "label": 0, "position": SEARCH_POSITION + 6},
    ]
    assert table["search_source"].to_pylist() == ["USER_INPUT"] * 3
    assert set(table["scenario"].to_pylist()) == {1}


@pytest.mark.parametrize(
    "change",
    [
        {"user_id": "8"},
        {"search_session_id": "901"},
        {"search_session_timestamp": "1684763932920"},
        {"keyword": '"[20, 34]"'},
        {"search_source": "HOT"},
        {"search_source": ""},
        {"item_id": "13"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_merge_keeps_rows_of_another_search_apart(write, change):
    table = merged(write(rec_inter=[], src_inter=[{"click_cnt": "1"}, change]))
    assert sorted(zip(table["position"].to_pylist(), table["label"].to_pylist(), strict=True)) == [
        (SEARCH_POSITION + 2, 1),
        (SEARCH_POSITION + 3, 0),
    ]


def test_merge_repeats_with_empty_keyword_and_source(write):
    nothing = {"keyword": "", "search_source": "", "search_session_id": ""}
    table = merged(write(rec_inter=[], src_inter=[nothing, nothing | {"click_cnt": "1"}]))
    assert table.select(["label", "position"]).to_pylist() == [{"label": 1, "position": SEARCH_POSITION + 2}]


def test_merge_leaves_recommendations_alone(write):
    adapter = write(rec_inter=[{}, {"click": "0"}, {}], src_inter=[{}, {}])
    table = merged(adapter)
    assert table["position"].to_pylist() == [2, 3, 4, SEARCH_POSITION + 2]
    assert table["label"].to_pylist() == [1, 0, 1, 0]


def test_merge_of_one_scenario_or_nothing(write):
    adapter = write()
    rec, search = parse(adapter, "rec_inter")[0], parse(adapter, "src_inter")[0]
    assert [adapter.merge(t).num_rows for t in (rec, search, rec.slice(0, 0))] == [1, 1, 0]
