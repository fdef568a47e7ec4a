"""What a traced step takes for granted, and the check before every step that it still holds.

A traced graph remembers nothing of Python: a changed option, mode or tensor would keep its old meaning in silence.
What no guard can see is Python state of the user's own: an attribute or a closed-over object that forward reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

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


Probe = Callable[[], Any]


class Guards:
    """What a traced step takes for granted besides its tensors' shapes and types and the batch's layout.

    One check costs 7 us for a model of four modules under Adam (one thread of a Xeon with AMX).

    Args:
        spec: the step.
        tensors: the tensors that the graph reads and changes; kept alive, so that identities stay meaningful.
    """

    def __init__(self, spec: StepSpec, tensors: Sequence[Tensor]) -> None:
        self._tensors = tuple(tensors)
        probes = (*_optimizer_probes(spec), *_model_probes(spec), *_other_probes(spec))
        self._checks = [(probe, probe(), reason) for reason, probe, _ in probes]
        self._values = [expected for (_, expected, _), (*_, is_identity) in zip(self._checks, probes, strict=True) if not is_identity]

    def mismatch(self) -> str | None:
        """What has changed since the trace, None where nothing has. Makes no host read."""
        for probe, expected, reason in self._checks:
            if probe() != expected:
                return reason
        return None

    def agree(self, other: Guards) -> bool:
        """True where the two differ in nothing but which objects hold the values (as after `load_state_dict`)."""
        return self._values == other._values


def _optimizer_probes(spec: StepSpec) -> Iterator[tuple[str, Probe, bool]]:
    optimizer = spec.optimizer
    trained = list(spec.trained())
    hooks = optimizer_hooks(optimizer)
    options = [_OptionsOf(group) for group in optimizer.param_groups]

    def groups() -> Any:
        return [(id(group), *map(id, group["params"])) for group in optimizer.param_groups]

    yield "the parameter groups", groups, True
    yield "an option of a parameter group", lambda: [read() for read in options], False
    yield "the optimizer's state", lambda: _identities(optimizer.state.values()), True
    yield "a hook of the optimizer", lambda: any(hooks), False
    yield "a gradient that was there before the step", lambda: [p.grad is None for p in trained], False


class _OptionsOf:
    """Reads the options of one parameter group that a step may depend on; tensors count by identity."""

    def __init__(self, group: dict[str, Any]) -> None:
        self._group = group
        names = [name for name in group if name not in _FREE_OPTIONS]
        self._tensors = [name for name in names if isinstance(group[name], Tensor)]
        # Two names at least, so that itemgetter gives a tuple in every case.
        self._values = itemgetter("params", "params", *[name for name in names if name not in self._tensors])

    def __call__(self) -> Any:
        values = self._values(self._group)[2:]
        return len(self._group), values, [id(self._group[name]) for name in self._tensors]


def _model_probes(spec: StepSpec) -> Iterator[tuple[str, Probe, bool]]:
    modules = list(spec.model.modules())
    tables = [table for module in modules for table in module_tables(module)]
    full = [table for table in tables if table]
    empty = [table for table in tables if not table]
    yield "a module, parameter, buffer or hook of the model", lambda: _identities(full), True
    yield "a new parameter, buffer or hook of the model", lambda: any(empty), False
    yield "train or eval mode of a module", lambda: [module.training for module in modules], False


def _other_probes(spec: StepSpec) -> Iterator[tuple[str, Probe, bool]]:
    metrics, kind = spec.metrics, spec.device.type
    yield "the user's metrics", lambda: [id(metrics.totals), *map(id, metrics.user_metrics.values())], True
    yield "the rule of accuracy", lambda: metrics.rule, False
    # Inference mode and the dtype of autocast show in the tensors' own guards.
    yield (
        "grad mode, autocast or torch's default dtype",
        lambda: (torch.is_grad_enabled(), torch.is_autocast_enabled(kind), torch.get_default_dtype()),
        False,
    )


def _identities(tables: Iterable[dict[Any, Any]]) -> list[int]:
    return list(map(id, chain.from_iterable(map(dict.values, tables))))
