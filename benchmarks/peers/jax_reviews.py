"""The review job in JAX: the same sparse step, an epoch in one `lax.scan`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Arm
from benchmarks.peers.jax_adam import ScanArm, start
from benchmarks.review_arms import ReviewJob
from fasttrain.errors import EngineError

Parameters = tuple[jax.Array, jax.Array]
Data = tuple[jax.Array, jax.Array]


def build(job: ReviewJob, threads: int) -> Arm:
    """The arm.

    Raises:
        EngineError: there are more than two ratings, or JAX runs on another device than the other arms.
    """
    if job.textbook.num_outputs != 1:
        raise EngineError("the peer in JAX is for two ratings")
    parameters = job.weights["fc1.weight"].numpy()[0], job.weights["fc1.bias"].numpy()
    state = start(parameters, job.device, threads)
    data = jnp.asarray(padded_ids(job)), jnp.asarray(job.targets().numpy())
    description = "JAX, jit and lax.scan of an epoch, ids padded to the longest row, exact dense Adam"
    return ScanArm(job, name="jax", description=description, state=state, data=data, loss=loss, threads=threads)


def padded_ids(job: ReviewJob) -> np.ndarray:
    """The rows' token ids, [rows, longest], int32, filled up with the number of features, which is no id."""
    tokens = job.train.tokens
    lengths = np.diff(tokens.offsets)
    padded = np.full((len(lengths), lengths.max()), job.textbook.num_features, dtype=np.int32)
    padded[np.arange(lengths.max()) < lengths[:, None]] = tokens.ids
    return padded


def loss(parameters: Parameters, data: Data, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Binary cross-entropy of a batch, and how many rows are on the right side."""
    (weight, bias), (ids, targets) = parameters, data
    # What lies beyond the weight counts 0 and its gradient is dropped: 80 us a step, where a slot of its own for the
    # filling takes 107, and flat rows without filling (segment_sum) take 216 (Xeon with AMX, one thread).
    logits = weight.at[ids[rows]].get(mode="fill", fill_value=0.0).sum(1) + bias
    wanted = targets[rows]
    losses = jnp.maximum(logits, 0.0) - logits * wanted + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    return losses.mean(), ((logits > 0.0) == (wanted > 0.5)).sum()
