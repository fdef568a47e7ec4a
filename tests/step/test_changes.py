"""Each tensor's own change: a program that forgets a part of the optimizer is refused, other rounding is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn, optim

from fasttrain.step.apart import is_eagers_rounding
from fasttrain.step.changes import NOISE_SHARE, gradients_seen, other_change
from fasttrain.step.eager import EagerEngine
from fasttrain.step.parity import compare_steps
from fasttrain.step.spec import StepSpec
from fasttrain.step.state import PARAMETERS
from fasttrain.step.trace import Mismatch, trace_step
from tests.step.models import ASKED, CASES, CPU, OPTIMIZERS, Case, batches, indices, make, numbers

Run = Callable[[Any], Tensor]


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def behind_a_bias() -> nn.Module:
    """The first layer's bias has no gradient but rounding."""
    return nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


class Counting(nn.Module):
    """Is given whole numbers, as the textbook's batches may be."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = classifier()

    def forward(self, counts: Tensor) -> Tensor:
        return self.layers(counts.float() - torch.tensor(1.5))


CLASSIFIER = Case(classifier, numbers(128, 64), indices(10, 128), F.cross_entropy)
COUNTING = Case(Counting, indices(4, 128, 64), indices(10, 128), F.cross_entropy)
BEHIND_A_BIAS = Case(behind_a_bias, numbers(64, 16), indices(3, 64), F.cross_entropy)

ADAMW = (optim.AdamW, {"lr": 1e-3, "weight_decay": 1e-2})
SGD = (optim.SGD, {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-3})


class Bench:
    """A step after three eager ones, and its next batch."""

    def __init__(self, case: Case, optimizer: tuple[type[optim.Optimizer], dict[str, Any]]) -> None:
        *first, self.batch = batches(case, 4)
        self.spec = make(case, optimizer)
        self.eager = EagerEngine(self.spec, ASKED)
        for batch in first:
            self.eager.step(batch)
        self.traced = trace_step(self.spec, self.batch)

    def difference(self, program: Run, is_excused: Callable[..., bool | None] | None = None) -> str | None:
        """Between a program and eager; an excuse for it is looked for in what is exact."""
        traced = self.traced
        apart = is_excused or partial(is_eagers_rounding, traced, program, self.batch)
        _, found = compare_steps(
            traced.tensors, traced.kinds, CPU, self.eager.step, program, self.batch, self.spec, apart
        )
        return found

    def exact(self, batch: Any) -> Tensor:
        """The recorded step in double precision, rounded at its end: as far from eager as a program may be."""
        inputs = self.traced.inputs(batch)
        assert not isinstance(inputs, Mismatch)
        doubled = [each.double() if each.dtype == torch.float32 else each for each in inputs]
        loss = self.traced.run(doubled)
        with torch.no_grad():
            for tensor, result in zip(inputs, doubled, strict=True):
                tensor.copy_(result)
        return loss.float()

    def with_options(self, **options: Any) -> Run:
        """A program that was made for other options of the optimizer."""

        def program(batch: Any) -> Tensor:
            with changed(self.spec, options):
                traced = trace_step(self.spec, batch)
                inputs = traced.inputs(batch)
                assert not isinstance(inputs, Mismatch)
                return traced.run(inputs)

        return program


@contextmanager
def changed(spec: StepSpec, options: dict[str, Any]) -> Iterator[None]:
    """The optimizer with other options; a rate is multiplied."""
    before = [dict(group) for group in spec.optimizer.param_groups]
    for group in spec.optimizer.param_groups:
        group.update(options, lr=group["lr"] * options.get("lr", 1.0))
    yield
    for group, old in zip(spec.optimizer.param_groups, before, strict=True):
        group.update(old)


def adamw(**options: Any) -> tuple[type[optim.Optimizer], dict[str, Any]]:
    return optim.AdamW, {**ADAMW[1], **options}


def sgd(**options: Any) -> tuple[type[optim.Optimizer], dict[str, Any]]:
    return optim.SGD, {**SGD[1], **options}


WRONG = {
    "adamw without its weight decay": (ADAMW, {"weight_decay": 0}),
    "adamw without a small weight decay": (adamw(weight_decay=1e-3), {"weight_decay": 0}),
    "adam without a small weight decay": ((optim.Adam, {"lr": 1e-3, "weight_decay": 1e-3}), {"weight_decay": 0}),
    "sgd without a small weight decay": (SGD, {"weight_decay": 0}),
    "plain sgd without a small weight decay": (sgd(momentum=0), {"weight_decay": 0}),
    "rmsprop without a small weight decay": ((optim.RMSprop, {"lr": 1e-3, "weight_decay": 1e-3}), {"weight_decay": 0}),
    "sgd without momentum": (SGD, {"momentum": 0}),
    "sgd with another momentum": (SGD, {"momentum": 0.899}),
    "sgd without nesterov": (sgd(nesterov=True), {"nesterov": False}),
    "adam's first beta": (ADAMW, {"betas": (0.899, 0.999)}),
    "adam's second beta": (ADAMW, {"betas": (0.9, 0.9989)}),
    "adam's eps": (ADAMW, {"eps": 1e-6}),
    "adam's rate": (ADAMW, {"lr": 1.01}),
    "adam's rate, by a thousandth": (ADAMW, {"lr": 1.001}),
    "sgd's rate": (SGD, {"lr": 1.01}),
    "sgd's rate, by a thousandth": (SGD, {"lr": 0.999}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_program_without_a_part_of_the_optimizer_is_refused(name: str) -> None:
    optimizer, options = WRONG[name]
    bench = Bench(CLASSIFIER, optimizer)
    assert bench.difference(bench.with_options()) is None
    assert bench.difference(bench.with_options(**options)) is not None


def test_forward_may_make_single_precision_itself() -> None:
    bench = Bench(COUNTING, adamw(weight_decay=1e-3))
    assert bench.difference(bench.with_options(weight_decay=0)) is not None


def test_the_reason_names_the_tensor_and_how_much_is_lost() -> None:
    bench = Bench(CLASSIFIER, ADAMW)
    reason = bench.difference(bench.with_options(weight_decay=0))
    assert reason is not None
    assert reason.startswith("parameters: a tensor of shape [32, 64] changes otherwise: ")
    assert "of 2048 entries" in reason


@pytest.mark.parametrize(("excuse", "passes"), [(True, True), (None, True), (False, False)])
def test_where_it_cannot_be_told_apart_the_rules_for_kinds_decide(excuse: bool | None, passes: bool) -> None:
    bench = Bench(CLASSIFIER, adamw(weight_decay=1e-3))
    assert (bench.difference(bench.with_options(weight_decay=0), lambda *_: excuse) is None) == passes
    assert (bench.difference(bench.with_options(lr=1.5), lambda *_: excuse) is None) == (excuse is True)


def test_what_single_precision_does_not_hold_is_not_seen() -> None:
    """A decay by 1e-7 in a step is less than the spacing of single precision, 1.2e-7."""
    bench = Bench(CLASSIFIER, adamw(lr=1e-4, weight_decay=1e-3))
    assert bench.difference(bench.with_options(weight_decay=0)) is None


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", [CASES["transformer"], BEHIND_A_BIAS], ids=["bias of keys", "bias and batch norm"])
def test_other_rounding_passes(optimizer: str, case: Case) -> None:
    """Even where gradients are zero but for rounding, of which many optimizers make whole steps."""
    bench = Bench(case, OPTIMIZERS[optimizer])
    assert bench.difference(bench.exact) is None


def test_gradients_are_noted_and_nothing_is_left() -> None:
    bench = Bench(CLASSIFIER, ADAMW)
    parameters = list(bench.spec.model.parameters())
    weight = parameters[0]
    state = bench.spec.optimizer.state[weight]
    tensors = [weight, state["exp_avg"], state["step"], bench.spec.metrics.totals]
    wanted = torch.autograd.grad(F.cross_entropy(bench.spec.model(bench.batch[0]), bench.batch[1]), weight)[0]
    with gradients_seen(bench.spec, tensors) as seen:
        bench.eager.step(bench.batch)
    assert seen[0] is seen[1]
    assert seen[2:] == [None, None]
    torch.testing.assert_close(seen[0], wanted)
    assert weight.grad is None
    seen.clear()
    with gradients_seen(bench.spec, tensors) as other:
        pass
    bench.eager.step(bench.batch)
    assert other == [None] * 4


def test_an_optimizer_without_state_is_left_without() -> None:
    bench = Bench(CLASSIFIER, (optim.SGD, {"lr": 0.1}))
    before = len(bench.spec.optimizer.state)
    bench.difference(bench.eager.step)
    assert len(bench.spec.optimizer.state) == before


WEIGHT, STEP = torch.linspace(0.5, 1.0, 200), torch.full((200,), 1e-3)


def judged(got: Tensor, gradient: Tensor, wanted: Tensor | None = None) -> str | None:
    """Of two parameters that eager changes by a thousandth; the program is right about the second."""
    right = WEIGHT + STEP
    return other_change(
        [WEIGHT, WEIGHT],
        [got, right],
        [right if wanted is None else wanted, right],
        [PARAMETERS] * 2,
        [gradient, torch.ones(200)],
        [0.0, 0.0],
    )


@given(count=st.integers(0, 200), share=st.floats(1e-3, 2.0))
@settings(deadline=None)
def test_more_than_a_hundredth_of_the_entries_must_agree(count: int, share: float) -> None:
    got = WEIGHT + STEP
    got[:count] += share * STEP[:count]
    assert (judged(got, torch.ones(200)) is None) == (count <= NOISE_SHARE * 200)


@pytest.mark.parametrize(("size", "passes"), [(1.0, False), (0.01, False), (1e-3, True), (1e-6, True), (0.0, True)])
def test_the_smaller_a_gradient_the_less_certain_is_its_change(size: float, passes: bool) -> None:
    assert (judged(WEIGHT + 1.002 * STEP, torch.full((200,), size)) is None) == passes


@pytest.mark.parametrize("value", [3e-3, torch.inf, torch.nan])
def test_no_entry_is_too_uncertain_for_a_limit(value: float) -> None:
    got = WEIGHT + STEP
    got[7] += value
    assert judged(got, torch.zeros(200)) is not None


def test_what_is_no_number_in_both_is_the_same() -> None:
    broken = torch.full((200,), torch.nan)
    assert judged(broken, broken, broken) is None
    assert judged(WEIGHT + STEP, broken) is None
    assert judged(WEIGHT + 2 * STEP, broken, broken) is not None
