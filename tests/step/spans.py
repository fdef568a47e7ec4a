"""Resident data for the small models, and spans of its batches run by the walking graph, uncompiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttrain.data.ragged import Ragged
from fasttrain.data.resident import ResidentBatches, Span, resident
from fasttrain.step.spec import StepSpec
from fasttrain.step.trace import Mismatch, trace_step
from fasttrain.step.walk import TracedWalk
from tests.step.models import Case

NUM_BATCHES = 7
ROWS = 5


def joined(batches: list[Any]) -> Any:
    """The rows of several batches as one."""
    if not isinstance(batches[0], Ragged):
        return torch.cat(batches)
    lengths = torch.cat([batch.offsets.diff() for batch in batches])
    return Ragged.of_lengths(torch.cat([batch.values for batch in batches]), lengths)


def columns_of(case: Case, count: int = NUM_BATCHES, seed: int = 3) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [joined([make(generator) for _ in range(count)]) for make in (case.inputs, case.targets)]


def data_of(case: Case, **options: Any) -> ResidentBatches:
    given: dict[str, Any] = {"batch_size": ROWS, "device": "cpu", "seed": 9, **options}
    return resident(*columns_of(case), **given)


def first_batch(data: ResidentBatches) -> Any:
    """A batch, without counting an epoch."""
    return data.gather(torch.arange(ROWS), torch.arange(ROWS).numpy())[0]


def trace_walk(spec: StepSpec, data: ResidentBatches) -> TracedWalk:
    batch = first_batch(data)
    return TracedWalk(trace_step(spec, batch), batch, data)


def taken(epoch: Any, steps: int) -> Span:
    span = epoch.take(steps)
    assert span is not None
    assert span.steps == steps
    return span


def run_walk(traced: TracedWalk, span: Span) -> Tensor:
    """The losses of a span."""
    state = traced.new_state()
    inputs = traced.inputs(span.source, state)
    assert not isinstance(inputs, Mismatch), inputs.reason
    state.begin(span)
    with torch.no_grad():
        for _ in range(span.steps):
            traced.parts[0].graph(*inputs)
    assert state.cursor.tolist() == [span.steps]
    assert not state.losses[span.steps :].any()
    return state.losses[: span.steps]
