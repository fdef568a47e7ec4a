"""An arm: one side of a benchmark. A user writes one to have a training of their own measured."""

from __future__ import annotations

from typing import Protocol

from fasttrain.workloads.job import Job

__all__ = ["CHECKED_STEPS", "EPOCHS", "Arm", "ArmFactory"]

CHECKED_STEPS = 20
"""Steps whose losses are compared with the reference's before an arm is timed."""


EPOCHS = 10
"""After so many epochs an arm that trains whole ones in a turn (`FastLoop`'s engines, `jax-scan`, `native`) goes back
to where it began, as a job would end: after a hundred epochs of the review job the loss is 2e-7 and gradients are
denormal numbers, with which a CPU takes up to twice as long. The others go on."""


class Arm(Protocol):
    """A training that can be run step by step, from the job's weights and in the job's order of rows.

    It may also have `description` (words for the table), `compile_s` (seconds that steps have waited for a trace or a
    compiler so far, or None) and `engine` (what runs the steps, and why).
    """

    def step(self) -> int | None:
        """Trains a step, or several in one go.

        Returns:
            How many it trained; None is one.
        """
        ...

    def sync(self) -> None:
        """Waits for the device."""
        ...

    def losses(self) -> list[float] | None:
        """The losses of the first steps, 20 or more; waits for the device. It is called before anything is timed.

        None where the algorithm is another one, so that its losses must differ.
        """
        ...


class ArmFactory(Protocol):
    """Makes an arm of a job; raises `EngineError` where it cannot run here."""

    def __call__(self, workload: Job, /) -> Arm:
        """Makes it."""
        ...
