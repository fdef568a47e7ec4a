"""What happens in the process of an arm: the check of the losses, the warm-up, the slices."""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain import ConfigError, DataError, EngineError
from fasttrain.measure.bench import process
from fasttrain.measure.bench.messages import ArmTask
from fasttrain.measure.bench.sources import check_source, find_factory
from fasttrain.measure.strict import Node
from fasttrain.workloads.mlp import mlp_job

USERS = "tests.measure.bench.user_arms"


class SlowArm:
    """A call of `step` takes what is given, on a fake clock; the device is done a little later."""

    def __init__(self, calls: list[tuple[float, int | None]]) -> None:
        self.now = 0.0
        self.syncs = self.steps = 0
        self._calls = calls

    def step(self) -> int | None:
        seconds, steps = self._calls[self.steps % len(self._calls)]
        self.steps += 1
        self.now += seconds
        return steps

    def sync(self) -> None:
        self.syncs += 1
        self.now += 0.125

    def losses(self) -> list[float]:
        return []


class FakeWatch:
    def __init__(self, arm: SlowArm) -> None:
        self._arm = arm
        self._begin = 0.0

    def start(self) -> None:
        self._begin = self._arm.now

    def stop(self) -> float:
        return self._arm.now - self._begin


def ready(arm: SlowArm) -> process.ReadyArm:
    return process.ReadyArm(arm, FakeWatch(arm), torch.device("cpu"), clock=lambda: arm.now)


def test_a_slice_ends_when_the_device_is_done() -> None:
    arm = SlowArm([(1.0, None)])
    timed = ready(arm)
    timed.warm_up(0.0)  # a call takes 1.125 s
    found = timed.slice(3.0)
    assert (found.seconds, found.steps) == (3.125, 3)
    assert arm.syncs == 3  # once after the warm-up, once after what fills the caches


def test_what_fills_the_caches_is_not_timed_and_left_out_where_calls_are_long() -> None:
    arm = SlowArm([(1.0, None)])
    timed = ready(arm)
    timed.warm_up(0.0)
    assert timed.slice(18.0).steps == 16
    assert arm.steps == 1 + 2 + 16
    assert timed.slice(0.5).steps == 1
    assert arm.steps == 19 + 1


class AheadArm(SlowArm):
    """Its calls return at once; the device takes a second for each."""

    def __init__(self) -> None:
        super().__init__([(0.0, None)])
        self._done = 0

    def sync(self) -> None:
        self.now += self.steps - self._done
        self._done = self.steps


def test_calls_that_return_before_the_device_is_done_do_not_pile_up() -> None:
    timed = ready(AheadArm())
    timed.warm_up(2.0)
    assert [timed.slice(3.0).steps for _ in range(3)] == [3, 3, 3]


def test_a_slice_has_one_call_at_least_which_may_train_many_steps() -> None:
    arm = SlowArm([(2.0, 100)])
    found = ready(arm).slice(0.05)
    assert (found.seconds, found.steps) == (2.125, 100)


def test_a_warm_up_is_not_timed() -> None:
    arm = SlowArm([(1.0, None)])
    warm = ready(arm)
    warm.warm_up(0.0)
    assert (arm.steps, arm.syncs) == (1, 1)
    warm.warm_up(2.0)
    assert (arm.steps, arm.syncs) == (3, 3)
    assert warm.slice(0.5).steps == 1


def test_what_the_process_does_in_the_others_turns_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_s = iter([1.0, 1.25, 9.0, 9.5, 20.0])
    monkeypatch.setattr(process.time, "process_time", lambda: next(cpu_s))
    arm = SlowArm([(1.0, None)])
    timed = ready(arm)
    arm.now += 4.0
    first = timed.slice(0.5)
    arm.now += 8.0
    second = timed.slice(0.5)
    assert [(each.others_s, each.awake_s) for each in (first, second)] == [(4.0, 0.25), (8.0, 0.5)]


@given(seconds=st.floats(0.01, 3.0), asked_s=st.floats(0.1, 5.0))
@settings(deadline=None)
def test_a_slice_takes_as_long_as_it_was_asked_to(seconds: float, asked_s: float) -> None:
    timed = ready(SlowArm([(seconds, None)]))
    timed.warm_up(asked_s)
    found = timed.slice(asked_s)
    assert found.seconds == pytest.approx(found.steps * seconds + 0.125)
    assert found.steps == 1 or found.seconds <= asked_s + seconds / 2 + 0.1251
    assert timed.slice(asked_s).seconds >= min(asked_s, found.seconds) / 2


def test_the_wait_for_a_core_is_that_of_the_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = iter([5.0, 5.25])
    monkeypatch.setattr(process, "core_wait_s", lambda: next(waits))
    assert ready(SlowArm([(1.0, None)])).slice(0.5).waited_s == 0.25


def task(source: str, reference: tuple[float, ...] | None) -> ArmTask:
    threads = torch.get_num_threads()
    return ArmTask(source=source, workload="mlp", device="cpu", threads=threads, reference=reference)


@pytest.fixture(scope="module")
def reference() -> tuple[float, ...]:
    return process.start(task("textbook", None), time.time())[0].running_losses


def test_the_reference_gives_its_running_losses(reference: tuple[float, ...]) -> None:
    assert len(reference) == 20
    assert reference[-1] < reference[0] < 3.0


def test_an_arm_is_checked_and_can_be_timed(reference: tuple[float, ...]) -> None:
    started, arm = process.start(task(f"{USERS}:make_arm", reference), time.time() - 5.0)
    assert started.agreement is not None
    assert started.agreement < 1e-6
    assert started.workload is not None
    assert (started.workload["name"], started.workload["batch_size"]) == ("mlp", 128)
    assert started.import_s >= 5.0
    assert 0 < started.first_step_s < 60
    assert started.samples_per_step == 128
    found, state = arm.slice(0.01), arm.state()
    assert found.seconds > 0.001
    assert 0 < found.seconds / found.steps < 1
    assert state.peak_bytes is not None
    assert state.peak_bytes > 50e6
    for message in (started, found, state):
        assert type(message).from_node(Node(through_json(asdict(message)), "it")) == message


def through_json(given: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(given))


def test_the_example_of_the_readme_is_an_arm(
    reference: tuple[float, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    (code,) = [part for part in readme.split("```") if "class MyArm" in part]
    (tmp_path / "my_code.py").write_text(code.removeprefix("python\n"))
    monkeypatch.syspath_prepend(tmp_path)
    started, _ = process.start(task("my_code:make_arm", reference), time.time())
    assert started.agreement is not None
    arm = find_factory("my_code:make_arm")(mlp_job(torch.device("cpu"), 1_000))
    for _ in range(30):
        arm.step()
    assert len(arm.losses() or []) == 20  # nothing grows while it is timed


def test_an_arm_of_other_losses_is_not_timed(reference: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match=r"leave the reference's: by 0\.001 relative at step 1"):
        process.start(task(f"{USERS}:make_wrong_arm", reference), time.time())


def served(given: ArmTask, requests: list[tuple[float, int] | None]) -> list[dict[str, Any]]:
    """What `main` answers, run in a thread of this process: the parent asks, and hangs up after the last answer."""
    parent, child = Pipe()
    answers: list[dict[str, Any]] = []
    with parent, ThreadPoolExecutor(1) as pool:
        code = pool.submit(process.main, [str(os.dup(child.fileno())), str(time.time())])
        child.close()
        for request in [asdict(given), *requests]:
            parent.send_bytes(json.dumps(request).encode())
            answers.append(json.loads(parent.recv_bytes()))
        parent.close()
        assert code.result() == 0
    return answers


def test_the_process_serves_slices_until_the_parent_hangs_up(reference: tuple[float, ...]) -> None:
    started, first, second, state = served(task("tuned", reference), [(0.01, 0), (0.02, 1), None])
    assert started["refused"] is None
    assert first["steps"] >= 1
    assert second["seconds"] > 0.002
    assert state["engine"] is None


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity of threads to cores")
def test_turns_move_from_core_to_core_and_are_bound_to_none(monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[set[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 5, 7})
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: bound.append(set(cores)))
    for core in range(4):
        process.move_to(core)
    assert bound[::2] == [{2}, {5}, {7}, {2}]
    assert bound[1::2] == [{2, 5, 7}] * 4


def test_the_process_says_why_it_refuses_and_ends(reference: tuple[float, ...]) -> None:
    no_graphs = "CUDA graphs need a CUDA device, and the job is on cpu: use another engine there, such as 'compiled'"
    (started,) = served(task("graphed", reference), [])
    assert started["refused"] == no_graphs


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("no_such_module:make_arm", ConfigError, "no module 'no_such_module'"),
        ("tests.no_such:make_arm", ConfigError, r"no module 'tests\.no_such'"),
        (f"{USERS}:no_such", ConfigError, "has no function 'no_such'"),
        (f"{USERS}:NOT_A_FUNCTION", ConfigError, "has no function"),
        ("no-such-peer", ConfigError, r"no benchmarks\.peers\.no_such_peer"),
    ],
)
def test_an_arm_that_is_not_there_is_refused(source: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        find_factory(source)


def test_a_module_that_misses_a_package_is_the_users_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lacks_something.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        find_factory("lacks_something:make_arm")


def test_a_peer_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "benchmarks.peers.accelerate", raising=False)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(EngineError, match=r"accelerate is not installed: pip install '\.\[peers\]'"):
        find_factory("accelerate")


def test_names_of_arms_are_checked_before_anything_runs() -> None:
    for source in ("eager", "jax-scan", "anything:at_all"):
        check_source(source)
    with pytest.raises(ConfigError, match="arm 'egaer': use one of textbook, tuned, record, drop-in, eager"):
        check_source("egaer")
