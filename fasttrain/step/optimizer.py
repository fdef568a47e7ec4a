"""The step of the user's own optimizer, by its own code, over stand-ins for its tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fasttrain.errors import EngineError
from fasttrain.step.state import StepState
from fasttrain.step.torch_private import reported_as_compiling

__all__ = ["OptimizerStep"]

_BRANCHES_ON_VALUES = (torch.optim.RAdam, torch.optim.ASGD, torch.optim.Rprop)
"""Their default code branches on values of tensors; their `capturable` code computes the same without."""

_SCALARS = frozenset({"step", "mu_product", "eta", "mu"})
"""State that optimizers read as Python numbers, in double precision."""


class OptimizerStep:
    """The step of the user's optimizer, by its own code, over stand-ins for its tensors.

    It runs in a twin that shares the optimizer's attributes and has groups and state of its own, so that nothing of the
    user's has to be put back.

    Args:
        optimizer: the user's.
        state: where everything is.
        tensors: the stand-ins, in the order of `state`; trained ones have their gradients.
        rates: stand-ins for the learning rates, one a group.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, state: StepState, tensors: list[Tensor], rates: Sequence[Tensor]
    ) -> None:
        self._optimizer = optimizer
        self._state = state
        self._tensors = tensors
        self._twin: Any = object.__new__(type(optimizer))
        self._twin.__dict__.update(optimizer.__dict__)
        self._twin.__dict__.pop("step", None)  # a scheduler's wrapper, bound to the user's optimizer
        self._twin.param_groups = [
            self._group(group, places, rate)
            for group, places, rate in zip(optimizer.param_groups, state.groups, rates, strict=True)
        ]
        self._twin.state = defaultdict(dict, {tensors[place]: self._entries(place) for place in state.slots})

    def run(self) -> None:
        """Steps the twin and brings what it changed to the stand-ins."""
        groups = [dict(group) for group in self._twin.param_groups]
        before = {parameter: dict(entries) for parameter, entries in self._twin.state.items()}
        with reported_as_compiling(), _TensorsForNumbers():
            type(self._optimizer).step(self._twin)
        if any(group != old for group, old in zip(self._twin.param_groups, groups, strict=True)):
            raise EngineError(f"{self._name} changes its parameter groups in every step: a graph would not see that")
        for parameter, entries in self._twin.state.items():
            for key, value in entries.items():
                if key not in before.get(parameter, {}):
                    raise EngineError(f"{self._name} has not made its state yet: run one step eagerly, then trace")
                self._write_back(parameter, key, before[parameter][key], value)

    @property
    def _name(self) -> str:
        return type(self._optimizer).__name__

    def _group(self, group: dict[str, Any], places: list[int], rate: Tensor) -> dict[str, Any]:
        twin = {**group, "params": [self._tensors[place] for place in places], "lr": rate}
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
                raise EngineError(f"{self._name} keeps {key!r} as a Python value: a graph would not change it")
            return
        slots = next(s for place, s in self._state.slots.items() if self._tensors[place] is parameter)
        home = self._tensors[slots[key]]
        if new is not home:
            home.copy_(new)


class _TensorsForNumbers(TorchFunctionMode):
    """Lets optimizers use scalar tensors where torch takes only numbers: `add(x, y, alpha=rate)` and its kin."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Multiplies the second operand by a factor that is a tensor, which is what these operators do with numbers."""
        kwargs = kwargs or {}
        for name in ("alpha", "value"):
            factor = kwargs.get(name)
            if isinstance(factor, Tensor) and len(args) > 1:
                kwargs = {key: value for key, value in kwargs.items() if key != name}
                args = (args[0], args[1] * factor, *args[2:])
        return func(*args, **kwargs)
