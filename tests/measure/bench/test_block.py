"""What happens in the process of a block: the check of the losses, the warm-up, the timing."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain import ConfigError, DataError, EngineError
from fasttrain.measure.bench import block
from fasttrain.measure.bench.sources import check_source, find_factory
from fasttrain.measure.bench.task import BlockResult, BlockTask
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


def timed(arm: SlowArm, *, warmup_s: float, timed_s: float) -> tuple[float, int]:
    return block.step_seconds(arm, FakeWatch(arm), warmup_s=warmup_s, timed_s=timed_s, clock=lambda: arm.now)


def test_a_step_takes_the_median_of_parts_that_end_with_the_device() -> None:
    arm = SlowArm([(1.0, None), (1.0, None), (9.0, None)])
    step_s, steps = timed(arm, warmup_s=0.0, timed_s=11.0)  # a part is 0.6 s: one step
    assert step_s == 1.125
    assert steps == 3
    assert arm.steps == 1 + steps  # the warm-up has one at least
    assert arm.syncs == 4


def test_a_call_may_train_many_steps() -> None:
    arm = SlowArm([(2.0, 100)])
    step_s, steps = timed(arm, warmup_s=3.0, timed_s=4.0)
    assert steps == 300
    assert step_s == pytest.approx(2.125 / 100)
    assert arm.steps == 2 + 3


@given(seconds=st.floats(0.01, 3.0), timed_s=st.floats(0.1, 5.0))
@settings(deadline=None)
def test_the_timed_steps_fill_the_time(seconds: float, timed_s: float) -> None:
    step_s, steps = timed(SlowArm([(seconds, None)]), warmup_s=0.0, timed_s=timed_s)
    assert step_s * steps >= 0.99 * timed_s
    assert steps >= 3
    assert seconds <= step_s <= seconds + 0.1251


def test_losses_that_leave_the_references_are_refused() -> None:
    wanted = [0.7, 0.6]
    assert block.check_losses([0.7, 0.6 * (1 + 5e-6), 9.0], wanted, 1e-5) == pytest.approx(5e-6)
    with pytest.raises(DataError, match="5e-05 relative at step 2, allowed is 1e-05"):
        block.check_losses([0.7, 0.6 * (1 + 5e-5)], wanted, 1e-5)
    for losses in ([float("nan"), 0.6], [0.7, float("nan")]):
        with pytest.raises(DataError, match="leave"):
            block.check_losses(losses, wanted, 1e-5)
    with pytest.raises(DataError, match="1 losses"):
        block.check_losses([0.7], wanted, 1e-5)


def task(source: str, reference: tuple[float, ...] | None) -> BlockTask:
    times = {"warmup_s": 0.0, "timed_s": 0.01}
    threads = torch.get_num_threads()
    return BlockTask(source=source, workload="mlp", device="cpu", threads=threads, reference=reference, **times)


@pytest.fixture(scope="module")
def reference() -> tuple[float, ...]:
    return block.run_task(task("textbook", None), time.time()).running_losses


def test_the_reference_gives_its_running_losses(reference: tuple[float, ...]) -> None:
    assert len(reference) == 20
    assert reference[-1] < reference[0] < 3.0


def test_an_arm_is_checked_and_timed(reference: tuple[float, ...]) -> None:
    result = block.run_task(task(f"{USERS}:make_arm", reference), time.time() - 5.0)
    assert result.figures is not None
    assert result.agreement is not None
    assert result.agreement < 1e-6
    assert result.workload is not None
    assert (result.workload["name"], result.workload["batch_size"]) == ("mlp", 128)
    assert result.figures.import_s >= 5.0
    assert result.figures.samples_per_step == 128
    assert result.figures.peak_bytes is not None
    assert result.figures.peak_bytes > 50e6
    assert 0 < result.figures.step_s < 1
    assert BlockResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


@pytest.mark.parametrize(("waits", "flags"), [([0.0, 0.0], ()), ([5.0, 1e6], ("waited",))])
def test_a_process_that_waits_for_a_core_is_flagged(
    waits: list[float], flags: tuple[str, ...], reference: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block, "core_wait_s", lambda: waits.pop(0))
    result = block.run_task(task("tuned", reference), time.time())
    assert result.figures is not None
    assert result.figures.flags == flags


def test_the_example_of_the_readme_is_an_arm(
    reference: tuple[float, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    (code,) = [part for part in readme.split("```") if "class MyArm" in part]
    (tmp_path / "my_code.py").write_text(code.removeprefix("python\n"))
    monkeypatch.syspath_prepend(tmp_path)
    result = block.run_task(task("my_code:make_arm", reference), time.time())
    assert result.figures is not None
    arm = find_factory("my_code:make_arm")(mlp_job(torch.device("cpu"), 1_000))
    for _ in range(30):
        arm.step()
    assert len(arm.losses() or []) == 20  # nothing grows while it is timed


def test_an_arm_of_other_losses_is_not_timed(reference: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match=r"leave the reference's: by 0\.001 relative at step 1"):
        block.run_task(task(f"{USERS}:make_wrong_arm", reference), time.time())


def test_the_process_leaves_its_result_in_a_file(tmp_path: Path, reference: tuple[float, ...]) -> None:
    files = [tmp_path / "task", tmp_path / "result"]
    no_graphs = "CUDA graphs need a CUDA device, and the job is on cpu: use another engine there, such as 'compiled'"
    for source, refused in (("tuned", None), ("graphed", no_graphs)):
        files[0].write_text(json.dumps(task(source, reference).to_dict()))
        assert block.main([*map(str, files), str(time.time())]) == 0
        result = BlockResult.from_dict(json.loads(files[1].read_text()))
        assert result.refused == refused
        assert (result.figures is None) == (refused is not None)


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
    with pytest.raises(ConfigError, match="arm 'egaer': use one of textbook, tuned, eager"):
        check_source("egaer")
