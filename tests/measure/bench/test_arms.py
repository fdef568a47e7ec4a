"""The core arms train what the textbook trains, each step of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice

import pytest
import torch
from torch import nn

from fasttrain import EngineError
from fasttrain.measure.bench import arms
from fasttrain.measure.bench.arm import CHECKED_STEPS, Arm
from fasttrain.measure.bench.arms import LoopArm, TextbookArm, TunedArm, endless
from fasttrain.measure.bench.block import check_losses, running_means
from fasttrain.reference import train_epoch
from fasttrain.workloads.generate import generate_reviews
from fasttrain.workloads.job import Job
from fasttrain.workloads.mlp import mlp_job
from fasttrain.workloads.review_job import review_job

STEPS_IN_EPOCH = 7


def small_mlp() -> Job:
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


@pytest.mark.parametrize("make_arm", [TunedArm, partial(LoopArm, engine="eager")], ids=["tuned", "eager"])
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
    monkeypatch.setattr(arms, "PASS_S", 1e9)
    arm = LoopArm(small_mlp(), engine="eager")
    run(arm, CHECKED_STEPS)
    assert arm.step() == STEPS_IN_EPOCH
    monkeypatch.setattr(arms, "PASS_S", 0.0)
    assert arm.step() == 1
    assert len(arm.losses()) == CHECKED_STEPS


def test_a_loop_arm_trains_whole_epochs_after_the_checked_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "PASS_S", 1e9)
    job = small_mlp()
    arm = LoopArm(job, engine="eager")
    run(arm, CHECKED_STEPS + STEPS_IN_EPOCH)
    model, optimizer, loss = job.textbook_model()
    for epoch in (0, 1, 2, 3):  # the checked steps end early in the third epoch, which is not gone on with
        batches = islice(job.textbook_batches(job.order(epoch).tolist()), CHECKED_STEPS % STEPS_IN_EPOCH or None)
        whole = job.textbook_batches(job.order(epoch).tolist())
        train_epoch(model, batches if epoch == 2 else whole, loss, optimizer)
    found = [parameter.detach() for parameter in arm._loop.model.parameters()]
    torch.testing.assert_close(found, [parameter.detach() for parameter in model.parameters()])


def test_auto_is_given_steps_to_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "MAX_SETTLING_STEPS", 3)
    monkeypatch.setattr(arms, "PASS_S", 0.0)
    arm = LoopArm(small_mlp(), engine="auto")
    run(arm, CHECKED_STEPS)
    assert [arm.step(), arm.step()] == [3 + 1, 1]
    assert arm.engine.startswith("eager: ")
    assert arm.compile_s is None


def test_graphs_need_a_gpu() -> None:
    with pytest.raises(EngineError, match="CUDA graphs need a CUDA device"):
        LoopArm(small_mlp(), engine="graphed")


def test_endless_batches_go_from_epoch_to_epoch() -> None:
    batches = small_mlp().batches()
    found = list(islice(endless(batches), 2 * STEPS_IN_EPOCH + 1))
    assert batches.epoch == 3
    assert not torch.equal(found[0][0], found[STEPS_IN_EPOCH][0])
