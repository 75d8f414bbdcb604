"""The CSV reader: every form of number, quoting and damage, with exact lines."""

from __future__ import annotations

import csv
import gzip
import io
import itertools

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm4msr.data import records
from llm4msr.data.csv import Column, read_csv, read_header, reject_rows
from llm4msr.data.source import DataError
from llm4msr.schema import REJECTS

A_INT, B_TEXT = Column("a", "int64"), Column("b", "string", nullable=True)


@pytest.fixture
def write(tmp_path):
    def write(data: bytes, name: str = "t.csv") -> str:
        path = tmp_path / name
        path.write_bytes(data)
        return str(path)

    return write


def read(uri, columns=(A_INT, B_TEXT), **options):
    """Returns (rows as tuples with the line last, rejects as (line, reason, detail, raw))."""
    blocks = list(read_csv(uri, columns, **options))
    rows, rejects = [], []
    for block in blocks:
        assert block.table.column_names == [*(c.name for c in columns), "line", "raw"]
        assert block.rejects.schema == REJECTS
        rows += zip(*(block.table[n].to_pylist() for n in block.table.column_names[:-1]), strict=True)
        for reject in block.rejects.to_pylist():
            assert reject["file"] == uri
            rejects.append((reject["line"], reject["reason"], reject["detail"], reject["raw"]))
    return rows, rejects


def test_columns_are_found_by_name_and_typed(write):
    columns = (Column("x", "float64"), Column("key", "int64", ("id", "key_id")), Column("t", "string"))
    block = next(read_csv(write(b"t,skipped,key_id,x\n hi ,9,7, 0.5 \n"), columns))
    assert block.table.schema.types == [pa.float64(), pa.int64(), pa.string(), pa.int64(), pa.string()]
    assert block.table.to_pylist() == [{"x": 0.5, "key": 7, "t": "hi", "line": 2, "raw": " hi ,9,7, 0.5 \n"}]


def test_first_alias_found_wins(write):
    assert read(write(b"u,v\n1,2\n"), [Column("a", "int64", ("v", "u"))])[0] == [(2, 2)]


def test_optional_column_that_is_missing_is_all_null(write):
    columns = (A_INT, Column("n", "int64", required=False), Column("s", "string", required=False))
    block = next(read_csv(write(b"a\n1\n"), columns))
    assert block.table.schema.types[1:3] == [pa.int64(), pa.string()]
    assert read(write(b"a\n1\n"), columns) == ([(1, None, None, 2)], [])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("123", 123),
        ("-5", -5),
        ("+5", 5),
        (" 7\t", 7),
        ("007", 7),
        ("1.684742e+12", 1684742000000),
        ("+45400.0", 45400),
        ("45400.", 45400),
        ("103656000000", 103656000000),
        (str(2**53 + 1), 2**53 + 1),
        (str(2**63 - 1), 2**63 - 1),
        (str(-(2**63)), -(2**63)),
    ],
)
@pytest.mark.parametrize("company", ["1", "1.0", "junk"])
def test_int64_is_exact_whatever_stands_beside_it(write, text, value, company):
    rows, _ = read(write(f"a\n{text}\n{company}\n".encode()), [A_INT])
    assert rows[0] == (value, 2)


@pytest.mark.parametrize(
    "text", ["x", "nan", "inf", "-Infinity", "0x10", "1_000", "1.5", "1e400", str(2**63), "1e19", "--1", "1 2", "٣"]
)
def test_text_that_is_no_int64(write, text):
    assert read(write(f"b,a\nk,{text}\nl,1\n".encode())) == (
        [(1, "l", 3)],
        [(2, "not a number", f"column 'a': found {text!r}", f"k,{text}")],
    )


@pytest.mark.parametrize(("text", "value"), [("0.1", 0.1), (".5", 0.5), ("+1e3", 1000.0), ("-2", -2.0)])
@pytest.mark.parametrize("company", ["1", "junk"])
def test_float64(write, text, value, company):
    assert read(write(f"a\n{text}\n{company}\n".encode()), [Column("a", "float64")])[0][0] == (value, 2)


@pytest.mark.parametrize("text", ["nan", "inf", "1e400", "abc", "0x1p3"])
def test_text_that_is_no_float64(write, text):
    rows, rejects = read(write(f"a\n{text}\n1\n".encode()), [Column("a", "float64")])
    assert (rows, rejects) == ([(1.0, 3)], [(2, "not a number", f"column 'a': found {text!r}", text)])


def test_empty_cells_are_null_or_reject(write):
    columns = (A_INT, Column("b", "string"), Column("c", "int64", nullable=True))
    assert read(write(b'a,b,c\n1,x,\n, y,2\n3,"",4\n5,  ,6\n'), columns) == (
        [(1, "x", None, 2)],
        [
            (3, "missing value", "column 'a': found ''", ", y,2"),
            (4, "missing value", "column 'b': found ''", '3,"",4'),
            (5, "missing value", "column 'b': found '  '", "5,  ,6"),
        ],
    )


def test_a_row_is_rejected_once_for_its_first_bad_column(write):
    rows, rejects = read(write(b"a,c\nx,y\n"), [A_INT, Column("c", "int64")])
    assert (rows, rejects) == ([], [(2, "not a number", "column 'a': found 'x'", "x,y")])


def test_wrong_column_count(write):
    assert read(write(b"a,b\n1,x\n2\n3,y,z\n4,v\n")) == (
        [(1, "x", 2), (4, "v", 5)],
        [
            (3, "wrong column count", "expected 2 columns, found 1", "2"),
            (4, "wrong column count", "expected 2 columns, found 3", "3,y,z"),
        ],
    )


@pytest.mark.parametrize("block_bytes", [1, 7, 1 << 20])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_lines_are_physical_after_blank_lines_quoted_newlines_and_rejects(write, newline, block_bytes):
    data = b'a,b\n1,x\n\n2,"p\nq\n\nr"\nbad\n\n\n3,y\nz,y\n4,"w\n"\n5,last'.replace(b"\n", newline)
    text = newline.decode()
    rows, rejects = read(write(data), block_bytes=block_bytes)
    quoted = f"p{text}q{text}{text}r"
    assert rows == [(1, "x", 2), (2, quoted, 4), (3, "y", 11), (4, "w", 13), (5, "last", 15)]
    assert [r[:2] for r in rejects] == [(8, "wrong column count"), (12, "not a number")]


def test_quotes_hold_delimiters_and_doubled_quotes(write):
    assert read(write(b'a,b\n"1","say ""hi"", twice"\n2,""""\n')) == (
        [(1, 'say "hi", twice', 2), (2, '"', 3)],
        [],
    )


def test_quote_inside_an_unquoted_cell_is_text(write):
    assert read(write(b'a,b\n1,5" screen\n2,"x,y"\n')) == ([(1, '5" screen', 2), (2, "x,y", 3)], [])


def test_quoting_off_takes_quotes_as_text(write):
    assert read(write(b'a\tb\n1\t"open\n2\tx\n'), delimiter="\t", quoting=False)[0] == [(1, '"open', 2), (2, "x", 3)]


@pytest.mark.parametrize("block_bytes", [8, 1 << 20])
@pytest.mark.parametrize("after", [b"3,y\n4,z\n", b'3,"y"\n4,"z\nz"\n'])
def test_unclosed_quote_costs_its_own_line_only(write, after, block_bytes):
    rows, rejects = read(write(b'a,b\n1,x\n2,"open\n' + after), block_bytes=block_bytes)
    assert [row[::2] for row in rows] == [(1, 2), (3, 4), (4, 5)]
    assert [(r[0], r[1], r[3]) for r in rejects] == [(3, "bad quoting", '2,"open')]


def test_unclosed_quote_in_the_last_line(write):
    rows, rejects = read(write(b'a,b\n1,x\n2,"open'))
    assert rows == [(1, "x", 2)]
    assert [r[:2] for r in rejects] == [(3, "bad quoting")]


def test_unclosed_quote_is_given_up_before_the_whole_file_is_held(write, monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 1000)
    rest = b"".join(b"%d,x\n" % i for i in range(2000))
    rows, rejects = read(write(b'a,b\n7,"open\n' + rest), block_bytes=64)
    assert [row[::2] for row in rows] == [(i, i + 3) for i in range(2000)]
    assert [r[:2] for r in rejects] == [(2, "bad quoting")]


def test_text_after_a_closing_quote_is_damage(write):
    rows, rejects = read(write(b'a,b\n1,"x"y\n2,z\n'))
    assert (rows, [(r[0], r[1], r[3]) for r in rejects]) == ([(2, "z", 3)], [(2, "bad quoting", '1,"x"y')])


def test_huge_field_grows_the_block(write):
    text = "長い, text " * 300_000  # 4.2 MB of UTF-8
    rows, rejects = read(write(f'a,b\n1,"{text}"\n2,y\n'.encode()), block_bytes=1 << 16)
    assert rejects == []
    assert [(a, len(b), line) for a, b, line in rows] == [(1, len(text.rstrip()), 2), (2, 1, 3)]


def test_invalid_utf8_is_replaced(write):
    data = b"a,b\n1,\xffx\xe4\xb8\n2,\xe4\xb8\xad\n"
    for block_bytes in (5, 1 << 20):  # the first cuts characters in two
        assert read(write(data), block_bytes=block_bytes)[0] == [(1, "\ufffdx\ufffd", 2), (2, "中", 3)]


def test_byte_order_mark(write):
    uri = write(b"\xef\xbb\xbfa,b\n1,x\n")
    assert read_header(uri) == ["a", "b"]
    assert read(uri)[0] == [(1, "x", 2)]


def test_carriage_return_that_ends_no_line_is_a_space(write):
    assert read(write(b"a,b\r\n1\r,x\ry\r\r\n"))[0] == [(1, "x y", 2)]


def test_raw_is_cut(write):
    _, rejects = read(write(b"a,b\nx," + "中".encode() * 500 + b"\n"))
    assert rejects[0][3] == "x," + "中" * 198


def test_multi_character_delimiter_without_header_in_latin_1(write):
    rows, rejects = read(
        write("1::Café\n2::B\n3\n::x\n".encode("latin-1")),
        delimiter="::",
        quoting=False,
        header=["a", "b"],
        encoding="latin-1",
    )
    assert rows == [(1, "Café", 1), (2, "B", 2)]
    assert rejects == [
        (3, "wrong column count", "expected 2 columns, found 1", "3"),
        (4, "missing value", "column 'a': found ''", "::x"),
    ]


@pytest.mark.parametrize("members", [1, 2])
def test_gzip(write, members):
    parts = [b"a,b\n1,x\n2,y\n"] if members == 1 else [b"a,b\n1,x\n", b"2,y\n"]
    uri = write(b"".join(map(gzip.compress, parts)), "t.csv.gz")
    assert read(uri) == ([(1, "x", 2), (2, "y", 3)], [])
    assert read_header(uri) == ["a", "b"]


def test_truncated_gzip_is_named(write):
    uri = write(gzip.compress(b"a,b\n" + b"".join(b"%d,%d\n" % (i, i * 7919) for i in range(5000)))[:-3000], "t.csv.gz")
    with pytest.raises(DataError, match=r"t\.csv\.gz: cannot be read after line"):
        read(uri, block_bytes=1000)


def test_file_that_is_not_gzip_is_named(write):
    with pytest.raises(DataError, match=r"t\.csv\.gz: cannot be read"):
        read(write(b"a,b\n1,2\n", "t.csv.gz"))


def test_missing_column_is_named_at_once(write):
    uri = write(b"x,y\n")
    with pytest.raises(DataError) as error:
        read_csv(uri, [Column("a", "int64", ("a", "aa"))])
    assert str(error.value) == f"{uri}: no column 'a' or 'aa' in the header; found ['x', 'y']"


def test_column_named_twice(write):
    with pytest.raises(DataError, match=r"names column 'a' 2 times: \['a', 'b', 'a'\]"):
        read_csv(write(b"a,b,a\n"), [A_INT])


@pytest.mark.parametrize("header", [None, ["a", "b"]])
def test_empty_file(write, header):
    with pytest.raises(DataError, match=r"t\.csv: the file is empty"):
        read_csv(write(b""), [A_INT], header=header)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"none\.csv: no such file"):
        read_header(str(tmp_path / "none.csv"))


def test_folder_instead_of_file(tmp_path):
    with pytest.raises(DataError, match="cannot be opened"):
        read_header(str(tmp_path))


def test_encoding_of_two_byte_newlines_is_refused(write):
    with pytest.raises(DataError, match="encoding 'utf-16' is not supported"):
        read_header(write("a,b\n".encode("utf-16")), encoding="utf-16")


def test_header_with_an_unclosed_quote(write):
    with pytest.raises(DataError, match="line 1 is not a header"):
        read_header(write(b'a,"b\n1,2\n'))


def test_header_cells_are_trimmed_and_unquoted(write):
    assert read_header(write(b' a ,"b,c"\r\n')) == ["a", "b,c"]


def test_header_alone_gives_one_empty_block_of_the_right_types(write):
    assert read(write(b"a,b\n")) == ([], [])
    (block,) = read_csv(write(b"a,b\n"), (A_INT, B_TEXT))
    assert block.table.schema.types == [pa.int64(), pa.string(), pa.int64(), pa.string()]


def test_reject_rows_keeps_file_line_and_text(write):
    uri = write(b"a,b\n1,x\n\n2,y\nbad\n3,z\n")
    block = next(read_csv(uri, (A_INT, B_TEXT)))
    good, rejects = reject_rows(block.table, pa.array([False, True, None]), "unknown value", "b", uri)
    assert good["a"].to_pylist() == [1, 3]
    assert rejects.to_pylist() == [
        {"file": uri, "line": 4, "reason": "unknown value", "detail": "column 'b': found 'y'", "raw": "2,y"}
    ]


CELLS = st.text(alphabet='ab,"\n é', max_size=5)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(CELLS, CELLS), max_size=12), block_bytes=st.integers(1, 40))
def test_agrees_with_the_standard_library(tmp_path_factory, rows, block_bytes):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerows([("p", "q"), *rows])
    path = tmp_path_factory.mktemp("h") / "t.csv"
    path.write_text(text.getvalue(), encoding="utf-8", newline="")
    columns = (Column("p", "string", nullable=True), Column("q", "string", nullable=True))
    heights = [1 + sum(cell.count("\n") for cell in row) for row in rows]
    lines = list(itertools.accumulate(heights, initial=2))
    expected = [(*(c.strip() or None for c in row), line) for row, line in zip(rows, lines, strict=False)]
    assert read(str(path), columns, block_bytes=block_bytes) == (expected, [])


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet='1,"\n\rx', max_size=40), block_bytes=st.integers(1, 20))
def test_damaged_text_loses_no_line(tmp_path_factory, text, block_bytes):
    path = tmp_path_factory.mktemp("h") / "t.csv"
    path.write_bytes(b"p,q\n" + text.encode())
    raws = []
    for block in read_csv(str(path), [Column("p", "string", nullable=True)], block_bytes=block_bytes):
        found = zip(*(block.table[n].to_pylist() for n in ("line", "raw")), strict=True)
        raws += sorted([*found, *((r["line"], r["raw"]) for r in block.rejects.to_pylist())])
    physical = f"{text}\n".replace("\r\n", "\n").replace("\r", " ").split("\n")
    covered = set()
    for line, raw in raws:
        height = raw.replace("\r\n", "\n").rstrip("\n").count("\n") + 1
        assert raw.replace("\r\n", "\n").split("\n")[0] == physical[line - 2]
        covered |= set(range(line, line + height))
    assert [i for i, part in enumerate(physical, 2) if part and i not in covered] == []
