"""A step that walks over resident data: what it gives, what it holds for, what it is refused for, and how it fails.

The first part runs the graph, uncompiled and in double precision; the last part compiles it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.data.batch import num_samples
from fasttrain.data.ragged import Ragged
from fasttrain.data.resident import ResidentBatches, resident
from fasttrain.errors import EngineError
from fasttrain.step import walk as module
from fasttrain.step.build import GraphJob
from fasttrain.step.eager import EagerEngine
from fasttrain.step.program import compile_graph
from fasttrain.step.spec import StepSpec
from fasttrain.step.torch_private.native import NativeLoop
from fasttrain.step.trace import Mismatch, trace_step
from fasttrain.step.train_step import TrainStep
from fasttrain.step.walk import StepsFailedError, TracedWalk, WalkingProgram
from tests.step.models import ASKED, CASES, OPTIMIZERS, assert_same, make, with_forward
from tests.step.spans import ROWS, columns_of, data_of, first_batch, run_walk, taken, trace_walk

pytestmark = pytest.mark.usefixtures("in_double")

MLP = CASES["mlp"]


def started_on(data: ResidentBatches, make_spec: Callable[[], StepSpec]) -> StepSpec:
    """A step whose optimizer has made its state."""
    spec = make_spec()
    torch.manual_seed(11)
    EagerEngine(spec, ASKED).step(first_batch(data))
    return spec


def walk_agrees(make_spec: Callable[[], StepSpec], data: ResidentBatches, steps: int = 3) -> None:
    """Two spans of an epoch by the walking graph, and eager steps on the same batches, at another rate in the second.

    The last batch of the epoch is left to an eager step.
    """
    spec, eager_spec = (started_on(data, make_spec) for _ in range(2))
    random_state = torch.get_rng_state()
    traced = trace_walk(spec, data)
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
        found = run_walk(traced, span)
        assert torch.equal(torch.get_rng_state(), after), "the graph draws other random numbers"
        random_state = after
        assert len(set(found.tolist())) == steps
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
        assert_same(spec, eager_spec)
    assert [num_samples(batch) for batch in epoch] == [5]


@pytest.mark.parametrize("optimizer", ["adam", "sgd-momentum"])
@pytest.mark.parametrize("name", ["mlp", "dropout", "gru"])
def test_steps_on_rows_of_equal_length(name: str, optimizer: str) -> None:
    walk_agrees(lambda: make(CASES[name], OPTIMIZERS[optimizer]), data_of(CASES[name]))


@pytest.mark.parametrize("shuffle", [True, False])
def test_buffers_go_from_step_to_step(shuffle: bool) -> None:
    """Batch norm: its averages, and its count of batches. There is a convolution, too: large steps may walk."""
    walk_agrees(lambda: make(CASES["cnn"], OPTIMIZERS["adam"]), data_of(CASES["cnn"], shuffle=shuffle))


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.1}])
def test_sums_of_rows_are_taken_of_the_whole_table(options: dict[str, Any]) -> None:
    data = data_of(CASES["sparse"])
    walk_agrees(lambda: make(CASES["sparse"], OPTIMIZERS["adam"], **options), data)
    traced = trace_walk(started_on(data, lambda: make(CASES["sparse"], OPTIMIZERS["adam"])), data)
    calls = [node for node in traced.parts[0].graph.graph.nodes if node.op == "call_function"]
    ours = [node for node in calls if str(node.target).startswith("fasttrain.")]
    assert [str(node.target) for node in ours] == ["fasttrain.sum_rows.default", "fasttrain.spread_rows.default"]
    assert all("chosen" in node.kwargs for node in ours)


def named_forward(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    logits = model(batch["numbers"])
    return F.cross_entropy(logits, batch["class"]) + batch["more"].square().mean(), logits, batch["class"]


def test_batches_with_names_and_a_column_that_no_gradient_comes_from() -> None:
    numbers, classes = columns_of(MLP)
    named = {"more": torch.linspace(0, 3, len(classes)), "class": classes, "numbers": numbers}
    data = resident(named, batch_size=5, device="cpu")
    walk_agrees(lambda: with_forward(make(MLP, OPTIMIZERS["adam"]), named_forward), data)


def test_tensors_that_forward_closes_over_are_read_by_each_step() -> None:
    weights, shift = torch.tensor([0.2, 0.5, 0.3]), torch.randn(4)

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x + shift), y, weights) * torch.tensor(2.0)

    def make_spec() -> StepSpec:
        return with_forward(make(MLP, OPTIMIZERS["adam"]), forward)

    walk_agrees(make_spec, data_of(MLP))
    data = data_of(MLP)
    traced = trace_walk(started_on(data, make_spec), data)
    epoch = iter(data)
    run_walk(traced, taken(epoch, 2))
    shift.mul_(3.0)  # not as it was when it was traced
    spec = started_on(data, make_spec)
    spec.model.load_state_dict(traced.spec.model.state_dict())
    spec.optimizer.load_state_dict(copy.deepcopy(traced.spec.optimizer.state_dict()))
    eager, span = EagerEngine(spec, ASKED), taken(epoch, 2)
    wanted = torch.stack([eager.step(batch) for batch in span.batches()])
    torch.testing.assert_close(run_walk(traced, span), wanted, rtol=1e-10, atol=1e-12)


def test_two_columns_of_rows_of_unequal_length() -> None:
    bags, targets = columns_of(CASES["sparse"])
    others = Ragged.of_lengths(bags.values.flip(0), bags.offsets.diff().flip(0))
    data = resident(bags, targets, others, batch_size=5, device="cpu")

    def forward(model: nn.Module, batch: tuple[Ragged, Tensor, Ragged]) -> Tensor:
        first, target, second = batch
        return F.binary_cross_entropy_with_logits(model(first) - 0.5 * model(second), target.double())

    walk_agrees(lambda: with_forward(make(CASES["sparse"], OPTIMIZERS["adam"]), forward), data)


# What it holds for.


def of_mlp(data: ResidentBatches | None = None, **options: Any) -> TracedWalk:
    data = data or data_of(MLP)
    return trace_walk(started_on(data, lambda: make(MLP, OPTIMIZERS["adam"], **options)), data)


def why_not(traced: TracedWalk, data: ResidentBatches) -> str:
    found = traced.inputs(data, traced.new_state())
    assert isinstance(found, Mismatch)
    return found.reason


def test_it_holds_for_its_own_data_alone() -> None:
    data = data_of(MLP)
    traced = of_mlp(data)
    assert not isinstance(traced.inputs(data, traced.new_state()), Mismatch)
    assert why_not(traced, data_of(MLP)) == "the resident data"


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
    if name == "a setting":
        with pytest.raises(EngineError, match="forward reads the batch in another way than when it was traced"):
            TracedWalk(traced.step, batch, data)
    else:
        assert reason in why_not(TracedWalk(traced.step, batch, data), data), "nor does one that is made now hold"


def test_state_that_was_loaded_is_taken_up_with_the_step() -> None:
    data = data_of(MLP)
    traced = of_mlp(data)
    traced.spec.optimizer.load_state_dict(traced.spec.optimizer.state_dict())
    assert traced.step.rebind()
    before = [tensor.clone() for tensor in traced.step.tensors]
    run_walk(traced, taken(iter(data), 2))
    assert not any(map(torch.equal, before, traced.step.tensors))


def embedded(model: nn.Module, batch: tuple[Ragged, Tensor]) -> Tensor:
    bags, targets = batch
    fc1: Any = model.fc1
    rows = F.embedding(bags.values, fc1.weight.view(-1, 1)).view(-1)
    return (torch.segment_reduce(rows, "sum", offsets=bags.offsets, unsafe=True) - targets).square().sum()


def by_lengths(model: nn.Module, batch: tuple[Ragged, Tensor]) -> Tensor:
    bags, targets = batch
    return F.mse_loss(model(bags) / bags.offsets.diff(), targets.double())


@pytest.mark.parametrize("forward", [embedded, by_lengths])
def test_rows_of_unequal_length_that_are_not_summed_alone_are_refused(forward: Callable[..., Any]) -> None:
    data = data_of(CASES["sparse"])
    spec = started_on(data, lambda: with_forward(make(CASES["sparse"], OPTIMIZERS["adam"]), forward))
    with pytest.raises(EngineError, match="rows of unequal length are used otherwise than by sums"):
        trace_walk(spec, data)


def test_batches_that_are_not_what_the_columns_give_are_refused() -> None:
    data = data_of(MLP)
    traced, batch = of_mlp(data).step, first_batch(data)
    numbers, classes = columns_of(MLP)
    others = {
        "dtype": (numbers.float(), classes),
        "shape": (numbers[:, :3], classes),
        "order": (classes, numbers),
        "fewer columns": (numbers,),
    }
    for columns in others.values():
        with pytest.raises(EngineError, match="other tensors than the columns"):
            TracedWalk(traced, batch, resident(*columns, batch_size=5, device="cpu"))
    with pytest.raises(EngineError, match="other tensors than the columns"):
        TracedWalk(traced, batch, data_of(MLP, batch_size=4))


def test_a_step_that_is_more_than_one_graph_is_refused() -> None:
    with pytest.raises(EngineError, match="one graph does not hold the whole step"):
        of_mlp(accumulate=2)


@pytest.mark.parametrize(("rows", "steps"), [(1, 1024), (1024, 1024), (4096, 256), (1 << 16, 64)])
def test_the_order_of_large_batches_holds_fewer_of_them(rows: int, steps: int) -> None:
    data = resident(torch.zeros(rows, 4), torch.zeros(rows, dtype=torch.int64), batch_size=rows, device="cpu")
    spec = make(MLP, OPTIMIZERS["adam"])
    batch = next(iter(data))
    EagerEngine(spec, ASKED).step(batch)
    traced = TracedWalk(trace_step(spec, batch), batch, data)
    assert traced.most_steps == steps
    assert [each.shape for each in traced.new_state()] == [(steps, rows), (1,), (steps,)]


def test_a_child_is_sent_the_graph_that_walks() -> None:
    traced = of_mlp()
    job = GraphJob.of(traced.parts[0])
    assert job.graph is traced.parts[0].graph
    assert job.spelled_out() is job, "there is nothing to spell out for a CPU"


# What is compiled.


@cache
def package_of(kind: str, folder: Path) -> Path:
    """Compiled once for all tests of a session."""
    data, spec = job_of(kind)
    [part] = trace_walk(spec, data).parts
    package = folder / f"{kind}.pt2"
    compile_graph(part.graph, part.kinds, part.open_dims, package)
    return package


def near_one(model: nn.Module, batch: tuple[Ragged]) -> Tensor:
    return (model(batch[0]) - 1.0).square().mean()


def job_of(kind: str) -> tuple[ResidentBatches, StepSpec]:
    """Of rows of equal length, with random numbers and ids; or of unequal length."""
    if kind == "sparse":  # no other column, whose gather would raise for rows
        data = resident(columns_of(CASES["sparse"])[0], batch_size=ROWS, device="cpu", seed=9)
        return data, started_on(data, lambda: with_forward(make(CASES["sparse"], OPTIMIZERS["adam"]), near_one))
    data = resident(torch.arange(35) % 10, torch.arange(35) % 3, batch_size=ROWS, device="cpu", seed=9)
    return data, started_on(data, words)


def words() -> StepSpec:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4), nn.Dropout(0.3), nn.Linear(4, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return TrainStep(model, optimizer, loss=F.cross_entropy, engine="eager").spec


LOOPS = ["C", "Python"]


@pytest.fixture
def programs(tmp_path_factory: pytest.TempPathFactory, own_programs: Path) -> Callable[[str], Path]:
    folder = tmp_path_factory.getbasetemp() / "walks"
    folder.mkdir(exist_ok=True)
    return lambda kind: package_of(kind, folder)


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What calls the steps."""
    if request.param == "Python":
        monkeypatch.setattr(module, "native_loop", lambda _: None)
    return request.param


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_program_gives_eagers_numbers(kind: str, loop: str, programs: Callable[[str], Path]) -> None:
    (data, spec), (_, eager_spec) = job_of(kind), job_of(kind)
    program = WalkingProgram([programs(kind)], trace_walk(spec, data))
    assert isinstance(program._loop, NativeLoop) == (loop == "C")
    eager, epoch = EagerEngine(eager_spec, ASKED), iter(data)
    kept: list[tuple[Tensor, Tensor]] = []
    for steps in (1, 4, 2):
        span, random_state = taken(epoch, steps), torch.get_rng_state()
        wanted = torch.stack([eager.step(batch) for batch in span.batches()])
        torch.set_rng_state(random_state)
        found = program.run(span)
        assert isinstance(found, Tensor)
        kept.append((found, wanted))
        assert_same(spec, eager_spec)
    for found, wanted in kept:  # a later call leaves them as they are
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert program.run(taken(iter(data_of(MLP)), 1)) == Mismatch("the resident data")


def test_two_programs_of_one_package_share_nothing(programs: Callable[[str], Path]) -> None:
    (data, spec), (_, other) = job_of("dense"), job_of("dense")
    first, second = (WalkingProgram([programs("dense")], trace_walk(each, data)) for each in (spec, other))
    for _ in range(3):
        losses: list[Any] = []
        for program in (first, second):
            torch.manual_seed(3)
            losses.append(program.run(taken(iter(data_of_epoch(data)), 5)))
        assert torch.equal(*losses)
    assert_same(spec, other)


def data_of_epoch(data: ResidentBatches) -> ResidentBatches:
    data.set_epoch(0)
    return data


def test_an_index_out_of_range_is_pytorchs_own_error(loop: str, programs: Callable[[str], Path]) -> None:
    data, spec = job_of("dense")
    traced = trace_walk(spec, data)
    program = WalkingProgram([programs("dense")], traced)
    span = taken(iter(data), 5)
    before = program.run(span)
    assert isinstance(before, Tensor)
    data.columns[0].tables[0][span.rows[3 * ROWS + 1]] = 10
    with pytest.raises(IndexError, match=r"^index out of range in self$") as caught:
        program.run(span)
    assert caught.value.__suppress_context__
    assert program._state.cursor.tolist() == [3], "so many steps were done"


@pytest.mark.parametrize("at", [0, 2])
def test_any_other_error_tells_how_many_steps_are_done(at: int, loop: str, programs: Callable[[str], Path]) -> None:
    """Rows, and the offsets of rows, that are out of range raise in the loops of sums; so do ids.

    In memory, what is before and after the offsets looks like offsets, too: rows are not refused for what they lead to.
    """
    data, spec = job_of("sparse")
    program = WalkingProgram([programs("sparse")], trace_walk(spec, data))
    [column] = data.columns
    bags = Ragged(*column.tables)
    span = taken(iter(data), 4)
    row = int(span.rows[at * ROWS])
    rows = span.rows.tolist()
    for tensor, place, value in (
        (span.rows, at * ROWS, data.num_rows),
        (span.rows, at * ROWS + 2, -1),
        (bags.offsets, row, -1),
        (bags.offsets, row + 1, 10_000),
    ):
        kept = tensor[place].clone()
        tensor[place] = value
        spoilt = [rows.index(each) // ROWS for each in (place - 1, place) if each in rows]
        done = at if tensor is span.rows else min(spoilt)
        with pytest.raises(StepsFailedError, match=f"after {done} of the 4 steps of this call; .* not to be trusted"):
            program.run(span)
        tensor[place] = kept
    for value in (9, -1):  # ids, which PyTorch has an error of its own for
        entry = int(bags.offsets[row])
        kept = bags.values[entry].clone()
        bags.values[entry] = value
        with pytest.raises(IndexError):
            program.run(span)
        bags.values[entry] = kept
    assert isinstance(program.run(span), Tensor), "the program itself is as it was"
