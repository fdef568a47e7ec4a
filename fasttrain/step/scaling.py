"""What `torch.amp.GradScaler` does around a step, as part of the graph: nobody waits to learn whether to skip."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["LossScaling"]


class LossScaling:
    """The scaler of fp16's loss, over stand-ins for its tensors.

    Args:
        scaler: the user's; its factors are constants of the graph.
        scale: stand-in for the factor of the loss, a scalar.
        good_steps: stand-in for its count of steps without an infinity, a scalar.
    """

    def __init__(self, scaler: torch.amp.GradScaler, scale: Tensor, good_steps: Tensor) -> None:
        self._growth = scaler.get_growth_factor()
        self._backoff = scaler.get_backoff_factor()
        self._interval = scaler.get_growth_interval()
        self._scale = scale
        self._good_steps = good_steps

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss times the scale."""
        return loss * self._scale

    def unscale(self, gradients: Sequence[Tensor], others: Sequence[Tensor] = ()) -> Tensor:
        """Divides gradients by the scale, in place.

        Args:
            gradients: of the optimizer's parameters.
            others: of other parameters of the model, which count in the norm that is clipped.

        Returns:
            Whether there is an infinity or NaN among `gradients` (as `GradScaler` looks), a scalar of bool.
        """
        inverse = self._scale.double().reciprocal().float()  # as GradScaler does: rounded once
        found = torch.stack([gradient.isfinite().logical_not().any() for gradient in gradients]).any()
        for gradient in (*gradients, *others):
            gradient.mul_(inverse)
        return found

    def update(self, is_skipped: Tensor) -> None:
        """Backs off after a step that is skipped, grows after so many that are not."""
        good_steps = torch.where(is_skipped, 0, self._good_steps + 1)
        is_due = good_steps == self._interval
        grown = self._scale * self._growth
        grown = torch.where(is_due & grown.isfinite(), grown, self._scale)
        self._scale.copy_(torch.where(is_skipped, self._scale * self._backoff, grown))
        self._good_steps.copy_(torch.where(is_due, 0, good_steps))
