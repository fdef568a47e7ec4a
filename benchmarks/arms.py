"""The arms that every job has: the textbook's loop, and `FastLoop` with each of its engines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from fasttrain import FastLoop
from fasttrain.loop import Interrupted
from fasttrain.metrics import RunningMetrics
from fasttrain.reference import train_epoch

BATCH_SIZE = 128
LEARNING_RATE = 1e-3
SEED = 1337

SETTLE_S = 180.0
MANY_EPOCHS = 1_000_000
"""`auto` is told of so many epochs, as in a long job, and has so long to end on a program before it is timed."""


class Job(Protocol):
    """What arms train: the same data, weights and order of rows for each of them."""

    @property
    def device(self) -> torch.device:
        """Where every arm trains."""
        ...

    def order(self, epoch: int) -> np.ndarray:
        """Rows in the order of an epoch (from 0), [rows], int64, the short last batch left out."""
        ...

    def textbook_model(self) -> tuple[nn.Module, torch.optim.Optimizer, nn.Module]:
        """The textbook's model at the job's weights, its optimizer and its loss."""
        ...

    def textbook_batches(self, order: list[int]) -> Iterable[Any]:
        """The textbook's loader over these rows in this order."""
        ...


class TextbookArm:
    """The textbook's loop over its own loader.

    Args:
        job: what it trains.
        threads: torch's threads.
        num_batches: batches in a pass, which may be a slice of an epoch; None: all of it.
    """

    compile_s: float | None = None

    def __init__(self, job: Job, *, name: str, threads: int, num_batches: int | None) -> None:
        self.name = name
        self.threads = threads
        self.description = f"the book's Dataset, DataLoader and loop, {count(threads, 'thread')}"
        self._job = job
        self._num_batches = num_batches
        self._epoch = 0
        self._model, self._optimizer, self._loss = job.textbook_model()

    def losses(self, num_batches: int) -> list[float]:
        """See `Arm.losses`."""
        losses: list[float] = []
        self._train(num_batches, lambda loss, _: losses.append(loss))
        return losses

    def run(self) -> int:
        """See `Arm.run`."""
        return self._train(self._num_batches)

    def _train(self, num_batches: int | None, on_batch: Callable[[float, float], None] | None = None) -> int:
        order = self._job.order(self._epoch)
        if num_batches is not None:
            order = order[: num_batches * BATCH_SIZE]
        self._epoch += 1
        loader = self._job.textbook_batches(order.tolist())
        return train_epoch(self._model, loader, self._loss, self._optimizer, self._job.device, on_batch).samples


def textbook_arms(job: Job, threads: int, default_threads: int, num_batches: int | None) -> list[TextbookArm]:
    """The textbook at the pinned number of threads, and at torch's own where that is another."""
    arms = [TextbookArm(job, name="textbook", threads=threads, num_batches=num_batches)]
    if default_threads != threads:
        name = f"textbook, {count(default_threads, 'thread')}"
        arms.append(TextbookArm(job, name=name, threads=default_threads, num_batches=num_batches))
    return arms


class FastArm:
    """`FastLoop` over whole epochs.

    Args:
        loop: at the job's weights.
        batches: a source in the job's order, before its first epoch.
        threads: torch's threads.
    """

    def __init__(self, loop: FastLoop, batches: Iterable[Any], *, name: str, description: str, threads: int) -> None:
        self.name = name
        self.description = f"{description}, {count(threads, 'thread')}"
        self.threads = threads
        self.batches = batches
        self.loop = loop

    @property
    def compile_s(self) -> float | None:
        """See `Arm.compile_s`."""
        return self.loop.step.compile_s

    def losses(self, num_batches: int) -> list[float]:
        """See `Arm.losses`."""
        losses: list[float] = []

        def watch(batches: int, _samples: int, _seconds: float, metrics: RunningMetrics) -> None:
            loss = metrics.compute().loss
            assert loss is not None
            losses.append(loss)
            if batches == num_batches:
                raise Interrupted

        with suppress(Interrupted):
            self.loop.train(self.batches, watch=watch)
        return losses

    def run(self) -> int:
        """See `Arm.run`."""
        return self.loop.train(self.batches).samples


class AutoArm(FastArm):
    """`FastLoop` with engine auto: its first pass goes on until a program runs, as it does early in a long job."""

    _is_settled = False

    def run(self) -> int:
        """See `Arm.run`."""
        if not self._is_settled:
            self._is_settled = True
            self._settle()
        return super().run()

    def _settle(self) -> None:
        deadline = time.perf_counter() + SETTLE_S

        def watch(*_: object) -> None:
            if self.loop.step.engine.value == "compiled" or time.perf_counter() > deadline:
                raise Interrupted

        self.loop.fit(self.batches, epochs=MANY_EPOCHS, progress=False, watch=watch)


def fast_arms(
    make_loop: Callable[[str], FastLoop], source: Callable[[], Iterable[Any]], threads: int
) -> dict[str, Callable[[], FastArm]]:
    """By name, what makes the arm of each engine over resident batches.

    Args:
        make_loop: from an engine's name; raises `EngineError` where it cannot run here.
        source: of batches in the job's order.
        threads: torch's threads.
    """

    def maker(engine: str) -> Callable[[], FastArm]:
        kind = AutoArm if engine == "auto" else FastArm
        description = f"FastLoop, engine {engine}, resident batches"
        return lambda: kind(make_loop(engine), source(), name=engine, description=description, threads=threads)

    return {engine: maker(engine) for engine in ("eager", "torch-compile", "compiled", "auto")}


def running_means(losses: Sequence[float]) -> list[float]:
    """The mean of the first loss, of the first two, and so on."""
    return [total / number for number, total in enumerate(accumulate(losses), start=1)]


def count(number: int, noun: str) -> str:
    """A number and its noun."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
