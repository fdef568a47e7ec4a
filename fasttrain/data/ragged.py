"""Rows of unequal length without padding, and the gather that reorders them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from fasttrain.errors import DataError

__all__ = ["Ragged", "RaggedTable", "data_tensor"]

_OFFSET_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


class Ragged(NamedTuple):
    """A batch of rows of unequal length, one after the other: row i is `values[offsets[i] : offsets[i + 1]]`.

    A named tuple, so that every tool that walks tuples of tensors (prefetch, pytree) walks this too.

    Attributes:
        values: [num_values, ...], the rows' entries, row by row, of any dtype.
        offsets: [num_rows + 1], int64, rising from 0 to num_values.
    """

    values: Tensor
    offsets: Tensor

    @classmethod
    def of_lengths(cls, values: Tensor, lengths: Tensor) -> Ragged:
        """Rows of these lengths, [num_rows], int64, which add up to num_values."""
        return cls(values, F.pad(lengths.cumsum(0), (1, 0)))

    @property
    def num_rows(self) -> int:
        """Rows in the batch."""
        return self.offsets.shape[0] - 1


def data_tensor(column: object) -> Tensor:
    """Return a column of data as a tensor of the same values, on the device where it is.

    A tensor shares its memory with the result, an array does where torch can read it as it is. Unsigned integers of 16
    and 32 bits, which torch cannot gather, become int32 and int64. Nothing else changes its dtype.

    Raises:
        DataError: it is no tensor or numpy array, has no dimension, holds no numbers, masks some of them, is not dense,
            or requires gradients.
    """
    if isinstance(column, np.ndarray):
        return _widened(_from_array(column))
    if not isinstance(column, Tensor):
        raise DataError(f"a column is a {type(column).__name__}: give a tensor, a numpy array or a Ragged")
    if column.layout != torch.strided or column.is_nested or column.is_quantized:
        raise DataError("a column is a sparse, nested or quantized tensor: give a dense one, or a Ragged")
    if column.device.type == "meta":
        raise DataError("a column is a tensor on the meta device: it holds no data")
    if column.requires_grad:
        raise DataError("a column requires gradients: resident data are not trained; give tensor.detach()")
    _refuse_no_rows(column.ndim)
    return _widened(column.detach())


def _from_array(array: np.ndarray) -> Tensor:
    if np.ma.isMaskedArray(array):
        if np.ma.is_masked(array):
            raise DataError("a column is an array with masked values: fill them in, or leave out their rows")
        array = np.ma.getdata(array)
    _refuse_no_rows(array.ndim)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    try:
        return torch.from_numpy(np.require(array, requirements=("C", "W")))
    except (TypeError, ValueError) as error:
        raise DataError(
            f"an array of dtype {array.dtype}: a resident table holds numbers only; convert the column or leave it out"
        ) from error


def _refuse_no_rows(num_dimensions: int) -> None:
    if num_dimensions == 0:
        raise DataError("a column is a single number: the first dimension must be the rows")


def _widened(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.uint64:
        raise DataError("a column is uint64, which torch cannot gather: convert it to int64 if its values fit")
    return tensor.to({torch.uint16: torch.int32, torch.uint32: torch.int64}.get(tensor.dtype, tensor.dtype))


class RaggedTable:
    """All rows of a dataset, resident on one device, from which batches are gathered in any order.

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
        offsets = _checked_offsets(rows.offsets, len(values))
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

    def gather(self, rows: Tensor, host_rows: np.ndarray, batch_size: int) -> list[Ragged]:
        """Batches of `batch_size` rows (the last may be shorter), in the order of `rows`, without a host read.

        Args:
            rows: [n], int64 row numbers on this table's device.
            host_rows: the same row numbers on the host: they tell where batches begin and end.
            batch_size: rows in a batch.
        """
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

    def _take_bytes(self, host_rows: np.ndarray) -> Tensor:
        _, _, data = self._rows_as_bytes.take(pa.array(host_rows)).buffers()
        values = self.all_rows.values
        if data is None or data.size == 0:
            return values[:0]
        taken = torch.from_numpy(np.frombuffer(data, dtype=np.uint8)).view(values.dtype)
        return taken if values.ndim == 1 else taken.view(-1, *values.shape[1:])


def _checked_offsets(given: object, num_values: int) -> Tensor:
    """Return a copy of a `Ragged`'s offsets, int64, on the host. Waits for their device."""
    if not isinstance(given, Tensor | np.ndarray):
        raise DataError(f"Ragged offsets are a {type(given).__name__}: give an int64 tensor, [num_rows + 1]")
    offsets = torch.as_tensor(given)
    if offsets.layout != torch.strided or offsets.ndim != 1 or offsets.dtype not in _OFFSET_DTYPES:
        raise DataError(
            f"Ragged offsets are {offsets.dtype} of shape {list(offsets.shape)}: give an int64 tensor, [num_rows + 1]"
        )
    host = offsets.detach().to("cpu", torch.int64, copy=True)  # HOST READ: once, when the data are placed
    if not len(host):
        raise DataError("Ragged offsets are empty: they are one more than the rows, and begin with 0")
    if host[0] != 0 or host[-1] != num_values:
        raise DataError(
            f"Ragged offsets go from {int(host[0])} to {int(host[-1])}: they must begin at 0 and end at {num_values}, "
            "the number of values"
        )
    falls = torch.nonzero(host.diff() < 0)
    if len(falls):
        row = int(falls[0])
        raise DataError(
            f"Ragged offsets fall from {int(host[row])} to {int(host[row + 1])} at row {row}: each row must end where "
            "it begins or later"
        )
    return host


def batch_offsets(lengths: np.ndarray, batch_size: int, device: torch.device) -> list[Tensor]:
    """For each batch, where its rows begin and end in it, without a host read.

    Args:
        lengths: [n], int64, the rows' lengths, batch after batch.
        batch_size: rows in a batch; the last may be shorter.
        device: where the offsets go.

    Returns:
        [rows + 1], int64, for each batch.
    """
    num_batches = -(-len(lengths) // batch_size)
    padded = np.zeros(num_batches * batch_size, dtype=np.int64)
    padded[: len(lengths)] = lengths
    offsets = np.zeros((num_batches, batch_size + 1), dtype=np.int64)
    np.cumsum(padded.reshape(num_batches, batch_size), axis=1, out=offsets[:, 1:])
    placed = torch.from_numpy(offsets)
    if device.type == "cuda":
        placed = placed.pin_memory().to(device, non_blocking=True)
    last = len(lengths) - (num_batches - 1) * batch_size
    *whole, tail = placed.unbind()
    return [*whole, tail[: last + 1]]


def gather_by_index(ids: Tensor, offsets: Tensor, rows: Tensor, num_values: int) -> Tensor:
    """The entries of `rows`, row by row, by index arithmetic on the device alone.

    Args:
        ids: [total], all entries.
        offsets: [num_rows + 1], int64, where each row begins.
        rows: [n], int64, the rows wanted.
        num_values: how many entries these rows have together (known to the host, so that nothing waits).

    Returns:
        [num_values].
    """
    begins = offsets.index_select(0, rows)
    lengths = offsets.index_select(0, rows + 1) - begins
    ends = lengths.cumsum(0)
    shift = torch.repeat_interleave(begins - ends + lengths, lengths, output_size=num_values)
    position = torch.arange(num_values, device=ids.device)
    return ids.index_select(0, shift.add_(position))
