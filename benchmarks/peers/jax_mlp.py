"""The small network in JAX: an epoch in one `lax.scan`, and a step a call."""

from __future__ import annotations

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.arms import BATCH_SIZE
from benchmarks.harness import Arm
from benchmarks.mlp_arms import MlpJob
from benchmarks.peers.jax_adam import ScanArm, State, start, train_step

Parameters = dict[str, jax.Array]
Data = tuple[jax.Array, jax.Array]


def build(job: MlpJob, threads: int) -> Arm:
    """The arm that trains an epoch a call; raises `EngineError` where JAX runs on another device."""
    description = "JAX, jit and lax.scan of an epoch, gathered on the device"
    state = _start(job, threads)
    return ScanArm(job, name="jax", description=description, state=state, data=_data(job), loss=loss, threads=threads)


def build_stepwise(job: MlpJob, threads: int) -> Arm:
    """The arm that trains a step a call; raises `EngineError` where JAX runs on another device."""
    return StepwiseArm(job, threads)


def loss(parameters: Parameters, data: Data, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of a batch, and how many rows are classified right."""
    inputs, targets = data[0][rows], data[1][rows]
    hidden = jax.nn.relu(inputs @ parameters["0.weight"].T + parameters["0.bias"])
    logits = hidden @ parameters["2.weight"].T + parameters["2.bias"]
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)
    return -chosen.mean(), (logits.argmax(1) == targets).sum()


class Progress(NamedTuple):
    """What a step changes: the training's state, the batch that comes next, and the epoch's sums."""

    state: State
    batch: jax.Array
    loss: jax.Array
    correct: jax.Array


class StepwiseArm:
    """A jitted step a call: what JAX gives a loop that stays in Python.

    Args:
        job: what it trains.
        threads: JAX's.
    """

    name = "jax, a step a call"
    description = "JAX, jit of one step, gathered on the device"

    def __init__(self, job: MlpJob, threads: int) -> None:
        self.threads = threads
        self._job = job
        self._epoch = 0
        self._state = _start(job, threads)
        self._data = _data(job)
        self._step = jax.jit(_step, donate_argnums=0)
        begin = time.perf_counter()
        # The call compiles; a state of its own, since it is given away.
        jax.block_until_ready(self._step(_begin(_start(job, threads)), self._data, self._order(0)))
        self.compile_s: float | None = time.perf_counter() - begin

    def losses(self, num_batches: int) -> list[float]:
        """See `Arm.losses`."""
        progress, order = self._begin_epoch()
        losses: list[float] = []
        for number in range(1, num_batches + 1):
            progress = self._step(progress, self._data, order)
            losses.append(float(progress.loss) / number)
        self._state = progress.state
        return losses

    def run(self) -> int:
        """See `Arm.run`."""
        progress, order = self._begin_epoch()
        for _ in range(len(order)):
            progress = self._step(progress, self._data, order)
        self._state = progress.state
        _loss, _correct = float(progress.loss), int(progress.correct)  # HOST READ: once a pass, its figures
        return order.size

    def _begin_epoch(self) -> tuple[Progress, jax.Array]:
        self._epoch += 1
        return _begin(self._state), self._order(self._epoch - 1)

    def _order(self, epoch: int) -> jax.Array:
        return jnp.asarray(self._job.order(epoch).astype(np.int32).reshape(-1, BATCH_SIZE))


def _step(progress: Progress, data: Data, order: jax.Array) -> Progress:
    state, (value, correct) = train_step(loss, progress.state, data, order[progress.batch])
    return Progress(state, progress.batch + 1, progress.loss + value, progress.correct + correct)


def _begin(state: State) -> Progress:
    return Progress(state, jnp.zeros((), int), jnp.zeros(()), jnp.zeros((), int))


def _start(job: MlpJob, threads: int) -> State:
    return start({name: value.numpy() for name, value in job.weights.items()}, job.device, threads)


def _data(job: MlpJob) -> Data:
    return jnp.asarray(job.inputs.cpu().numpy()), jnp.asarray(job.targets.cpu().numpy().astype(np.int32))
