"""Accumulated gradients as graphs: one that gathers, one that ends a group; and eager steps in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fasttrain.step.eager import EagerEngine
from fasttrain.step.trace import Mismatch, trace_step
from tests.step.agreement import assert_same_gradients, both, run_graph, steps_agree
from tests.step.models import ASKED, CASES, OPTIMIZERS, assert_same, batches

pytestmark = pytest.mark.usefixtures("in_double")

MLP, ADAM, SGD = CASES["mlp"], OPTIMIZERS["adam"], OPTIMIZERS["sgd-momentum"]


@pytest.mark.parametrize("accumulate", [2, 3, 32])
@pytest.mark.parametrize("model", ["mlp", "sparse", "dropout", "frozen", "unused", "transformer"])
def test_the_graphs_give_eagers_numbers(model: str, accumulate: int) -> None:
    """Of 20 steps, the last group is left unfinished: its gradients are in `grad`."""
    traced = steps_agree(CASES[model], ADAM, accumulate=accumulate)
    assert [part.part for part in traced.parts] == ["gather", "last"]


@pytest.mark.parametrize("optimizer", ["sgd-momentum", "radam", "adagrad"])
def test_other_optimizers_and_clipping(optimizer: str) -> None:
    steps_agree(MLP, OPTIMIZERS[optimizer], accumulate=3, clip_norm=0.05, clip_value=0.02)


@pytest.mark.parametrize("num_steps", [4, 5, 6])
def test_a_short_last_group_steps_with_what_it_has(num_steps: int) -> None:
    specs = both(MLP, SGD, accumulate=3)
    spec, eager_spec = specs
    traced, eager = trace_step(spec, batches(MLP, 1)[0]), EagerEngine(eager_spec, ASKED)
    for batch in batches(MLP, num_steps):
        run_graph(traced, batch)
        eager.step(batch)
    EagerEngine(spec, ASKED).flush()
    eager.flush()
    assert_same(spec, eager_spec)
    assert_same_gradients(spec, eager_spec)
    assert all(parameter.grad is None for parameter in spec.model.parameters())


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_norm_counts_parameters_that_the_optimizer_does_not_have(accumulate: int) -> None:
    specs = both(MLP, SGD, accumulate=accumulate, clip_norm=0.05)
    for each in specs:
        kept = each.optimizer.param_groups[1]["params"]
        each.optimizer.param_groups[1]["params"] = kept[-1:]
        for parameter in kept[:-1]:
            del each.optimizer.state[parameter]
    spec, eager_spec = specs
    data = batches(MLP, 8)
    traced, eager = trace_step(spec, data[0]), EagerEngine(eager_spec, ASKED)
    assert len(traced.parts[0].reached) == len(list(spec.model.parameters())) > len(list(spec.trained()))
    for batch in data:
        run_graph(traced, batch)
        eager.step(batch)
        assert_same_gradients(spec, eager_spec)
    assert_same(spec, eager_spec)


@pytest.mark.parametrize("by_graph", ["0100", "1011", "0010", "1101"])
def test_a_group_may_be_shared_by_graph_and_eager_steps(by_graph: str) -> None:
    spec, eager_spec = both(MLP, ADAM, accumulate=4)
    traced, starter, eager = (
        trace_step(spec, batches(MLP, 1)[0]),
        EagerEngine(spec, ASKED),
        EagerEngine(eager_spec, ASKED),
    )
    for number, batch in enumerate(batches(MLP, 12)):
        eager.step(batch)
        traced.inputs(batch)  # looking whether it holds binds to nothing
        if by_graph[number % 4] == "1":
            run_graph(traced, batch)
        else:
            starter.step(batch)
    assert_same(spec, eager_spec)


def drop_gradients(spec: Any) -> None:
    spec.optimizer.zero_grad()


def give_others(spec: Any) -> None:
    for parameter in spec.trained():
        parameter.grad = torch.ones_like(parameter)


def give_some(spec: Any) -> None:
    next(spec.trained()).grad = torch.ones(5, 4)


@pytest.mark.parametrize(
    ("gathered", "change", "is_noticed"),
    [
        (0, give_others, True),  # eager would add to them
        (0, give_some, True),
        (1, drop_gradients, True),
        (1, give_others, False),  # they are the user's own, and are added to as eager does
        (2, drop_gradients, True),
        (2, give_others, False),
    ],
)
def test_gradients_are_the_users_own(gathered: int, change: Any, is_noticed: bool) -> None:
    specs = both(MLP, ADAM, accumulate=3)
    spec, eager_spec = specs
    traced, eager = trace_step(spec, batches(MLP, 1)[0]), EagerEngine(eager_spec, ASKED)
    data = batches(MLP, 6)
    for batch in data[:gathered]:
        run_graph(traced, batch)
        eager.step(batch)
    for each in specs:
        change(each)
    assert isinstance(traced.inputs(data[gathered]), Mismatch) == is_noticed
    step = EagerEngine(spec, ASKED).step if is_noticed else lambda batch: run_graph(traced, batch)
    step(data[gathered])
    eager.step(data[gathered])
    assert_same(spec, eager_spec)
    assert_same_gradients(spec, eager_spec)


@pytest.mark.parametrize("gathered", [0, 1])
def test_a_gradient_where_the_graph_makes_none_is_noticed(gathered: int) -> None:
    spec, _ = both(CASES["unused"], ADAM, accumulate=3)
    data = batches(CASES["unused"], 2)
    traced = trace_step(spec, data[0])
    for batch in data[:gathered]:
        run_graph(traced, batch)
    unused = list(spec.model.parameters())[-1]
    assert unused.grad is None
    unused.grad = torch.ones_like(unused)
    assert isinstance(traced.inputs(data[1]), Mismatch), "eager would step it"


def test_looking_whether_a_graph_holds_changes_nothing() -> None:
    spec, eager_spec = both(MLP, ADAM, accumulate=2)
    traced, starter, eager = (
        trace_step(spec, batches(MLP, 1)[0]),
        EagerEngine(spec, ASKED),
        EagerEngine(eager_spec, ASKED),
    )
    for batch in batches(MLP, 5):
        traced.inputs(batch)
        assert spec.gathered == eager_spec.gathered
        starter.step(batch)
        eager.step(batch)
        traced.inputs(batch)
        assert_same_gradients(spec, eager_spec)


def test_a_hook_on_a_gradient_is_still_refused() -> None:
    spec, _ = both(MLP, ADAM, accumulate=2)
    assert isinstance(spec.model, nn.Module)
    next(spec.model.parameters()).register_hook(lambda gradient: gradient * 2)
    with pytest.raises(Exception, match="gradient hooks"):
        trace_step(spec, batches(MLP, 1)[0])
