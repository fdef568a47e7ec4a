"""JAX, a jitted step a call: what it gives a loop that stays in Python."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.peers.jax_jobs import Problem, State, orders, problem
from fasttrain.measure.bench.arm import CHECKED_STEPS, Arm
from fasttrain.workloads.job import Job


def make_arm(job: Job) -> Arm:
    """The arm; raises `EngineError` where JAX runs on another device, or has no such job."""
    return StepArm(job, problem(job))


class Progress(NamedTuple):
    """What a step changes: the training's state, the number of its batch, and the epoch's sums."""

    state: State
    batch: jax.Array
    loss: jax.Array
    correct: jax.Array


class StepArm:
    """Batches are gathered on the device; the epoch's sums stay there until its end.

    Args:
        job: what it trains.
        of_jax: the same in JAX.
    """

    description = "JAX and optax, jit of one step, gathered on the device"

    def __init__(self, job: Job, of_jax: Problem) -> None:
        self._job = job
        self._data = of_jax.data
        self._epoch = self._steps = 0
        self._order = orders(job, 0)
        self._progress = _begin(of_jax.state)
        self._losses: list[float] = []

        def train(progress: Progress, data: Any, order: jax.Array) -> tuple[Progress, jax.Array]:
            state, (loss, correct) = of_jax.step(progress.state, data, order[progress.batch])
            sums = progress.loss + loss, progress.correct + correct
            return Progress(state, progress.batch + 1, *sums), loss

        begin = time.perf_counter()
        compiled = jax.jit(train, donate_argnums=0)
        self._train = compiled.lower(self._progress, self._data, self._order).compile()
        self.compile_s = time.perf_counter() - begin

    def step(self) -> None:
        """See `Arm.step`."""
        if self._steps == len(self._order):
            self._next_epoch()
        self._progress, loss = self._train(self._progress, self._data, self._order)
        self._steps += 1
        if len(self._losses) < CHECKED_STEPS:
            self._losses.append(float(loss))  # HOST READ: of the first steps, which are checked

    def sync(self) -> None:
        """See `Arm.sync`."""
        jax.block_until_ready(self._progress)

    def losses(self) -> list[float]:
        """See `Arm.losses`."""
        return self._losses

    def _next_epoch(self) -> None:
        _loss, _correct = float(self._progress.loss), int(self._progress.correct)  # HOST READ: the epoch's figures
        self._epoch, self._steps = self._epoch + 1, 0
        self._order = orders(self._job, self._epoch)
        self._progress = _begin(self._progress.state)


def _begin(state: State) -> Progress:
    return Progress(state, jnp.zeros((), int), jnp.zeros(()), jnp.zeros((), int))
