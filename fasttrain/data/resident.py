"""Batches from a dataset that lives on the device whole: shuffled there, gathered there, sliced without a host read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fasttrain.data.columns import Column, DenseColumn, RaggedColumn
from fasttrain.data.ragged import Ragged, data_tensor
from fasttrain.device import resolve_device
from fasttrain.errors import ConfigError, DataError

__all__ = ["ResidentBatches", "ResidentEpoch", "Span", "epoch_order", "resident"]

# One gather serves as many batches as fit in here: an index_select costs 5 us before it moves a byte, a slice 0.3 us.
BLOCK_BYTES = 8 << 20

Rows = Tensor | np.ndarray | Ragged | Column
Batch = Any


def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of rows in an epoch: a pure function of (num_rows, seed, epoch), equal on every device.

    Returns:
        A permutation of the row numbers, [num_rows], int64.
    """
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


def resident(
    *tensors: Rows | Mapping[str, Rows] | pd.DataFrame,
    batch_size: int,
    device: str | torch.device,
    shuffle: bool = True,
    seed: int = 0,
    drop_last: bool = True,
) -> ResidentBatches:
    """Puts a whole dataset on a device and returns its batches, ready to be iterated once an epoch.

    Args:
        *tensors: tensors or numpy arrays with one row a sample, [num_rows, ...], or `Ragged`s: batches are tuples in
            this order. Or one mapping of names to such columns: batches are dicts. Or one DataFrame of numbers:
            batches are dicts of its columns. Dtypes stay as they are (but see `data_tensor` and `RaggedColumn`).
        batch_size: rows in a batch.
        device: where the data lives and the batches are made.
        shuffle: a new order each epoch (see `epoch_order`), else the rows' own.
        seed: of the order.
        drop_last: leave out a last batch that would be shorter.

    Returns:
        An iterable; each pass over it is one epoch, in an order of its own. `FastLoop.evaluate` and the validation of
        `FastLoop.fit` use every row once, in the rows' own order, whatever `shuffle` and `drop_last` are.

    Raises:
        ConfigError: the batch size is not positive, or leaves no batch at all; a negative seed.
        DataError: no rows, columns of unequal length, a column that is not numbers or that requires gradients, two
            columns of a DataFrame with one name, or offsets of a `Ragged` that do not rise from 0 to its end.
        DeviceError: this machine does not have the device.
    """
    columns, rebuild = _columns(tensors)
    return ResidentBatches(
        columns,
        rebuild,
        batch_size=batch_size,
        device=resolve_device(device),
        shuffle=shuffle,
        seed=seed,
        drop_last=drop_last,
    )


class ResidentBatches:
    """An iterable of batches over resident columns; made by `resident`.

    Each pass over it is one epoch; `set_epoch` says which one comes next. Unshuffled batches are views of the
    resident data: read them, do not write to them.

    Attributes:
        device: where the batches are.
        epoch: the number of the epoch that the next pass gives, from 0.
        batch_size: rows in a batch.
        num_rows: rows of the data.
        block_rows: rows that are gathered at a time.
        columns: the data itself, on the device: all rows, in their own order.
    """

    def __init__(
        self,
        columns: Sequence[Rows],
        rebuild: Callable[[Sequence[Any]], Batch],
        *,
        batch_size: int,
        device: torch.device,
        shuffle: bool,
        seed: int,
        drop_last: bool,
    ) -> None:
        self.device = device
        self.epoch = 0
        self.batch_size = batch_size
        self.columns = [_place(column, device) for column in columns]
        self.num_rows = _common_length(self.columns)
        self._rebuild = rebuild
        self._shuffle = shuffle
        self._seed = seed
        if batch_size < 1:
            raise ConfigError(f"batch_size {batch_size}: use 1 or more")
        if seed < 0:
            raise ConfigError(f"seed {seed}: use 0 or more")
        self._num_used = self.num_rows - self.num_rows % batch_size if drop_last else self.num_rows
        if self._num_used == 0:
            raise ConfigError(
                f"batch_size {batch_size} is larger than the {self.num_rows} rows, and a short last batch is dropped: "
                f"there would be no batch; use at most {self.num_rows}"
            )
        row_nbytes = sum(column.row_nbytes for column in self.columns)
        self.block_rows = batch_size * max(1, BLOCK_BYTES // max(1, row_nbytes * batch_size))
        # Batches of narrow or sparse columns would take far more memory than the columns.
        self._keeps_all = row_nbytes * self.num_rows < 1.5 * sum(column.nbytes for column in self.columns)
        self._unshuffled: ResidentEpoch | None = None
        self._every_row: ResidentBatches | None = None

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-self._num_used // self.batch_size)

    @property
    def every_row(self) -> ResidentBatches:
        """Batches of the same data for an evaluation: every row once, in the rows' own order, the short last one too.

        Passes over them leave the epochs of these batches as they are.
        """
        if not self._shuffle and self._num_used == self.num_rows:
            return self
        if self._every_row is None:
            found = copy.copy(self)  # the columns are shared
            found._shuffle, found._num_used, found._unshuffled = False, found.num_rows, None
            self._every_row = found
        return self._every_row

    @property
    def num_whole(self) -> int:
        """Batches in an epoch without the last one where it is shorter."""
        return self._num_used // self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch the next pass gives: what resumes a run rebuilds its order of data."""
        self.epoch = epoch

    def order(self, epoch: int) -> np.ndarray:
        """Row numbers in the order in which an epoch visits them, [rows used], int64."""
        order = epoch_order(self.num_rows, self._seed, epoch) if self._shuffle else np.arange(self.num_rows)
        return order[: self._num_used]

    def __iter__(self) -> ResidentEpoch:
        """One epoch of batches."""
        epoch, self.epoch = self.epoch, self.epoch + 1
        if self._shuffle or not self._keeps_all:
            return ResidentEpoch(self, self.order(epoch))
        if self._unshuffled is None:
            self._unshuffled = ResidentEpoch(self, self.order(epoch), keeps_all=True)
        return self._unshuffled.again()

    def gather(self, rows: Tensor, host_rows: np.ndarray) -> list[Batch]:
        """Batches of these rows, in this order; the last may be shorter.

        Args:
            rows: [n], int64, the rows' numbers, on the device.
            host_rows: the same on the host.
        """
        is_in_order = not self._shuffle  # a view of rows that come one after the other takes no memory
        parts = [column.gather(rows, host_rows, self.batch_size, may_alias=is_in_order) for column in self.columns]
        return [self._rebuild(batch) for batch in zip(*parts, strict=True)]

    @property
    def longest(self) -> int:
        """Entries of the longest row of a column whose rows have entries of their own number; 0 where there is none."""
        return max(column.longest for column in self.columns)


class ResidentEpoch:
    """One epoch of resident batches: one by one, or several at a time as the numbers of their rows.

    Args:
        source: whose batches.
        host_order: the rows' numbers in the order in which they come, [n], int64.
        keeps_all: whether all batches are gathered at once, for `again`.
    """

    def __init__(self, source: ResidentBatches, host_order: np.ndarray, *, keeps_all: bool = False) -> None:
        self._source = source
        self._block_rows = len(host_order) if keeps_all else source.block_rows
        self._set_order(host_order)

    def _set_order(self, host_order: np.ndarray) -> None:
        """Begins with the first of these rows."""
        self._host_order = host_order
        self._order = torch.from_numpy(host_order)
        if self._source.device.type == "cuda":
            self._order = self._order.pin_memory().to(self._source.device, non_blocking=True)
        self._block: list[Batch] = []
        self._block_begin = 0
        self._next = 0

    def __iter__(self) -> ResidentEpoch:
        """Itself."""
        return self

    def __next__(self) -> Batch:
        """The next batch."""
        at = self._next - self._block_begin
        if not 0 <= at < len(self._block):
            self._gather_block()
            at = 0
        self._next += 1
        return self._block[at]

    def take(self, most: int) -> Span | None:
        """The next batches as one span: so many, or as many whole ones as are left; None where none is."""
        begin = self._next * self._source.batch_size
        steps = min(most, (len(self._host_order) - begin) // self._source.batch_size)
        if steps <= 0:  # nothing is left; less than nothing after a short last batch
            return None
        rows = slice(begin, begin + steps * self._source.batch_size)
        self._next += steps
        return Span(source=self._source, rows=self._order[rows], host_rows=self._host_order[rows], steps=steps)

    def again(self) -> ResidentEpoch:
        """The same epoch from its beginning; what is gathered is shared."""
        if not self._block:
            self._gather_block()
        epoch = copy.copy(self)
        epoch._next = 0
        return epoch

    def _gather_block(self) -> None:
        begin = self._next * self._source.batch_size
        if begin >= len(self._host_order):
            raise StopIteration
        block = slice(begin, begin + self._block_rows)
        self._block = []  # the memory of the last one serves for this one
        self._block = self._source.gather(self._order[block], self._host_order[block])
        self._block_begin = self._next


@dataclass(frozen=True, kw_only=True, eq=False)
class Span:
    """Several whole batches that come one after the other, by the numbers of their rows: nothing is gathered yet.

    Attributes:
        source: whose rows they are.
        rows: [steps * batch size], int64, on the device.
        host_rows: the same on the host.
        steps: how many batches.
    """

    source: ResidentBatches
    rows: Tensor
    host_rows: np.ndarray
    steps: int

    def batch(self, number: int = 0) -> Batch:
        """One of the batches, gathered; the first is number 0."""
        rows = slice(number * self.source.batch_size, (number + 1) * self.source.batch_size)
        return self.source.gather(self.rows[rows], self.host_rows[rows])[0]

    def piece(self, begin: int, end: int) -> Span:
        """The steps from `begin` to `end` (which is left out) as a span of their own."""
        rows = slice(begin * self.source.batch_size, end * self.source.batch_size)
        return replace(self, rows=self.rows[rows], host_rows=self.host_rows[rows], steps=end - begin)

    def pieces(self, steps: int) -> list[Span]:
        """The span in spans of so many steps; the last may have fewer."""
        return [self.piece(at, min(at + steps, self.steps)) for at in range(0, self.steps, steps)]

    def batches(self) -> list[Batch]:
        """The batches, gathered."""
        return self.source.gather(self.rows, self.host_rows)


def _columns(given: Sequence[Any]) -> tuple[list[Rows], Callable[[Sequence[Any]], Batch]]:
    """The columns, and how a batch is put together from a slice of each."""
    if len(given) == 1 and isinstance(given[0], pd.DataFrame):
        frame = given[0]
        names = [str(name) for name in frame.columns]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DataError(f"columns have the same name: {', '.join(twice)}; rename them", file="DataFrame")
        return _columns([{str(name): _numbers(column, str(name)) for name, column in frame.items()}])
    if len(given) == 1 and isinstance(given[0], Mapping):
        columns: Mapping[str, Rows] = given[0]
        return list(columns.values()), partial(_named, list(columns))
    return list(given), tuple


def _named(names: Sequence[str], parts: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(names, parts, strict=True))


def _numbers(series: pd.Series, name: str) -> np.ndarray:
    if not pd.api.types.is_numeric_dtype(series.dtype) or series.isna().any():
        raise DataError(
            f"dtype {series.dtype}, {int(series.isna().sum())} missing: a resident table holds numbers only; "
            "convert the column or leave it out",
            file="DataFrame",
            column=name,
        )
    array = series.to_numpy()
    # pandas gives objects for numbers of some extension types.
    return array if array.dtype != object else np.array(array.tolist())


def _common_length(columns: Sequence[Column]) -> int:
    lengths = [len(column) for column in columns]
    if not lengths or lengths[0] == 0:
        raise DataError("resident data needs at least one column with at least one row")
    if len(set(lengths)) > 1:
        raise DataError(f"resident columns must have one row a sample; their lengths differ: {lengths}")
    return lengths[0]


def _place(rows: Rows, device: torch.device) -> Column:
    if isinstance(rows, Column):
        return rows.to(device)
    return RaggedColumn(rows, device) if isinstance(rows, Ragged) else DenseColumn(data_tensor(rows).to(device))
