"""The arms that every job has: the textbook's loop, a hand-tuned one, and `FastLoop` with each of its engines."""

from __future__ import annotations

import copy
import statistics
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, count, islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from fasttrain.data.record import record
from fasttrain.data.resident import ResidentEpoch, Span
from fasttrain.data.stream import prefetch
from fasttrain.loop import FastLoop
from fasttrain.measure.bench.arm import CHECKED_STEPS, EPOCHS, ArmFactory
from fasttrain.measure.bench.rounds import SLICE_S
from fasttrain.measure.data_wait import record_advice
from fasttrain.metrics import count_correct
from fasttrain.reference import compute_loss, train_epoch, unpack_batch
from fasttrain.step.state import Snapshot
from fasttrain.workloads.job import Job
from fasttrain.workloads.review_job import ReviewJob

__all__ = [
    "CORE_ARMS",
    "PASS_S",
    "CheckedSteps",
    "LoopArm",
    "TextbookArm",
    "TunedArm",
    "endless",
    "endless_textbook",
    "wait_for",
]

PASS_S = SLICE_S / 2
"""A pass over an epoch that would take longer than this ends when it has taken so long: turns are to be short."""

EPOCH_S = 0.25
"""An epoch of `FastLoop` that would take longer is gone on with in the next pass; a shorter one stays whole."""


class TextbookArm:
    """The textbook's loop over its own Dataset and DataLoader.

    Args:
        job: what it trains.
    """

    description = "the book's Dataset, DataLoader and loop"

    def __init__(self, job: Job) -> None:
        self._job = job
        self._model, self._optimizer, self._loss = job.textbook_model()
        self._batches = endless_textbook(job)
        self._checked = CheckedSteps()

    def step(self) -> int:
        """See `Arm.step`; many in one go, so that entering the loop costs nothing."""
        if self._checked.is_enough:
            num_steps = self._checked.steps_in(PASS_S)
            self._train(num_steps)
            return num_steps
        with self._checked.timing():
            self._train(1)
        return 1

    def sync(self) -> None:
        """See `Arm.sync`."""
        wait_for(self._job.device)

    def losses(self) -> list[float]:
        """See `Arm.losses`."""
        return self._checked.losses

    def _train(self, num_steps: int) -> None:
        batches = islice(self._batches, num_steps)
        found = train_epoch(self._model, batches, self._loss, self._optimizer, self._job.device)
        if not self._checked.is_enough:
            self._checked.losses.append(found.loss)


class TunedArm:
    """What a careful engineer writes by hand: data on the device, a fused optimizer, nothing read before an epoch ends.

    Args:
        job: what it trains.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._model = job.model()
        self._optimizer = job.optimizer(self._model)
        for group in self._optimizer.param_groups:
            group["fused"] = True
        is_reviews = isinstance(job, ReviewJob)
        self._batches = _all_dense_batches(job) if is_reviews else endless(job.batches())
        rows = "one-hot rows made once, gathered" if is_reviews else "rows on the device, shuffled and sliced"
        self.description = f"by hand: {rows}; fused {type(self._optimizer).__name__}; read once an epoch"
        self._steps_in_epoch = len(job.order(0)) // job.batch_size
        self._steps = 0
        self._loss_sum = torch.zeros((), device=job.device)
        self._correct = torch.zeros((), device=job.device)
        self._losses: list[Tensor] = []

    def step(self) -> None:
        """See `Arm.step`."""
        loss, predictions, targets = self._job.forward(self._model, next(self._batches))
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._loss_sum += loss.detach()
        rule = "argmax" if predictions.dim() > targets.dim() else "logit"
        self._correct += count_correct(rule, predictions.detach(), targets)
        if len(self._losses) < CHECKED_STEPS:
            self._losses.append(loss.detach())
        self._steps += 1
        if self._steps % self._steps_in_epoch == 0:
            torch.stack([self._loss_sum, self._correct]).tolist()  # HOST READ: once an epoch, its figures
            self._loss_sum.zero_()
            self._correct.zero_()

    def sync(self) -> None:
        """See `Arm.sync`."""
        wait_for(self._job.device)

    def losses(self) -> list[float]:
        """See `Arm.losses`."""
        return torch.stack(self._losses).tolist()


class LoopArm:
    """`FastLoop`, an epoch a call where that is short enough, else its step, some at a call.

    With "auto", "compiled" and "graphed", the second call waits until it is decided what runs the steps, as it is early
    in a long job. The job is then put back to its start, so that what gives the checked losses is what is timed.

    Over a recorded loader the second call first trains the rest of the first epoch, which records the rows; its seconds
    are in `description`. What is checked and timed are epochs of recorded rows.

    Args:
        job: what it trains.
        engine: of the loop.
        precision: of the forward pass.
        data: what it trains on. "resident": resident batches of the job's fast form. "loader": the textbook's own
            model, Dataset and DataLoader. "recorded": these, and the loader is given to `record`.

    Raises:
        EngineError: the engine cannot run here.
    """

    def __init__(
        self,
        job: Job,
        *,
        engine: str,
        precision: str = "fp32",
        data: Literal["resident", "loader", "recorded"] = "resident",
    ) -> None:
        self._job = job
        self._description = f"FastLoop, engine {engine}, {_DATA[data]}"
        self._recording_s: float | None = None
        self._is_recorded = data == "recorded"
        if data == "resident":
            model = job.model()
            optimizer, forward = job.optimizer(model), job.forward
            self._order: Any = job.batches()
            self._batches: Any = self._order
        else:
            model, optimizer, loss = job.textbook_model()
            forward = partial(_textbook_forward, loss, job.device)
            if self._is_recorded:
                self._order = _JobSampler(job)
                self._batches = record(job.textbook_batches(self._order))
            else:
                self._order = _TextbookBatches(job)
                self._batches = prefetch(self._order, job.device)
        self._loop = FastLoop(model, optimizer, forward, engine=engine, precision=precision)
        self._steps_in_epoch = len(job.order(0)) // job.batch_size
        self._checked = CheckedSteps()
        self._calls = self._call_after_call()
        self._steps = 0
        self._timed_s = 0.0
        self._early: Snapshot | None = None
        # None once it is settled; the other engines run the second step as they run all that follow.
        is_to_settle = self._is_recorded or engine in ("auto", "compiled", "graphed")
        self._start = _Start(self._loop) if is_to_settle else None
        self._begin_s = time.perf_counter()
        self._first_epoch = self._next_pass()

    @property
    def description(self) -> str:
        """What it is; of a recorded loader also how long the first epoch took, and where batches came from then."""
        if self._recording_s is None:
            return self._description
        source = self._loop.source
        return (
            f"{self._description}; its first epoch, which records the rows and is not in these figures, took "
            f"{self._recording_s:.2f} s in the first block; later epochs: {source.value}, {source.reason}"
        )

    @property
    def compile_s(self) -> float | None:
        """Seconds that steps have waited for a trace or a compiler so far; None where there was no wait."""
        return self._loop.step.compile_s

    @property
    def engine(self) -> str:
        """What runs the steps now, and why; where they wait for a loader, what `record` would gain."""
        choice, order = self._loop.step.engine, self._order
        # On CUDA batches are read in another thread, beside the steps.
        is_streamed = isinstance(order, _TextbookBatches) and self._job.device.type == "cpu"
        advice = record_advice(self._timed_s, order.wait_s) if is_streamed and self._timed_s else None
        return f"{choice.value}: {choice.reason}" + ("" if advice is None else f"; {advice}")

    def step(self) -> int:
        """See `Arm.step`; an epoch in one go, or a part of a long one. Steps that are put back do not count."""
        if self._checked.is_enough:
            self._begin_again_if_due()
            begin = time.perf_counter()
            is_long = self._checked.steps_in(EPOCH_S) < self._steps_in_epoch
            steps = self._part_of_epoch() if is_long else self._loop.train(self._batches).batches
            self._timed_s += time.perf_counter() - begin
            self._steps += steps
            return steps
        if self._checked.losses and self._start is not None:
            self._settle(self._start)
            self._checked_steps(1)  # the first one again: it makes the optimizer's state
        return self._checked_steps(CHECKED_STEPS - len(self._checked.losses))

    def sync(self) -> None:
        """See `Arm.sync`."""
        wait_for(self._job.device)

    def losses(self) -> list[float]:
        """See `Arm.losses`: of the first steps."""
        return self._checked.losses

    def _begin_again_if_due(self) -> None:
        """After so many steps as ten epochs have: back to where the first of them began."""
        tensors, device = [*_tensors(self._loop.model), *_state(self._loop.optimizer)], self._loop.step.device
        if self._early is None:
            self._early = Snapshot.of(tensors, device)
        elif self._steps >= EPOCHS * self._steps_in_epoch:
            self._early.restore(tensors, device)
            self._steps = 0

    def _part_of_epoch(self) -> int:
        limit, steps = self._checked.steps_in(PASS_S), 0
        while steps < limit:
            steps += next(self._calls)
        return steps

    def _call_after_call(self) -> Iterator[int]:
        """Epochs without an end, as `FastLoop.train` runs them; the steps of each call."""
        step = self._loop.step
        while True:
            step.metrics.reset()
            for ran in step.run(self._batches):
                yield ran.steps if isinstance(ran, Span) else 1
            step.flush()
            step.metrics.compute()  # HOST READ: an epoch's figures

    def _checked_steps(self, most: int) -> int:
        """One step, or as many as the loop would run in one call, but not more than so many."""
        step, work = self._loop.step, self._next_checked(most)
        steps = work.steps if isinstance(work, Span) else 1
        with self._checked.timing(steps):
            losses = step.steps(work) if isinstance(work, Span) else step(work)
            self._checked.losses += losses.reshape(-1).tolist()  # HOST READ: of the first steps, which are checked
        if self._checked.is_enough:
            self._first_epoch = iter(())  # it is not gone on with
            if isinstance(self._order, _TextbookBatches):
                self._order.wait_s = 0.0
        return steps

    def _next_checked(self, most: int) -> Any:
        """The next batch or, of a resident epoch, the next batches; where the epoch is over, of the one after it."""
        while True:
            epoch, size = self._first_epoch, min(most, self._loop.step.span)
            span = epoch.take(size) if size and isinstance(epoch, ResidentEpoch) else None
            if span is not None:
                return span
            for batch in epoch:
                return batch
            self._first_epoch = self._next_pass()

    def _next_pass(self) -> Any:
        """An iterator of the next epoch: of resident batches where the loop would read them as such."""
        return iter(self._loop.step.sources.of(self._batches))

    def _settle(self, start: _Start) -> None:
        """Has it decided what runs the steps, and goes back to the start."""
        step = self._loop.step
        if self._is_recorded:
            self._record_rows()
        step.settle(step.sources.of(self._batches))
        start.put_back(self._loop)
        self._start = None
        self._order.set_epoch(0)
        self._first_epoch = self._next_pass()
        self._checked = CheckedSteps()

    def _record_rows(self) -> None:
        """Trains the rest of the first epoch, whose rows are recorded while they are read."""
        step = self._loop.step
        deque(step.run(self._first_epoch), maxlen=0)
        step.flush()
        step.metrics.compute()  # HOST READ: an epoch's figures
        self._recording_s = time.perf_counter() - self._begin_s
        step.run(self._batches)  # begins a pass, of recorded rows: steps run eagerly while rows are recorded


_DATA = {
    "resident": "resident batches",
    "loader": "in place of the book's loop: its model, Dataset, DataLoader",
    "recorded": "in place of the book's loop: its model, Dataset and record(DataLoader)",
}


class _JobSampler(Sampler[int]):
    """The rows of the textbook's loader in the job's order, epoch after epoch.

    Attributes:
        reads_ahead: it draws from no generator that others use, so that a whole epoch may be read at once.
    """

    reads_ahead = True

    def __init__(self, job: Job) -> None:
        self._job = job
        self._epoch = 0
        self._num_rows = len(job.order(0))

    def __len__(self) -> int:
        return self._num_rows

    def __iter__(self) -> Iterator[int]:
        order = self._job.order(self._epoch).tolist()
        self._epoch += 1
        return iter(order)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch


class _TextbookBatches:
    """The textbook's batches as an iterable of one epoch after the other, each from its own DataLoader.

    Attributes:
        wait_s: seconds in which they were read.
    """

    def __init__(self, job: Job) -> None:
        self.wait_s = 0.0
        self._job = job
        self._epoch = 0
        self._num_batches = len(job.order(0)) // job.batch_size

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Any]:
        order = self._job.order(self._epoch).tolist()
        self._epoch += 1
        return self._timed(iter(self._job.textbook_batches(order)))

    def _timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            self.wait_s += time.perf_counter() - begin
            if batch is None:
                return
            yield batch

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch


def _textbook_forward(
    loss_func: nn.Module, device: torch.device, model: nn.Module, batch: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The book's forward pass and loss, for `FastLoop`."""
    x, y = unpack_batch(batch, device)
    y_pred = model(x)
    return compute_loss(loss_func, y_pred, y), y_pred, y


class _Start:
    """Where a loop's training began, to go back to: the tensors of the model stay the very same ones.

    Args:
        loop: before its first step.
    """

    def __init__(self, loop: FastLoop) -> None:
        self._of_model = Snapshot.of(_tensors(loop.model), loop.step.device)
        self._of_optimizer = copy.deepcopy(loop.optimizer.state_dict())

    def put_back(self, loop: FastLoop) -> None:
        """Weights, buffers, random generators; the optimizer makes its state anew, as in its first step."""
        loop.optimizer.load_state_dict(self._of_optimizer)
        self._of_model.restore(_tensors(loop.model), loop.step.device)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for entries in optimizer.state.values() for value in entries.values() if isinstance(value, Tensor)]


def endless(batches: Any) -> Iterator[Any]:
    """A source's epochs, one after the other."""
    while True:
        yield from batches


def endless_textbook(job: Job) -> Iterator[Any]:
    """The textbook's batches, epoch after epoch; its dataset is made before this returns, not in the first step."""

    def of_epoch(epoch: int) -> Iterable[Any]:
        return job.textbook_batches(job.order(epoch).tolist())

    return chain.from_iterable(chain([of_epoch(0)], map(of_epoch, count(1))))


class CheckedSteps:
    """Losses and times of the first steps, which run some at a time; what many in one go take follows.

    Attributes:
        losses: of each.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self._seconds: list[float] = []

    @property
    def is_enough(self) -> bool:
        """Whether there are enough to compare with the reference's."""
        return len(self.losses) >= CHECKED_STEPS

    @contextmanager
    def timing(self, steps: int = 1) -> Generator[None]:
        """Around each step, or each call of several."""
        begin = time.perf_counter()
        yield
        self._seconds.append((time.perf_counter() - begin) / steps)

    def steps_in(self, seconds: float) -> int:
        """How many steps take so long, by the later half of the first ones; at least one."""
        return max(1, int(seconds / statistics.median(self._seconds[len(self._seconds) // 2 :])))


def wait_for(device: torch.device) -> None:
    """Waits until a device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _all_dense_batches(job: ReviewJob) -> Iterator[dict[str, Tensor]]:
    """Batches of one-hot rows, which are all made before this returns.

    As uint8 [rows, features]: float32 would take four times the memory (0.8 GB for 39,200 rows of 5,317 words).
    """
    tokens = job.train.tokens
    dense = torch.zeros(job.num_rows, job.num_features, dtype=torch.uint8)
    dense.numpy()[np.repeat(np.arange(len(dense)), np.diff(tokens.offsets)), tokens.ids] = 1
    rows, targets = dense.to(job.device), job.targets().to(job.device)
    orders = (torch.from_numpy(job.order(epoch)).to(job.device) for epoch in count())
    return (
        {"x_data": rows.index_select(0, batch).float(), "y_target": targets.index_select(0, batch)}
        for order in orders
        for batch in order.split(job.batch_size)
    )


CORE_ARMS: dict[str, ArmFactory] = {
    "textbook": TextbookArm,
    "tuned": TunedArm,
    "record": partial(LoopArm, engine="auto", data="recorded"),
    "drop-in": partial(LoopArm, engine="auto", data="loader"),
    **{engine: partial(LoopArm, engine=engine) for engine in ("eager", "torch-compile", "compiled", "auto", "graphed")},
}
