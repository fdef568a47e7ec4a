"""`FastLoop`: the book's loop, drop-in, without its waits."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fasttrain.data.batch import num_samples
from fasttrain.data.resident import ResidentBatches, Span
from fasttrain.data.stream import Prefetcher, prefetch
from fasttrain.device import Choice
from fasttrain.errors import ConfigError, DataError
from fasttrain.history import EpochResult, EpochRow, History
from fasttrain.metrics import LossObserver, Metric, RunningMetrics, copies_of
from fasttrain.progress import Progress
from fasttrain.step.eager import run_forward
from fasttrain.step.spec import check_batches, check_train_method, describe
from fasttrain.step.train_step import TrainStep

__all__ = ["FastLoop", "FitState", "Interrupted"]

Batch = Any
Scheduler = LRScheduler | ReduceLROnPlateau
Watch = Callable[[int, int, float, RunningMetrics], None]
"""Called after every batch, or after several that ran in one call, with batches, samples and seconds of the epoch so
far, and the running metrics."""

MAX_PREFETCHERS = 2
"""Sources whose pinned buffers are kept: usually a train and a validation loader."""


class Interrupted(Exception):
    """Raised by a watcher to end the training after the current step."""


@dataclass(kw_only=True)
class FitState:
    """Where a fit stands after an epoch: enough, with the user's own objects, to go on from there.

    Attributes:
        history: all finished epochs.
        best_weights: a copy of the model's state at `history.best_epoch`; empty before there is one.
    """

    history: History = field(default_factory=History)
    best_weights: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


class FastLoop:
    """Trains the user's model with the user's optimizer, as fast as the hardware allows, with the same numbers.

    The objects stay the user's: the same tensors are updated in place, their `state_dict()`s are right whenever the
    user looks. No global (threads, TF32, deterministic flags) and no option of a parameter group is changed.

    As in the book, `train` puts the whole model in train mode and `evaluate` in eval mode, for as long as they run: a
    part that is to stay in eval mode (frozen batch norm) says so in its own `train` method.

    `copy.deepcopy` makes an independent loop, with copies of the model and the optimizer, at the same point of the
    training (a scheduler stays the original's). A loop cannot be pickled: save the `state_dict()`s.

    Args:
        model: the model, on its device.
        optimizer: over the model's parameters.
        forward: (model, batch) -> loss, or (loss, predictions, targets).
        loss: instead of forward, (predictions, targets) -> loss, for (inputs, targets) batches.
        device: where the steps run; None is where the model is.
        precision: "fp32" (the user's own), "bf16", "fp16" or "auto".
        engine: "auto", "eager", "compiled", "graphed" (on CUDA) or "torch-compile".
        accumulate: N: `(loss / N).backward()` for each batch, and an optimizer step at each Nth batch and at the last.
            A short last group is divided by N too, so that each of its batches counts as much as any other.
        clip_norm: `torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)` before each optimizer step: over all
            of the model's parameters, also those that the optimizer does not have, and over no others.
        clip_value: `torch.nn.utils.clip_grad_value_(model.parameters(), clip_value)`, before the norm is clipped.
        metrics: by name: functions (loss, predictions, targets) -> scalar tensor, of which an epoch has the mean of the
            batches' values (in `evaluate` weighted by their samples), which is not the value over the epoch for ratios
            such as F1; or objects with `update(predictions, targets)`, `compute()` and `reset()` (as torchmetrics has),
            which are computed from the whole epoch. Steps with one of the latter run eagerly, and `evaluate` uses a
            copy of it.

    Each optimizer step starts without gradients, as after `model.zero_grad()`: no parameter of the model or of the
    optimizer has one.

    Accuracy is found for each batch, by dtypes, shapes and the loss function that forward calls: class indices against
    the argmax over dimension 1 of the predictions, without the positions that a cross-entropy ignores
    (`ignore_index`); 0/1 targets against the predictions that a binary cross-entropy was given, if they have one shape.
    An epoch with a batch of anything else (soft targets, a regression) has none. Positions that forward itself masks
    out of the loss do count.

    Raises:
        ConfigError: an option, or their combination, cannot work.
        DeviceError: the machine lacks the device or is no good at the precision.
        EngineError: the requested engine cannot run here.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        forward: Callable[[nn.Module, Batch], Any] | None = None,
        *,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        device: str | torch.device | None = None,
        precision: str = "fp32",
        engine: str = "auto",
        accumulate: int = 1,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        self.step = TrainStep(  # first: it checks that the model is one
            model,
            optimizer,
            forward,
            loss=loss,
            device=device,
            precision=precision,
            engine=engine,
            accumulate=accumulate,
            clip_norm=clip_norm,
            clip_value=clip_value,
            metrics=metrics,
        )
        check_train_method(model)
        self.model = model
        self.optimizer = optimizer
        self._evaluation = RunningMetrics(self.step.device, copies_of(metrics), pools_accuracy=True)
        self._epochs_left: int | None = None
        self._steps_done = self._last_epoch_steps = 0
        self._prefetchers: dict[int, tuple[Iterable[Batch], Prefetcher[Batch]]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> FastLoop:
        """An independent loop over copies of the user's objects, as `TrainStep` makes them."""
        loop = object.__new__(type(self))
        memo[id(self)] = loop
        loop.step = copy.deepcopy(self.step, memo)  # first: it copies the model and the optimizer
        own = {name: value for name, value in vars(self).items() if name not in ("step", "_prefetchers")}
        vars(loop).update(copy.deepcopy(own, memo))
        loop._prefetchers = {}
        return loop

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuses pickling, as `TrainStep` does."""
        raise TypeError(
            "a FastLoop cannot be pickled or copied by copy.copy: save model.state_dict() and optimizer.state_dict() "
            "and make a new one from them; copy.deepcopy makes an independent copy"
        )

    @property
    def source(self) -> Choice:
        """Where the batches of the last pass came from ("resident" or "streamed"), and why."""
        return self.step.sources.choice

    def train(self, batches: Iterable[Batch], *, watch: Watch | None = None) -> EpochResult:
        """Trains one epoch. Waits for the device once, at its end.

        Args:
            batches: whatever forward takes, from any iterable; brought to the device while the steps run. A
                `DataLoader` over tensors is read as resident data (see `source`), in the loader's own order.
            watch: called after every call, of a batch or several; may raise `Interrupted`. Not the place to step a
                scheduler batch by batch: several batches may run in one call (see `TrainStep` for that).

        Returns:
            The epoch's figures; loss and accuracy are means of the batches' values, as in the book.

        Raises:
            ConfigError: `batches` is a dataset, whose items are single rows.
            DataError: there was no batch.
        """
        step = self.step
        step.metrics.reset()
        step.expect(self._steps_to_come(batches))
        counts = _Counts()
        try:
            with self._in_mode(training=True), self._on_device(batches) as placed:
                for ran in step.run(placed):
                    counts.add(ran)
                    if watch is not None:
                        watch(counts.batches, counts.samples, counts.seconds(), step.metrics)
                step.flush()
                return self._result(counts, step.metrics)
        finally:
            self._steps_done += counts.batches
            self._last_epoch_steps = counts.batches
            step.spec.gathered.count = 0  # an epoch that ends early leaves nothing for the next
            for parameter in (*step.spec.trained(), *self.model.parameters()):
                parameter.grad = None

    def evaluate(self, batches: Iterable[Batch]) -> EpochResult:
        """Evaluates the model, without gradients and in eval mode. Waits for the device once, at its end.

        Args:
            batches: whatever forward takes, from any iterable. Of resident data (`resident(...)`) every row is used
                once, in the rows' own order, also where training shuffles them and drops the last.

        Returns:
            The figures; every sample counts once. Accuracy is over all positions that the loss does not ignore.

        Raises:
            ConfigError: `batches` is a dataset, whose items are single rows.
            DataError: there was no batch, or no sample in any.
        """
        metrics = self._evaluation
        if isinstance(batches, ResidentBatches):
            batches = batches.every_row
        metrics.reset()
        counts = _Counts()
        with torch.no_grad(), self._in_mode(training=False), self._on_device(batches) as placed:
            for batch in placed:
                self._evaluate_batch(batch, counts.add(batch))
            return self._result(counts, metrics)

    def fit(
        self,
        train: Iterable[Batch],
        val: Iterable[Batch] | None = None,
        *,
        epochs: int,
        scheduler: Scheduler | None = None,
        patience: int | None = None,
        progress: bool = True,
        state: FitState | None = None,
        on_epoch: Callable[[FitState], None] | None = None,
        watch: Watch | None = None,
    ) -> History:
        """Trains for several epochs and leaves the model with the weights of the best one.

        The best epoch is the one with the lowest validation loss that is a finite number; without `val`, or without
        such an epoch, the weights of the last epoch stay.

        Args:
            train: batches of the train split; iterated once an epoch.
            val: batches of the validation split, or None; see `evaluate`.
            epochs: how many at most, those of `state` counted in.
            scheduler: stepped once an epoch; a `ReduceLROnPlateau` with the validation loss, without `val` the training
                loss.
            patience: stop after so many epochs without a new best validation loss; None: never.
            progress: show a bar on a terminal or in a notebook, else a line an epoch, on stderr.
            state: where an earlier fit stood, to go on from there; model, optimizer and scheduler must stand there too.
            on_epoch: called after every epoch with the state, to keep it.
            watch: called after every call, of a training batch or several; may raise `Interrupted`, which ends the
                fit there.

        Returns:
            The history of all finished epochs.

        Raises:
            ConfigError: no epochs, a patience without `val` or below 1, or a scheduler that cannot be stepped so.
        """
        _check_lengths(epochs, patience, has_val=val is not None)
        _check_scheduler(scheduler, self.optimizer)
        state = state or FitState()
        history = state.history
        history.stopped = None
        shown = Progress(epochs) if progress else None
        try:
            for epoch in _epochs_to_run(history, epochs, patience):
                self._epochs_left = epochs - epoch + 1
                self._fit_epoch(epoch, train, val, scheduler, state, shown, watch)
                if on_epoch is not None:
                    on_epoch(state)
        except Interrupted:
            history.stopped = "interrupted"
        finally:
            self._epochs_left = None
            self.step.close()
            if shown is not None:
                shown.close()
        if state.best_weights:
            self.model.load_state_dict(state.best_weights)
        return history

    def _fit_epoch(
        self,
        epoch: int,
        train: Iterable[Batch],
        val: Iterable[Batch] | None,
        scheduler: Scheduler | None,
        state: FitState,
        shown: Progress | None,
        watch: Watch | None,
    ) -> None:
        lr = float(self.optimizer.param_groups[0]["lr"])
        if shown is not None:
            shown.begin(epoch, _length(train))
        watchers = [each for each in (shown and shown.batch, watch) if each is not None]
        results = {"train": self.train(train, watch=_together(watchers))}
        if val is not None:
            results["val"] = self.evaluate(val)
        rows = [EpochRow.of(result, epoch=epoch, split=split, lr=lr) for split, result in results.items()]  # pyright: ignore[reportArgumentType]
        history, watched = state.history, rows[-1].loss
        history.rows += rows
        is_best = math.isfinite(watched) and (history.best_loss is None or watched < history.best_loss)
        if is_best:
            history.best_epoch, history.best_loss = epoch, watched
            if val is not None:
                state.best_weights = copy.deepcopy(self.model.state_dict())
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(watched)
        elif scheduler is not None:
            scheduler.step()
        if shown is not None:
            shown.end(rows, is_best=is_best)

    def _steps_to_come(self, batches: Iterable[Batch]) -> int:
        """Steps of the fit that are left; in a loop of the user's own, this epoch and as many as there have been."""
        in_epoch = _length(batches) or self._last_epoch_steps
        return in_epoch * self._epochs_left if self._epochs_left is not None else in_epoch + self._steps_done

    def _evaluate_batch(self, batch: Batch, samples: int) -> None:
        spec = self.step.spec
        with LossObserver() as observer:  # there is no autograd graph that shows the loss
            output = run_forward(spec, spec.forward, batch)
        scoring = observer.scoring(output.predictions, output.targets)
        self._evaluation.update(*output, weight=samples, scoring=scoring)

    def _result(self, counts: _Counts, metrics: RunningMetrics) -> EpochResult:
        if counts.batches == 0:
            raise DataError(
                "there was no batch: is the batch size larger than the number of rows? A generator gives its batches "
                "once: make it anew for each epoch"
            )
        readout = metrics.compute()
        seconds = counts.seconds()
        if readout.loss is None:
            raise DataError("there is no sample in any of the batches: a batch's first tensor has a row a sample")
        return EpochResult(
            loss=readout.loss,
            accuracy=readout.accuracy,
            batches=counts.batches,
            samples=counts.samples,
            seconds=seconds,
            samples_per_s=counts.samples / seconds,
            engine=self.step.engine.value,
            source=self.step.sources.choice.value,
            metrics=readout.metrics,
        )

    @contextmanager
    def _on_device(self, batches: Iterable[Batch]) -> Generator[Iterator[Batch]]:
        """One pass over the batches, on the device; what feeds it is closed at the end, however that comes."""
        batches = self.step.sources.of(batches)
        if not isinstance(batches, ResidentBatches | Prefetcher):
            batches = self._prefetcher(batches)
        elif isinstance(batches, ResidentBatches) and batches.device.type != self.step.device.type:
            batches = self._prefetcher(batches)
        placed = iter(batches)
        try:
            yield placed
        finally:
            close = getattr(placed, "close", None)
            if close is not None:
                close()

    def _prefetcher(self, batches: Iterable[Batch]) -> Prefetcher[Batch]:
        """The source's prefetcher: kept from epoch to epoch, since its pinned buffers cost milliseconds to make."""
        kept = self._prefetchers.pop(id(batches), None)
        if kept is not None and kept[0] is batches:
            self._prefetchers[id(batches)] = kept  # the last used comes last
            return kept[1]
        check_batches(batches)
        if len(self._prefetchers) >= MAX_PREFETCHERS:
            self._prefetchers.pop(next(iter(self._prefetchers)))
        prefetcher = prefetch(batches, self.step.device)
        self._prefetchers[id(batches)] = batches, prefetcher
        return prefetcher

    @contextmanager
    def _in_mode(self, *, training: bool) -> Generator[None]:
        """Train or eval mode for a while; every module is left in the mode it was found in."""
        found = [(module, module.training) for module in self.model.modules()]
        self.model.train(training)
        try:
            yield
        finally:
            for module, mode in found:
                module.training = mode


class _Counts:
    """Batches, samples and seconds of a pass."""

    def __init__(self) -> None:
        self.batches = 0
        self.samples = 0
        self._begin = time.perf_counter()

    def add(self, batch: Batch | Span) -> int:
        if isinstance(batch, Span):
            steps, samples = batch.steps, len(batch.host_rows)
        else:
            steps, samples = 1, num_samples(batch)
        self.batches += steps
        self.samples += samples
        return samples

    def seconds(self) -> float:
        return time.perf_counter() - self._begin


def _check_lengths(epochs: int, patience: int | None, *, has_val: bool) -> None:
    lengths: dict[str, Any] = {"epochs": epochs, "patience": patience}
    for name, given in lengths.items():
        if given is not None and (isinstance(given, bool) or not isinstance(given, Integral)):
            raise ConfigError(f"{name} {given!r}: use a whole number, 1 or more")
    if epochs < 1:
        raise ConfigError(f"epochs {epochs}: use 1 or more")
    if patience is not None and (patience < 1 or not has_val):
        raise ConfigError(f"patience {patience}: use 1 or more, together with val= (it watches the validation loss)")


def _check_scheduler(scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
    if scheduler is None:
        return
    if isinstance(scheduler, type) or not callable(getattr(scheduler, "step", None)):
        raise ConfigError(
            f"scheduler must be one of torch.optim.lr_scheduler; it is {describe(scheduler)} (several at once: "
            "ChainedScheduler or SequentialLR)"
        )
    if isinstance(scheduler, ReduceLROnPlateau) and scheduler.mode != "min":
        raise ConfigError(
            f"ReduceLROnPlateau(mode={scheduler.mode!r}) cannot be stepped by fit, which gives it the loss: use "
            "mode='min', or keep the loop over the epochs and step the scheduler there with the value that it watches"
        )
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ConfigError(
            "scheduler changes the rates of another optimizer than the loop's: make it over loop.optimizer"
        )


def _epochs_to_run(history: History, epochs: int, patience: int | None) -> Generator[int]:
    """The epochs that are left, by number; the history is told why it ends where it does."""
    for epoch in range(history.epochs + 1, epochs + 1):
        if patience is not None and history.epochs - (history.best_epoch or 0) >= patience:
            history.stopped = "patience"
            return
        yield epoch
    history.stopped = "epochs"


def _length(batches: Iterable[Batch]) -> int | None:
    try:
        return len(cast("Any", batches))
    except TypeError:
        return None


def _together(watchers: list[Watch]) -> Watch | None:
    if len(watchers) < 2:
        return watchers[0] if watchers else None

    def watch(batches: int, samples: int, seconds: float, metrics: RunningMetrics) -> None:
        for each in watchers:
            each(batches, samples, seconds, metrics)

    return watch
