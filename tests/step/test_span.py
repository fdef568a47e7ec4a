"""What several steps traced as one hold for, what they are refused for, how many they are, and a program of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.data.ragged import Ragged
from fasttrain.data.resident import ResidentBatches, resident
from fasttrain.errors import EngineError
from fasttrain.step import span as module
from fasttrain.step.eager import EagerEngine
from fasttrain.step.program import compile_graph
from fasttrain.step.span import TracedSpan, fewest_launches, most_steps
from fasttrain.step.spec import StepSpec
from fasttrain.step.torch_private import flat_runner
from fasttrain.step.trace import Mismatch, trace_step
from tests.step.models import ASKED, CASES, CPU, OPTIMIZERS, assert_same, make, started, with_forward
from tests.step.spans import columns_of, data_of, first_batch, run_span, taken, trace_span

MLP = CASES["mlp"]


def on(data: ResidentBatches, spec: StepSpec) -> StepSpec:
    """The step, with its optimizer's state made."""
    EagerEngine(spec, ASKED).step(first_batch(data))
    return spec


def of_mlp(data: ResidentBatches | None = None, steps: int = 2) -> TracedSpan:
    data = data or data_of(MLP)
    return trace_span(on(data, make(MLP, OPTIMIZERS["adam"])), data, steps)


def why_not(traced: TracedSpan, data: ResidentBatches, steps: int = 2) -> str:
    found = traced.inputs(taken(iter(data), steps))
    assert isinstance(found, Mismatch)
    return found.reason


def test_it_holds_for_its_own_data_and_number_of_steps_alone() -> None:
    data = data_of(MLP)
    traced = of_mlp(data)
    assert not isinstance(traced.inputs(taken(iter(data), 2)), Mismatch)
    assert why_not(traced, data_of(MLP)) == "the resident data"
    assert why_not(traced, data, steps=3) == "the resident data"


CHANGES: dict[str, tuple[Callable[[StepSpec], Any], str]] = {
    "a setting": (lambda spec: setattr(spec.model[1], "__class__", nn.Sigmoid), "model[1]"),
    "an option": (lambda spec: spec.optimizer.param_groups[0].update(amsgrad=True), "an option of a parameter group"),
    "state": (lambda spec: spec.optimizer.load_state_dict(spec.optimizer.state_dict()), "the parameter groups"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_its_guards_are_the_steps(name: str) -> None:
    change, reason = CHANGES[name]
    data = data_of(MLP)
    traced = of_mlp(data)
    change(traced.spec)
    assert reason in why_not(traced, data)
    batch = first_batch(data)
    assert why_not(traced, data) == traced.step.inputs(batch).reason  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(EngineError, match="the step has changed since it was traced"):
        TracedSpan(traced.step, batch, data, 2)


def test_state_that_was_loaded_is_taken_up_with_the_step() -> None:
    data = data_of(MLP)
    traced = of_mlp(data)
    traced.spec.optimizer.load_state_dict(traced.spec.optimizer.state_dict())
    assert traced.step.rebind()
    before = [tensor.clone() for tensor in traced.step.tensors]
    run_span(traced, taken(iter(data), 2))
    assert not any(map(torch.equal, before, traced.step.tensors))


def embedded(model: nn.Module, batch: tuple[Ragged, Tensor]) -> Tensor:
    bags, targets = batch
    fc1: Any = model.fc1
    rows = F.embedding(bags.values, fc1.weight.view(-1, 1)).view(-1)
    return (torch.segment_reduce(rows, "sum", offsets=bags.offsets, unsafe=True) - targets).square().sum()


def by_lengths(model: nn.Module, batch: tuple[Ragged, Tensor]) -> Tensor:
    bags, targets = batch
    return F.mse_loss(model(bags) / bags.offsets.diff(), targets.float())


@pytest.mark.parametrize("forward", [embedded, by_lengths])
def test_rows_of_unequal_length_that_are_not_summed_alone_are_refused(forward: Callable[..., Any]) -> None:
    data = data_of(CASES["sparse"])
    spec = on(data, with_forward(make(CASES["sparse"], OPTIMIZERS["adam"]), forward))
    with pytest.raises(EngineError, match="rows of unequal length are used otherwise than by sums"):
        trace_span(spec, data, 2)


def test_batches_that_are_not_what_the_columns_give_are_refused() -> None:
    data = data_of(MLP)
    traced, batch = of_mlp(data).step, first_batch(data)
    numbers, classes = columns_of(MLP)
    others = {
        "dtype": (numbers.double(), classes),
        "shape": (numbers[:, :3], classes),
        "order": (classes, numbers),
        "fewer columns": (numbers,),
    }
    for columns in others.values():
        with pytest.raises(EngineError, match="other tensors than the columns"):
            TracedSpan(traced, batch, resident(*columns, batch_size=5, device="cpu"), 2)
    with pytest.raises(EngineError, match="other tensors than the columns"):
        TracedSpan(traced, batch, data_of(MLP, batch_size=4), 2)


def leaves(batch: Any) -> list[Tensor]:
    return [each for column in batch for each in (column if isinstance(column, Ragged) else (column,))]


def steps_of(name: str, **options: Any) -> int:
    spec, batch = started(CASES[name], OPTIMIZERS["adam"], **options)
    return most_steps(trace_step(spec, batch), leaves(batch))


def test_the_number_of_steps_follows_the_number_of_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, batch = started(MLP, OPTIMIZERS["adam"])
    traced = trace_step(spec, batch)
    nodes = sum(node.op == "call_function" for node in traced.parts[0].graph.graph.nodes)
    found: list[int] = []
    for most in (16 * nodes, 16 * nodes - 1, 4 * nodes, 4 * nodes - 1, nodes):
        monkeypatch.setattr(module, "MOST_NODES", most)
        found.append(most_steps(traced, leaves(batch)))
    assert found == [16, 15, 4, 1, 1]


@pytest.mark.parametrize(
    ("sizes", "num_batches", "size"),
    [
        (range(4, 17), 306, 16),  # 19 launches and 2 batches
        (range(4, 17), 156, 13),  # 12 launches, where 16 at a time leave 12 batches
        (range(4, 17), 10, 10),
        (range(4, 17), 3, None),
        (range(4, 2), 100, None),
        ((4, 8, 12, 16), 156, 12),
        ((4, 8, 12, 16), 8, 8),
        ((4, 8, 16), 24, 8),  # 3 launches, where 16 at a time leave 8 batches
        ((4, 7), 28, 7),
    ],
)
def test_an_epoch_takes_few_launches(sizes: Iterable[int], num_batches: int, size: int | None) -> None:
    assert fewest_launches(sizes, num_batches) == size


def test_steps_that_take_long_are_launched_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert min(steps_of("mlp"), steps_of("sparse")) >= module.LEAST_STEPS
    assert steps_of("cnn") == 1, "it has a convolution"
    assert steps_of("mlp", accumulate=2) == 1, "its graph is not the whole step"
    spec, batch = started(MLP, OPTIMIZERS["adam"])
    traced = trace_step(spec, batch)
    size = sum(tensor.nbytes for tensor in (*traced.tensors, *batch))
    monkeypatch.setattr(module, "MOST_BYTES", size)
    assert most_steps(traced, batch) > 1
    monkeypatch.setattr(module, "MOST_BYTES", size - 1)
    assert most_steps(traced, batch) == 1


def compiled_span(traced: TracedSpan, folder: Path) -> Callable[[list[Tensor]], list[Tensor]]:
    [part], package = traced.parts, folder / "span.pt2"
    compile_graph(part.graph, part.kinds, part.open_dims, package)
    return flat_runner(str(package), CPU)


def near_one(model: nn.Module, batch: tuple[Ragged]) -> Tensor:
    return (model(batch[0]) - 1.0).square().mean()


def test_a_program_of_several_steps_on_rows_of_unequal_length(in_double: None, tmp_path: Path) -> None:
    """It gives eager's numbers, and ids, offsets and rows that are out of range raise in its loops.

    There is no other column, whose gather would raise for rows.
    """
    data = resident(columns_of(CASES["sparse"])[0], batch_size=5, device="cpu")
    spec, eager_spec = (on(data, with_forward(make(CASES["sparse"], OPTIMIZERS["adam"]), near_one)) for _ in range(2))
    traced = trace_span(spec, data, 2)
    run, eager, epoch = compiled_span(traced, tmp_path), EagerEngine(eager_spec, ASKED), iter(data)
    for _ in range(3):
        span = taken(epoch, 2)
        inputs = traced.inputs(span)
        assert not isinstance(inputs, Mismatch)
        wanted = torch.stack([eager.step(batch) for batch in span.batches()])
        torch.testing.assert_close(run(inputs)[0], wanted, rtol=1e-10, atol=1e-12)
        assert_same(spec, eager_spec)
    span = taken(iter(data), 2)
    inputs = traced.inputs(span)
    assert not isinstance(inputs, Mismatch)
    ids, offsets = (place for place, each in enumerate(inputs) if any(each is table for table in data.columns[0]))
    rows = next(place for place, each in enumerate(inputs) if each is span.rows)
    # In memory, what is before and after them looks like offsets, too: rows are not refused for what they lead to.
    inputs[offsets] = torch.cat([inputs[offsets][:1], inputs[offsets], inputs[offsets][-1:]])[1:-1]
    entry = int(data.columns[0].offsets[span.rows[0]])  # pyright: ignore[reportAttributeAccessIssue]
    for place, at, value in (
        (ids, entry, 9),
        (ids, entry, -1),
        (rows, 0, data.num_rows),
        (rows, 7, -1),
        (offsets, int(span.rows[0]), -1),
        (offsets, int(span.rows[0]) + 1, 10_000),
    ):
        wrong = list(inputs)
        wrong[place] = inputs[place].clone()
        wrong[place][at] = value
        with pytest.raises(RuntimeError):
            run(wrong)
