"""What a user's functions read of Python besides tensors: a graph would keep plain values, and not change the rest."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any, NamedTuple, cast

import numpy as np
from torch import Tensor, nn

from fasttrain.step.spec import StepSpec
from fasttrain.step.torch_private import module_tables

__all__ = [
    "PLAIN",
    "RandomNumbers",
    "Read",
    "callables_of",
    "containers_of",
    "functions_of",
    "modules_of",
    "objects_of",
    "plain_values_of",
]

PLAIN = (bool, int, float, str, bytes, type(None))
"""Values that compare by what they are."""


class Read(NamedTuple):
    """A plain value that a step reads, and where it stands.

    Attributes:
        name: what the user calls it.
        holder: a dict that holds it under `name`, or a cell.
        value: what it is now.
    """

    name: str
    holder: Any
    value: Any

    def put_back(self) -> bool:
        """Gives the value back to its holder if it has another one now; returns whether it had."""
        if isinstance(self.holder, CellType):
            is_other = self.holder.cell_contents != self.value
            self.holder.cell_contents = self.value
        else:
            is_other = self.holder.get(self.name) != self.value
            self.holder[self.name] = self.value
        return is_other


class RandomNumbers:
    """Where Python's and numpy's generators stand: the global ones, and those that a step reads.

    Torch's own belong to the step.
    """

    def __init__(self, spec: StepSpec) -> None:
        global_ones: list[Any] = [random.random, np.random.random]
        values = [*global_ones, *(read.value for read in (*_attributes(spec), *_Walk(spec).reads))]
        owners = [getattr(value, "__self__", value) for value in values]  # a method of one may be what is read
        self._generators = list({id(each): each for each in owners if _is_generator(each)}.values())
        self._before = [_standing(each) for each in self._generators]

    def put_back(self) -> bool:
        """Has them go on from there; returns whether they had gone on."""
        drawn = [
            (generator, before)
            for generator, before in zip(self._generators, self._before, strict=True)
            if not _is_equal(_standing(generator), before)
        ]
        for generator, before in drawn:
            _go_on_from(generator, before)
        return bool(drawn)


def callables_of(spec: StepSpec) -> dict[str, Any]:
    """What the user gave to be called: forward or the loss, and the metrics."""
    return {**vars(spec.forward), **spec.metrics.user_metrics}


def modules_of(spec: StepSpec) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a step runs through: the model's, and those that the user's functions are or hold."""
    seen = set(spec.model.modules())
    yield from spec.model.named_modules()
    held = ((read.name, read.value) for read in _Walk(spec).reads)
    for name, value in (*callables_of(spec).items(), *held):
        if isinstance(value, nn.Module):
            yield from value.named_modules(seen, prefix=name.lstrip("_"))


def objects_of(spec: StepSpec) -> list[Read]:
    """Tensors, modules and functions that a step reads by name: with another one it computes something else."""
    found = (*_attributes(spec), *_Walk(spec).reads)
    return [read for read in found if isinstance(read.value, Tensor | nn.Module | FunctionType)]


def functions_of(spec: StepSpec) -> list[FunctionType]:
    """The functions of the user's that a step runs, in the order in which they are found."""
    return _Walk(spec).functions


def plain_values_of(spec: StepSpec) -> list[Read]:
    """The plain attributes of the modules, and what the user's functions read as a global, a closure or of `self`.

    These functions are forward or the loss, metrics, hooks of modules, and the functions that they call. Not seen is
    what lies deeper: in a list, or on an object of the user's.
    """
    found = [read for read in (*_attributes(spec), *_Walk(spec).reads) if isinstance(read.value, PLAIN)]
    return [read for read in found if read.value == read.value]  # not a number is never what it was


def containers_of(spec: StepSpec) -> dict[str, Any]:
    """Lists, dicts and sets that the user's functions read in the same way, by name."""
    return {read.name: read.value for read in _Walk(spec).reads if isinstance(read.value, list | dict | set)}


def _attributes(spec: StepSpec) -> list[Read]:
    return [
        Read(name, vars(module), value)
        for _, module in modules_of(spec)
        for name, value in vars(module).items()
        if name != "training"  # which has a guard of its own
    ]


class _Walk:
    """Through the functions that a step runs: the model's, the loss and metrics, hooks, and those that they call.

    Attributes:
        reads: what they read as a global, a closure or of `self`.
        functions: the functions, without torch's.
    """

    def __init__(self, spec: StepSpec) -> None:
        self.reads: list[Read] = []
        self.functions: list[FunctionType] = []
        self._to_visit: list[Any] = [spec.model, *callables_of(spec).values()]
        seen: set[int] = set()
        for value in self._to_visit:  # it grows meanwhile
            if id(value) not in seen:
                seen.add(id(value))
                self._visit(value)

    def _visit(self, value: Any) -> None:
        """A function, a method, a partial, a module or another object that can be called."""
        if isinstance(value, nn.Module):
            inner = [each for table in module_tables(value) for each in table.values()]  # modules and hooks, too
            self._to_visit += [type(value).forward, *inner]
        elif isinstance(value, FunctionType):
            self._visit_function(value)
        elif isinstance(value, MethodType):
            self._visit_method(value.__func__, value.__self__)
        elif isinstance(value, partial):
            bound = cast("partial[Any]", value)
            self._read(Read(name, bound.keywords, each) for name, each in bound.keywords.items())
            self._to_visit.append(bound.func)
        elif callable(value) and not isinstance(value, type):
            self._visit_method(type(value).__call__, value)

    def _visit_function(self, function: FunctionType) -> None:
        if str(function.__module__).startswith("torch."):  # it may be None
            return
        self.functions.append(function)
        self._read((*_closed_over(function), *_named(function.__globals__, _names(function.__code__))))

    def _visit_method(self, function: Callable[..., Any], owner: Any) -> None:
        if isinstance(function, FunctionType):
            self._to_visit.append(function)
            self._read(_named(getattr(owner, "__dict__", {}), _names(function.__code__)))

    def _read(self, reads: Iterable[Read]) -> None:
        for read in reads:
            self.reads.append(read)
            self._to_visit.append(read.value)


def _closed_over(function: FunctionType) -> Iterator[Read]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # it was given no value yet
            yield Read(name, cell, cell.cell_contents)


def _named(holder: dict[str, Any], names: Iterable[str]) -> Iterator[Read]:
    # Sorted, since the order of a set is another one in each process, and a job is known by what it reads.
    yield from (Read(name, holder, holder[name]) for name in sorted(names) if name in holder)


def _names(code: CodeType) -> set[str]:
    """Of globals and attributes that code asks for, and the code inside it."""
    inner = [_names(each) for each in code.co_consts if isinstance(each, CodeType)]
    return set(code.co_names).union(*inner)


def _is_generator(value: Any) -> bool:
    is_one = isinstance(value, random.Random | np.random.RandomState | np.random.Generator)
    return is_one and not isinstance(value, random.SystemRandom)  # which stands nowhere


def _standing(generator: Any) -> Any:
    """Where a generator stands in its stream."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.bit_generator.state


def _go_on_from(generator: Any, standing: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(standing)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(standing)
    else:
        generator.bit_generator.state = standing


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        entries, others = cast("dict[str, Any]", one), cast("dict[str, Any]", other)
        return all(_is_equal(value, others[name]) for name, value in entries.items())
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other
