"""Running what was planned, over processes that are made up."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest

from fasttrain import FasttrainError
from fasttrain.measure.bench.messages import ArmTask, ProcessDiedError, Started
from fasttrain.measure.bench.plan import ArmSpec, BenchPlan
from fasttrain.measure.bench.record import BenchRecord
from fasttrain.measure.bench.rounds import Process
from fasttrain.measure.bench.run import measured_noise, run_bench
from fasttrain.measure.verdict.stats import Noise
from tests.measure.bench.bench_fakes import (
    ENVIRONMENT,
    DiesInRoundsError,
    FakeMachine,
    FakeProcess,
    FakeRunner,
    plan,
    slice_of,
)


def run(
    wanted: BenchPlan,
    runner: Any,
    machine: FakeMachine | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> tuple[BenchRecord, bool]:
    about: dict[str, Any] = {"environment": ENVIRONMENT, "command": "bench", "created": "now"}
    return run_bench(wanted, runner, machine or FakeMachine(), log, **about)


def test_every_arm_runs_once_a_block_against_the_references_losses() -> None:
    runner = FakeRunner({"eager": [1e-3, 2e-3, 3e-3], "tuned": [5e-4]})
    record, is_interrupted = run(plan("eager", "tuned"), runner)
    assert not is_interrupted
    assert [each.step_s for each in record.arms["eager"].blocks] == pytest.approx([1e-3, 2e-3, 3e-3])
    assert [each.block for each in record.arms["tuned"].blocks] == [0, 1, 2]
    reference, *timed = runner.tasks
    assert (reference.source, reference.reference) == ("textbook", None)
    assert [{task.source for task in timed[at : at + 2]} for at in (0, 2, 4)] == [{"eager", "tuned"}] * 3
    assert [sorted(arm.blocks[block].position for arm in record.arms.values()) for block in range(3)] == [[0, 1]] * 3
    assert {task.reference for task in timed} == {(0.7, 0.6)}
    assert record.workload == {"name": "mlp"}
    assert record.design.blocks == 3


def test_an_arm_that_is_refused_is_not_timed_and_said_to_be() -> None:
    runner = FakeRunner({"eager": [1e-3], "jax": [Started(refused="jax is not installed")]})
    record, _ = run(plan("eager", "jax"), runner)
    assert list(record.arms) == ["eager"]
    assert record.refused == {"jax": "jax is not installed"}
    assert [task.source for task in runner.tasks].count("jax") == 1


def test_an_arm_that_is_refused_late_is_not_kept() -> None:
    runner = FakeRunner({"eager": [1e-3], "odd": [1e-3, Started(refused="its losses leave")]})
    record, _ = run(plan("eager", "odd"), runner)
    assert list(record.arms) == ["eager"]
    assert record.refused == {"odd": "in block 2: its losses leave"}


def test_a_flagged_block_is_repeated_and_kept_beside() -> None:
    runner = FakeRunner({"eager": [1e-3, 2e-3, 3e-3, 4e-3]})
    record, _ = run(plan("eager"), runner, FakeMachine(("load",)))
    found = record.arms["eager"]
    assert [each.step_s for each in found.blocks] == pytest.approx([2e-3, 3e-3, 4e-3])
    assert [each.repeats for each in found.blocks] == [1, 0, 0]
    (repeated,) = found.repeated
    assert (repeated.step_s, repeated.flags) == (pytest.approx(1e-3), ("load",))
    assert [task.source for task in runner.tasks] == ["textbook", *["eager"] * 3]  # the same process, timed again


def test_a_block_that_stays_flagged_is_kept_with_its_flag() -> None:
    runner = FakeRunner({"eager": [1e-3]})
    record, _ = run(plan("eager", blocks=1), runner, FakeMachine(*[("load", "throttled")] * 9))
    (found,) = record.arms["eager"].blocks
    assert (found.flags, found.repeats) == (("load", "throttled"), 2)
    assert len(record.arms["eager"].repeated) == 2


def test_a_flagged_arm_has_the_whole_block_timed_again() -> None:
    waited = slice_of(9e-3, waited_s=0.1)
    runner = FakeRunner({"eager": [waited, 1e-3], "tuned": [5e-4, 6e-4]})
    record, _ = run(plan("eager", "tuned", blocks=1), runner)
    assert {label: arm.blocks[0].step_s for label, arm in record.arms.items()} == pytest.approx(
        {"eager": 1e-3, "tuned": 6e-4}
    )
    assert [record.arms[label].repeated[0].flags for label in ("eager", "tuned")] == [("waited",), ()]


def test_an_arms_own_threads_count_as_load() -> None:
    machine = FakeMachine()
    specs = (ArmSpec(label="one", source="eager", threads=1), ArmSpec(label="four", source="eager", threads=4))
    run(plan("x", arms=specs, blocks=1), FakeRunner({"eager": [1e-3]}), machine)
    assert sorted(wanted or 0 for wanted in machine.wanted) == [2 + 1, 2 + 4]


def test_what_a_process_says_of_itself_is_a_flag_too() -> None:
    runner = FakeRunner({"eager": [slice_of(9e-3, waited_s=0.1), 1e-3]})
    record, _ = run(plan("eager", blocks=1), runner, FakeMachine(("load",)))
    assert [each.step_s for each in record.arms["eager"].blocks] == pytest.approx([1e-3])
    assert record.arms["eager"].repeated[0].flags == ("waited", "load")


def test_a_process_that_is_awake_in_the_others_turns_is_flagged() -> None:
    record, _ = run(plan("eager", blocks=1), FakeRunner({"eager": [slice_of(9e-3, awake_s=0.1), 1e-3]}))
    assert [each.flags for each in record.arms["eager"].repeated] == [("awake",)]


def test_each_thread_of_an_arm_may_be_awake_for_a_while() -> None:
    specs = (ArmSpec(label="one", source="eager", threads=1), ArmSpec(label="four", source="tuned", threads=4))
    runner = FakeRunner({"eager": [1e-3], "tuned": [slice_of(9e-3, awake_s=0.038), 1e-3]})  # 19% of the others' time
    record, _ = run(plan("x", arms=specs, blocks=1), runner)
    assert not record.arms["four"].repeated
    runner = FakeRunner({"eager": [1e-3], "tuned": [slice_of(9e-3, awake_s=0.042), 1e-3]})
    record, _ = run(plan("x", arms=specs, blocks=1), runner)
    assert [each.flags for each in record.arms["four"].repeated] == [("awake",)]


def test_a_process_that_dies_at_its_start_is_started_again() -> None:
    runner = FakeRunner({"eager": [ProcessDiedError("exit code -9"), 1e-3]})
    record, _ = run(plan("eager", blocks=1), runner)
    assert record.arms["eager"].blocks[0].repeats == 0
    assert [task.source for task in runner.tasks] == ["textbook", "eager", "eager"]


def test_a_process_that_dies_in_the_rounds_is_started_again_and_the_block_timed_again() -> None:
    runner = FakeRunner({"eager": [DiesInRoundsError("exit code -9"), 1e-3], "tuned": [5e-4, 6e-4]})
    record, _ = run(plan("eager", "tuned", blocks=1), runner)
    assert [arm.blocks[0].repeats for arm in record.arms.values()] == [1, 1]
    assert record.arms["tuned"].blocks[0].step_s == pytest.approx(6e-4)
    assert sorted(task.source for task in runner.tasks) == ["eager", "eager", "textbook", "tuned"]


def test_an_arm_that_dies_in_the_last_rounds_of_a_block_is_missed_there() -> None:
    waited, died = slice_of(9e-3, waited_s=0.1), DiesInRoundsError("killed")
    runner = FakeRunner({"mine": [waited, waited, died, 1e-3], "eager": [waited, waited, 1e-3]})
    log: list[str] = []
    record, _ = run(plan("mine", "eager", blocks=2), runner, log=log.append)
    assert [[block.block for block in arm.blocks] for arm in record.arms.values()] == [[1], [0, 1]]
    assert record.notes == ("mine: not in block 1: its process died: killed",)
    assert "block 1: mine: the process died: killed" in log


def test_a_process_that_dies_when_its_state_is_asked_for_has_died_too() -> None:
    class Fading(FakeRunner):
        @contextmanager
        def __call__(self, task: ArmTask) -> Generator[FakeProcess]:
            with super().__call__(task) as process:
                if len(self.tasks) == 2:
                    process.state = fade
                yield process

    def fade() -> Any:
        raise ProcessDiedError("killed")

    record, _ = run(plan("eager", blocks=1), Fading({"eager": [1e-3, 2e-3]}))
    assert [(each.repeats, each.step_s) for each in record.arms["eager"].blocks] == [(1, pytest.approx(2e-3))]


def test_all_arms_live_while_they_take_turns_and_none_afterwards() -> None:
    living: list[list[str]] = []

    class Watching(FakeMachine):
        def before(self) -> int:
            living.append(sorted(runner.living))
            return 0

    runner = FakeRunner({"eager": [1e-3], "tuned": [5e-4]})
    run(plan("eager", "tuned", blocks=2), runner, Watching())
    assert living == [["eager", "tuned"]] * 2
    assert runner.living == []


def test_an_arm_that_keeps_dying_is_refused() -> None:
    runner = FakeRunner({"eager": [1e-3], "mine": [ProcessDiedError("ValueError: a bug")]})
    record, _ = run(plan("eager", "mine"), runner)
    assert record.refused == {"mine": "its process died 3 times: ValueError: a bug"}
    assert [task.source for task in runner.tasks].count("mine") == 3


def test_what_an_arm_gave_before_it_died_stands() -> None:
    died = ProcessDiedError("killed")
    runner = FakeRunner({"eager": [1e-3], "mine": [2e-3, died, died, died]})
    record, _ = run(plan("eager", "mine"), runner)
    assert [each.block for each in record.arms["mine"].blocks] == [0]
    assert record.notes == ("mine: takes no part from block 2 on: its process died 3 times: killed",)


def test_an_arm_that_gave_nothing_but_a_flagged_block_before_it_died_is_refused() -> None:
    in_rounds, at_start = DiesInRoundsError("killed"), ProcessDiedError("killed")
    runner = FakeRunner({"eager": [1e-3], "mine": [slice_of(9e-3, waited_s=0.1), in_rounds, at_start, at_start]})
    record, _ = run(plan("eager", "mine"), runner)
    assert list(record.arms) == ["eager"]
    assert record.refused == {"mine": "its process died 3 times: killed"}
    assert record.notes == ()


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
        def __call__(self, task: ArmTask) -> AbstractContextManager[FakeProcess]:
            if len(self.tasks) == 3:
                raise KeyboardInterrupt
            return super().__call__(task)

    record, is_interrupted = run(plan("eager"), Interrupting({"eager": [1e-3]}))
    assert is_interrupted
    assert [each.block for each in record.arms["eager"].blocks] == [0, 1]
    assert record.notes == ("interrupted: fewer blocks than planned",)


def test_an_interrupt_before_anything_was_timed_is_one() -> None:
    def interrupt(task: ArmTask) -> AbstractContextManager[Process]:
        if task.reference is not None:
            raise KeyboardInterrupt
        return FakeRunner({})(task)

    with pytest.raises(KeyboardInterrupt):
        run(plan("eager"), interrupt)


def test_an_interrupt_in_the_rounds_ends_the_processes() -> None:
    class Interrupting(FakeRunner):
        @contextmanager
        def __call__(self, task: ArmTask) -> Generator[FakeProcess]:
            with super().__call__(task) as process:
                process.slice = interrupt
                yield process

    def interrupt(*_: float) -> Any:
        assert runner.living == ["eager"]
        raise KeyboardInterrupt

    runner = Interrupting({"eager": [1e-3]})
    with pytest.raises(KeyboardInterrupt):
        run(plan("eager"), runner)
    assert runner.living == []


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
    record, _ = run(aa, FakeRunner({"eager": [*[1e-3] * 8, *[ProcessDiedError("killed")] * 99]}))
    assert measured_noise(aa, record.arms) is None
    assert record.noise == known


def test_known_noise_is_recorded() -> None:
    noise = Noise(floor=0.02, smallest_effect=0.05, pairs=10)
    record, _ = run(plan("eager", noise=noise), FakeRunner({"eager": [1e-3]}))
    assert record.noise == noise


def test_without_an_arm_or_a_reference_there_is_no_record() -> None:
    with pytest.raises(FasttrainError, match=r"no arm could be timed: jax: not here"):
        run(plan("jax"), FakeRunner({"jax": [Started(refused="not here")]}))
    with pytest.raises(FasttrainError, match="the reference, the textbook's loop, cannot run: no data"):
        run(plan("eager"), lambda _: nullcontext(FakeProcess(Started(refused="no data"), 1e-3, iter(()))))
