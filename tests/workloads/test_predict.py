"""Ratings of new text: against the arithmetic done by hand on a run with known weights."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from fasttrain.cli import main
from fasttrain.data.cache import load_reviews
from fasttrain.data.text import ReviewVectorizer, Vocabulary
from fasttrain.data.tokens import CleanOrAuto
from fasttrain.errors import DataError, RunError
from fasttrain.run.config import TrainConfig
from fasttrain.run.folder import RunFolder
from fasttrain.workloads.predict import note_on_cleaning, predict
from fasttrain.workloads.reviews import train_reviews

WORDS = {"<UNK>": 0, "good": 1, "bad": 2, "food": 3}


def run_of(path: Path, ratings: list[str], weight: list[list[float]], bias: list[float]) -> Path:
    folder = RunFolder.create(path, "reviews")
    folder.write_config({})
    vectorizer = ReviewVectorizer(
        Vocabulary(token_to_idx=WORDS, add_unk=True),
        Vocabulary(token_to_idx={rating: index for index, rating in enumerate(ratings)}, add_unk=False),
    )
    folder.write_vectorizer(vectorizer.to_json())
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
    original = (binary / "model.safetensors").read_bytes()
    shutil.copy(graded / "model.safetensors", binary / "model.safetensors")
    with pytest.raises(RunError, match=r"model\.safetensors is damaged or was changed"):
        predict(binary, ["good"])
    (binary / "model.safetensors").write_bytes(original)
    shutil.copy(graded / "vectorizer.json", binary / "vectorizer.json")
    with pytest.raises(RunError, match=r"vectorizer\.json is damaged or was changed"):
        predict(binary, ["good"])


def test_a_damaged_file_of_a_run_without_a_manifest_is_named(binary: Path, graded: Path) -> None:
    (binary / "manifest.json").unlink()
    notes: list[str] = []
    predict(binary, ["good"], tell=notes.append)
    assert notes == [f"{binary} has no manifest.json: damaged files cannot be recognized."]
    shutil.copy(graded / "model.safetensors", binary / "model.safetensors")
    with pytest.raises(RunError, match=r"model\.safetensors does not fit vectorizer\.json"):
        predict(binary, ["good"])
    (binary / "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(RunError, match=r"model\.safetensors cannot be read"):
        predict(binary, ["good"])
    for damaged in (json.dumps({"review_vocab": {}}), "[" * 100_000):
        (binary / "vectorizer.json").write_text(damaged)
        with pytest.raises(DataError, match=r"vectorizer\.json"):
            predict(binary, ["good"])


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_model_whose_training_diverged_rates_nothing(weight: float, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", ["negative", "positive"], [[0.1, 2.0, weight, 0.5]], [0.25])
    with pytest.raises(RunError, match="weights that are not finite numbers"):
        predict(run, ["good"])


def test_text_that_no_file_could_hold_is_refused(binary: Path) -> None:
    with pytest.raises(DataError, match="UTF-8"):
        predict(binary, ["good \ud800 food"], clean="none")


# --- the very texts of a run's test ---

SCRIPTS = {
    "Latin": "GREAT Amazing | AWFUL Rude | The food It's café, 4.5 so-so 'n' I don’t",
    "German": "großartig KÖSTLICH | grässlich ÜBEL! | Das Essen war, straße Über",
    "Chinese": "这家店很好吃。 真的很棒！ | 难吃， 太慢了 | 我点的菜 服务员 iPhone手机 2杯",
    "Greek": "ΥΠΈΡΟΧΟ τέλειος | ΆΘΛΙΟ χάλιας | Το φαγητό Σίσυφος; ήταν «εδώ»",
    "Russian": "ОТЛИЧНО вкусно! | УЖАС грубо… | Еда была — здесь Ёлка №5",
    "Arabic": "رائع، لَذِيذ | سيئ؟ بطيء | الطعام كان هنا ٢٠٢٤ می‌خواهم",
    "Hindi": "बढ़िया स्वादिष्ट। | ख़राब धीमा | खाना यहाँ था १२३",
    "Thai": "อร่อยมาก ดีเยี่ยม | แย่มาก ช้า | อาหาร ที่นี่ ประเทศไทย",
    "Japanese": "とても美味しい。 ラーメン最高！ | まずい、 ひどい | 店の ﾊﾟﾝ 料理は",
    "emoji": "😀👍🏽 ❤️!! | 👎 😡😡 | the food 👨‍👩‍👧 5/5 @home #1 it's\nwas\tthere",
}


def table_of(path: Path, words: str) -> pd.DataFrame:
    """Reviews in which one word tells the rating."""
    good, bad, rest = (part.split(" ") for part in words.split(" | "))
    draw = random.Random(0)
    rows = []
    for number in range(300):
        is_good = draw.random() < 0.5
        review = [*draw.choices(rest, k=5), draw.choice(good if is_good else bad)]
        draw.shuffle(review)
        split = "train" if number % 10 < 6 else "val" if number % 10 < 7 else "test"
        rows.append(("+" if is_good else "-", " ".join(review), split))
    table = pd.DataFrame(rows, columns=["rating", "review", "split"])
    table.to_csv(path, index=False)
    return table


@pytest.mark.parametrize(
    ("script", "clean"),
    [
        *((script, "auto") for script in SCRIPTS),
        *((script, clean) for script in SCRIPTS for clean in ("none", "book", "unicode")),
    ],
)
def test_predictions_of_the_test_texts_are_those_of_the_test(script: str, clean: CleanOrAuto, tmp_path: Path) -> None:
    table = table_of(tmp_path / "table.csv", SCRIPTS[script])
    config = TrainConfig(
        data=tmp_path / "table.csv",
        out=tmp_path / "run",
        clean=clean,
        device="cpu",
        engine="eager",
        epochs=8,
        cutoff=2,
        batch_size=32,
        learning_rate=0.1,
        cache=False,
    )
    summary = train_reviews(config, progress=False).summary
    test = table[table["split"] == "test"]
    predictions = predict(tmp_path / "run", test["review"].tolist())
    are_right = [each.rating == rating for each, rating in zip(predictions, test["rating"], strict=True)]
    assert 100 * sum(are_right) / len(are_right) == pytest.approx(summary["test_accuracy"], abs=1e-4)
    losses = [
        -math.log(each.probability if is_right else 1 - each.probability)
        for each, is_right in zip(predictions, are_right, strict=True)
    ]
    assert sum(losses) / len(losses) == pytest.approx(summary["test_loss"], rel=1e-4)
    if clean in ("auto", "unicode"):
        assert summary["clean"] == "unicode"
        assert summary["test_accuracy"] == 100
        assert all(each.known_words for each in predictions)


def ratings_in_the_test(run: Path, table: Path, clean: CleanOrAuto) -> tuple[list[str], list[str]]:
    """Each test review's rating in the table, and the one that the run's weights give to it as the test encodes it."""
    encoded = load_reviews(table, cutoff=2, clean=clean, cache_dir=None)
    ratings = sorted(encoded.vectorizer.rating_vocab.token_to_idx, key=encoded.vectorizer.rating_vocab.token_to_idx.get)
    test = encoded.splits["test"]
    weights = load_file(run / "model.safetensors")
    weight, bias = weights["fc1.weight"][0].double(), weights["fc1.bias"].double().item()
    rows = zip(test.tokens.offsets, test.tokens.offsets[1:], strict=False)
    logits = [bias + weight[test.tokens.ids[start:stop].tolist()].sum().item() for start, stop in rows]
    return [ratings[label] for label in test.labels], [ratings[logit > 0] for logit in logits]


@pytest.mark.parametrize("clean", ["none", "book", "unicode"])
def test_the_command_predicts_what_its_test_has_counted_in_five_scripts(
    clean: CleanOrAuto, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run = tmp_path / "table.csv", tmp_path / "run"
    scripts = ("German", "Chinese", "Russian", "Arabic", "Hindi")
    table = pd.concat([table_of(path, SCRIPTS[script]) for script in scripts])
    table.to_csv(path, index=False)
    options = ["--device", "cpu", "--engine", "eager", "--epochs", "4", "--cutoff", "2", "--batch-size", "32"]
    options += ["--learning-rate", "0.1", "--clean", clean, "--json"]
    assert main(["train", "--data", str(path), "--out", str(run), *options]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert main(["predict", str(run), *table["review"][table["split"] == "test"], "--json"]) == 0
    predicted = [each["rating"] for each in json.loads(capsys.readouterr().out)]
    wanted, counted = ratings_in_the_test(run, path, clean)
    assert predicted == counted
    are_right = [rating == right for rating, right in zip(predicted, wanted, strict=True)]
    assert 100 * sum(are_right) / len(are_right) == pytest.approx(summary["test_accuracy"], abs=1e-4)
    assert (summary["test_accuracy"] == 100) == (clean != "book")  # the book keeps only a to z of words
    assert set(predicted) == {"+", "-"}


def test_a_run_on_text_in_tokens_says_what_cleaning_would_find(binary: Path) -> None:
    (binary / "manifest.json").unlink()
    vectorizer = json.loads((binary / "vectorizer.json").read_text())
    texts = ["GOOD food!", "good food", "neither"]
    assert note_on_cleaning(binary, texts) is None
    (binary / "vectorizer.json").write_text(json.dumps({**vectorizer, "clean": "none"}))
    assert predict(binary, ["GOOD food!"])[0].known_words == []
    note = note_on_cleaning(binary, texts)
    assert note is not None
    assert "1 of 3 texts" in note
    assert "--clean unicode" in note
    assert note_on_cleaning(binary, texts[1:]) is None
    assert note_on_cleaning(binary, []) is None
    assert predict(binary, ["GOOD food!"], clean="unicode")[0].known_words == ["good", "food"]
