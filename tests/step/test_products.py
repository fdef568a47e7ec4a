"""Products of matrices with the rows of a sparse column, made of the rows' entries: numbers, graphs, what is not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fasttrain import EngineError, TrainStep
from fasttrain.data.resident import ResidentBatches
from fasttrain.step import walk as module
from fasttrain.step.eager import EagerEngine
from fasttrain.step.kernels import define_operators
from fasttrain.step.program import compile_graph
from fasttrain.step.torch_private import flat_runner
from fasttrain.step.walk import TracedWalk, WalkingProgram
from tests.step.fakes import Graphs
from tests.step.models import ASKED, CPU, assert_same
from tests.step.spans import ROWS, run_walk, taken, trace_walk
from tests.step.test_walk_columns import NUM_ROWS, PLACES, column_of, data_of, first_batch, in_columns, sparse

FEW = (0.5, -3.0, 1.0)


# The kernels.


def entries_of(scale: torch.dtype | None) -> list[Tensor]:
    """The tables of a sparse column: ids, offsets and, in this dtype, values."""
    rows = sparse(torch.float32 if scale is None else scale, 1, (1,) if scale is None else (2, -3, 1))
    return column_of(rows).tables


CASES = [*itertools.product([torch.float32, torch.float64], [None, torch.float32, torch.int64], [1, 2, 16, 37])]
CHOSEN = torch.tensor([3, 8, 0, 8, 30, 2, 11, 37, 20])


def products() -> tuple[GraphModule, list[Tensor]]:
    """A graph of a product and its gradient for each case, and its inputs."""
    define_operators()
    generator = torch.Generator().manual_seed(0)
    graph, inputs, found = Graph(), list[Tensor](), list[Node]()

    def given(tensor: Tensor) -> Node:
        inputs.append(tensor)
        return graph.placeholder(f"given_{len(inputs)}")

    chosen = given(CHOSEN)
    for dtype, scale, outputs in CASES:
        ids, offsets, *values = map(given, entries_of(scale))
        options = {"chosen": chosen, "scales": values[0] if values else None, "is_product": True}
        weights = given(torch.randn(outputs, PLACES, generator=generator, dtype=dtype))
        gradient = given(torch.randn(outputs, len(CHOSEN), generator=generator, dtype=dtype).t())
        sums = (weights, ids, offsets), options
        found.append(graph.call_function(torch.ops.fasttrain.sum_rows.default, *sums))
        spread = (gradient, ids, offsets, PLACES), options
        found.append(graph.call_function(torch.ops.fasttrain.spread_rows.default, *spread))
    graph.output(tuple(found))
    return GraphModule({}, graph), inputs


def in_full(inputs: list[Tensor]) -> list[Tensor]:
    """The same by products of full rows."""
    rest, found = iter(inputs[1:]), list[Tensor]()
    for dtype, scale, _ in CASES:
        ids, offsets, *values = [next(rest) for _ in entries_of(scale)]
        rows = torch.zeros(NUM_ROWS, PLACES, dtype=dtype)
        of_row = torch.arange(NUM_ROWS).repeat_interleave(offsets.diff())
        rows[of_row, ids.long()] = values[0].to(dtype) if values else 1.0
        weights, gradient = next(rest), next(rest)
        found += [rows[CHOSEN] @ weights.t(), gradient.t() @ rows[CHOSEN]]
    return found


@pytest.mark.parametrize("threads", [1, 2])
def test_kernels_give_the_products_numbers(threads: int, tmp_path: Path, own_programs: Path) -> None:
    """Also where weights or gradients are infinite or NaN: a sum is NaN where the product is NaN or infinite."""
    graph, inputs = products()
    package = tmp_path / "products.pt2"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kinds = [(each.shape, each.stride(), each.dtype, each.device) for each in inputs]
        compile_graph(graph, kinds, [frozenset()] * len(inputs), package)
        run = flat_runner(str(package), CPU)
        for bad in (None, float("inf"), float("nan")):
            for each in inputs if bad is not None else []:
                if each.is_floating_point() and each.dim() == 2:
                    each[0, -1] = bad
            for found, wanted in zip(run(list(inputs)), in_full(inputs), strict=True):
                exact = 1e-5 if wanted.dtype == torch.float32 else 1e-12
                wanted = torch.where(wanted.isfinite(), wanted, float("nan"))
                assert wanted.isnan().any() == (bad is not None)
                torch.testing.assert_close(found, wanted, rtol=exact, atol=exact, equal_nan=True)
    finally:
        torch.set_num_threads(before)
    for at in (0, 1, 2):  # a row, an id, an offset
        kept = inputs[at].clone()
        for value in (-1, 1 << 20):
            inputs[at].fill_(value)
            with pytest.raises(RuntimeError):
                run(list(inputs))
        inputs[at].copy_(kept)
    run(list(inputs))


def test_the_operators_themselves_give_the_products_numbers() -> None:
    graph, inputs = products()
    for found, wanted in zip(graph(*inputs), in_full(inputs), strict=True):
        torch.testing.assert_close(found, wanted)


# The graphs.


class Model(nn.Module):
    """Linear layers of three kinds of sparse rows, in double precision."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(PLACES, outputs).double()
        self.second = nn.Linear(PLACES, outputs, bias=False).double()
        self.third = nn.Parameter(torch.randn(PLACES, outputs, dtype=torch.float64) * 0.1)
        self.last = nn.Linear(outputs, 3).double()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        hidden = self.first(batch["double"]) + self.second(batch["pictures"].double().flatten(1))
        turned = self.third.t() @ batch["counts"].double().t()
        return self.last((hidden + turned.t()).tanh())


def rows_of() -> dict[str, Tensor]:
    return {
        "double": sparse(torch.float64, 2, FEW),
        "pictures": sparse(torch.float32, 11).view(NUM_ROWS, 2, 5, 12),
        "counts": sparse(torch.int64, 8, (1, 5)),
        "target": torch.arange(NUM_ROWS) % 3,
    }


def step_on(model: nn.Module, forward: Callable[..., Any] | None = None, engine: str = "eager") -> TrainStep:
    def plainly(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits = model(batch)
        return F.cross_entropy(logits, batch["target"]), logits, batch["target"]

    return TrainStep(model, torch.optim.Adam(model.parameters(), lr=0.01), forward=forward or plainly, engine=engine)


def made(outputs: int = 3, **options: Any) -> TrainStep:
    torch.manual_seed(3)
    return step_on(Model(outputs), **options)


def walk_on(data: ResidentBatches, **options: Any) -> TracedWalk:
    spec = made(**options).spec
    EagerEngine(spec, ASKED).step(first_batch(data))
    return trace_walk(spec, data)


def operators(traced: TracedWalk) -> list[str]:
    nodes = traced.parts[0].graph.graph.nodes
    return [str(node.target).removesuffix(".default") for node in nodes if node.op == "call_function"]


def counts(traced: TracedWalk) -> tuple[int, int, int]:
    """Rows in full; sums of weights; gradients that are spread."""
    found = operators(traced)
    return tuple(found.count(f"fasttrain.{name}_rows") for name in ("dense", "sum", "spread"))  # pyright: ignore


def agrees(outputs: int, make: Callable[[TracedWalk], Callable[..., Any]], **options: Any) -> TracedWalk:
    """Two spans by the walk, and eager steps on plain tensors."""
    data, plain = data_of(in_columns(rows_of())), data_of(rows_of())
    traced, eager_spec = walk_on(data, outputs=outputs, **options), made(outputs, **options).spec
    eager, run, epoch, plain_epoch = EagerEngine(eager_spec, ASKED), make(traced), iter(data), iter(plain)
    eager.step(first_batch(plain))
    for steps in (3, 4):
        wanted = torch.stack([eager.step(batch) for batch in taken(plain_epoch, steps).batches()])
        torch.testing.assert_close(run(taken(epoch, steps)), wanted, rtol=1e-10, atol=1e-12)
        assert_same(traced.spec, eager_spec)
    return traced


def as_graph(traced: TracedWalk) -> Callable[..., Any]:
    return lambda span: run_walk(traced, span)


@pytest.mark.parametrize("outputs", [1, 3])
def test_products_are_made_of_entries(outputs: int) -> None:
    traced = agrees(outputs, as_graph)
    assert counts(traced) == (0, 3, 3), "nothing is left of the rows in full"
    assert len([name for name in operators(traced) if "mm" in name]) == 3, "those of the last layer"
    origins = [node.meta for node in traced.parts[0].graph.graph.nodes if "fasttrain" in str(node.target)]
    assert all("custom" in meta for meta in origins)


@pytest.mark.parametrize("outputs", [1, 20])
def test_programs_make_products_of_entries(outputs: int, tmp_path: Path, own_programs: Path) -> None:
    def program(traced: TracedWalk) -> Callable[..., Any]:
        [part] = traced.parts
        compile_graph(part.graph, part.kinds, part.open_dims, tmp_path / "step.pt2")
        return WalkingProgram([tmp_path / "step.pt2"], traced).run

    agrees(outputs, program)


def forward_of(change: Callable[[nn.Module, dict[str, Tensor]], Tensor]) -> Callable[..., Any]:
    def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(change(model, batch), batch["target"])

    return forward


def also_by_itself(model: Any, batch: dict[str, Tensor]) -> Tensor:
    rows = batch["double"]
    return model.first(rows) * rows.mean(1, keepdim=True)


def changed_in_place(model: Any, batch: dict[str, Tensor]) -> Tensor:
    rows = batch["double"].detach() * 1.0
    found = batch["pictures"].double()
    found[:, 0] += 1.0
    return model.first(rows) + model.second(found.flatten(1))


def with_itself(model: Any, batch: dict[str, Tensor]) -> Tensor:
    rows = batch["double"]
    return model.last((rows @ rows.t())[:, :3])


def in_parts(model: Any, batch: dict[str, Tensor]) -> Tensor:
    rows = batch["double"]
    return torch.cat([rows[:, :60], rows[:, 60:]], 1) @ model.third


def regrouped(model: Any, batch: dict[str, Tensor]) -> Tensor:
    rows = batch["double"].view(ROWS * 2, PLACES // 2)
    return (rows @ model.third[:60]).view(ROWS, 2, 3).sum(1)


def twice_converted(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model.first(batch["double"].int().double())


def in_bfloat16(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        weights = model.first.weight.float()
        return F.linear(batch["pictures"].flatten(1), weights).float().double()


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (also_by_itself, (1, 1, 1)),
        (changed_in_place, (2, 0, 0)),
        (with_itself, (1, 0, 0)),
        (in_parts, (1, 0, 0)),
        (regrouped, (1, 0, 0)),
        (twice_converted, (1, 0, 0)),
        (in_bfloat16, (1, 0, 0)),
    ],
)
def test_rows_are_made_in_full_for_what_is_no_product(change: Callable[..., Any], wanted: tuple[int, int, int]) -> None:
    if change is in_bfloat16:
        traced = walk_on(data_of(in_columns(rows_of())), forward=forward_of(change))
    else:
        traced = agrees(3, as_graph, forward=forward_of(change))
    assert counts(traced) == wanted


def test_rows_with_many_entries_are_made_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of(in_columns(rows_of()))
    assert counts(walk_on(data)) == (0, 3, 3)
    monkeypatch.setattr(module, "VALUES_AN_ENTRY", 1_000)
    assert counts(walk_on(data)) == (3, 0, 0)


@pytest.mark.usefixtures("temporary", "hasty")
@pytest.mark.parametrize("engine", ["compiled", "auto"])
def test_a_wrong_product_is_refused(engine: str, graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that leaves the entries' values out."""
    right = module._product_of_entries  # pyright: ignore[reportPrivateUsage]

    def wrong(*given: Any) -> list[Node]:
        nodes = right(*given)
        for node in nodes:
            node.kwargs = {name: None if name == "scales" else value for name, value in node.kwargs.items()}
        return nodes

    def trained() -> TrainStep:
        step = made(engine=engine)
        step.expect(10_000_000)
        data = data_of(in_columns(rows_of()))
        for _ in range(12):
            for _ in step.run(iter(data)):
                pass
        step.close()
        return step

    assert trained().engine.value == "compiled"
    monkeypatch.setattr(module, "_product_of_entries", wrong)
    if engine == "compiled":
        with pytest.raises(EngineError, match="its numbers differ from eager's"):
            trained()
    else:
        step = trained()
        assert step.engine.value == "eager"
        assert "differ" in step.engine.reason
