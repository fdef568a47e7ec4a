"""The state of a step at one moment, to go back to: what is compared, warmed up or measured trains nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fasttrain.device import free_bytes
from fasttrain.step.spec import StepSpec

__all__ = ["Snapshot", "fits_in_memory"]


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
