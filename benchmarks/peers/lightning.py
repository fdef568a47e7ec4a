"""Lightning's Trainer over the textbook's model and loader."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from itertools import count
from typing import Any

import lightning
from torch import Tensor

from fasttrain.measure.bench.arm import CHECKED_STEPS, Arm
from fasttrain.measure.bench.arms import PASS_S, CheckedSteps, wait_for
from fasttrain.reference import compute_accuracy, compute_loss, unpack_batch
from fasttrain.workloads.job import Job


def make_arm(job: Job) -> Arm:
    """The arm: a Trainer as it comes, which logs loss and accuracy, and shows a progress bar."""
    return LightningArm(job, is_barebones=False)


class LightningArm:
    """One `Trainer.fit` without end, in a thread of its own, that gets its batches only when steps are asked for.

    Args:
        job: what it trains.
        is_barebones: `Trainer(barebones=True)`, which logs nothing and shows nothing.
    """

    def __init__(self, job: Job, *, is_barebones: bool) -> None:
        kind = "Trainer(barebones=True)" if is_barebones else "Trainer, loss and accuracy logged"
        self.description = f"Lightning, {kind}, over the book's Dataset and DataLoader"
        self._job = job
        job.textbook_batches([])  # makes the book's dataset, which is not to be a part of the first step
        self._checked = CheckedSteps()
        self._gate = Gate(job)
        self._module = Module(job, self._checked.losses, is_logging=not is_barebones)
        trainer = threading.Thread(target=self._fit, args=(is_barebones,), daemon=True)
        trainer.start()

    def step(self) -> int:
        """See `Arm.step`."""
        if self._checked.is_enough:
            num_steps = self._checked.steps_in(PASS_S)
            self._gate.give(num_steps)
            return num_steps
        with self._checked.timing():
            self._gate.give(1)
        return 1

    def sync(self) -> None:
        """See `Arm.sync`."""
        wait_for(self._job.device)

    def losses(self) -> list[float]:
        """See `Arm.losses`."""
        return self._checked.losses

    def _fit(self, is_barebones: bool) -> None:
        accelerator = {"cuda": "gpu"}.get(self._job.device.type, "cpu")
        options: dict[str, Any] = {"max_epochs": -1, "accelerator": accelerator, "devices": 1}
        try:
            with tempfile.TemporaryDirectory(prefix="fasttrain-lightning-") as folder:
                trainer = lightning.Trainer(**options, barebones=is_barebones, default_root_dir=folder)
                trainer.fit(self._module, self._gate)
        except BaseException as error:  # whatever it is, the thread that waits must hear of it
            self._gate.fail(error)


class Module(lightning.LightningModule):
    """The textbook's model.

    Args:
        job: what it trains.
        losses: of the first steps, to be filled.
        is_logging: log each step's loss and accuracy.
    """

    def __init__(self, job: Job, losses: list[float], *, is_logging: bool) -> None:
        super().__init__()
        self._model, self._optimizer, self._loss = job.textbook_model()
        self._losses = losses
        self._is_logging = is_logging
        self._place = job.device

    def training_step(self, batch: Any, _batch_idx: int) -> Tensor:
        """The loss of a batch."""
        x, y = unpack_batch(batch, self._place)
        y_pred = self._model(x)
        loss = compute_loss(self._loss, y_pred, y)
        if self._is_logging:
            self.log("loss", loss, prog_bar=True)
            self.log("accuracy", compute_accuracy(y_pred, y), prog_bar=True)
        if len(self._losses) < CHECKED_STEPS:
            self._losses.append(loss.item())  # HOST READ: of the first steps, which are checked
        return loss

    def configure_optimizers(self) -> Any:
        """The job's."""
        return self._optimizer


class Gate:
    """The textbook's loader, of which the trainer gets as many batches as were given free.

    Args:
        job: whose batches they are.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._epochs = count()
        self._changed = threading.Condition()
        self._free = 0
        self._is_waiting = False
        self._error: BaseException | None = None

    def __len__(self) -> int:
        """Batches in an epoch: known to the trainer, so that it fetches none ahead."""
        return len(self._job.order(0)) // self._job.batch_size

    def __iter__(self) -> Iterator[Any]:
        """An epoch, in the trainer's thread."""
        for batch in self._job.textbook_batches(self._job.order(next(self._epochs)).tolist()):
            self._take()
            yield batch

    def give(self, num_batches: int) -> None:
        """Gives batches free, and waits until the trainer asks for one more, having trained on them."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_waiting or self._error)
            self._free, self._is_waiting = num_batches, False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_waiting or self._error)
        if self._error is not None:
            raise RuntimeError("Lightning's trainer ended") from self._error

    def fail(self, error: BaseException) -> None:
        """The trainer has ended."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _take(self) -> None:
        with self._changed:
            if self._free == 0:
                self._is_waiting = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._free)
            self._free -= 1
