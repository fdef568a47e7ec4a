"""The gradients of an unfinished group of batches: the parameters' own `grad`, between two graphs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasttrain.step.spec import StepSpec

__all__ = ["Gradients"]


class Gradients:
    """The gradients that a graph adds to, or takes up: the parameters' `grad`, as eager steps keep them.

    Because they are the user's own, an eager step may follow a compiled one in the middle of a group, and the reverse.

    Args:
        spec: the step.
        parameters: those of `spec.with_gradients()` that the graph has gradients for.
    """

    def __init__(self, spec: StepSpec, parameters: Sequence[Tensor]) -> None:
        own = {id(parameter) for parameter in parameters}
        self._spec = spec
        self._parameters = list(parameters)
        self._others = [parameter for parameter in spec.with_gradients() if id(parameter) not in own]
        self._fresh: list[Tensor] = []

    def current(self) -> list[Tensor] | None:
        """One tensor a parameter, new ones where a group begins; None where other steps have left other gradients."""
        self._fresh = []
        if any(parameter.grad is not None for parameter in self._others):
            return None
        found = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if self._spec.gathered.count:
            return found if len(found) == len(self._parameters) else None
        if found:
            return None
        self._fresh = [torch.zeros_like(parameter) for parameter in self._parameters]
        return list(self._fresh)

    def keep(self) -> None:
        """After a graph has added a batch's gradients to what `current` gave."""
        for parameter, gradient in zip(self._parameters, self._fresh, strict=False):
            parameter.grad = gradient
        self._fresh = []
        self._spec.gathered.count += 1

    def drop(self) -> None:
        """After a graph has stepped the optimizer with them."""
        for parameter in self._parameters:
            parameter.grad = None
        self._spec.gathered.count = 0
