"""Rows of unequal length without padding, as a batch has them, and the arithmetic of their offsets."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fasttrain.errors import DataError

__all__ = ["Ragged", "batch_offsets", "checked_offsets", "data_tensor", "gather_by_index"]

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


def checked_offsets(given: object, num_values: int) -> Tensor:
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
