"""What a traced step takes for granted, and the check before every step that it still holds.

A traced graph remembers nothing of Python: a changed option, mode or tensor would keep its old meaning in silence.
What no guard can see is Python state of the user's own: an attribute or a closed-over object that forward reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor, get_default_dtype, is_autocast_enabled, is_grad_enabled

from fasttrain.data.ragged import Ragged
from fasttrain.errors import EngineError
from fasttrain.step.spec import StepSpec
from fasttrain.step.torch_private import module_tables, optimizer_hooks

__all__ = ["BatchLayout", "Guards"]

Batch = Any
Structure = tuple[Any, ...]

_LEAF: Structure = ("tensor",)
_CONSTANTS = (int, float, str, bytes, type(None), torch.dtype, torch.device)
_FREE_OPTIONS = frozenset({"params", "param_names", "lr", "initial_lr"})
"""What may change in a parameter group: rates are inputs of the graph, the rest is not read by a step."""


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
        return leaves if _structure(batch, leaves) == self._structure else None

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
    return kind(**values) if dataclasses.is_dataclass(kind) else kind(values)


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


_END = object()


class Guards:
    """What a traced step takes for granted besides its tensors' shapes and types and the batch's layout.

    The check runs before every step, so it is made of few loops, and those run in C.

    Args:
        spec: the step.
    """

    def __init__(self, spec: StepSpec) -> None:
        self._empty = list(_must_stay_empty(spec))
        self._empty_tables = [table for _, table in self._empty]
        self._objects = list(_must_stay_the_same_objects(spec))
        self._read_objects = [read for _, read in self._objects]
        self._expected = [*self._current(), _END]
        self._values = [(read, read(), reason) for reason, read in _must_stay_equal(spec)]

    def mismatch(self) -> str | None:
        """What has changed since the trace, None where nothing has. Makes no host read."""
        if any(self._empty_tables):
            return next(reason for reason, table in self._empty if table)
        # The end mark, once met, shows that neither of the two is longer.
        if not all(map(is_, chain(self._current(), (_END,)), self._expected)):
            return self._changed_objects()
        for read, expected, reason in self._values:
            if read() != expected:
                return reason
        return None

    def agree(self, other: Guards) -> bool:
        """True where the two differ in nothing but which objects hold the values (as after `load_state_dict`)."""
        return [expected for _, expected, _ in self._values] == [expected for _, expected, _ in other._values]

    def _current(self) -> Iterator[Any]:
        return chain.from_iterable([read() for read in self._read_objects])

    def _changed_objects(self) -> str:
        expected = iter(self._expected)
        for reason, read in self._objects:
            if not all(map(is_, read(), expected)):
                return reason
        return self._objects[-1][0]


def _must_stay_empty(spec: StepSpec) -> Iterator[tuple[str, Any]]:
    for hooks in optimizer_hooks(spec.optimizer):
        yield "a hook of the optimizer", hooks
    for table in _tables(spec, are_filled=False):
        yield "a new parameter, buffer or hook of the model", table


def _must_stay_the_same_objects(spec: StepSpec) -> Iterator[tuple[str, Callable[[], Iterable[Any]]]]:
    optimizer, metrics = spec.optimizer, spec.metrics
    parameters = [group["params"] for group in optimizer.param_groups]
    tables = list(_tables(spec, are_filled=True))
    yield "the parameter groups", lambda: optimizer.param_groups
    yield "the parameters of a group", lambda: chain.from_iterable(parameters)
    yield "a module, parameter, buffer or hook of the model", lambda: chain.from_iterable(map(dict.values, tables))
    yield "the optimizer's state", lambda: chain.from_iterable(map(dict.values, optimizer.state.values()))
    yield "the running metrics", lambda: (metrics.totals, *metrics.user_metrics.values())


def _must_stay_equal(spec: StepSpec) -> Iterator[tuple[str, Callable[[], Any]]]:
    metrics, kind = spec.metrics, spec.device.type
    trained = list(spec.trained())
    modules = list(spec.model.modules())
    for group in spec.optimizer.param_groups:
        yield "an option of a parameter group", _options_of(group)
    yield "train or eval mode of a module", lambda: [module.training for module in modules]
    yield "a gradient that was there before the step", lambda: [parameter.grad is None for parameter in trained]
    # Inference mode and the dtype of autocast show in the tensors' own guards.
    yield (
        "the rule of accuracy, grad mode, autocast or torch's default dtype",
        lambda: (metrics.rule, is_grad_enabled(), is_autocast_enabled(kind), get_default_dtype()),
    )


def _options_of(group: dict[str, Any]) -> Callable[[], Any]:
    """Reads the options of one parameter group that a step may depend on; those that are tensors, by identity."""
    names = [name for name in group if name not in _FREE_OPTIONS]
    tensors = [name for name in names if isinstance(group[name], Tensor)]
    # Two names at least, so that itemgetter always gives a tuple.
    values = itemgetter("params", "params", *[name for name in names if name not in tensors])
    # A list of parameters equals itself at once; that its content is the same is checked elsewhere.
    return lambda: (len(group), values(group), [id(group[name]) for name in tensors])


def _tables(spec: StepSpec, *, are_filled: bool) -> Iterator[dict[str, Any]]:
    for module in spec.model.modules():
        yield from (table for table in module_tables(module) if bool(table) is are_filled)
