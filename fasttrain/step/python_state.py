"""What a user's functions read of Python besides tensors: a graph would keep plain values, and not change the rest."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any, NamedTuple, cast

import numpy as np
from torch import nn

from fasttrain.step.spec import StepSpec
from fasttrain.step.torch_private import module_tables

__all__ = ["PLAIN", "RandomNumbers", "Read", "containers_of", "modules_of", "plain_values_of"]

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
        values = [*global_ones, *(read.value for read in (*_attributes(spec), *_reads(spec)))]
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


def modules_of(spec: StepSpec) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a step runs through: the model's, and those of the loss and the metrics."""
    yield from spec.model.named_modules()
    for name, value in _callables(spec).items():
        if isinstance(value, nn.Module):
            yield from value.named_modules(prefix=name.lstrip("_"))


def plain_values_of(spec: StepSpec) -> list[Read]:
    """The plain attributes of the modules, and what the user's functions read as a global, a closure or of `self`.

    These functions are forward or the loss, metrics, hooks of modules, and the functions that they call. Not seen is
    what lies deeper: in a list, or on an object of the user's.
    """
    found = [read for read in (*_attributes(spec), *_reads(spec)) if isinstance(read.value, PLAIN)]
    return [read for read in found if read.value == read.value]  # not a number is never what it was


def containers_of(spec: StepSpec) -> dict[str, Any]:
    """Lists, dicts and sets that the user's functions read in the same way, by name."""
    return {read.name: read.value for read in _reads(spec) if isinstance(read.value, list | dict | set)}


def _attributes(spec: StepSpec) -> list[Read]:
    return [
        Read(name, vars(module), value)
        for _, module in modules_of(spec)
        for name, value in vars(module).items()
        if name != "training"  # which has a guard of its own
    ]


def _callables(spec: StepSpec) -> dict[str, Any]:
    """What the user gave to be called: forward or the loss, and the metrics."""
    return {**vars(spec.forward), **spec.metrics.user_metrics}


def _reads(spec: StepSpec) -> list[Read]:
    seen: set[int] = set()
    modules = [module for _, module in modules_of(spec)]
    hooks = [each for module in modules for table in module_tables(module) for each in table.values()]
    functions = [*_callables(spec).values(), *hooks, *(type(module).forward for module in modules)]
    return [read for each in functions for read in _of(each, seen)]


def _of(value: Any, seen: set[int]) -> Iterator[Read]:
    """What a function, a method, a partial or an object that can be called reads."""
    if id(value) in seen or isinstance(value, nn.Module):  # modules are looked at by themselves
        return
    seen.add(id(value))
    if isinstance(value, FunctionType):
        if not value.__module__.startswith("torch."):
            yield from _of_function(value, seen)
    elif isinstance(value, MethodType):
        yield from _of_method(value.__func__, value.__self__, seen)
    elif isinstance(value, partial):
        bound = cast("partial[Any]", value)
        yield from (Read(name, bound.keywords, each) for name, each in bound.keywords.items())
        yield from _of(bound.func, seen)
    elif callable(value) and not isinstance(value, type):
        yield from _of_method(type(value).__call__, value, seen)


def _of_function(function: FunctionType, seen: set[int]) -> Iterator[Read]:
    reads = [*_closed_over(function), *_named(function.__globals__, _names(function.__code__))]
    for read in reads:
        yield read
        yield from _of(read.value, seen)


def _of_method(function: Callable[..., Any], owner: Any, seen: set[int]) -> Iterator[Read]:
    if isinstance(function, FunctionType):
        yield from _of(function, seen)
        yield from _named(getattr(owner, "__dict__", {}), _names(function.__code__))


def _closed_over(function: FunctionType) -> Iterator[Read]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # it was given no value yet
            yield Read(name, cell, cell.cell_contents)


def _named(holder: dict[str, Any], names: Iterable[str]) -> Iterator[Read]:
    yield from (Read(name, holder, holder[name]) for name in names if name in holder)


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
