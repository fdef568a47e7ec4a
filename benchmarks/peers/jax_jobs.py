"""The jobs in JAX: their parameters, their data and the loss of a batch, for `jax_scan` and `jax_step`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from fasttrain.errors import EngineError
from fasttrain.workloads.job import Job
from fasttrain.workloads.review_job import ReviewJob
from fasttrain.workloads.tensor_job import TensorJob

Parameters = Any
Buffers = dict[str, jax.Array]
Figures = tuple[jax.Array, jax.Array]
Loss = Callable[[Parameters, Buffers, Any, jax.Array], tuple[jax.Array, tuple[jax.Array, Buffers]]]
"""(parameters, buffers, data, row numbers [batch]) -> mean loss, (right predictions, the buffers after it)."""

BETAS = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
MOMENTUM, EPS = 0.1, 1e-5
"""Of torch's batch norm."""


class State(NamedTuple):
    """What a step changes."""

    parameters: Parameters
    buffers: Buffers
    moments: Any


class Problem(NamedTuple):
    """A job.

    Attributes:
        state: before the first step.
        data: what the loss takes its rows from, on the device.
        loss: of a batch.
        optimizer: as the job's own.
        steps_per_call: of `jax_scan`; None: an epoch's.
    """

    state: State
    data: Any
    loss: Loss
    optimizer: optax.GradientTransformation
    steps_per_call: int | None = None

    def step(self, state: State, data: Any, rows: jax.Array) -> tuple[State, Figures]:
        """One step: the new state; the batch's loss and right predictions."""
        find = jax.value_and_grad(self.loss, has_aux=True)
        (loss, (correct, buffers)), gradient = find(state.parameters, state.buffers, data, rows)
        updates, moments = self.optimizer.update(gradient, state.moments, state.parameters)
        return State(optax.apply_updates(state.parameters, updates), buffers, moments), (loss, correct)


def problem(job: Job) -> Problem:
    """The job in JAX. The first call in a process settles JAX's threads: torch's.

    Raises:
        EngineError: JAX runs on another device than the other arms, or the job is not one of these.
    """
    os.environ.update(_variables(torch.get_num_threads()))
    backend = jax.default_backend()
    if backend != {"cuda": "gpu"}.get(job.device.type, job.device.type):
        raise EngineError(f"jax runs on {backend} here, the other arms on {job.device.type}")
    if isinstance(job, ReviewJob):
        return _reviews(job)
    if isinstance(job, TensorJob) and job.name in _OF_TENSORS:
        return _of_tensors(job)
    raise EngineError(f"there is no {job.name} in JAX")


def orders(job: Job, epoch: int) -> jax.Array:
    """Row numbers of an epoch's batches, [steps, batch], int32."""
    return jnp.asarray(job.order(epoch).astype(np.int32).reshape(-1, job.batch_size))


def _variables(threads: int) -> dict[str, str]:
    """XLA sizes its pools by these when its client is made, and has no other switch."""
    shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # a GPU's memory is for all arms of the block
    if threads > 1:
        return {**shared, "NPROC": str(threads)}
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    return {**shared, "NPROC": "1", "XLA_FLAGS": flags}


def _started(parameters: Parameters, buffers: Buffers, optimizer: optax.GradientTransformation) -> State:
    placed = jax.tree.map(jnp.asarray, parameters)
    return State(placed, jax.tree.map(jnp.asarray, buffers), optimizer.init(placed))


def _reviews(job: ReviewJob) -> Problem:
    if job.num_outputs != 1:
        raise EngineError("the review job in JAX is for two ratings")
    weights = {name: value.numpy() for name, value in job.weights.items()}
    optimizer = optax.adam(1e-3, **BETAS)
    state = _started((weights["fc1.weight"][0], weights["fc1.bias"]), {}, optimizer)
    data = jnp.asarray(_padded_ids(job)), jnp.asarray(job.targets().numpy())
    return Problem(state, data, _review_loss, optimizer)


def _padded_ids(job: ReviewJob) -> np.ndarray:
    """The rows' token ids, [rows, longest], int32, filled up with the number of features, which is no id."""
    tokens = job.train.tokens
    lengths = np.diff(tokens.offsets)
    padded = np.full((len(lengths), lengths.max()), job.num_features, dtype=np.int32)
    padded[np.arange(lengths.max()) < lengths[:, None]] = tokens.ids
    return padded


def _review_loss(parameters: Parameters, buffers: Buffers, data: Any, rows: jax.Array) -> Any:
    (weight, bias), (ids, targets) = parameters, data
    # What lies beyond the weight counts 0 and its gradient is dropped: 80 us a step, where a slot of its own for the
    # filling takes 107, and flat rows without filling (segment_sum) take 216 (Xeon with AMX, one thread).
    logits = weight.at[ids[rows]].get(mode="fill", fill_value=0.0).sum(1) + bias
    wanted = targets[rows]
    losses = optax.sigmoid_binary_cross_entropy(logits, wanted)
    return losses.mean(), (((logits > 0.0) == (wanted > 0.5)).sum(), buffers)


def _of_tensors(job: TensorJob) -> Problem:
    logits, optimizer, steps_per_call = _OF_TENSORS[job.name]
    weights = {name: value.numpy() for name, value in job.weights.items()}
    buffers = {name: value for name, value in weights.items() if "running_" in name}
    parameters = {name: value for name, value in weights.items() if name not in buffers and "num_batches" not in name}
    data = jnp.asarray(job.inputs.numpy()), jnp.asarray(job.targets.numpy().astype(np.int32))

    def loss(parameters: Parameters, buffers: Buffers, data: Any, rows: jax.Array) -> Any:
        found, after = logits(parameters, buffers, data[0][rows])
        wanted = data[1][rows]
        losses = optax.softmax_cross_entropy_with_integer_labels(found, wanted)
        return losses.mean(), ((found.argmax(-1) == wanted).sum(), after)

    return Problem(_started(parameters, buffers, optimizer), data, loss, optimizer, steps_per_call)


# Of each of the following: parameters, buffers, inputs -> logits with the classes last, buffers.


def _mlp(parameters: Parameters, buffers: Buffers, inputs: jax.Array) -> tuple[jax.Array, Buffers]:
    hidden = jax.nn.relu(inputs @ parameters["0.weight"].T + parameters["0.bias"])
    return hidden @ parameters["2.weight"].T + parameters["2.bias"], buffers


def _cnn(parameters: Parameters, buffers: Buffers, inputs: jax.Array) -> tuple[jax.Array, Buffers]:
    hidden, after = inputs.transpose(0, 2, 3, 1), dict(buffers)
    for convolution, norm in (("0", "1"), ("4", "5")):
        kernel = parameters[f"{convolution}.weight"].transpose(2, 3, 1, 0)
        hidden = jax.lax.conv_general_dilated(
            hidden, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        mean, variance = hidden.mean((0, 1, 2)), hidden.var((0, 1, 2))
        count = hidden.size / hidden.shape[-1]
        for name, found in (("mean", mean), ("var", variance * count / (count - 1))):
            key = f"{norm}.running_{name}"
            after[key] = (1 - MOMENTUM) * buffers[key] + MOMENTUM * jax.lax.stop_gradient(found)
        scale = parameters[f"{norm}.weight"] * jax.lax.rsqrt(variance + EPS)
        hidden = jax.nn.relu((hidden - mean) * scale + parameters[f"{norm}.bias"])
        hidden = jax.lax.reduce_window(hidden, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    flat = hidden.transpose(0, 3, 1, 2).reshape(len(hidden), -1)
    return flat @ parameters["9.weight"].T + parameters["9.bias"], after


def _chars(parameters: Parameters, buffers: Buffers, ids: jax.Array) -> tuple[jax.Array, Buffers]:
    hidden = parameters["embedding.weight"][ids] + parameters["positions"]
    num_layers = sum(name.endswith("query_key_value.weight") for name in parameters)
    for layer in range(num_layers):
        own = {name.removeprefix(f"layers.{layer}."): value for name, value in parameters.items()}
        hidden = hidden + _attention(own, _norm(own, "attention_norm", hidden))
        wide = jax.nn.gelu(_norm(own, "mlp.0", hidden) @ own["mlp.1.weight"].T, approximate=False)
        hidden = hidden + wide @ own["mlp.3.weight"].T
    return _norm(parameters, "norm", hidden) @ parameters["embedding.weight"].T, buffers


def _attention(own: Parameters, hidden: jax.Array) -> jax.Array:
    batch, length, width = hidden.shape
    mixed = (hidden @ own["query_key_value.weight"].T).reshape(batch, length, 3, NUM_HEADS, width // NUM_HEADS)
    query, key, value = (mixed[:, :, part] for part in range(3))
    found = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    return found.reshape(batch, length, width) @ own["mix.weight"].T


def _norm(parameters: Parameters, name: str, hidden: jax.Array) -> jax.Array:
    centred = hidden - hidden.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + EPS)
    return centred * scale * parameters[f"{name}.weight"] + parameters[f"{name}.bias"]


NUM_HEADS = 4

_OF_TENSORS: dict[str, tuple[Any, optax.GradientTransformation, int | None]] = {
    "mlp": (_mlp, optax.adam(1e-3, **BETAS), None),
    "cnn": (_cnn, optax.adam(1e-3, **BETAS), 16),
    "chars": (_chars, optax.adamw(1e-3, **BETAS, weight_decay=1e-2), 8),
}
"""Logits, optimizer, and the steps of a call of `jax_scan` where an epoch in one would take too long."""
