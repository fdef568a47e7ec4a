"""The core arms train what the textbook trains, each step of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fasttrain import DataError, EngineError
from fasttrain.measure.bench import arms
from fasttrain.measure.bench.arm import CHECKED_STEPS, EPOCHS, Arm
from fasttrain.measure.bench.arms import LoopArm, TextbookArm, TunedArm, endless
from fasttrain.measure.bench.losses import check_losses, running_means
from fasttrain.reference import TextbookDataset, train_epoch
from fasttrain.step import ladder, walk
from fasttrain.workloads.generate import generate_reviews
from fasttrain.workloads.job import Job
from fasttrain.workloads.mlp import mlp_job
from fasttrain.workloads.review_job import review_job
from fasttrain.workloads.tensor_job import TensorJob
from tests.step.fakes import Graphs, hasten

STEPS_IN_EPOCH = 7


def small_mlp() -> TensorJob:
    return mlp_job(torch.device("cpu"), 1_000)


def small_reviews() -> Job:
    return review_job(torch.device("cpu"), generate_reviews(1_500).table)


def run(arm: Arm, num_steps: int) -> int:
    steps = 0
    while steps < num_steps:
        steps += arm.step() or 1
    arm.sync()
    return steps


@pytest.fixture(scope="module", params=[small_mlp, small_reviews])
def job(request: pytest.FixtureRequest) -> Job:
    return request.param()


DROP_IN = partial(LoopArm, engine="auto", data="loader")
RECORD = partial(LoopArm, engine="auto", data="recorded")


@pytest.mark.parametrize(
    "make_arm",
    [TunedArm, partial(LoopArm, engine="eager"), DROP_IN, RECORD],
    ids=["tuned", "eager", "drop-in", "record"],
)
def test_arms_give_the_textbooks_losses_over_epochs(make_arm: Callable[[Job], Arm], job: Job) -> None:
    textbook, arm = TextbookArm(job), make_arm(job)
    for each in (textbook, arm):
        assert run(each, CHECKED_STEPS) == CHECKED_STEPS
    wanted, found = textbook.losses(), arm.losses()
    assert found is not None
    assert len(wanted) == len(found) == CHECKED_STEPS > 2 * STEPS_IN_EPOCH
    assert check_losses(running_means(found), running_means(wanted), job.tolerance) < job.tolerance


def test_the_textbook_arm_is_the_references_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "PASS_S", 0.0)
    job = small_mlp()
    model, optimizer, loss = job.textbook_model()
    for epoch in range(4):
        train_epoch(model, job.textbook_batches(job.order(epoch).tolist()), loss, optimizer)
    arm = TextbookArm(job)
    assert run(arm, 4 * STEPS_IN_EPOCH) == 4 * STEPS_IN_EPOCH
    assert weights(arm._model) == weights(model)


def weights(model: nn.Module) -> list[list[float]]:
    return [parameter.flatten().tolist() for parameter in model.parameters()]


def test_long_calls_train_as_many_steps_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "EPOCH_S", 1e9)
    arm = LoopArm(small_mlp(), engine="eager")
    run(arm, CHECKED_STEPS)
    assert arm.step() == STEPS_IN_EPOCH
    monkeypatch.setattr(arms, "EPOCH_S", 0.0)
    monkeypatch.setattr(arms, "PASS_S", 0.0)
    assert arm.step() == 1
    assert len(arm.losses()) == CHECKED_STEPS


def test_a_loop_arm_goes_on_within_a_long_epoch_and_over_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "EPOCH_S", 0.0)
    monkeypatch.setattr(arms, "PASS_S", 0.0)
    job = small_mlp()
    arm = LoopArm(job, engine="eager")
    run(arm, CHECKED_STEPS)
    steps = [arm.step() for _ in range(2 * STEPS_IN_EPOCH)]
    assert steps == [1] * len(steps)
    assert arm._loop.step.metrics.compute().loss == pytest.approx(trained(job, (0, 1, 2, 3, 4))[1], rel=1e-5)
    assert_trained_as(arm, job, epochs=(0, 1, 2, 3, 4))


@pytest.mark.parametrize("epoch_s", [0.0, 1e9], ids=["in parts", "whole"])
def test_a_loop_arm_begins_again_after_ten_epochs(epoch_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "EPOCH_S", epoch_s)
    monkeypatch.setattr(arms, "PASS_S", 0.0)
    job = small_mlp()
    arm = LoopArm(job, engine="eager")
    run(arm, CHECKED_STEPS)
    begun = weights(arm._loop.model)
    found = arm._loop.optimizer.state_dict()["state"][0]["step"].item()
    run(arm, EPOCHS * STEPS_IN_EPOCH)
    assert weights(arm._loop.model) != begun
    steps = arm.step()
    assert arm._loop.optimizer.state_dict()["state"][0]["step"].item() == found + steps


def test_a_loop_arm_trains_whole_epochs_after_the_checked_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "EPOCH_S", 1e9)
    job = small_mlp()
    arm = LoopArm(job, engine="eager")
    run(arm, CHECKED_STEPS + STEPS_IN_EPOCH)
    assert_trained_as(arm, job, epochs=(0, 1, 2, 3))


def trained(job: Job, epochs: Iterable[int]) -> tuple[nn.Module, float]:
    """The textbook's model after these epochs, and the last one's loss.

    The third ends where the checked steps do: it is not gone on with.
    """
    model, optimizer, loss = job.textbook_model()
    mean = 0.0
    for epoch in epochs:
        batches = job.textbook_batches(job.order(epoch).tolist())
        part = islice(batches, CHECKED_STEPS % STEPS_IN_EPOCH) if epoch == 2 else batches
        mean = train_epoch(model, part, loss, optimizer).loss
    return model, mean


def assert_trained_as(arm: LoopArm, job: Job, *, epochs: Iterable[int]) -> None:
    model, _ = trained(job, epochs)
    found = [parameter.detach() for parameter in arm._loop.model.parameters()]
    torch.testing.assert_close(found, [parameter.detach() for parameter in model.parameters()])


@pytest.mark.parametrize("epoch_s", [0.0, 1e9], ids=["in parts", "whole"])
def test_a_drop_in_trains_the_textbooks_own_batches(epoch_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "EPOCH_S", epoch_s)
    monkeypatch.setattr(arms, "PASS_S", 0.0)
    job = small_mlp()
    made: list[list[int]] = []
    plain = type(job).textbook_batches
    monkeypatch.setattr(type(job), "textbook_batches", lambda self, order: (made.append(order), plain(self, order))[1])
    arm = LoopArm(job, engine="eager", data="loader")
    run(arm, CHECKED_STEPS + STEPS_IN_EPOCH)
    assert made == [job.order(epoch).tolist() for epoch in range(4)]
    assert_trained_as(arm, job, epochs=(0, 1, 2, 3))


@pytest.mark.parametrize("epoch_s", [0.0, 1e9], ids=["in parts", "whole"])
@pytest.mark.parametrize("engine", ["eager", "auto"])
def test_a_recorded_loader_trains_the_textbooks_own_batches(
    engine: str, epoch_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder, "SETTLING_STEPS", 3)
    monkeypatch.setattr(arms, "EPOCH_S", epoch_s)
    monkeypatch.setattr(arms, "PASS_S", 0.0)
    job = small_mlp()
    arm = LoopArm(job, engine=engine, data="recorded")
    assert "took" not in arm.description
    run(arm, CHECKED_STEPS + STEPS_IN_EPOCH)
    assert "its model, Dataset and record(DataLoader); its first epoch, which records the rows" in arm.description
    assert " s in the first block; later epochs: resident, 1,000 recorded rows, on cpu" in arm.description
    assert_trained_as(arm, job, epochs=(0, 1, 2, 3))


def test_rows_of_a_recorded_arm_are_read_before_its_losses_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    job, read = small_reviews(), list[int]()
    plain = TextbookDataset.vectorize
    monkeypatch.setattr(TextbookDataset, "vectorize", lambda self, text: (read.append(1), plain(self, text))[1])
    arm = LoopArm(job, engine="eager", data="recorded")
    assert arm.step() == 1
    assert job.batch_size <= len(read) < job.num_rows
    arm.step()
    assert len(read) >= job.num_rows
    num_read, steps = len(read), run(arm, 3 * STEPS_IN_EPOCH)
    assert len(read) - num_read < steps * job.batch_size // 10, "a few are read again, to compare them"


@pytest.mark.parametrize(("data", "is_told"), [("loader", True), ("recorded", False)])
def test_a_loop_that_waits_for_its_loader_is_told_of_record(
    data: Any, is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = small_mlp()
    plain = TensorDataset.__getitem__
    monkeypatch.setattr(TensorDataset, "__getitem__", lambda self, row: (time.sleep(1e-4), plain(self, row))[1])
    arm = LoopArm(job, engine="eager", data=data)
    run(arm, CHECKED_STEPS)
    assert "record" not in arm.engine, "nothing is timed yet"
    run(arm, STEPS_IN_EPOCH)
    assert ("give the loop fasttrain.record(loader)" in arm.engine) == is_told


def test_auto_is_given_steps_to_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "SETTLING_STEPS", 3)
    monkeypatch.setattr(arms, "EPOCH_S", 0.0)
    monkeypatch.setattr(arms, "PASS_S", 0.0)
    job = small_mlp()
    arm, eager = LoopArm(job, engine="auto"), LoopArm(job, engine="eager")
    assert run(arm, CHECKED_STEPS) == run(eager, CHECKED_STEPS) == CHECKED_STEPS
    assert arm.losses() == eager.losses()  # the three are put back
    assert arm.step() == STEPS_IN_EPOCH <= ladder.MAX_EAGER_SPAN
    assert arm.engine.startswith("eager: ")
    assert arm.compile_s is None


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Graphs:
    """Programs that are taken up within some fifty steps, later than any loss is checked that eager gives.

    Those that walk over resident rows run four steps a call.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    hasten(monkeypatch)
    monkeypatch.setattr(ladder, "WARM_STEPS", 2 * CHECKED_STEPS)
    monkeypatch.setattr(ladder, "CALL_S", 1e9)
    for name in ("LEAST_STEPS", "MOST_STEPS"):
        monkeypatch.setattr(walk, name, 4)
    return Graphs(monkeypatch, tmp_path)


def auto_job() -> Job:
    return mlp_job(torch.device("cpu"), 20 * 128)


def test_what_auto_has_settled_on_gives_the_checked_losses(graphs: Graphs) -> None:
    job = auto_job()
    textbook, arm = TextbookArm(job), LoopArm(job, engine="auto")
    run(textbook, CHECKED_STEPS)
    assert arm.step() == 1
    parameters = [id(parameter) for parameter in arm._loop.model.parameters()]
    assert arm.step() == 4  # the first had been counted
    assert arm.engine.startswith("compiled: ")
    assert ", several steps a call, " in arm.engine
    assert len(arm.losses()) == 5  # from the start again
    walked = graphs.walked
    num_steps = run(arm, CHECKED_STEPS - len(arm.losses()))
    assert graphs.walked - walked == num_steps == CHECKED_STEPS - 5
    assert check_losses(running_means(arm.losses()), running_means(textbook.losses()), job.tolerance) < job.tolerance
    assert [id(parameter) for parameter in arm._loop.model.parameters()] == parameters


@pytest.mark.parametrize("data", ["resident", "recorded", "loader"])
def test_a_program_of_autos_that_gives_wrong_numbers_is_not_timed(data: Any, graphs: Graphs) -> None:
    def spoil(losses: Tensor) -> Tensor:
        """Right where it is verified."""
        return losses * 1.01 if graphs.replayed > 1 else losses

    graphs.spoil = spoil
    job = auto_job()
    textbook, arm = TextbookArm(job), LoopArm(job, engine="auto", data=data)
    for each in (textbook, arm):
        run(each, CHECKED_STEPS)
    assert (graphs.walked == 0) == (data == "loader")
    assert graphs.replayed > CHECKED_STEPS
    with pytest.raises(DataError, match="leave the reference's"):
        check_losses(running_means(arm.losses()), running_means(textbook.losses()), job.tolerance)


def test_a_job_is_put_back_with_its_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "SETTLING_STEPS", 3)
    job = replace(small_mlp(), network=lambda: nn.Sequential(nn.Linear(64, 10), nn.Dropout(0.5), nn.BatchNorm1d(10)))
    found: list[list[float]] = []
    for engine in ("eager", "auto"):
        torch.manual_seed(7)
        arm = LoopArm(job, engine=engine)
        run(arm, CHECKED_STEPS)
        found.append(arm.losses())
    assert found[0] == found[1]


@pytest.mark.parametrize("make_arm", [TextbookArm, TunedArm])
def test_no_data_are_made_in_the_first_step(make_arm: Callable[[Job], Arm], monkeypatch: pytest.MonkeyPatch) -> None:
    job = review_job(torch.device("cpu"), generate_reviews(300).table)
    made: list[str] = []
    of_frame, repeat = TextbookDataset.from_dataframe, np.repeat
    monkeypatch.setattr(TextbookDataset, "from_dataframe", lambda table: (made.append("textbook"), of_frame(table))[1])
    monkeypatch.setattr(arms.np, "repeat", lambda *given: (made.append("one-hot rows"), repeat(*given))[1])
    arm = make_arm(job)
    assert len(made) == 1
    arm.step()
    assert len(made) == 1


def test_graphs_need_a_gpu() -> None:
    with pytest.raises(EngineError, match="CUDA graphs need a CUDA device"):
        LoopArm(small_mlp(), engine="graphed")


def test_endless_batches_go_from_epoch_to_epoch() -> None:
    batches = small_mlp().batches()
    found = list(islice(endless(batches), 2 * STEPS_IN_EPOCH + 1))
    assert batches.epoch == 3
    assert not torch.equal(found[0][0], found[STEPS_IN_EPOCH][0])
