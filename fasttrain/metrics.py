"""Running loss and accuracy as device tensors, and the late readout that nothing waits for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["AccuracyRule", "LossObserver", "Metric", "Readout", "RunningMetrics"]

Metric = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""A user's metric: (loss, predictions, targets) -> a scalar tensor on the device, the batch's value."""

AccuracyRule = Literal["argmax", "logit", "probability"]
"""argmax: class indices against the largest prediction; logit: 0/1 against prediction > 0; probability: > 0.5."""


@dataclass(frozen=True, kw_only=True)
class Readout:
    """Metrics as plain numbers.

    Attributes:
        loss: mean loss; None before the first batch.
        accuracy: percent; None where it has no meaning.
        metrics: the user's metrics by name.
    """

    loss: float | None
    accuracy: float | None
    metrics: dict[str, float] = field(default_factory=dict[str, float])


class RunningMetrics:
    """Sums of loss, accuracy and user metrics, kept on the device and updated without a host read.

    A batch counts with the weight that `update` is given: 1 for a mean of the batches' values (the book's running
    mean, in training), the number of samples for a mean over samples (evaluation).

    Args:
        device: where the sums live.
        metrics: the user's metrics by name; each is called once a batch and must not read the device.
        accuracy: how predictions are compared with targets: "argmax" (class indices against the largest prediction
            over dimension 1), "logit" (0/1 against prediction > 0) or "probability" (0/1 against > 0.5); None: there
            is no accuracy. `TrainStep` and `FastLoop` learn it from the first batch.
    """

    def __init__(
        self,
        device: str | torch.device,
        metrics: Mapping[str, Metric] | None = None,
        *,
        accuracy: AccuracyRule | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.user_metrics = dict(metrics or {})
        self.rule: AccuracyRule | None = accuracy
        # float64, so that sums over millions of batches keep what float32 batches bring.
        self.totals = torch.zeros(2 + len(self.user_metrics), dtype=torch.float64, device=device)
        self._cells = list(self.totals.unbind())
        self._weight = 0.0
        self._late = _LateCopy(self.totals)

    def reset(self) -> None:
        """Starts a new epoch: all sums are zero again."""
        self.totals.zero_()
        self._weight = 0.0
        self._late.discard()

    def update(
        self, loss: Tensor, predictions: Tensor | None = None, targets: Tensor | None = None, *, weight: float = 1.0
    ) -> None:
        """Adds a batch.

        Args:
            loss: scalar, the batch's mean loss; detached or not.
            predictions: what the rule of accuracy compares with the targets, or None.
            targets: class indices or 0/1, or None.
            weight: what the batch counts.
        """
        with torch.no_grad():
            self.accumulate(self._cells, loss, predictions, targets, weight)
        self.count(weight)

    def count(self, weight: float) -> None:
        """The host's half of `update`: a batch of this weight was added to the totals."""
        self._weight += weight

    def accumulate(
        self,
        cells: list[Tensor],
        loss: Tensor,
        predictions: Tensor | None,
        targets: Tensor | None,
        weight: float,
        values: Sequence[Tensor] | None = None,
    ) -> None:
        """The device's half of `update`: adds a batch to `cells`, the scalars of `totals`, in place.

        Reads no state but `rule` and `user_metrics`, so that a compiled step can hold it.

        Args:
            cells: where to add.
            loss: see `update`.
            predictions: see `update`.
            targets: see `update`.
            weight: see `update`.
            values: of the user's metrics; None: they are called.
        """
        cells[0].add_(loss, alpha=weight)
        if self.rule is not None and predictions is not None and targets is not None:
            correct = count_correct(self.rule, predictions, targets)
            cells[1].add_(correct, alpha=100.0 * weight / max(1, targets.numel()))
        if values is None:
            values = [metric(loss, predictions, targets) for metric in self.user_metrics.values()]
        for cell, value in zip(cells[2:], values, strict=True):
            cell.add_(value, alpha=weight)

    def read_late(self) -> Readout | None:
        """The sums as of an earlier call, without waiting; None until one has arrived. Starts the next copy."""
        arrived = self._late.exchange(self._weight)
        return None if arrived is None else self._readout(*arrived)

    def compute(self) -> Readout:
        """The exact metrics of all batches so far. Waits for the device."""
        return self._readout(self.totals.tolist(), self._weight)  # HOST READ: once an epoch, at its end

    def _readout(self, totals: list[float], weight: float) -> Readout:
        if not weight:
            return Readout(loss=None, accuracy=None)
        means = [total / weight for total in totals]
        return Readout(
            loss=means[0],
            accuracy=means[1] if self.rule is not None else None,
            metrics=dict(zip(self.user_metrics, means[2:], strict=True)),
        )


class _LateCopy:
    """Brings a small device tensor to the host without making anyone wait: what is read is one interval old."""

    def __init__(self, source: Tensor) -> None:
        self._source = source
        self._is_cuda = source.device.type == "cuda"
        self._host = torch.empty(source.shape, dtype=source.dtype, pin_memory=self._is_cuda)
        self._view = self._host.numpy()  # HOST READ: of host memory, once; later reads of the view touch no torch
        self._event = torch.cuda.Event() if self._is_cuda else None
        self._weight: float | None = None

    def discard(self) -> None:
        self._weight = None

    def exchange(self, weight: float) -> tuple[list[float], float] | None:
        """The copy that an earlier call started (None if none, or still under way); starts a new one."""
        if self._weight is not None and self._event is not None and not self._event.query():
            return None
        arrived = None if self._weight is None else (list(map(float, self._view)), self._weight)
        self._host.copy_(self._source, non_blocking=True)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._source.device))
        self._weight = weight
        return arrived


def count_correct(rule: AccuracyRule, predictions: Tensor, targets: Tensor) -> Tensor:
    """How many predictions are right, as a scalar tensor on the device.

    Args:
        rule: how predictions become labels.
        predictions: [batch, classes, ...] for "argmax", else the targets' shape.
        targets: [batch, ...], class indices for "argmax", else 0 and 1.
    """
    if rule == "argmax":
        labels = predictions.argmax(dim=1)
    else:
        labels = predictions > (0.0 if rule == "logit" else 0.5)
    return labels.eq(targets).sum(dtype=torch.float64)


class LossObserver(TorchFunctionMode):
    """Watches one forward pass, to learn which rule of accuracy its loss implies; it never guesses.

    Class indices with a class dimension in the predictions are compared by argmax. Predictions and 0/1 targets of one
    shape count as logits or probabilities only where the forward pass handed these very predictions to the matching
    binary cross-entropy. Anything else has no accuracy.
    """

    def __init__(self) -> None:
        super().__init__()
        self._binary: list[tuple[AccuracyRule, Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Notes calls of the binary cross-entropies and passes every call on."""
        kwargs = kwargs or {}
        rule: AccuracyRule | None = None
        if func is F.binary_cross_entropy_with_logits:
            rule = "logit"
        elif func is F.binary_cross_entropy:
            rule = "probability"
        if rule is not None:
            self._binary.append((rule, args[0] if args else kwargs["input"]))
        return func(*args, **kwargs)

    def rule(self, predictions: Tensor | None, targets: Tensor | None) -> AccuracyRule | None:
        """The rule for these predictions and targets, None where accuracy has no meaning. Waits for the device."""
        if predictions is None or targets is None or targets.numel() == 0:
            return None
        if not targets.is_floating_point() and predictions.dim() == targets.dim() + 1:
            without_classes = predictions.shape[:1] + predictions.shape[2:]
            has_classes = predictions.dim() > 1 and predictions.shape[1] > 1
            is_index = has_classes and predictions.is_floating_point() and without_classes == targets.shape
            # HOST READ: once, on the first batch. Negative indices mark positions to ignore: they would count as wrong.
            return "argmax" if is_index and not bool((targets < 0).any()) else None
        if predictions.shape != targets.shape:
            return None
        for rule, scored in self._binary:
            if scored.data_ptr() == predictions.data_ptr() and scored.numel() == predictions.numel():
                is_binary = bool(((targets == 0) | (targets == 1)).all())  # HOST READ: once, on the first batch
                return rule if is_binary else None
        return None
