"""Verification: a program with other numbers is refused, other rounding passes, and comparing leaves no trace."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from fasttrain.metrics import FIRST_USER_TOTAL, RunningMetrics
from fasttrain.step import verify as module
from fasttrain.step.eager import EagerEngine
from fasttrain.step.spec import StepSpec, normalise_forward
from fasttrain.step.state import Snapshot
from fasttrain.step.trace import Mismatch, trace_step
from fasttrain.step.verify import Verification, verify
from tests.step.cuda_stand_in import OnDevice
from tests.step.models import (
    ASKED,
    CASES,
    CPU,
    OPTIMIZERS,
    Averaging,
    Case,
    batches,
    everything,
    indices,
    make,
    numbers,
)

Run = Callable[[Any], Tensor]
Spoil = Callable[[Tensor], Any]


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def behind_a_bias(channels: int = 8) -> nn.Module:
    """The first layer's bias has no gradient but rounding."""
    return nn.Sequential(nn.Linear(16, channels), nn.BatchNorm1d(channels), nn.ReLU(), nn.Linear(channels, 3))


class Counting(nn.Module):
    """Is given whole numbers, as the textbook's batches may be."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = classifier()

    def forward(self, counts: Tensor) -> Tensor:
        return self.layers((counts.double() / 3).float() - torch.tensor(1.5))


class Masked(nn.Module):
    """With buffers of every kind: infinite, never changed, counted, averaged, hardly changed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 3))
        self.register_buffer("mask", torch.tensor([0.0, 0.0, -math.inf]))
        self.register_buffer("slow", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.slow.add_(1e-8)
        return self.layers(x) + self.mask


def images(generator: torch.Generator) -> Tensor:
    """Far from zero, so that long sums in single precision lose digits that count."""
    return torch.randn(64, 2, 28, 28, generator=generator).add_(3000.0).to(memory_format=torch.channels_last)


def network() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.1), nn.Flatten(), nn.Linear(1568, 3))


CLASSIFIER = Case(classifier, numbers(128, 64), indices(10, 128), F.cross_entropy)
COUNTING = Case(Counting, indices(4, 128, 64), indices(10, 128), F.cross_entropy)
BEHIND_A_BIAS = Case(behind_a_bias, numbers(64, 16), indices(3, 64), F.cross_entropy)
MASKED = Case(Masked, numbers(32, 6), indices(2, 32), F.cross_entropy)
INEXACT = Case(network, images, indices(3, 64), F.cross_entropy)
"""Its batch norm is inexact in single precision, on one thread of a CPU."""

EMBEDDED = Case(
    lambda: nn.Sequential(nn.Embedding(1000, 8), nn.Flatten(), nn.Linear(32, 3)),
    indices(1000, 64, 4),
    indices(3, 64),
    F.cross_entropy,
)

ADAMW = (optim.AdamW, {"lr": 1e-3, "weight_decay": 1e-2})
SGD = (optim.SGD, {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-3})


class Bench:
    """A step after some eager ones, and its next batch."""

    def __init__(
        self, case: Case, optimizer: tuple[type[optim.Optimizer], dict[str, Any]], steps: int = 3, **options: Any
    ) -> None:
        *first, self.batch = batches(case, steps + 1)
        metrics = RunningMetrics(CPU, options.pop("metrics", {}))
        self.spec = StepSpec(**{**vars(make(case, optimizer, **options)), "metrics": metrics})
        self.eager = EagerEngine(self.spec, ASKED)
        for batch in first:
            self.eager.step(batch)
        self.traced = trace_step(self.spec, self.batch)
        self.num_state = len(self.traced.tensors)

    def verify(self, program: Run) -> Verification:
        """Looks, too, that everything is left as one eager step leaves it, bit for bit."""
        before = Snapshot.of(self.traced.tensors, CPU, self.spec)
        loss = self.eager.step(self.batch)
        alone, gradients = copy.deepcopy(everything(self.spec)), self.gradients()
        rng, count = torch.get_rng_state(), self.spec.gathered.count
        before.restore(self.traced.tensors, CPU, self.spec)
        found = verify(self.traced, self.batch, self.eager.step, program)
        torch.testing.assert_close((found.loss, everything(self.spec)), (loss, alone), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(self.gradients(), gradients, rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), rng)
        assert self.spec.gathered.count == count
        before.restore(self.traced.tensors, CPU, self.spec)
        return found

    def gradients(self) -> list[Tensor | None]:
        return [None if each.grad is None else each.grad.clone() for each in self.spec.model.parameters()]

    def inputs(self) -> list[Tensor]:
        inputs = self.traced.inputs(self.batch)
        assert not isinstance(inputs, Mismatch), inputs.reason
        return inputs

    def graph(self, _batch: Any = None) -> Tensor:
        """The captured graph as a program."""
        loss = self.traced.run(self.inputs())
        self.traced.finish()
        return loss

    def exact(self, _batch: Any = None) -> Tensor:
        """A program that computes in double precision and rounds at its end: as far from eager as one may be."""
        inputs = self.inputs()
        wide = [each.double() if each.dtype == torch.float32 else each for each in inputs]
        loss = self.traced.run(wide)
        with torch.no_grad():
            for tensor, result in zip(inputs, wide, strict=True):
                tensor.copy_(result)
        self.traced.finish()
        return loss.float()

    def spoiled(self, name: str, spoil: Spoil, by: Run | None = None) -> Run:
        """A program that is wrong about one tensor of the state, or of the kept gradients."""

        def program(batch: Any) -> Tensor:
            loss = (by or self.graph)(batch)
            with torch.no_grad():
                spoil(self.tensor(name))
            return loss

        return program

    def tensor(self, name: str) -> Tensor:
        """By name in the model's state, or a parameter's gradient or state ("grad of 0.bias", "exp_avg of 0.bias")."""
        kind, _, owner = name.rpartition(" of ")
        tensor = self.spec.model.get_parameter(owner) if kind else self.spec.model.state_dict()[name]
        found = self.spec.optimizer.state[tensor][kind] if kind and kind != "grad" else tensor.grad if kind else tensor
        assert isinstance(found, Tensor)
        return found

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


# What is wrong is refused.

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
    assert bench.verify(bench.with_options()).difference is None
    assert bench.verify(bench.with_options(**options)).difference is not None


def test_the_reason_names_the_tensor_the_entries_the_error_and_its_bound() -> None:
    bench = Bench(CLASSIFIER, ADAMW)
    found = bench.verify(bench.with_options(weight_decay=0))
    assert found.rule == "fp64"
    assert found.difference is not None
    assert found.difference.startswith("parameters: a tensor of shape [32, 64] changes otherwise: ")
    assert "of 2048 entries differ by more than rounding can do, one by " in found.difference
    assert "is the bound, and eager changes them by 0.001" in found.difference


def test_what_single_precision_does_not_hold_is_not_seen() -> None:
    """A decay by 1e-7 in a step is less than the spacing of single precision, 1.2e-7."""
    bench = Bench(CLASSIFIER, adamw(lr=1e-4, weight_decay=1e-3))
    assert bench.verify(bench.with_options(weight_decay=0)).difference is None


DIFFERENCES: list[tuple[str, Spoil, str]] = [
    ("layers.0.weight", lambda t: t.add_(0.001), "parameters: "),
    ("layers.0.weight", lambda t: t[:2].add_(0.001), "parameters: a tensor of shape [20, 6] changes otherwise: "),
    ("layers.0.weight", lambda t: t[0, 0].fill_(math.nan), "one by nan"),
    ("layers.0.weight", lambda t: t[0, 0].add_(1.0), "one by 1;"),
    ("layers.3.bias", lambda t: t[0].add_(0.02), "parameters: a tensor of shape [3]"),
    ("layers.0.bias", lambda t: t.add_(0.1), "parameters: a tensor of shape [20]"),  # uncertain, but not without limit
    ("mask", lambda t: t[0].fill_(-math.inf), "buffers: a tensor of shape [3] changes otherwise: 1 of 3"),
    ("mask", lambda t: t[2].fill_(math.inf), "buffers: "),
    ("mask", lambda t: t[2].fill_(0.0), "buffers: "),
    ("layers.1.running_mean", lambda t: t.add_(0.01), "buffers: "),
    ("layers.1.running_var", lambda t: t[3].mul_(1.1), "buffers: "),
    ("layers.1.num_batches_tracked", lambda t: t.sub_(1), "buffers: a tensor of shape [] stays as it is"),
    ("exp_avg of layers.0.weight", lambda t: t.mul_(1.01), "exp_avg: "),
    ("exp_avg of layers.0.weight", lambda t: t[1, 1].mul_(9.0), "exp_avg: "),
    ("exp_avg_sq of layers.3.weight", lambda t: t.mul_(1.001), "exp_avg_sq: "),
    ("step of layers.0.weight", lambda t: t.sub_(1), "step: a tensor of shape [] stays as it is"),
]


@cache
def masked(precision: str = "fp32") -> Bench:
    """One for many tests: it is left as it is found."""
    return Bench(MASKED, (optim.AdamW, {"lr": 0.01}), precision=precision)


@pytest.mark.parametrize(("name", "spoil", "reason"), DIFFERENCES)
def test_another_tensor_of_the_state_is_refused(name: str, spoil: Spoil, reason: str) -> None:
    bench = masked()
    found = bench.verify(bench.spoiled(name, spoil))
    assert found.difference is not None
    assert reason in found.difference
    assert found.rule == "fp64"


SEEN_BY_THE_LOOSER_RULE = [
    (name, spoil, kind)
    for name, spoil, reason in DIFFERENCES
    for kind in ("buffers: ", "step: ", "one by ")
    if reason.startswith(kind)
]


@pytest.mark.parametrize(("name", "spoil", "kind"), SEEN_BY_THE_LOOSER_RULE)
def test_another_tensor_of_the_state_is_refused_in_reduced_precision(name: str, spoil: Spoil, kind: str) -> None:
    bench = masked("bf16")
    found = bench.verify(bench.spoiled(name, spoil))
    assert found.difference is not None
    assert found.difference.startswith("parameters: " if kind == "one by " else kind)
    assert found.rule == "looser: the step computes in bfloat16"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_buffer_that_hardly_changes_and_stays_is_refused(precision: str) -> None:
    bench = masked(precision)
    difference = bench.verify(bench.spoiled("slow", forgotten(bench, "slow"))).difference
    assert difference == "buffers: a tensor of shape [2] stays as it is, eager changes it by 1e-08"


def forgotten(bench: Bench, name: str, rows: Any = slice(None)) -> Spoil:
    """Some rows of a tensor stay as they are."""
    before = bench.tensor(name).clone()
    return lambda tensor: tensor[rows].copy_(before[rows]) if tensor.dim() else tensor.copy_(before)


@pytest.mark.parametrize("name", ["0.bias", "0.weight", "2.bias"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_forgotten_parameter_is_refused(name: str, precision: str) -> None:
    bench = Bench(CLASSIFIER, SGD, precision=precision)
    difference = bench.verify(bench.spoiled(name, forgotten(bench, name))).difference
    assert difference is not None
    assert difference.startswith("parameters: ")
    assert "stays as it is" in difference


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "sgd-momentum"])
def test_one_wrong_row_of_an_embedding_is_refused(optimizer: str) -> None:
    bench = Bench(EMBEDDED, OPTIMIZERS[optimizer])
    row = int(bench.batch[0][0, 0])
    for by in (bench.graph, bench.exact):
        found = bench.verify(bench.spoiled("0.weight", forgotten(bench, "0.weight", row), by))
        assert found.difference is not None
        assert "parameters: a tensor of shape [1000, 8] changes otherwise: " in found.difference
        assert found.rule == "fp64"
        assert bench.verify(by).difference is None


@pytest.mark.parametrize("change", [1.001, 0.0, math.nan, math.inf])
def test_another_loss_is_refused(change: float) -> None:
    bench = Bench(CLASSIFIER, ADAMW)
    found = bench.verify(lambda batch: bench.graph(batch) * change)
    assert found.difference is not None
    assert found.difference.startswith("the loss is ")
    assert f", not {found.loss.item():.5g}" in found.difference


TOTALS: dict[int, tuple[Spoil, str]] = {
    0: (lambda total: total.sub_(0.7), "the total of the loss is"),
    1: (lambda total: total.add_(0.1), "the total of accuracy is"),
    2: (lambda total: total.sub_(1.0), "the total of what accuracy counts is"),
    FIRST_USER_TOTAL: (lambda total: total.add_(0.4), "the total of the user's metrics is"),
    FIRST_USER_TOTAL + 1: (lambda total: total.add_(1e4), "the total of the user's metrics is"),
}


@pytest.mark.parametrize("place", TOTALS)
def test_another_total_of_the_metrics_is_refused(place: int) -> None:
    """A small one does not hide behind a large one."""
    metrics: dict[str, Any] = {"spread": lambda _, y, __: y.std(), "large": lambda _, y, __: y.std() * 1e5}
    bench = Bench(CLASSIFIER, ADAMW, metrics=metrics)
    assert bench.verify(bench.graph).difference is None

    def program(batch: Any) -> Tensor:
        loss = bench.graph(batch)
        TOTALS[place][0](bench.spec.metrics.totals[place])
        return loss

    difference = bench.verify(program).difference
    assert difference is not None
    assert difference.startswith(f"metrics: {TOTALS[place][1]}")


def test_one_prediction_at_the_threshold_may_fall_to_the_other_side() -> None:
    bench = Bench(CLASSIFIER, ADAMW)

    def program(batch: Any) -> Tensor:
        loss = bench.graph(batch)
        bench.spec.metrics.totals[1] += 1 / 128
        return loss

    assert bench.verify(program).difference is None


@pytest.mark.parametrize("name", ["0.running_mean", "3.weight"])
def test_a_tenth_of_a_change_that_is_missing_is_refused_where_kernels_are_inexact(name: str) -> None:
    bench = Bench(INEXACT, OPTIMIZERS["sgd-momentum"], steps=1)
    before = bench.tensor(name).clone()
    found = bench.verify(bench.spoiled(name, lambda tensor: tensor.lerp_(before, 0.1), bench.exact))
    assert found.difference is not None
    assert found.rule == "fp64"


def test_a_wrong_trace_is_refused() -> None:
    """What is wrong in the captured graph is wrong in all that is made of it, so that only eager can tell."""
    bench = Bench(INEXACT, OPTIMIZERS["sgd-momentum"], steps=1)
    [part] = bench.traced.parts
    largest = max(range(bench.num_state), key=lambda place: bench.traced.tensors[place].numel())
    *_, output = nodes = list(part.graph.graph.nodes)
    with part.graph.graph.inserting_before(output):
        part.graph.graph.call_function(torch.ops.aten.mul_.Tensor, (nodes[largest], 1.01))
    part.graph.recompile()
    found = bench.verify(bench.exact)
    assert found.difference is not None
    assert found.difference.startswith("the captured graph, operator by operator: parameters: ")
    assert found.rule == "fp64"


class Centred(nn.Module):
    """Subtracts a running mean that it keeps in a buffer, which stays 0 for batches whose mean is 0."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - self.mean
        self.mean.lerp_(x.mean(0).detach(), 0.1)
        return self.layer(centred)


@pytest.mark.parametrize("zeros", [1, 2])
def test_a_stale_buffer_that_only_a_later_batch_shows_is_refused(zeros: int) -> None:
    """It is zero at first, and so are the means of some batches: until then, a program with its old value is right."""
    case = Case(Centred, numbers(8, 6), indices(3, 8), F.cross_entropy)
    spec = make(case, ADAMW)
    eager, data = EagerEngine(spec, ASKED), batches(case, zeros + 4)
    for inputs, _ in data[:zeros]:
        inputs.copy_(torch.stack([inputs[:4], -inputs[:4]], dim=1).flatten(0, 1))  # whose mean is exactly 0
    eager.step(data[0])
    traced = trace_step(spec, data[0])
    stale = spec.model.get_buffer("mean").clone()
    assert not stale.any()

    def by_program(batch: Any) -> Tensor:
        inputs: Any = traced.inputs(batch)
        mean = spec.model.get_buffer("mean")
        with torch.no_grad():
            right = torch.lerp(mean, inputs[-2].mean(0), 0.1)
            mean.copy_(stale)
            loss = traced.run(inputs)
            mean.copy_(right)
        return loss

    for number, batch in enumerate(data[1:], start=1):
        found = verify(traced, batch, eager.step, by_program).difference
        assert (found is not None) == (number >= zeros + 1), "the mean before a batch counts"
        assert found is None or "parameters: " in found or "the loss is" in found


# What is right but for rounding passes.


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", [CASES["transformer"], BEHIND_A_BIAS], ids=["bias of keys", "bias and batch norm"])
def test_other_rounding_passes(optimizer: str, case: Case) -> None:
    """Even where gradients are zero but for rounding, of which many optimizers make whole steps."""
    bench = Bench(case, OPTIMIZERS[optimizer])
    assert bench.verify(bench.exact).difference is None


@pytest.mark.parametrize("channels", [1, 2, 64])
def test_a_bias_in_front_of_batch_norm_is_never_refused(channels: int) -> None:
    """Under Adam each of its steps is as large as any other's, in a direction of its own; fifty weights and batches."""
    case = Case(partial(behind_a_bias, channels), numbers(64, 16), indices(3, 64), F.cross_entropy)
    bench = Bench(case, (optim.Adam, {"lr": 0.01}))
    for seed in range(50):
        torch.manual_seed(seed)
        bench.spec.model.load_state_dict(case.build().state_dict())
        bench.batch = batches(case, 1, seed)[0]
        found = bench.verify(bench.exact)
        assert found.difference is None, seed


ROUNDING: list[tuple[str, Spoil]] = [
    ("layers.0.weight", lambda t: t.mul_(1 + 1e-7)),
    ("layers.0.bias", lambda t: t.add_(0.01)),  # its gradient is zero but for rounding
    ("layers.1.running_mean", lambda t: t.mul_(1 + 1e-6)),
    ("exp_avg of layers.0.weight", lambda t: t.mul_(1 + 1e-6)),
]


@pytest.mark.parametrize(("name", "change"), ROUNDING)
def test_rounding_passes(name: str, change: Spoil) -> None:
    bench = masked()
    found = bench.verify(lambda batch: bench.spoiled(name, change)(batch) * (1 + 1e-6))
    assert found.difference is None
    assert found.rule == "equal precision"


def test_an_exact_program_passes_where_eager_is_not() -> None:
    bench = Bench(INEXACT, OPTIMIZERS["sgd-momentum"], steps=1)
    assert bench.verify(bench.graph).rule == "equal precision"
    found = bench.verify(bench.exact)
    assert found.difference is None
    assert found.rule == "fp64"


@pytest.mark.parametrize(("times", "passes"), [(1.0, True), (20.0, False)])
def test_a_program_may_be_as_inexact_as_eager(times: float, passes: bool) -> None:
    bench = Bench(INEXACT, OPTIMIZERS["sgd-momentum"], steps=1)
    tensors, before = bench.traced.tensors, Snapshot.of(bench.traced.tensors, CPU)
    bench.eager.step(bench.batch)
    eager = Snapshot.of(tensors, CPU)
    before.restore(tensors, CPU)

    def program(batch: Any) -> Tensor:
        """On the other side of what is exact."""
        loss = bench.exact(batch)
        with torch.no_grad():
            for tensor, theirs, kind in zip(tensors, eager.copies, bench.traced.kinds, strict=True):
                if kind in ("parameters", "momentum_buffer"):
                    tensor.add_(tensor - theirs, alpha=times)
        return loss

    found = bench.verify(program)
    assert (found.difference is None) == passes
    assert found.rule == "fp64"


def test_what_diverges_the_same_way_is_the_same() -> None:
    bench = Bench(MASKED, ADAMW)
    with torch.no_grad():
        bench.tensor("layers.0.weight")[3] = math.nan
        bench.tensor("exp_avg of layers.3.weight")[1] = math.inf
    found = bench.verify(bench.graph)
    assert found.loss.isnan()
    assert (found.difference, found.rule) == (None, "equal precision")


# What verifying leaves behind.


def fails_with(bench: Bench, error: BaseException) -> Run:
    def program(batch: Any) -> Tensor:
        bench.tensor("0.weight").data.zero_()
        batch[0].zero_()
        torch.rand(100)
        raise error

    return program


def test_a_program_that_cannot_run_is_a_difference_and_leaves_eagers_step() -> None:
    bench = Bench(CLASSIFIER, ADAMW)
    found = bench.verify(fails_with(bench, RuntimeError("could not create a primitive")))
    assert found.difference == "it cannot run: could not create a primitive"
    assert found.rule == "none: the program did not run"


def test_another_error_is_passed_on_and_nothing_is_changed() -> None:
    bench = Bench(CLASSIFIER, ADAMW)
    before, rng, inputs = copy.deepcopy(everything(bench.spec)), torch.get_rng_state(), bench.batch[0].clone()
    with pytest.raises(KeyboardInterrupt):
        verify(bench.traced, bench.batch, bench.eager.step, fails_with(bench, KeyboardInterrupt()))
    torch.testing.assert_close(everything(bench.spec), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(bench.batch[0], inputs)


def test_an_error_of_eagers_is_passed_on() -> None:
    bench = Bench(CLASSIFIER, ADAMW)

    def eager(_: Any) -> Tensor:
        raise RuntimeError("of the user's")

    with pytest.raises(RuntimeError, match="of the user's"):
        verify(bench.traced, bench.batch, eager, bench.graph)


def test_gradients_are_noted_and_nothing_is_left() -> None:
    bench = Bench(CLASSIFIER, ADAMW)
    weight = bench.spec.model.get_parameter("0.weight")
    state = bench.spec.optimizer.state[weight]
    tensors = [weight, state["exp_avg"], state["step"], bench.spec.metrics.totals]
    wanted = torch.autograd.grad(F.cross_entropy(bench.spec.model(bench.batch[0]), bench.batch[1]), weight)[0]
    with module._gradients_seen(bench.spec, tensors) as seen:
        bench.eager.step(bench.batch)
    assert seen[0] is seen[1]
    assert seen[2:] == [None, None]
    torch.testing.assert_close(seen[0], wanted)
    assert weight.grad is None
    seen.clear()
    with module._gradients_seen(bench.spec, tensors) as other:
        pass
    bench.eager.step(bench.batch)
    assert other == [None] * 4


def test_an_optimizer_without_state_is_left_without() -> None:
    bench = Bench(CLASSIFIER, (optim.SGD, {"lr": 0.1}))
    before = len(bench.spec.optimizer.state)
    bench.verify(bench.graph)
    assert len(bench.spec.optimizer.state) == before


def test_gradients_that_are_not_there_yet_are_compared_on_the_device() -> None:
    """The first batch of a group finds none, and a parameter that the loss does not reach never gets one."""
    owners = [OnDevice(torch.ones(3)), OnDevice(torch.ones(2))]
    totals = OnDevice(torch.zeros(4, dtype=torch.float64))
    loss = OnDevice(torch.tensor(1.0))
    gradient = OnDevice(torch.full((3,), 0.5))
    old, new, without = (
        module._side(loss, [totals], given, owners) for given in ([None, None], [gradient, None], [None, None])
    )
    judge = module._Judge(old.tensors, ["metrics", "gradients", "gradients"], new, [None, *new.tensors[1:]])
    for differs in (partial(judge.differs, wanted=new), partial(judge.differs_loosely, precision=torch.float32)):
        assert differs(new) is None
        assert str(differs(without)).startswith("gradients: ")


def replayed(spec: StepSpec, data: list[Any]) -> list[str]:
    """Runs the first batch eagerly and the rest by the captured graph; returns why that was refused, if it was."""
    eager, reasons = EagerEngine(spec, ASKED), list[str]()
    eager.step(data[0])
    traced = trace_step(spec, data[1])

    def by_graph(batch: Any) -> Tensor:
        inputs = traced.inputs(batch)
        assert not isinstance(inputs, Mismatch), inputs.reason
        return traced.run(inputs)

    for batch in data[1:]:
        if isinstance(traced.inputs(batch), Mismatch):
            assert traced.rebind(batch)
        found = verify(traced, batch, eager.step, by_graph)
        reasons += [] if found.difference is None else [found.difference]
    return reasons


def test_a_buffer_that_is_assigned_anew_is_taken_up() -> None:
    case = Case(Averaging, numbers(8, 4), indices(3, 8), F.cross_entropy)
    specs = [make(case, SGD) for _ in range(2)]
    assert replayed(specs[0], batches(case, 6)) == []
    for batch in batches(case, 6):
        EagerEngine(specs[1], ASKED).step(batch)
    torch.testing.assert_close(specs[0].model.state_dict(), specs[1].model.state_dict())


def test_a_batch_that_forward_changes_is_changed_once() -> None:
    def forward(model: nn.Module, batch: Any) -> Tensor:
        batch[0].mul_(0.1)
        return F.cross_entropy(model(batch[0]), batch[1])

    case = Case(lambda: nn.Linear(6, 3), numbers(8, 6), indices(3, 8), F.cross_entropy)
    specs = [StepSpec(**{**vars(make(case, SGD)), "forward": normalise_forward(forward, None)}) for _ in range(2)]
    assert replayed(specs[0], batches(case, 6)) == []
    for batch in batches(case, 6):
        EagerEngine(specs[1], ASKED).step(batch)
    torch.testing.assert_close(specs[0].model.state_dict(), specs[1].model.state_dict())
