"""The token engine below the vectoriser: pieces, id widths, order."""

import numpy as np
import pyarrow as pa
import pytest

from fasttrain.data import tokens


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
