"""Running loss and accuracy as device tensors, and the late readout that nothing waits for."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal, NamedTuple, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fasttrain.errors import ConfigError

__all__ = [
    "FIRST_USER_TOTAL",
    "AccuracyRule",
    "BatchMetric",
    "EpochMetric",
    "LossObserver",
    "Metric",
    "Readout",
    "RunningMetrics",
    "Scoring",
    "copies_of",
    "count_correct",
    "scoring_of",
]

BatchMetric = Callable[[Tensor, Any, Any], Tensor]
"""A user's metric of one batch: (loss, predictions, targets) -> a scalar tensor on the device. An epoch's value is the
mean of its batches' values, which is right for a mean (an error, a share) and wrong for a ratio such as F1."""


@runtime_checkable
class EpochMetric(Protocol):
    """A user's metric of a whole epoch, such as those of torchmetrics: it is given every batch, then computed once."""

    def update(self, predictions: Tensor, targets: Tensor, /) -> Any:
        """Takes a batch, on the device."""
        ...

    def compute(self) -> Any:
        """The epoch's value: one number, or a scalar tensor."""
        ...

    def reset(self) -> Any:
        """Starts a new epoch."""
        ...


Metric = BatchMetric | EpochMetric

AccuracyRule = Literal["argmax", "logit", "probability"]
"""argmax: class indices against the largest prediction; logit: 0/1 against prediction > 0; probability: > 0.5."""


class Scoring(NamedTuple):
    """How the predictions of one batch are compared with its targets.

    Attributes:
        rule: how predictions become labels.
        skips_negative: whether negative class indices are positions that the loss ignores. Where it is False, one of
            them leaves the epoch without an accuracy.
        ignored: another class index that the loss ignores (such as 0 for padding); None where there is none.
    """

    rule: AccuracyRule
    skips_negative: bool = False
    ignored: int | None = None


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


_LOSS, _RIGHT, _SCORED, _UNKNOWN = range(4)
FIRST_USER_TOTAL = 4
"""`RunningMetrics.totals`: of the loss, of accuracy (right, scored, batches that have none), then of the user's."""


class RunningMetrics:
    """Sums of loss, accuracy and user metrics, kept on the device and updated without a host read.

    A batch counts with the weight that `update` is given: 1 for a mean of the batches' values (the book's running
    mean, in training), the number of samples for a mean over samples (evaluation).

    Accuracy: of each batch, the share of right positions among those that the loss does not ignore, averaged over
    the batches that have such positions; or (`pools_accuracy`) the share of all positions together. One batch whose
    targets have no accuracy (soft targets, a regression) leaves all of them without one. A batch of no rows counts
    for nothing.

    Args:
        device: where the sums live.
        metrics: the user's metrics by name. A `BatchMetric` is called once a batch, must not read the device, and is
            averaged over the batches like the loss. An `EpochMetric` is given each batch and computed once.
        accuracy: how predictions are compared with targets, where `update` is not told otherwise: "argmax" (class
            indices against the largest prediction over dimension 1; negative indices are ignored), "logit" (0/1
            against prediction > 0) or "probability" (0/1 against > 0.5); None: there is no accuracy.
        pools_accuracy: whether accuracy is over all positions, and not a mean of the batches'.

    Attributes:
        totals: the sums, float64, [4 + the number of `BatchMetric`s].
        user_metrics: those of the metrics that are averaged over batches, by name.
        epoch_metrics: those that are computed from the whole epoch, by name.

    Raises:
        ConfigError: a metric is neither a function nor an object with `update`, `compute` and `reset`.
    """

    def __init__(
        self,
        device: str | torch.device,
        metrics: Mapping[str, Metric] | None = None,
        *,
        accuracy: AccuracyRule | None = None,
        pools_accuracy: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self._names = list(metrics or {})
        self.epoch_metrics = {name: each for name, each in (metrics or {}).items() if isinstance(each, EpochMetric)}
        self.user_metrics = {
            name: _batch_metric(name, each) for name, each in (metrics or {}).items() if name not in self.epoch_metrics
        }
        self.rule: AccuracyRule | None = accuracy
        self._pools_accuracy = pools_accuracy
        # float64, so that sums over millions of batches keep what float32 batches bring.
        num_totals = FIRST_USER_TOTAL + len(self.user_metrics)
        self.totals = torch.zeros(num_totals, dtype=torch.float64, device=device)
        self._cells = list(self.totals.unbind())
        self._weight = 0.0
        self._late = _LateCopy(self.totals)

    def reset(self) -> None:
        """Starts a new epoch: all sums are zero again."""
        self.totals.zero_()
        self._weight = 0.0
        self._late.discard()
        for metric in self.epoch_metrics.values():
            metric.reset()

    def update(
        self,
        loss: Tensor,
        predictions: Any = None,
        targets: Any = None,
        *,
        weight: float = 1.0,
        scoring: Scoring | None = None,
    ) -> None:
        """Adds a batch.

        Args:
            loss: scalar, the batch's mean loss; detached or not.
            predictions: what the rule of accuracy compares with the targets, or None.
            targets: class indices or 0/1, or None.
            weight: what the batch counts. 0: nothing, even where the loss is NaN (the mean over a batch of no rows).
            scoring: of this batch (see `scoring_of`); None: by the rule that the metrics were made with.

        Raises:
            ConfigError: a metric of the epoch needs predictions and targets, and there are none.
        """
        if not weight:
            return
        with torch.no_grad():
            self.accumulate(self._cells, loss, predictions, targets, weight, scoring)
            for name, metric in self.epoch_metrics.items():
                _update_epoch_metric(name, metric, predictions, targets)
        self.count(weight)

    def count(self, weight: float) -> None:
        """The host's half of `update`: a batch of this weight was added to the totals."""
        self._weight += weight

    def accumulate(
        self,
        cells: list[Tensor],
        loss: Tensor,
        predictions: Any,
        targets: Any,
        weight: float,
        scoring: Scoring | None = None,
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
            scoring: see `update`.
            values: of the user's metrics; None: they are called.

        Raises:
            ConfigError: a metric returned neither a number nor a tensor with one element.
        """
        cells[_LOSS].add_(loss, alpha=weight)
        if scoring is None and self.rule is not None:
            scoring = Scoring(self.rule, skips_negative=True)
        if isinstance(predictions, Tensor) and isinstance(targets, Tensor) and targets.numel() != 0:
            self._accumulate_accuracy(cells, predictions, targets, weight, scoring)
        if values is None:
            values = [metric(loss, predictions, targets) for metric in self.user_metrics.values()]
        for name, cell, value in zip(self.user_metrics, cells[FIRST_USER_TOTAL:], values, strict=True):
            cell.add_(_number(name, value), alpha=weight)

    def _accumulate_accuracy(
        self, cells: list[Tensor], predictions: Tensor, targets: Tensor, weight: float, scoring: Scoring | None
    ) -> None:
        if scoring is None:
            cells[_UNKNOWN].add_(1.0)
            return
        correct, scored = _score(scoring, predictions, targets)
        if _may_be_senseless(scoring, targets):
            cells[_UNKNOWN].add_(_is_senseless(scoring, targets))
        if self._pools_accuracy:
            cells[_RIGHT].add_(correct)
            cells[_SCORED].add_(scored)
        elif isinstance(scored, Tensor):
            cells[_RIGHT].add_(correct / scored.clamp(min=1), alpha=weight)
            cells[_SCORED].add_(scored.clamp(max=1), alpha=weight)
        else:
            cells[_RIGHT].add_(correct, alpha=weight / scored)
            cells[_SCORED].add_(weight)

    def read_late(self) -> Readout | None:
        """The sums as of an earlier call, without waiting; None until one has arrived. Starts the next copy.

        Metrics of the epoch are not among them.
        """
        arrived = self._late.exchange(self._weight)
        return None if arrived is None else self._readout(*arrived)

    def compute(self) -> Readout:
        """The exact metrics of all batches so far. Waits for the device.

        Raises:
            ConfigError: a metric of the epoch does not compute one number.
        """
        found = self._readout(self.totals.tolist(), self._weight)  # HOST READ: once an epoch, at its end
        if self.epoch_metrics and self._weight:
            found.metrics.update((name, _computed(name, each)) for name, each in self.epoch_metrics.items())
            values = {name: found.metrics[name] for name in self._names}  # in the order in which they were given
            return Readout(loss=found.loss, accuracy=found.accuracy, metrics=values)
        return found

    def _readout(self, totals: list[float], weight: float) -> Readout:
        if not weight:
            return Readout(loss=None, accuracy=None)
        means = [total / weight for total in totals[FIRST_USER_TOTAL:]]
        has_accuracy = totals[_SCORED] > 0 and totals[_UNKNOWN] == 0
        return Readout(
            loss=totals[_LOSS] / weight,
            accuracy=100.0 * totals[_RIGHT] / totals[_SCORED] if has_accuracy else None,
            metrics=dict(zip(self.user_metrics, means, strict=True)),
        )


def copies_of(metrics: Mapping[str, Metric] | None) -> dict[str, Metric]:
    """The same metrics with states of their own, for a second pass that may run in the middle of the first."""
    return {
        name: copy.deepcopy(each) if isinstance(each, EpochMetric) else each for name, each in (metrics or {}).items()
    }


def _batch_metric(name: str, metric: Any) -> BatchMetric:
    if not callable(metric):
        raise ConfigError(
            f"metric {name!r} is of type {type(metric).__name__}: give a function (loss, predictions, targets) -> "
            "scalar tensor, or an object with update(predictions, targets), compute() and reset()"
        )
    return cast("BatchMetric", metric)


def _update_epoch_metric(name: str, metric: EpochMetric, predictions: Tensor | None, targets: Tensor | None) -> None:
    if predictions is None or targets is None:
        raise ConfigError(
            f"metric {name!r} is updated with predictions and targets, and forward returned a loss alone: return "
            "(loss, predictions, targets)"
        )
    if targets.numel():
        metric.update(predictions.detach(), targets)


def _computed(name: str, metric: EpochMetric) -> float:
    value = metric.compute()
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ConfigError(
            f"metric {name!r} computes a tensor of shape {list(value.shape)}: give one that computes one number (an "
            "average over classes, or one metric a class)"
        )
    try:
        return float(value)  # HOST READ: once an epoch, at its end
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"metric {name!r} computes a {type(value).__name__}: give one that computes one number"
        ) from error


class _LateCopy:
    """Brings a small device tensor to the host without making anyone wait: what is read is one interval old."""

    def __init__(self, source: Tensor) -> None:
        self._source = source
        self._is_cuda = source.device.type == "cuda"
        self._host = torch.empty(source.shape, dtype=source.dtype, pin_memory=self._is_cuda)
        self._view = self._host.numpy()  # HOST READ: of host memory, once; later reads of the view touch no torch
        self._event = torch.cuda.Event() if self._is_cuda else None
        self._weight: float | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _LateCopy:
        return _LateCopy(copy.deepcopy(self._source, memo))  # a view of the host's memory is no view in a copy

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
    return _hits(rule, predictions, targets).sum(dtype=torch.float64)


def _hits(rule: AccuracyRule, predictions: Tensor, targets: Tensor) -> Tensor:
    if rule == "argmax":
        labels = predictions.argmax(dim=1)
    else:
        labels = predictions > (0.0 if rule == "logit" else 0.5)
    return labels.eq(targets)


def _score(scoring: Scoring, predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | int]:
    """How many positions are right, and how many count: a number where no position can be ignored."""
    hits = _hits(scoring.rule, predictions, targets)
    if scoring.rule != "argmax" or not scoring.skips_negative:
        return hits.sum(dtype=torch.float64), targets.numel()
    counted = targets >= 0  # argmax never gives a negative index: those are no hits
    if scoring.ignored is not None:
        counted = counted & (targets != scoring.ignored)
        hits = hits & counted
    return hits.sum(dtype=torch.float64), counted.sum()


def _number(name: str, value: Any) -> Any:
    """The value of a user's metric for a batch: a float or a scalar tensor."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.reshape(())
    if isinstance(value, Real):
        return float(value)
    found = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise ConfigError(f"metrics[{name!r}] must return a number or a tensor with one element; it returned {found}")


def _may_be_senseless(scoring: Scoring, targets: Tensor) -> bool:
    """Whether it depends on the values of the targets that there is an accuracy."""
    if scoring.rule == "argmax":
        return not scoring.skips_negative and targets.dtype.is_signed
    return targets.dtype != torch.bool


def _is_senseless(scoring: Scoring, targets: Tensor) -> Tensor:
    """Whether a target is neither a class nor ignored, or neither 0 nor 1: a scalar of bool on the device."""
    if scoring.rule == "argmax":
        return (targets < 0).any()
    return (targets * targets != targets).any()  # also where it is NaN


def scoring_of(loss: Tensor, predictions: Any, targets: Any) -> Scoring | None:
    """How a batch's predictions are compared with its targets, by dtypes, shapes and the loss's autograd graph.

    Class indices with a class dimension in the predictions are compared by argmax; positions that a cross-entropy in
    the loss ignores (`ignore_index`) are left out. Predictions and 0/1 targets of one shape count as logits or
    probabilities only where these very predictions were given to the matching binary cross-entropy. Anything else has
    no accuracy. Call it before the backward pass, which frees the graph. It reads no values.

    Args:
        loss: scalar, with its graph.
        predictions: what forward returned.
        targets: what forward returned.

    Returns:
        None where accuracy has no meaning.
    """
    if not isinstance(predictions, Tensor) or not isinstance(targets, Tensor):
        return None
    has_classes = _has_classes(predictions, targets)
    if not has_classes and predictions.shape != targets.shape:
        return None
    ignored: list[int] = []
    nodes = _loss_nodes(loss)
    for node in nodes:
        name = node.name()
        if has_classes and name in _CROSS_ENTROPIES:
            ignored.append(ctypes.c_int64(node._saved_ignore_index).value)  # torch gives -100 without its sign
        elif not has_classes and name in _BINARY and _is_input_of(node, predictions):
            return Scoring(_BINARY[name])
    return _argmax(ignored) if has_classes and len(nodes) < _MOST_NODES else None


_CROSS_ENTROPIES = frozenset({"NllLossBackward0", "NllLoss2DBackward0"})

_BINARY: dict[str, AccuracyRule] = {
    "BinaryCrossEntropyWithLogitsBackward0": "logit",
    "BinaryCrossEntropyBackward0": "probability",
}

_ARITHMETIC = frozenset(
    "Add Alias Cat Clone Div Exp Expand Index MaskedFill MaskedSelect Mean Mul Nansum Neg Permute Pow ReshapeAlias "
    "Rsub Select Slice Squeeze Stack Sub Sum ToCopy Transpose Unsqueeze UnsafeView View Where".split()
)
"""What a loss is put together with, by the names of autograd's nodes: parts are averaged, weighted and added up."""

_SAME_ENTRIES = frozenset("Alias Clone ReshapeAlias Squeeze ToCopy Unsqueeze UnsafeView View".split())
"""What gives the same entries in the same order, in another shape or dtype."""

_MOST_NODES = 256
"""A loss that is put together from more parts than this is not looked through: its batches have no accuracy."""


def _loss_nodes(loss: Tensor) -> list[Any]:
    """The nodes of the loss's graph in which the loss functions may be, from the loss on."""
    found: list[Any] = [] if loss.grad_fn is None else [loss.grad_fn]
    seen = set(found)
    for node in found:  # it grows meanwhile
        if len(found) < _MOST_NODES and _kind(node) in _ARITHMETIC:
            inner = [each for each, _ in node.next_functions if each is not None and each not in seen]
            found += dict.fromkeys(inner)
            seen.update(inner)
    return found


def _kind(node: Any) -> str:
    """Such as "Add" for "AddBackward0"."""
    return node.name().partition("Backward")[0]


def _is_input_of(node: Any, predictions: Tensor) -> bool:
    """Whether the first input of a loss function is the predictions, as they are or in another shape."""
    if predictions.grad_fn is None:  # they were detached
        return _is_same_memory(node._saved_self, predictions)
    return _origin(node.next_functions[0]) == _origin((predictions.grad_fn, predictions.output_nr))


def _origin(edge: tuple[Any, int]) -> tuple[Any, int]:
    while edge[0] is not None and _kind(edge[0]) in _SAME_ENTRIES:
        edge = edge[0].next_functions[0]
    return edge


def _is_same_memory(one: Tensor, other: Tensor) -> bool:
    storages = [each.untyped_storage()._cdata for each in (one, other)]  # pyright: ignore[reportPrivateUsage]
    return (
        storages[0] == storages[1] and one.storage_offset() == other.storage_offset() and one.numel() == other.numel()
    )


def _has_classes(predictions: Tensor, targets: Tensor) -> bool:
    """Whether targets are class indices, by dtype and shapes, and dimension 1 of the predictions the classes."""
    if targets.is_floating_point() or targets.is_complex() or not predictions.is_floating_point():
        return False
    shape = predictions.shape
    return (
        len(shape) == targets.dim() + 1 and len(shape) > 1 and shape[1] > 1 and shape[:1] + shape[2:] == targets.shape
    )


def _argmax(ignored: list[int]) -> Scoring | None:
    """The scoring of class indices, given the `ignore_index` of each cross-entropy in the loss."""
    distinct = {index if index >= 0 else -1 for index in ignored}
    if len(distinct) > 1:
        return None  # two losses ignore different positions
    index = distinct.pop() if distinct else None
    return Scoring("argmax", skips_negative=index is not None, ignored=index if index != -1 else None)


class LossObserver(TorchFunctionMode):
    """Watches a forward pass that leaves no autograd graph, for `scoring`: what `scoring_of` tells from the graph.

    A call of torch takes a microsecond or more longer under it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._binary: list[tuple[AccuracyRule, Tensor]] = []
        self._ignored: list[int] = []
        self._casts: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Notes calls of the loss functions and passes every call on."""
        kwargs = kwargs or {}
        if func is F.binary_cross_entropy_with_logits:
            self._binary.append(("logit", args[0] if args else kwargs["input"]))
        elif func is F.binary_cross_entropy:
            self._binary.append(("probability", args[0] if args else kwargs["input"]))
        elif func is F.cross_entropy or func is F.nll_loss:
            target: Tensor = args[1] if len(args) > 1 else kwargs["target"]
            if not target.is_floating_point():  # else they are probabilities of classes, and none is ignored
                self._ignored.append(args[4] if len(args) > 4 else kwargs.get("ignore_index", -100))
        result: Any = func(*args, **kwargs)
        if args and func in _CASTS and isinstance(result, Tensor):
            self._casts.append((result, args[0]))
        return result

    def scoring(self, predictions: Any, targets: Any) -> Scoring | None:
        """As `scoring_of`."""
        if not isinstance(predictions, Tensor) or not isinstance(targets, Tensor):
            return None
        if _has_classes(predictions, targets):
            return _argmax(self._ignored)
        if predictions.shape == targets.shape:
            for rule, scored in self._binary:
                if any(_is_same_memory(each, predictions) for each in self._before_casts(scored)):
                    return Scoring(rule)
        return None

    def _before_casts(self, tensor: Tensor) -> list[Tensor]:
        """The tensor, and what it was before each change of its dtype."""
        found = [tensor]
        for result, source in reversed(self._casts):
            if _is_same_memory(result, found[-1]):
                found.append(source)
        return found


_CASTS = frozenset({Tensor.to, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16})
