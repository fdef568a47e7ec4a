"""The options of parameter groups that schedulers move, as tensors that a graph takes as inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["MOVED", "GroupOptions"]

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
