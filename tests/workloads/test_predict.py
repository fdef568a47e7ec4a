"""Ratings of new text: against the arithmetic done by hand on a run with known weights."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from fasttrain.data.text import ReviewVectorizer, Vocabulary
from fasttrain.errors import DataError, RunError
from fasttrain.run.folder import RunFolder
from fasttrain.workloads.predict import predict

WORDS = {"<UNK>": 0, "good": 1, "bad": 2, "food": 3}


def run_of(path: Path, ratings: list[str], weight: list[list[float]], bias: list[float]) -> Path:
    folder = RunFolder.create(path, "reviews")
    folder.write_json("config.json", {})
    vectorizer = ReviewVectorizer(
        Vocabulary(token_to_idx=WORDS, add_unk=True),
        Vocabulary(token_to_idx={rating: index for index, rating in enumerate(ratings)}, add_unk=False),
    )
    vectorizer.save(folder.path / "vectorizer.json")
    folder.write_model({"fc1.weight": torch.tensor(weight), "fc1.bias": torch.tensor(bias)})
    return folder.path


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    return run_of(tmp_path / "binary", ["negative", "positive"], [[0.1, 2.0, -3.0, 0.5]], [0.25])


@pytest.fixture
def graded(tmp_path: Path) -> Path:
    weight = [[0.0, -1.0, 2.0, 0.0], [0.0, 0.5, 0.5, 1.0], [0.0, 3.0, -2.0, 0.0]]
    return run_of(tmp_path / "graded", ["1", "2", "3"], weight, [0.0, 0.5, 0.0])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("text", "rating", "logit", "known_words"),
    [
        ("good food", "positive", 2.0 + 0.5 + 0.25, ["good", "food"]),
        ("good good good", "positive", 2.0 + 0.25, ["good"]),  # a word counts once, however often it occurs
        ("bad", "negative", -3.0 + 0.25, ["bad"]),
        ("bad service", "negative", -3.0 + 0.1 + 0.25, ["bad"]),
        ("", "positive", 0.25, []),
    ],
)
def test_two_ratings_share_one_logit(
    binary: Path, text: str, rating: str, logit: float, known_words: list[str]
) -> None:
    [found] = predict(binary, [text], clean="none")
    assert (found.text, found.rating, found.known_words) == (text, rating, known_words)
    assert found.probability == pytest.approx(sigmoid(abs(logit)), rel=1e-6)


def test_more_ratings_have_a_logit_each(graded: Path) -> None:
    food, good = predict(graded, ["food", "good"], clean="none")
    assert (food.rating, good.rating) == ("2", "3")
    assert food.probability == pytest.approx(math.exp(1.5) / (1 + math.exp(1.5) + 1), rel=1e-6)
    assert good.probability == pytest.approx(math.exp(3) / (math.exp(-1) + math.exp(1) + math.exp(3)), rel=1e-6)


def test_new_text_is_cleaned_as_the_book_does(binary: Path) -> None:
    cleaned, raw = predict(binary, ["GOOD, food!"])[0], predict(binary, ["GOOD, food!"], clean="none")[0]
    assert cleaned.text == "GOOD, food!"
    assert cleaned.known_words == ["good", "food"]
    assert raw.known_words == []


def test_text_in_tokens_is_taken_as_it_is(binary: Path) -> None:
    tokens = "good_food good"
    assert predict(binary, [tokens], clean="none")[0].known_words == ["good"]
    assert predict(binary, [tokens])[0].known_words == ["good", "food"]


def test_each_text_is_rated_by_itself(graded: Path) -> None:
    texts = ["good food", "", "bad", "what is this?"]
    assert predict(graded, texts) == [predict(graded, [text])[0] for text in texts]
    assert predict(graded, []) == []


def test_a_single_text_of_one_rating_is_not_squeezed_away(binary: Path) -> None:
    assert len(predict(binary, ["good"])) == 1


def test_a_missing_or_damaged_file_is_named(binary: Path, graded: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nowhere is not a folder"):
        predict(tmp_path / "nowhere", ["good"])
    shutil.copy(graded / "model.safetensors", binary / "model.safetensors")
    with pytest.raises(RunError, match=r"model\.safetensors does not fit vectorizer\.json"):
        predict(binary, ["good"])
    (binary / "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(RunError, match=r"model\.safetensors cannot be read"):
        predict(binary, ["good"])
    (binary / "vectorizer.json").write_text(json.dumps({"review_vocab": {}}))
    with pytest.raises(DataError, match=r"vectorizer\.json"):
        predict(binary, ["good"])


def test_text_that_no_file_could_hold_is_refused(binary: Path) -> None:
    with pytest.raises(DataError, match="UTF-8"):
        predict(binary, ["good \ud800 food"], clean="none")
