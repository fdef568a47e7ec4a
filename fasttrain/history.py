"""What a training run has reached, epoch by epoch: plain data."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, field
from typing import Any, Literal

import pandas as pd

__all__ = ["EpochResult", "EpochRow", "History", "rows_from_csv", "rows_to_csv"]


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """One pass over the batches.

    Attributes:
        loss: training: mean of the batches' losses, as in the book; evaluation: mean over samples.
        accuracy: percent; training: mean of the batches' accuracies; evaluation: over all positions that the loss does
            not ignore; None where it has no meaning.
        batches: how many there were.
        samples: how many there were.
        seconds: wall time, readout included.
        samples_per_s: samples / seconds.
        engine: what ran the steps.
        source: where the batches came from, "resident" or "streamed".
        metrics: the user's metrics by name: functions are averaged like the loss, objects with `update` and `compute`
            are computed from the whole pass.
    """

    loss: float
    accuracy: float | None
    batches: int
    samples: int
    seconds: float
    samples_per_s: float
    engine: str
    source: str
    metrics: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, kw_only=True)
class EpochRow:
    """One line of a run's history.

    Attributes:
        epoch: counted from 1.
        split: "train" or "val".
        loss: see `EpochResult`.
        accuracy: percent, or None.
        lr: learning rate of the first parameter group during the epoch.
        samples: how many were seen.
        seconds: wall time.
        samples_per_s: samples / seconds.
    """

    epoch: int
    split: Literal["train", "val"]
    loss: float
    accuracy: float | None
    lr: float
    samples: int
    seconds: float
    samples_per_s: float

    @classmethod
    def of(cls, result: EpochResult, *, epoch: int, split: Literal["train", "val"], lr: float) -> EpochRow:
        """The line for a pass over a split."""
        return cls(
            epoch=epoch,
            split=split,
            loss=result.loss,
            accuracy=result.accuracy,
            lr=lr,
            samples=result.samples,
            seconds=result.seconds,
            samples_per_s=result.samples_per_s,
        )


@dataclass(kw_only=True)
class History:
    """All finished epochs of a fit.

    Attributes:
        rows: two an epoch where there is a validation split, else one.
        best_epoch: epoch of the lowest watched loss (val, or train where there is no val), from 1; None before one.
        best_loss: that loss.
        stopped: why the fit ended: all epochs done, no new best within the patience, or interrupted.
    """

    rows: list[EpochRow] = field(default_factory=list[EpochRow])
    best_epoch: int | None = None
    best_loss: float | None = None
    stopped: Literal["epochs", "patience", "interrupted"] | None = None

    @property
    def epochs(self) -> int:
        """Finished epochs."""
        return self.rows[-1].epoch if self.rows else 0

    def to_frame(self) -> pd.DataFrame:
        """The rows as a table with the columns of `EpochRow`."""
        columns = list(EpochRow.__dataclass_fields__)
        return pd.DataFrame([asdict(row) for row in self.rows], columns=columns)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` brings them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> History:
        """The history that `to_dict` wrote."""
        rest = {name: value for name, value in given.items() if name != "rows"}
        return cls(rows=[EpochRow(**row) for row in given["rows"]], **rest)


def rows_to_csv(rows: Iterable[EpochRow], *, header: bool = True) -> str:
    """Lines of history.csv: the columns of `EpochRow`, an empty cell for None, floats with all of their digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(EpochRow.__dataclass_fields__)
    writer.writerows(astuple(row) for row in rows)
    return text.getvalue()


def rows_from_csv(text: str) -> list[EpochRow]:
    """The rows that `rows_to_csv` wrote, with their header.

    Raises:
        ValueError: it is another table.
    """
    names = list(EpochRow.__dataclass_fields__)
    header, *lines = csv.reader(io.StringIO(text))
    if header != names:
        raise ValueError(f"its columns must be {', '.join(names)}")
    return [_row(dict(zip(names, line, strict=True))) for line in lines]


def _row(cells: dict[str, str]) -> EpochRow:
    split = cells["split"]
    if split not in ("train", "val"):
        raise ValueError(f"{split!r} is no split: it must be train or val")
    return EpochRow(
        epoch=int(cells["epoch"]),
        split=split,
        loss=float(cells["loss"]),
        accuracy=float(cells["accuracy"]) if cells["accuracy"] else None,
        lr=float(cells["lr"]),
        samples=int(cells["samples"]),
        seconds=float(cells["seconds"]),
        samples_per_s=float(cells["samples_per_s"]),
    )
