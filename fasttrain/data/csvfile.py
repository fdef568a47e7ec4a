"""Comma-separated text to a pyarrow table of strings, or one error that names the place.

pyarrow's reader, which uses all cores, is the good path. It lets some errors pass in silence (a quote that is
never closed swallows the rest of the file) and names no row when it works in parallel. So the quotes are
checked first, and whatever is refused is found again by a slow scanner that counts rows.
"""

# pyright: reportUnknownParameterType=false
# pyarrow is compiled: its classes have no types to report.

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from fasttrain.errors import DataError

__all__ = ["parse_csv", "read_header", "spreadsheet_row"]

BLOCK_BYTES = 2 << 20
"""What one thread parses at a time. A row must fit in: for a longer one, blocks are made larger."""

_MAX_BLOCK_BYTES = 2**31 - 1  # pyarrow's block size has 32 bits

_BOM = b"\xef\xbb\xbf"
_QUOTE, _COMMA, _CR, _LF = b'",\r\n'
_FOREIGN = {
    b"\xff\xfe": "is UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text: save it as UTF-8",
    b"\x1f\x8b": "is compressed with gzip: let its name end in .csv.gz",
    b"PK\x03\x04": "is a zip archive or an Excel file: save the table as CSV",
    b"PAR1": "is a Parquet file: let its name end in .parquet",
}
_QUOTED = rb'"[^"]*+(?:""[^"]*+)*+"'
_FIELD = re.compile(rb"(" + _QUOTED + rb'|(?:[^",\r\n][^,\r\n]*+)?)(,|\r\n|\r|\n|\Z)')


class _Record(NamedTuple):
    """One record: its row as a spreadsheet counts it, and its raw fields with their quotes."""

    row: int
    fields: list[bytes]


def read_header(data: bytes, *, file: str) -> list[str]:
    """Return the column names, after a check that `data` is text at all.

    Args:
        data: the file's bytes, uncompressed.
        file: its name, for the error.

    Raises:
        DataError: empty, not UTF-8, or another kind of file.
    """
    for magic, meaning in _FOREIGN.items():
        if data.startswith(magic):
            raise DataError(meaning, file=file)
    header = next(_rows(data, file), None)
    if header is None:
        raise DataError("the file is empty: a header and rows are needed", file=file)
    _check_bytes(header, [""] * len(header.fields), file)
    return [_text(field) for field in header.fields]


def parse_csv(data: bytes, *, file: str, header: Sequence[str], columns: Sequence[str]) -> pa.Table:
    """Read `columns` of a CSV file with a header, every value as text.

    Blank lines are no rows. A field may be quoted, and then hold commas, newlines and doubled quotes.

    Args:
        data: the file's bytes, uncompressed: UTF-8, with or without a byte order mark.
        file: its name, for the error.
        header: what `read_header` returned.
        columns: the columns to return, each once in `header`.

    Returns:
        A table of `large_string` columns without nulls, rows in file order.

    Raises:
        DataError: no rows; a row with too many or too few fields, bytes that are not UTF-8, NUL bytes, a quote
            that is not closed, or text after a closing quote. Names the row.
    """
    if next(islice(_rows(data, file), 1, None), None) is None:
        raise DataError("there are no rows below the header", file=file)
    if b"\0" in data or not _is_well_quoted(data):
        _raise_first_fault(data, file, header)
    block_bytes = BLOCK_BYTES
    while True:
        try:
            return _parse(data, columns, block_bytes)
        except pa.ArrowInvalid as error:
            _raise_first_fault(data, file, header)
            if block_bytes >= min(len(data), _MAX_BLOCK_BYTES):
                raise DataError(f"cannot be parsed as CSV: {error}", file=file) from error
            block_bytes = min(block_bytes * 16, _MAX_BLOCK_BYTES)  # no fault: a row is longer than the block


def spreadsheet_row(data: bytes, index: int, *, file: str) -> int:
    """Return the row that a spreadsheet shows for row `index` of the table (from 0); blank lines count."""
    return next(islice(_rows(data, file), index + 1, None)).row


def _parse(data: bytes, columns: Sequence[str], block_bytes: int) -> pa.Table:
    return pacsv.read_csv(
        pa.BufferReader(data),
        read_options=pacsv.ReadOptions(block_size=block_bytes),
        parse_options=pacsv.ParseOptions(newlines_in_values=True),
        convert_options=pacsv.ConvertOptions(
            include_columns=list(columns),
            column_types=dict.fromkeys(columns, pa.large_string()),
            strings_can_be_null=False,
        ),
    )


def _is_well_quoted(data: bytes) -> bool:
    """Whether every quote is one that RFC 4180 allows.

    Quotes alternate between opening and closing, an escaped quote being a closing one followed at once by an
    opening one. So it is enough that each opening quote stands after a separator or a quote, and each closing
    one before.
    """
    quotes = _positions(data, _QUOTE)
    if len(quotes) % 2:
        return False
    raw = np.frombuffer(data, np.uint8)
    opening, closing = quotes[0::2], quotes[1::2]
    start = len(_BOM) if data.startswith(_BOM) else 0
    before = raw[opening[opening > start] - 1]
    after = raw[closing[closing < len(data) - 1] + 1]
    return bool(np.isin(before, (_COMMA, _CR, _LF, _QUOTE)).all() and np.isin(after, (_COMMA, _CR, _LF, _QUOTE)).all())


def _positions(data: bytes, byte: int) -> np.ndarray:
    """Positions of a byte, int64, found piece by piece: a mask of the whole file would double the memory."""
    raw = np.frombuffer(data, np.uint8)
    step = 1 << 20
    found = [np.flatnonzero(raw[start : start + step] == byte) + start for start in range(0, len(raw), step)]
    return np.concatenate(found) if found else np.empty(0, np.int64)


def _rows(data: bytes, file: str) -> Iterator[_Record]:
    """Yield the header and the rows of data: every record but blank lines."""
    return (record for record in _scan(data, file) if record.fields != [b""])


def _scan(data: bytes, file: str) -> Iterator[_Record]:
    """Yield every record, blank lines too. A file's end closes the last record."""
    position, row, fields = len(_BOM) if data.startswith(_BOM) else 0, 1, list[bytes]()
    while position < len(data) or fields:
        match = _FIELD.match(data, position)
        if match is None:
            raise _quote_error(data, position, row, file)
        fields.append(match[1])
        position = match.end()
        if match[2] != b",":
            yield _Record(row, fields)
            row, fields = row + 1, []


def _quote_error(data: bytes, position: int, row: int, file: str) -> DataError:
    """The error for a field that starts with a quote at `position` and is no quoted field."""
    advice = "a quote inside a quoted field is written twice"
    closed = re.compile(_QUOTED).match(data, position)
    if closed is None:
        return DataError(f"a quote is opened and never closed: close it, or note that {advice}", file=file, row=row)
    rest = data[closed.end() : closed.end() + 20].decode("utf-8", "replace")
    return DataError(f"text follows a closing quote: {rest!r}; {advice}", file=file, row=row)


def _raise_first_fault(data: bytes, file: str, header: Sequence[str]) -> None:
    """Raise for the first row that is at fault; return if there is none."""
    for record in _rows(data, file):
        if len(record.fields) != len(header):
            raise DataError(
                f"{len(record.fields)} fields where the header has {len(header)}: leave no field out, "
                "and quote one that holds a comma or a line break",
                file=file,
                row=record.row,
            )
        _check_bytes(record, header, file)


def _check_bytes(record: _Record, header: Sequence[str], file: str) -> None:
    for field, name in zip(record.fields, header, strict=True):
        if b"\0" in field:
            problem = "a NUL byte: the file is damaged, or is UTF-16 and must be saved as UTF-8"
            raise DataError(problem, file=file, row=record.row, column=name or None)
        try:
            field.decode("utf-8")
        except UnicodeDecodeError as error:
            problem = f"byte 0x{field[error.start]:02x} is not UTF-8: save the file as UTF-8"
            raise DataError(problem, file=file, row=record.row, column=name or None) from None


def _text(field: bytes) -> str:
    text = field.decode("utf-8")
    return text[1:-1].replace('""', '"') if text.startswith('"') else text
