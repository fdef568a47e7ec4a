"""The CSV reader: strict where pyarrow is lenient, and never off by a row."""

import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.data import csvfile
from fasttrain.data.csvfile import parse_csv, read_header, spreadsheet_row
from fasttrain.errors import DataError

HEADER = ["a", "b"]
FIELDS = st.text(st.sampled_from('ab ",\n\rä👍'), max_size=6)


def parse(data: bytes) -> list[list[str]]:
    table = parse_csv(data, file="t.csv", header=read_header(data, file="t.csv"), columns=HEADER)
    return [list(row) for row in zip(*(table.column(name).to_pylist() for name in HEADER), strict=True)]


def fault(data: bytes) -> DataError:
    with pytest.raises(DataError) as caught:
        parse(data)
    return caught.value


@settings(deadline=None)
@given(
    st.lists(st.lists(FIELDS, min_size=2, max_size=2), min_size=1, max_size=8),
    # csv quotes no "\r" by itself where lines end in "\n"
    st.sampled_from([("\n", csv.QUOTE_ALL), ("\r\n", csv.QUOTE_ALL), ("\r\n", csv.QUOTE_MINIMAL)]),
    st.booleans(),
)
def test_reads_what_the_csv_module_writes(rows, dialect, has_bom):
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=dialect[0], quoting=dialect[1]).writerows([HEADER, *rows])
    assert parse((b"\xef\xbb\xbf" if has_bom else b"") + text.getvalue().encode()) == rows


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(["x", "y z", '"', '""', ",", "\n", "\r\n", "ä"]), max_size=24).map("".join))
def test_any_text_is_refused_or_read_as_the_strict_csv_module_reads_it(body):
    data = ("a,b\n" + body).encode()
    try:
        expected = [row for row in csv.reader(io.StringIO(data.decode(), newline=""), strict=True) if row]
    except csv.Error:
        fault(data)
        return
    if len(expected) == 1:
        assert "no rows" in str(fault(data))
    elif any(len(row) != 2 for row in expected):
        assert "fields where the header has 2" in str(fault(data))
    else:
        assert parse(data) == expected[1:]


@pytest.mark.parametrize("block_bytes", [16, 64, 300])
def test_rows_longer_than_a_block_and_quotes_at_its_ends(monkeypatch, block_bytes):
    monkeypatch.setattr(csvfile, "BLOCK_BYTES", block_bytes)
    rows = [[f'{i} "quoted, {i}"\n' * (i % 7), 'say 5" now' * (i % 5)] for i in range(60)]
    lines = ["a,b"]
    lines += [f'"{first.replace(chr(34), chr(34) * 2)}",{second}' for first, second in rows]
    assert parse("\n".join(lines).encode()) == rows


def test_a_row_of_megabytes():
    long = "word " * 1_000_000
    assert parse(f"a,b\n1,{long}\n2,x\n".encode()) == [["1", long], ["2", "x"]]


@pytest.mark.parametrize(
    ("body", "row", "words"),
    [
        (b"1,2\n\n3\n", 4, "1 fields where the header has 2"),
        (b'"1\n1",2\n3,4,5\n', 3, "3 fields where the header has 2"),
        (b'1,2\n3,"4\n5,6\n', 3, "never closed"),
        (b'1,"2"x\n', 2, "follows a closing quote: 'x"),
        (b'1,"2\n3,"4"\n', 2, "follows a closing quote: '4"),
        (b"1,2\n3,\xe9\n", 3, "0xe9 is not UTF-8"),
        (b"1,2\n3,\x004\n", 3, "NUL byte"),
    ],
)
def test_faults_are_named_with_their_row(body, row, words):
    error = fault(b"a,b\n" + body)
    assert (error.file, error.row) == ("t.csv", row)
    assert words in error.problem


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\n\r\n", "empty"),
        ("a,b\n".encode("utf-16"), "UTF-16"),
        (b"a\x00,b\x00", "NUL byte"),
        (b"a,\xff\n", "not UTF-8"),
        (b"PK\x03\x04..", "zip"),
        (b"\x1f\x8b..", "gzip"),
        (b"PAR1..", "Parquet"),
    ],
)
def test_files_that_are_no_csv(data, words):
    with pytest.raises(DataError, match=words):
        read_header(data, file="t.csv")


def test_a_quoted_header_and_blank_lines():
    data = b'\n"a ""1""",b\n\n1,2\n\n3,4'
    assert read_header(data, file="t.csv") == ['a "1"', "b"]
    assert [spreadsheet_row(data, index, file="t.csv") for index in (0, 1)] == [4, 6]


def test_what_pyarrow_alone_refuses_is_still_a_data_error(monkeypatch):
    monkeypatch.setattr(csvfile, "_MAX_BLOCK_BYTES", 8)
    monkeypatch.setattr(csvfile, "BLOCK_BYTES", 8)
    assert "cannot be parsed" in fault(b"a,b\n1," + b"x" * 100 + b"\n").problem
