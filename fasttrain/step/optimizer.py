"""The user's optimizer as graph code: its options as tensors, and its own `step` traced over stand-ins."""

from __future__ import annotations

import operator
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import unwrap
from numbers import Real
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fasttrain.errors import EngineError, first_line
from fasttrain.step.state import StepState
from fasttrain.step.torch_private import has_own_step, optimizer_hooks, reported_as_compiling

__all__ = ["MOVED", "Attributes", "GroupOptions", "OptimizerNotTracedError", "OptimizerStep", "code_of"]

_BRANCHES_ON_VALUES = (torch.optim.RAdam, torch.optim.ASGD, torch.optim.Rprop)
"""Their default code branches on values of tensors; their `capturable` code computes the same without."""

_SCALARS = frozenset({"step", "mu_product", "eta", "mu"})
"""State that optimizers read as Python numbers, in double precision."""

_READS_A_VALUE = ("GuardOnDataDependentSymNode", "DataDependentOutputException")
"""The errors of torch's tracer where code branches on the value of a tensor, or asks for it as a number."""


class OptimizerNotTracedError(EngineError):
    """The optimizer's step cannot be recorded; forward and backward still can."""


def code_of(kind: type[torch.optim.Optimizer]) -> Iterator[tuple[str, Mapping[str, Any], list[str]]]:
    """The methods of a class of optimizers and its bases, and the functions of its module that they call.

    Yields:
        What they belong to, the table that holds them, and their names.
    """
    for each in kind.__mro__[:-1]:
        methods = {name: value for name, value in vars(each).items() if isinstance(value, FunctionType)}
        yield each.__qualname__, vars(each), list(methods)
        module = vars(sys.modules[each.__module__]) if each.__module__ in sys.modules else {}
        called = {name for method in methods.values() for name in unwrap(method).__code__.co_names}
        is_torchs = each.__module__.startswith("torch.optim.") and each is not torch.optim.Optimizer
        names = [name for name, value in module.items() if isinstance(value, FunctionType)]
        yield each.__module__, module, [name for name in names if is_torchs or name in called]


def _replaced_code(kind: type[torch.optim.Optimizer]) -> Iterator[str]:
    """What is not torch's own of the code of one of torch's optimizers."""
    libraries = (sys.stdlib_module_names | {"torch", "typing_extensions"}) - {"__main__"}
    for owner, table, names in code_of(kind):
        for name in names:
            is_method = f"{owner}.{name}" == table[name].__qualname__
            if not is_method and str(table[name].__module__).partition(".")[0] not in libraries:
                yield f"{owner}.{name}"


class OptimizerStep:
    """The step of the user's optimizer, by its own code, over stand-ins for its tensors.

    It runs in a twin that shares the optimizer's attributes and has groups and state of its own, so that nothing of the
    user's has to be put back.

    Args:
        optimizer: the user's.
        state: where everything is.
        tensors: the stand-ins, in the order of `state`; trained ones have their gradients.
        options: of its groups; is told what the optimizer's code asks for.
        inputs: stand-ins for those of the options.

    Raises:
        OptimizerNotTracedError: it is not one of torch's own, it has hooks, or a `step` that was replaced.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        state: StepState,
        tensors: list[Tensor],
        options: GroupOptions,
        inputs: Sequence[Tensor],
    ) -> None:
        if not type(optimizer).__module__.startswith("torch."):
            raise OptimizerNotTracedError("it is not one of torch's own, and what its code reads is not known")
        replaced = next(_replaced_code(type(optimizer)), None)
        if replaced is not None:
            raise OptimizerNotTracedError(f"{replaced} was replaced, and what its code reads is not known")
        if any(optimizer_hooks(optimizer)):
            raise OptimizerNotTracedError("it has hooks, which a compiled step would not call")
        if has_own_step(optimizer):
            raise OptimizerNotTracedError("its step was replaced on the object, which a compiled step would not call")
        if isinstance(optimizer, torch.optim.Muon):
            raise OptimizerNotTracedError("its products have factors, which torch compiles wrongly (pytorch#167313)")
        self._optimizer = optimizer
        self._state = state
        self._tensors = tensors
        self._options = options
        self._twin: Any = object.__new__(type(optimizer))
        self._twin.__dict__.update(optimizer.__dict__)
        self._twin.__dict__.pop("step", None)  # a scheduler's wrapper, bound to the user's optimizer
        moved, self._numbers = options.stand_ins(inputs)
        self._groups = [
            self._group(group, places, values)
            for group, places, values in zip(optimizer.param_groups, state.groups, moved, strict=True)
        ]
        self._twin.param_groups = [_WatchedGroup(group, options.note_read) for group in self._groups]
        self._twin.state = defaultdict(dict, {tensors[place]: self._entries(place) for place in state.slots})

    def run(self) -> None:
        """Steps the twin and brings what it changed to the stand-ins.

        Raises:
            OptimizerNotTracedError: its code cannot be recorded, or changes what a graph does not see.
        """
        before = {parameter: dict(entries) for parameter, entries in self._twin.state.items()}
        # The twin shares lists and dicts with the user's optimizer.
        attributes = Attributes(vars(self._twin), ignored=("param_groups", "state"))
        try:
            with reported_as_compiling(), _TensorsForNumbers(self._numbers, self._options.fix_sign):
                type(self._optimizer).step(self._twin)
        except OptimizerNotTracedError:
            raise
        except Exception as error:
            why = f"the step of {self._name} cannot be traced: {first_line(error)}"
            if type(error).__name__ in _READS_A_VALUE:
                why = f"the step of {self._name} reads the value of a tensor of its state on the host"
            raise OptimizerNotTracedError(why) from error
        finally:
            changed = attributes.changed()
            attributes.put_back()
        if changed:
            raise OptimizerNotTracedError(
                f"{self._name} changes its attribute {changed[0]!r} in every step: a graph would not see that"
            )
        if any(dict.__ne__(group, old) for group, old in zip(self._twin.param_groups, self._groups, strict=True)):
            raise OptimizerNotTracedError(
                f"{self._name} changes its parameter groups in every step: a graph would not see that"
            )
        for parameter, entries in self._twin.state.items():
            for key, value in entries.items():
                if key not in before.get(parameter, {}):
                    raise OptimizerNotTracedError(
                        f"{self._name} has not made its state yet: run one step eagerly, then trace"
                    )
                self._write_back(parameter, key, before[parameter][key], value)

    @property
    def _name(self) -> str:
        return type(self._optimizer).__name__

    def _group(self, group: dict[str, Any], places: list[int], moved: dict[str, Any]) -> dict[str, Any]:
        twin = {**group, "params": [self._tensors[place] for place in places], **moved}
        # One operator after the other: the compiler fuses them itself, and fused kernels cannot be recorded.
        twin.update({name: False for name in ("foreach", "fused") if name in group})
        if isinstance(self._optimizer, _BRANCHES_ON_VALUES):
            twin["capturable"] = True
        return twin

    def _entries(self, place: int) -> dict[str, Any]:
        entries = dict(self._optimizer.state[self._state.tensors[place]])
        for key, slot in self._state.slots[place].items():
            stand_in = self._tensors[slot]
            entries[key] = stand_in.double() if key in _SCALARS and stand_in.dim() == 0 else stand_in
        return entries

    def _write_back(self, parameter: Tensor, key: str, old: Any, new: Any) -> None:
        if not isinstance(old, Tensor):
            if new is not old and new != old:
                raise OptimizerNotTracedError(
                    f"{self._name} keeps {key!r} as a Python value: a graph would not change it"
                )
            return
        slots = next(s for place, s in self._state.slots.items() if self._tensors[place] is parameter)
        home = self._tensors[slots[key]]
        if new is not home:
            home.copy_(new)


class _WatchedGroup(dict[str, Any]):
    """A parameter group that tells which of its options are asked for (None for whatever there is)."""

    def __init__(self, options: dict[str, Any], tell: Callable[[str | None], None]) -> None:
        super().__init__(options)
        self.tell = tell

    def __getitem__(self, name: str) -> Any:
        self.tell(name)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self.tell(str(name))
        return super().__contains__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.tell(name)
        return super().get(name, default)

    def setdefault(self, name: str, default: Any = None) -> Any:
        self.tell(name)
        return super().setdefault(name, default)

    def __iter__(self) -> Iterator[str]:
        self.tell(None)
        return super().__iter__()

    def keys(self) -> Any:
        self.tell(None)
        return super().keys()

    def values(self) -> Any:
        self.tell(None)
        return super().values()

    def items(self) -> Any:
        self.tell(None)
        return super().items()


class _TensorsForNumbers(TorchFunctionMode):
    """Lets optimizers use scalar tensors where torch takes only numbers: `add(x, y, alpha=rate)` and its kin.

    Args:
        numbers: by the id of a tensor that stands for a number, its place among the options.
        fix_sign: gives the sign of the number at a place, and keeps it.
    """

    def __init__(self, numbers: dict[int, int], fix_sign: Callable[[int], int]) -> None:
        super().__init__()
        self._numbers = numbers
        self._fix_sign = fix_sign
        self._known = set(numbers)
        self._derived: dict[tuple[Any, ...], Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Does with tensors what these operators do with numbers, and passes every other call on."""
        kwargs = kwargs or {}
        place = self._numbers.get(id(args[0])) if args else None
        if place is not None and func in _QUESTIONS:
            return self._answer(func, place, *args[1:])
        if place is not None and func is Tensor.to:
            return args[0]  # a number has no dtype: it stays a double until it meets a tensor
        for name in ("alpha", "value"):
            factor = kwargs.get(name)
            if isinstance(factor, Tensor) and len(args) > 1:
                kwargs = {key: value for key, value in kwargs.items() if key != name}
                args = (args[0], args[1] * factor, *args[2:])
        if func in _DERIVING and all(isinstance(each, int | float) or self._knows(each) for each in args):
            return self._derive(func, args)
        if args and self._knows(args[0]) and _is_in_place(func):
            raise OptimizerNotTracedError("the optimizer changes what it has derived from its options in place")
        if func is Tensor.lerp_ and len(args) == 3 and isinstance(args[2], Tensor) and args[2].dim() == 0:
            args = (*args[:2], args[2].to(args[0].dtype))
        return func(*args, **kwargs)

    def _knows(self, value: Any) -> bool:
        return id(value) in self._known

    def _derive(self, func: Any, args: tuple[Any, ...]) -> Tensor:
        """What follows from options alone (`1 - beta`) is computed once, not for each parameter."""
        key = (func, *[id(each) if isinstance(each, Tensor) else (each,) for each in args])
        if key not in self._derived:
            self._derived[key] = func(*args)
            self._known.add(id(self._derived[key]))
        return self._derived[key]

    def _answer(self, func: Any, place: int, other: Any = 0) -> bool:
        """Whether a number is zero, positive or negative: what optimizers branch on."""
        if isinstance(other, Tensor) or other != 0:
            raise OptimizerNotTracedError(f"the optimizer compares an option with {other}, not with 0")
        return _QUESTIONS[func](self._fix_sign(place), 0)


_QUESTIONS: dict[Any, Callable[[int, int], bool]] = {
    Tensor.__bool__: operator.ne,
    Tensor.__eq__: operator.eq,
    Tensor.eq: operator.eq,
    Tensor.__ne__: operator.ne,
    Tensor.ne: operator.ne,
    Tensor.__lt__: operator.lt,
    Tensor.lt: operator.lt,
    Tensor.__le__: operator.le,
    Tensor.le: operator.le,
    Tensor.__gt__: operator.gt,
    Tensor.gt: operator.gt,
    Tensor.__ge__: operator.ge,
    Tensor.ge: operator.ge,
}


_DERIVING = frozenset({Tensor.__rsub__, Tensor.neg, Tensor.__neg__, Tensor.mul, Tensor.__mul__, Tensor.__rmul__})


def _is_in_place(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in ("__iadd__", "__isub__", "__imul__", "__idiv__")


MOVED = ("lr", "betas", "momentum", "weight_decay")
"""What schedulers move, torch's or users' own. A change of any other option makes another graph."""


@dataclass
class _Option:
    """A number, or a tuple of numbers, among the entries of the packed tensor.

    Attributes:
        group: the number of its group.
        name: of the option.
        first: where its numbers begin.
        value: what the group held when it was looked at last.
    """

    group: int
    name: str
    first: int
    value: Any


class GroupOptions:
    """What a graph knows of the options of parameter groups.

    The numbers of all groups that may move are the entries of one tensor: a graph takes a moved one up with its next
    step. Only their signs stay fixed, where the optimizer's code asked for them (`if weight_decay != 0`).

    Args:
        optimizer: whose `param_groups` are read; a rate that is a tensor already is passed on as it is.
        device: where the inputs live.
        names: of the options that may move.

    Attributes:
        read: the names of all options that the optimizer's code asked for, None where it looked at whole groups.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, names: Sequence[str] = MOVED) -> None:
        self.read: set[str] | None = set()
        self._optimizer = optimizer
        self._options: list[_Option] = []
        self._tensors: list[tuple[int, str]] = []
        self._values: list[float] = []
        self._signs: dict[int, int] = {}
        for index, group in enumerate(optimizer.param_groups):
            for name in [name for name in names if name in group]:
                self._add(index, name, group[name])
        # Python's floats are doubles, and so is what eager optimizers compute with them.
        packed = torch.tensor(self._values, dtype=torch.float64, device=device)
        self._packed = [packed] if self._values else []
        self._cells = list(packed.unbind())

    @property
    def examples(self) -> list[Tensor]:
        """As many tensors as `current` gives, of the same kinds."""
        return [*self._packed, *(self._optimizer.param_groups[index][name] for index, name in self._tensors)]

    @property
    def inputs(self) -> frozenset[tuple[int, str]]:
        """(number of the group, name of the option) of those that may move."""
        return frozenset([*self._tensors, *((option.group, option.name) for option in self._options)])

    def current(self) -> list[Tensor] | None:
        """The inputs of this moment, None where an option is not of the kind or sign any more that it was."""
        groups = self._optimizer.param_groups
        try:
            for option in self._options:
                value = groups[option.group][option.name]
                if value is not option.value and not self._take_up(option, value):
                    return None
            if not self._tensors:
                return self._packed
            tensors = [groups[index][name] for index, name in self._tensors]
        except (KeyError, IndexError):  # the option or its group is gone
            return None
        return [*self._packed, *tensors] if all(isinstance(tensor, Tensor) for tensor in tensors) else None

    def stand_ins(self, inputs: Sequence[Tensor]) -> tuple[list[dict[str, Any]], dict[int, int]]:
        """The options as the optimizer's code is to see them in a trace.

        Args:
            inputs: stand-ins for what `current` gives.

        Returns:
            By group, the options that may move; and by the id of each stand-in for a number, its place among them.
        """
        by_group: list[dict[str, Any]] = [{} for _ in self._optimizer.param_groups]
        places: dict[int, int] = {}
        for option in self._options:
            numbers = [inputs[0][option.first + offset] for offset in range(len(_numbers(option.value)))]
            places.update({id(number): option.first + offset for offset, number in enumerate(numbers)})
            by_group[option.group][option.name] = tuple(numbers) if type(option.value) is tuple else numbers[0]
        for (index, name), tensor in zip(self._tensors, inputs[len(self._packed) :], strict=True):
            by_group[index][name] = tensor
        return by_group, places

    def fix_sign(self, place: int) -> int:
        """The sign of a number (-1, 0 or 1), which must stay from now on."""
        return self._signs.setdefault(place, _sign(self._values[place]))

    def note_read(self, name: str | None) -> None:
        """Notes that the optimizer's code asked for an option, or (None) for whatever there is."""
        if name is None:
            self.read = None
        elif self.read is not None:
            self.read.add(name)

    def _add(self, group: int, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and name == "lr":
            self._tensors.append((group, name))
        elif numbers := _numbers(value):
            self._options.append(_Option(group, name, len(self._values), value))
            self._values += numbers

    def _take_up(self, option: _Option, value: Any) -> bool:
        numbers = _numbers(value)
        if (type(value) is tuple) != (type(option.value) is tuple) or len(numbers) != len(_numbers(option.value)):
            return False
        if any(self._signs.get(place, _sign(each)) != _sign(each) for place, each in enumerate(numbers, option.first)):
            return False
        for place, number in enumerate(numbers, option.first):
            if number != self._values[place]:
                self._cells[place].fill_(number)
                self._values[place] = number
        option.value = value
        return True


def _numbers(value: Any) -> list[float]:
    """The numbers of an option: itself, or the entries of a tuple; none where it is anything else."""
    entries: list[Any] = list(cast("tuple[Any, ...]", value)) if type(value) is tuple else [value]
    is_number = all(not isinstance(each, bool) and isinstance(each, Real) for each in entries)
    return [float(each) for each in entries] if is_number else []


def _sign(number: float) -> int:
    return (number > 0) - (number < 0)


class Attributes:
    """The attributes of an object as they are now, with the entries of those that are lists, dicts and sets.

    Args:
        values: the attributes themselves (`vars(object)`), by name.
        ignored: names that are left alone.
    """

    def __init__(self, values: dict[str, Any], ignored: Collection[str] = ()) -> None:
        self._values = values
        self._before = {name: value for name, value in values.items() if name not in ignored}
        self._entries = {name: _entries(value) for name, value in self._before.items() if _is_container(value)}
        self._ignored = ignored

    def changed(self) -> list[str]:
        """The names of those that came or went, or are not the same, or have other entries.

        Equal plain values are the same, and tuples of them.
        """
        names = [name for name in dict.fromkeys([*self._before, *self._values]) if name not in self._ignored]
        return [name for name in names if not self._is_as_before(name)]

    def put_back(self) -> None:
        """Makes them what they were; objects that were not replaced stay the same objects."""
        for name in self.changed():
            if name not in self._before:
                del self._values[name]
                continue
            value: Any = self._before[name]
            self._values[name] = value
            if name not in self._entries or _is_same(_entries(value), self._entries[name]):
                continue
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(_as_given(value, self._entries[name]))

    def _is_as_before(self, name: str) -> bool:
        if name not in self._before or name not in self._values:
            return False
        value = self._values[name]
        return _is_same(value, self._before[name]) and (
            name not in self._entries or _is_same(_entries(value), self._entries[name])
        )


_PLAIN = (bool, int, float, complex, str, bytes, torch.device)


def _is_container(value: Any) -> bool:
    return isinstance(value, list | dict | set)


def _entries(value: Any) -> tuple[Any, ...]:
    """What a container holds, in order, so that it can be compared."""
    if isinstance(value, dict):
        return tuple(cast("dict[Any, Any]", value).items())
    return tuple(cast("list[Any]", value))


def _as_given(value: Any, entries: tuple[Any, ...]) -> Any:
    return dict(entries) if isinstance(value, dict) else entries


def _is_same(value: Any, old: Any) -> bool:
    """One object, or equal plain values, or tuples of such."""
    if value is old:
        return True
    if isinstance(value, tuple) and isinstance(old, tuple):
        these, those = cast("tuple[Any, ...]", value), cast("tuple[Any, ...]", old)
        return len(these) == len(those) and all(map(_is_same, these, those))
    return isinstance(value, _PLAIN) and type(value) is type(old) and value == old
