"""Tables: every format gives the same table, and every bad one a message that names the place."""

import csv
import gzip
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.data.table import read_reviews
from fasttrain.errors import DataError

HEADER = "rating,review,split\n"
GOOD = HEADER + 'pos,"good , really",train\nneg,bad,train\npos,fine,val\nneg,poor,test\n'


def frame(**columns) -> pd.DataFrame:
    base = {
        "rating": ["pos", "neg", "pos", "neg"],
        "review": ["good , really", "bad", "fine", "poor"],
        "split": ["train", "train", "val", "test"],
    }
    return pd.DataFrame({**base, **columns})


def assert_is_good(table):
    assert table.rating.to_pylist() == ["pos", "neg", "pos", "neg"]
    assert table.review.to_pylist() == ["good , really", "bad", "fine", "poor"]
    assert {name: rows.tolist() for name, rows in table.rows.items()} == {
        "train": [0, 1],
        "val": [2],
        "test": [3],
    }
    assert table.notes == ()


def fault(source) -> DataError:
    with pytest.raises(DataError) as caught:
        read_reviews(source)
    return caught.value


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "T.CSV", "t.parquet", "categories.parquet"])
def test_formats(tmp_path, name):
    path = tmp_path / name
    if name == "t.parquet":
        frame(extra=[1, 2, 3, 4]).to_parquet(path)
    elif name == "categories.parquet":
        frame().astype({"rating": "category", "split": "category"}).to_parquet(path)
    else:
        path.write_bytes(gzip.compress(GOOD.encode()) if name.endswith(".gz") else GOOD.encode())
    table = read_reviews(str(path))
    assert_is_good(table)
    assert table.source == str(path)
    assert len(table.sha256) == 64


@pytest.mark.parametrize(
    "text",
    [GOOD.replace("\n", "\r\n"), "\ufeff" + GOOD, GOOD.replace("\n", "\n\n"), GOOD.rstrip("\n")],
    ids=["crlf", "bom", "blank lines", "no last newline"],
)
def test_harmless_variants_of_csv(tmp_path, text):
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode())
    assert_is_good(read_reviews(path))


def test_a_frame_and_its_hash():
    table = read_reviews(frame())
    assert_is_good(table)
    assert table.source == "DataFrame"
    assert read_reviews(frame().astype(object).set_index([[7, 7, 8, 9]])).sha256 == table.sha256
    assert read_reviews(frame().astype("category")).sha256 == table.sha256
    assert read_reviews(frame(review=["good , really", "ba", "dfine", "poor"])).sha256 != table.sha256


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([1, 2, 1, 2], ["1", "2", "1", "2"]),
        ([1.0, 4.5, 1.0, 4.5], ["1", "4.5", "1", "4.5"]),
        ([True, False, True, False], ["True", "False", "True", "False"]),
        (pd.Series([1, "two", 1.0, "two"], dtype=object), ["1", "two", "1", "two"]),
        (np.array([1, 2, 2, 1], np.float16), ["1", "2", "2", "1"]),
    ],
)
def test_ratings_that_are_numbers_become_text(tmp_path, values, texts):
    table = frame(rating=values)
    assert read_reviews(table).rating.to_pylist() == texts
    if table["rating"].dtype != object:
        table.to_parquet(tmp_path / "t.parquet")
        assert read_reviews(tmp_path / "t.parquet").rating.to_pylist() == texts


def test_values_that_look_like_nothing_stay_text(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(HEADER + "NA,null,train\n1.0,NaN,train\n")
    table = read_reviews(path)
    assert table.rating.to_pylist() == ["NA", "1.0"]
    assert table.review.to_pylist() == ["null", "NaN"]


def test_empty_reviews_and_absent_splits_are_noted():
    table = read_reviews(frame(review=["", None, " ", "fine"], split=["train"] * 4))
    assert table.review.to_pylist() == ["", "", " ", "fine"]
    assert [note.split(":")[0] for note in table.notes] == [
        "3 of 4 reviews are empty",
        "no val rows",
        "no test rows",
    ]
    assert table.rows["val"].tolist() == []


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.text(max_size=8), st.sampled_from(["train", "val", "test"]))))
def test_rows_are_never_shifted_or_dropped(tmp_path_factory, rows):
    rows = [("a", "first", "train"), ("b", "second", "train"), *rows]
    rows = [
        (rating, review.replace("\0", "").encode(errors="replace").decode(), split) for rating, review, split in rows
    ]
    path = tmp_path_factory.mktemp("table") / "t.csv.gz"
    pd.DataFrame(rows, columns=["rating", "review", "split"]).to_csv(path, index=False, quoting=csv.QUOTE_ALL)
    table = read_reviews(path)
    splits = np.full(len(rows), "none!")
    for name, numbers in table.rows.items():
        splits[numbers] = name
    found = zip(table.rating.to_pylist(), table.review.to_pylist(), splits.tolist(), strict=True)
    assert list(found) == rows


@pytest.mark.parametrize(
    ("text", "row", "column", "words"),
    [
        ("", None, None, "the file is empty"),
        ("\n\n", None, None, "the file is empty"),
        (HEADER, None, None, "no rows below the header"),
        (HEADER.rstrip(), None, None, "no rows below the header"),
        ("rating,text,split\na,b,train\n", None, "review", "missing: the file has 'rating', 'text', 'split'"),
        ("rating,review,review,split\na,b,c,train\n", None, "review", "2 columns have this name"),
        (HEADER + "a,x,train\nb,y,validation\n", 3, "split", "unknown split 'validation'.*write 'val'"),
        (HEADER + "a,x,train\n\nb,y,Train\n", 4, "split", "unknown split 'Train'.*write 'train'"),
        (HEADER + "a,x,train\nb,y,middle\n", 3, "split", "'middle': allowed are train, val, test$"),
        (HEADER + "a,x,train\nb,y,\n", 3, "split", "the split is missing"),
        (HEADER + "a,x,val\nb,y,test\n", None, "split", "no row has the split 'train'"),
        (HEADER + "a,x,train\na,y,train\n", None, "rating", "all train rows have the rating 'a'"),
        (
            HEADER + "a,x,train\nb,y,train\nc,z,test\n",
            4,
            "rating",
            "'c' of this test row occurs in no train row",
        ),
        (HEADER + 'a,"x\ny",train\n,y,train\n', 3, "rating", "the rating is missing .in 1 rows"),
        (HEADER + "a,x,train\n  ,y,train\n", 3, "rating", "the rating is missing"),
        (HEADER + "a,x,train\nb,train\n", 3, None, "2 fields where the header has 3"),
        (HEADER + "a,x,train\nb,y,z,train\n", 3, None, "4 fields where the header has 3"),
        (HEADER + 'a,x,train\nb,"y,train\n', 3, None, "never closed"),
        ('rating,split,review\na,train,x\nb,train,"y\nz,train,w\n', 3, None, "never closed"),
        (HEADER + "a,x,train\nb,y\0z,train\n", 3, "review", "NUL"),
    ],
)
def test_bad_csv(tmp_path, text, row, column, words):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    error = fault(path)
    assert (error.file, error.row, error.column) == (str(path), row, column)
    assert pytest.raises(DataError, match=words).matches(error)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("t.csv", GOOD.encode("utf-16"), "UTF-16"),
        ("t.csv", GOOD.encode("utf-16-le"), "NUL byte"),
        ("t.csv", GOOD.replace("bad", "schön").encode("latin-1"), "row 3, column 'review': byte 0xf6"),
        ("t.csv", gzip.compress(GOOD.encode(), mtime=0), "let its name end in .csv.gz"),
        ("t.csv.gz", GOOD.encode(), "not whole gzip data"),
        ("t.csv.gz", gzip.compress(GOOD.encode(), mtime=0)[:-12], "ends early"),
        ("t.csv.gz", gzip.compress(GOOD.encode(), mtime=0)[:-8] + b"\0" * 8, "not whole gzip data"),
        ("t.csv.gz", gzip.compress(GOOD.encode(), mtime=0)[:12] + b"\xff" * 40, "damaged"),
        ("t.csv.gz", gzip.compress(b"", mtime=0), "empty"),
        ("t.parquet", b"PAR1 and no more PAR1", "not a whole Parquet file"),
        ("t.parquet", b"", "the file is empty"),
        ("t.txt", GOOD.encode(), "a table is a .csv, .csv.gz or .parquet file"),
    ],
)
def test_bad_files(tmp_path, name, data, words):
    path = tmp_path / name
    path.write_bytes(data)
    error = fault(path)
    assert error.file == str(path)
    assert words in str(error)


def test_places_that_are_no_files(tmp_path):
    assert "no such file" in str(fault(tmp_path / "absent.csv"))
    (tmp_path / "folder.csv").mkdir()
    assert "is a folder" in str(fault(tmp_path / "folder.csv"))
    assert "cannot be read" in str(fault("nul\0.csv"))


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # a mode of 0 would not stop root
    assert str(fault(tmp_path / "locked.csv")).endswith("locked.csv: cannot be read: Permission denied")


@pytest.mark.parametrize(
    ("table", "row", "column", "words"),
    [
        (frame()[["rating", "split"]], None, "review", "missing: the file has 'rating', 'split'"),
        (frame(review=["good", 3, "x", "y"]), 3, "review", "3 is not text"),
        (frame(review=[1, 2, 3, 4]), None, "review", "holds int64, not text"),
        (frame(rating=["pos", None, "pos", "neg"]), 3, "rating", "missing"),
        (frame(rating=[1.0, 2.0, math.nan, 2.0]), 4, "rating", "missing"),
        (frame(rating=pd.to_datetime(["2020-01-01"] * 4)), None, "rating", "not text or numbers"),
        (frame(split=["train", "train", None, "val"]), 4, "split", "the split is missing"),
        (frame().iloc[:0], None, None, "no rows"),
        (pd.concat([frame(), frame()[["split"]]], axis=1), None, "split", "2 columns have this name"),
    ],
)
def test_bad_frames(table, row, column, words):
    error = fault(table)
    assert (error.file, error.row, error.column) == ("DataFrame", row, column)
    assert words in error.problem


def test_bad_text_in_parquet(tmp_path):
    bad = pa.Array.from_buffers(pa.string(), 4, pa.array(["ab", "cd", "ef", "gh"]).buffers())
    raw = bytearray(bad.buffers()[2])
    raw[0] = 0xFF
    bad = pa.StringArray.from_buffers(4, bad.buffers()[1], pa.py_buffer(bytes(raw)))
    good = pa.Table.from_pandas(frame())
    pq.write_table(good.set_column(1, "review", bad), tmp_path / "t.parquet")
    assert fault(tmp_path / "t.parquet").column == "review"


def test_real_reviews(data_dir):
    table = read_reviews(data_dir / "reviews_lite.csv.gz")
    assert {name: len(rows) for name, rows in table.rows.items()} == {
        "train": 39_200,
        "val": 8_400,
        "test": 8_400,
    }
    assert table.notes == ()
