"""The review job, and the arms that train it: same table, same weights, same order of rows."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from benchmarks.arms import BATCH_SIZE, LEARNING_RATE, SEED, FastArm, count, fast_arms, running_means
from benchmarks.harness import Arm, data_dir
from fasttrain import FastLoop, Ragged, resident
from fasttrain.data.resident import epoch_order
from fasttrain.data.table import read_reviews
from fasttrain.data.text import EncodedReviews, EncodedSplit, encode_reviews
from fasttrain.metrics import AccuracyRule, count_correct
from fasttrain.reference import TextbookClassifier, TextbookDataset, textbook_loss
from fasttrain.workloads.generate import generate_reviews
from fasttrain.workloads.onehot import ReviewClassifier, review_forward


@dataclass(frozen=True, kw_only=True, eq=False)
class ReviewJob:
    """A table of reviews, as the textbook's loop and as the fast one take it.

    Attributes:
        source: the table's file, or the generated table itself.
        data: its token ids.
        textbook: the textbook's dataset over the same rows.
        weights: where every arm starts from.
        device: where every arm trains.
    """

    source: Path | pd.DataFrame
    data: EncodedReviews
    textbook: TextbookDataset
    weights: dict[str, Tensor]
    device: torch.device

    @classmethod
    def load(cls, source: Path | pd.DataFrame, device: torch.device) -> ReviewJob:
        """Reads a table (a file must be .csv or .csv.gz) and draws the weights."""
        data = encode_reviews(read_reviews(source))
        is_frame = isinstance(source, pd.DataFrame)
        textbook = TextbookDataset.from_dataframe(source) if is_frame else TextbookDataset.from_csv(source)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = TextbookClassifier(textbook.num_features, textbook.num_outputs)
        return cls(source=source, data=data, textbook=textbook, weights=model.state_dict(), device=device)

    @property
    def train(self) -> EncodedSplit:
        """The train split."""
        return self.data.splits["train"]

    def order(self, epoch: int) -> np.ndarray:
        """Train rows in the order of an epoch (from 0), the short last batch left out."""
        num_rows = len(self.train.labels)
        return epoch_order(num_rows, SEED, epoch)[: num_rows - num_rows % BATCH_SIZE]

    def targets(self) -> Tensor:
        """Of the train rows: 0.0 and 1.0 for one output, else class indices."""
        labels = torch.from_numpy(self.train.labels)
        return labels.float() if self.textbook.num_outputs == 1 else labels

    def classifier(self) -> tuple[ReviewClassifier, torch.optim.Optimizer]:
        """A model at the job's weights, and its optimizer."""
        model = ReviewClassifier(self.textbook.num_features, self.textbook.num_outputs)
        model.load_state_dict(self.weights)
        model.to(self.device)
        return model, torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)

    def loop(self, engine: str) -> FastLoop:
        """`FastLoop` at the job's weights; raises `EngineError` where the engine cannot run."""
        return FastLoop(*self.classifier(), review_forward, engine=engine)

    def textbook_model(self) -> tuple[nn.Module, torch.optim.Optimizer, nn.Module]:
        """See `Job.textbook_model`."""
        model = TextbookClassifier(self.textbook.num_features, self.textbook.num_outputs)
        model.load_state_dict(self.weights)
        model.to(self.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
        return model, optimizer, textbook_loss(self.textbook.num_outputs)

    def textbook_batches(self, order: list[int]) -> DataLoader[dict[str, Any]]:
        """See `Job.textbook_batches`."""
        self.textbook.set_split("train")
        return self.textbook.batches(BATCH_SIZE, shuffle=False, drop_last=True, order=order)

    def resident_batches(self) -> Iterable[dict[str, Any]]:
        """The train rows as resident batches."""
        tokens = self.train.tokens
        ids = torch.from_numpy(tokens.ids.astype("int32"))
        columns = {"x_data": Ragged(ids, torch.from_numpy(tokens.offsets)), "y_target": self.targets()}
        return resident(columns, batch_size=BATCH_SIZE, device=self.device, seed=SEED)

    def streamed_batches(self) -> DataLoader[Any]:
        """The train rows from a DataLoader that picks and joins rows of token ids in this process."""
        order = EpochOrder(self)
        return DataLoader(TokenDataset(self), BATCH_SIZE, sampler=order, drop_last=True, collate_fn=collate)

    def text_bytes(self) -> int:
        """Uncompressed size of the table: its file's, or its reviews' where it has none."""
        if isinstance(self.source, Path):
            raw = self.source.read_bytes()
            return len(gzip.decompress(raw)) if self.source.suffix == ".gz" else len(raw)
        return int(self.source["review"].str.encode("utf-8").str.len().sum())

    def describe(self) -> dict[str, Any]:
        """What a record tells of the job."""
        return {
            "data": self.source.name if isinstance(self.source, Path) else "generated reviews",
            "data_sha256": self.data.sha256,
            "train_rows": len(self.train.labels),
            "ids_per_row": round(len(self.train.tokens.ids) / len(self.train.labels), 1),
            "vocabulary_size": self.textbook.num_features,
            "outputs": self.textbook.num_outputs,
            "batch_size": BATCH_SIZE,
            "optimizer": f"Adam, learning rate {LEARNING_RATE:g}",
            "precision": "fp32",
        }


def default_source() -> Path | pd.DataFrame:
    """The real reviews where they are, else generated ones."""
    path = data_dir() / "reviews_lite.csv.gz"
    return path if path.is_file() else generate_reviews(seed=SEED).table


class EpochOrder(Sampler[int]):
    """The job's rows in the order of each epoch in turn."""

    def __init__(self, job: ReviewJob) -> None:
        self._job = job
        self._epoch = 0

    def __len__(self) -> int:
        """Rows in an epoch."""
        num_rows = len(self._job.train.labels)
        return num_rows - num_rows % BATCH_SIZE

    def __iter__(self) -> Iterator[int]:
        """An epoch's rows."""
        self._epoch += 1
        return iter(self._job.order(self._epoch - 1).tolist())


class TokenDataset(Dataset[tuple[np.ndarray, Any]]):
    """The token ids and the target of one train row at a time."""

    def __init__(self, job: ReviewJob) -> None:
        self._ids = job.train.tokens.ids.astype(np.int32)
        self._offsets = job.train.tokens.offsets.tolist()
        self._targets = job.targets().tolist()

    def __getitem__(self, index: int) -> tuple[np.ndarray, Any]:
        """A row's ids, [ids] int32, and its target."""
        return self._ids[self._offsets[index] : self._offsets[index + 1]], self._targets[index]


def collate(rows: list[tuple[np.ndarray, Any]]) -> dict[str, Any]:
    """A batch of `Ragged` ids and targets."""
    ids, targets = zip(*rows, strict=True)
    lengths = torch.tensor([len(row) for row in ids])
    return {"x_data": Ragged.of_lengths(torch.from_numpy(np.concatenate(ids)), lengths), "y_target": torch.tensor(targets)}


class DenseArm:
    """What a careful engineer writes by hand: all one-hot rows made once, gathered by index, nothing read on the way.

    The rows are uint8: float32 would take four times the memory (0.8 GB for 39,200 rows of 5,317 words).
    """

    name = "tuned by hand"
    compile_s: float | None = None

    def __init__(self, job: ReviewJob, *, threads: int) -> None:
        self.threads = threads
        self.description = f"one-hot rows made once, gathered; fused Adam; nothing read; {count(threads, 'thread')}"
        self._job = job
        self._epoch = 0
        self._rule: AccuracyRule = "logit" if job.textbook.num_outputs == 1 else "argmax"
        self._model, _ = job.classifier()
        self._optimizer = torch.optim.Adam(self._model.parameters(), lr=LEARNING_RATE, fused=True)
        tokens = job.train.tokens
        dense = torch.zeros(len(job.train.labels), job.textbook.num_features, dtype=torch.uint8)
        rows = np.repeat(np.arange(len(dense)), np.diff(tokens.offsets))
        dense.numpy()[rows, tokens.ids] = 1
        self._rows, self._targets = dense.to(job.device), job.targets().to(job.device)

    def losses(self, num_batches: int) -> list[float]:
        """See `Arm.losses`."""
        return running_means(self._train(num_batches)[0].tolist())

    def run(self) -> int:
        """See `Arm.run`."""
        losses, correct = self._train(None)
        torch.stack([losses.mean(), correct]).tolist()  # HOST READ: once a pass, its figures
        return len(losses) * BATCH_SIZE

    def _train(self, num_batches: int | None) -> tuple[Tensor, Tensor]:
        order = torch.from_numpy(self._job.order(self._epoch)).to(self._job.device)
        self._epoch += 1
        losses: list[Tensor] = []
        correct = torch.zeros((), device=self._job.device)
        for rows in order.split(BATCH_SIZE)[:num_batches]:
            batch = {
                "x_data": self._rows.index_select(0, rows).float(),
                "y_target": self._targets.index_select(0, rows),
            }
            loss, logits, targets = review_forward(self._model, batch)
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            correct += count_correct(self._rule, logits.detach(), targets)
        return torch.stack(losses), correct


def review_arms(job: ReviewJob, threads: int) -> dict[str, Callable[[], Arm]]:
    """By name, what makes each arm of `FastLoop`; an engine that cannot run here raises `EngineError` then."""
    description = "FastLoop, engine eager, prefetch over a DataLoader"

    def streamed() -> Arm:
        batches = job.streamed_batches()
        return FastArm(job.loop("eager"), batches, name="eager, streamed", description=description, threads=threads)

    return {**fast_arms(job.loop, job.resident_batches, threads), "eager, streamed": streamed}
