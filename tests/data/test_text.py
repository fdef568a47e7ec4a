"""The vectoriser, against the textbook's rules written out naively."""

import json
import string
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.data.table import read_reviews
from fasttrain.data.text import (
    EncodedReviews,
    ReviewVectorizer,
    TokenRows,
    Vocabulary,
    encode_reviews,
)
from fasttrain.errors import ConfigError, DataError, RunError
from fasttrain.workloads.generate import generate_reviews

TOKENS = st.sampled_from(
    ["a", "b", "c", "A", "<UNK>", "!", ".", "!?", '!"#', "", " ", "ä", "好", "\u00a0", "\n", "a.", "''"]
)
REVIEWS = st.lists(TOKENS, max_size=12).map(" ".join)
ROWS = st.lists(st.tuples(st.sampled_from(["x", "y"]), REVIEWS, st.sampled_from(["train", "val", "test"])), max_size=12)


def naive(frame: pd.DataFrame, cutoff: int) -> tuple[list[str], dict[str, list[list[int]]]]:
    """The vocabulary, and for each split the ids of each row in order of first appearance."""
    counts = Counter[str]()
    for review in frame.review[frame.split == "train"]:
        for token in review.split(" "):
            if token not in string.punctuation:
                counts[token] += 1
    vocabulary = {"<UNK>": 0}
    for token, count in counts.items():
        if count > cutoff and token not in vocabulary:
            vocabulary[token] = len(vocabulary)
    splits = dict[str, list[list[int]]]()
    for split in ("train", "val", "test"):
        reviews = frame.review[frame.split == split]
        splits[split] = [
            list(dict.fromkeys(vocabulary.get(t, 0) for t in review.split(" ") if t not in string.punctuation))
            for review in reviews
        ]
    return list(vocabulary), splits


def rows_of(tokens: TokenRows) -> list[list[int]]:
    return [tokens.ids[start:stop].tolist() for start, stop in zip(tokens.offsets, tokens.offsets[1:], strict=False)]


def assert_equals_naive(encoded: EncodedReviews, frame: pd.DataFrame, cutoff: int) -> None:
    vocabulary, splits = naive(frame, cutoff)
    assert encoded.vectorizer.review_vocab.token_to_idx == {token: i for i, token in enumerate(vocabulary)}
    assert list(encoded.vectorizer.review_vocab.token_to_idx) == vocabulary
    ratings = encoded.vectorizer.rating_vocab.token_to_idx
    for split, expected in splits.items():
        assert rows_of(encoded.splits[split].tokens) == expected
        assert encoded.splits[split].labels.tolist() == [ratings[r] for r in frame.rating[frame.split == split]]


def frame_of(rating, review=None) -> pd.DataFrame:
    review = review or ["some text"] * len(rating)
    return pd.DataFrame({"rating": rating, "review": review, "split": "train"})


def encoded_of(rating, review=None, cutoff=0) -> EncodedReviews:
    return encode_reviews(read_reviews(frame_of(rating, review)), cutoff=cutoff)


@settings(deadline=None)
@given(ROWS, st.integers(0, 4))
def test_oracle_on_generated_tables(rows, cutoff):
    rows = [("x", "a b", "train"), ("y", "b !", "train"), *rows]
    frame = pd.DataFrame(rows, columns=["rating", "review", "split"])
    assert_equals_naive(encode_reviews(read_reviews(frame), cutoff=cutoff), frame, cutoff)


@pytest.mark.parametrize("cutoff", [0, 25])
def test_oracle_on_real_sentences(data_dir, cutoff):
    frame = pd.read_csv(data_dir / "sentences.csv.gz", nrows=5_000, keep_default_na=False)
    assert_equals_naive(encode_reviews(read_reviews(frame), cutoff=cutoff), frame, cutoff)


def test_the_vectorizer_encodes_as_the_table_was_encoded(data_dir):
    frame = pd.read_csv(data_dir / "sentences.csv.gz", nrows=2_000, keep_default_na=False)
    encoded = encode_reviews(read_reviews(frame), cutoff=3)
    again = encoded.vectorizer.encode(frame.review[frame.split == "train"].tolist())
    np.testing.assert_array_equal(again.ids, encoded.splits["train"].tokens.ids, strict=True)
    np.testing.assert_array_equal(again.offsets, encoded.splits["train"].tokens.offsets, strict=True)


def assert_same_encoding(first: EncodedReviews, second: EncodedReviews) -> None:
    assert first.vectorizer.review_vocab == second.vectorizer.review_vocab
    assert list(first.vectorizer.review_vocab.token_to_idx) == list(second.vectorizer.review_vocab.token_to_idx)
    for split in ("train", "val", "test"):
        for name in ("ids", "offsets"):
            arrays = [getattr(each.splits[split].tokens, name) for each in (first, second)]
            np.testing.assert_array_equal(*arrays, strict=True)


def test_auto_changes_no_figure_of_a_table_in_tokens(data_dir):
    table = read_reviews(data_dir / "sentences.csv.gz")
    assert_same_encoding(encode_reviews(table, clean="auto"), encode_reviews(table))


@pytest.mark.parametrize("clean", ["auto", "unicode", "book"])
def test_cleaning_changes_no_figure_of_a_table_that_the_book_cleaned(clean):
    table = read_reviews(generate_reviews(400, seed=3).table)
    encoded = encode_reviews(table, cutoff=2, clean=clean)
    assert encoded.vectorizer.clean == ("unicode" if clean == "auto" else clean)
    assert_same_encoding(encoded, encode_reviews(table, cutoff=2))


@pytest.mark.parametrize("clean", ["none", "book", "unicode"])
def test_the_vectorizer_cleans_as_the_table_was_cleaned(clean):
    texts = ["It's GREAT!", "straße  Straße\n好吃", "", "great food.", "It's so-so…"]
    encoded = encode_reviews(read_reviews(frame_of(["x", "y", "x", "y", "x"], texts)), cutoff=0, clean=clean)
    assert rows_of(encoded.vectorizer.encode(texts)) == rows_of(encoded.splits["train"].tokens)
    plain = ReviewVectorizer(encoded.vectorizer.review_vocab, encoded.vectorizer.rating_vocab, "none")
    assert rows_of(plain.encode(encoded.vectorizer.cleaned(texts))) == rows_of(encoded.splits["train"].tokens)
    assert encoded.vectorizer.cleaned(["a b"]) == ["a b"]


def test_an_unknown_cleaning_is_refused():
    with pytest.raises(ConfigError, match="clean is 'all': it must be one of auto, none, book, unicode"):
        encode_reviews(read_reviews(frame_of(["x", "y"])), clean="all")  # pyright: ignore[reportArgumentType]


def test_a_vectorizer_without_a_cleaning_cleans_as_the_book_does():
    vectorizer = encoded_of(["x", "y"], ["great food", "food"]).vectorizer
    contents = vectorizer.to_dict()
    del contents["clean"]
    assert rows_of(ReviewVectorizer.from_dict(contents).encode(["GREAT food!"])) == [[1, 2]]
    for clean in ("auto", "all", None, 3):
        with pytest.raises(DataError, match="must be one of none, book, unicode"):
            ReviewVectorizer.from_dict({**contents, "clean": clean})


def test_vocabulary_of_real_reviews(data_dir):
    encoded = encode_reviews(read_reviews(data_dir / "reviews_lite.csv.gz"), clean="auto")
    assert encoded.vectorizer.clean == "none"
    assert len(encoded.vectorizer.review_vocab.token_to_idx) == 5_317
    assert encoded.splits["train"].tokens.ids.dtype == np.uint16
    assert len(encoded.splits["train"].tokens.ids) == 2_578_803


@pytest.mark.parametrize(
    ("ratings", "order"),
    [
        (["10", "9", "1.5", "-2"], ["-2", "1.5", "9", "10"]),
        ([10, 9, 2, 1], ["1", "2", "9", "10"]),
        (["10", "9", "two"], ["10", "9", "two"]),
        (["nan", "2", "10"], ["10", "2", "nan"]),
        (["1.0", "2", "1"], ["1", "1.0", "2"]),
        (["positive", "negative"], ["negative", "positive"]),
    ],
)
def test_ratings_are_sorted_as_numbers_where_all_are(ratings, order):
    encoded = encoded_of(ratings)
    assert list(encoded.vectorizer.rating_vocab.token_to_idx) == order
    assert encoded.splits["train"].labels.tolist() == [order.index(str(rating)) for rating in ratings]
    assert encoded.splits["train"].labels.dtype == np.int64


def test_a_vocabulary_of_nothing_is_noted():
    encoded = encoded_of(["x", "y"], cutoff=25)
    assert list(encoded.vectorizer.review_vocab.token_to_idx) == ["<UNK>"]
    assert rows_of(encoded.splits["train"].tokens) == [[0], [0]]
    assert "no word occurs more than 25 times" in encoded.notes[-1]


@pytest.mark.parametrize("cutoff", [-1, 2.5, True, None])
def test_impossible_cutoffs(cutoff):
    with pytest.raises(ConfigError, match="cutoff"):
        encoded_of(["x", "y"], cutoff=cutoff)


def test_the_file_of_a_vectorizer(tmp_path):
    vectorizer = encoded_of(["x", "y"], ["ä <UNK> b", "b c"]).vectorizer
    path = tmp_path / "vectorizer.json"
    vectorizer.save(path)
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "review_vocab": {
            "token_to_idx": {"<UNK>": 0, "ä": 1, "b": 2, "c": 3},
            "add_unk": True,
            "unk_token": "<UNK>",
        },
        "rating_vocab": {"token_to_idx": {"x": 0, "y": 1}, "add_unk": False, "unk_token": "<UNK>"},
        "clean": "none",
    }
    loaded = ReviewVectorizer.load(path)
    assert loaded == vectorizer
    assert rows_of(loaded.encode(["b z !", "", "ä ä <UNK> c"])) == [[2, 0], [], [1, 0, 3]]


def test_indices_in_any_order_are_put_in_order():
    contents = {"token_to_idx": {"b": 1, "<UNK>": 0}, "add_unk": True, "unk_token": "<UNK>"}
    assert list(Vocabulary.from_dict(contents).token_to_idx) == ["<UNK>", "b"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token_to_idx": ["a"]}, "needs token_to_idx"),
        ({"add_unk": None}, "needs token_to_idx"),
        ({"token_to_idx": {"<UNK>": 0, "a": 2}}, "from 0, each index once"),
        ({"token_to_idx": {"<UNK>": 0, "a": 0}}, "from 0, each index once"),
        ({"token_to_idx": {"<UNK>": 0, "a": True}}, "from 0, each index once"),
        ({"token_to_idx": {"a": 0, "<UNK>": 1}}, "must be 0"),
        ({"token_to_idx": {}}, "must be 0"),
    ],
)
def test_bad_vocabularies(change, words):
    contents = {"token_to_idx": {"<UNK>": 0}, "add_unk": True, "unk_token": "<UNK>", **change}
    with pytest.raises(DataError, match=words):
        Vocabulary.from_dict(contents)


@pytest.mark.parametrize("text", ["{", "[]", '{"review_vocab": {}, "rating_vocab": {}}', '{"review_vocab": 1}'])
def test_bad_files_of_a_vectorizer(tmp_path, text):
    path = tmp_path / "vectorizer.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"vectorizer\.json"):
        ReviewVectorizer.load(path)


def test_unreadable_and_unwritable_files(tmp_path):
    with pytest.raises(RunError, match="cannot be read"):
        ReviewVectorizer.load(tmp_path / "absent.json")
    with pytest.raises(RunError, match="cannot be written"):
        encoded_of(["x", "y"]).vectorizer.save(tmp_path / "absent" / "vectorizer.json")


def test_a_review_vocabulary_must_have_an_unknown_token():
    ratings = Vocabulary(token_to_idx={"x": 0, "y": 1}, add_unk=False)
    with pytest.raises(DataError, match="needs add_unk"):
        ReviewVectorizer(ratings, ratings)


@pytest.mark.parametrize("texts", [["a", None], ["a", 3], ["\udc80"]])
def test_texts_that_are_none(texts):
    with pytest.raises(DataError, match="must be strings"):
        encoded_of(["x", "y"]).vectorizer.encode(texts)
