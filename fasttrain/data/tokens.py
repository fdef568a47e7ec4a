"""Columns of text to rows of token ids, with no Python loop over tokens.

Text is cut into pieces; threads split each at the spaces and number its distinct tokens; the pieces'
dictionaries are merged. All of it takes time in proportion to the length of the text.
"""

# pyright: reportUnknownParameterType=false, reportAttributeAccessIssue=false
# pyarrow is compiled, and makes its compute functions at import: neither has types to report.

from __future__ import annotations

import functools
import string
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["UNK_TOKEN", "TokenRows", "build_and_encode", "encode", "threads"]

UNK_TOKEN = "<UNK>"

# Text that a thread works on at a time. Its tokens should stay near the core's caches, and the threads'
# memory should not grow with the table; yet a piece's dictionary should be much smaller than its text.
PIECE_BYTES = 2 << 20

_SKIPPED = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenRows:
    """The token ids of rows of text, in compressed sparse rows."""

    ids: np.ndarray
    """[num_tokens], the smallest unsigned integer type that fits the vocabulary. In a row each id occurs
    once, in the order of first appearance in the text."""
    offsets: np.ndarray
    """int64 [num_rows + 1]; row i is `ids[offsets[i]:offsets[i + 1]]`, and empty where no token counts."""


@dataclass(frozen=True)
class _Piece:
    """Some rows of a chunk of text, in order; taken out of it by the thread that works on them."""

    chunk: pa.LargeStringArray
    rows: np.ndarray


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a piece, every occurrence."""

    dictionary: pa.LargeStringArray
    """The distinct tokens, in order of first appearance."""
    codes: np.ndarray
    """Unsigned, [num_occurrences]: indices in `dictionary`."""
    lengths: np.ndarray
    """[num_rows]: occurrences in each row."""


def threads() -> ThreadPoolExecutor:
    """Return threads for work that releases the interpreter's lock: as many as pyarrow uses."""
    return ThreadPoolExecutor(pa.cpu_count(), thread_name_prefix="fasttrain-text")


def build_and_encode(
    texts: pa.ChunkedArray, rows: np.ndarray, cutoff: int, pool: ThreadPoolExecutor
) -> tuple[list[str], TokenRows]:
    """Find the tokens that the rows hold more than `cutoff` times in all, and encode the rows with them.

    Args:
        texts: `large_string`, without nulls.
        rows: row numbers in `texts`, ascending.
        cutoff: a token is kept if it occurs more often than this.
        pool: from `threads`.

    Returns:
        The kept tokens in order of first appearance (the first has id 1), and the encoded rows.
    """
    pieces = list(pool.map(_tokenise, _pieces(texts, rows)))
    tokens, ids_of_codes = _number_tokens(pieces, cutoff)
    dtype = _id_type(len(tokens) + 1)
    return tokens, _concatenate(pool.map(_collapse, pieces, ids_of_codes, [dtype] * len(pieces)), dtype)


def encode(texts: pa.ChunkedArray, rows: np.ndarray, known: Sequence[str], pool: ThreadPoolExecutor) -> TokenRows:
    """Encode some rows with known tokens.

    Args:
        texts: `large_string`, without nulls.
        rows: row numbers in `texts`, ascending.
        known: the tokens of id 0, 1, and so on; the first stands for all that are not here.
        pool: from `threads`.
    """
    value_set = pa.array(known, pa.large_string())
    dtype = _id_type(len(known))

    def encode_piece(piece: _Piece) -> TokenRows:
        tokens = _tokenise(piece)
        ids = pc.fill_null(pc.index_in(tokens.dictionary, value_set=value_set), 0).to_numpy()
        return _collapse(tokens, np.where(_is_skipped(tokens.dictionary), _SKIPPED, ids), dtype)

    return _concatenate(pool.map(encode_piece, _pieces(texts, rows)), dtype)


def _pieces(texts: pa.ChunkedArray, rows: np.ndarray) -> Iterator[_Piece]:
    """Cut the given rows (ascending) of a column into pieces of about `PIECE_BYTES`, in order."""
    start = 0
    for chunk in texts.chunks:
        first, last = np.searchsorted(rows, (start, start + len(chunk)))
        local = rows[first:last] - start
        start += len(chunk)
        if not len(local):
            continue
        ends = np.cumsum(pc.binary_length(chunk).to_numpy()[local])
        cuts = np.searchsorted(ends, np.arange(PIECE_BYTES, ends[-1], PIECE_BYTES)) + 1
        yield from (_Piece(chunk, part) for part in np.split(local, np.unique(cuts)) if len(part))


def _tokenise(piece: _Piece) -> _Tokens:
    lists = pc.split_pattern(piece.chunk.take(pa.array(piece.rows)), " ")
    encoded = lists.flatten().dictionary_encode()
    codes = encoded.indices.to_numpy().astype(_id_type(len(encoded.dictionary)))
    return _Tokens(encoded.dictionary, codes, np.diff(lists.offsets.to_numpy()))


def _number_tokens(pieces: Sequence[_Tokens], cutoff: int) -> tuple[list[str], list[np.ndarray]]:
    """Choose the tokens to keep.

    Returns:
        The tokens of id 1 and on, and for each piece the id of every token of its dictionary, or `_SKIPPED`.
    """
    # Dictionaries in order of first appearance, one after the other, are again in order of first appearance.
    merged = pa.concat_arrays([piece.dictionary for piece in pieces]).dictionary_encode()
    ends = np.cumsum([len(piece.dictionary) for piece in pieces])
    places = np.split(merged.indices.to_numpy(), ends[:-1])
    counts = np.zeros(len(merged.dictionary), np.int64)
    for piece, place in zip(pieces, places, strict=True):
        counts[place] += np.bincount(piece.codes, minlength=len(place))
    is_skipped = _is_skipped(merged.dictionary)
    is_unk = pc.equal(merged.dictionary, UNK_TOKEN).to_numpy(zero_copy_only=False)
    is_kept = (counts > cutoff) & ~is_skipped & ~is_unk
    ids = np.where(is_skipped, _SKIPPED, np.where(is_kept, np.cumsum(is_kept), 0))
    return merged.dictionary.filter(pa.array(is_kept)).to_pylist(), [ids[place] for place in places]


def _is_skipped(tokens: pa.LargeStringArray) -> np.ndarray:
    return pc.is_in(tokens, value_set=_skipped_tokens()).to_numpy(zero_copy_only=False)


@functools.cache
def _skipped_tokens() -> pa.LargeStringArray:
    """All substrings of the punctuation signs: the textbook asks `token not in string.punctuation`."""
    signs = string.punctuation
    ends = range(len(signs) + 1)
    return pa.array({signs[start:stop] for start in ends for stop in ends}, pa.large_string())


def _collapse(tokens: _Tokens, id_of_code: np.ndarray, dtype: np.dtype[Any]) -> TokenRows:
    """Map codes to ids and keep the first occurrence of each id in a row, in linear time."""
    ids = id_of_code[tokens.codes]
    rows = np.repeat(np.arange(len(tokens.lengths), dtype=np.int32), tokens.lengths)
    is_token = ids != _SKIPPED
    ids, rows = ids[is_token].astype(dtype), rows[is_token]
    order = _stable_order(ids)  # by id, and for one id by row: equal pairs are neighbours
    sorted_ids, sorted_rows = ids[order], rows[order]
    is_first = np.ones(len(ids), bool)
    is_first[1:] = (sorted_ids[1:] != sorted_ids[:-1]) | (sorted_rows[1:] != sorted_rows[:-1])
    is_chosen = np.zeros(len(ids), bool)
    is_chosen[order[is_first]] = True
    lengths = np.bincount(rows[is_chosen], minlength=len(tokens.lengths))
    return TokenRows(ids=ids[is_chosen], offsets=_offsets(lengths))


def _stable_order(ids: np.ndarray) -> np.ndarray:
    """Return a stable argsort in linear time: numpy uses radix sort for integers of up to 16 bits only."""
    if ids.itemsize <= 2:
        return np.argsort(ids, kind="stable")
    order = np.argsort(ids.astype(np.uint16), kind="stable")
    return order[np.argsort((ids >> 16).astype(np.uint16)[order], kind="stable")]


def _concatenate(parts: Iterable[TokenRows], dtype: np.dtype[Any]) -> TokenRows:
    ids, lengths = [np.empty(0, dtype)], [np.empty(0, np.int64)]
    for part in parts:
        ids.append(part.ids)
        lengths.append(np.diff(part.offsets))
    return TokenRows(ids=np.concatenate(ids), offsets=_offsets(np.concatenate(lengths)))


def _offsets(lengths: np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _id_type(num_ids: int) -> np.dtype[Any]:
    """The smallest unsigned type for ids below `num_ids`."""
    return np.min_scalar_type(max(num_ids - 1, 0))
