"""JAX, many steps a call: an epoch, or a part of a long one, in one `lax.scan`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import jax
import numpy as np

from benchmarks.peers.jax_jobs import Figures, Problem, State, orders, problem
from fasttrain.errors import EngineError
from fasttrain.measure.bench.arm import CHECKED_STEPS, EPOCHS, Arm
from fasttrain.workloads.job import Job


def make_arm(job: Job) -> Arm:
    """The arm.

    Raises:
        EngineError: JAX runs on another device, or has no such job, or is many times slower in a scan.
    """
    if job.name == "cnn" and job.device.type == "cpu":
        # 1.46 s a step where a jitted step takes 0.10 s (Xeon with AMX, one thread).
        raise EngineError("XLA's convolutions on the CPU are many times slower in a loop (jax#12868): see jax-step")
    return ScanArm(job, problem(job))


class ScanArm:
    """Shuffled row numbers go to the device; gathers and steps run there; the batches' figures are read at the end.

    Args:
        job: what it trains.
        of_jax: the same in JAX.
    """

    def __init__(self, job: Job, of_jax: Problem) -> None:
        self._job = job
        self._start = jax.tree.map(np.asarray, of_jax.state)
        self._state, self._data = of_jax.state, of_jax.data
        self._steps_per_call = of_jax.steps_per_call or len(orders(job, 0))
        self.description = f"JAX and optax, jit and lax.scan of {self._steps_per_call} steps, gathered on the device"
        self._rows = self._all_rows()
        self._losses: list[float] = []

        def train(state: State, data: Any, rows: jax.Array) -> tuple[State, Figures]:
            return jax.lax.scan(lambda before, batch: of_jax.step(before, data, batch), state, rows)

        begin = time.perf_counter()
        compiled = jax.jit(train, donate_argnums=0)
        self._train = compiled.lower(self._state, self._data, orders(job, 0)[: self._steps_per_call]).compile()
        self.compile_s = time.perf_counter() - begin

    def step(self) -> int:
        """See `Arm.step`."""
        rows = next(self._rows)  # may begin the training again
        self._state, (losses, correct) = self._train(self._state, self._data, rows)
        read, _correct = np.asarray(losses), np.asarray(correct)  # HOST READ: once a call, its figures
        if len(self._losses) < CHECKED_STEPS:
            self._losses += read.tolist()
        return len(read)

    def sync(self) -> None:
        """See `Arm.sync`."""
        jax.block_until_ready(self._state)

    def losses(self) -> list[float]:
        """See `Arm.losses`."""
        return self._losses

    def _all_rows(self) -> Iterator[jax.Array]:
        for epoch in count():
            if epoch and epoch % EPOCHS == 0:
                self._state = jax.tree.map(jax.numpy.asarray, self._start)
            rows = orders(self._job, epoch)
            for begin in range(0, len(rows) - self._steps_per_call + 1, self._steps_per_call):
                yield rows[begin : begin + self._steps_per_call]
