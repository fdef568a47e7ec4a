"""Columns: all rows of a dataset's tensors, each column in the form that its values allow, and how one is built.

A column keeps the rows and gives out batches of them, in any order, on its device. The graph of a training step reads
the column's tables (see `Column.tables`) and makes the batch's tensor from them by itself.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fasttrain.data.ragged import Ragged, batch_offsets, checked_offsets, data_tensor, gather_by_index
from fasttrain.errors import DataError

__all__ = [
    "Column",
    "ColumnBuilder",
    "ColumnKind",
    "DenseColumn",
    "RaggedColumn",
    "RowsDifferError",
    "SparseColumn",
    "carrier",
    "restore_column",
]

BLOCK_ENTRIES = 1 << 20
"""Entries that a builder converts at a time."""


@dataclass(frozen=True, kw_only=True)
class ColumnKind:
    """What the rows of a column are like, however many there are: what a graph that reads the column depends on.

    Attributes:
        form: how the column keeps its rows.
        dtype: of the tensor that a batch has of it; of a ragged column, of its values.
        shape: of a row of that tensor; of a ragged column, of one value.
        tables: for each of `Column.tables`, the shape of one of its rows, and its dtype.
    """

    form: Literal["dense", "sparse", "ragged"]
    dtype: torch.dtype
    shape: torch.Size
    tables: tuple[tuple[torch.Size, torch.dtype], ...]

    @property
    def num_leaves(self) -> int:
        """Tensors that a batch has of the column: a `Ragged` is two."""
        return 2 if self.form == "ragged" else 1


class Column(ABC):
    """All rows of one column, on one device, from which batches are gathered in any order."""

    @property
    @abstractmethod
    def kind(self) -> ColumnKind:
        """What the rows are like."""

    @property
    @abstractmethod
    def tables(self) -> list[Tensor]:
        """The tensors that keep the rows, on the device.

        dense: rows [num_rows, ...], whose dtype may be narrower than that of batches. ragged: values and offsets, as
        a `Ragged` has them. sparse: ids and offsets, and values unless all are 1 (see `SparseColumn`).
        """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the rows take on their device."""

    @property
    @abstractmethod
    def row_nbytes(self) -> int:
        """Bytes that a row takes in a batch; of a ragged column, the mean."""

    @property
    def longest(self) -> int:
        """Entries of the longest row, where rows have entries of their own number; else 0."""
        return 0

    @abstractmethod
    def __len__(self) -> int:
        """The number of rows."""

    @abstractmethod
    def gather(
        self, rows: Tensor, host_rows: np.ndarray, batch_size: int, *, may_alias: bool = False
    ) -> Sequence[Tensor] | Sequence[Ragged]:
        """Batches of `batch_size` rows (the last may be shorter), in the order of `rows`, without a host read.

        Args:
            rows: [n], int64 row numbers on the column's device.
            host_rows: the same row numbers on the host.
            batch_size: rows in a batch.
            may_alias: the rows' numbers rise by one, and the batches may be views of the column; else they share no
                memory with it.
        """

    @abstractmethod
    def to(self, device: torch.device) -> Column:
        """The column on a device: itself where it is there."""


class DenseColumn(Column):
    """Rows of one shape as one tensor, which may be of a narrower dtype than the batches.

    Args:
        rows: [num_rows, ...], of a dtype whose values `dtype` represents exactly.
        dtype: of batches; None: that of `rows`.
    """

    def __init__(self, rows: Tensor, dtype: torch.dtype | None = None) -> None:
        self.rows = rows
        self._dtype = rows.dtype if dtype is None else dtype

    @property
    def kind(self) -> ColumnKind:
        """What the rows are like."""
        shape = self.rows.shape[1:]
        return ColumnKind(form="dense", dtype=self._dtype, shape=shape, tables=((shape, self.rows.dtype),))

    @property
    def tables(self) -> list[Tensor]:
        """The rows."""
        return [self.rows]

    @property
    def nbytes(self) -> int:
        """Bytes that the rows take on their device."""
        return self.rows.nbytes

    @property
    def row_nbytes(self) -> int:
        """Bytes that a row takes in a batch."""
        return math.prod(self.rows.shape[1:]) * self._dtype.itemsize

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def gather(
        self, rows: Tensor, host_rows: np.ndarray, batch_size: int, *, may_alias: bool = False
    ) -> Sequence[Tensor]:
        """See `Column.gather`."""
        found = self.rows[host_rows[0] : host_rows[-1] + 1] if may_alias else self.rows.index_select(0, rows)
        return _as_dtype(found, self._dtype).split(batch_size)

    def to(self, device: torch.device) -> DenseColumn:
        """The column on a device."""
        return DenseColumn(self.rows.to(device), self._dtype)


class RaggedColumn(Column):
    """Rows of unequal length; batches are `Ragged`s.

    Args:
        rows: all rows. Integer values narrower than int32 are kept as int32, the narrowest type that torch looks up
            with; every other dtype stays as it is. Offsets may be any integers, and are copied.
        device: where the rows live.

    Attributes:
        device: see above.
        all_rows: the rows in their own order, on the device.

    Raises:
        DataError: the offsets do not rise from 0 to the number of values, or the values are no data.
    """

    def __init__(self, rows: Ragged, device: torch.device) -> None:
        values = data_tensor(rows.values)
        if values.dtype in (torch.uint8, torch.int8, torch.int16):
            values = values.int()
        offsets = checked_offsets(rows.offsets, len(values))
        self.device = device
        self._host_offsets = offsets.numpy()
        self._host_lengths = np.diff(self._host_offsets)
        self.all_rows = Ragged(values.resolve_conj().resolve_neg().contiguous().to(device), offsets.to(device))
        if device.type == "cpu":
            # pyarrow's take of binary values is one memcpy a row: 11 us for a batch of 128 reviews where the same
            # gather by index takes torch 69 us (Xeon with AMX, one thread, 66 ids a review).
            values = self.all_rows.values
            entry_bytes = values.itemsize * math.prod(values.shape[1:])
            self._rows_as_bytes = pa.LargeBinaryArray.from_buffers(
                pa.large_binary(),
                len(self._host_lengths),
                [
                    None,
                    pa.py_buffer(self._host_offsets * entry_bytes),
                    # Of one value or none, the stride may be anything, and `view` wants 1.
                    pa.py_buffer(values.as_strided((values.numel(),), (1,)).view(torch.uint8).numpy()),
                ],
            )

    @property
    def kind(self) -> ColumnKind:
        """What the rows are like."""
        values, offsets = self.tables
        tables = (values.shape[1:], values.dtype), (offsets.shape[1:], offsets.dtype)
        return ColumnKind(form="ragged", dtype=values.dtype, shape=values.shape[1:], tables=tables)

    @property
    def tables(self) -> list[Tensor]:
        """Values and offsets."""
        return [*self.all_rows]

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._host_lengths)

    @property
    def longest(self) -> int:
        """Entries of the longest row."""
        return int(self._host_lengths.max(initial=0))

    @property
    def nbytes(self) -> int:
        """Bytes that the rows take on their device."""
        return self.all_rows.values.nbytes + self._host_offsets.nbytes

    @property
    def row_nbytes(self) -> int:
        """Bytes that a row takes in a batch, the mean."""
        return -(-self.nbytes // max(1, len(self)))

    def gather(
        self, rows: Tensor, host_rows: np.ndarray, batch_size: int, *, may_alias: bool = False
    ) -> Sequence[Ragged]:
        """See `Column.gather`."""
        del may_alias  # batches are always made anew
        if len(host_rows) == 0:
            return []
        lengths = self._host_lengths[host_rows]
        if self.device.type == "cpu":
            values = self._take_bytes(host_rows)
        else:
            values = gather_by_index(*self.all_rows, rows, int(lengths.sum()))
        sizes = np.add.reduceat(lengths, range(0, len(lengths), batch_size)).tolist()
        offsets = batch_offsets(lengths, batch_size, self.device)
        return [Ragged(*pair) for pair in zip(values.split_with_sizes(sizes), offsets, strict=True)]

    def to(self, device: torch.device) -> RaggedColumn:
        """The column on a device."""
        return self if device == self.device else RaggedColumn(self.all_rows, device)

    def _take_bytes(self, host_rows: np.ndarray) -> Tensor:
        _, _, data = self._rows_as_bytes.take(pa.array(host_rows)).buffers()
        values = self.all_rows.values
        if data is None or data.size == 0:
            return values[:0]
        taken = torch.from_numpy(np.frombuffer(data, dtype=np.uint8)).view(values.dtype)
        return taken if values.ndim == 1 else taken.view(-1, *values.shape[1:])


class SparseColumn(Column):
    """Rows of one shape, mostly zeros, as the places and the values of their other entries; batches are dense.

    Args:
        ids: [num_entries], int32, for each entry its place in the flattened row: rising within a row.
        offsets: [num_rows + 1], int64: the entries of row i are those from `offsets[i]` to `offsets[i + 1]`.
        values: [num_entries], the entries; None: each is 1. Their dtype is `carrier(dtype)`; of integers narrower than
            int32, it may be int32.
        dtype: of batches.
        shape: of a row.
        device: where the rows live.

    Raises:
        DataError: the offsets do not rise from 0 to the number of entries, or the ids of a row do not rise, or are not
            below the size of a row.
    """

    def __init__(
        self,
        ids: Tensor,
        offsets: Tensor,
        values: Tensor | None,
        *,
        dtype: torch.dtype,
        shape: Sequence[int],
        device: torch.device,
    ) -> None:
        self._dtype = dtype
        self._shape = torch.Size(shape)
        self._num_values = math.prod(shape)
        self._ids = RaggedColumn(Ragged(ids, offsets), device)
        self._values = None if values is None else RaggedColumn(Ragged(values, offsets), device)
        _check_ids(ids.numpy(force=True), offsets.numpy(force=True), self._num_values)

    @property
    def kind(self) -> ColumnKind:
        """What the rows are like."""
        tables = tuple((table.shape[1:], table.dtype) for table in self.tables)
        return ColumnKind(form="sparse", dtype=self._dtype, shape=self._shape, tables=tables)

    @property
    def tables(self) -> list[Tensor]:
        """Ids, offsets and, unless all are 1, values."""
        return [*self._ids.all_rows, *([] if self._values is None else self._values.tables[:1])]

    @property
    def nbytes(self) -> int:
        """Bytes that the rows take on their device."""
        return sum(table.nbytes for table in self.tables)

    @property
    def row_nbytes(self) -> int:
        """Bytes that a row takes in a batch."""
        return self._num_values * self._dtype.itemsize

    @property
    def longest(self) -> int:
        """Entries of the longest row."""
        return self._ids.longest

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._ids)

    def gather(
        self, rows: Tensor, host_rows: np.ndarray, batch_size: int, *, may_alias: bool = False
    ) -> Sequence[Tensor]:
        """See `Column.gather`."""
        del may_alias  # batches are always made anew
        num_rows = len(host_rows)
        if num_rows == 0:
            return []
        [(ids, offsets)] = self._ids.gather(rows, host_rows, num_rows)
        begins = torch.arange(0, num_rows * self._num_values, self._num_values, device=ids.device)
        places = torch.repeat_interleave(begins, offsets.diff(), output_size=len(ids)).add_(ids)
        found = torch.zeros(num_rows * self._num_values, dtype=carrier(self._dtype), device=ids.device)
        if self._values is None:
            found.index_fill_(0, places, 1)
        else:
            [(values, _)] = self._values.gather(rows, host_rows, num_rows)
            found.index_copy_(0, places, values.to(found.dtype))
        return found.view(self._dtype).view(num_rows, *self._shape).split(batch_size)

    def to(self, device: torch.device) -> SparseColumn:
        """The column on a device."""
        if device == self._ids.device:
            return self
        ids, offsets, *values = self.tables
        return SparseColumn(
            ids, offsets, values[0] if values else None, dtype=self._dtype, shape=self._shape, device=device
        )


def _check_ids(ids: np.ndarray, offsets: np.ndarray, num_values: int) -> None:
    if len(ids) and (ids.min() < 0 or ids.max() >= num_values):
        raise DataError(f"the ids of a sparse column are not all from 0 to {num_values - 1}, the entries of a row")
    begins_row = np.zeros(len(ids) + 1, dtype=bool)
    begins_row[offsets] = True
    if not begins_row[np.flatnonzero(ids[1:] <= ids[:-1]) + 1].all():
        raise DataError("the ids of a sparse column do not rise within each row")


def restore_column(kind: ColumnKind, tables: Sequence[Tensor], device: torch.device) -> Column:
    """The column that has this kind and these tables, such as tables that were kept on disk.

    Raises:
        DataError: the tables are not those of a column of this kind.
    """
    column = _restored(kind, tables, device)
    if column.kind != kind:
        raise DataError(f"these tables are of a column of another kind: {column.kind}, not {kind}")
    return column


def _restored(kind: ColumnKind, tables: Sequence[Tensor], device: torch.device) -> Column:
    if len(tables) != len(kind.tables):
        raise DataError(f"{len(tables)} tables: a column of this kind has {len(kind.tables)}")
    if kind.form == "dense":
        return DenseColumn(tables[0].to(device), kind.dtype)
    if kind.form == "ragged":
        return RaggedColumn(Ragged(*tables), device)
    ids, offsets, *values = tables
    return SparseColumn(ids, offsets, values[0] if values else None, dtype=kind.dtype, shape=kind.shape, device=device)


# Dtypes.

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by their size in bytes: what the bits of any value are read as."""


def carrier(dtype: torch.dtype) -> torch.dtype:
    """The dtype that values of a dtype are gathered and converted in: itself where torch's operators have it.

    Unsigned integers of 16 bits and more, and floating-point numbers of 8, are carried as signed integers of the same
    bits (`Tensor.view` makes the one of the other).
    """
    if dtype in _INTEGERS or dtype in _FLOATS or dtype == torch.bool or dtype.is_complex:
        return dtype
    return _BITS[dtype.itemsize]


def _as_dtype(found: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows as a batch has them."""
    return found if found.dtype == dtype else found.to(carrier(dtype)).view(dtype)


def _bits(values: Tensor) -> np.ndarray:
    """The values' bits as integers of their size, flat, without a copy where the values have no gaps."""
    return values.contiguous().view(-1).view(_BITS[values.dtype.itemsize]).numpy()


_Range = tuple[int, int] | None
"""The smallest and the largest of values, 0 among them, that integers give back bit for bit; None: none do."""


def _range_of(values: Tensor) -> _Range:
    if values.dtype not in _INTEGERS and values.dtype not in _FLOATS:
        return None
    if values.numel() == 0:
        return 0, 0
    low, high = (each.item() for each in torch.aminmax(values))
    if values.is_floating_point():
        if not (-(2**31) < low and high < 2**31):  # NaN fails, too
            return None
        again = values.to(torch.int32).to(values.dtype)  # a fraction is cut off, and -0.0 becomes 0.0
        if not np.array_equal(_bits(again), _bits(values)):
            return None
    return min(0, int(low)), max(0, int(high))


def _narrowest(dtype: torch.dtype, value_range: _Range) -> torch.dtype:
    """The narrowest dtype for values of a dtype in a range."""
    if value_range is not None:
        low, high = value_range
        for each in _INTEGERS[:-1]:
            limits = torch.iinfo(each)
            if each.itemsize < dtype.itemsize and limits.min <= low and high <= limits.max:
                return each
    return dtype


class RowsDifferError(ValueError):
    """Rows are of another shape or dtype than those that a builder holds."""


class ColumnBuilder:
    """A column that is filled while batches of its rows come by, in any order, and can be read meanwhile.

    Each batch is kept in the smallest form that gives back its bits: narrower integers, or the places and values of
    the entries that are not zero. `column` chooses one form for all rows.

    Args:
        num_rows: of the column.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._form = np.zeros(num_rows, dtype=np.uint8)  # of each row: _MISSING, _DENSE or _SPARSE
        self._dtype: torch.dtype | None = None
        self._shape = torch.Size()
        self._num_values = 0
        self._one = 0
        self._range: _Range = (0, 0)
        self._dense: Tensor | None = None  # [num_rows, ...]; memory that was not written to is not there
        self._num_dense_entries = 0
        self._sparse: _SparseRows | None = None

    def __len__(self) -> int:
        """The number of rows that are there."""
        return int(np.count_nonzero(self._form))

    @property
    def is_complete(self) -> bool:
        """Whether all rows are there."""
        return len(self) == self.num_rows

    @property
    def nbytes(self) -> int:
        """Bytes that the rows take, as far as they are there."""
        dense = 0 if self._dense is None else np.count_nonzero(self._form == _DENSE) * self._dense[0].nbytes
        return self._form.nbytes + int(dense) + (0 if self._sparse is None else self._sparse.nbytes)

    def has(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """For each of these row numbers, whether the row is there, [n], bool."""
        return self._form[np.asarray(rows, dtype=np.int64)] != _MISSING

    def put(self, rows: Sequence[int] | np.ndarray, batch: Tensor) -> None:
        """Keeps rows; those that are there already stay as they are.

        Args:
            rows: [n], their numbers; of one that occurs twice, the first counts.
            batch: [n, ...], the rows, on the host.

        Raises:
            RowsDifferError: they are of another shape or dtype than rows that were put before.
        """
        numbers = np.asarray(rows, dtype=np.int64)
        batch = batch.detach().resolve_conj().resolve_neg()
        self._check(numbers, batch)
        is_new = self._form[numbers] == _MISSING
        if len(np.unique(numbers)) < len(numbers):
            is_first = np.zeros(len(numbers), dtype=bool)
            is_first[np.unique(numbers, return_index=True)[1]] = True
            is_new &= is_first
        if not is_new.all():
            numbers, batch = numbers[is_new], batch[torch.from_numpy(is_new)]
        if len(numbers):
            self._keep(numbers, batch.view(carrier(batch.dtype)))

    def get(self, rows: Sequence[int] | np.ndarray) -> Tensor:
        """Rows as they were put, [n, ...], in memory of their own.

        Raises:
            KeyError: one is not there.
        """
        numbers = np.asarray(rows, dtype=np.int64)
        form = self._form[numbers]
        if self._dtype is None or (form == _MISSING).any():
            raise KeyError(f"row {numbers[form == _MISSING][:1]} is not there")
        if self._sparse is None or (form == _DENSE).all():
            return self._dense_rows(numbers).view(self._dtype)
        found = torch.zeros(len(numbers) * self._num_values, dtype=carrier(self._dtype))
        is_sparse = form == _SPARSE
        self._sparse.write(numbers[is_sparse], np.flatnonzero(is_sparse), _bits(found))
        found = found.view(len(numbers), *self._shape)
        if not is_sparse.all():
            found[torch.from_numpy(~is_sparse)] = self._dense_rows(numbers[~is_sparse])
        return found.view(self._dtype)

    def column(self, device: torch.device) -> Column:
        """All rows as a column in one form, on a device. The builder can still be read, but holds no other rows.

        Raises:
            KeyError: a row is not there.
        """
        if self._dtype is None or not self.is_complete:
            raise KeyError(f"{self.num_rows - len(self)} of {self.num_rows} rows are not there")
        self._unify()
        if self._dense is not None:
            return DenseColumn(self._dense, self._dtype).to(device)
        assert self._sparse is not None
        ids, offsets, bits = self._sparse.in_order()
        values = None if bits is None else torch.from_numpy(bits).view(carrier(self._dtype))
        ids, offsets = torch.from_numpy(ids), torch.from_numpy(offsets)
        return SparseColumn(ids, offsets, values, dtype=self._dtype, shape=self._shape, device=device)

    def tables(self) -> dict[str, Tensor]:
        """What `restored` makes the builder of again; rows that are not there are zeros.

        "rows", [num_rows, ...]; or "ids", "offsets" and, unless all entries are 1, "values", of all rows in order.
        """
        self._unify()
        if self._dense is not None:
            self._dense[torch.from_numpy(self._form == _MISSING)] = 0  # memory that was never written to
            return {"rows": self._dense}
        assert self._sparse is not None
        ids, offsets, bits = self._sparse.in_order()
        found = {"ids": torch.from_numpy(ids), "offsets": torch.from_numpy(offsets)}
        return found if bits is None else {**found, "values": torch.from_numpy(bits)}

    @classmethod
    def restored(
        cls, is_there: np.ndarray, dtype: torch.dtype, shape: Sequence[int], tables: dict[str, Tensor]
    ) -> ColumnBuilder:
        """The builder that has these tables, which are not copied.

        Args:
            is_there: for each row, whether it is there, [num_rows], bool.
            dtype: of rows.
            shape: of a row.
            tables: see `tables`.

        Raises:
            DataError: they are not those of a builder of such rows.
        """
        made = cls(len(is_there))
        made._check(np.arange(0), torch.empty((0, *shape), dtype=dtype))
        made._range = None
        if set(tables) == {"rows"}:
            rows = tables["rows"]
            if rows.shape != (made.num_rows, *shape) or rows.dtype not in (carrier(dtype), *_INTEGERS[:-1]):
                raise DataError(f"the table is {rows.dtype} of shape {list(rows.shape)}")
            if rows.dtype != carrier(dtype):
                limits = torch.iinfo(rows.dtype)
                made._range = limits.min, limits.max
            made._dense, made._num_dense_entries = rows, rows.numel()
            made._form[is_there] = _DENSE
            return made
        if set(tables) - {"values"} != {"ids", "offsets"} or tables["ids"].dtype != torch.int32:
            raise DataError(f"the tables are {sorted(tables)}")
        ids, offsets = tables["ids"].numpy(), checked_offsets(tables["offsets"], len(tables["ids"])).numpy()
        _check_ids(ids, offsets, made._num_values)
        if len(offsets) != made.num_rows + 1:
            raise DataError(f"{len(offsets)} offsets for {made.num_rows} rows")
        bits = tables.get("values")
        if bits is not None and (len(bits) != len(ids) or bits.dtype != _BITS[carrier(dtype).itemsize]):
            raise DataError(f"{len(bits)} values of {bits.dtype} for {len(ids)} ids")
        made._sparse = _SparseRows(made.num_rows, made._num_values, made._one)
        made._sparse.set(ids, offsets, None if bits is None else bits.numpy())
        made._form[is_there] = _SPARSE
        return made

    @property
    def row_dtype(self) -> torch.dtype | None:
        """The dtype of rows; None before there is one."""
        return self._dtype

    @property
    def row_shape(self) -> torch.Size:
        """The shape of a row."""
        return self._shape

    def _check(self, numbers: np.ndarray, batch: Tensor) -> None:
        if batch.device.type != "cpu" or batch.layout != torch.strided or batch.ndim == 0:
            raise RowsDifferError(f"rows are a {batch.layout} tensor of shape {list(batch.shape)} on {batch.device}")
        if len(batch) != len(numbers):
            raise RowsDifferError(f"{len(batch)} rows for {len(numbers)} row numbers")
        if self._dtype is None:
            self._dtype, self._shape = batch.dtype, batch.shape[1:]
            self._num_values = math.prod(self._shape)
            if not batch.dtype.is_complex:
                self._one = int(_bits(torch.ones(1).to(carrier(batch.dtype)))[0])
        if (batch.dtype, batch.shape[1:]) != (self._dtype, self._shape):
            raise RowsDifferError(
                f"rows are {batch.dtype} of shape {list(batch.shape[1:])}, those before {self._dtype} of shape "
                f"{list(self._shape)}"
            )

    def _keep(self, numbers: np.ndarray, batch: Tensor) -> None:
        bits = None if batch.dtype.is_complex else _bits(batch)
        places = None if bits is None else _places_of_few(bits)
        if bits is None or places is None:
            self._keep_dense(numbers, batch, batch.numel())
            return
        entries = bits[places]
        are_ones = self._are_ones(entries)
        if not are_ones:
            self._widen_range(torch.from_numpy(entries).view(batch.dtype))
        elif self._range is not None:
            self._range = min(self._range[0], 0), max(self._range[1], 1)
        if self._is_sparse_smaller(len(numbers), len(entries), are_ones=are_ones):
            self._keep_sparse(numbers, places, None if are_ones else entries)
        else:
            self._keep_dense(numbers, batch, len(entries), is_range_known=True)

    def _are_ones(self, entries: np.ndarray) -> bool:
        return bool((entries == self._one).all())

    def _widen_range(self, values: Tensor) -> None:
        if self._range is not None:
            found = _range_of(values)
            self._range = found and (min(self._range[0], found[0]), max(self._range[1], found[1]))

    def _is_sparse_smaller(self, num_rows: int, num_entries: int, *, are_ones: bool) -> bool:
        """Whether rows take at most half the memory as places and values that they take as a tensor."""
        dtype = carrier(self._dtype or torch.float32)
        has_values = not are_ones or (self._sparse is not None and self._sparse.values is not None)
        sparse = num_entries * (4 + (max(4, dtype.itemsize) if has_values else 0)) + 8 * num_rows
        return 2 * sparse <= num_rows * self._num_values * _narrowest(dtype, self._range).itemsize

    def _keep_sparse(self, numbers: np.ndarray, places: np.ndarray, entries: np.ndarray | None) -> None:
        if self._sparse is None:
            self._sparse = _SparseRows(self.num_rows, self._num_values, self._one)
        self._sparse.append(numbers, places, entries, _BITS[carrier(self._dtype or torch.float32).itemsize])
        self._form[numbers] = _SPARSE

    def _keep_dense(
        self, numbers: np.ndarray, batch: Tensor, num_entries: int, *, is_range_known: bool = False
    ) -> None:
        if not is_range_known:
            self._widen_range(batch)
        dtype = _narrowest(batch.dtype, self._range)
        if self._dense is None or self._dense.dtype != dtype:
            before, self._dense = self._dense, torch.empty((self.num_rows, *self._shape), dtype=dtype)
            for rows in self._blocks(np.flatnonzero(self._form == _DENSE)):
                assert before is not None
                index = torch.from_numpy(rows)
                self._dense.index_copy_(0, index, before.index_select(0, index).to(dtype))
        self._dense.index_copy_(0, torch.from_numpy(numbers), batch.to(dtype))
        self._num_dense_entries += num_entries
        self._form[numbers] = _DENSE

    def _dense_rows(self, numbers: np.ndarray) -> Tensor:
        assert self._dense is not None
        assert self._dtype is not None
        return self._dense.index_select(0, torch.from_numpy(numbers)).to(carrier(self._dtype))

    def _blocks(self, rows: np.ndarray) -> list[np.ndarray]:
        at_a_time = max(1, BLOCK_ENTRIES // max(1, self._num_values))
        return [rows[at : at + at_a_time] for at in range(0, len(rows), at_a_time)]

    def _unify(self) -> None:
        """Leaves one of `_dense` and `_sparse`."""
        if self._dense is None or self._sparse is None:
            return
        num_entries = self._num_dense_entries + self._sparse.num_entries
        are_ones = self._sparse.values is None and self._range is not None and self._range[0] >= 0 < 2 > self._range[1]
        to_sparse = self._is_sparse_smaller(self.num_rows, num_entries, are_ones=are_ones)
        for rows in self._blocks(np.flatnonzero(self._form == (_DENSE if to_sparse else _SPARSE))):
            block = self.get(rows).view(carrier(self._dtype or torch.float32))
            if to_sparse:
                bits = _bits(block)
                places = np.flatnonzero(bits)
                entries = bits[places]
                self._keep_sparse(rows, places, None if self._are_ones(entries) else entries)
            else:
                self._keep_dense(rows, block, 0, is_range_known=True)
        if to_sparse:
            self._dense = None
        else:
            self._sparse = None


_MISSING, _DENSE, _SPARSE = 0, 1, 2


class _SparseRows:
    """Rows as places and values of the entries that are not zero, in the order in which they were appended."""

    def __init__(self, num_rows: int, num_values: int, one: int) -> None:
        self.begins = np.zeros(num_rows, dtype=np.int64)
        self.lengths = np.zeros(num_rows, dtype=np.int64)
        self.num_entries = 0
        self._num_values = num_values
        self._one = one
        self._ids = np.empty(0, dtype=np.int32)
        self.values: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        of_entries = self._ids.nbytes + (0 if self.values is None else self.values.nbytes)
        return self.begins.nbytes + self.lengths.nbytes + of_entries

    def set(self, ids: np.ndarray, offsets: np.ndarray, values: np.ndarray | None) -> None:
        """Takes the entries of all rows, in the order of their numbers."""
        self.begins, self.lengths, self.num_entries = offsets[:-1], np.diff(offsets), len(ids)
        self._ids, self.values = ids, values

    def append(self, numbers: np.ndarray, places: np.ndarray, entries: np.ndarray | None, dtype: torch.dtype) -> None:
        """Adds rows.

        Args:
            numbers: of the rows.
            places: of their entries in the rows laid one after the other.
            entries: their bits; None: all are 1.
            dtype: of bits.
        """
        begins = np.arange(len(numbers) + 1) * self._num_values
        bounds = np.searchsorted(places, begins)
        lengths = np.diff(bounds)
        first, end = self.num_entries, self.num_entries + len(places)
        self.begins[numbers] = first + bounds[:-1]
        self.lengths[numbers] = lengths
        if entries is not None and self.values is None:
            self.values = np.full(len(self._ids), self._one, dtype=torch.empty(0, dtype=dtype).numpy().dtype)
        if end > len(self._ids):
            self._grow(end + end // 2)
        np.subtract(places, np.repeat(begins[:-1], lengths), out=self._ids[first:end], casting="unsafe")
        if self.values is not None:
            self.values[first:end] = self._one if entries is None else entries
        self.num_entries = end

    def _grow(self, size: int) -> None:
        for name in ("_ids", "values"):
            before: np.ndarray | None = getattr(self, name)
            if before is not None:
                grown = np.empty(size, dtype=before.dtype)
                grown[: self.num_entries] = before[: self.num_entries]
                setattr(self, name, grown)

    def write(self, numbers: np.ndarray, places: np.ndarray, bits: np.ndarray) -> None:
        """Writes the entries of rows where they belong: row i at `places[i]` of the rows, as bits, flat, zeros."""
        lengths = self.lengths[numbers]
        entries = _positions(self.begins[numbers], lengths)
        at = np.repeat(places * self._num_values, lengths)
        at += self._ids[entries]
        bits[at] = self._one if self.values is None else self.values[entries]

    def in_order(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Ids, offsets and values of all rows in the order of their numbers."""
        offsets = np.zeros(len(self.begins) + 1, dtype=np.int64)
        np.cumsum(self.lengths, out=offsets[1:])
        if not np.array_equal(self.begins, offsets[:-1]):
            self._sort(offsets)
        values = None if self.values is None else self.values[: self.num_entries]
        return self._ids[: self.num_entries], offsets, values

    def _sort(self, offsets: np.ndarray) -> None:
        for name in ("_ids", "values"):
            before: np.ndarray | None = getattr(self, name)
            if before is None:
                continue
            made = np.empty(self.num_entries, dtype=before.dtype)
            at = 0
            while at < len(self.begins):
                end = max(at + 1, int(np.searchsorted(offsets, offsets[at] + BLOCK_ENTRIES, side="right")) - 1)
                entries = _positions(self.begins[at:end], self.lengths[at:end])
                made[offsets[at] : offsets[end]] = before[entries]
                at = end
            setattr(self, name, made)
        self.begins = offsets[:-1]


def _positions(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers of the entries of rows, row by row."""
    ends = lengths.cumsum()
    positions = np.repeat(begins - ends + lengths, lengths)
    positions += np.arange(len(positions))
    return positions


def _places_of_few(bits: np.ndarray) -> np.ndarray | None:
    """The places of what is not zero, rising; None where that is over a quarter."""
    # Words of 8 bytes first, of which there are fewer: 0.3 ms for [128, 5317] float32 with 66 entries a row, where
    # numpy's flatnonzero of the values takes 0.6 and torch's nonzero 1.9 (Xeon with AMX, one thread).
    in_word = 8 // bits.itemsize
    num_words = len(bits) // in_word
    is_word = bits[: num_words * in_word].view(np.int64) != 0
    if 4 * np.count_nonzero(is_word) > len(bits):
        return None
    words = np.flatnonzero(is_word)
    rest = np.arange(num_words * in_word, len(bits))
    places = np.concatenate([(words[:, None] * in_word + np.arange(in_word)).ravel(), rest])
    places = places[bits[places] != 0]
    return None if 4 * len(places) > len(bits) else places
