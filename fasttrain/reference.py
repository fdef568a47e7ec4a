"""The textbook's training loop over the textbook's dataset: the oracle of the tests, the yardstick of ratios.

The experiment is that of "Natural Language Processing with PyTorch" (Rao and McMahan, chapter 3): rate a
review with one linear layer over its collapsed one-hot vector. It is written to be right and to be read from
top to bottom, not to be fast, and it shares nothing with the fast path but the data file and the initial
weights.

It departs from the book in two places. Evaluation keeps the last short batch and weights each batch by its
samples, so that every sample counts once, where the book drops the tail. And more than two ratings are
allowed, with one output each and cross-entropy, where the book knows two.
"""

from __future__ import annotations

import copy
import math
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset

from fasttrain.errors import DataError

__all__ = [
    "EpochFigures",
    "TextbookClassifier",
    "TextbookDataset",
    "TextbookResult",
    "evaluate_epoch",
    "textbook_loss",
    "train_epoch",
    "train_textbook",
]


def build_vocabulary(reviews: Iterable[str], cutoff: int) -> dict[str, int]:
    """Numbers the tokens seen more than `cutoff` times, in order of first appearance, after `<UNK>` at 0."""
    counts: Counter[str] = Counter()
    for review in reviews:
        counts.update(token for token in review.split(" ") if token not in string.punctuation)
    vocabulary = {"<UNK>": 0}
    for token, count in counts.items():
        if count > cutoff:
            vocabulary.setdefault(token, len(vocabulary))
    return vocabulary


def sort_ratings(ratings: Iterable[str]) -> list[str]:
    """Returns the distinct ratings in order: as numbers where all are numbers, else as text."""
    distinct = sorted(set(ratings))
    try:
        return sorted(distinct, key=float)
    except ValueError:
        return distinct


class TextbookDataset(Dataset[dict[str, Any]]):
    """A table of reviews that makes a collapsed one-hot vector of one row at a time, when it is asked for it.

    An item is `{"x_data": float32 [num_features], "y_target": int}`, so a batch holds float32 `[batch,
    num_features]` and int64 `[batch]`. `len`, items and batches are of one split, "train" at first.

    Args:
        table: strings in the columns `rating`, `review` and `split` (train, val or test).
        cutoff: a token of the train split is kept if it occurs more often than this.

    Raises:
        DataError: val or test has a rating that train lacks.
    """

    def __init__(self, table: pd.DataFrame, *, cutoff: int = 25) -> None:
        self._tables = {split: table[table["split"] == split] for split in ("train", "val", "test")}
        self.set_split("train")
        self.vocabulary = build_vocabulary(self._rows["review"], cutoff)
        self.ratings = sort_ratings(self._rows["rating"])
        self._rating_to_idx = {rating: idx for idx, rating in enumerate(self.ratings)}
        unseen = sorted(set(table["rating"]) - set(self.ratings))
        if unseen:
            raise DataError(f"the train split has no review rated {', '.join(unseen)}", column="rating")

    @classmethod
    def from_csv(cls, path: str | Path, *, cutoff: int = 25) -> TextbookDataset:
        """Reads a `.csv` or `.csv.gz`. Every field is text: a review that reads "null" is a review."""
        return cls(pd.read_csv(path, dtype=str, keep_default_na=False), cutoff=cutoff)

    @classmethod
    def from_dataframe(cls, table: pd.DataFrame, *, cutoff: int = 25) -> TextbookDataset:
        """Takes a table in memory; ratings may be numbers, and a missing review is an empty one."""
        texts = table.assign(rating=table["rating"].astype(str), review=table["review"].fillna(""))
        return cls(texts, cutoff=cutoff)

    @property
    def num_features(self) -> int:
        """Length of a review's vector: the size of the vocabulary, `<UNK>` included."""
        return len(self.vocabulary)

    @property
    def num_outputs(self) -> int:
        """One for two ratings, else one for each rating."""
        return 1 if len(self.ratings) == 2 else len(self.ratings)

    def set_split(self, split: str) -> None:
        """Selects train, val or test; any other name is a KeyError."""
        self._rows = self._tables[split]

    def vectorize(self, review: str) -> np.ndarray:
        """Returns float32 `[num_features]`: 1 where a token occurs, index 0 for any unknown one."""
        one_hot = np.zeros(len(self.vocabulary), dtype=np.float32)
        for token in review.split(" "):
            if token not in string.punctuation:
                one_hot[self.vocabulary.get(token, 0)] = 1
        return one_hot

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows.iloc[index]
        return {"x_data": self.vectorize(row["review"]), "y_target": self._rating_to_idx[row["rating"]]}

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool,
        drop_last: bool,
        seed: int = 1337,
        order: Iterable[int] | None = None,
    ) -> DataLoader[dict[str, Any]]:
        """Returns a loader over the selected split, to be read before another split is selected.

        With `shuffle`, `seed` fixes the order. `order` gives it instead, as row numbers within the split.
        """
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(self, batch_size, shuffle, sampler=order, drop_last=drop_last, generator=generator)


class TextbookClassifier(nn.Module):
    """One linear layer, `fc1`, from float `[batch, num_features]` to logits.

    The logits are `[batch]` for one output, else `[batch, num_outputs]`.
    """

    def __init__(self, num_features: int, num_outputs: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(num_features, num_outputs)

    def forward(self, x_in: torch.Tensor) -> torch.Tensor:
        """Returns the logits of `x_in`."""
        logits = self.fc1(x_in)
        return logits.squeeze(-1) if self.fc1.out_features == 1 else logits


def textbook_loss(num_outputs: int) -> nn.Module:
    """Returns the loss that goes with the classifier: BCE with logits for one output, else cross-entropy."""
    return nn.BCEWithLogitsLoss() if num_outputs == 1 else nn.CrossEntropyLoss()


@dataclass(frozen=True, kw_only=True)
class EpochFigures:
    """What one pass over a loader gave; accuracy in percent."""

    loss: float
    accuracy: float
    batches: int
    samples: int


def unpack_batch(batch: Any, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies inputs and targets to the device, from a dict of `x_data` and `y_target` or from a pair."""
    x, y = (batch["x_data"], batch["y_target"]) if isinstance(batch, dict) else batch
    return x.to(device), y.to(device)


def compute_loss(loss_func: nn.Module, y_pred: torch.Tensor, y_target: torch.Tensor) -> torch.Tensor:
    """Returns the loss; targets of the predictions' own shape are 0 and 1, which BCE wants as floats."""
    return loss_func(y_pred, y_target.float() if y_pred.shape == y_target.shape else y_target)


def compute_accuracy(y_pred: torch.Tensor, y_target: torch.Tensor) -> float:
    """Returns percent correct: of two classes, a logit above 0 means 1; of more (dimension 1), argmax."""
    y_hat = y_pred > 0 if y_pred.shape == y_target.shape else y_pred.argmax(dim=1)
    return 100 * (y_hat == y_target).sum().item() / y_target.numel()  # HOST READ: every batch, as in the book


def train_epoch(
    model: nn.Module,
    loader: Iterable[Any],
    loss_func: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device | str = "cpu",
    on_batch: Callable[[float, float], None] | None = None,
) -> EpochFigures:
    """Trains one epoch, in train mode; loss and accuracy are running means of the batches' values.

    The loader yields dicts of `x_data` and `y_target`, or pairs of inputs and targets. The model's logits are
    `[batch]` for two classes, else `[batch, classes, ...]`. After every batch, `on_batch` is called with the
    running loss and accuracy.

    Raises:
        DataError: the loader gave no batch.
    """
    model.train()
    running_loss = running_accuracy = 0.0
    num_batches = num_samples = 0
    for i, batch in enumerate(loader):
        x, y = unpack_batch(batch, device)
        optimizer.zero_grad()
        y_pred = model(x)
        loss = compute_loss(loss_func, y_pred, y)
        running_loss += (loss.item() - running_loss) / (i + 1)  # HOST READ: every batch, as in the book
        loss.backward()
        optimizer.step()
        running_accuracy += (compute_accuracy(y_pred, y) - running_accuracy) / (i + 1)
        num_batches, num_samples = i + 1, num_samples + len(y)
        if on_batch is not None:
            on_batch(running_loss, running_accuracy)
    if num_batches == 0:
        raise DataError("the loader gave no batch to train on; is the batch larger than the train split?")
    return EpochFigures(loss=running_loss, accuracy=running_accuracy, batches=num_batches, samples=num_samples)


@torch.no_grad()
def evaluate_epoch(
    model: nn.Module, loader: Iterable[Any], loss_func: nn.Module, device: torch.device | str = "cpu"
) -> EpochFigures:
    """Evaluates one pass of a loader as `train_epoch` takes it, in eval mode, batches weighted by samples.

    Raises:
        DataError: the loader gave no batch.
    """
    model.eval()
    loss_sum = accuracy_sum = 0.0
    num_batches = num_samples = 0
    for batch in loader:
        x, y = unpack_batch(batch, device)
        y_pred = model(x)
        loss_sum += compute_loss(loss_func, y_pred, y).item() * len(y)  # HOST READ: every batch
        accuracy_sum += compute_accuracy(y_pred, y) * len(y)
        num_batches, num_samples = num_batches + 1, num_samples + len(y)
    if num_batches == 0:
        raise DataError("the loader gave no batch to evaluate; does the split have rows?")
    loss, accuracy = loss_sum / num_samples, accuracy_sum / num_samples
    return EpochFigures(loss=loss, accuracy=accuracy, batches=num_batches, samples=num_samples)


@dataclass(frozen=True, kw_only=True)
class TextbookResult:
    """What a whole training gave; accuracy in percent.

    `history` has two rows an epoch, train and val: epoch (from 1), split, loss, accuracy, lr, samples.
    `best_epoch` is the one whose weights are kept; 0 means the initial weights: no val loss was a number.
    """

    history: list[dict[str, Any]]
    best_epoch: int
    test_loss: float
    test_accuracy: float


def train_textbook(
    dataset: TextbookDataset,
    model: nn.Module,
    *,
    epochs: int = 100,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    patience: int = 5,
    seed: int = 1337,
    order: Sequence[Sequence[int]] | None = None,
) -> TextbookResult:
    """Trains the model from the weights it has, on the device it is on, and leaves it with the best ones.

    Adam; the learning rate is halved on a plateau of the val loss; `patience` epochs without a new best val
    loss end the training. `seed` and the epoch's number fix the order of the rows, or `order` gives the train
    rows of each epoch.

    Raises:
        DataError: a split has no rows, or the train split has fewer than a batch.
    """
    device = next(model.parameters()).device
    loss_func = textbook_loss(dataset.num_outputs)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    scheduler = ReduceLROnPlateau(optimizer, mode="min", factor=0.5, patience=1)

    def evaluate(split: str) -> EpochFigures:
        dataset.set_split(split)
        loader = dataset.batches(batch_size, shuffle=False, drop_last=False)
        return evaluate_epoch(model, loader, loss_func, device)

    history: list[dict[str, Any]] = []
    best_epoch, best_loss, best_weights = 0, math.inf, copy.deepcopy(model.state_dict())
    for epoch in range(1, epochs + 1):
        lr = optimizer.param_groups[0]["lr"]
        dataset.set_split("train")
        if order is None:  # seeds a thousand apart: two runs of neighbouring seeds share no epoch's order
            loader = dataset.batches(batch_size, shuffle=True, drop_last=True, seed=1000 * seed + epoch)
        else:
            loader = dataset.batches(batch_size, shuffle=False, drop_last=True, order=order[epoch - 1])
        train = train_epoch(model, loader, loss_func, optimizer, device)
        val = evaluate("val")
        for split, got in (("train", train), ("val", val)):
            figures = {"loss": got.loss, "accuracy": got.accuracy, "lr": lr, "samples": got.samples}
            history.append({"epoch": epoch, "split": split, **figures})
        if val.loss < best_loss:
            best_epoch, best_loss, best_weights = epoch, val.loss, copy.deepcopy(model.state_dict())
        if epoch - best_epoch >= patience:
            break
        scheduler.step(val.loss)
    model.load_state_dict(best_weights)
    test = evaluate("test")
    return TextbookResult(history=history, best_epoch=best_epoch, test_loss=test.loss, test_accuracy=test.accuracy)
