"""What the peers in JAX share: its threads, exact dense Adam, and an arm that trains an epoch in one `lax.scan`."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.arms import BATCH_SIZE, LEARNING_RATE, Job, running_means
from benchmarks.harness import environment_variables
from fasttrain.errors import EngineError

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8

Parameters = Any
Loss = Callable[[Parameters, Any, jax.Array], tuple[jax.Array, jax.Array]]
"""(parameters, data, row numbers [batch]) -> mean loss, rows classified right."""


class State(NamedTuple):
    """Parameters, Adam's averages of them and the steps done."""

    parameters: Parameters
    first: Parameters
    second: Parameters
    step: jax.Array


def start(parameters: Parameters, device: torch.device, threads: int) -> State:
    """The state before the first step. The first call in a process settles JAX's threads.

    Raises:
        EngineError: JAX runs on another device than the other arms.
    """
    with environment_variables(**_variables(threads)):
        backend = jax.default_backend()
    if backend != {"cuda": "gpu"}.get(device.type, device.type):
        raise EngineError(f"jax runs on {backend} here, the other arms on {device.type}")
    placed = jax.tree.map(jnp.array, parameters)
    return State(placed, jax.tree.map(jnp.zeros_like, placed), jax.tree.map(jnp.zeros_like, placed), jnp.zeros((), int))


def train_step(loss: Loss, state: State, data: Any, rows: jax.Array) -> tuple[State, tuple[jax.Array, jax.Array]]:
    """One step, as torch.optim.Adam takes it; the new state, and the batch's loss and rows classified right."""
    figures, gradient = jax.value_and_grad(loss, has_aux=True)(state.parameters, data, rows)
    step = state.step + 1
    elapsed = step.astype(jnp.float32)
    # 1 - beta**step, to the last digit even where beta**step is nearly 1.
    scale = LEARNING_RATE / -jnp.expm1(elapsed * math.log(BETA1))
    root = jnp.sqrt(-jnp.expm1(elapsed * math.log(BETA2)))

    def averaged(first: jax.Array, found: jax.Array) -> jax.Array:
        return first + (1 - BETA1) * (found - first)

    def averaged_square(second: jax.Array, found: jax.Array) -> jax.Array:
        return BETA2 * second + (1 - BETA2) * found * found

    def moved(parameter: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
        return parameter - scale * first / (jnp.sqrt(second) / root + EPS)

    first = jax.tree.map(averaged, state.first, gradient)
    second = jax.tree.map(averaged_square, state.second, gradient)
    return State(jax.tree.map(moved, state.parameters, first, second), first, second, step), figures


class ScanArm:
    """Whole epochs, each one call: shuffle, gathers and steps on the device, the batches' figures read at its end.

    Args:
        job: what it trains.
        name: short and unique.
        description: what it is, in words.
        state: before the first step.
        data: what the loss takes its rows from, on the device.
        loss: of a batch.
        threads: JAX's.
    """

    def __init__(
        self, job: Job, *, name: str, description: str, state: State, data: Any, loss: Loss, threads: int
    ) -> None:
        self.name, self.description, self.threads = name, description, threads
        self._job, self._state, self._data = job, state, data
        self._epoch = 0
        begin = time.perf_counter()
        compiled = jax.jit(partial(_train_epoch, loss), donate_argnums=0)
        self._train = compiled.lower(state, data, self._order(0)).compile()
        self.compile_s: float | None = time.perf_counter() - begin

    def losses(self, num_batches: int) -> list[float]:
        """See `Arm.losses`; trains the whole epoch."""
        return running_means(self._pass()[0][:num_batches].tolist())

    def run(self) -> int:
        """See `Arm.run`."""
        losses, correct = self._pass()
        _loss, _accuracy = losses.mean(), 100.0 * correct.sum() / (len(losses) * BATCH_SIZE)
        return len(losses) * BATCH_SIZE

    def _pass(self) -> tuple[np.ndarray, np.ndarray]:
        order = self._order(self._epoch)
        self._epoch += 1
        self._state, (losses, correct) = self._train(self._state, self._data, order)
        return np.asarray(losses), np.asarray(correct)  # HOST READ: once a pass, its figures

    def _order(self, epoch: int) -> jax.Array:
        return jnp.asarray(self._job.order(epoch).astype(np.int32).reshape(-1, BATCH_SIZE))


def _train_epoch(loss: Loss, state: State, data: Any, order: jax.Array) -> tuple[State, tuple[jax.Array, jax.Array]]:
    return jax.lax.scan(lambda before, rows: train_step(loss, before, data, rows), state, order)


def _variables(threads: int) -> dict[str, str]:
    """XLA sizes its pools by these when its client is made, and has no other switch."""
    if threads > 1:
        return {"NPROC": str(threads)}
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    return {"NPROC": "1", "XLA_FLAGS": flags}
