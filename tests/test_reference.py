"""The textbook loop, checked by hand and against direct formulas: everything else is checked against it."""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fasttrain import reference
from fasttrain.errors import DataError
from fasttrain.reference import (
    EpochFigures,
    TextbookClassifier,
    TextbookDataset,
    evaluate_epoch,
    textbook_loss,
    train_epoch,
    train_textbook,
)
from fasttrain.workloads.generate import generate_reviews


def make_table(rows: Sequence[tuple[object, object, str]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["rating", "review", "split"])


def zero_model(dataset: TextbookDataset) -> TextbookClassifier:
    model = TextbookClassifier(dataset.num_features, dataset.num_outputs)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


@pytest.fixture(scope="module")
def generated() -> TextbookDataset:
    return TextbookDataset.from_dataframe(generate_reviews(2_000).table)


@pytest.fixture
def four_ratings() -> TextbookDataset:
    """Four ratings, each with a word of its own, in every split."""
    words = {1: "awful", 2: "poor", 10: "fine", 20: "superb"}
    rows = [
        (rating, f"it was {words[rating]} .", split)
        for split in ("train", "val", "test")
        for rating in words
        for _ in range(8)
    ]
    return TextbookDataset.from_dataframe(make_table(rows), cutoff=0)


# The dataset


def test_vocabulary_by_hand() -> None:
    train = ["b a . a", "a ! b c  ?!", "c <UNK> <UNK> :;"]
    rows = [("pos", train[0], "train"), ("neg", train[1], "train"), ("neg", train[2], "train")]
    dataset = TextbookDataset(make_table([*rows, ("pos", "d d d d", "val")]), cutoff=1)
    # `?!` is no substring of string.punctuation and occurs once; `:;` and the empty token are substrings.
    assert dataset.vocabulary == {"<UNK>": 0, "b": 1, "a": 2, "c": 3}
    assert dataset.vectorize("c . zzz  c ?!").tolist() == [1, 0, 0, 1]
    assert dataset.vectorize("<UNK>").tolist() == [1, 0, 0, 0]
    assert dataset.vectorize("a b !").tolist() == [0, 1, 1, 0]
    assert dataset.vectorize("").tolist() == dataset.vectorize(" . ").tolist() == [0, 0, 0, 0]


@settings(deadline=None, max_examples=60)
@given(
    reviews=st.lists(st.text(alphabet="ab .!?<", max_size=30), min_size=2, max_size=8),
    cutoff=st.integers(0, 3),
)
def test_vocabulary_keeps_what_it_must(reviews: list[str], cutoff: int) -> None:
    vocabulary = reference.build_vocabulary(reviews, cutoff)
    tokens = [token for token in " ".join(reviews).split(" ") if token not in string.punctuation]
    kept = [token for token in dict.fromkeys(tokens) if tokens.count(token) > cutoff]
    assert list(vocabulary.items()) == [(token, idx) for idx, token in enumerate(["<UNK>", *kept])]


@pytest.mark.parametrize(
    ("ratings", "expected"),
    [
        (["10", "9", "9", "2"], ["2", "9", "10"]),
        (["1.5", "-1", "1"], ["-1", "1", "1.5"]),
        (["10", "9", "good"], ["10", "9", "good"]),
        (["positive", "negative"], ["negative", "positive"]),
    ],
)
def test_ratings_sort_as_numbers_where_all_are(ratings: list[str], expected: list[str]) -> None:
    assert reference.sort_ratings(ratings) == expected


def test_items_and_batches(four_ratings: TextbookDataset) -> None:
    four_ratings.set_split("train")
    assert (len(four_ratings), four_ratings.num_outputs, four_ratings.num_features) == (32, 4, 7)
    item = four_ratings[31]
    assert item["x_data"].dtype == np.float32
    assert item["y_target"] == 3
    batch = next(iter(four_ratings.batches(5, shuffle=False, drop_last=False)))
    assert (batch["x_data"].shape, batch["x_data"].dtype) == ((5, 7), torch.float32)
    assert (batch["y_target"].tolist(), batch["y_target"].dtype) == ([0] * 5, torch.int64)


def test_csv_keeps_text_that_looks_like_a_missing_value(tmp_path: Path) -> None:
    path = tmp_path / "reviews.csv.gz"
    rows = [("1", "null", "train"), ("2", "NA", "train"), ("1", "", "val"), ("2", "nan null", "test")]
    make_table(rows).to_csv(path, index=False)
    dataset = TextbookDataset.from_csv(path, cutoff=0)
    assert list(dataset.vocabulary) == ["<UNK>", "null", "NA"]
    dataset.set_split("val")
    assert dataset[0]["x_data"].sum() == 0


def test_missing_review_in_a_dataframe_is_empty() -> None:
    dataset = TextbookDataset.from_dataframe(make_table([(1, "a", "train"), (2, None, "train")]), cutoff=0)
    assert dataset.ratings == ["1", "2"]
    assert dataset[1]["x_data"].tolist() == [0, 0]


def test_rating_that_train_lacks() -> None:
    with pytest.raises(DataError, match="no review rated 3"):
        TextbookDataset.from_dataframe(make_table([(1, "a", "train"), (2, "b", "train"), (3, "c", "val")]))


def test_order_is_obeyed(four_ratings: TextbookDataset) -> None:
    four_ratings.set_split("train")
    order = [31, 0, 8, 16, 24, 7]
    batches = list(four_ratings.batches(4, shuffle=False, drop_last=True, order=order))
    assert [batch["y_target"].tolist() for batch in batches] == [[3, 0, 1, 2]]


def test_seed_fixes_the_shuffle(generated: TextbookDataset) -> None:
    generated.set_split("val")

    def first_batch(seed: int) -> torch.Tensor:
        return next(iter(generated.batches(64, shuffle=True, drop_last=True, seed=seed)))["x_data"]

    assert torch.equal(first_batch(1), first_batch(1))
    assert not torch.equal(first_batch(1), first_batch(2))


# One epoch


class Scripted(nn.Module):
    """Gives one trainable logit for each 0/1 input and the sign of it that the input says."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.0))

    def forward(self, x_in: torch.Tensor) -> torch.Tensor:
        return self.scale * 0 + x_in


def test_running_means_by_hand() -> None:
    # Loss of logit x and target 1 is log(1 + exp(-x)), of target 0 log(1 + exp(x)).
    batches = [
        (torch.tensor([2.0, -1.0]), torch.tensor([1, 1])),
        {"x_data": torch.tensor([0.5]), "y_target": torch.tensor([0])},
        (torch.tensor([3.0, 0.0]), torch.tensor([1, 0])),
    ]
    losses = [
        (math.log1p(math.exp(-2)) + math.log1p(math.exp(1))) / 2,
        math.log1p(math.exp(0.5)),
        (math.log1p(math.exp(-3)) + math.log1p(1)) / 2,
    ]
    accuracies = [50.0, 0.0, 100.0]
    model = Scripted()
    seen: list[tuple[float, float]] = []
    figures = train_epoch(
        model,
        batches,
        textbook_loss(1),
        torch.optim.SGD(model.parameters(), lr=0.1),
        on_batch=lambda loss, accuracy: seen.append((loss, accuracy)),
    )
    for num, (loss, accuracy) in enumerate(seen, start=1):
        assert loss == pytest.approx(sum(losses[:num]) / num, rel=1e-6)
        assert accuracy == pytest.approx(sum(accuracies[:num]) / num)
    assert figures == EpochFigures(loss=seen[-1][0], accuracy=seen[-1][1], batches=3, samples=5)

    weighted = evaluate_epoch(model, batches, textbook_loss(1))
    assert weighted.loss == pytest.approx((2 * losses[0] + losses[1] + 2 * losses[2]) / 5, rel=1e-6)
    assert weighted.accuracy == pytest.approx(100 * 3 / 5)
    assert (weighted.batches, weighted.samples) == (3, 5)


def test_one_step_is_the_gradient_step_by_hand() -> None:
    model = TextbookClassifier(2, 1)
    with torch.no_grad():
        model.fc1.weight.copy_(torch.tensor([[0.5, -0.25]]))
        model.fc1.bias.fill_(0.1)
    x, y = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([1, 0])
    error = torch.sigmoid(x @ torch.tensor([0.5, -0.25]) + 0.1) - y
    expected = torch.tensor([0.5, -0.25]) - 0.3 * (error @ x) / 2
    train_epoch(model, [(x, y)], textbook_loss(1), torch.optim.SGD(model.parameters(), lr=0.3))
    torch.testing.assert_close(model.fc1.weight[0].detach(), expected)
    torch.testing.assert_close(model.fc1.bias.detach(), 0.1 - 0.3 * error.mean(dim=0, keepdim=True))


def test_gradients_do_not_pile_up() -> None:
    """Two equal SGD steps on a linear loss move a weight by the same amount."""
    model = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(model.weight)
    batch = (torch.ones(4, 1), torch.tensor([0, 0, 0, 0]))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    train_epoch(model, [batch, batch], nn.CrossEntropyLoss(), optimizer)
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[1e-4], [-1e-4]]), rtol=1e-3, atol=0)


def test_accuracy_of_classes_is_argmax_over_dimension_1() -> None:
    y_pred = torch.tensor([[[0.0, 9.0], [1.0, 0.0], [0.0, 0.0]]])  # [1 sample, 3 classes, 2 places]
    assert reference.compute_accuracy(y_pred, torch.tensor([[1, 0]])) == 100
    assert reference.compute_accuracy(y_pred, torch.tensor([[1, 2]])) == 50


def test_the_tail_is_counted_in_evaluation_and_dropped_in_training(generated: TextbookDataset) -> None:
    model = zero_model(generated)
    generated.set_split("val")
    assert len(generated) == 300
    tail = evaluate_epoch(model, generated.batches(128, shuffle=False, drop_last=False), textbook_loss(1))
    whole = evaluate_epoch(model, generated.batches(300, shuffle=False, drop_last=False), textbook_loss(1))
    assert (tail.batches, tail.samples, whole.batches) == (3, 300, 1)
    assert tail.loss == pytest.approx(whole.loss, rel=1e-6)
    assert tail.accuracy == pytest.approx(whole.accuracy)
    optimizer = torch.optim.Adam(model.parameters())
    train = train_epoch(model, generated.batches(128, shuffle=True, drop_last=True), textbook_loss(1), optimizer)
    assert (train.batches, train.samples) == (2, 256)


def test_modes_and_gradients() -> None:
    modes: list[tuple[bool, bool]] = []

    class Watching(Scripted):
        def forward(self, x_in: torch.Tensor) -> torch.Tensor:
            modes.append((self.training, torch.is_grad_enabled()))
            return super().forward(x_in)

    model = Watching()
    batch = (torch.tensor([1.0]), torch.tensor([1]))
    evaluate_epoch(model, [batch], textbook_loss(1))
    train_epoch(model, [batch], textbook_loss(1), torch.optim.SGD(model.parameters(), lr=0.1))
    assert modes == [(False, False), (True, True)]


def test_no_batch_is_an_error() -> None:
    model = Scripted()
    with pytest.raises(DataError, match="larger than the train split"):
        train_epoch(model, [], textbook_loss(1), torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(DataError, match="does the split have rows"):
        evaluate_epoch(model, [], textbook_loss(1))


# The experiment


def test_it_learns(generated: TextbookDataset) -> None:
    result = train_textbook(generated, zero_model(generated), epochs=5, learning_rate=0.03)
    assert result.test_accuracy > 80
    losses = [row["loss"] for row in result.history if row["split"] == "train"]
    assert losses[-1] < 0.7 * losses[0]
    assert set(result.history[0]) == {"epoch", "split", "loss", "accuracy", "lr", "samples"}
    assert [(row["epoch"], row["split"], row["samples"]) for row in result.history[:2]] == [
        (1, "train", 1280),
        (1, "val", 300),
    ]


def test_four_ratings_are_learnt(four_ratings: TextbookDataset) -> None:
    assert four_ratings.ratings == ["1", "2", "10", "20"]
    result = train_textbook(four_ratings, zero_model(four_ratings), epochs=20, batch_size=8, learning_rate=0.05)
    assert result.history[0]["loss"] == pytest.approx(math.log(4), rel=0.1)
    assert result.test_accuracy == 100


def script_val_losses(monkeypatch: pytest.MonkeyPatch, val_losses: Sequence[float]) -> None:
    """Makes training add 1 to the bias and evaluation return the scripted losses, then the bias."""
    script = iter(val_losses)

    def train(model: TextbookClassifier, *_: object) -> EpochFigures:
        with torch.no_grad():
            model.fc1.bias.add_(1)
        return EpochFigures(loss=1.0, accuracy=50.0, batches=1, samples=1)

    def evaluate(model: TextbookClassifier, *_: object) -> EpochFigures:
        loss = next(script, model.fc1.bias.item())
        return EpochFigures(loss=loss, accuracy=50.0, batches=1, samples=1)

    monkeypatch.setattr(reference, "train_epoch", train)
    monkeypatch.setattr(reference, "evaluate_epoch", evaluate)


def test_early_stopping_keeps_the_best_weights(monkeypatch: pytest.MonkeyPatch, four_ratings: TextbookDataset) -> None:
    # Epoch 2 is the best; 3 ... 7 are not: equal is not better. Epoch 8 must not be reached.
    script_val_losses(monkeypatch, [3.0, 2.0, 2.0, 2.5, 2.1, 2.2, 2.3])
    model = TextbookClassifier(four_ratings.num_features, 1)
    nn.init.zeros_(model.fc1.bias)
    result = train_textbook(four_ratings, model, epochs=100)
    assert result.best_epoch == 2
    assert result.test_loss == model.fc1.bias.item() == 2
    assert result.history[-1]["epoch"] == 7
    # The plateau scheduler waits one bad epoch, halves after the second, and starts to count again.
    rates = [row["lr"] for row in result.history if row["split"] == "val"]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4])


def test_val_losses_that_are_no_numbers_leave_the_initial_weights(
    monkeypatch: pytest.MonkeyPatch, four_ratings: TextbookDataset
) -> None:
    script_val_losses(monkeypatch, [math.nan] * 2)
    model = TextbookClassifier(four_ratings.num_features, 1)
    nn.init.zeros_(model.fc1.bias)
    result = train_textbook(four_ratings, model, epochs=2)
    assert (result.best_epoch, result.test_loss) == (0, 0.0)


def test_batch_larger_than_the_train_split(four_ratings: TextbookDataset) -> None:
    with pytest.raises(DataError, match="larger than the train split"):
        train_textbook(four_ratings, zero_model(four_ratings), batch_size=33)


def test_golden_losses(generated: TextbookDataset) -> None:
    # Zero weights and a written order: no random numbers but those in the reviews.
    orders = [[(17 * i + epoch) % 1_400 for i in range(1_400)] for epoch in range(3)]
    result = train_textbook(generated, zero_model(generated), epochs=3, learning_rate=0.01, order=orders)
    losses = [row["loss"] for row in result.history]
    train, val = losses[0::2], losses[1::2]
    assert train == pytest.approx([0.6476170, 0.4986570, 0.3961428], abs=1e-6)
    assert val == pytest.approx([0.5523130, 0.4519123, 0.3886758], abs=1e-6)
    assert result.test_loss == pytest.approx(0.3643840, abs=1e-6)
    assert result.test_accuracy == pytest.approx(100 * 284 / 300)


def test_seed_and_epoch_fix_the_order(monkeypatch: pytest.MonkeyPatch, four_ratings: TextbookDataset) -> None:
    script_val_losses(monkeypatch, [])
    orders: list[list[int]] = []

    def record(_: object, loader: Iterable[dict[str, torch.Tensor]], *__: object) -> EpochFigures:
        orders.append(torch.cat([batch["y_target"] for batch in loader]).tolist())
        return EpochFigures(loss=1.0, accuracy=50.0, batches=1, samples=1)

    monkeypatch.setattr(reference, "train_epoch", record)
    for seed in (1, 1, 2):
        train_textbook(
            four_ratings, TextbookClassifier(four_ratings.num_features, 1), epochs=2, batch_size=8, seed=seed
        )
    assert orders[:2] == orders[2:4]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


def test_real_vocabulary(data_dir: Path) -> None:
    dataset = TextbookDataset.from_csv(data_dir / "reviews_lite.csv.gz")
    assert dataset.num_features == 5_317
    assert dataset.ratings == ["negative", "positive"]
    assert len(dataset) == 39_200
