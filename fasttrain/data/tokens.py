"""Columns of text to rows of token ids, with no Python loop over tokens.

Text is cut into pieces. Threads split each piece at the spaces, number its distinct words and clean those (see
`Clean`); the pieces' dictionaries are then merged. The time grows in proportion to the length of the text.
"""

# pyright: reportUnknownParameterType=false, reportAttributeAccessIssue=false
# pyarrow is compiled, and makes its compute functions at import: neither has types to report.

from __future__ import annotations

import functools
import re
import string
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

__all__ = [
    "UNK_TOKEN",
    "Clean",
    "CleanOrAuto",
    "TokenRows",
    "build_and_encode",
    "clean_as_book",
    "clean_words",
    "encode",
    "threads",
]

UNK_TOKEN = "<UNK>"

Clean = Literal["none", "book", "unicode"]
"""What is done to a word of the text (what stands between spaces) before its tokens are counted.

none: nothing; the word is the token.
book: the textbook's cleaning, see `clean_as_book`.
unicode: for text of any script. NFKC normalisation and case folding. Letters, marks, digits and `_` make a token, also
with apostrophes inside (`it's`); so do digits with `.`, `,` or `:` inside (`4.5`). ASCII punctuation marks and symbols
(emoji) are tokens of their own; other punctuation, white space and control characters end a token and are dropped.
Scripts that are written without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese and others) become characters
and pairs of neighbouring characters. Text that the book has cleaned stays as it is.
"""

CleanOrAuto = Literal["auto", "none", "book", "unicode"]
"""`Clean`, or auto: `none` where the train rows are already in tokens that `unicode` would change, else `unicode`."""

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


@dataclass(frozen=True)
class _Words:
    """The distinct words of all pieces."""

    dictionary: pa.LargeStringArray
    """In order of first appearance."""
    places: list[np.ndarray]
    """For each piece, where each word of its dictionary stands in this one."""
    counts: np.ndarray
    """int64: occurrences of each word."""


def threads() -> ThreadPoolExecutor:
    """Return threads for work that releases the interpreter's lock: as many as pyarrow uses."""
    return ThreadPoolExecutor(pa.cpu_count(), thread_name_prefix="fasttrain-text")


@dataclass(frozen=True, kw_only=True, eq=False)
class BuiltTokens:
    """What `build_and_encode` found in the train rows."""

    kept: list[str]
    """The kept tokens in order of first appearance; the first has id 1."""
    rows: TokenRows
    """The encoded rows."""
    clean: Clean
    """The cleaning that was used."""
    clean_reason: str
    """Why, and what it did."""


def build_and_encode(
    texts: pa.ChunkedArray, rows: np.ndarray, cutoff: int, pool: ThreadPoolExecutor, clean: CleanOrAuto = "none"
) -> BuiltTokens:
    """Find the tokens that the rows hold more than `cutoff` times in all, and encode the rows with them.

    Args:
        texts: `large_string`, without nulls.
        rows: row numbers in `texts`, ascending.
        cutoff: a token is kept if it occurs more often than this.
        pool: from `threads`.
        clean: how words are cleaned, or auto.
    """
    pieces = list(pool.map(_split, _pieces(texts, rows)))
    words = _merge(pieces)
    if clean == "none":
        chosen, reason = clean, "asked for: tokens are what stands between spaces"
    else:
        chosen = "unicode" if clean == "auto" else clean
        cleaned = clean_words(words.dictionary, chosen)
        census = _Census.of(words, cleaned)
        if clean == "auto" and census.is_in_tokens and census.num_changed:
            chosen, reason = "none", census.why_none()
        else:
            reason = ("" if clean == "auto" else "asked for: ") + census.what_changed()
            if cleaned is not words.dictionary:
                by_piece = (cleaned.take(pa.array(place)) for place in words.places)
                pieces = list(pool.map(_with_words, pieces, by_piece))
                words = _merge(pieces)
    tokens, ids_of_codes = _number_tokens(words, cutoff)
    dtype = _id_type(len(tokens) + 1)
    encoded = _concatenate(pool.map(_collapse, pieces, ids_of_codes, [dtype] * len(pieces)), dtype)
    return BuiltTokens(kept=tokens, rows=encoded, clean=chosen, clean_reason=reason)


def encode(
    texts: pa.ChunkedArray, rows: np.ndarray, known: Sequence[str], pool: ThreadPoolExecutor, clean: Clean = "none"
) -> TokenRows:
    """Encode some rows with known tokens.

    Args:
        texts: `large_string`, without nulls.
        rows: row numbers in `texts`, ascending.
        known: the tokens of id 0, 1, and so on; the first stands for all that are not here.
        pool: from `threads`.
        clean: how words are cleaned.
    """
    value_set = pa.array(known, pa.large_string())
    dtype = _id_type(len(known))

    def encode_piece(piece: _Piece) -> TokenRows:
        tokens = _split(piece)
        tokens = _with_words(tokens, clean_words(tokens.dictionary, clean))
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


def _split(piece: _Piece) -> _Tokens:
    lists = pc.split_pattern(piece.chunk.take(pa.array(piece.rows)), " ")
    encoded = lists.flatten().dictionary_encode()
    codes = encoded.indices.to_numpy().astype(_id_type(len(encoded.dictionary)))
    return _Tokens(encoded.dictionary, codes, np.diff(lists.offsets.to_numpy()))


# No word that matches is changed by its cleaning: most words are found here, at a fraction of the price.
_CLEAN_WORD: dict[Clean, str] = {
    "book": r"^(?:[a-z]*|[.,!?])$",
    "unicode": r"^(?:[a-z0-9_]+(?:'[a-z0-9_]+)*|[!-/:-@\[-`{-~]|)$",
}

_WORD = r"[\p{L}\p{M}\p{N}_]+"
_TOKEN_OR_REST = (
    rf"(?s)(\p{{Nd}}+(?:[.,:]\p{{Nd}}+)+|{_WORD}(?:'{_WORD})*|[!-/:-@\[-`{{-~]|[^\p{{P}}\p{{Z}}\p{{C}}\s])|."
)
_UNSPACED = (
    "".join(
        rf"\p{{{script}}}"
        for script in (
            *("Han", "Hiragana", "Katakana", "Bopomofo", "Yi", "Thai", "Lao", "Khmer", "Myanmar"),
            *("Tai_Le", "New_Tai_Lue", "Tai_Tham", "Tai_Viet"),
        )
    )
    + r"\x{30FC}"
)  # the long vowel of Katakana belongs to no script
_UNSPACED_RUN = rf"([{_UNSPACED}][{_UNSPACED}\p{{M}}]*)"
_UNSPACED_MARK = "\x01"
"""Stands before a run of an unspaced script while it is cut up: cleaned text holds no control characters."""


def clean_words(words: pa.LargeStringArray, clean: Clean) -> pa.LargeStringArray:
    """Return for each word its tokens, separated by spaces; "" where nothing is left of it.

    The words themselves hold no space. The array itself is returned where the cleaning changes nothing.
    """
    if clean == "none":
        return words
    is_clean = pc.match_substring_regex(words, pattern=_CLEAN_WORD[clean])
    if pc.all(is_clean).as_py() in (True, None):
        return words
    others = words.filter(pc.invert(is_clean))
    cleaned = pa.array(map(clean_as_book, others.to_pylist()), words.type) if clean == "book" else _unicode(others)
    return pc.replace_with_mask(words, pc.invert(is_clean), _single_spaces(cleaned))


def clean_as_book(text: str) -> str:
    """Return text as the textbook's cleaning leaves it, ready to be split at spaces.

    Lower case; `.`, `,`, `!` and `?` set apart by spaces; every run of other characters that are no letters
    a to z turned into one space.
    """
    return re.sub(r"[^a-zA-Z.,!?]+", " ", re.sub(r"([.,!?])", r" \1 ", text.lower()))


def _unicode(words: pa.LargeStringArray) -> pa.LargeStringArray:
    # A zero-width space ends a word; joiners, variation selectors and other invisible characters do not.
    words = pc.replace_substring(words, "\u200b", " ")
    words = pc.replace_substring_regex(words, r"\p{Cf}|[\x{FE00}-\x{FE0F}\x{E0100}-\x{E01EF}]", "")
    words = pa.array(map(_fold, words.to_pylist()), words.type)
    words = pc.replace_substring_regex(words, _UNSPACED_RUN, r" \1 ")
    words = pc.replace_substring_regex(words, _TOKEN_OR_REST, r" \1 ")
    words = pc.replace_substring_regex(words, _UNSPACED_RUN, rf"{_UNSPACED_MARK}\1")
    is_unspaced = pc.match_substring(words, _UNSPACED_MARK)
    if not pc.any(is_unspaced).as_py():
        return words
    cut = pa.array(map(_cut, words.filter(is_unspaced).to_pylist()), words.type)
    return pc.replace_with_mask(words, is_unspaced, cut)


def _fold(text: str) -> str:
    if text.isascii():
        return text.lower()
    # Case folding may leave text that is not normalised; a typographic apostrophe is an apostrophe.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return folded.replace("\u2019", "'")


def _cut(text: str) -> str:
    """Replace each marked run of an unspaced script by its characters and its pairs of neighbours."""
    found: list[str] = []
    for word in text.split():
        if word[0] == _UNSPACED_MARK:
            run = word[1:]
            found += [*run, *map(str.__add__, run, run[1:])]
        else:
            found.append(word)
    return " ".join(found)


def _single_spaces(texts: pa.LargeStringArray) -> pa.LargeStringArray:
    return pc.ascii_trim(pc.replace_substring_regex(texts, " +", " "), " ")


def _with_words(tokens: _Tokens, cleaned: pa.LargeStringArray) -> _Tokens:
    """Replace each word of a piece by the tokens that its cleaning gave, in order."""
    if cleaned is tokens.dictionary:
        return tokens
    lists = pc.split_pattern(cleaned, " ")
    encoded = lists.flatten().dictionary_encode()
    counts = pc.list_value_length(lists).to_numpy()
    begins = _offsets(counts)[:-1]
    # The tokens of the word at occurrence i are words begins[code] to begins[code] + counts[code].
    lengths = counts[tokens.codes]
    ends = _offsets(lengths)
    places = np.arange(ends[-1]) + np.repeat(begins[tokens.codes] - ends[:-1], lengths)
    codes = encoded.indices.to_numpy().astype(_id_type(len(encoded.dictionary)))[places]
    return _Tokens(encoded.dictionary, codes, np.diff(ends[_offsets(tokens.lengths)]))


_MARKS = r"[.,!?\x{3002}\x{FF0C}\x{FF01}\x{FF1F}\x{3001}\x{060C}\x{061F}\x{0964}\x{2026}]"
"""Also those of Chinese, Japanese, Arabic and Hindi, and the ellipsis."""


@dataclass(frozen=True)
class _Census:
    """Occurrences of words in the train rows, as shares of all."""

    num_words: int
    num_changed: int
    """Words that the cleaning changes."""
    num_apart: int
    """Words that are nothing but full stops, commas, exclamation or question marks."""
    num_attached: int
    """Words that end in one."""
    num_raw: int
    """Words with a capital letter or white space in them."""

    @property
    def is_in_tokens(self) -> bool:
        """Whether somebody has made tokens of this text: marks stand apart, case is folded."""
        return 0.95 * self.num_attached <= 0.05 * self.num_apart > 0 and self.num_raw <= 0.01 * self.num_words

    @classmethod
    def of(cls, words: _Words, cleaned: pa.LargeStringArray) -> _Census:
        dictionary = words.dictionary
        conditions = (
            pc.not_equal(dictionary, ""),
            pc.not_equal(dictionary, cleaned),
            pc.match_substring_regex(dictionary, rf"^{_MARKS}+$"),
            pc.match_substring_regex(dictionary, rf"[\p{{L}}\p{{M}}\p{{N}}]{_MARKS}+$"),
            pc.match_substring_regex(dictionary, r"[\p{Lu}\p{Z}\s]"),
        )
        return cls(*(int(words.counts[each.to_numpy(zero_copy_only=False)].sum()) for each in conditions))

    def what_changed(self) -> str:
        if not self.num_changed:
            return "it leaves the train reviews as they are"
        return f"it changed {self._percent(self.num_changed)} of the words between spaces in the train reviews"

    def why_none(self) -> str:
        share = 100 * self.num_apart / (self.num_apart + self.num_attached)
        return (
            f"the train reviews are already in tokens: {share:.1f}% of their . , ! ? stand apart and "
            f"{self._percent(self.num_raw)} of their words have capital letters; "
            f"unicode would change {self._percent(self.num_changed)}"
        )

    def _percent(self, count: int) -> str:
        return f"{100 * count / max(self.num_words, 1):.3g}%"


def _merge(pieces: Sequence[_Tokens]) -> _Words:
    # Dictionaries in order of first appearance, one after the other, are again in order of first appearance.
    merged = pa.concat_arrays([piece.dictionary for piece in pieces]).dictionary_encode()
    ends = np.cumsum([len(piece.dictionary) for piece in pieces])
    places = np.split(merged.indices.to_numpy(), ends[:-1])
    counts = np.zeros(len(merged.dictionary), np.int64)
    for piece, place in zip(pieces, places, strict=True):
        counts[place] += np.bincount(piece.codes, minlength=len(place))
    return _Words(merged.dictionary, places, counts)


def _number_tokens(words: _Words, cutoff: int) -> tuple[list[str], list[np.ndarray]]:
    """Give an id to every token that occurs often enough.

    Returns:
        The tokens of id 1 and on, and for each piece the id of every token of its dictionary, or `_SKIPPED`.
    """
    is_skipped = _is_skipped(words.dictionary)
    is_unk = pc.equal(words.dictionary, UNK_TOKEN).to_numpy(zero_copy_only=False)
    is_kept = (words.counts > cutoff) & ~is_skipped & ~is_unk
    ids = np.where(is_skipped, _SKIPPED, np.where(is_kept, np.cumsum(is_kept), 0))
    return words.dictionary.filter(pa.array(is_kept)).to_pylist(), [ids[place] for place in words.places]


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
