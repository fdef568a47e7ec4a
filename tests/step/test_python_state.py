"""What a graph cannot hold of Python: what forward keeps on modules, and what it decides by an open size."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttrain.data.ragged import Ragged
from fasttrain.errors import EngineError
from fasttrain.step.eager import EagerEngine
from fasttrain.step.trace import Mismatch, trace_step
from tests.step.agreement import run_graph
from tests.step.models import ASKED, CASES, OPTIMIZERS, Case, assert_same, batches, started, with_forward

pytestmark = pytest.mark.usefixtures("in_double")

MLP, SGD = CASES["mlp"], OPTIMIZERS["sgd-momentum"]


class Keeping(nn.Module):
    """Keeps its last state as a plain attribute, not as a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.last = torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.fc(x) + self.last)
        self.last = hidden.detach().mean(0)
        return hidden


class Collecting(nn.Module):
    """Keeps its activations in a dict, and counts in a number."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.seen: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc(x)
        self.seen["fc"] = hidden.detach()
        return hidden


class Counting(nn.Module):
    """Counts its batches in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.fc(x) / self.count


class KeepingLoss(nn.CrossEntropyLoss):
    """Keeps the last loss on itself."""

    last: Any = None

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        loss = super().forward(input, target)
        self.last = loss.detach()
        return loss


def with_a_child_named_loss() -> nn.Module:
    return nn.Sequential(OrderedDict(fc=nn.Linear(4, 4), loss=Keeping()))


KEEPERS: dict[str, tuple[Callable[[], Case], str]] = {
    "a tensor": (lambda: Case(lambda: nn.Sequential(Keeping()), MLP.inputs, MLP.targets, MLP.loss), "'0.last'"),
    "a dict": (lambda: Case(Collecting, MLP.inputs, MLP.targets, MLP.loss), "'seen'"),
    "a number": (lambda: Case(Counting, MLP.inputs, MLP.targets, MLP.loss), "'count'"),
    "the loss": (lambda: Case(MLP.build, MLP.inputs, MLP.targets, KeepingLoss()), "'loss.last'"),
    "two of one name": (
        lambda: Case(with_a_child_named_loss, MLP.inputs, MLP.targets, nn.CrossEntropyLoss()),
        "'loss.last'",
    ),
}


@pytest.mark.parametrize("what", KEEPERS)
def test_what_forward_keeps_on_a_module_is_refused_and_training_goes_on_as_before(what: str) -> None:
    build, name = KEEPERS[what]
    (spec, batch), (untraced, _) = started(build(), SGD), started(build(), SGD)
    with pytest.raises(EngineError, match=f"forward changes {name}"):
        trace_step(spec, batch)
    for each in (spec, untraced):
        eager = EagerEngine(each, ASKED)
        for later in batches(build(), 3):
            assert type(eager.step(later)) is Tensor
    assert_same(spec, untraced, rtol=0)


def collecting_hook() -> tuple[Callable[[nn.Module], Any], dict[str, Tensor]]:
    found: dict[str, Tensor] = {}
    return lambda model: model.register_forward_hook(lambda _m, _i, output: found.update(fc=output.detach())), found


def test_a_hook_that_collects_is_refused_and_what_it_has_collected_stays() -> None:
    register, found = collecting_hook()
    spec, batch = started(MLP, SGD)
    register(spec.model)
    EagerEngine(spec, ASKED).step(batch)
    before = found["fc"]
    with pytest.raises(EngineError, match="forward changes 'found'"):
        trace_step(spec, batch)
    assert found["fc"] is before


def test_a_number_that_forward_counts_outside_is_refused_and_stays() -> None:
    count = 0

    def forward(model: nn.Module, batch: Any) -> Tensor:
        nonlocal count
        count += 1
        return MLP.loss(model(batch[0]), batch[1])

    spec, batch = started(MLP, SGD)
    with pytest.raises(EngineError, match="forward changes 'count'"):
        trace_step(with_forward(spec, forward), batch)
    assert count == 0


@pytest.mark.parametrize("is_view", [False, True])
def test_a_tensor_that_forward_changes_must_be_a_buffer(is_view: bool) -> None:
    mean = torch.zeros(2, 3)

    def forward(model: nn.Module, batch: Any) -> Tensor:
        output = model(batch[0])
        held = mean[1] if is_view else mean
        held.lerp_(output.detach().mean(0), 0.1)
        return MLP.loss(output + mean.mean(0), batch[1])

    spec, batch = started(MLP, SGD)
    with pytest.raises(EngineError, match=r"changes a tensor of shape \[2, 3\] that is no buffer"):
        trace_step(with_forward(spec, forward), batch)
    assert not mean.any()


def test_a_trace_leaves_the_weights_that_a_recurrent_layer_lists() -> None:
    spec, batch = started(CASES["lstm"], SGD)
    cell: Any = spec.model.get_submodule("cell")
    before = list(cell._flat_weights)
    trace_step(spec, batch)
    assert all(a is b for a, b in zip(cell._flat_weights, before, strict=True))


RAGGED = CASES["sparse"]


def rows_of(count: int) -> tuple[Ragged, Tensor]:
    offsets = torch.linspace(0, count, 6).long()
    return Ragged(torch.arange(count, dtype=torch.int32) % 9, offsets), torch.ones(5, dtype=torch.int64)


DECIDED: dict[str, Callable[[Tensor, int], Tensor]] = {
    "a float": lambda loss, count: loss / float(count),
    "a root": lambda loss, count: loss / math.sqrt(count),
    "a branch": lambda loss, count: loss if count > 9 else loss.sqrt(),
    "a loop": lambda loss, count: loss + sum(range(count)),
}


@pytest.mark.parametrize("how", DECIDED)
def test_what_python_decides_by_the_number_of_values_is_refused(how: str) -> None:
    spec, batch = started(RAGGED, SGD)
    decide = DECIDED[how]
    spec = with_forward(spec, lambda model, batch: decide(model(batch[0]).square().sum(), batch[0].values.shape[0]))
    with pytest.raises(EngineError, match="decided by the number of values"):
        trace_step(spec, batch)


def test_what_operators_compute_of_the_number_of_values_holds_for_any() -> None:
    spec, _ = started(RAGGED, SGD)
    spec = with_forward(spec, lambda model, batch: model(batch[0]).square().sum() / batch[0].values.shape[0])
    traced = trace_step(spec, rows_of(20))
    for count in (20, 2, 33):
        batch = rows_of(count)
        wanted = spec.forward(spec.model, batch).loss.detach()
        torch.testing.assert_close(run_graph(traced, batch), wanted)


def test_fewer_than_two_values_are_for_eager() -> None:
    spec, batch = started(RAGGED, SGD)
    traced = trace_step(spec, batch)
    for count in (0, 1):
        mismatch = traced.inputs(rows_of(count))
        assert isinstance(mismatch, Mismatch)
        assert "fewer than two" in mismatch.reason
        with pytest.raises(EngineError, match="fewer than two"):
            trace_step(spec, rows_of(count))
    assert not isinstance(traced.inputs(rows_of(2)), Mismatch)
