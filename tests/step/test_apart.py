"""Where eager's own kernels are inexact, an exact program passes; a wrong trace or a wrong program never does."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.step.apart import is_eagers_rounding
from fasttrain.step.eager import EagerEngine
from fasttrain.step.parity import compare_steps
from fasttrain.step.snapshot import Snapshot
from fasttrain.step.spec import StepSpec
from fasttrain.step.state import PARAMETERS
from fasttrain.step.trace import Mismatch, TracedStep, trace_step
from tests.step.models import ASKED, CPU, OPTIMIZERS, Case, everything, indices, make

Program = Callable[[Any], Tensor]


def images(generator: torch.Generator) -> Tensor:
    """Far from zero, so that long sums in single precision lose digits that count."""
    return torch.randn(64, 2, 28, 28, generator=generator).add_(3000.0).to(memory_format=torch.channels_last)


def network() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.1), nn.Flatten(), nn.Linear(1568, 3))


CASE = Case(network, images, indices(3, 64), F.cross_entropy)


class Bench:
    """A step whose batch norm torch computes inexactly, on one thread."""

    def __init__(self, **changes: Any) -> None:
        generator = torch.Generator().manual_seed(1)
        self.batch = CASE.inputs(generator), CASE.targets(generator)
        self.spec: StepSpec = dataclasses.replace(make(CASE, OPTIMIZERS["sgd-momentum"]), **changes)
        self.eager = EagerEngine(self.spec, ASKED)
        self.eager.step(self.batch)
        self.traced = trace_step(self.spec, self.batch)

    def compare(self, program: Program, *, apart: bool) -> str | None:
        """What differs; looks that the state is left as eager makes it."""
        excuse = partial(is_eagers_rounding, self.traced, program, self.batch) if apart else None
        before = Snapshot.of(self.traced.tensors, CPU)
        self.eager.step(self.batch)
        alone, rng = copy.deepcopy(everything(self.spec)), torch.get_rng_state()
        before.restore(self.traced.tensors, CPU)
        _, difference = compare_steps(
            self.traced.tensors, self.traced.kinds, CPU, self.eager.step, program, self.batch, self.spec, excuse
        )
        torch.testing.assert_close(everything(self.spec), alone, rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), rng)
        return difference


def inputs_of(traced: TracedStep, batch: Any) -> list[Tensor]:
    inputs = traced.inputs(batch)
    assert not isinstance(inputs, Mismatch)
    return inputs


def exact(traced: TracedStep, batch: Any) -> Tensor:
    """A program that rounds only at its end."""
    inputs = inputs_of(traced, batch)
    doubled = [each.double() if each.dtype == torch.float32 else each for each in inputs]
    loss = traced.run(doubled)
    with torch.no_grad():
        for tensor, value in zip(inputs, doubled, strict=True):
            tensor.copy_(value)
    return loss.float()


def test_an_exact_program_passes_where_eager_is_not() -> None:
    bench = Bench()
    program = partial(exact, bench.traced)
    assert bench.compare(program, apart=False) is not None
    assert bench.compare(program, apart=True) is None


@pytest.mark.parametrize(("times", "passes"), [(1.0, True), (20.0, False)])
def test_a_program_may_be_as_inexact_as_eager(times: float, passes: bool) -> None:
    bench = Bench()
    tensors, before = bench.traced.tensors, Snapshot.of(bench.traced.tensors, CPU)
    bench.eager.step(bench.batch)
    eager = Snapshot.of(tensors, CPU)
    before.restore(tensors, CPU)

    def program(batch: Any) -> Tensor:
        """On the other side of what is exact."""
        loss = exact(bench.traced, batch)
        with torch.no_grad():
            for tensor, theirs, kind in zip(tensors, eager.copies, bench.traced.kinds, strict=True):
                if kind in (PARAMETERS, "momentum_buffer"):
                    tensor.add_(tensor - theirs, alpha=times)
        return loss

    assert (bench.compare(program, apart=True) is None) == passes


@pytest.mark.parametrize("name", ["0.running_mean", "3.weight"])
def test_a_wrong_program_is_refused(name: str) -> None:
    bench = Bench()
    tensor = bench.spec.model.state_dict()[name]

    def program(batch: Any) -> Tensor:
        before = tensor.clone()
        loss = exact(bench.traced, batch)
        tensor.lerp_(before, 0.1)  # a tenth of the change is missing
        return loss

    assert bench.compare(program, apart=True) is not None


def test_a_wrong_trace_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    right = bench.traced.run
    largest = max(range(len(bench.traced.tensors)), key=lambda place: bench.traced.tensors[place].numel())

    def run(inputs: list[Tensor]) -> Tensor:
        """As a lost weight decay would show: in the trace, and so in all that is made of it."""
        loss = right(inputs)
        inputs[largest].mul_(1.01)
        return loss

    monkeypatch.setattr(bench.traced, "run", torch.no_grad()(run))
    assert bench.compare(partial(exact, bench.traced), apart=True) is not None


def test_only_whole_steps_in_single_precision_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    monkeypatch.setattr(bench.traced, "run", None)  # it is not asked
    before = Snapshot.of(bench.traced.tensors, CPU)
    for changed in ({"precision": "bf16"}, {"accumulate": 2}):
        bench.traced.spec = dataclasses.replace(bench.spec, **changed)
        monkeypatch.setattr(TracedStep, "is_whole", "accumulate" not in changed)
        assert is_eagers_rounding(bench.traced, exact, bench.batch, before, torch.tensor(0.0), []) is None
