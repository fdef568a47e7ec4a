"""The traced graphs, uncompiled, against the eager engine: for the tests of everything that a trace records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, optim

from fasttrain.step.eager import EagerEngine
from fasttrain.step.spec import StepSpec
from fasttrain.step.trace import Mismatch, TracedStep, trace_step
from tests.step.models import ASKED, NUM_STEPS, Case, assert_same, batches, make

Change = Callable[[StepSpec], Any]


def run_graph(traced: TracedStep, batch: Any) -> Tensor:
    """One step by the graph that is due, and by the optimizer itself where that is not in it."""
    inputs = traced.inputs(batch)
    if isinstance(inputs, Mismatch) and traced.rebind():  # as an engine does, where an object was replaced by its like
        inputs = traced.inputs(batch)
    assert not isinstance(inputs, Mismatch), inputs.reason
    loss = traced.run(inputs)
    traced.finish()
    if traced.why_eager is not None:
        EagerEngine(traced.spec, ASKED).apply_if_due()
    return loss


def both(case: Case, optimizer: tuple[type[optim.Optimizer], dict[str, Any]], **options: Any) -> list[StepSpec]:
    """Two equal steps whose optimizers have made their state, the second for the eager engine."""
    specs = [make(case, optimizer, **options) for _ in range(2)]
    [batch] = batches(case, 1)
    for spec in specs:
        engine = EagerEngine(spec, ASKED)
        torch.manual_seed(11)
        while not engine.has_stepped:
            engine.step(batch)
    return specs


def steps_agree(
    case: Case,
    optimizer: tuple[type[optim.Optimizer], dict[str, Any]],
    changes: dict[int, Change] | None = None,
    rtol: float = 1e-10,
    **options: Any,
) -> TracedStep:
    """Twenty steps by graph in one and by the eager engine in the other; `changes` are made to both before a step.

    Losses agree within 1e-10, the state after the last step within `rtol`.
    """
    spec, eager_spec = both(case, optimizer, **options)
    data = batches(case)
    eager, random_state = EagerEngine(eager_spec, ASKED), torch.get_rng_state()
    traced = trace_step(spec, data[0])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same(spec, eager_spec)
    for number in range(NUM_STEPS):
        for each in (spec, eager_spec):
            (changes or {}).get(number, lambda _: None)(each)
        torch.set_rng_state(random_state)
        wanted = eager.step(data[number + 1])
        after = torch.get_rng_state()
        torch.set_rng_state(random_state)
        found = run_graph(traced, data[number + 1])
        assert torch.equal(torch.get_rng_state(), after), "the graph draws other random numbers"
        random_state = after
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert_same(spec, eager_spec, rtol)
    assert_same_gradients(spec, eager_spec)
    return traced


def assert_same_gradients(found: StepSpec, wanted: StepSpec) -> None:
    """There are gradients where eager steps have left some, and nowhere else."""
    assert found.gathered == wanted.gathered
    for parameter, other in zip(found.model.parameters(), wanted.model.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None)
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-10, atol=1e-12, equal_nan=True)
