"""Whatever fails on the way to a program, training ends with eager's numbers, says why, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasttrain.errors import EngineError
from fasttrain.step import build, compiler, eager
from fasttrain.step.cache import ProgramCache, default_folder
from fasttrain.step.ladder import Ladder
from fasttrain.step.train_step import TrainStep
from tests.step.fakes import Graphs
from tests.step.jobs import ROUNDING, Change, assert_as_eager, batches, run, started

ENGINES = ["compiled", "auto"]

pytestmark = pytest.mark.usefixtures("temporary", "hasty")


def other_user(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    folder.mkdir(parents=True)
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)


def open_to_all(_: pytest.MonkeyPatch, folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)


def a_link(_: pytest.MonkeyPatch, folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    folder.symlink_to(folder.parent)


def in_the_way(_: pytest.MonkeyPatch, folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("")


FOLDERS = {
    "belongs to another user": other_user,
    "others may write": open_to_all,
    "links are not followed": a_link,
    "cannot be made": in_the_way,
}


@pytest.mark.parametrize("reason", FOLDERS)
def test_a_cache_that_cannot_be_trusted(
    reason: str, own_programs: Path, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    FOLDERS[reason](monkeypatch, own_programs)
    step = started("auto")
    assert_as_eager(step, batches(20))
    assert reason in step.engine.reason
    assert graphs.builds == 0
    with pytest.raises(EngineError, match=reason):
        started("compiled")


def full_disk(*_: Any) -> Any:
    raise OSError(28, "No space left on device")


def test_a_cache_that_is_full_serves_this_run(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProgramCache, "add", full_disk)
    monkeypatch.setattr(ProgramCache, "remember", full_disk)
    for engine in ENGINES:
        step = started(engine)
        assert_as_eager(step, batches(20), rtol=ROUNDING)
        assert step.engine.value == "compiled"
        step.close()
    assert graphs.builds == 2


def test_a_program_with_other_numbers(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs.spoil = lambda loss: loss * 1.01
    step = started("auto")
    assert_as_eager(step, batches(20))
    assert "refused: its numbers differ from eager's" in step.engine.reason
    assert graphs.replayed == 2  # on two batches
    monkeypatch.setattr(compiler, "trace_step", full_disk)
    again = started("auto")
    assert_as_eager(again, batches(20))
    assert "an earlier run of this job refused its program: its numbers differ" in again.engine.reason
    monkeypatch.undo()


def test_compiled_with_other_numbers_is_an_error(graphs: Graphs) -> None:
    graphs.spoil = lambda loss: loss * 1.01
    with pytest.raises(EngineError, match="its numbers differ from eager's"):
        run(started("compiled"), batches(3))


def test_a_program_that_cannot_run(graphs: Graphs) -> None:
    def fails(_: Any) -> Any:
        raise RuntimeError("could not create a primitive")

    graphs.spoil = fails
    step = started("auto")
    assert_as_eager(step, batches(20))
    assert "it cannot run: could not create a primitive" in step.engine.reason


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "cpp_compiler", lambda: None)
    step = started("auto")
    assert_as_eager(step, batches(20))
    assert "needs a C++ compiler, and none is on the PATH" in step.engine.reason


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: content[:50] + b"?" + content[51:]])
def test_a_damaged_program_is_not_loaded(
    damage: Callable[[bytes], bytes], graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(started("compiled"), batches(3))
    [package] = default_folder().glob("*.pt2")
    package.write_bytes(damage(package.read_bytes() + b"padding" * 100))
    step = started("auto")
    assert_as_eager(step, batches(20), rtol=ROUNDING)
    assert graphs.builds == 2, "it was built anew"
    step.close()


# From here on children are real.


def auto_of(step: TrainStep) -> Ladder:
    engine = step._engine  # pyright: ignore[reportPrivateUsage]
    assert isinstance(engine, Ladder)
    return engine


def child_pid(step: TrainStep) -> int:
    [candidate] = auto_of(step).candidates
    pending: Any = candidate.pending
    return pending._builds[-1]._child.pid


def wait_for_child(step: TrainStep) -> None:
    """Until it has ended; what it left is for the step to find."""
    os.waitid(os.P_PID, child_pid(step), os.WEXITED | os.WNOWAIT)


def test_a_child_that_is_killed(own_programs: Path, temporary: Path) -> None:
    def kill(step: TrainStep) -> None:
        if step.spec.model.training and step.engine.reason == "a child process is compiling the step":
            os.kill(child_pid(step), signal.SIGKILL)
            wait_for_child(step)

    step = started("auto")
    assert_as_eager(step, batches(20), {10: kill})
    assert step.engine.reason == "the compiling child was ended by SIGKILL"
    assert not any(temporary.iterdir())


def test_a_child_that_hangs(
    own_programs: Path, temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "child"
    script.write_text("#!/bin/sh\nexec sleep 1000\n")
    script.chmod(0o700)
    monkeypatch.setattr(build.sys, "executable", str(script))
    step = started("auto")
    assert_as_eager(step, batches(20), {10: lambda _: monkeypatch.setattr(build, "TIMEOUT_S", 0.0)})
    assert "took longer than 0 s and was ended" in step.engine.reason
    assert not any(temporary.iterdir())


def test_a_training_that_ends_first(own_programs: Path, temporary: Path) -> None:
    step = started("auto")
    assert_as_eager(step, batches(10))
    assert step.engine.reason == "a child process is compiling the step"
    step.close()
    assert step.engine.reason == "training ended before the program was ready"
    assert not any(temporary.iterdir())


def test_without_gxx_on_the_path(
    own_programs: Path, temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was there when the engine was made, and is gone when the child looks for it."""
    step = started("auto")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    at_child: dict[int, Change] = {
        10: lambda each: wait_for_child(each) if each is step else None,
    }
    assert_as_eager(step, batches(20), at_child)
    assert "the compiling child failed with exit code 1: this step cannot be compiled" in step.engine.reason
    assert not any(temporary.iterdir())
    assert not any(own_programs.glob("*.verdict")), "a later run may find a compiler"
