"""A recorded step is compared with eager before it runs alone: what passes, what does not, and what that changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.metrics import FIRST_USER_TOTAL
from fasttrain.step.replay import Programs
from fasttrain.step.trace import TracedStep, trace_step
from fasttrain.step.train_step import TrainStep
from tests.step.jobs import Batch, batches, everything, train_step

Spoil = Callable[[TracedStep, list[Tensor]], None]


class Recorded:
    """A program that runs the recorded graph, and then spoils something."""

    def __init__(self, traced: TracedStep, spoil: Spoil = lambda *_: None) -> None:
        self._traced = traced
        self._spoil = spoil

    def run(self, inputs: list[Tensor]) -> Tensor:
        before = [tensor.clone() for tensor in self._traced.tensors]
        loss = self._traced.run(inputs)
        with torch.no_grad():
            self._spoil(self._traced, before)
        return loss


class Refusals(list[str]):
    """Keeps why programs were refused, all of them for their numbers."""

    def __call__(self, reason: str, traced: TracedStep, *, is_wrong: bool) -> None:
        assert is_wrong
        self.append(reason)


def proven(
    step: TrainStep, data: list[Any], spoil: Spoil = lambda *_: None, kind: type[Recorded] = Recorded
) -> list[str]:
    """Runs the first batch eagerly and the rest by the recorded step; says why that was refused, if it was."""
    reasons = Refusals()
    step(data[0])
    programs = Programs(step.spec, step._engine, reasons)  # type: ignore[arg-type]
    traced = trace_step(step.spec, data[1])
    programs.add(traced, kind(traced, spoil))  # type: ignore[arg-type]
    for batch in data[1:]:
        programs.step(batch)
    assert len(programs) == 0 if reasons else programs.missed == 0
    return reasons


def by_eager(step: TrainStep, data: list[Any]) -> TrainStep:
    for batch in data:
        step(batch)
    return step


def place_of(traced: TracedStep, shape: tuple[int, ...]) -> int:
    return next(i for i, tensor in enumerate(traced.tensors) if tuple(tensor.shape) == shape)


def forget_last_bias(traced: TracedStep, before: list[Tensor]) -> None:
    place = place_of(traced, (3,))
    traced.tensors[place].copy_(before[place])


def test_a_parameter_that_a_program_forgets_is_noticed() -> None:
    [reason] = proven(train_step("eager"), batches(3), forget_last_bias)
    assert "shape [3] stays as it is" in reason


def test_a_metric_of_the_users_does_not_hide_behind_accuracy() -> None:
    def spread(_loss: Tensor, predictions: Tensor | None, _targets: Tensor | None) -> Tensor:
        assert predictions is not None
        return predictions.std()

    def spoil(traced: TracedStep, _: list[Tensor]) -> None:
        traced.tensors[traced.kinds.index("metrics")][FIRST_USER_TOTAL] += 0.4

    step = train_step("eager", metrics={"spread": spread})
    [reason] = proven(step, batches(3), spoil)
    assert "metrics" in reason
    assert proven(train_step("eager", metrics={"spread": spread}), batches(3)) == []


class Running(nn.Module):
    """Keeps a running mean in a buffer that it assigns anew."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        return self.layer(x - self.mean)


def running_step() -> TrainStep:
    torch.manual_seed(3)
    model = Running()
    return TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), loss=F.cross_entropy, engine="eager")


def test_a_buffer_that_is_assigned_anew_is_taken_up() -> None:
    ours, data = running_step(), batches(6)
    assert proven(ours, data) == []
    torch.testing.assert_close(everything(ours)["model"], everything(by_eager(running_step(), data))["model"])


def scaling_step() -> TrainStep:
    def forward(model: nn.Module, batch: Batch) -> Tensor:
        batch[0].mul_(0.1)
        return F.cross_entropy(model(batch[0]), batch[1])

    torch.manual_seed(3)
    model = nn.Linear(6, 3)
    return TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), forward, engine="eager")


def test_a_batch_that_forward_changes_is_changed_once() -> None:
    ours = scaling_step()
    assert proven(ours, batches(5)) == []
    torch.testing.assert_close(everything(ours)["model"], everything(by_eager(scaling_step(), batches(5)))["model"])


@pytest.mark.parametrize("change", [lambda loss: loss + 0.01, lambda loss: loss * float("nan")])
def test_another_loss_is_noticed(change: Callable[[Tensor], Tensor]) -> None:
    class Wrong(Recorded):
        def run(self, inputs: list[Tensor]) -> Tensor:
            return change(super().run(inputs))

    [reason] = proven(train_step("eager"), batches(3), kind=Wrong)
    assert "loss" in reason
