"""The plan of a benchmark, over processes that are made up."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain import ConfigError, FasttrainError
from fasttrain.measure.bench.plan import ArmSpec, BenchPlan, log_ratios, measured_noise, orders, run_bench
from fasttrain.measure.bench.record import BenchRecord
from fasttrain.measure.bench.task import BlockResult, BlockTask
from fasttrain.measure.verdict.stats import Noise
from tests.measure.bench.bench_fakes import ENVIRONMENT, FakeMachine, FakeRunner, arm, figures


def plan(*sources: str, **changes: Any) -> BenchPlan:
    arms = tuple(ArmSpec(label=source, source=source, threads=1) for source in sources)
    return BenchPlan(**{"workload": "mlp", "device": "cpu", "arms": arms, "blocks": 3, **changes})


def run(wanted: BenchPlan, runner: Any, machine: FakeMachine | None = None) -> tuple[BenchRecord, bool]:
    about: dict[str, Any] = {"environment": ENVIRONMENT, "command": "bench", "created": "now"}
    return run_bench(wanted, runner, machine or FakeMachine(), lambda _: None, **about)


def test_every_arm_runs_once_a_block_against_the_references_losses() -> None:
    runner = FakeRunner({"eager": [1e-3, 2e-3, 3e-3], "tuned": [5e-4]})
    record, is_interrupted = run(plan("eager", "tuned"), runner)
    assert not is_interrupted
    assert [each.step_s for each in record.arms["eager"].blocks] == [1e-3, 2e-3, 3e-3]
    assert [each.block for each in record.arms["tuned"].blocks] == [0, 1, 2]
    reference, *timed = runner.tasks
    assert (reference.source, reference.reference) == ("textbook", None)
    assert [task.block for task in timed] == [0, 0, 1, 1, 2, 2]
    assert [task.position for task in timed] == [0, 1] * 3
    assert {task.reference for task in timed} == {(0.7, 0.6)}
    assert record.workload == {"name": "mlp"}
    assert record.design.blocks == 3


@given(num_blocks=st.integers(1, 20), seed=st.integers(0, 10**6))
@settings(deadline=None)
def test_the_order_is_a_permutation_in_each_block(num_blocks: int, seed: int) -> None:
    labels = ["a", "b", "c", "d"]
    first, second = (list(itertools.islice(orders(labels, seed), num_blocks)) for _ in range(2))
    assert all(sorted(order) == labels for order in first)
    assert first == second


def test_the_order_varies() -> None:
    assert len({tuple(order) for order in itertools.islice(orders(["a", "b", "c"], 0), 50)}) == 6


def test_an_arm_that_is_refused_is_not_timed_and_said_to_be() -> None:
    runner = FakeRunner({"eager": [1e-3], "jax": [BlockResult(refused="jax is not installed")]})
    record, _ = run(plan("eager", "jax"), runner)
    assert list(record.arms) == ["eager"]
    assert record.refused == {"jax": "jax is not installed"}
    assert [task.source for task in runner.tasks].count("jax") == 1


def test_an_arm_that_is_refused_late_is_not_kept() -> None:
    runner = FakeRunner({"eager": [1e-3], "odd": [1e-3, BlockResult(refused="its losses leave")]})
    record, _ = run(plan("eager", "odd"), runner)
    assert list(record.arms) == ["eager"]
    assert record.refused == {"odd": "in block 2: its losses leave"}


def test_a_flagged_block_is_repeated_and_kept_beside() -> None:
    runner = FakeRunner({"eager": [1e-3, 2e-3, 3e-3, 4e-3]})
    record, _ = run(plan("eager"), runner, FakeMachine(("load",)))
    found = record.arms["eager"]
    assert [each.step_s for each in found.blocks] == [2e-3, 3e-3, 4e-3]
    assert [each.repeats for each in found.blocks] == [1, 0, 0]
    assert [(each.step_s, each.flags) for each in found.repeated] == [(1e-3, ("load",))]


def test_a_block_that_stays_flagged_is_kept_with_its_flag() -> None:
    runner = FakeRunner({"eager": [1e-3]})
    record, _ = run(plan("eager", blocks=1), runner, FakeMachine(*[("load", "throttled")] * 9))
    (found,) = record.arms["eager"].blocks
    assert (found.flags, found.repeats) == (("load", "throttled"), 2)
    assert len(record.arms["eager"].repeated) == 2


def test_an_arms_own_threads_count_as_load() -> None:
    machine = FakeMachine()
    specs = (ArmSpec(label="one", source="eager", threads=1), ArmSpec(label="four", source="eager", threads=4))
    run(plan("x", arms=specs, blocks=1), FakeRunner({"eager": [1e-3]}), machine)
    assert sorted(wanted or 0 for wanted in machine.wanted) == [2 + 1, 2 + 4]


def test_what_a_process_says_of_itself_is_a_flag_too() -> None:
    waited = BlockResult(figures=figures(0, 9.0, flags=("waited",)), tolerance=1e-5)
    record, _ = run(plan("eager", blocks=1), FakeRunner({"eager": [waited, 1e-3]}), FakeMachine(("load",)))
    assert [each.step_s for each in record.arms["eager"].blocks] == [1e-3]
    assert record.arms["eager"].repeated[0].flags == ("waited", "load")


def test_a_process_that_dies_once_is_repeated() -> None:
    runner = FakeRunner({"eager": [BlockResult(died="exit code -9"), 1e-3]})
    record, _ = run(plan("eager", blocks=1), runner)
    assert record.arms["eager"].blocks[0].repeats == 1


def test_an_arm_that_keeps_dying_is_refused() -> None:
    runner = FakeRunner({"eager": [1e-3], "mine": [BlockResult(died="ValueError: a bug")]})
    record, _ = run(plan("eager", "mine"), runner)
    assert record.refused == {"mine": "its process died 3 times: ValueError: a bug"}
    assert [task.source for task in runner.tasks].count("mine") == 3


def test_what_an_arm_gave_before_it_died_stands() -> None:
    died = BlockResult(died="killed")
    runner = FakeRunner({"eager": [1e-3], "mine": [2e-3, died, died, died]})
    record, _ = run(plan("eager", "mine"), runner)
    assert [each.block for each in record.arms["mine"].blocks] == [0]
    assert record.notes == ("mine: takes no part from block 2 on: its process died 3 times: killed",)


STEADY, ERRATIC = [1e-3], [1e-3, 2e-3, 5e-4]


@pytest.mark.parametrize(
    ("changes", "second", "blocks", "is_extended"),
    [
        ({"against": "eager"}, ERRATIC, 14, True),
        ({"against": "eager"}, STEADY, 7, False),
        ({}, ERRATIC, 7, False),
        ({"extend": True}, STEADY, 14, True),
        ({"against": "eager", "noise": Noise(floor=9.0, smallest_effect=9.0, pairs=10)}, ERRATIC, 7, False),
    ],
)
def test_the_extension_is_made_where_the_question_is_open(
    changes: dict[str, Any], second: list[float], blocks: int, is_extended: bool
) -> None:
    runner = FakeRunner({"eager": [1e-3], "tuned": second})
    record, _ = run(plan("eager", "tuned", blocks=7, **changes), runner)
    assert record.design.extended == is_extended
    assert len(record.arms["eager"].blocks) == len(record.arms["tuned"].blocks) == blocks


@pytest.mark.parametrize(("planned", "made"), [(300, 500), (500, 500)])
def test_no_more_blocks_are_measured_than_can_be_judged(planned: int, made: int) -> None:
    record, _ = run(plan("eager", blocks=planned, extend=True), FakeRunner({"eager": STEADY}))
    assert len(record.arms["eager"].blocks) == made
    assert record.design.extended == (made > planned)


def test_an_interrupt_keeps_what_was_reached() -> None:
    class Interrupting(FakeRunner):
        def __call__(self, task: BlockTask) -> BlockResult:
            if task.block == 2:
                raise KeyboardInterrupt
            return super().__call__(task)

    record, is_interrupted = run(plan("eager"), Interrupting({"eager": [1e-3]}))
    assert is_interrupted
    assert [each.block for each in record.arms["eager"].blocks] == [0, 1]
    assert record.notes == ("interrupted: fewer blocks than planned",)


def test_an_interrupt_before_anything_was_timed_is_one() -> None:
    def interrupt(task: BlockTask) -> BlockResult:
        if task.reference is not None:
            raise KeyboardInterrupt
        return FakeRunner({})(task)

    with pytest.raises(KeyboardInterrupt):
        run(plan("eager"), interrupt)


def test_an_arm_against_itself_tells_the_noise() -> None:
    specs = tuple(ArmSpec(label=label, source="eager", threads=1) for label in ("eager A", "eager B"))
    aa = plan("x", arms=specs, aa=("eager A", "eager B"), blocks=10)
    record, _ = run(aa, FakeRunner({"eager": [1e-3, 1.01e-3, 1.02e-3]}))
    assert record.noise is not None
    assert record.noise.pairs == 10
    assert 0 < record.noise.floor < 0.03


def test_an_arm_that_dies_against_itself_tells_nothing() -> None:
    specs = tuple(ArmSpec(label=label, source="eager", threads=1) for label in ("eager A", "eager B"))
    known = Noise(floor=0.02, smallest_effect=0.05, pairs=10)
    aa = plan("x", arms=specs, aa=("eager A", "eager B"), blocks=10, noise=known)
    record, _ = run(aa, FakeRunner({"eager": [*[1e-3] * 8, *[BlockResult(died="killed")] * 99]}))
    assert measured_noise(aa, record.arms) is None
    assert record.noise == known


def test_known_noise_is_recorded() -> None:
    noise = Noise(floor=0.02, smallest_effect=0.05, pairs=10)
    record, _ = run(plan("eager", noise=noise), FakeRunner({"eager": [1e-3]}))
    assert record.noise == noise


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": 0}, "blocks 0"),
        ({"threads": 0}, "threads 0"),
        ({"seed": -1}, "seed -1"),
        ({"warmup_s": -1.0}, "warmup -1 s"),
        ({"timed_s": 0.0}, "timed 0 s"),
        ({"timed_s": math.inf}, "timed inf s"),
        ({"timed_s": math.nan}, "timed nan s"),
        ({"against": "nobody"}, "against 'nobody'"),
        ({"arms": ()}, "none"),
        ({"arms": (ArmSpec(label="a", source="a", threads=1),) * 2}, "each once"),
        ({"aa": ("a", "b"), "blocks": 6}, "noise needs 7"),
        ({"blocks": 501}, "500 pairs are the most that are judged"),
    ],
    ids=str,
)
def test_a_plan_that_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan("eager", **changes)


def test_without_an_arm_or_a_reference_there_is_no_record() -> None:
    with pytest.raises(FasttrainError, match=r"no arm could be timed: jax: not here"):
        run(plan("jax"), FakeRunner({"jax": [BlockResult(refused="not here")]}))
    with pytest.raises(FasttrainError, match="the reference, the textbook's loop, cannot run: no data"):
        run(plan("eager"), lambda _: BlockResult(refused="no data"))


@given(
    first=st.dictionaries(st.integers(0, 9), st.floats(1e-6, 1e3), min_size=1),
    second=st.dictionaries(st.integers(0, 9), st.floats(1e-6, 1e3), min_size=1),
)
@settings(deadline=None)
def test_pairs_are_formed_by_block(first: dict[int, float], second: dict[int, float]) -> None:
    one, other = (
        arm(blocks=tuple(figures(block, seconds) for block, seconds in sorted(each.items())))
        for each in (first, second)
    )
    shared = sorted(first.keys() & second.keys())
    assert log_ratios(one, other) == pytest.approx([math.log(first[block] / second[block]) for block in shared])
    assert log_ratios(other, one) == pytest.approx([-ratio for ratio in log_ratios(one, other)])


def test_pairs_of_steps_of_other_sizes_are_compared_by_the_sample() -> None:
    small, large = arm(1e-3), arm(blocks=(figures(0, 2e-3, samples_per_step=256),))
    assert log_ratios(small, large) == pytest.approx([0.0])
