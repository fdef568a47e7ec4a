"""The token engine below the vectoriser: pieces, id widths, order."""

import re
import string
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.data import tokens
from fasttrain.data.tokens import clean_as_book, clean_words


def rows_of(encoded: tokens.TokenRows) -> list[list[int]]:
    return [part.tolist() for part in np.split(encoded.ids, encoded.offsets[1:-1])]


@pytest.mark.parametrize("piece_bytes", [1, 7, 50, 1 << 20])
@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
def test_neither_pieces_nor_chunks_show(monkeypatch, piece_bytes, chunk_rows):
    monkeypatch.setattr(tokens, "PIECE_BYTES", piece_bytes)
    texts = [f"w{i % 3} b w{i % 5} {'c ' * (i % 4)}" if i % 6 else "" for i in range(40)]
    chunks = [texts[start : start + chunk_rows] for start in range(0, len(texts), chunk_rows)]
    column = pa.chunked_array([pa.array(chunk, pa.large_string()) for chunk in chunks])
    with tokens.threads() as pool:
        built = tokens.build_and_encode(column, np.arange(0, 40, 2), 0, pool)
        kept, train = built.kept, built.rows
        other = tokens.encode(column, np.arange(1, 40, 2), ["<UNK>", *kept], pool)
    words = [[token for token in text.split(" ") if token] for text in texts]
    expected = list(dict.fromkeys(token for row in words[::2] for token in row))
    ids = {token: index + 1 for index, token in enumerate(expected)}
    assert kept == expected
    assert rows_of(train) == [list(dict.fromkeys(ids[token] for token in row)) for row in words[::2]]
    assert rows_of(other) == [list(dict.fromkeys(ids.get(token, 0) for token in row)) for row in words[1::2]]


@pytest.mark.parametrize(
    ("num_words", "dtype"), [(255, "uint8"), (256, "uint16"), (65_535, "uint16"), (70_000, "uint32")]
)
def test_ids_are_as_narrow_as_the_vocabulary_allows(num_words, dtype):
    words = [f"w{i}" for i in range(num_words)]
    column = pa.chunked_array([pa.array([" ".join(words + words[::-1]), words[-1]], pa.large_string())])
    with tokens.threads() as pool:
        built = tokens.build_and_encode(column, np.arange(2), 0, pool)
        kept, encoded = built.kept, built.rows
    assert kept == words
    assert encoded.ids.dtype == dtype
    assert encoded.ids.tolist() == [*range(1, num_words + 1), num_words]
    assert encoded.offsets.tolist() == [0, num_words, num_words + 1]
    assert encoded.offsets.dtype == np.int64


def test_no_rows():
    column = pa.chunked_array([pa.array(["a"], pa.large_string())])
    with tokens.threads() as pool:
        encoded = tokens.encode(column, np.empty(0, np.int64), ["<UNK>", "a"], pool)
    assert encoded.ids.tolist() == []
    assert encoded.offsets.tolist() == [0]


def cleaned(text: str, clean: tokens.Clean = "unicode") -> list[str]:
    """The tokens of a text."""
    words = clean_words(pa.array(text.split(" "), pa.large_string()), clean)
    return [token for word in words.to_pylist() for token in word.split(" ") if token]


def test_the_books_cleaning():
    assert clean_as_book("It's GREAT!!  5/5, no?\tYes.") == "it s great ! ! , no ? yes . "
    assert clean_as_book("ÀB\n好") == " b "
    assert clean_as_book("") == ""


@given(st.text())
def test_the_books_cleaning_of_words_is_that_of_the_text(text):
    assert cleaned(text, "book") == clean_as_book(text).split()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("It's GREAT!! 5/5, no?\tYes.", "it's great ! ! 5 / 5 , no ? yes ."),
        ("4.5 stars, 1,000 times at 8:30; v2.", "4.5 stars , 1,000 times at 8:30 ; v2 ."),
        ("food!Great,really...don’t", "food ! great , really . . . don't"),
        ("a well-made 'quoted' _num_ (x)", "a well - made ' quoted ' _num_ ( x )"),
        ("Großartig KÖSTLICH e\u0301te\u0301 ÉTÉ", "grossartig köstlich été été"),
        ("Ёлка ΣΊΣΥΦΟΣ Σίσυφος", "ёлка σίσυφοσ σίσυφοσ"),
        ("नमस्ते दुनिया। مرحبا، بِكُم؟ می\u200cخواهم", "नमस्ते दुनिया مرحبا بِكُم میخواهم"),
        ("很好吃。不好！", "很 好 吃 很好 好吃 不 好 不好 !"),
        ("iPhone很好 ラーメン ｶﾞ", "iphone 很 好 很好 ラ ー メ ン ラー ーメ メン ガ"),
        ("ไทย ລາວ", "ไ ท ย ไท ทย ລ າ ວ ລາ າວ"),
        ("한국어 좋아요", "한국어 좋아요"),
        ("good😀👍🏽 👨\u200d👩 ❤\ufe0f €5", "good 😀 👍 🏽 👨 👩 ❤ € 5"),
        ("“curly” — dash… ½ ﬁne ＦＵＬＬ", "curly dash . . . 1 ⁄ 2 fine full"),
        ("a\nb\u00a0c\u200bd\u2028e\x00f\ufeffg", "a b c d e fg"),
        ("", ""),
    ],
)
def test_the_cleaning_for_any_script(text, wanted):
    assert cleaned(text) == wanted.split()


book_text = st.text(alphabet="abz .,!?", max_size=40).map(clean_as_book)


@given(book_text)
def test_text_that_the_book_cleaned_stays_as_it_is(text):
    words = pa.array(text.split(" "), pa.large_string())
    assert clean_words(words, "unicode") is words
    assert clean_words(words, "book") is words
    assert clean_words(words, "none") is words


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126)))
def test_ascii_words_that_are_taken_for_clean_are(word):
    """The pattern that spares most words the cleaning agrees with the cleaning itself."""
    if re.search(tokens._CLEAN_WORD["unicode"], word):
        wrapped = clean_words(pa.array([word + "\u200d"], pa.large_string()), "unicode").to_pylist()
        assert wrapped == [word]


@given(st.text())
def test_tokens_hold_what_they_should(text):
    for token in cleaned(text):
        assert len(token) == 1 or not any(
            each in string.punctuation.translate({ord(c): None for c in "'.,:_"}) for each in token
        )
        for each in token:
            category = unicodedata.category(each)
            assert category[0] not in "ZC" or category == "Cn"
            assert category[0] != "P" or each in string.punctuation


@settings(max_examples=50)
@given(st.text(st.characters(exclude_categories=["Cn", "Cs", "Co"])))
def test_cleaning_twice_gives_the_same_tokens(text):
    once = cleaned(text)
    assert set(cleaned(" ".join(once))) == set(once)


@given(st.text(alphabet="aB! é好吃\n", max_size=30))
def test_cleaning_knows_no_context_beyond_a_space(text):
    """Words are cleaned once each, wherever they stand."""
    both = pa.array([text.replace(" ", ""), "x", text.replace(" ", "")], pa.large_string())
    found = clean_words(both, "unicode").to_pylist()
    assert found[0] == found[2]
    assert found[1] == "x"


@settings(max_examples=30)
@given(
    st.lists(st.text(alphabet="aB! 好吃x'\n", max_size=12), min_size=1, max_size=9),
    st.sampled_from(["book", "unicode"]),
)
def test_rows_are_encoded_as_their_cleaned_tokens(texts, clean):
    column = pa.chunked_array([pa.array(texts, pa.large_string())])
    rows = [[token for token in cleaned(text, clean) if token not in string.punctuation] for text in texts]
    with tokens.threads() as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "PIECE_BYTES", 9)
        built = tokens.build_and_encode(column, np.arange(len(texts)), 0, pool, clean)
        again = tokens.encode(column, np.arange(len(texts)), ["<UNK>", *built.kept], pool, clean)
    assert built.kept == list(dict.fromkeys(token for row in rows for token in row))
    wanted = [[built.kept.index(token) + 1 for token in dict.fromkeys(row)] for row in rows]
    assert rows_of(built.rows) == wanted
    assert rows_of(again) == wanted
    assert built.clean == clean
    assert built.clean_reason.startswith("asked for: ")


@pytest.mark.parametrize(
    ("texts", "clean", "reason"),
    [
        (["the food was great .", "so bad , really !"], "unicode", "it leaves the train reviews as they are"),
        (["the food was great"], "unicode", "it leaves the train reviews as they are"),
        (["The food was GREAT."], "unicode", "it changed 50% of the words"),
        (["the food was great!"], "unicode", "it changed 25% of the words"),
        (["it 's n't great ... but well-made ."], "none", "already in tokens: 100.0% of their . , ! ? stand apart"),
        (["它 很 好吃 。", "不 好吃 ！"], "none", "already in tokens"),
        (["它很好吃。"], "unicode", "it changed 100% of the words"),
        ([""], "unicode", "it leaves"),
    ],
)
def test_what_auto_chooses(texts, clean, reason):
    column = pa.chunked_array([pa.array(texts, pa.large_string())])
    with tokens.threads() as pool:
        built = tokens.build_and_encode(column, np.arange(len(texts)), 0, pool, "auto")
    assert built.clean == clean
    assert reason in built.clean_reason
