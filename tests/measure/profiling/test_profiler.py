"""A profile adds up, survives its file, leaves everything as it was and refuses what it cannot do."""

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain import FastLoop, profile, resident
from fasttrain.errors import ConfigError, DataError, EngineError
from fasttrain.measure.profiling import passes
from fasttrain.measure.profiling.file import read_profile
from fasttrain.measure.profiling.passes import CleanPass, TracePass
from fasttrain.measure.profiling.phases import STEP, Phases, gap_phase
from fasttrain.measure.profiling.profiler import Schedule, Session, Span
from fasttrain.measure.profiling.record import PHASES, Profile
from fasttrain.step.program import StepProgram
from tests.measure.profiling.planted.parts import BATCH, Parts, Rows, endless, loader, loss_func


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def profile_of_a_textbook_loop(out: Path) -> Profile:
    parts = Parts()
    with profile("textbook", steps=8, out=out, workload="planted") as prof:
        for x, y in endless(loader(Rows(parts)), prof):
            parts.optimizer.zero_grad()
            predictions = parts.model(x)
            loss = loss_func(predictions, y)
            loss.backward()
            parts.optimizer.step()
            loss.item()
    return prof.result


@pytest.fixture(scope="module")
def textbook(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return profile_of_a_textbook_loop(tmp_path_factory.mktemp("profiles"))


def test_phases_and_operators_add_up_to_the_step(textbook: Profile) -> None:
    assert sum(textbook.phases.values()) == pytest.approx(textbook.step_us, rel=1e-6)
    assert sum(row.self_us for row in textbook.operators) == pytest.approx(textbook.step_us, rel=1e-6)
    assert all(textbook.phases[phase] > 0 for phase in ("data wait", "forward", "backward", "optimizer", "metrics"))
    assert textbook.phases["program"] == textbook.phases["host to device"] == 0
    assert textbook.phases["other"] < 0.1 * textbook.step_us


def test_operators_are_in_their_phases(textbook: Profile) -> None:
    phases = {row.name: row.phase for row in textbook.operators}
    assert phases["aten::addmm"] == "forward"
    assert phases["aten::mm"] == "backward"
    assert {row.calls for row in textbook.operators if row.name == "aten::addmm"} == {2}
    assert {row.phase for row in textbook.operators} <= {*PHASES, ""}


def test_the_counters_are_exact(textbook: Profile) -> None:
    counters = textbook.counters
    assert [(read.what, read.per_step) for read in counters.host_reads] == [("item", 1)]
    flops_forward = 2 * BATCH * (64 * 512 + 512 * 10)
    assert counters.flops == flops_forward * 2 + 2 * BATCH * 512 * 10  # no gradient of the inputs
    assert "relu" in counters.flops_not_counted
    assert counters.kernel_launches is None
    assert counters.dispatched_operators > 100
    assert textbook.gpu is None


def test_memory_is_of_kinds(textbook: Profile) -> None:
    by_kind = textbook.memory.by_kind
    weights = 4 * (64 * 512 + 512 + 512 * 10 + 10)
    assert by_kind["parameters"] >= weights
    assert by_kind["gradients"] >= weights
    assert sum(by_kind.values()) == textbook.memory.peak_bytes
    assert len(textbook.memory.timeline) == 8
    assert textbook.memory.timeline[-1][1] == textbook.memory.peak_bytes - by_kind["other"]


def test_a_profile_is_where_it_says_and_survives(tmp_path: Path) -> None:
    made = profile_of_a_textbook_loop(tmp_path)
    path = tmp_path / "planted-cpu" / "textbook.json"
    assert read_profile(path).to_text() == made.to_text() == path.read_text()
    assert sorted(file.name for file in path.parent.iterdir()) == ["textbook.json", "textbook.trace.json.gz"]


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    watched = [(torch.nn.Module, "__call__"), (torch.Tensor, "backward"), (torch.autograd.profiler, "record_function")]
    before = [getattr(owner, name) for owner, name in watched]
    own = set(vars(torch.Tensor))
    profile_of_a_textbook_loop(tmp_path)
    assert [getattr(owner, name) for owner, name in watched] == before
    assert set(vars(torch.Tensor)) == own
    assert sys.getprofile() is None
    assert sys.gettrace() is None
    assert not torch.overrides._get_current_function_mode_stack()


def test_an_error_in_the_loop_leaves_nothing_behind_either(tmp_path: Path) -> None:
    def fail_at(fatal: int) -> None:
        parts = Parts()
        with profile("failing", steps=8, out=tmp_path) as prof:
            for step, (x, y) in enumerate(endless(parts.batches(), prof)):
                parts.train_on(x, y)
                if step == fatal:
                    raise NotImplementedError

    before = torch.nn.Module.__call__
    for fatal in (0, 3, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52):  # in each pass: its first step, and a later one
        with pytest.raises(NotImplementedError):
            fail_at(fatal)
        assert torch.nn.Module.__call__ is before
        assert sys.getprofile() is None
        assert sys.gettrace() is None
        assert not torch.overrides._get_current_function_mode_stack()
    assert not list(tmp_path.rglob("*.json"))


def test_a_loop_that_ends_early_is_refused(tmp_path: Path) -> None:
    def train_for(steps: int) -> None:
        parts = Parts()
        with profile("short", steps=8, out=tmp_path) as prof:
            for _ in range(steps):
                parts.train_on(parts.x, parts.y)
                prof.step()

    with pytest.raises(ConfigError, match="ended 47 steps before"):
        train_for(9)
    train_for(56)
    train_for(60)


def test_a_step_in_another_thread_is_refused(tmp_path: Path) -> None:
    caught: list[ConfigError] = []
    prof = profile("threads", steps=6, out=tmp_path)

    def step() -> None:
        try:
            prof.step()
        except ConfigError as error:
            caught.append(error)

    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    assert len(caught) == 1


def test_too_few_steps_and_bad_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="steps 5"):
        profile("x", steps=5, out=tmp_path)
    for name in ("../x", "/x", ".x"):
        with pytest.raises(ConfigError, match="name"):
            profile(name, out=tmp_path)
    with pytest.raises(ConfigError, match="block"):
        _ = profile("x", out=tmp_path).result
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="the folder cannot be made"), profile("x", out=tmp_path / "file"):
        pass


def test_the_clean_pass_may_be_longer_than_the_others() -> None:
    session = Session(trace=None, warm_up=Span(calls=1), span=Span(calls=2), clean=Span(calls=5))
    assert session.schedule.calls_left == 1 + 5 + 2


def test_phases_of_a_fast_loop(tmp_path: Path) -> None:
    parts = Parts()
    loop = FastLoop(parts.model, parts.optimizer, loss=loss_func, engine="eager")
    batches = resident(parts.x, parts.y, batch_size=BATCH, device="cpu")
    phases = Phases()
    with phases:
        loop.train(batches)
        phases.start(is_marking=False)
        loop.train(batches)
        phases.step()
        phases.stop()
        loop.train(batches)
    total = sum(phases.seconds.values())
    assert all(phases.seconds[phase] > 0 for phase in ("data wait", "forward", "backward", "optimizer", "metrics"))
    assert phases.seconds["other"] < 0.2 * total


def test_resident_batches_can_be_taken_several_at_a_time_and_count_as_data() -> None:
    data = resident(torch.zeros(80, 2), batch_size=8, device="cpu")
    phases = Phases()
    with phases:
        epoch = iter(data)
        phases.start(is_marking=False)
        next(epoch)
        single = phases.seconds["data wait"]
        taken = epoch.take(4)
        assert taken is not None
        phases.step()
        phases.stop()
    assert taken.steps == 4
    assert 0 < single < phases.seconds["data wait"]


def test_the_stopwatch_gives_all_time_to_a_phase() -> None:
    clock = Clock()
    phases = Phases(clock)
    with phases:
        phases.start(is_marking=False)
        for phase, seconds, gap in (("data wait", 1, 2), ("forward", 3, 4), ("backward", 5, 6), ("optimizer", 7, 8)):
            with phases.range(phase):
                clock.now += seconds
                with phases.range("metrics"):  # within another phase, it is part of that
                    clock.now += 10
            clock.now += gap
        phases.step()
        phases.stop()
    # The gaps: wait to forward is other, forward to backward forward, backward to optimizer its, then metrics.
    assert phases.seconds == {"data wait": 11, "other": 2, "forward": 17, "backward": 15, "optimizer": 23, "metrics": 8}


def test_a_loss_before_zero_grad_belongs_to_forward() -> None:
    """forward, then the loss as a function, then zero_grad, backward, step."""
    clock = Clock()
    phases = Phases(clock)
    with phases:
        phases.start(is_marking=False)
        for phase in ("data wait", "forward", "optimizer", "backward", "optimizer"):
            with phases.range(phase):
                clock.now += 1
            clock.now += 0 if phase == "data wait" else 10
        phases.step()
        phases.stop()
    assert phases.seconds == {
        "other": 0,
        "data wait": 1,
        "forward": 1 + 10 + 10,
        "backward": 1,
        "optimizer": 2 + 10,
        "metrics": 10,
    }


@given(before=st.sampled_from([*PHASES, STEP]), after=st.sampled_from([*PHASES, STEP]))
@settings(deadline=None)
def test_every_gap_has_a_phase(before: str, after: str) -> None:
    assert gap_phase(before, after) in PHASES


def test_the_clean_pass_takes_the_median_window() -> None:
    clock = Clock()
    clean = CleanPass(10, clock)
    clean.start()
    for call in range(10):
        clock.now += 3.0 if call < 2 else 1.0  # what is slow once does not count
        clean.step(4)
    clean.stop()
    assert clean.step_us == pytest.approx(0.25e6)
    assert clean.steps == 40


def test_the_tracer_does_not_wait_between_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(passes, "wait", lambda: log.append("wait"))
    phases = Phases()
    with phases:
        watch = TracePass(phases, tmp_path / "trace.json.gz")
        watch.start()
        for _ in range(3):
            torch.ones(2).sum()
            watch.step(1)
            log.append("step")
        watch.stop()
    assert log == ["wait", "step", "step", "step", "wait"]


@pytest.mark.parametrize(("step", "is_refused"), [(5, False), (6, True), (17, True), (23, True), (24, False)])
def test_a_profile_of_two_engines_is_refused(step: int, is_refused: bool, tmp_path: Path) -> None:
    """Passes of six steps: warming up, clean, phases, trace, and those that need no certain engine."""

    def train() -> None:
        parts = Parts()
        with profile("auto", steps=6, out=tmp_path) as prof:
            for number, (x, y) in enumerate(endless(parts.batches(), prof)):
                parts.train_on(x, y)
                if number == step:
                    StepProgram([], None)  # pyright: ignore[reportArgumentType]

    if is_refused:
        with pytest.raises(EngineError, match=r"taken up while .* profile once the engine has settled"):
            train()
    else:
        train()
    assert len(list(tmp_path.rglob("auto.json"))) == (not is_refused)


def test_reads_that_the_list_has_no_room_for_are_counted_too(tmp_path: Path) -> None:
    lines, parts = 60, Parts()
    read: dict[str, Any] = {}
    exec(compile("def many(x):\n" + "    x.item()\n" * lines, str(tmp_path / "reads.py"), "exec"), read)
    with profile("reads", steps=6, out=tmp_path) as prof:
        for x, y in endless(parts.batches(), prof):
            read["many"](parts.train_on(x, y))
    reads = prof.result.counters.host_reads
    assert len(reads) == 40
    assert sum(each.per_step for each in reads) == lines
    assert (reads[-1].file, reads[-1].line, reads[-1].per_step) == ("other places", 0, lines - 39)


def test_passes_follow_each_other() -> None:
    clock, log = Clock(), []

    class Logged:
        def __init__(self, name: str) -> None:
            self.name = name

        def start(self) -> None:
            log.append(f"{self.name} starts")

        def step(self, count: int) -> None:
            log.append(f"{self.name} {count}")

        def stop(self) -> None:
            log.append(f"{self.name} stops")

    schedule = Schedule([(Logged("a"), Span(calls=2)), (Logged("b"), Span(calls=1, seconds=5.0))], clock)
    schedule.start()
    for _ in range(2):
        schedule.step(3)
    assert schedule.calls_left == 1
    schedule.step()  # b's call is made, its time is not over
    assert (schedule.calls_left, schedule.is_done) == (0, False)
    clock.now = 5.0
    schedule.step()
    schedule.step()
    assert schedule.is_done
    assert log == ["a starts", "a 3", "a 3", "a stops", "b starts", "b 1", "b 1", "b stops"]
