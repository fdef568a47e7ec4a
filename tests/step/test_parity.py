"""Parity: other numbers are caught, other rounding is not, and judging leaves no trace."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.metrics import RunningMetrics
from fasttrain.step.eager import EagerEngine
from fasttrain.step.parity import compare_steps
from fasttrain.step.spec import StepSpec, normalise_forward
from fasttrain.step.state import METRICS, PARAMETERS, StepState
from tests.step.cuda_stand_in import ASKED, OnDevice
from tests.step.jobs import batches, everything, train_step
from tests.step.models import CPU


@dataclass
class Toy:
    """A step by hand: parameters and a buffer that change, a mask that does not, a moment, a count, totals."""

    tensors: dict[str, Tensor] = field(
        default_factory=lambda: {
            "weight": torch.linspace(-1.0, 1.0, 200),
            "mask": torch.tensor([0.0, -math.inf]),
            "mean": torch.tensor([0.5, 2.0]),
            "batches": torch.tensor(1_000_000),
            "moment": torch.zeros(200),
            "totals": torch.tensor([40.0, 4000.0], dtype=torch.float64),
        }
    )
    kinds = (PARAMETERS, "buffers", "buffers", "buffers", "exp_avg", METRICS)

    def step(self, batch: Tensor) -> Tensor:
        gradient = torch.linspace(1.0, 2.0, 200)
        loss = 0.7 * batch
        self.tensors["moment"].mul_(0.9).add_(gradient, alpha=0.1)
        self.tensors["weight"].sub_(self.tensors["moment"], alpha=0.01)
        self.tensors["mean"].mul_(0.9).add_(0.1)
        self.tensors["batches"].add_(1)
        self.tensors["totals"].add_(torch.tensor([0.7, 60.0], dtype=torch.float64))
        return loss

    def compare(self, program: Callable[[Tensor], Tensor]) -> tuple[Tensor, str | None]:
        return compare_steps(list(self.tensors.values()), self.kinds, CPU, self.step, program, torch.tensor(1.0))


def changed(toy: Toy, name: str, change: Callable[[Tensor], Any], loss: float = 1.0) -> Callable[[Tensor], Tensor]:
    """A program that is the toy's step, but for one tensor."""

    def program(batch: Tensor) -> Tensor:
        right = toy.step(batch)
        change(toy.tensors[name])
        return right * loss

    return program


def nothing(_: Tensor) -> None:
    return None


def test_the_same_numbers_pass_and_the_state_is_eagers() -> None:
    toy, alone = Toy(), Toy()
    loss, difference = toy.compare(toy.step)
    assert difference is None
    assert torch.equal(loss, alone.step(torch.tensor(1.0)))
    torch.testing.assert_close(toy.tensors, alone.tensors, rtol=0, atol=0)


DIFFERENCES: list[tuple[str, Callable[[Tensor], Any], str]] = [
    ("weight", lambda t: t.add_(0.001), "parameters: "),
    ("weight", lambda t: t[:3].add_(0.001), "parameters: 3 of 200"),
    ("weight", lambda t: t[0].fill_(math.nan), "parameters: "),
    ("weight", lambda t: t[0].add_(1.0), "parameters: "),
    ("mask", lambda t: t[0].fill_(-math.inf), "buffers: 1 of 4"),
    ("mask", lambda t: t[1].fill_(math.inf), "buffers: 1 of 4"),
    ("mask", lambda t: t[1].fill_(0.0), "buffers: 1 of 4"),
    ("mean", lambda t: t.add_(0.01), "buffers: 2 of 4"),
    ("batches", lambda t: t.sub_(1), "buffers: 1 of 1"),
    ("moment", lambda t: t.mul_(1.01), "exp_avg: "),
    ("moment", lambda t: t[7].mul_(1.01), "exp_avg: 1 of 200"),
    ("totals", lambda t: t[1].sub_(60.0), "metrics: 1 of 2"),
    ("totals", lambda t: t[0].sub_(0.7), "total of the loss"),
]


@pytest.mark.parametrize(("name", "change", "reason"), DIFFERENCES)
def test_a_difference_is_caught_and_eagers_state_stays(name: str, change: Callable[[Tensor], Any], reason: str) -> None:
    toy, alone = Toy(), Toy()
    loss, difference = toy.compare(changed(toy, name, change))
    assert difference is not None
    assert reason in difference
    assert torch.equal(loss, alone.step(torch.tensor(1.0)))
    torch.testing.assert_close(toy.tensors, alone.tensors, rtol=0, atol=0)


@pytest.mark.parametrize("factor", [1.001, 0.0, math.nan, math.inf])
def test_another_loss_is_caught(factor: float) -> None:
    toy = Toy()
    loss, difference = toy.compare(changed(toy, "mean", nothing, loss=factor))
    assert difference is not None
    assert "the loss is" in difference
    assert f"{loss.item():.9g}" in difference


ROUNDING: list[tuple[str, Callable[[Tensor], Any]]] = [
    ("weight", lambda t: t.mul_(1 + 1e-6)),
    ("weight", lambda t: t[:2].add_(0.002)),  # noise where the gradient is zero, in a hundredth of the entries
    ("mean", lambda t: t.mul_(1 + 1e-6)),
    ("moment", lambda t: t.mul_(1 + 1e-5)),
    ("totals", lambda t: t[0].add_(1e-5)),
    ("totals", lambda t: t[1].add_(100 / 128)),  # one prediction of 128 at the threshold
]


@pytest.mark.parametrize(("name", "change"), ROUNDING)
def test_rounding_passes(name: str, change: Callable[[Tensor], Any]) -> None:
    toy = Toy()
    assert toy.compare(changed(toy, name, change, loss=1 + 1e-6))[1] is None


def test_what_diverges_the_same_way_is_the_same() -> None:
    toy = Toy()

    def diverging(batch: Tensor) -> Tensor:
        toy.tensors["weight"][3] = math.nan
        toy.tensors["moment"][5] = math.inf
        return toy.step(batch) * math.nan

    found = compare_steps(list(toy.tensors.values()), toy.kinds, CPU, diverging, diverging, torch.tensor(1.0))
    assert found[1] is None


def test_a_program_that_cannot_run_leaves_eagers_step() -> None:
    toy, alone = Toy(), Toy()

    def fails(batch: Tensor) -> Tensor:
        toy.tensors["weight"].zero_()
        torch.rand(1)
        raise RuntimeError("could not create a primitive")

    torch.manual_seed(0)
    before = torch.get_rng_state()
    loss, difference = toy.compare(fails)
    assert difference == "it cannot run: could not create a primitive"
    assert torch.equal(loss, alone.step(torch.tensor(1.0)))
    torch.testing.assert_close(toy.tensors, alone.tensors, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_users_error_is_not_taken_for_the_programs() -> None:
    toy = Toy()

    def interrupted(_: Tensor) -> Tensor:
        toy.tensors["weight"].zero_()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy.compare(interrupted)
    torch.testing.assert_close(toy.tensors, Toy().tensors, rtol=0, atol=0)


def test_judging_a_real_step_leaves_no_trace() -> None:
    """Parameters, buffers, optimizer, totals, weight and random numbers are those of one eager step, bit for bit."""
    [first, second] = batches(2)
    step, alone = train_step("eager"), train_step("eager")
    torch.manual_seed(3)
    alone(first)
    alone(second)
    wanted = copy.deepcopy(everything(alone))
    torch.manual_seed(3)
    step(first)
    state = StepState(step.spec)

    def program(batch: Any) -> Tensor:
        with torch.no_grad():
            for tensor in state.tensors:
                tensor.add_(1)
        torch.rand(100)
        return torch.zeros(())

    _, difference = compare_steps(state.tensors, state.kinds, CPU, step, program, second)
    assert difference is not None
    torch.testing.assert_close(everything(step), wanted, rtol=0, atol=0)
    assert step.metrics.compute().loss == alone.metrics.compute().loss


def on_device(metrics: RunningMetrics) -> RunningMetrics:
    metrics.totals = OnDevice(metrics.totals)
    metrics._cells = list(metrics.totals.unbind())  # pyright: ignore[reportPrivateUsage]
    return metrics


@pytest.mark.parametrize("is_stepped", [True, False])
@pytest.mark.parametrize("reached", [True, False])
def test_gradients_that_are_not_there_yet_are_compared_on_the_device(is_stepped: bool, reached: bool) -> None:
    """The first batch of a group finds no gradients, and a parameter that the loss does not reach never gets one."""
    model = nn.Linear(6, 3)
    for name, parameter in list(model.named_parameters()):
        setattr(model, name, nn.Parameter(OnDevice(parameter.detach())))
    [first, second] = [tuple(OnDevice(each) for each in batch) for batch in batches(2)]
    spec = StepSpec(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, foreach=False),
        forward=normalise_forward(
            lambda model, batch: F.cross_entropy(
                F.linear(batch[0], model.weight, model.bias if reached else None), batch[1]
            ),
            None,
        ),
        device=CPU,
        precision="fp32",
        accumulate=2,
        clip_norm=None,
        clip_value=None,
        metrics=on_device(RunningMetrics(CPU)),
        scaler=None,
    )
    eager = EagerEngine(spec, ASKED)
    run = eager.step if is_stepped else eager.gather
    state = StepState(spec)
    for batch in (first, second):
        _, difference = compare_steps(state.tensors, state.kinds, CPU, run, run, batch, spec)
        assert difference is None

    def without_gradients(batch: Any) -> Tensor:
        loss = eager.gather(batch)
        for parameter in spec.trained():
            parameter.grad = None
        return loss

    spec.gathered.count = 0
    for parameter in spec.trained():
        parameter.grad = None
    _, difference = compare_steps(state.tensors, state.kinds, CPU, eager.gather, without_gradients, first, spec)
    assert difference is not None
    assert "gradients: a tensor of shape [] stays as it is" in difference
