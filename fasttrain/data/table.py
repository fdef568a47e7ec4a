"""A file or a DataFrame of reviews to a checked table.

A table has the columns `rating`, `review` and `split` (train, val or test); others are ignored. Every row of
the input is a row of the table, in the same order: none is shifted, padded or dropped. What cannot be used
raises one `DataError` that names the place. Rows are counted as a spreadsheet does, also those of Parquet
files and DataFrames: the header is row 1, the first row of data row 2.
"""

# pyright: reportUnknownParameterType=false, reportAttributeAccessIssue=false
# pyarrow is compiled, and makes its compute functions at import: neither has types to report.

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fasttrain.data.csvfile import parse_csv, read_header, spreadsheet_row
from fasttrain.errors import DataError

__all__ = ["ReviewTable", "format_of", "read_bytes", "read_reviews"]

COLUMNS = ("rating", "review", "split")
SPLITS = ("train", "val", "test")
FORMATS = (".csv", ".csv.gz", ".parquet")

_SPLIT_ALIASES = {
    "training": "train",
    "validation": "val",
    "valid": "val",
    "dev": "val",
    "development": "val",
    "testing": "test",
}
_MISSING_SPLIT_NOTES = {
    "val": "no val rows: validation, the learning rate's reductions and early stopping are skipped",
    "test": "no test rows: the final test is skipped",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class ReviewTable:
    """A checked table of reviews, rows in the order of the input."""

    rating: pa.ChunkedArray
    """`large_string` [num_rows], no nulls, none blank."""
    review: pa.ChunkedArray
    """`large_string` [num_rows], no nulls; a missing review is an empty one."""
    rows: dict[str, np.ndarray]
    """For each of train, val and test its row numbers, int64, ascending; val and test may be empty."""
    sha256: str
    """Of the file's bytes, or of a DataFrame's three columns as text."""
    source: str
    """The path as it was given, or "DataFrame"."""
    notes: tuple[str, ...]
    """What the user should be told: empty reviews, splits without rows."""


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """Where a table came from: names the place in an error."""

    name: str
    row_of: Callable[[int], int] = lambda index: index + 2

    def error(self, problem: str, *, index: int | None = None, column: str | None = None) -> DataError:
        row = None if index is None else self.row_of(index)
        return DataError(problem, file=self.name, row=row, column=column)


def read_reviews(source: str | Path | pd.DataFrame) -> ReviewTable:
    """Read and check a table of reviews.

    Ratings that are numbers become their text: 1 is "1", 4.5 is "4.5", 1.0 is "1". Blank lines between the
    records of a CSV file are no rows. An empty or missing review is kept, and noted: no word occurs in it, so
    its vector is all zeros.

    Args:
        source: a `.csv`, `.csv.gz` or `.parquet` file, or a DataFrame.

    Raises:
        DataError: the file cannot be read or parsed; a column is missing or there twice; a rating is missing;
            a split is none of train, val and test; there are no train rows, or they have one rating only; a
            rating of val or test does not occur in train.
    """
    if isinstance(source, pd.DataFrame):
        origin = _Origin(name="DataFrame")
        columns = _read_frame(source, origin)
        return _checked(columns, origin, sha256=_sha256_of_columns(columns))
    path = Path(source)
    format_of(path)
    raw = read_bytes(path)
    sha256 = hashlib.sha256(raw).hexdigest()
    if path.name.lower().endswith(".parquet"):
        origin = _Origin(name=str(source))
        return _checked(_read_parquet(raw, origin), origin, sha256=sha256)
    text = _gunzip(raw, str(source)) if path.name.lower().endswith(".gz") else raw
    del raw
    origin = _Origin(name=str(source), row_of=lambda index: spreadsheet_row(text, index, file=str(source)))
    return _checked(_read_csv(text, origin), origin, sha256=sha256)


def format_of(path: Path) -> str:
    """Return which of `FORMATS` the file's name ends in (in any case).

    Raises:
        DataError: in none of them.
    """
    found = [each for each in FORMATS if path.name.lower().endswith(each)]
    if not found:
        raise DataError(f"a table is a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file", file=str(path))
    return found[0]


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes.

    Raises:
        DataError: it is missing, a folder, empty, or may not be read.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError("no such file", file=str(path)) from None
    except IsADirectoryError:
        raise DataError("is a folder: name a file in it", file=str(path)) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"cannot be read: {reason}", file=str(path)) from error
    if not raw:
        raise DataError("the file is empty: a header and rows are needed", file=str(path))
    return raw


def _gunzip(raw: bytes, file: str) -> bytes:
    try:
        return gzip.decompress(raw)
    except gzip.BadGzipFile as error:
        problem = f"is not whole gzip data ({error}): compress it again, or name it .csv if it is plain text"
        raise DataError(problem, file=file) from None
    except EOFError:
        raise DataError("the gzip data ends early: copy or download the file again", file=file) from None
    except zlib.error as error:
        raise DataError(f"the gzip data is damaged ({error}): get the file again", file=file) from None


def _read_csv(text: bytes, origin: _Origin) -> dict[str, pa.ChunkedArray]:
    header = read_header(text, file=origin.name)
    _check_columns(header, origin)
    table = parse_csv(text, file=origin.name, header=header, columns=COLUMNS)
    return {name: table.column(name) for name in COLUMNS}


def _read_parquet(raw: bytes, origin: _Origin) -> dict[str, pa.ChunkedArray]:
    try:
        file = pq.ParquetFile(pa.BufferReader(raw))
        _check_columns(file.schema_arrow.names, origin)
        table = file.read(columns=list(COLUMNS))
    except (pa.ArrowException, OSError) as error:
        raise origin.error(f"is not a whole Parquet file: {error}") from error
    return {name: _as_text(table.column(name), name, origin) for name in COLUMNS}


def _read_frame(frame: pd.DataFrame, origin: _Origin) -> dict[str, pa.ChunkedArray]:
    _check_columns([str(name) for name in frame.columns], origin)
    return {name: _as_text(_frame_column(frame[name], name, origin), name, origin) for name in COLUMNS}


def _frame_column(values: Any, name: str, origin: _Origin) -> pa.ChunkedArray:
    """A DataFrame's column in pyarrow's terms; NaN, None and NaT are nulls."""
    if name == "rating" and values.dtype == object:
        values = values.map(_rating_text, na_action="ignore")
    try:
        array = pa.Array.from_pandas(values)
    except (pa.ArrowException, UnicodeEncodeError) as error:
        for index, value in enumerate(values):
            if not isinstance(value, str) and not pd.isna(value):
                raise origin.error(f"{value!r} is not text", index=index, column=name) from None
        raise origin.error(f"cannot be read as text: {error}", column=name) from error
    return array if isinstance(array, pa.ChunkedArray) else pa.chunked_array([array])


def _as_text(column: pa.ChunkedArray, name: str, origin: _Origin) -> pa.ChunkedArray:
    """Turn a column into `large_string`, nulls kept."""
    kind: Any = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    if name == "rating" and is_number:
        codes = column.combine_chunks().dictionary_encode()
        texts = pa.array([_rating_text(value) for value in codes.dictionary.to_pylist()], pa.large_string())
        return pa.chunked_array([texts.take(codes.indices)])
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()
    if not (is_text or pa.types.is_null(kind)):
        wanted = "text or numbers" if name == "rating" else "text"
        raise origin.error(f"holds {kind}, not {wanted}", column=name)
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        raise origin.error(f"holds text that is not UTF-8: {error}", column=name) from error
    return column.cast(pa.large_string())


def _rating_text(value: Any) -> str | None:
    if isinstance(value, float):
        if value != value:  # NaN
            return None
        return str(int(value)) if value.is_integer() else str(value)
    return None if value is None else str(value)


def _check_columns(found: Sequence[str], origin: _Origin) -> None:
    for name in COLUMNS:
        if name not in found:
            problem = f"the column is missing: the file has {', '.join(map(repr, found)) or 'none'}"
            raise origin.error(problem, column=name)
        if found.count(name) > 1:
            raise origin.error(f"{found.count(name)} columns have this name: keep one", column=name)


def _checked(columns: dict[str, pa.ChunkedArray], origin: _Origin, *, sha256: str) -> ReviewTable:
    rating, split = columns["rating"], columns["split"]
    review = pc.fill_null(columns["review"], "")
    if not len(rating):
        raise origin.error("there are no rows below the header")
    _check_no_blank(rating, origin)
    rows = _rows_of_splits(split, origin)
    _check_ratings(rating, rows, origin)
    notes = [note for name, note in _MISSING_SPLIT_NOTES.items() if not len(rows[name])]
    num_empty = pc.sum(pc.equal(pc.utf8_trim_whitespace(review), "")).as_py()
    if num_empty:
        notes.insert(0, f"{num_empty} of {len(review)} reviews are empty: kept, as vectors of zeros")
    return ReviewTable(rating=rating, review=review, rows=rows, sha256=sha256, source=origin.name, notes=tuple(notes))


def _check_no_blank(rating: pa.ChunkedArray, origin: _Origin) -> None:
    is_blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(rating), ""), True).to_numpy()
    if is_blank.any():
        problem = f"the rating is missing (in {is_blank.sum()} rows in all): give one or remove the row"
        raise origin.error(problem, index=int(is_blank.argmax()), column="rating")


def _rows_of_splits(split: pa.ChunkedArray, origin: _Origin) -> dict[str, np.ndarray]:
    codes = pc.fill_null(split, "").combine_chunks().dictionary_encode()
    names: list[str] = codes.dictionary.to_pylist()
    row_codes = codes.indices.to_numpy()
    for code, name in enumerate(names):  # in order of first appearance
        if name not in SPLITS:
            index = int((row_codes == code).argmax())
            raise origin.error(_unknown_split(name), index=index, column="split")
    if "train" not in names:
        raise origin.error("no row has the split 'train': there is nothing to learn from", column="split")
    # -1 is no code: a split that does not occur has no rows
    return {name: np.flatnonzero(row_codes == (names.index(name) if name in names else -1)) for name in SPLITS}


def _unknown_split(name: str) -> str:
    plain = name.strip().lower()
    meant = _SPLIT_ALIASES.get(plain, plain)
    problem = f"unknown split {name!r}" if plain else "the split is missing"
    return f"{problem}: allowed are {', '.join(SPLITS)}" + (f"; write {meant!r}" if meant in SPLITS else "")


def _check_ratings(rating: pa.ChunkedArray, rows: dict[str, np.ndarray], origin: _Origin) -> None:
    codes = rating.combine_chunks().dictionary_encode()
    names: list[str] = codes.dictionary.to_pylist()
    row_codes = codes.indices.to_numpy()
    in_train = np.bincount(row_codes[rows["train"]], minlength=len(names)) > 0
    for split in ("val", "test"):
        unseen = rows[split][~in_train[row_codes[rows[split]]]]
        if len(unseen):
            index = int(unseen[0])
            problem = f"the rating {names[row_codes[index]]!r} of this {split} row occurs in no train row"
            raise origin.error(f"{problem}: move the row or correct it", index=index, column="rating")
    if in_train.sum() < 2:
        only = names[int(in_train.argmax())]
        raise origin.error(f"all train rows have the rating {only!r}: two are needed", column="rating")


def _sha256_of_columns(columns: dict[str, pa.ChunkedArray]) -> str:
    """Hash text columns, whatever their chunks and original types; null and "" are alike."""
    digest = hashlib.sha256()
    for name, column in columns.items():
        texts = pc.fill_null(column, "")
        digest.update(f"{name} {len(texts)}\n".encode())
        digest.update(np.ascontiguousarray(pc.binary_length(texts).to_numpy()).astype("<i8").data)
        for chunk in texts.chunks:
            if len(chunk):
                _, offsets, characters = chunk.buffers()
                bounds = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
                digest.update(memoryview(characters or b"")[bounds[0] : bounds[-1]])
    return digest.hexdigest()
