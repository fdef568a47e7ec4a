"""The number of threads: what is chosen, what that may cost, and that measuring leaves no trace in the job."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fasttrain.step import timing
from fasttrain.step.timing import MOST_S, SHARE, ThreadChoice, candidates, choose_threads
from fasttrain.step.train_step import TrainStep
from tests.step.jobs import batches, everything, train_step

MANY = 1_000_000
DATA = batches(4)


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


class Machine:
    """Runs steps that do nothing but move its clock, by how many threads they have.

    Args:
        step_s: the seconds of a step, from its threads and the number of steps before it.

    Attributes:
        now: seconds.
        ran: the threads of each step, in order.
    """

    def __init__(self, step_s: Callable[[int, int], float]) -> None:
        self.now = 0.0
        self.ran: list[int] = []
        self._step_s = step_s

    def step(self, _: Any) -> None:
        self.now += self._step_s(torch.get_num_threads(), len(self.ran))
        self.ran.append(torch.get_num_threads())

    def choose(self, steps: int = MANY) -> ThreadChoice:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(timing, "EagerEngine", lambda *_: self)
            return choose_threads(train_step("eager").spec, DATA, steps=steps, clock=lambda: self.now)


def constant(times: dict[int, float]) -> Machine:
    return Machine(lambda count, _: times[count])


@given(st.integers(1, 300))
@settings(deadline=None)
def test_candidates_are_powers_of_two_and_all(most: int) -> None:
    found = candidates(most)
    assert (found[0], found[-1]) == (1, most)
    assert all(after == 2 * before for before, after in itertools.pairwise(found[:-1]))
    assert most <= 2 * found[-2] if most > 1 else found == [1]


@pytest.mark.parametrize(
    ("times", "count"),
    [
        ({1: 1.0, 2: 0.6, 4: 0.4}, 4),
        ({1: 1.0, 2: 0.6, 4: 0.9}, 2),
        ({1: 1.0, 2: 1.2, 4: 1.5}, 1),
        ({1: 1.0, 2: 0.98, 4: 0.98}, 1),
        ({1: 1.0, 2: 0.98, 4: 0.96}, 2),  # within 3% of the fastest, with fewer threads
        ({1: 1.0, 2: 1.3, 4: 0.5}, 4),
    ],
)
@pytest.mark.parametrize("scale", [1e-5, 1e-3, 0.3])
def test_the_fewest_threads_that_are_as_fast(times: dict[int, float], count: int, scale: float) -> None:
    chosen = constant({each: scale * seconds for each, seconds in times.items()}).choose()
    assert chosen.count == count
    told = [f"{scale * times[each] * 1e6:,.0f}" for each in (1, 2, 4)]
    assert chosen.reason.startswith(
        f"measured us a step: 1 thread {told[0]}, 2 threads {told[1]}, 4 threads {told[2]} "
    )


def test_a_gain_that_is_not_there_in_most_rounds_is_none() -> None:
    # Before the rounds come 11 steps; a round has 6. In three of five, two threads are faster by a tenth.
    def step_s(count: int, before: int) -> float:
        return 0.1 if count != 2 else 0.09 if before < 11 + 3 * 6 else 0.12

    assert Machine(step_s).choose().count == 1
    assert Machine(lambda count, _: 0.09 if count == 2 else 0.1).choose().count == 2


def test_what_is_hopeless_is_left_out_and_what_is_above_it_not_tried() -> None:
    machine = constant({1: 0.001, 2: 0.0021, 4: 0.0001})
    assert machine.choose() == ThreadChoice(
        count=1, reason="measured 1,000 us a step, and over 2 times that with 2 threads"
    )
    assert 4 not in machine.ran
    assert machine.ran.count(2) == 2  # two turns, each given up with the step that wakes the threads

    machine = constant({1: 1e-5, 2: 5e-4, 4: 1e-5})
    machine.choose(10 * MANY)
    assert machine.ran.count(2) <= 12  # of 200: a turn ends when it is past hope

    machine = constant({1: 0.001, 2: 0.0008, 4: 0.003})
    chosen = machine.choose()
    assert chosen.count == 2
    assert chosen.reason.endswith("; 4 threads over 2 times as long as one")


def test_one_interrupted_turn_is_not_hopeless() -> None:
    seen = []

    def step_s(count: int, _: int) -> float:
        seen.append(count)
        return 0.3 if count == 2 and seen.count(2) == 2 else 0.01 / count

    assert Machine(step_s).choose().count == 4


def test_rounds_alternate_and_are_about_even() -> None:
    machine = constant({1: 0.1, 2: 0.1, 4: 0.1})
    machine.choose()
    turns = machine.ran[-6 * 2 :: 2]
    assert turns in ([1, 2, 4, 4, 2, 1], [4, 2, 1, 1, 2, 4])


@pytest.mark.parametrize("steps", [0, 10, 3000])
def test_a_short_job_is_not_touched(steps: int) -> None:
    machine = constant({1: 1.0, 2: 0.5, 4: 0.2})
    chosen = machine.choose(steps)
    assert chosen.count == 1
    assert chosen.reason == f"not measured: the job is too short, with at most {steps:,} steps to come"
    assert machine.ran == []


def test_a_job_of_tiny_steps_needs_more_of_them() -> None:
    times = {1: 1e-5, 2: 5e-6, 4: 2e-6}
    machine = constant(times)
    assert "too short" in machine.choose(5000).reason
    assert len(machine.ran) <= SHARE * 5000
    assert machine.choose(500_000).count == 4


def test_a_machine_that_gets_slow_meanwhile_ends_the_measuring() -> None:
    def step_s(count: int, before: int) -> float:
        return 0.001 if before < 20 else 0.5 if count > 1 else 0.05

    machine = Machine(step_s)
    chosen = machine.choose(20_000)
    assert chosen == ThreadChoice(count=1, reason="not measured to the end: it took longer than 0.2 s")
    assert machine.now < 3.0


@given(
    one_s=st.floats(1e-5, 1.0), two=st.floats(0.1, 10.0), four=st.floats(0.1, 10.0), steps=st.integers(0, 10_000_000)
)
@settings(deadline=None, max_examples=40)
def test_a_choice_never_loses_and_measuring_is_bounded(one_s: float, two: float, four: float, steps: int) -> None:
    times = {1: one_s, 2: two * one_s, 4: four * one_s}
    machine = constant(times)
    chosen = machine.choose(steps)
    assert times[chosen.count] <= one_s
    most_s = max(MOST_S, SHARE * steps * one_s)
    assert machine.now <= most_s + 2 * max(timing.TURN_S, one_s) * 3 * 2 + 4 * max(times.values())


def test_torchs_own_count_is_the_most() -> None:
    torch.set_num_threads(2)
    machine = constant({1: 1.0, 2: 0.5})
    assert machine.choose().count == 2
    torch.set_num_threads(1)
    machine = constant({})
    assert machine.choose() == ThreadChoice(
        count=1, reason="torch has one here: there is one core, or OMP_NUM_THREADS is 1"
    )


def test_on_cuda_nothing_is_measured() -> None:
    spec = dataclasses.replace(train_step("eager").spec, device=torch.device("cuda"))
    assert choose_threads(spec, DATA, steps=MANY) == ThreadChoice(
        count=4, reason="torch's own: steps on cuda are not measured"
    )


def assert_same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, Tensor):
        assert torch.equal(found, wanted)
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert_same(found[key], value)
    else:
        assert found == wanted


@pytest.mark.parametrize("steps_before", [0, 3])
def test_measuring_leaves_the_job_as_it_was(steps_before: int) -> None:
    """Dropout draws random numbers, batch norm has buffers, AdamW has state: after it all as before, bit for bit."""
    step, untouched = train_step("eager"), train_step("eager")
    scheduler = torch.optim.lr_scheduler.ConstantLR(step.spec.optimizer, factor=1.0)
    for each in (step, untouched):
        torch.manual_seed(7)
        for batch in DATA[:steps_before]:
            each(batch)
    before, rng = everything(untouched), torch.get_rng_state()
    step.spec.model.eval()
    chosen = choose_threads(step.spec, DATA, steps=20_000)
    assert chosen.reason.startswith(("measured", "not measured to the end"))
    assert torch.get_num_threads() == 4
    assert not step.spec.model.training
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(parameter.grad is None for parameter in step.spec.trained())
    after = everything(step)
    after["optimizer"]["param_groups"][0].pop("initial_lr")  # the scheduler's
    assert_same(after, before)
    step.spec.model.train()
    losses = []
    for each in (step, untouched):
        torch.manual_seed(8)
        losses.append([each(batch).item() for batch in DATA])
    assert losses[0] == losses[1]
    scheduler.step()  # warns where it takes the copy's steps for none of the optimizer's


def test_threads_are_put_back_when_a_step_fails() -> None:
    def fails(model: nn.Module, batch: Any) -> Tensor:
        raise ValueError("no such batch")

    net = nn.Linear(6, 3)
    step = TrainStep(net, torch.optim.SGD(net.parameters()), fails, engine="eager")
    with pytest.raises(ValueError, match="no such batch"):
        choose_threads(step.spec, DATA, steps=MANY)
    assert torch.get_num_threads() == 4
