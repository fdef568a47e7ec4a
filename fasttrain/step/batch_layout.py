"""How a batch is made of tensors, so that a graph can be given them one by one."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections import UserDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fasttrain.data.batch import tensors
from fasttrain.data.ragged import Ragged
from fasttrain.errors import EngineError
from fasttrain.step.state import why_not_plain

__all__ = ["BatchLayout", "Member", "Path", "leaves_of", "path_name", "refuse_unplain"]

Batch = Any


class Member(NamedTuple):
    """The step of a path that is an attribute: of a dataclass, or one that was set on a tensor or container."""

    name: str


Path = tuple[Any, ...]
"""Where something is in a batch: keys of mappings, positions in tuples and lists, `Member`s."""


def path_name(path: Path) -> str:
    """A path as Python code: "batch['meta'][0].name"."""
    return "batch" + "".join(f".{step.name}" if isinstance(step, Member) else f"[{step!r}]" for step in path)


def leaves_of(batch: Batch) -> dict[Path, Any]:
    """All that is in a batch and is no container, by path: tensors, plain values and any other object."""
    return dict(_leaves(batch, ()))


def refuse_unplain(batch: Batch) -> None:
    """Checks the tensors of a batch alone, before anything asks for their sizes.

    Raises:
        EngineError: one is sparse, nested, quantized or of a class of its own.
    """
    for each in tensors(batch):
        why = None if isinstance(each, Ragged) else why_not_plain(each)
        if why is not None:
            raise EngineError(f"the batch holds a tensor that {why}: only dense (strided) tensors are traced")


class BatchLayout:
    """How a batch is made of tensors and other values: tuples, lists, mappings and dataclasses, nested in any way.

    A layout is the key of a traced step: another batch fits where its containers have the types, lengths and names of
    the example's, and each value that is no tensor is the same. What forward is known never to read may be left out.

    Args:
        batch: an example. The number of values of a `Ragged` in it is left open; every other size is fixed.
        unread: the paths of what forward does not read; of a container, with all that it holds. Whatever is there, of
            any type, fits, and tensors there are no inputs. `rebuild` puts None in its place.

    Attributes:
        paths: where the tensors of the batch are, in order.
        open_dims: for each of them, the dimensions whose size may vary.

    Raises:
        EngineError: forward may read something that is neither a dense tensor nor a value that can be compared.
    """

    def __init__(self, batch: Batch, unread: Collection[Path] = ()) -> None:
        self.paths: list[Path] = []
        self.open_dims: list[frozenset[int]] = []
        self._root = self._part(batch, (), frozenset(unread))

    def flatten(self, batch: Batch) -> list[Tensor] | None:
        """The batch's tensors in order, None where the batch is not laid out like the example."""
        leaves: list[Tensor] = []
        return leaves if self._root.collect(batch, leaves) else None

    def rebuild(self, leaves: Sequence[Tensor]) -> Batch:
        """A batch like the example, of these tensors."""
        return self._root.rebuild(iter(leaves))

    def _part(self, value: Any, path: Path, unread: frozenset[Path], *, is_open: bool = False) -> _Part:
        if path in unread:
            return _Unread()
        own = {Member(name): each for name, each in _own_attributes(value).items()}
        attributes = {step.name: self._part(each, (*path, step), unread) for step, each in own.items()}
        if isinstance(value, Tensor):
            why = why_not_plain(value)
            if why is not None:
                raise EngineError(f"{path_name(path)} {why}: a compiled step takes dense (strided) tensors only")
            self.paths.append(path)
            self.open_dims.append(frozenset({0}) if is_open else frozenset())
            return _Leaf(attributes)
        children = _children(value)
        if children is not None:
            is_ragged = isinstance(value, Ragged)
            parts = [
                self._part(child, (*path, step), unread, is_open=is_ragged and step == 0)
                for step, child in children.items()
            ]
            return _Container(type(value), tuple(children), parts, attributes)
        key = _key(value)
        if key is None:
            raise EngineError(
                f"{path_name(path)} is {type(value).__name__}: in a batch, a compiled step takes tensors, numbers, "
                "strings, None and enums, in tuples, lists, mappings and dataclasses; this one holds a "
                f"{type(value).__name__}"
            )
        return _Value(key, value)


class _Part(ABC):
    """A part of a layout."""

    @abstractmethod
    def collect(self, value: Any, leaves: list[Tensor]) -> bool:
        """Appends the tensors of a value to `leaves`; False where it is not like the example."""

    @abstractmethod
    def rebuild(self, leaves: Iterator[Tensor]) -> Any:
        """A value like the example, of these tensors."""


class _Unread(_Part):
    def collect(self, value: Any, leaves: list[Tensor]) -> bool:  # noqa: ARG002
        return True

    def rebuild(self, leaves: Iterator[Tensor]) -> Any:  # noqa: ARG002
        return None


class _Value(_Part):
    def __init__(self, key: object, value: object) -> None:
        self._key, self._value = key, value

    def collect(self, value: Any, leaves: list[Tensor]) -> bool:  # noqa: ARG002
        return _key(value) == self._key

    def rebuild(self, leaves: Iterator[Tensor]) -> Any:  # noqa: ARG002
        return self._value


class _Leaf(_Part):
    def __init__(self, attributes: dict[str, _Part]) -> None:
        self._attributes = attributes

    def collect(self, value: Any, leaves: list[Tensor]) -> bool:
        # This runs before every step; the check of the inputs, which follows, notices any other tensor.
        if (type(value) is not Tensor and type(value) is not nn.Parameter) or value.layout is not torch.strided:
            return False
        if not self._attributes and not value.__dict__:
            leaves.append(value)
            return True
        # After those of the attributes, as in the constructor.
        is_like = _collect_attributes(value, self._attributes, leaves)
        leaves.append(value)
        return is_like

    def rebuild(self, leaves: Iterator[Tensor]) -> Any:
        attributes = {name: part.rebuild(leaves) for name, part in self._attributes.items()}
        leaf = next(leaves)
        vars(leaf).update(attributes)
        return leaf


class _Container(_Part):
    def __init__(
        self, kind: type[Any], steps: tuple[Any, ...], parts: list[_Part], attributes: dict[str, _Part]
    ) -> None:
        self._kind, self._steps, self._parts, self._attributes = kind, steps, parts, attributes

    def collect(self, value: Any, leaves: list[Tensor]) -> bool:
        kind = self._kind
        if type(value) is not kind:
            return False
        if kind is tuple or kind is list or kind is dict:  # by far the most frequent, and this runs before every step
            if len(value) != len(self._parts) or (kind is dict and tuple(value) != self._steps):
                return False
            for part, child in zip(self._parts, value.values() if kind is dict else value, strict=True):
                if not part.collect(child, leaves):
                    return False
            return True
        if not _collect_attributes(value, self._attributes, leaves):
            return False
        children = _children(value)
        return (
            children is not None
            and tuple(children) == self._steps
            and all(part.collect(child, leaves) for part, child in zip(self._parts, children.values(), strict=True))
        )

    def rebuild(self, leaves: Iterator[Tensor]) -> Any:
        attributes = {name: part.rebuild(leaves) for name, part in self._attributes.items()}
        values = [part.rebuild(leaves) for part in self._parts]
        kind = self._kind
        if issubclass(kind, tuple | list):
            result = kind(*values) if hasattr(kind, "_fields") else kind(values)
        elif issubclass(kind, Mapping):
            make: Any = kind
            result = make(dict(zip(self._steps, values, strict=True)))
        else:
            result = object.__new__(kind)  # not by the constructor, which may check, convert or count
            for step, each in zip(self._steps, values, strict=True):
                object.__setattr__(result, step.name, each)  # frozen ones too
        if attributes:
            vars(result).update(attributes)
        return result


def _collect_attributes(value: Any, attributes: dict[str, _Part], leaves: list[Tensor]) -> bool:
    own = _own_attributes(value)
    return own.keys() == attributes.keys() and all(part.collect(own[name], leaves) for name, part in attributes.items())


def _leaves(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    for name, each in _own_attributes(value).items():
        yield from _leaves(each, (*path, Member(name)))
    children = None if isinstance(value, Tensor) else _children(value)
    if children is None:
        yield path, value
        return
    for step, child in children.items():
        yield from _leaves(child, (*path, step))


def _children(value: Any) -> dict[Any, Any] | None:
    """What a container holds by the next step of a path, None of what is none."""
    if isinstance(value, tuple | list):
        return dict(enumerate(value))
    if isinstance(value, Mapping):
        return dict(value.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {Member(field.name): getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


_NO_ATTRIBUTES: dict[str, Any] = {}


def _own_attributes(value: Any) -> dict[str, Any]:
    """Attributes that were set on a tensor, or on a container beside what it holds: forward may read those too."""
    kind = type(value)
    if kind is dict or kind is tuple or kind is list or isinstance(value, Enum):
        return _NO_ATTRIBUTES
    found = getattr(value, "__dict__", None)
    if not found:
        return _NO_ATTRIBUTES
    if isinstance(value, Tensor):
        return {name: each for name, each in found.items() if not name.startswith("_dynamo")}  # torch's own notes
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name for field in dataclasses.fields(value)}
        return {name: each for name, each in found.items() if name not in fields}
    if isinstance(value, tuple | list | Mapping):
        held = "data" if isinstance(value, UserDict) else ""
        return {name: each for name, each in found.items() if name != held}
    return _NO_ATTRIBUTES


_EXACT = (bool, int, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


def _key(value: Any) -> object:
    """What is equal exactly for equal values of one type (0.0 is not -0.0, NaN is NaN); None where it is not known."""
    kind = type(value)
    if kind in _EXACT:
        return kind, value
    if kind is float:
        return kind, value.hex()
    if kind is complex:
        return kind, value.real.hex(), value.imag.hex()
    if isinstance(value, np.generic) and not value.dtype.hasobject:
        return kind, value.dtype.str, value.tobytes()
    if isinstance(value, Enum):
        return kind, id(value)
    return None
