"""What a batch is: tensors in tuples, lists, dicts or dataclasses, nested as the user likes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from fasttrain.data.ragged import Ragged
from fasttrain.errors import DataError

__all__ = ["num_samples", "tensors"]


def tensors(batch: Any) -> Iterator[Tensor | Ragged]:
    """The tensors of a batch, in order; a `Ragged` counts as one. Anything else in it is passed over."""
    if isinstance(batch, Tensor | Ragged):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from tensors(value)
    elif dataclasses.is_dataclass(batch):
        for field in dataclasses.fields(batch):
            yield from tensors(getattr(batch, field.name))


def num_samples(batch: Any) -> int:
    """Samples in a batch: the size of its first tensor's first dimension (rows, for a `Ragged`).

    Raises:
        DataError: there is no tensor in the batch.
    """
    first = next(tensors(batch), None)
    if first is None:
        raise DataError(f"a batch must hold at least one tensor; this one is a {type(batch).__name__} without any")
    if isinstance(first, Ragged):
        return first.lengths.shape[0]
    return first.shape[0] if first.dim() else 1
