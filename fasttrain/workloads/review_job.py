"""The review job: the textbook's classifier over a table of reviews, as one-hot rows and as token ids."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fasttrain.data.cache import load_reviews
from fasttrain.data.ragged import Ragged
from fasttrain.data.resident import ResidentBatches, resident
from fasttrain.data.text import EncodedReviews, EncodedSplit
from fasttrain.reference import TextbookClassifier, TextbookDataset, textbook_loss
from fasttrain.workloads.common import SEED, data_dir, seeded, whole_batches
from fasttrain.workloads.generate import generate_reviews
from fasttrain.workloads.onehot import ReviewClassifier, review_forward

__all__ = ["ReviewJob", "review_job"]

LEARNING_RATE = 1e-3

Classifier = TypeVar("Classifier", ReviewClassifier, TextbookClassifier)


@dataclass(frozen=True, kw_only=True, eq=False)
class ReviewJob:
    """A table of reviews, as the textbook's loop and as the fast one take it; see `Job`.

    Attributes:
        device: where every arm trains.
        source: the table's file, or the generated table itself.
        data: its token ids.
    """

    device: torch.device
    source: Path | pd.DataFrame
    data: EncodedReviews
    name: str = "reviews"
    batch_size: int = 128
    tolerance: float = 1e-5

    @property
    def train(self) -> EncodedSplit:
        """The train split."""
        return self.data.splits["train"]

    @property
    def num_rows(self) -> int:
        """See `Job.num_rows`."""
        return len(self.train.labels)

    @property
    def num_features(self) -> int:
        """Size of the vocabulary."""
        return len(self.data.vectorizer.review_vocab.token_to_idx)

    @property
    def num_outputs(self) -> int:
        """One for two ratings, else one for each."""
        num_ratings = len(self.data.vectorizer.rating_vocab.token_to_idx)
        return 1 if num_ratings == 2 else num_ratings

    @property
    def weights(self) -> dict[str, Tensor]:
        """Where every arm starts from: `fc1.weight` [outputs, features] and `fc1.bias` [outputs], on the host."""
        return self._drawn(ReviewClassifier).state_dict()

    @cached_property
    def textbook(self) -> TextbookDataset:
        """The textbook's dataset over the same table. Made when it is first asked for: it reads the table anew."""
        if isinstance(self.source, pd.DataFrame):
            return TextbookDataset.from_dataframe(self.source)
        return TextbookDataset.from_csv(self.source)

    def targets(self) -> Tensor:
        """Of the train rows, on the host: [rows], 0.0 and 1.0 for one output, else class indices (int64)."""
        labels = torch.from_numpy(self.train.labels)
        return labels.float() if self.num_outputs == 1 else labels

    def order(self, epoch: int) -> np.ndarray:
        """See `Job.order`."""
        return whole_batches(self.num_rows, self.batch_size, epoch)

    def model(self) -> ReviewClassifier:
        """See `Job.model`."""
        return self._drawn(ReviewClassifier).to(self.device)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """See `Job.optimizer`."""
        return torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)

    def forward(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """See `Job.forward`; batches are dicts of `x_data` (a `Ragged`) and `y_target`."""
        return review_forward(model, batch)

    def batches(self) -> ResidentBatches:
        """See `Job.batches`."""
        tokens = self.train.tokens
        ids = torch.from_numpy(tokens.ids.astype("int32", copy=False))
        columns = {"x_data": Ragged(ids, torch.from_numpy(tokens.offsets)), "y_target": self.targets()}
        return resident(columns, batch_size=self.batch_size, device=self.device, seed=SEED)

    def textbook_model(self) -> tuple[nn.Module, torch.optim.Optimizer, nn.Module]:
        """See `Job.textbook_model`."""
        model = self._drawn(TextbookClassifier).to(self.device)
        return model, self.optimizer(model), textbook_loss(self.num_outputs)

    def textbook_batches(self, order: Iterable[int]) -> DataLoader[dict[str, Any]]:
        """See `Job.textbook_batches`."""
        self.textbook.set_split("train")
        return self.textbook.batches(self.batch_size, shuffle=False, drop_last=True, order=order)

    def describe(self) -> dict[str, Any]:
        """See `Job.describe`."""
        return {
            "data": self.source.name if isinstance(self.source, Path) else "generated reviews",
            "data_sha256": self.data.sha256,
            "train_rows": self.num_rows,
            "ids_per_row": round(len(self.train.tokens.ids) / self.num_rows, 1),
            "vocabulary_size": self.num_features,
            "outputs": self.num_outputs,
            "batch_size": self.batch_size,
            "optimizer": f"Adam, learning rate {LEARNING_RATE:g}",
            "precision": "fp32",
        }

    def _drawn(self, kind: type[Classifier]) -> Classifier:
        """A classifier at the job's weights: both kinds are one layer `fc1`, so equal draws fall on equal places."""
        with seeded(SEED):
            return kind(self.num_features, self.num_outputs)


def review_job(device: torch.device, source: Path | pd.DataFrame | None = None) -> ReviewJob:
    """The review job.

    Args:
        device: where it trains.
        source: a .csv or .csv.gz file, or a table in memory; None for `reviews_lite.csv.gz` of the folder of real
            data, or for generated reviews where there is no such file.

    Raises:
        DataError: the table will not do.
    """
    # Reviews are not cleaned: the textbook's loop, which every arm is compared with, splits them at spaces.
    if source is None:
        path = data_dir() / "reviews_lite.csv.gz"
        source = path if path.is_file() else generate_reviews(seed=SEED).table
    return ReviewJob(device=device, source=source, data=load_reviews(source, clean="none"))
