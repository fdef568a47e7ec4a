"""The textbook's vectoriser: from the reviews and ratings of a table to token ids and labels.

A review is a collapsed one-hot vector: 1 at the index of each token that occurs in it, whatever its count. It
is kept as the list of those indices (`TokenRows`).

Tokens are `review.split(" ")`, cleaned as the run says (`tokens.Clean`). One that is a substring of
`string.punctuation`, the empty one too, is skipped. The vocabulary comes from the train rows: tokens that occur more
than `cutoff` times, in order of first appearance, after `<UNK>` at index 0. Any other token, and a literal `<UNK>` in
the text, has index 0.
"""

# pyright: reportUnknownParameterType=false, reportAttributeAccessIssue=false
# pyarrow is compiled, and makes its compute functions at import: neither has types to report.

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fasttrain.data import tokens
from fasttrain.data.table import ReviewTable
from fasttrain.data.tokens import UNK_TOKEN, Clean, CleanOrAuto, TokenRows, clean_words
from fasttrain.errors import ConfigError, DataError, RunError

__all__ = [
    "EncodedReviews",
    "EncodedSplit",
    "ReviewVectorizer",
    "TokenRows",
    "Vocabulary",
    "check_clean",
    "check_cutoff",
    "encode_reviews",
]


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Tokens and their indices, in the textbook's shape."""

    token_to_idx: dict[str, int]
    """In order of index, which counts from 0 without a gap."""
    add_unk: bool
    """Whether unknown tokens have an index."""
    unk_token: str = UNK_TOKEN
    """The token that stands for them, at index 0 where `add_unk`."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as the textbook's `to_serializable` does."""
        return {"token_to_idx": self.token_to_idx, "add_unk": self.add_unk, "unk_token": self.unk_token}

    @classmethod
    def from_dict(cls, contents: Mapping[str, Any]) -> Vocabulary:
        """Rebuild what `to_dict` or the textbook's `to_serializable` made.

        Raises:
            DataError: a key is missing, an index is missing or there twice, or unk_token is not at index 0.
        """
        match contents:
            case {"token_to_idx": dict(found), "add_unk": bool(add_unk), "unk_token": str(unk_token)}:
                indices = cast("dict[Any, Any]", found)
            case _:
                raise DataError("a vocabulary needs token_to_idx (a dict), add_unk (a bool) and unk_token (text)")
        is_typed = all(type(token) is str and type(index) is int for token, index in indices.items())
        if not is_typed or sorted(indices.values()) != list(range(len(indices))):
            raise DataError(f"token_to_idx must number its {len(indices)} tokens from 0, each index once")
        if add_unk and indices.get(unk_token) != 0:
            raise DataError(f"with add_unk, the index of {unk_token!r} must be 0")
        ordered = dict(sorted(indices.items(), key=lambda item: item[1]))
        return cls(token_to_idx=ordered, add_unk=add_unk, unk_token=unk_token)


@dataclass(frozen=True)
class ReviewVectorizer:
    """Turns text into token ids as a model was trained on them.

    Raises:
        DataError: the review vocabulary has no index for unknown tokens, or the cleaning is unknown.
    """

    review_vocab: Vocabulary
    rating_vocab: Vocabulary
    clean: Clean = "book"
    """How text is cleaned, in training as in prediction. The book's own file does not have it: its text was cleaned as
    the book does. Nor do files of fasttrain before it had the option, which cleaned new text like that."""

    def __post_init__(self) -> None:
        if not self.review_vocab.add_unk:
            raise DataError("review_vocab needs add_unk: a new review may hold unknown words")
        if self.clean not in get_args(Clean):
            raise DataError(f"clean is {self.clean!r}: it must be one of {', '.join(get_args(Clean))}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: `review_vocab` and `rating_vocab` as the textbook's, and `clean`."""
        return {
            "review_vocab": self.review_vocab.to_dict(),
            "rating_vocab": self.rating_vocab.to_dict(),
            "clean": self.clean,
        }

    @classmethod
    def from_dict(cls, contents: Mapping[str, Any]) -> ReviewVectorizer:
        """Rebuild what `to_dict` made.

        Raises:
            DataError: it is not the shape that `to_dict` returns.
        """
        match contents:
            case {"review_vocab": dict(review), "rating_vocab": dict(rating)}:
                return cls(
                    Vocabulary.from_dict(cast("dict[str, Any]", review)),
                    Vocabulary.from_dict(cast("dict[str, Any]", rating)),
                    contents.get("clean", "book"),
                )
            case _:
                raise DataError("a vectorizer needs a review_vocab and a rating_vocab")

    def to_json(self) -> str:
        """Return the content of `vectorizer.json`."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def save(self, path: Path) -> None:
        """Write `vectorizer.json`.

        Raises:
            RunError: the file cannot be written.
        """
        try:
            path.write_text(self.to_json(), encoding="utf-8")
        except OSError as error:
            raise RunError(f"{path} cannot be written: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> ReviewVectorizer:
        """Read `vectorizer.json`.

        Raises:
            RunError: the file cannot be read.
            DataError: it is no vectorizer.
        """
        try:
            contents = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RunError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"is not JSON: {error}", file=str(path)) from error
        try:
            return cls.from_dict(contents)
        except DataError as error:
            raise DataError(error.problem, file=str(path)) from None

    def encode(self, texts: Sequence[str]) -> TokenRows:
        """Return the token ids of texts, which are cleaned as `clean` says.

        Raises:
            DataError: a text is no string, or holds a code point that has no UTF-8 form.
        """
        column = _text_column(texts)
        known = list(self.review_vocab.token_to_idx)
        with tokens.threads() as pool:
            return tokens.encode(column, np.arange(len(column)), known, pool, self.clean)

    def cleaned(self, texts: Sequence[str]) -> list[str]:
        """Return texts as `clean` leaves them: `encode` counts what then stands between spaces.

        Raises:
            DataError: as `encode`.
        """
        lists = pc.split_pattern(_text_column(texts).combine_chunks(), " ")
        words = lists.flatten().dictionary_encode()
        cleaned = clean_words(words.dictionary, self.clean).take(words.indices)
        return pc.binary_join(type(lists).from_arrays(lists.offsets, cleaned), pa.scalar(" ", cleaned.type)).to_pylist()


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedSplit:
    """A split, ready to become batches; rows in file order."""

    tokens: TokenRows
    labels: np.ndarray
    """int64 [num_rows]: indices in the rating vocabulary."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedReviews:
    """All splits of a table, and the vectoriser that fits them."""

    splits: dict[str, EncodedSplit]
    """train, val and test; the last two may have no rows."""
    vectorizer: ReviewVectorizer
    clean_reason: str
    """Why the text was cleaned as `vectorizer.clean` says, and what that did."""
    sha256: str
    """Of the table, as in `ReviewTable`."""
    source: str
    """The path as it was given, or "DataFrame"."""
    notes: tuple[str, ...]
    """What the user should be told."""


def encode_reviews(table: ReviewTable, *, cutoff: int = 25, clean: CleanOrAuto = "none") -> EncodedReviews:
    """Build the vocabularies from the train rows and encode every split.

    Args:
        table: from `read_reviews`.
        cutoff: a token gets an index if it occurs in train more often than this; every occurrence counts.
        clean: how the reviews of every split are cleaned; auto decides by the train rows.

    Raises:
        ConfigError: `cutoff` is no integer, or negative; `clean` is unknown.
    """
    check_cutoff(cutoff)
    check_clean(clean)
    with tokens.threads() as pool:
        train = tokens.build_and_encode(table.review, table.rows["train"], cutoff, pool, clean)
        known = [UNK_TOKEN, *train.kept]
        rows = {
            name: tokens.encode(table.review, table.rows[name], known, pool, train.clean) for name in ("val", "test")
        }
    rating_vocab = _rating_vocabulary(table)
    labels = _labels(table, rating_vocab)
    splits = {
        name: EncodedSplit(tokens=encoded, labels=labels[table.rows[name]])
        for name, encoded in {"train": train.rows, **rows}.items()
    }
    notes = table.notes
    if not train.kept:
        notes += (f"no word occurs more than {cutoff} times in train: all are unknown; lower the cutoff",)
    return EncodedReviews(
        splits=splits,
        vectorizer=ReviewVectorizer(_vocabulary(known, add_unk=True), rating_vocab, train.clean),
        clean_reason=train.clean_reason,
        sha256=table.sha256,
        source=table.source,
        notes=notes,
    )


def check_cutoff(cutoff: int) -> None:
    """Raise a `ConfigError` unless `cutoff` is an integer of 0 or more."""
    if type(cutoff) is not int or cutoff < 0:
        raise ConfigError(f"cutoff is {cutoff!r}: it must be an integer, 0 or more")


def check_clean(clean: str) -> None:
    """Raise a `ConfigError` unless `clean` is one of `CleanOrAuto`."""
    if clean not in get_args(CleanOrAuto):
        raise ConfigError(f"clean is {clean!r}: it must be one of {', '.join(get_args(CleanOrAuto))}")


def _text_column(texts: Sequence[str]) -> pa.ChunkedArray:
    try:
        column = pa.chunked_array([pa.array(texts, pa.large_string())])
    except (pa.ArrowException, UnicodeEncodeError) as error:
        raise DataError(f"texts must be strings that UTF-8 can hold: {error}") from error
    if column.null_count:
        raise DataError("texts must be strings: one is missing")
    return column


def _vocabulary(names: Sequence[str], *, add_unk: bool) -> Vocabulary:
    return Vocabulary(token_to_idx={name: index for index, name in enumerate(names)}, add_unk=add_unk)


def _rating_vocabulary(table: ReviewTable) -> Vocabulary:
    ratings: list[str] = pc.unique(table.rating.combine_chunks().take(table.rows["train"])).to_pylist()
    numbers = {rating: _number(rating) for rating in ratings}
    if None in numbers.values():
        return _vocabulary(sorted(ratings), add_unk=False)
    # The text decides between equal numbers: "1" and "1.0" are two ratings.
    return _vocabulary(sorted(ratings, key=lambda rating: (numbers[rating], rating)), add_unk=False)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _labels(table: ReviewTable, vocabulary: Vocabulary) -> np.ndarray:
    """Return the index of each row's rating, int64 [num_rows]."""
    codes = table.rating.combine_chunks().dictionary_encode()
    indices = [vocabulary.token_to_idx[rating] for rating in codes.dictionary.to_pylist()]
    return np.array(indices, np.int64)[codes.indices.to_numpy()]
