"""Fresh processes: what they answer, how they die, and the command that starts them all."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain import cli
from fasttrain.commands.bench import KEPT_CACHE, Bench
from fasttrain.measure.bench import runner
from fasttrain.measure.bench.messages import ArmTask, ProcessDiedError
from fasttrain.measure.bench.noise import known_noise, remember_noise
from fasttrain.measure.bench.record import read_record
from fasttrain.measure.bench.runner import ArmRunner, fresh_caches
from fasttrain.measure.environment import environment
from fasttrain.measure.verdict.stats import Noise
from fasttrain.step.cache import ProgramCache, Verdict, default_folder
from tests.measure.bench.bench_fakes import ENVIRONMENT, FakeMachine, FakeProcess, FakeRunner, arm, record

REPOSITORY = Path(__file__).parents[3]


USERS = "tests.measure.bench.user_arms"


def task(source: str, reference: tuple[float, ...] | None = None) -> ArmTask:
    return ArmTask(source=source, workload="mlp", device="cpu", threads=1, reference=reference)


def children() -> list[int]:
    """Ids of processes of arms that this process has started, and that have not ended."""
    tasks = Path("/proc/self/task").glob("*/children")
    found = [int(each) for file in tasks for each in file.read_text().split()]
    return [each for each in found if b"bench.process" in Path(f"/proc/{each}/cmdline").read_bytes()]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python takes seconds to end where the machine has much else to do."""
    monkeypatch.setattr(runner, "GRACE_S", 60.0)


@pytest.mark.usefixtures("patient")
def test_a_process_runs_slices_and_ends(tmp_path: Path) -> None:
    start = ArmRunner({"TMPDIR": str(tmp_path)}, folder=REPOSITORY)
    with start(task("tuned")) as first, start(task("tuned", first.started.running_losses)) as second:
        assert second.started.agreement == 0.0
        assert first.started.agreement is None
        assert second.slice(0.02, 0).seconds > 0.002
        assert second.slice(0.0, 0).steps == 1
        peak = second.state().peak_bytes
        assert peak is not None
        assert peak > 50e6
        assert len(children()) == 2
    assert [each._child.returncode for each in (first, second)] == [0, 0]  # both have ended of themselves
    assert children() == []


@pytest.mark.usefixtures("patient")
def test_a_process_that_dies_leaves_its_last_words() -> None:
    with (
        pytest.raises(ProcessDiedError, match=r"^exit code 1: ValueError: a bug of the user's own$") as died,
        ArmRunner({}, folder=REPOSITORY)(task(f"{USERS}:make_no_arm")),
    ):
        pass
    assert "make_no_arm" in died.value.last_words


def test_a_process_that_is_killed_in_its_turn_has_died() -> None:
    with ArmRunner({}, folder=REPOSITORY)(task(f"{USERS}:make_arm")) as process:
        process.slice(0.0, 0)
        (pid,) = children()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ProcessDiedError, match=r"^exit code -9: it said nothing$"):
            process.slice(0.0, 0)


def group(leader: int) -> list[int]:
    """Ids of the processes of a group."""
    found: list[int] = []
    for each in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if int((each / "stat").read_text().rpartition(")")[2].split()[2]) == leader:
                found.append(int(each.name))
    return found


def test_a_process_that_hangs_in_its_turn_is_ended_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with ArmRunner({}, folder=REPOSITORY)(task(f"{USERS}:make_hanging_arm")) as process:
        (pid,) = children()
        monkeypatch.setattr(process, "_timeout_s", 0.2)
        with pytest.raises(ProcessDiedError, match=r"^it was ended after 0\.2 s$"):
            process.slice(0.0, 0)
        assert group(pid) == []


def test_a_death_is_noticed_and_leaves_nothing_where_what_it_started_lives_on() -> None:
    with ArmRunner({}, folder=REPOSITORY)(task(f"{USERS}:make_forking_arm")) as process:
        (pid,) = children()
        begin = time.monotonic()
        with pytest.raises(ProcessDiedError, match=r"^exit code 3: it said nothing$"):
            process.slice(0.0, 0)
        assert time.monotonic() - begin < 30
        assert len(group(pid)) == 1
    deadline = time.monotonic() + 10
    while group(pid) and time.monotonic() < deadline:  # init has not reaped it yet
        pass
    assert group(pid) == []


def test_a_process_that_takes_too_long_is_ended() -> None:
    with (
        pytest.raises(ProcessDiedError, match=r"^it was ended after 0\.05 s$"),
        ArmRunner({}, timeout_s=0.05)(task("textbook")),
    ):
        pass
    assert children() == []


def test_compilers_find_an_empty_cache() -> None:
    with fresh_caches() as variables:
        folders = [Path(variables[name]) for name in ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR")]
        assert list(folders[0].iterdir()) == []
        assert folders[1].parent == folders[0]
    assert not folders[0].exists()


def test_each_process_decides_anew_but_finds_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = Verdict(eager_us=2.0, program_us=1.0, trace_s=0.5, compile_s=20.0, refused="not faster")

    def kept(*_: Any, **given: Any) -> None:
        kept_files.append(sorted(path.name for path in folder.iterdir()))
        raise NotImplementedError

    with fresh_caches() as variables:
        folder = default_folder(variables)
        cache = ProgramCache(folder)
        cache.remember("job", verdict)
        (folder / "program.pt2").touch()
        kept_files: list[list[str]] = []
        monkeypatch.setattr("fasttrain.measure.bench.runner.subprocess.Popen", kept)
        with pytest.raises(NotImplementedError):
            ArmRunner(variables)(task("textbook")).__enter__()
        assert kept_files == [["program.pt2"]]


def test_the_users_own_cache_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **given: Any) -> None:
        raise NotImplementedError

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = ProgramCache(default_folder())
    cache.remember("job", Verdict(eager_us=2.0, program_us=1.0, trace_s=0.5, compile_s=20.0, refused=None))
    monkeypatch.setattr("fasttrain.measure.bench.runner.subprocess.Popen", fail)
    with pytest.raises(NotImplementedError):
        ArmRunner({})(task("textbook")).__enter__()
    assert cache.verdict("job") is not None


@pytest.fixture
def no_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRunner:
    """A bench in an empty folder whose processes are made up."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fasttrain.commands.bench.Machine", lambda _: FakeMachine())
    runner = FakeRunner({"eager": [1e-3]})
    monkeypatch.setattr("fasttrain.commands.bench.ArmRunner", lambda _: runner)
    return runner


BENCH = ["bench", "--workload", "mlp", "--device", "cpu", "--blocks", "7"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--out", "."], "is a folder"),
        (["--out", "file/record.json"], "is no folder"),
        (["--markdown", "file/table.md"], "is no folder"),
        (["--markdown", "bench-mlp-cpu.json"], "name two files"),
        (["--out", "a.json", "--markdown", "link"], "name two files"),
        (["--out", "\udcff.json"], r"'\udcff.json': the command is recorded"),
        (["--module", "nope:f"], "there is no module 'nope'"),
        (["--module", "tests.measure.bench.user_arms:nope"], "has no function 'nope'"),
    ],
)
def test_what_could_only_fail_afterwards_is_refused_before(
    options: list[str], said: str, no_blocks: FakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    Path("link").symlink_to("a.json")
    assert cli.main([*BENCH, "--arms", "eager", *options]) == 2
    assert said in capsys.readouterr().err
    assert no_blocks.tasks == []


def test_what_cannot_be_kept_is_shown(
    no_blocks: FakeRunner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fasttrain.commands.bench.check_target", lambda _: None)  # it is in the way since
    assert cli.main([*BENCH, "--arms", "eager", "--out", ".", "--json"]) == 2
    found = capsys.readouterr()
    assert json.loads(found.out)["arms"]["eager"]["blocks"][6]["step_s"] == pytest.approx(1e-3)
    assert "cannot be written" in found.err


def test_a_table_goes_to_a_folder_that_is_made(no_blocks: FakeRunner) -> None:
    assert cli.main([*BENCH, "--arms", "eager", "--markdown", "new/table.md"]) == 0
    assert "| eager |" in Path("new/table.md").read_text()


def test_it_is_told_with_what_the_noise_was_measured(no_blocks: FakeRunner, capsys: pytest.CaptureFixture[str]) -> None:
    assert no_blocks
    assert cli.main([*BENCH, "--arms", "eager"]) == 0
    assert "measured before" not in capsys.readouterr().out
    remember_noise(environment(torch.device("cpu")), "cnn", Noise(floor=0.25, smallest_effect=0.5, pairs=10))
    assert cli.main([*BENCH, "--arms", "eager"]) == 0
    assert "the noise was measured before, with cnn\n" in capsys.readouterr().out
    assert cli.main([*BENCH, "--aa", "eager"]) == 0
    assert "measured before" not in capsys.readouterr().out


def test_ctrl_c_before_the_first_block_is_told(monkeypatch: pytest.MonkeyPatch, no_blocks: FakeRunner) -> None:
    def interrupt(given: ArmTask) -> AbstractContextManager[FakeProcess]:
        if given.reference is None:
            return FakeRunner({})(given)
        raise KeyboardInterrupt

    monkeypatch.setattr("fasttrain.commands.bench.ArmRunner", lambda _: interrupt)
    assert cli.main([*BENCH, "--arms", "eager"]) == 130
    assert not Path("bench-mlp-cpu.json").exists()


@pytest.mark.parametrize(("dies", "is_kept"), [(False, True), (True, False)])
def test_noise_is_kept_where_it_was_measured(
    dies: bool, is_kept: bool, monkeypatch: pytest.MonkeyPatch, no_blocks: FakeRunner
) -> None:
    here = environment(torch.device("cpu"))
    old = Noise(floor=0.25, smallest_effect=0.5, pairs=10)
    remember_noise(here, "cnn", old)
    given = [*[1e-3] * 4, *[ProcessDiedError("killed")] * 99] if dies else [1e-3, 1.01e-3, 1.02e-3]
    monkeypatch.setattr("fasttrain.commands.bench.ArmRunner", lambda _: FakeRunner({"eager": given}))
    assert cli.main([*BENCH, "--aa", "eager"]) == 0
    remember_noise(here, "cnn", Noise(floor=0.75, smallest_effect=1.5, pairs=10))  # what mlp takes if it has none
    known = known_noise(here, "mlp")
    assert known is not None
    assert (known.floor < 0.25) == is_kept
    assert (known.floor == 0.75) != is_kept


def test_bench_leaves_a_record_and_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fasttrain.commands.bench.Machine", lambda _: FakeMachine())
    design = ["--blocks", "1", "--timed-s", "0.05", "--warmup-s", "0", "--device", "cpu"]
    arms = ["--arms", "tuned", "--module", "tests.measure.bench.user_arms:make_wrong_arm"]
    assert cli.main(["bench", "--workload", "mlp", *arms, *design, "--json", "--markdown", "table.md"]) == 0
    record = read_record(tmp_path / "bench-mlp-cpu.json")
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "bench-mlp-cpu.json").read_text())
    assert list(record.arms) == ["tuned"]
    assert record.arms["tuned"].agreement is not None
    assert "leave the reference's" in record.refused["tests.measure.bench.user_arms:make_wrong_arm"]
    assert record.command.startswith("python -m fasttrain bench --workload mlp --arms tuned --module")
    assert "| tuned |" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("keep_cache", [True, False])
def test_a_benchmark_uses_the_users_cache_where_that_is_asked_for(
    keep_cache: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []

    def start(*_: Any, env: dict[str, str], **given: Any) -> None:
        found.append(env["XDG_CACHE_HOME"])
        raise NotImplementedError

    options = Bench(workload="mlp", device="cpu", keep_cache=keep_cache, out=tmp_path / "record.json")
    monkeypatch.setattr("fasttrain.commands.bench.environment", lambda _: ENVIRONMENT)
    with monkeypatch.context() as patched:
        patched.setattr("fasttrain.measure.bench.runner.subprocess.Popen", start)
        with pytest.raises(NotImplementedError):
            options.execute(["bench"])
    assert (found == [os.environ["XDG_CACHE_HOME"]]) == keep_cache

    monkeypatch.setattr("fasttrain.commands.bench.run_bench", lambda *_, **given: (record({"eager": arm(1e-3)}), False))
    assert options.execute(["bench"]) == 0
    assert (KEPT_CACHE in read_record(tmp_path / "record.json").notes) == keep_cache
