"""How a batch is made of tensors, so that a graph can be given them one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fasttrain.data.ragged import Ragged
from fasttrain.errors import EngineError

__all__ = ["BatchLayout"]

Batch = Any
Structure = tuple[Any, ...]

_LEAF: Structure = ("tensor",)
_CONSTANTS = (int, float, str, bytes, type(None), torch.dtype, torch.device)


class BatchLayout:
    """How a batch is made of tensors: tuples, lists, mappings and dataclasses, nested as the user likes.

    Args:
        batch: an example. The number of values of a `Ragged` in it is left open; every other size is fixed.

    Attributes:
        open_dims: for each tensor of the batch, the dimensions whose size may vary.

    Raises:
        EngineError: there is something in the batch that is neither a tensor, a plain constant nor one of these.
    """

    def __init__(self, batch: Batch) -> None:
        self._structure = _structure(batch, [])
        self.open_dims = list(_open_dims(self._structure))

    def flatten(self, batch: Batch) -> list[Tensor] | None:
        """The batch's tensors in order, None where the batch is not laid out like the example."""
        leaves: list[Tensor] = []
        try:
            return leaves if _structure(batch, leaves) == self._structure else None
        except EngineError:  # it holds what no traced batch can
            return None

    def rebuild(self, leaves: Sequence[Tensor]) -> Batch:
        """A batch like the example, of these tensors."""
        return _rebuild(self._structure, iter(leaves))


def _structure(value: Any, leaves: list[Tensor]) -> Structure:
    if isinstance(value, Tensor):
        leaves.append(value)
        return _LEAF
    kind = type(value)
    if isinstance(value, tuple | list):
        return (kind, *[_structure(child, leaves) for child in value])
    if isinstance(value, _CONSTANTS):
        return ("constant", kind, value)
    if isinstance(value, Mapping):
        return (kind, tuple(value), *[_structure(child, leaves) for child in value.values()])
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return (kind, tuple(names), *[_structure(getattr(value, name), leaves) for name in names])
    raise EngineError(
        f"a compiled step takes batches of tensors and plain constants in tuples, lists, mappings and dataclasses; "
        f"this one holds a {kind.__name__}"
    )


def _rebuild(structure: Structure, leaves: Iterator[Tensor]) -> Any:
    kind, *children = structure
    if structure == _LEAF:
        return next(leaves)
    if kind == "constant":
        return structure[2]
    if issubclass(kind, tuple | list):
        values = [_rebuild(child, leaves) for child in children]
        return kind(*values) if hasattr(kind, "_fields") else kind(values)
    values = dict(zip(children[0], [_rebuild(child, leaves) for child in children[1:]], strict=True))
    make: Any = kind
    return make(values) if issubclass(kind, Mapping) else make(**values)


def _open_dims(structure: Structure) -> Iterator[frozenset[int]]:
    if structure == _LEAF:
        yield frozenset()
        return
    kind, *children = structure
    if kind == "constant":
        return
    is_named = not issubclass(kind, tuple | list)
    for index, child in enumerate(children[1:] if is_named else children):
        dims = list(_open_dims(child))
        yield from [frozenset({0})] if issubclass(kind, Ragged) and index == 0 else dims
