"""Hugging Face Accelerate: the textbook's loop with its five lines changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count, islice
from typing import Any

from accelerate import Accelerator

from fasttrain.measure.bench.arm import Arm
from fasttrain.measure.bench.arms import PASS_S, CheckedSteps, wait_for
from fasttrain.reference import compute_accuracy, compute_loss, unpack_batch
from fasttrain.workloads.job import Job


def make_arm(job: Job) -> Arm:
    """The arm."""
    return AccelerateArm(job)


class AccelerateArm:
    """The textbook's model, optimizer, loader and figures.

    Args:
        job: what it trains.
    """

    description = "Accelerate over the book's Dataset, DataLoader and loop"

    def __init__(self, job: Job) -> None:
        self._job = job
        model, optimizer, self._loss = job.textbook_model()
        self._accelerator = Accelerator(cpu=job.device.type == "cpu")
        self._model, self._optimizer = self._accelerator.prepare(model, optimizer)
        self._model.train()
        self._batches = self._all_batches(self._batches_of(0))  # made here, not in the first step
        self._checked = CheckedSteps()
        self._running_loss = self._running_accuracy = 0.0

    def step(self) -> int:
        """See `Arm.step`."""
        if self._checked.is_enough:
            num_steps = self._checked.steps_in(PASS_S)
            self._train(num_steps)
            return num_steps
        with self._checked.timing():
            self._checked.losses.append(self._train(1))
        return 1

    def sync(self) -> None:
        """See `Arm.sync`."""
        wait_for(self._job.device)

    def losses(self) -> list[float]:
        """See `Arm.losses`."""
        return self._checked.losses

    def _train(self, num_steps: int) -> float:
        """Some steps; returns the last one's loss."""
        found = 0.0
        for i, batch in enumerate(islice(self._batches, num_steps)):
            x, y = unpack_batch(batch, self._accelerator.device)
            self._optimizer.zero_grad()
            y_pred = self._model(x)
            loss = compute_loss(self._loss, y_pred, y)
            found = loss.item()  # HOST READ: every batch, as in the book
            self._running_loss += (found - self._running_loss) / (i + 1)
            self._accelerator.backward(loss)
            self._optimizer.step()
            self._running_accuracy += (compute_accuracy(y_pred, y) - self._running_accuracy) / (i + 1)
        return found

    def _batches_of(self, epoch: int) -> Iterable[Any]:
        return self._accelerator.prepare(self._job.textbook_batches(self._job.order(epoch).tolist()))

    def _all_batches(self, first: Iterable[Any]) -> Iterator[Any]:
        yield from first
        for epoch in count(1):
            yield from self._batches_of(epoch)
