"""Arms as a user writes them."""

from __future__ import annotations

import os
import time
from itertools import chain, repeat

import torch

from fasttrain.measure.bench.arm import CHECKED_STEPS, Arm
from fasttrain.workloads.job import Job


class MyArm:
    def __init__(self, workload: Job) -> None:
        self.workload = workload
        self.model = workload.model()
        self.optimizer = workload.optimizer(self.model)
        self.batches = chain.from_iterable(repeat(workload.batches()))
        self.found: list[torch.Tensor] = []

    def step(self) -> None:
        loss, _, _ = self.workload.forward(self.model, next(self.batches))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.found.append(loss.detach())

    def sync(self) -> None:
        pass

    def losses(self) -> list[float]:
        return torch.stack(self.found).tolist()


def make_arm(workload: Job) -> Arm:
    return MyArm(workload)


class WrongArm(MyArm):
    def losses(self) -> list[float]:
        return [1.001 * loss for loss in super().losses()]


def make_wrong_arm(workload: Job) -> Arm:
    return WrongArm(workload)


class HangingArm(MyArm):
    """Hangs in its first turn."""

    def step(self) -> None:
        if len(self.found) >= CHECKED_STEPS:
            time.sleep(60)
        super().step()


def make_hanging_arm(workload: Job) -> Arm:
    return HangingArm(workload)


class ForkingArm(MyArm):
    """Starts a process that inherits all that is open, and ends in its first turn."""

    def step(self) -> None:
        if len(self.found) >= CHECKED_STEPS:
            if os.fork() == 0:
                os.execlp("sleep", "sleep", "60")
            os._exit(3)
        super().step()


def make_forking_arm(workload: Job) -> Arm:
    return ForkingArm(workload)


def make_no_arm(workload: Job) -> Arm:
    raise ValueError("a bug of the user's own")


NOT_A_FUNCTION = 3
