"""What the user turns on around the training, and errors that PyTorch would raise: with compiled steps as without."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain import FastLoop, resident
from tests.step.fakes import GraphProgram, Graphs

pytestmark = pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected")


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids).mean(1))


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randint(0, 10, (8, 3), generator=generator), torch.randint(0, 3, (8,), generator=generator))
        for _ in range(16)
    ]


def running_by_program(engine: str, graphs: Graphs, batches: Any) -> FastLoop:
    torch.manual_seed(0)
    model = Words()
    loop = FastLoop(model, torch.optim.SGD(model.parameters(), lr=0.1), loss=F.cross_entropy, engine=engine)
    loop.step.expect(1_000_000)
    loop.train(batches)
    loop.train(batches)
    assert graphs.replayed
    graphs.replayed = 0
    return loop


@pytest.mark.parametrize("engine", ["auto", "compiled"])
def test_anomaly_detection_has_steps_run_eagerly_meanwhile(engine: str, graphs: Graphs, hasty: None) -> None:
    loop = running_by_program(engine, graphs, data())
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        result = loop.train(data())
        assert (result.engine, graphs.replayed) == ("eager", 0)
        assert loop.step.engine.reason.startswith("torch.autograd.set_detect_anomaly is on")
        with torch.no_grad():
            loop.model.get_parameter("head.weight")[0] = float("nan")
        with pytest.raises(RuntimeError, match="returned nan values"):
            loop.train(data())
    with torch.no_grad():
        loop.model.get_parameter("head.weight")[0] = 0.0
    result = loop.train(data())
    assert result.engine == "compiled"
    assert graphs.replayed == len(data())


@pytest.mark.parametrize("engine", ["auto", "compiled"])
def test_anomaly_detection_has_resident_rows_taken_by_eager_steps(engine: str, graphs: Graphs, hasty: None) -> None:
    columns = [torch.cat(each) for each in zip(*data(), strict=True)]
    batches = resident(*columns, batch_size=8, device="cpu")
    loop = running_by_program(engine, graphs, batches)
    assert graphs.walked
    walked, span = graphs.walked, iter(batches).take(4)
    assert span is not None
    with torch.autograd.set_detect_anomaly(True):
        losses = loop.step.steps(span)
        assert loop.train(batches).engine == "eager"
    assert losses.shape == (4,)
    assert (graphs.replayed, graphs.walked) == (0, walked)
    assert loop.train(batches).engine == "compiled"
    assert graphs.replayed in (len(data()), 2 * len(data())), "16 steps in one call may be compared with single ones"


def failing(message: str) -> Any:
    def fail(*_: Any) -> Tensor:
        raise RuntimeError(message)

    return fail


OUT_OF_RANGE = "index out of bounds: 0 <= tmp2 < 10L\nExpected idx_int to be true\n" + "frame\n" * 30


@pytest.mark.parametrize("engine", ["auto", "compiled"])
def test_an_index_out_of_range_is_pytorchs_own_error(
    engine: str, graphs: Graphs, hasty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = running_by_program(engine, graphs, data())
    monkeypatch.setattr(GraphProgram, "run", failing(OUT_OF_RANGE))
    with pytest.raises(IndexError, match=r"^an index in the batch, such as an id .* is out of range$"):
        loop.train(data())  # of which only the program says so
    (ids, targets), *_ = data()
    bad = ids.clone()
    bad[0, 0] = 10
    with pytest.raises(IndexError, match=r"^index out of range in self$") as caught:
        loop.train([(bad, targets)])
    assert caught.value.__suppress_context__
    lines = [str(entry.statement).strip() for entry in caught.traceback if str(entry.path) == __file__]
    assert lines[-1] == "return self.head(self.embedding(ids).mean(1))", "the user's own line"


def test_other_errors_of_a_program_stay_as_they_are(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = running_by_program("compiled", graphs, data())
    monkeypatch.setattr(GraphProgram, "run", failing("something else"))
    with pytest.raises(RuntimeError, match=r"^something else$"):
        loop.train(data())


weight: Any = 1.0


def weighted(model: nn.Module, batch: Any) -> Tensor:
    ids, targets, factor = batch
    return (weight * factor * F.cross_entropy(model(ids), targets, reduction="none")).mean()


@pytest.mark.parametrize("where", ["global", "batch"])
def test_a_number_that_becomes_a_tensor_is_noticed(
    where: str, graphs: Graphs, hasty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = torch.linspace(0.0, 1.0, 8)
    losses: list[list[float]] = []
    for engine in ("eager", "compiled"):
        monkeypatch.setattr(f"{__name__}.weight", 1.0)
        torch.manual_seed(0)
        model = Words()
        loop = FastLoop(model, torch.optim.SGD(model.parameters(), lr=0.1), weighted, engine=engine)
        losses.append([loop.train([(*batch, 1.0) for batch in data()]).loss])
        if where == "global":
            monkeypatch.setattr(f"{__name__}.weight", many)
        losses[-1].append(loop.train([(*batch, many if where == "batch" else 1.0) for batch in data()[:8]]).loss)
    assert graphs.replayed
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][1] != pytest.approx(losses[0][0], rel=0.1)


@pytest.mark.parametrize("engine", ["auto", "compiled"])
def test_a_loop_can_be_copied_before_and_after_it_is_compiled(engine: str, graphs: Graphs, hasty: None) -> None:
    loop = running_by_program(engine, graphs, data())
    other = copy.deepcopy(loop)
    assert other.step.compile_s is None, "programs are not copied"
    results = [other.train(data()).loss, other.train(data()).loss]
    assert other.step.engine.value == "compiled"
    wanted = [loop.train(data()).loss, loop.train(data()).loss]
    assert results == pytest.approx(wanted, rel=1e-5)
