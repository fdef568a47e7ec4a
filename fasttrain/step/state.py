"""The tensors that a step reads and changes, the user's own, and snapshots of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fasttrain.device import free_bytes
from fasttrain.errors import EngineError
from fasttrain.step.spec import StepSpec
from fasttrain.step.torch_private import scaler_tensors

__all__ = ["METRICS", "PARAMETERS", "Snapshot", "StepState", "fits_in_memory", "why_not_plain"]

METRICS, PARAMETERS = "metrics", "parameters"
"""Kinds of tensors that a program is judged by in their own way; any other is state of the optimizer or a buffer."""


def why_not_plain(tensor: Tensor) -> str | None:
    """Why a graph cannot take a tensor as dense memory that it reads and writes; None where it can."""
    if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
        return f"is of the class {type(tensor).__name__}"
    if tensor.is_nested:  # before its layout, which is strided
        return "is a nested tensor"
    if tensor.layout != torch.strided:
        return f"has the layout {tensor.layout}"
    if tensor.is_quantized:
        return "is quantized"
    if tensor.is_conj() or tensor.is_neg():
        return "is a conjugated or negated view"
    return None


class StepState:
    """The tensors that a step reads and changes, in the order of the graph's inputs.

    Args:
        spec: the step.

    Attributes:
        names: of each tensor.
        kinds: of each tensor: "parameters", "buffers", "metrics", "scaler", or an entry of the optimizer's state
            ("exp_avg").
        tensors: model parameters, other trained parameters, buffers, optimizer state, totals of the metrics, what
            scales the loss.
        groups: for each group of the optimizer, where its parameters are in `tensors`.
        slots: for each trained parameter that has state (by its place in `tensors`), where each entry of it is.
        scaler: where the scaler's factor and its count of good steps are, nothing where there is no scaler.
    """

    def __init__(self, spec: StepSpec) -> None:
        self.names: list[str] = []
        self.kinds: list[str] = []
        self.tensors: list[Tensor] = []
        self._places: dict[int, int] = {}
        self.parameters = {name: self._add(name, PARAMETERS, value) for name, value in spec.model.named_parameters()}
        self.groups = [
            [self._add(f"group {number}", PARAMETERS, parameter) for parameter in group["params"]]
            for number, group in enumerate(spec.optimizer.param_groups)
        ]
        self.buffers = {name: self._add(name, "buffers", value) for name, value in spec.model.named_buffers()}
        self.slots = dict(self._add_slots(spec.optimizer))
        self.totals = self._add("metrics", METRICS, spec.metrics.totals)
        of_scaler = () if spec.scaler is None else scaler_tensors(spec.scaler) or ()
        self.scaler = [self._add(f"scaler {number}", "scaler", tensor) for number, tensor in enumerate(of_scaler)]

    @property
    def signature(self) -> Any:
        """Everything about the state but which objects hold it and their values."""
        metadata = [(t.shape, t.dtype, t.stride(), t.device, t.requires_grad) for t in self.tensors]
        return self.names, metadata, self.parameters, self.groups, self.buffers, self.slots, self.totals, self.scaler

    def place_of(self, tensor: Tensor) -> int | None:
        """Where a tensor is in `tensors`; None where it is no part of the state."""
        return self._places.get(id(tensor))

    def refuse_overlaps(self) -> None:
        """Checks that each tensor is plain memory and that no two share any, which a graph could not know.

        Raises:
            EngineError: one is sparse or the like, or two share memory.
        """
        for name, tensor in zip(self.names, self.tensors, strict=True):
            why = why_not_plain(tensor)
            if why is not None:
                raise EngineError(f"{name!r} {why}: only dense (strided) tensors are traced")
        for (_, end, first), (begin, _, second) in pairwise(self._spans()):
            if begin < end:
                raise EngineError(f"{first!r} and {second!r} share memory without being one tensor")

    def refuse_closed_over(self, tensors: Sequence[Tensor]) -> None:
        """Checks that what forward or a metric reads without being given it is plain memory and no part of the state.

        A graph takes it as an input of its own, and would not see there what the step has changed in the state.

        Raises:
            EngineError: one of these tensors is sparse or the like, or shares memory with the state.
        """
        spans = self._spans()
        for tensor in tensors:
            why = why_not_plain(tensor)
            if why is not None:
                raise EngineError(f"forward holds a tensor that {why}: only dense (strided) tensors are traced")
            begin = tensor.data_ptr()
            end = begin + _extent(tensor) if tensor.numel() else begin
            for first, last, name in spans:
                if first < end and begin < last:
                    raise EngineError(
                        f"forward or a metric holds {name!r} directly: take it from the model that forward is given, "
                        "or return from forward what the metric needs"
                    )

    def _spans(self) -> list[tuple[int, int, str]]:
        """Where each tensor's memory begins and ends, in rising order."""
        return sorted(
            (tensor.data_ptr(), tensor.data_ptr() + _extent(tensor), name)
            for name, tensor in zip(self.names, self.tensors, strict=True)
            if tensor.numel()
        )

    def _add(self, name: str, kind: str, tensor: Tensor) -> int:
        place = self._places.get(id(tensor))
        if place is None:
            place = self._places[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
            self.names.append(name)
            self.kinds.append(kind)
        return place

    def _add_slots(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, dict[str, int]]]:
        for place in [place for group in self.groups for place in group]:
            entries: dict[str, Any] = optimizer.state.get(self.tensors[place], {})
            found = {
                key: self._add(f"{key} of {self.names[place]}", key, value)
                for key, value in entries.items()
                if isinstance(value, Tensor)
            }
            if found:
                yield place, found


def _extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first entry to the end of its last."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.element_size()


@dataclass(frozen=True)
class Snapshot:
    """Copies of tensors and gradients, and of the random generator's state, at one moment."""

    copies: list[Tensor]
    gradients: list[Tensor | None]
    num_gathered: int
    rng: Tensor
    cuda_rng: Tensor | None

    @classmethod
    def of(cls, tensors: Sequence[Tensor], device: torch.device, spec: StepSpec | None = None) -> Snapshot:
        """Copies the tensors, and a step's gradients if one is given; the generators are the CPU's and the device's."""
        cuda_rng = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(
            [tensor.detach().clone() for tensor in tensors],
            [] if spec is None else [_copied(each.grad) for each in spec.with_gradients()],
            0 if spec is None else spec.gathered.count,
            torch.get_rng_state(),
            cuda_rng,
        )

    @torch.no_grad()
    def restore(self, tensors: Sequence[Tensor], device: torch.device, spec: StepSpec | None = None) -> None:
        """Brings tensors, gradients and generators back, bit for bit."""
        if spec is not None:
            spec.gathered.count = self.num_gathered
            for parameter, gradient in zip(spec.with_gradients(), self.gradients, strict=True):
                parameter.grad = None if gradient is None else gradient.clone()
        for tensor, copy in zip(tensors, self.copies, strict=True):
            tensor.copy_(copy)
        torch.set_rng_state(self.rng)
        if self.cuda_rng is not None:
            torch.cuda.set_rng_state(self.cuda_rng, device)


def _copied(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.clone()


def fits_in_memory(tensors: Sequence[Tensor], device: torch.device) -> bool:
    """True where two copies of the tensors take at most half of the memory that is free."""
    free = free_bytes(device)
    return free is None or 2 * sum(tensor.nbytes for tensor in tensors) <= free // 2
