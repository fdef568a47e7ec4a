"""What a batch is: tensors in tuples, lists, dicts, dataclasses or attributes of an object, nested at will."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from operator import is_
from types import ModuleType
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fasttrain.data.ragged import Ragged
from fasttrain.errors import DataError

__all__ = ["map_tensors", "num_samples", "tensors"]


def tensors(batch: Any) -> Iterator[Tensor | Ragged]:
    """The tensors of a batch, in order; a `Ragged` counts as one. Anything else in it is passed over."""
    for each in _leaves(batch):
        yield from (value for value in each if value is not None) if isinstance(each, PackedSequence) else (each,)


def num_samples(batch: Any) -> int:
    """Samples in a batch, by the first tensor in it: the size of its first dimension.

    Of a `Ragged` these are the rows, of a `PackedSequence` the sequences.

    Raises:
        DataError: there is no tensor in the batch.
    """
    first = next(_leaves(batch), None)
    if first is None:
        raise DataError(f"a batch must hold at least one tensor; this one is a {type(batch).__name__} without any")
    if isinstance(first, Ragged):
        return first.num_rows
    if isinstance(first, PackedSequence):
        return int(first.batch_sizes[0])  # it is on the host, always
    return first.size(0) if first.dim() else 1  # a nested tensor has no shape


def _leaves(batch: Any) -> Iterator[Tensor | Ragged | PackedSequence]:
    if isinstance(batch, Tensor | Ragged | PackedSequence):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _leaves(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from _leaves(value)
    elif is_dataclass(batch):
        for field in fields(batch):
            yield from _leaves(getattr(batch, field.name))
    else:
        for value in _attributes(batch).values():
            yield from _leaves(value)


def _attributes(batch: Any) -> dict[str, Any]:
    """The attributes of an object of the user's class that hold tensors, themselves or in containers.

    Objects among its attributes are passed over: they may hold anything, such as the dataset.
    """
    own: dict[str, Any] | None = getattr(batch, "__dict__", None)
    if not own or isinstance(batch, type | ModuleType | nn.Module) or callable(batch):
        return {}
    return {
        name: value
        for name, value in own.items()
        if isinstance(value, Tensor | Ragged | PackedSequence | Mapping | list | tuple) or is_dataclass(value)
    }


def map_tensors(node: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """Moves every tensor below `node`; a container in which nothing moved is returned itself."""
    if isinstance(node, Tensor):
        return move(node)
    if isinstance(node, (dict, MutableMapping)):  # dict first: the abstract class is slow to ask
        old = list(cast("MutableMapping[Any, Any]", node).values())
    elif isinstance(node, PackedSequence):
        old = [node.data, node.sorted_indices, node.unsorted_indices]  # its batch_sizes must stay on the host
    elif isinstance(node, (list, tuple)):
        old = cast("Sequence[Any]", node)
    elif is_dataclass(node) and not isinstance(node, type):
        old = [getattr(node, entry.name) for entry in fields(node)]
    elif not (old := list(_attributes(node).values())):
        return node
    new = [map_tensors(child, move) for child in old]
    return node if all(map(is_, new, old)) else _rebuilt(node, new)


def _rebuilt(node: Any, new: list[Any]) -> Any:
    """A shallow copy of a container, of its own type, with new children."""
    if isinstance(node, PackedSequence):
        return PackedSequence(new[0], node.batch_sizes, new[1], new[2])
    if isinstance(node, tuple):
        return getattr(node, "_make", cast("Callable[[list[Any]], Any]", type(node)))(new)
    result = copy.copy(node)  # not by the constructor, which may check, convert or count
    if isinstance(node, MutableMapping):
        for key, child in zip(cast("MutableMapping[Any, Any]", node), new, strict=True):
            result[key] = child
    elif isinstance(node, list):
        result[:] = new
    elif not is_dataclass(node):
        vars(result).update(zip(_attributes(node), new, strict=True))
    else:
        for entry, child in zip(fields(node), new, strict=True):
            object.__setattr__(result, entry.name, child)  # frozen ones too
    return result
