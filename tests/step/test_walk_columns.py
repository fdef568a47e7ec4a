"""Steps over columns that are kept narrow or sparse: the losses and weights of the same rows as plain tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from fasttrain import TrainStep
from fasttrain.data.columns import Column, ColumnBuilder
from fasttrain.data.resident import ResidentBatches, resident
from fasttrain.step.eager import EagerEngine
from fasttrain.step.kernels import define_operators, spelled_out
from fasttrain.step.program import compile_graph
from fasttrain.step.walk import StepsFailedError, WalkingProgram
from tests.step.fakes import Graphs
from tests.step.models import ASKED, CPU, assert_same
from tests.step.spans import ROWS, run_walk, taken, trace_walk

NUM_ROWS = 7 * ROWS + 3
PLACES = 120


def sparse(dtype: torch.dtype, seed: int, values: tuple[float, ...] = (1,)) -> Tensor:
    """[NUM_ROWS, PLACES], none to six entries a row."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.zeros(NUM_ROWS, PLACES, dtype=torch.float64)
    for row in rows[1:]:
        places = torch.randperm(PLACES, generator=generator)[: int(torch.randint(0, 7, (1,), generator=generator))]
        row[places] = torch.tensor(values, dtype=torch.float64)[torch.arange(len(places)) % len(values)]
    return rows.to(dtype)


def rows_of_every_kind() -> dict[str, Tensor]:
    few = (0.5, -3.0, 1.0)
    return {
        "ones": sparse(torch.float32, 1),
        "double": sparse(torch.float64, 2, few),
        "half": sparse(torch.float16, 3, few),
        "bfloat16": sparse(torch.bfloat16, 4),
        "bools": sparse(torch.bool, 5),
        "bytes": sparse(torch.uint8, 6, (1, 250)),
        "small": sparse(torch.int8, 7, (1, -7)),
        "counts": sparse(torch.int64, 8, (1, 1 << 40)),
        "shorts": sparse(torch.int16, 9, (-300,)),
        "ints": sparse(torch.int32, 10),
        "pictures": sparse(torch.float32, 11).view(NUM_ROWS, 2, 5, 12),
        "narrow": torch.arange(NUM_ROWS * 3).view(NUM_ROWS, 3) % 10,
        "whole": (torch.arange(NUM_ROWS) % 7).double(),
        "plain": torch.randn(NUM_ROWS, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        "target": torch.arange(NUM_ROWS) % 3,
    }


def column_of(rows: Tensor) -> Column:
    builder = ColumnBuilder(len(rows))
    for numbers in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).split(8):
        builder.put(numbers.numpy(), rows[numbers])
    return builder.column(CPU)


def data_of(rows: dict[str, Any], **options: Any) -> ResidentBatches:
    return resident(rows, **{"batch_size": ROWS, "device": "cpu", "seed": 9, **options})


def in_columns(rows: dict[str, Tensor]) -> dict[str, Column]:
    return {name: column_of(each) for name, each in rows.items()}


class Elementwise(nn.Module):
    """Uses each entry by itself, so that the rows are needed in full."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(PLACES, 3, dtype=torch.float64) * 0.1)
        self.embedding = nn.Embedding(10, 3, dtype=torch.float64)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.embedding(batch["narrow"]).mean(1) * (batch["whole"] + batch["plain"]).unsqueeze(1)
        for name, each in batch.items():
            if each.numel() == len(each) * PLACES:
                scaled = each.double().flatten(1) * (2.0**-40 if name == "counts" else 0.1)
                logits = logits + (scaled.unsqueeze(2) * self.weights).tanh().sum(1)
        return logits


def step_on(model: Callable[[], nn.Module], engine: str = "eager") -> TrainStep:
    def forward(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits = model(batch)
        return F.cross_entropy(logits, batch["target"]), logits, batch["target"]

    torch.manual_seed(3)
    net = model()
    return TrainStep(net, torch.optim.Adam(net.parameters(), lr=0.01), forward=forward, engine=engine)


def first_batch(data: ResidentBatches) -> Any:
    return data.gather(torch.arange(ROWS), torch.arange(ROWS).numpy())[0]


def started(model: Callable[[], nn.Module], data: ResidentBatches) -> Any:
    spec = step_on(model).spec
    EagerEngine(spec, ASKED).step(first_batch(data))
    return spec


def walk_agrees(model: Callable[[], nn.Module], rows: dict[str, Tensor], make: Any = None) -> None:
    """Two spans by the walk over columns (compiled by `make`), and eager steps on plain tensors."""
    data, plain = data_of(in_columns(rows)), data_of(rows)
    spec, eager_spec = started(model, data), started(model, plain)
    traced = trace_walk(spec, data)
    run = (lambda span: run_walk(traced, span)) if make is None else make(traced).run
    eager, epoch, plain_epoch = EagerEngine(eager_spec, ASKED), iter(data), iter(plain)
    for steps in (3, 4):
        wanted = torch.stack([eager.step(batch) for batch in taken(plain_epoch, steps).batches()])
        torch.testing.assert_close(run(taken(epoch, steps)), wanted, rtol=1e-10, atol=1e-12)
        assert_same(spec, eager_spec)


def test_every_kind_of_column_is_there() -> None:
    kinds = {name: column.kind for name, column in in_columns(rows_of_every_kind()).items()}
    assert [name for name, kind in kinds.items() if kind.form == "dense"] == ["narrow", "whole", "plain", "target"]
    assert {kinds[name].tables[0][1] for name in ("narrow", "whole", "target")} == {torch.uint8}
    assert {name for name, kind in kinds.items() if len(kind.tables) == 2} == {
        "ones", "bfloat16", "bools", "ints", "pictures",
    }  # fmt: skip


def test_a_walk_over_columns_gives_the_numbers_of_plain_tensors() -> None:
    walk_agrees(Elementwise, rows_of_every_kind())


@cache
def package_of(model: Callable[[], nn.Module], folder: Path) -> Path:
    """Compiled once for all tests of a session."""
    data = data_of(in_columns(rows_of_every_kind()))
    [part] = trace_walk(started(model, data), data).parts
    package = folder / f"{model.__name__}.pt2"
    compile_graph(part.graph, part.kinds, part.open_dims, package)
    return package


@pytest.fixture
def package(tmp_path_factory: pytest.TempPathFactory, own_programs: Path) -> Callable[[Any], Path]:
    folder = tmp_path_factory.getbasetemp() / "columns"
    folder.mkdir(exist_ok=True)
    return lambda model: package_of(model, folder)


def test_a_program_over_columns_gives_the_numbers_of_plain_tensors(package: Callable[[Any], Path]) -> None:
    walk_agrees(Elementwise, rows_of_every_kind(), lambda traced: WalkingProgram([package(Elementwise)], traced))


@pytest.mark.parametrize("table", ["ids", "offsets"])
@pytest.mark.parametrize("value", [-1, 1 << 20])
def test_wrong_entries_end_the_call(table: str, value: int, package: Callable[[Any], Path]) -> None:
    data = data_of(in_columns(rows_of_every_kind()))
    program = WalkingProgram([package(Elementwise)], trace_walk(started(Elementwise, data), data))
    span = taken(iter(data), 4)
    ids, offsets, *_ = data.columns[0].tables
    row = next(row for row in span.rows[2 * ROWS :].tolist() if offsets[row] < offsets[row + 1])
    changed, place = (ids, offsets[row]) if table == "ids" else (offsets, row)
    kept = changed[place].clone()
    changed[place] = value
    with pytest.raises(StepsFailedError, match="not to be trusted"):
        program.run(span)
    changed[place] = kept
    assert isinstance(program.run(span), Tensor)


@pytest.mark.parametrize("chosen", [[0, NUM_ROWS], [-1]])
def test_rows_that_there_are_not_raise(chosen: list[int]) -> None:
    ids, offsets = column_of(sparse(torch.float32, 1)).tables
    with pytest.raises((IndexError, RuntimeError)):
        dense_rows(None, ids, offsets, PLACES, torch.float32, torch.tensor(chosen))


def dense_rows(*given: Any) -> Tensor:
    define_operators()
    return torch.ops.fasttrain.dense_rows.default(*given)


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from([name for name, rows in rows_of_every_kind().items() if rows.shape[1:] == (PLACES,)]),
    st.lists(st.integers(0, NUM_ROWS - 1), min_size=1, max_size=9),
    st.integers(0, 3),
)
def test_rows_in_full_are_the_same_padded(name: str, chosen: list[int], more: int) -> None:
    """As a GPU runs it."""
    rows = rows_of_every_kind()[name]
    column = column_of(rows)
    define_operators()
    graph = Graph()
    nodes = [graph.placeholder(f"table_{at}") for at in range(len(column.tables))]
    values = nodes[2] if len(nodes) == 3 else None
    given = (values, *nodes[:2], PLACES, rows.dtype, graph.placeholder("chosen"))
    graph.output(graph.call_function(torch.ops.fasttrain.dense_rows.default, given))
    module = GraphModule({}, graph)
    padded = spelled_out(module, CPU, column.longest + more)
    assert "dense_rows" not in str(padded.graph)
    for each in (module, padded):
        found = each(*column.tables, torch.tensor(chosen))
        assert found.dtype == rows.dtype
        assert torch.equal(found, rows[chosen])
        assert found.is_contiguous()


@pytest.mark.usefixtures("temporary", "hasty")
@pytest.mark.parametrize("engine", ["compiled", "auto"])
def test_training_on_columns_is_eager_training_on_plain_tensors(engine: str, graphs: Graphs) -> None:
    rows = rows_of_every_kind()
    seen: list[Any] = []
    for how, given_rows in (("eager", rows), (engine, in_columns(rows)), ("eager", in_columns(rows))):
        step = step_on(Elementwise, how)
        step.expect(10_000_000)
        data = data_of(given_rows, drop_last=False)
        for _ in range(10):
            for _ in step.run(iter(data)):
                pass
        assert step.engine.value == ("compiled" if how == engine else "eager"), step.engine.reason
        seen.append((step.spec.model.state_dict(), step.metrics.compute().loss))
        step.close()
    assert graphs.walked > 20
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(seen[2], seen[0], rtol=0, atol=0)


def test_a_walk_takes_other_columns_of_the_same_kind_alone() -> None:
    rows = rows_of_every_kind()
    data = data_of(in_columns(rows))
    traced = trace_walk(started(Elementwise, data), data)
    assert traced.take(data_of(in_columns(rows), seed=3))
    for name, other in {
        "ones": rows["ones"] * 2,  # has values
        "whole": rows["whole"] + 300,  # is wider
        "target": rows["target"].int(),
        "plain": rows["plain"][:-1],
    }.items():
        others = {**rows, name: other}
        shorter = {key: each[: len(other)] for key, each in others.items()}
        assert not traced.take(data_of(in_columns(shorter)))
    assert not traced.take(data_of(rows)), "nor plain tensors"
