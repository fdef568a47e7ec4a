"""The fp64 step of a captured graph, and the looser rule: without fp64, or for the same steps run in two ways."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.step import verify as module
from fasttrain.step.state import Snapshot
from fasttrain.step.verify import Verification, agree
from tests.step.models import CPU, Case, indices, numbers
from tests.step.test_verify import (
    ADAMW,
    CLASSIFIER,
    COUNTING,
    EMBEDDED,
    INEXACT,
    SGD,
    Bench,
    Run,
    Spoil,
    adamw,
)


class Drawing(nn.Module):
    """Draws random numbers in every way that torch has."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 32), nn.Linear(32, 10)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.draw(self.first(x)))


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.4),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.4, training=True),
    "feature_dropout": lambda x: F.dropout1d(x.unsqueeze(0), 0.4).squeeze(0),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "gumbel": lambda x: F.gumbel_softmax(x),
    "rand": lambda x: x * torch.rand(32),
    "rand_like": lambda x: x * torch.rand_like(x),
    "randn": lambda x: x + torch.randn(x.shape),
    "randn_like": lambda x: x + torch.randn_like(x),
    "normal": lambda x: torch.normal(x, 1.0),
    "bernoulli": lambda x: x * torch.bernoulli(x.detach().sigmoid()),
    "uniform_": lambda x: x * torch.empty_like(x).uniform_(),
    "exponential_": lambda x: x + torch.empty_like(x).exponential_(),
    "poisson": lambda x: x + torch.poisson(x.detach().exp()),
    "multinomial": lambda x: x[:, torch.multinomial(torch.ones(32), 32)],
    "randint": lambda x: x[:, torch.randint(0, 32, (32,))],
    "randperm": lambda x: x[:, torch.randperm(32)],
}


def graph_sides(bench: Bench) -> Any:
    """The captured graph's step in single precision and in double."""
    part, tensors = bench.traced.parts[bench.traced.due], bench.traced.tensors
    given = module._Given(part, bench.inputs(), len(tensors))
    before = Snapshot.of(tensors, CPU, bench.spec)
    return module._graph_sides(part, given, before, bench.spec.with_gradients(), tensors, CPU)


@pytest.mark.parametrize("name", DRAWS)
def test_random_numbers_are_the_same_in_double_precision(name: str) -> None:
    case = Case(lambda: Drawing(DRAWS[name]), numbers(128, 64), indices(10, 128), F.cross_entropy)
    bench = Bench(case, SGD)
    by_graph, exact = graph_sides(bench)
    torch.testing.assert_close(by_graph.loss.double(), exact.loss, rtol=1e-6, atol=0)
    for mine, right, kind in zip(by_graph.tensors, exact.tensors, bench.traced.kinds, strict=False):
        assert right.dtype == torch.float64
        if kind in ("parameters", "momentum_buffer"):
            assert not torch.equal(mine.double(), right)
            torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-6)
    assert bench.verify(bench.graph).difference is None
    spoiled = bench.spoiled("last.weight", lambda tensor: tensor.add_(1e-5))
    found = bench.verify(spoiled)
    assert (found.difference is not None, found.rule) == (True, "fp64")


def test_forward_may_make_single_precision_itself() -> None:
    """Of whole numbers; `.float()` makes double precision in the fp64 step, which is exact."""
    bench = Bench(COUNTING, adamw(weight_decay=1e-3))
    found = bench.verify(bench.with_options(weight_decay=0))
    assert (found.difference is not None, found.rule) == (True, "fp64")
    by_graph, exact = graph_sides(bench)
    inputs, targets = bench.batch
    wanted = F.cross_entropy(bench.spec.model.double().layers(inputs.double() / 3 - 1.5), targets)  # pyright: ignore
    torch.testing.assert_close(exact.loss, wanted, rtol=1e-14, atol=0)
    assert not torch.equal(by_graph.loss.double(), exact.loss)


def test_what_overflows_in_single_precision_is_compared_there() -> None:
    class Overflowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)
            self.register_buffer("top", torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            self.top.copy_((x.detach().abs().amax(0) * 100).exp())
            return self.layer(x)

    bench = Bench(Case(Overflowing, numbers(32, 6), indices(3, 32), F.cross_entropy), SGD)
    found = bench.verify(bench.spoiled("layer.weight", lambda tensor: tensor.add_(1e-4)))
    assert found.difference is not None
    assert found.difference.startswith("parameters: ")
    by_graph, exact = graph_sides(bench)
    place = bench.traced.kinds.index("buffers")
    assert by_graph.tensors[place].isinf().any()
    assert torch.equal(by_graph.tensors[place].isinf(), exact.tensors[place].isinf())


@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("case", [CLASSIFIER, INEXACT], ids=["", "inexact"])
def test_accumulated_steps_are_judged_by_fp64_too(case: Case, is_last: bool) -> None:
    bench = Bench(case, SGD, steps=3 if is_last else 2, accumulate=2)
    assert bench.traced.due == is_last
    name = "2.weight" if case is CLASSIFIER else "3.weight"
    tensor = name if is_last else f"grad of {name}"
    assert bench.verify(bench.graph).rule == "equal precision"
    found = bench.verify(bench.exact)
    assert found.difference is None
    assert found.rule == ("fp64" if case is INEXACT else "equal precision")
    for spoil in (lambda t: t.mul_(1.01), lambda t: t[0].zero_()):
        found = bench.verify(bench.spoiled(tensor, spoil))
        assert found.difference is not None
        assert found.difference.startswith("parameters: " if is_last else "gradients: ")
        assert found.rule == "fp64"


def test_a_gradient_that_is_garbage_where_it_should_be_zero_is_refused() -> None:
    bench = Bench(EMBEDDED, SGD, steps=2, accumulate=2)
    unused = next(row for row in range(1000) if not (bench.batch[0] == row).any())
    found = bench.verify(bench.spoiled("grad of 0.weight", lambda gradient: gradient[unused].add_(1e-3)))
    assert found.difference is not None
    assert "gradients: a tensor of shape [1000, 8] changes otherwise" in found.difference


# Where fp64 cannot judge.


class Through(nn.Module):
    """With something between two layers that has no fp64 step to compare with."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 32), nn.Linear(32, 10)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.change(self.first(x)))


LOOSER: dict[str, Callable[[Tensor], Tensor]] = {
    "the step computes in bfloat16": lambda x: x.bfloat16().float(),
    "the step computes in float16": lambda x: x.half().float(),
    "there is no fp64 step: RuntimeError: the step reads numbers as the bits": lambda x: (
        x * (x.detach().view(torch.int32) % 2)
    ),
    "the captured graph itself is too far from its fp64 step": lambda x: x + (x.detach() * 1e7).frac(),
}


@pytest.mark.parametrize("reason", LOOSER)
def test_the_looser_rule_says_why(reason: str) -> None:
    bench = Bench(Case(lambda: Through(LOOSER[reason]), numbers(128, 64), indices(10, 128), F.cross_entropy), SGD)
    slightly = bench.verify(bench.spoiled("last.weight", lambda tensor: tensor.add_(1e-6)))
    assert slightly.difference is None
    assert slightly.rule.startswith(f"looser: {reason}")
    wrong = bench.verify(bench.spoiled("last.weight", lambda tensor: tensor.add_(0.1)))
    assert wrong.difference is not None
    assert wrong.difference.startswith("parameters: 320 of ")
    assert bench.verify(lambda batch: bench.graph(batch) * 1.1).difference is not None


def test_without_memory_for_fp64_the_rule_is_looser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fits_in_memory", lambda *_: False)
    bench = Bench(CLASSIFIER, ADAMW)
    assert bench.verify(bench.graph).rule == "equal precision"
    found = bench.verify(bench.with_options(weight_decay=0))
    assert found.difference is None
    assert found.rule == "looser: copies of the step's state in fp64 do not fit in memory"
    assert bench.verify(bench.with_options(lr=1.5)).difference is not None


def test_autocast_takes_the_looser_rule() -> None:
    bench = Bench(CLASSIFIER, ADAMW, precision="bf16")
    found = bench.verify(bench.graph)
    assert (found.difference, found.rule) == (None, "looser: the step computes in bfloat16")
    assert bench.verify(bench.with_options(lr=2.0)).difference is not None


# Two ways of running the same steps, and the state by hand.


class Toy:
    """A step by hand: parameters and a buffer that change, a mask that does not, a moment, a count, totals."""

    kinds = ("parameters", "buffers", "buffers", "buffers", "exp_avg", "metrics")

    def __init__(self) -> None:
        self.tensors = {
            "weight": torch.linspace(-1.0, 1.0, 200),
            "mask": torch.tensor([0.0, -math.inf]),
            "mean": torch.tensor([0.5, 2.0]),
            "batches": torch.tensor(1_000_000),
            "moment": torch.zeros(200),
            "totals": torch.tensor([40.0, 20.0, 50.0, 0.0, 4000.0], dtype=torch.float64),
        }

    def step(self, batch: Tensor) -> Tensor:
        self.tensors["moment"].mul_(0.9).add_(torch.linspace(1.0, 2.0, 200), alpha=0.1)
        self.tensors["weight"].sub_(self.tensors["moment"], alpha=0.01)
        self.tensors["mean"].mul_(0.9).add_(0.1)
        self.tensors["batches"].add_(1)
        self.tensors["totals"].add_(torch.tensor([0.7, 0.5, 1.0, 0.0, 60.0], dtype=torch.float64))
        return 0.7 * batch

    def agree(self, program: Run) -> Verification:
        graph = torch.fx.symbolic_trace(nn.Identity())
        traced: Any = SimpleNamespace(
            spec=SimpleNamespace(device=CPU),
            tensors=list(self.tensors.values()),
            kinds=self.kinds,
            parts=[SimpleNamespace(graph=graph)],
        )
        return agree(traced, torch.tensor(1.0), self.step, program)

    def spoiled(self, name: str, spoil: Spoil, loss: float = 1.0) -> Run:
        def program(batch: Tensor) -> Tensor:
            right = self.step(batch)
            spoil(self.tensors[name])
            return right * loss

        return program


def test_the_same_numbers_agree_and_the_state_is_the_references() -> None:
    toy, alone = Toy(), Toy()
    found = toy.agree(toy.step)
    assert found.difference is None
    assert found.rule.startswith("looser: ")
    assert torch.equal(found.loss, alone.step(torch.tensor(1.0)))
    torch.testing.assert_close(toy.tensors, alone.tensors, rtol=0, atol=0)


DISAGREEMENTS: list[tuple[str, Spoil, str]] = [
    ("weight", lambda t: t.add_(0.001), "parameters: "),
    ("weight", lambda t: t[:3].add_(0.001), "parameters: 3 of 200"),
    ("weight", lambda t: t[0].fill_(math.nan), "parameters: "),
    ("weight", lambda t: t[0].add_(1.0), "parameters: "),
    ("mask", lambda t: t[0].fill_(-math.inf), "buffers: 1 of 4"),
    ("mask", lambda t: t[1].fill_(math.inf), "buffers: 1 of 4"),
    ("mask", lambda t: t[1].fill_(0.0), "buffers: 1 of 4"),
    ("mean", lambda t: t.add_(0.01), "buffers: 2 of 4"),
    ("batches", lambda t: t.sub_(1), "buffers: 1 of 1"),
    ("batches", lambda t: t.add_(1), "buffers: 1 of 1"),
    ("moment", lambda t: t.mul_(1.01), "exp_avg: "),
    ("moment", lambda t: t[7].mul_(1.01), "exp_avg: 1 of 200"),
    ("totals", lambda t: t[4].sub_(60.0), "metrics: the total of the user's metrics"),
    ("totals", lambda t: t[0].sub_(0.7), "metrics: the total of the loss"),
]


@pytest.mark.parametrize(("name", "spoil", "reason"), DISAGREEMENTS)
def test_a_disagreement_is_seen_and_the_references_state_stays(name: str, spoil: Spoil, reason: str) -> None:
    toy, alone = Toy(), Toy()
    found = toy.agree(toy.spoiled(name, spoil))
    assert found.difference is not None
    assert found.difference.startswith(reason)
    assert torch.equal(found.loss, alone.step(torch.tensor(1.0)))
    torch.testing.assert_close(toy.tensors, alone.tensors, rtol=0, atol=0)


AGREEMENTS: list[tuple[str, Spoil]] = [
    ("weight", lambda t: t.mul_(1 + 1e-6)),
    ("weight", lambda t: t[:2].add_(0.002)),  # noise where the gradient is zero, in a hundredth of the entries
    ("mean", lambda t: t.mul_(1 + 1e-6)),
    ("moment", lambda t: t.mul_(1 + 1e-5)),
    ("totals", lambda t: t[0].add_(1e-5)),
    ("totals", lambda t: t[1].add_(1 / 128)),
]


@pytest.mark.parametrize(("name", "spoil"), AGREEMENTS)
def test_rounding_agrees(name: str, spoil: Spoil) -> None:
    toy = Toy()
    assert toy.agree(toy.spoiled(name, spoil, loss=1 + 1e-6)).difference is None


def test_what_cannot_run_leaves_the_references_step() -> None:
    toy, alone = Toy(), Toy()

    def fails(batch: Tensor) -> Tensor:
        toy.tensors["weight"].zero_()
        torch.rand(1)
        raise RuntimeError("could not create a primitive")

    before = torch.get_rng_state()
    found = toy.agree(fails)
    assert found.difference == "it cannot run: could not create a primitive"
    assert torch.equal(found.loss, alone.step(torch.tensor(1.0)))
    torch.testing.assert_close(toy.tensors, alone.tensors, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before)
