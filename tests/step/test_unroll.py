"""The graph of several steps, uncompiled and in double precision: what it gives is what eager steps give."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.data.batch import num_samples
from fasttrain.data.ragged import Ragged
from fasttrain.data.resident import ResidentBatches, resident
from fasttrain.step.eager import EagerEngine
from fasttrain.step.spec import StepSpec
from tests.step.models import ASKED, CASES, OPTIMIZERS, assert_same, make, with_forward
from tests.step.spans import columns_of, data_of, first_batch, run_span, taken, trace_span

pytestmark = pytest.mark.usefixtures("in_double")

MLP = CASES["mlp"]


def started_on(data: ResidentBatches, make_spec: Callable[[], StepSpec]) -> StepSpec:
    """A step whose optimizer has made its state."""
    spec = make_spec()
    torch.manual_seed(11)
    EagerEngine(spec, ASKED).step(first_batch(data))
    return spec


def spans_agree(make_spec: Callable[[], StepSpec], data: ResidentBatches, steps: int = 3) -> None:
    """Two spans of an epoch by the unrolled graph, and eager steps on the same batches, at another rate in the second.

    The last batch of the epoch is left to an eager step.
    """
    spec, eager_spec = (started_on(data, make_spec) for _ in range(2))
    random_state = torch.get_rng_state()
    traced = trace_span(spec, data, steps)
    assert_same(spec, eager_spec)
    eager, epoch = EagerEngine(eager_spec, ASKED), iter(data)
    for rate in (0.01, 0.03):
        for each in (spec, eager_spec):
            each.optimizer.param_groups[1]["lr"] = rate
        span = taken(epoch, steps)
        torch.set_rng_state(random_state)
        wanted = torch.stack([eager.step(batch) for batch in span.batches()])
        after = torch.get_rng_state()
        torch.set_rng_state(random_state)
        found = run_span(traced, span)
        assert torch.equal(torch.get_rng_state(), after), "the graph draws other random numbers"
        random_state = after
        assert found.shape == (steps,)
        assert len(set(found.tolist())) == steps
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
        assert_same(spec, eager_spec)
    assert [num_samples(batch) for batch in epoch] == [5]


@pytest.mark.parametrize("optimizer", ["adam", "sgd-momentum"])
@pytest.mark.parametrize("name", ["mlp", "dropout", "gru"])
def test_steps_on_rows_of_equal_length(name: str, optimizer: str) -> None:
    spans_agree(lambda: make(CASES[name], OPTIMIZERS[optimizer]), data_of(CASES[name]))


@pytest.mark.parametrize("shuffle", [True, False])
def test_buffers_go_from_step_to_step(shuffle: bool) -> None:
    """Batch norm: its averages, and its count of batches."""
    spans_agree(lambda: make(CASES["cnn"], OPTIMIZERS["adam"]), data_of(CASES["cnn"], shuffle=shuffle))


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.1}])
def test_sums_of_rows_are_taken_of_the_whole_table(options: dict[str, Any]) -> None:
    data = data_of(CASES["sparse"])
    spans_agree(lambda: make(CASES["sparse"], OPTIMIZERS["adam"], **options), data)
    traced = trace_span(started_on(data, lambda: make(CASES["sparse"], OPTIMIZERS["adam"])), data, 3)
    calls = [str(node.target) for node in traced.parts[0].graph.graph.nodes if node.op == "call_function"]
    assert [calls.count(f"fasttrain.{each}_rows.default") for each in ("sum", "spread")] == [3, 3]


def named_forward(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    logits = model(batch["numbers"])
    return F.cross_entropy(logits, batch["class"]) + batch["more"].square().mean(), logits, batch["class"]


def test_batches_with_names_and_a_column_that_no_gradient_comes_from() -> None:
    numbers, classes = columns_of(MLP)
    named = {"more": torch.linspace(0, 3, len(classes)), "class": classes, "numbers": numbers}
    data = resident(named, batch_size=5, device="cpu")
    spans_agree(lambda: with_forward(make(MLP, OPTIMIZERS["adam"]), named_forward), data)


def test_tensors_that_forward_closes_over_are_read_by_each_step() -> None:
    weights, shift = torch.tensor([0.2, 0.5, 0.3]), torch.randn(4)

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x + shift), y, weights) * torch.tensor(2.0)

    def make_spec() -> StepSpec:
        return with_forward(make(MLP, OPTIMIZERS["adam"]), forward)

    spans_agree(make_spec, data_of(MLP))
    data = data_of(MLP)
    traced = trace_span(started_on(data, make_spec), data, 2)
    epoch = iter(data)
    run_span(traced, taken(epoch, 2))
    shift.mul_(3.0)  # not as it was when it was traced
    spec = started_on(data, make_spec)
    spec.model.load_state_dict(traced.spec.model.state_dict())
    spec.optimizer.load_state_dict(copy.deepcopy(traced.spec.optimizer.state_dict()))
    eager, span = EagerEngine(spec, ASKED), taken(epoch, 2)
    wanted = torch.stack([eager.step(batch) for batch in span.batches()])
    torch.testing.assert_close(run_span(traced, span), wanted, rtol=1e-10, atol=1e-12)


def test_two_columns_of_rows_of_unequal_length() -> None:
    bags, targets = columns_of(CASES["sparse"])
    others = Ragged.of_lengths(bags.values.flip(0), bags.offsets.diff().flip(0))
    data = resident(bags, targets, others, batch_size=5, device="cpu")

    def forward(model: nn.Module, batch: tuple[Ragged, Tensor, Ragged]) -> Tensor:
        first, target, second = batch
        return F.binary_cross_entropy_with_logits(model(first) - 0.5 * model(second), target.double())

    spans_agree(lambda: with_forward(make(CASES["sparse"], OPTIMIZERS["adam"]), forward), data)
