"""The user's forward, loss and metrics, captured once as a graph of torch's operators, with what the graph holds for.

Dynamo follows the user's code without running it and guards every Python value that it reads. Three things are left
to this module: tensors are inputs of the graph and are read anew before each step; classes and functions whose code was
followed must still be the same; what a graph cannot repeat (side effects, numpy, Python's random numbers) is refused
with the user's line.
"""

from __future__ import annotations

import functools
import gc
import os
import re
import sys
from abc import ABCMeta, get_cache_token
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from enum import Enum
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fasttrain.data.batch import tensors
from fasttrain.data.ragged import Ragged
from fasttrain.device import autocast_dtype
from fasttrain.errors import EngineError
from fasttrain.step.spec import StepOutput, StepSpec
from fasttrain.step.state import StepState, why_not_plain
from fasttrain.step.torch_private import (
    DynamoCapture,
    GraphInput,
    capture_function,
    function_modes,
    global_module_hooks,
    recorded_as,
    scope_of,
)

__all__ = ["TIMED", "Capture", "Captured"]

Batch = Any

TIMED = "timed_by_fasttrain"
"""Attribute of a function that a profile has put around another one, which it holds: the same is computed."""

MAX_EXAMPLE_BYTES = 1 << 26
"""An example batch of up to this size is kept, so that the guards can be checked where there is no batch."""


_CELL = re.compile(r"([\w.]+)\.__closure__\[(\d+)\]\.cell_contents")
"""How Dynamo's expressions name a variable that a function closes over."""


class Captured(NamedTuple):
    """What a captured forward pass gives.

    Attributes:
        output: loss, predictions and targets.
        metrics: the values of the user's metrics, scalars, in their order.
        buffers: for each buffer that forward replaces, the new one.
    """

    output: StepOutput
    metrics: list[Tensor]
    buffers: list[Tensor]


class Fact(NamedTuple):
    """Something that must stay true: `expression`, with `{}` for each of the objects."""

    reason: str
    expression: str
    objects: tuple[Any, ...]


class Capture:
    """Forward, loss and metrics of a step as one graph of torch's operators, and what it holds for.

    Nothing of the user's is run or changed. The graph's inputs are tensors of the state, tensors of the batch
    ("leaves": those that forward reads, in the order in which a walk through the batch meets them), sizes of these, and
    other tensors that forward reads, such as a global or an attribute.

    Args:
        spec: the step.
        batch: an example, on the device.

    Attributes:
        open_dims: for each leaf, the dimensions whose size is left open.
        leaf_places: for each leaf, its number among all tensors of a batch; None where a walk does not meet it.
        others: the other tensors.
        facts: what must stay true besides Dynamo's guards.

    Raises:
        EngineError: there is something that no graph can hold; the message names the user's line.
    """

    def __init__(self, spec: StepSpec, batch: Batch) -> None:
        self._model = spec.model
        self._function = _function_of(spec)
        walked = list(_walk(batch))
        arguments = {"model": spec.model, "batch": batch}
        open_dims = [(tensor, 0) for tensor, is_open in walked if is_open]
        self._dynamo = capture_function(self._function, arguments, open_dims)
        self._scope = scope_of(self._function, {})
        self._functions = _functions_followed(self._dynamo)
        _refuse_unfit(self._dynamo, self._functions)
        inputs = self._dynamo.inputs
        places = {id(tensor): place for place, (tensor, _) in reversed(list(enumerate(walked)))}
        found = self._dynamo.read(spec.model, batch)
        _refuse_made_anew(self._dynamo, found, self._dynamo.read(spec.model, batch))
        leaves = [at for at, each in enumerate(inputs) if each.argument == "batch" and each.size_of is None]
        self._leaves = sorted(leaves, key=lambda at: places.get(id(found[at]), len(walked)))
        self.leaf_places = [places.get(id(found[at])) for at in self._leaves]
        self.open_dims = [
            frozenset({0}) if place is not None and walked[place][1] else frozenset[int]() for place in self.leaf_places
        ]
        for at in self._leaves:
            if (why := why_not_plain(found[at])) is not None:
                raise EngineError(
                    f"forward reads {inputs[at].name}, which {why}: only dense (strided) tensors are traced"
                )
        self._sizes = {at: _leaf_of(each, inputs, self._leaves) for at, each in enumerate(inputs) if each.size_of}
        self._fixed = [at for at in range(len(inputs)) if at not in self._sizes and at not in leaves]
        self._result = _Result(self._dynamo, spec.model, batch, found)
        is_small = sum(tensor.nbytes for tensor, _ in walked if tensor.layout is torch.strided) <= MAX_EXAMPLE_BYTES
        self._example = batch if is_small else None
        self.others: list[Tensor] = []
        self._expected: list[Tensor] = []
        self._places: dict[int, tuple[bool, int]] = {}  # of the state (True) or among the others, and which
        self._replaced: list[int] = []
        self._homes: list[tuple[dict[str, Any], str, Tensor]] = []  # of buffers that forward replaces and may not read
        self._labels = ExitStack()
        if spec.metrics.user_metrics:
            self._dynamo.call_where_grad_is_last_turned_off(self._begin_metrics)
        self.facts = list(self._facts())

    @property
    def checkpointed(self) -> str | None:
        """The user's line that calls `torch.utils.checkpoint`; None if forward does not call it."""
        return self._dynamo.checkpointed

    def bind(self, state: StepState, batch: Batch | None = None) -> bool:
        """Reads anew the tensors besides the batch's, and finds which of them belong to the state.

        Args:
            state: where the step's own tensors are.
            batch: a batch for which the guards hold; None: the example.

        Returns:
            False where another tensor of the state stands in some place now, or the guards do not hold: capture anew.

        Raises:
            EngineError: what forward reads besides the state shares memory with it.
        """
        batch = self._example if batch is None else batch
        if batch is None or not self._dynamo.holds({**self._scope, "model": self._model, "batch": batch}):
            return False
        found = self._dynamo.read(self._model, batch)
        others: dict[int, Tensor] = {}
        places: dict[int, tuple[bool, int]] = {}
        for at in self._fixed:
            place = state.place_of(found[at])
            if place is None:
                others.setdefault(id(found[at]), found[at])
                places[at] = False, list(others).index(id(found[at]))
            else:
                places[at] = True, place
        if self._places and places != self._places:
            return False
        tables = [(cast("Any", module)._buffers, name) for module, name in self._result.replaced]
        self._homes = [(table, name, table[name]) for table, name in tables]
        replaced = [state.place_of(buffer) for _, _, buffer in self._homes]
        self._replaced = [place for place in replaced if place is not None]
        state.refuse_closed_over(list(others.values()))
        self._expected, self._places, self.others = [found[at] for at in self._fixed], places, list(others.values())
        return True

    def name_of(self, other: Tensor) -> str:
        """What the user calls one of `others`."""
        pairs = zip(self._fixed, self._expected, strict=True)
        names = (self._dynamo.inputs[at].name for at, tensor in pairs if tensor is other)
        name = next(names, f"a tensor of shape {list(other.shape)}")
        if cell := _CELL.match(name):  # a variable that forward closes over
            with suppress(AttributeError, IndexError, KeyError):
                first, *path = cell[1].split(".")
                function = functools.reduce(getattr, path, self._scope[first])
                return function.__code__.co_freevars[int(cell[2])] + name[cell.end() :]
        return name

    def leaves(self, batch: Batch | None = None) -> list[Tensor] | str:
        """The tensors of a batch that forward reads, or what has changed of all else that it reads.

        Makes no host read.

        Args:
            batch: None: the example, where only the rest is to be looked at.
        """
        batch = self._example if batch is None else batch
        if batch is None:
            return "a batch too large to be kept as an example"
        scope = {**self._scope, "model": self._model, "batch": batch}
        if not self._dynamo.holds(scope):
            return self._dynamo.first_broken(scope)
        found = self._dynamo.read(self._model, batch)
        for at, expected in zip(self._fixed, self._expected, strict=True):
            if found[at] is not expected:
                return f"the tensor {self.name_of(expected)}"
        for table, name, buffer in self._homes:
            if table.get(name) is not buffer:
                return f"the buffer {name}"
        return [found[at] for at in self._leaves]

    def call(self, state: Sequence[Tensor], leaves: Sequence[Tensor], others: Sequence[Tensor]) -> Captured:
        """Runs the graph on stand-ins for its tensors; buffers that forward replaces are left to `replace_buffers`.

        Args:
            state: for the tensors of the state, by place.
            leaves: for the tensors of the batch.
            others: for the other tensors.
        """
        given: list[Any] = []
        for at in range(len(self._dynamo.inputs)):
            if at in self._sizes:
                leaf, dim = self._sizes[at]
                given.append(leaves[leaf].shape[dim])
            elif at in self._places:
                is_of_state, place = self._places[at]
                given.append((state if is_of_state else others)[place])
            else:
                given.append(leaves[self._leaves.index(at)])
        with ExitStack() as self._labels:
            outputs = self._dynamo.graph(*given)
        return self._result.filled(outputs, given)

    def _begin_metrics(self) -> None:
        """Called by the graph after forward: what follows is recorded as part of the metrics."""
        self._labels.enter_context(recorded_as("metrics"))

    def replace_buffers(self, state: Sequence[Tensor], captured: Captured) -> None:
        """Copies the values of buffers that forward has replaced to where the buffers are.

        Call it last: backward and metrics may need the old values.

        Args:
            state: as for `call`.
            captured: what that returned.

        Raises:
            EngineError: a new buffer is not like the old one.
        """
        values = [value.detach() for value in captured.buffers]
        for (_, name), place, value in zip(self._result.replaced, self._replaced, values, strict=True):
            old = state[place]
            if (value.shape, value.dtype) != (old.shape, old.dtype):
                raise EngineError(
                    f"forward replaces the buffer {name!r}, a tensor of shape {list(old.shape)} and type {old.dtype}, "
                    f"by one of shape {list(value.shape)} and type {value.dtype}: a compiled step needs both alike"
                )
        if len(values) > 1:  # one may be the old value of another
            values = [value.clone() for value in values]
        for place, value in zip(self._replaced, values, strict=True):
            state[place].copy_(value)

    def _facts(self) -> Iterator[Fact]:
        """What Dynamo does not guard: the classes and functions whose code it followed, and hooks of all modules."""
        followed = set(self._dynamo.codes)
        user_codes = {code for code in followed if not _is_library_code(code)}
        functions = self._functions
        yield from _facts_of_functions(functions)
        yield from _facts_of_globals(functions)
        names = _DUNDERS.union(self._dynamo.names, *map(_names_in, followed))
        # Dynamo does not guard a class that a closure holds.
        kinds = _classes([*(each.value for each in self._dynamo.objects), *_named_in(functions)])
        for kind in kinds:
            yield from _facts_of_class(kind, names, followed)
        may_catch = any(code.co_exceptiontable for code in user_codes)
        looks_into_tables = any({"__dict__", "vars"}.intersection(_names_in(code)) for code in user_codes)
        for value, name, *_ in self._dynamo.objects:
            yield from _facts_of_object(value, name, names, may_catch=may_catch)
            if looks_into_tables and hasattr(value, "__dict__") and not isinstance(value, type | ModuleType):
                yield Fact(f"the attributes of {name}", "len({}) == {}", (vars(value), len(vars(value))))
        if not {"environ", "getenv"}.isdisjoint(names):
            environment: dict[Any, Any] = vars(os.environ)["_data"]
            yield Fact("the environment", "{} == {}", (environment, dict(environment)))
        if any(isinstance(kind, ABCMeta) for kind in kinds):
            yield Fact("what is registered with abstract classes", "{}() == {}", (get_cache_token, get_cache_token()))
        if not {"autocast", "get_autocast_dtype"}.isdisjoint(names):
            for device in ("cpu", "cuda"):
                asked = (torch.get_autocast_dtype, device, torch.get_autocast_dtype(device))
                yield Fact("the dtype of autocast", "{}({}) is {}", asked)
        yield Fact("a torch function mode", "{}() == {}", (function_modes, function_modes()))
        for name, module in self._dynamo.modules.items():
            if not name.startswith(("torch.", "fasttrain.step.")):
                yield Fact(f"the module {name}", "{}.get({}) is {}", (sys.modules, name, module))
        for table in global_module_hooks():
            if table:
                yield Fact("a hook of all modules", "tuple({}.values()) == {}", (table, tuple(table.values())))
            else:
                yield Fact("a hook of all modules", "not {}", (table,))


def _function_of(spec: StepSpec) -> FunctionType:
    """What is captured: forward at the step's precision, then the metrics."""
    forward, metrics = spec.forward, tuple(spec.metrics.user_metrics.values())
    device, dtype = spec.device.type, autocast_dtype(spec.precision)

    def step_forward(model: nn.Module, batch: Batch) -> Any:
        if dtype is None:
            output = forward(model, batch)
        else:
            with torch.autocast(device, dtype=dtype, cache_enabled=False):
                output = forward(model, batch)
        with torch.no_grad():
            values = [metric(output.loss.detach(), output.predictions, output.targets) for metric in metrics]
        return tuple(output), values

    # Dynamo keeps names of its own among a function's globals.
    own = {"__builtins__": __builtins__, "__name__": __name__, "torch": torch}
    return FunctionType(step_forward.__code__, own, step_forward.__name__, None, step_forward.__closure__)


def _walk(batch: Batch) -> Iterator[tuple[Tensor, bool]]:
    """The tensors of a batch, in order, and whether the size of the first dimension is left open."""
    for each in tensors(batch):
        if isinstance(each, Ragged):
            yield each.values, True
            yield each.offsets, False
        else:
            yield each, False


def _leaf_of(size: GraphInput, inputs: Sequence[GraphInput], leaves: Sequence[int]) -> tuple[int, int]:
    """The leaf that a size is of, and the dimension."""
    assert size.size_of is not None
    name, dim = size.size_of
    found = next((number for number, at in enumerate(leaves) if inputs[at].name == name), None)
    if found is None:
        raise EngineError(f"forward depends on the size of {name}, which it does not read otherwise")
    return found, dim


class _Result:
    """How the function's result is made of what the graph returns and of its inputs.

    Attributes:
        replaced: the buffers that forward replaces: module and name.
    """

    def __init__(self, dynamo: DynamoCapture, model: nn.Module, batch: Batch, inputs: Sequence[Any]) -> None:
        output = next(iter(reversed(dynamo.graph.graph.nodes)))
        marks = [_Mark(number) for number in range(len(cast("Sequence[Any]", output.args[0])))]
        twins: dict[nn.Module, nn.Module] = {}
        result = dynamo.result(marks, _twin(model, twins), batch)
        self.replaced = [
            (module, name)
            for module, twin in twins.items()
            for name, buffer in twin.named_buffers(recurse=False, remove_duplicate=False)
            if buffer is not module.get_buffer(name)
        ]
        buffers = [twins[module].get_buffer(name) for module, name in self.replaced]
        self._leaves, self._spec = pytree.tree_flatten((*result, buffers))
        places = {id(value): at for at, value in enumerate(inputs) if isinstance(value, Tensor)}
        for number, leaf in enumerate(self._leaves):
            if isinstance(leaf, Tensor):
                if id(leaf) not in places:
                    raise EngineError("forward returns a tensor that it has not computed and that is no input")
                self._leaves[number] = _Input(places[id(leaf)])
            elif not isinstance(leaf, _Mark | _Input | int | float | bool | str | type(None)):
                raise EngineError(
                    f"forward returns a {type(leaf).__name__}: a compiled step takes predictions and targets that are "
                    "tensors, or tuples, lists and dicts of them"
                )

    def filled(self, outputs: Sequence[Any], inputs: Sequence[Any]) -> Captured:
        """The result for these outputs and inputs of the graph."""

        def fill(leaf: Any) -> Any:
            if isinstance(leaf, _Mark):
                return outputs[leaf.number]
            return inputs[leaf.number] if isinstance(leaf, _Input) else leaf

        output, metrics, buffers = pytree.tree_unflatten([fill(leaf) for leaf in self._leaves], self._spec)
        return Captured(StepOutput(*output), metrics, buffers)


def _twin(module: nn.Module, twins: dict[nn.Module, nn.Module]) -> nn.Module:
    """A module with the same attributes and tables of its own, in which a buffer can be replaced."""
    if module not in twins:
        twin = twins[module] = object.__new__(type(module))
        vars(twin).update(vars(module))
        vars(twin)["_buffers"] = dict(cast("Any", module)._buffers)
        vars(twin)["_non_persistent_buffers_set"] = set(cast("Any", module)._non_persistent_buffers_set)
        children: dict[str, Any] = cast("Any", module)._modules
        vars(twin)["_modules"] = {
            name: child if child is None else _twin(child, twins) for name, child in children.items()
        }
    return twins[module]


@dataclass(frozen=True)
class _Mark:
    """Stands for an output of the graph."""

    number: int


@dataclass(frozen=True)
class _Input:
    """Stands for an input of the graph that is returned as it is."""

    number: int


def _refuse_unfit(dynamo: DynamoCapture, functions: Sequence[FunctionType]) -> None:
    """Raises EngineError for what Dynamo follows with other results than Python's."""
    if _untimed(nn.Module.__call__) is not nn.Module._wrapped_call_impl:  # pyright: ignore[reportPrivateUsage]
        raise EngineError("torch.nn.Module.__call__ was replaced, which a compiled step would not notice")
    asks_for_classes = any({"isinstance", "issubclass"}.intersection(code.co_names) for code in dynamo.codes)
    _refuse_unguarded(dynamo, functions)
    named = _named_in(functions)
    for value in (*named, *(each.value for each in dynamo.objects)):
        if asks_for_classes and isinstance(value, type) and _answers_itself(type(value)):
            raise EngineError(
                f"forward asks for instances of {value.__qualname__}, whose class answers by code that is not followed"
            )
    for value, name, *_ in dynamo.objects:
        if isinstance(value, functools._lru_cache_wrapper) and not str(value.__module__).startswith("torch"):  # pyright: ignore[reportPrivateUsage]
            raise EngineError(f"functools caches the results of what forward calls, a graph computes them anew: {name}")


def _refuse_unguarded(dynamo: DynamoCapture, functions: Sequence[FunctionType]) -> None:
    """Raises EngineError for what Dynamo reads without a guard, or with a guard on something else."""
    for function in functions:
        table, name = function.__globals__, function.__globals__.get("__name__", "namedtuple_")
        if name.startswith("namedtuple_") or table.keys().isdisjoint(_names_in(function.__code__)):
            continue
        if vars(sys.modules.get(name, object)) is not table:  # Dynamo would watch those of the module
            raise EngineError(
                f"{function.__qualname__} has globals of its own, which are not those of the module {name} (exec makes "
                "such functions), and a compiled step would not notice a change in them"
            )
    for value, name, argument in dynamo.objects:
        kind = type(value)
        if argument == "batch" and kind.__module__ == "numpy":
            raise EngineError(f"forward reads a numpy array of the batch; make it a tensor: {name}")
        modules = {each.__module__ for each in kind.__mro__}
        if isinstance(value, bytearray | memoryview) or not modules.isdisjoint(("datetime", "decimal")):
            raise EngineError(
                f"forward reads a {kind.__qualname__}, and a compiled step would not notice another value; make it a "
                f"number, a str or bytes: {name}"
            )
        plain = next((each for each in (int, float, complex, str, bytes) if isinstance(value, each)), kind)
        if plain is not kind and not isinstance(value, Enum) and not _is_library(kind):
            raise EngineError(
                f"forward reads a {kind.__qualname__}, a subclass of {plain.__name__} whose methods are not followed; "
                f"make it a plain {plain.__name__}: {name}"
            )
    for kind in _classes([*(each.value for each in dynamo.objects), *_named_in(functions)]):
        if "__class_getitem__" in vars(kind) and not _is_library(kind):
            raise EngineError(f"{kind.__qualname__}.__class_getitem__ is not followed; use a method of another name")


def _answers_itself(kind: type) -> bool:
    """Whether classes of this metaclass answer `isinstance` or `issubclass` by code of the user's."""
    asked = (getattr(kind, "__instancecheck__", None), getattr(kind, "__subclasscheck__", None))
    return any(isinstance(each, FunctionType) and not _is_library(kind) for each in asked)


def _refuse_made_anew(dynamo: DynamoCapture, found: Sequence[Any], again: Sequence[Any]) -> None:
    """Raises EngineError for an input that is no tensor of the user's, such as a numpy value that Dynamo converts."""
    for each, value, other in zip(dynamo.inputs, found, again, strict=True):
        if each.size_of is None and (value is not other or not isinstance(value, Tensor)):
            name = next((item.name for item in dynamo.objects if item.name.startswith(f"{each.name}: ")), each.name)
            raise EngineError(f"forward reads a numpy value, make it a Python number or a tensor: {name}")


def _functions_followed(dynamo: DynamoCapture) -> list[FunctionType]:
    """The user's functions that Dynamo traced into.

    Searches all objects of the process with `gc.get_referrers`, and the guarded objects, because the garbage collector
    does not list objects that `gc.freeze` has moved out of its sight.
    """
    codes = {code for code in dynamo.codes if not _is_library_code(code)}
    found = gc.get_referrers(*codes) if codes else []
    values = (*found, *(getattr(each.value, "__func__", each.value) for each in dynamo.objects))
    functions = [each for each in values if isinstance(each, FunctionType) and each.__code__ in codes]
    return list({id(each): each for each in functions}.values())


def _facts_of_functions(functions: Sequence[FunctionType]) -> Iterator[Fact]:
    """The functions still have that code and these defaults."""
    for function in functions:
        reason = f"the code of {function.__qualname__}"
        yield Fact(reason, "{}.__code__ is {}", (function, function.__code__))
        yield Fact(reason, "{}.__defaults__ is {}", (function, function.__defaults__))
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            with suppress(ValueError):  # nothing in it yet
                if callable(cell.cell_contents):
                    yield Fact(f"what {name} is", "{}.cell_contents is {}", (cell, cell.cell_contents))


def _facts_of_globals(functions: Sequence[FunctionType]) -> Iterator[Fact]:
    """A builtin that the functions call is not hidden by a global of its name; nor does a missing global come."""
    tables = {id(function.__globals__): function.__globals__ for function in functions}
    for key, table in tables.items():
        names = {name for each in functions if id(each.__globals__) == key for name in _names_in(each.__code__)}
        absent = frozenset(names.difference(table))
        yield Fact("a new global that hides a builtin", "{}.isdisjoint({})", (table.keys(), absent))


def _named_in(functions: Sequence[FunctionType]) -> Iterator[Any]:
    """The values that functions refer to by name: closure variables and globals."""
    for function in functions:
        for cell in function.__closure__ or ():
            with suppress(ValueError):
                yield cell.cell_contents
        for name in _names_in(function.__code__):
            if name in function.__globals__:
                yield function.__globals__[name]


def _names_in(code: CodeType) -> Iterator[str]:
    """The names that code may ask for: of attributes, globals and, as strings, for `getattr`."""
    yield from code.co_names
    for value in code.co_consts:
        if isinstance(value, str):
            yield value
        elif isinstance(value, CodeType):
            yield from _names_in(value)


_DUNDERS = frozenset(
    name
    for kind in (object, type, int, float, str, list, dict, property, BaseException, nn.Module, Iterator)
    for name in (*dir(kind), "__getattr__", "__enter__", "__exit__", "__missing__", "__instancecheck__", "__next__")
    if name.startswith("__")
) - {"__dict__", "__doc__", "__module__", "__weakref__", "__annotations__", "__abstractmethods__"}
"""What Python itself asks classes for."""


def _classes(objects: Sequence[Any]) -> list[type]:
    """The classes of these objects, these classes, their bases and their metaclasses, which may hold what was read."""
    found: dict[type, None] = {}
    for value in objects:
        kind = value if isinstance(value, type) else type(value)
        for each in (kind, type(kind)):
            found.update(dict.fromkeys(cast("tuple[type, ...]", each.__mro__)))
    return [kind for kind in found if issubclass(kind, nn.Module) or not _is_library(kind)]


def _is_library(kind: type) -> bool:
    name = kind.__module__.partition(".")[0]
    is_own = kind.__module__.startswith("fasttrain.step")
    return is_own or name in ("torch", "numpy") or (name in sys.stdlib_module_names and name != "__main__")


def _facts_of_class(kind: type, names: frozenset[str], codes: set[CodeType]) -> Iterator[Fact]:
    """What a class holds under the names that were asked for is still the same, and nothing has come.

    Dynamo guards a value that it found in a class, but not that no class before that one has it now, nor metaclasses.
    """
    table, is_users = vars(kind), not _is_library(kind)
    own = ("forward", "__call__") if issubclass(kind, nn.Module) else ()
    for name, value in table.items():
        is_followed = name in own or not codes.isdisjoint(_codes_of(value))
        if not is_followed and not (is_users and name in names):
            continue
        reason = f"{kind.__qualname__}.{name}"
        if isinstance(value, Tensor):
            yield Fact(reason, "{} in {}", (name, table))
        elif isinstance(value, bool | int | float | str | None):
            yield Fact(reason, "({0}.get({1}) is {2} or {0}.get({1}) == {2})", (table, name, value))
        elif kind is nn.Module:
            yield Fact(reason, "{}({}.get({})) is {}", (_untimed, table, name, _untimed(value)))
        else:
            yield Fact(reason, "{}.get({}) is {}", (table, name, value))
    if is_users:
        reason = f"an attribute of {kind.__qualname__}"
        yield Fact(reason, "{}.__mro__ is {}", (kind, kind.__mro__))
        yield Fact(reason, "{}.isdisjoint({})", (table.keys(), names.difference(table)))


def _untimed(function: Any) -> Any:
    """A function without the timer that a profile has put around it."""
    return getattr(function, TIMED, function)


def _facts_of_object(value: Any, name: str, names: frozenset[str], *, may_catch: bool) -> Iterator[Fact]:
    """What an object was found to lack has not come.

    Dynamo does not look for it again where the class answers by a `__getattr__` of its own, nor (`may_catch`) where the
    user's code catches the error.
    """
    if isinstance(value, OrderedDict) and value:  # move_to_end
        yield Fact(f"the order of {name}", "list(map({}, {})) == {}", (id, value, list(map(id, value))))
    if type(value) in (dict, list, OrderedDict, defaultdict) and may_catch:
        yield Fact(f"the length of {name}", "len({}) == {}", (value, len(value)))
    if isinstance(value, type | ModuleType) or not hasattr(value, "__dict__"):
        return
    asked = next((vars(base)["__getattr__"] for base in type(value).__mro__ if "__getattr__" in vars(base)), None)
    if may_catch or (isinstance(asked, FunctionType) and asked is not nn.Module.__getattr__):
        own = vars(value)
        tables = [own, *(own[each] for each in ("_parameters", "_buffers", "_modules") if isinstance(value, nn.Module))]
        for table in tables:
            yield Fact(f"a new attribute of {name}", "{}.isdisjoint({})", (table.keys(), names.difference(table)))


def _codes_of(value: Any) -> Iterator[CodeType]:
    """The code behind what a class holds under a name: a function, or a property's or method's."""
    inner = ("fget", "fset", "fdel", "__func__", "func", "__wrapped__")
    for each in (value, *[getattr(value, name, None) for name in inner]):
        code = getattr(each, "__code__", None)
        if isinstance(code, CodeType):
            yield code


def _is_library_code(code: CodeType) -> bool:
    return code.co_filename.startswith((os.path.dirname(torch.__file__), os.path.dirname(__file__)))
