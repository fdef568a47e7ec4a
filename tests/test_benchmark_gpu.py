"""The check on a GPU keeps its deadlines, ends all that it starts, and keeps what came before it was cut off."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_stages
from benchmarks.gpu import Check, Group, Stage
from benchmarks.gpu_archive import MOST_FILES, Archive, restore_programs
from fasttrain import FastLoop
from fasttrain.measure.bench.losses import check_losses, running_means
from tests.step.cuda_stand_in import Recording, with_graphs
from tests.step.fakes import Graphs

SLOW = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('kept')"
"""Python takes a moment to start: the deadlines of these tests give it that."""


@pytest.fixture
def hears_ctrl_c() -> Iterator[None]:
    """Python's own handler of Ctrl-C, also where this process was started with Ctrl-C ignored (`nohup ... &`)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def made(tmp_path: Path) -> Check:
    return check(tmp_path)


def check(folder: Path, budget_s: float = 60.0, **options: Any) -> Check:
    return Check(folder / "out", folder / "work", budget_s + gpu.MARGIN_S, device="cpu", **options)


def stage(name: str, code: str) -> Stage:
    return Stage(name, ["-c", code])


def results(made: Check, kind: str = "stage") -> dict[str, dict[str, Any]]:
    return {each["stage"]: each for each in gpu.read_lines(made.results) if each["kind"] == kind}


def output(made: Check, name: str) -> str:
    return (made.work / "logs" / f"{name}.txt").read_text()


def is_running(process: int) -> bool:
    try:
        return Path("/proc", str(process), "stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_a_stage_that_hangs_is_interrupted_and_one_that_fails_is_noted(tmp_path: Path) -> None:
    made = check(tmp_path, 8.0)
    groups = [Group(4, [stage("slow", SLOW)]), Group(4, [stage("bad", "raise SystemExit(3)"), stage("good", "")])]
    begin = time.perf_counter()
    assert not made.run(groups)
    assert time.perf_counter() - begin < 12
    ended = results(made)
    assert ended["slow"]["how"].startswith("interrupted after 4")
    assert output(made, "slow") == "kept\n"
    assert (ended["bad"]["how"], ended["good"]["how"]) == ("exit code 3", "ok")


@pytest.mark.usefixtures("hears_ctrl_c")
def test_a_stage_hears_ctrl_c_where_the_check_ignores_it(tmp_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what it starts in the background
    made = check(tmp_path, 4.0)
    made.run([Group(4, [stage("slow", SLOW)])])
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert output(made, "slow") == "kept\n"


def test_what_a_stage_has_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that ignores Ctrl-C, and a process that it has put into a session of its own."""
    monkeypatch.setattr(gpu, "GRACE_S", 0.2)
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(120)'], start_new_session=True)\n"
        "print(child.pid, flush=True); time.sleep(120)"
    )
    made = check(tmp_path, 3.0)
    assert not made.run([Group(3, [stage("deaf", code)])])
    started = int(output(made, "deaf"))
    deadline = time.perf_counter() + 10.0
    while is_running(started):  # it ends when the system gets round to it
        assert time.perf_counter() < deadline
        time.sleep(0.01)


def test_stages_that_the_budget_is_not_for_have_what_others_leave(tmp_path: Path) -> None:
    """As where much has failed in an earlier call: what is run again comes first, and the end stays."""
    made = check(tmp_path, 6.0)
    groups = [Group(3, [stage("quick", "")]), Group(6, [stage("slow", SLOW)]), Group(3, [stage("late", "")])]
    begin = time.perf_counter()
    assert not made.run(groups, planned_s=6.0)
    assert time.perf_counter() - begin < 10
    ended = {name: each["how"] for name, each in results(made).items()}
    assert (ended["quick"], ended["late"]) == ("ok", "no time was left")
    assert ended["slow"].startswith("interrupted after")


def test_a_stage_knows_when_it_is_to_end_and_when_it_has_to(tmp_path: Path) -> None:
    made = check(tmp_path, 40.0)
    show = "import os, time; print(*(float(os.environ['FASTTRAIN_CHECK_' + n]) - {} for n in ('UNTIL', 'DEADLINE')))"
    show = show.format(made.begin)
    assert made.run([Group(20, [stage("early", "")]), Group(20, [stage("late", show)])])
    until, deadline = map(float, output(made, "late").split())
    assert until < 39  # the first stage has left time
    assert deadline == pytest.approx(40, abs=1e-3)


def test_a_stage_without_time_is_not_started(tmp_path: Path) -> None:
    made = check(tmp_path, 1.0)
    assert not made.run([Group(1, [stage("late", "")])])
    assert results(made)["late"]["how"] == "no time was left"


@pytest.mark.usefixtures("hears_ctrl_c")
def test_ctrl_c_ends_all_stages_that_run_side_by_side(made: Check) -> None:
    threading.Timer(4.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    begin = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        made.run([Group(1, [stage("first", SLOW), stage("second", SLOW)])])
    assert time.perf_counter() - begin < 30
    assert [output(made, name) for name in ("first", "second")] == ["kept\n"] * 2
    assert {each["how"] for each in results(made).values()} == {"interrupted: the check was ended"}
    assert (made.out / "check.tar.gz").exists()


def test_stages_of_a_group_run_side_by_side(made: Check) -> None:
    """Each waits for what the other one writes."""
    meet = (
        "import pathlib, time; mine, other = map(pathlib.Path, {files}); mine.touch()\n"
        "while not other.exists(): time.sleep(0.01)"
    )
    files = [str(made.work / name) for name in ("a", "b")]
    both = [stage("first", meet.format(files=files)), stage("second", meet.format(files=files[::-1]))]
    assert made.run([Group(1, both)])


def test_nothing_runs_where_there_is_no_device(made: Check) -> None:
    code = f"raise SystemExit({gpu.NO_DEVICE})"
    assert not made.run([Group(1, [stage("probe", code)]), Group(1, [stage("next", "")])])
    assert list(results(made)) == ["probe"]


@pytest.mark.parametrize("code", [SLOW, "raise SystemExit(1)"])
def test_a_probe_that_is_slow_or_fails_in_a_part_ends_nothing(code: str, tmp_path: Path) -> None:
    made = check(tmp_path, 6.0)
    assert not made.run([Group(3, [stage("probe", code)]), Group(3, [stage("next", "")])])
    assert results(made)["next"]["how"] == "ok"


def test_logs_of_compilers_stay_and_are_counted(made: Check) -> None:
    code = (
        "import os, shutil, tempfile, time; folder = tempfile.mkdtemp(prefix='fasttrain-build-')\n"
        "log = open(folder + '/log', 'w'); log.write('first '); log.flush(); time.sleep(1.5)\n"
        "log.write('last'); log.close(); shutil.rmtree(folder)"
    )
    assert made.run([Group(1, [stage("programs-mlp", code)])])
    assert results(made)["programs-mlp"]["compilers"] == 1
    (kept,) = (made.work / "logs").glob("programs-mlp-fasttrain-build-*")
    assert kept.read_text() == "first last"


def test_a_measurement_that_compiled_again_is_named() -> None:
    ended = {"kind": "stage", "how": "ok", "compilers": 0}
    found = [{**ended, "stage": "programs-mlp", "compilers": 2}, {**ended, "stage": "headline-mlp"}]
    assert gpu.recompiled(found) == []
    assert gpu.recompiled([*found, {**ended, "stage": "bench-mlp", "compilers": 1}]) == ["bench-mlp"]
    assert gpu.recompiled([*found, {**ended, "stage": "bench-cnn", "compilers": 1}]) == []  # had no stage of programs


def programs_in(work: Path, *sizes: int) -> None:
    folder = work / "cache" / "fasttrain" / "programs"
    folder.mkdir(parents=True, exist_ok=True)
    for size in sizes:
        number = len(list(folder.iterdir()))
        (folder / f"{number}.pt2").write_bytes(os.urandom(size))


def test_the_archive_keeps_files_within_their_size_and_gives_programs_back(tmp_path: Path) -> None:
    out, work, told = tmp_path / "out", tmp_path / "work", []
    out.mkdir()
    (work / "logs").mkdir(parents=True)
    (work / "logs" / "a.txt").write_text("a log")
    (work / "logs" / "large.txt").write_bytes(os.urandom(400_000))
    archive = Archive(out, work, told.append, most_bytes=300_000)
    programs_in(work, 150_000, 150_000)
    archive.write()
    first = (out / "programs-0.tar").stat().st_mtime_ns
    programs_in(work, 50_000, 400_000, *[250_000] * 6)
    archive.write()
    files = list(out.iterdir())
    assert len(files) <= MOST_FILES - 1  # beside the results
    assert all(file.stat().st_size <= 300_000 for file in files)
    assert (out / "programs-0.tar").stat().st_mtime_ns > first  # had room for one more
    assert {each["reason"] for each in told} == {"no archive has room for it", "too large for an archive"}
    with tarfile.open(out / "check.tar.gz") as tar:
        assert tar.getnames() == ["logs/a.txt"]
    restored = tmp_path / "restored"
    count = restore_programs(out, restored)
    assert count == 10 - sum(each["file"].endswith(".pt2.gz") for each in told)
    folder = restored / "cache" / "fasttrain" / "programs"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "0.pt2").read_bytes() == (work / "cache/fasttrain/programs/0.pt2").read_bytes()


def test_a_file_outside_the_work_folder_is_not_restored(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "programs-0.tar", "w") as tar:
        content = gzip.compress(b"code")
        entry = tarfile.TarInfo("../evil.pt2.gz")
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    assert restore_programs(tmp_path, tmp_path / "work") == 0
    assert not (tmp_path / "evil.pt2").exists()


def test_a_line_that_was_cut_off_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    gpu.append_line(path, {"kind": "a"})
    gpu.append_line(path, {"kind": "b", "path": tmp_path})
    path.write_bytes(path.read_bytes() + b'{"kind": "c')
    assert [each["kind"] for each in gpu.read_lines(path)] == ["a", "b"]


def test_both_calls_fit_into_the_time_that_they_are_for() -> None:
    first, second = gpu.first_call(), gpu.second_call([])
    assert sum(group.seconds for group in first) + gpu.MARGIN_S < 380
    assert sum(group.seconds for group in second) + gpu.MARGIN_S < 250
    names = [each.name for group in (*first, *second) for each in group.stages]
    assert len(set(names)) == len(names) - 1  # the probe is in both
    assert {path for path in gpu.tests() if path.endswith(".py")} >= {"tests/step/test_graphed_gpu.py"}


def test_what_failed_is_run_again() -> None:
    ended = {"kind": "stage", "compilers": 0}
    earlier = [{**ended, "stage": "tests", "how": "exit code 1"}, {**ended, "stage": "headline-mlp", "how": "ok"}]
    names = [each.name for group in gpu.second_call(earlier) for each in group.stages]
    assert "tests" in names
    assert "headline-mlp" not in names


def test_tests_that_have_passed_are_not_run_again(tmp_path: Path) -> None:
    made = tmp_path / "test_made.py"
    made.write_text("def test_a(): pass\ndef test_ab(): pass\ndef test_b(): pass\n")
    gpu.append_line(tmp_path / "earlier.jsonl", {"kind": "test", "test": "test_made.py::test_a", "how": "passed"})
    gpu.append_line(tmp_path / "earlier.jsonl", {"kind": "test", "test": "test_made.py::test_b", "how": "failed"})
    variables = {"PYTHONPATH": os.pathsep.join(sys.path), "FASTTRAIN_CHECK_RESULTS": str(tmp_path / "now.jsonl")}
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command = [sys.executable, *gpu.pytest_command(), "-n", "2", "--rootdir", str(tmp_path), str(made)]
    for earlier, wanted in (
        ({}, {"test_a", "test_ab", "test_b"}),
        ({"FASTTRAIN_CHECK_EARLIER": str(tmp_path / "earlier.jsonl")}, {"test_ab", "test_b"}),
    ):
        (tmp_path / "now.jsonl").unlink(missing_ok=True)
        subprocess.run(command, cwd=tmp_path, env={**outer, **variables, **earlier}, check=True)
        assert {each["test"].split("::")[1] for each in gpu.read_lines(tmp_path / "now.jsonl")} == wanted


def test_predictions_are_shown_beside_what_was_measured() -> None:
    step = {"kind": "step", "stage": "headline-mlp", "workload": "mlp", "n": 9, "agrees": True}
    shown = gpu.summary(
        [
            {**step, "kind": "step, alone", "arm": "graph of 16", "step_us": 10.0, "n": 1},
            {**step, "arm": "eager", "step_us": 300.0},
            {**step, "arm": "graph of 16", "step_us": 60.0},
            {**step, "arm": "graph of 4", "step_us": 50.0, "agrees": False},
            {
                **step,
                "kind": "step, alone",
                "stage": "headline-cnn",
                "workload": "cnn",
                "arm": "eager",
                "step_us": 400.0,
            },
            {"kind": "error", "stage": "headline-cnn", "what": "cnn: program", "error": "EngineError: no compiler"},
        ]
    ).splitlines()
    assert "headline-cnn: cnn: program: EngineError: no compiler" in shown
    assert "mlp graph of 4: 50.0 us a step (n=9); its losses are not those of the first arm" in shown
    assert "mlp: 40 to 50, 60.0 (graph of 16), 5.00x" in shown
    assert "cnn eager: 400.0 us a step (n=9) (alone)" in shown  # the stage was cut off
    assert "cnn: 140 to 180, 400.0 (eager), 1.00x" in shown
    assert "chars: 800 to 1000, not measured" in shown


def test_an_earlier_call_is_needed_where_one_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--call", "2", "--out", str(tmp_path / "out"), "--archive", str(tmp_path)]
    assert gpu.main(given) == gpu.EXIT_USAGE
    assert "no results of an earlier call" in capsys.readouterr().err


def test_all_programs_of_a_workload_are_compiled_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # what follows compiles nothing that others may use
    monkeypatch.setenv("FASTTRAIN_CHECK_RESULTS", str(tmp_path / "results.jsonl"))
    graphs = Graphs(monkeypatch, tmp_path)
    gpu_stages.programs("mlp")
    assert graphs.builds == 1
    assert graphs.walked > 0
    (told,) = gpu.read_lines(tmp_path / "results.jsonl")
    assert told["engine"].startswith("compiled: asked for")


def test_a_variant_has_programs_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_stages, "WORK", tmp_path)
    graphs = Graphs(monkeypatch, tmp_path)
    home = os.environ["XDG_CACHE_HOME"]
    gpu_stages.programs("mlp", "foreach")
    assert graphs.builds == 1
    assert os.environ["XDG_CACHE_HOME"] == home
    assert len(list((tmp_path / "cache" / "variants" / "mlp-foreach").glob("fasttrain/programs/*.pt2"))) == 1


def test_a_variant_that_the_compiler_was_not_told_of_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_stages, "WORK", tmp_path)
    Graphs(monkeypatch, tmp_path)  # starts no process, so that none sets anything
    path = list(sys.path)
    with pytest.raises(RuntimeError, match="1 programs were compiled, 0 of them with the settings of the variant"):
        gpu_stages.programs("mlp", "pdl")
    assert sys.path == path
    assert not gpu_stages.cache_of("mlp", "pdl").exists()


def compiling_child(folder: Path) -> subprocess.CompletedProcess[str]:
    """A process that starts as one that compiles does, and then has nothing to do."""
    command = [sys.executable, "-m", "fasttrain.step.build", str(folder / "missing")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        command,
        env=variables,
        text=True,
        capture_output=True,
        stdin=subprocess.PIPE,
        start_new_session=True,
        check=False,
    )


@pytest.mark.parametrize("variant", gpu_stages.CHILD_SETTINGS)
def test_the_process_that_compiles_sets_what_a_variant_says(variant: str, tmp_path: Path) -> None:
    """What is set is there in this version of torch: an unknown setting raises."""
    package = tmp_path / "made.pt2"
    with gpu_stages.set_in_children(gpu_stages.CHILD_SETTINGS[variant], tmp_path):
        compiling_child(tmp_path)
        package.touch()
    assert package.exists()


def test_a_setting_that_fails_ends_the_process_that_compiles(tmp_path: Path) -> None:
    with gpu_stages.set_in_children("raise ValueError('no such setting')", tmp_path):
        ended = compiling_child(tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == "ValueError: no such setting"


def test_arms_are_compared_timed_and_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results.jsonl"
    (tmp_path / "profiles").mkdir()
    monkeypatch.setattr(gpu_stages, "WORK", tmp_path)
    monkeypatch.setattr(gpu_stages, "STAGE", "headline-mlp")
    monkeypatch.setattr(gpu_stages, "TURN_S", 0.01)
    monkeypatch.setenv("FASTTRAIN_CHECK_RESULTS", str(results))
    monkeypatch.setenv("FASTTRAIN_CHECK_UNTIL", str(time.time() + 15))
    Graphs(monkeypatch, tmp_path)
    gpu_stages.headline("mlp")
    told = gpu.read_lines(results)
    kinds = {(each["kind"], each.get("arm", each.get("what"))) for each in told}
    wanted = ("arm", "losses", "step, alone", "step", "trace")
    assert {(kind, arm) for kind in wanted for arm in ("eager", "program")} <= kinds
    assert ("skipped", "graph of 16") in kinds
    assert all(len(each["first"]) == 20 for each in told if each["kind"] == "losses")
    assert all(each["agrees"] and each["n"] >= gpu_stages.LEAST_ROUNDS for each in told if each["kind"] == "step")
    assert all(each["num_kernels"] > 0 for each in told if each["kind"] == "trace")
    assert (tmp_path / "profiles" / "headline-mlp-program.json.gz").stat().st_size > 0


def test_an_arm_that_fails_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results.jsonl"
    (tmp_path / "profiles").mkdir()
    monkeypatch.setattr(gpu_stages, "WORK", tmp_path)
    monkeypatch.setattr(gpu_stages, "ERRORS", [])
    monkeypatch.setenv("FASTTRAIN_CHECK_RESULTS", str(results))
    monkeypatch.setenv("FASTTRAIN_CHECK_UNTIL", str(time.time() + 5))
    specs = [
        gpu_stages.ArmSpec("bad", "no such engine"),
        gpu_stages.ArmSpec("eager", "eager"),
        gpu_stages.ArmSpec("combo", "compiled", None, "combo"),  # would compile what is measured without its variant
    ]
    gpu_stages.measure("mlp", specs)
    told = [(each["kind"], each.get("arm", each.get("what"))) for each in gpu.read_lines(results)]
    assert ("error", "mlp: bad") in told
    assert ("step", "eager") in told
    assert ("skipped", "combo") in told
    assert gpu_stages.ERRORS == ["mlp: bad"]


@pytest.mark.parametrize(("errors", "code"), [([], 0), (["mlp: bad"], 1)])
def test_a_stage_that_told_of_an_error_has_failed(
    errors: list[str], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its other results stay, and a second call runs it again."""
    monkeypatch.setattr(gpu_stages, "ERRORS", [])
    monkeypatch.setitem(gpu_stages.STAGES, "probe", lambda: gpu_stages.ERRORS.extend(errors))
    assert gpu_stages.main(["probe"]) == code


def test_times_of_turns_stay_where_one_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTTRAIN_CHECK_RESULTS", str(tmp_path / "results.jsonl"))

    class Interrupted(gpu_stages.TimedArm):
        def turn(self) -> None:
            super().turn()
            if len(self.turns) == 5:
                raise KeyboardInterrupt

    monkeypatch.setattr(gpu_stages, "TimedArm", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu_stages.measure("mlp", [gpu_stages.ArmSpec("eager", "eager")])
    told = [each for each in gpu.read_lines(tmp_path / "results.jsonl") if each["kind"] == "step"]
    assert [(each["arm"], each["n"]) for each in told] == [("eager", 5)]


def test_an_arm_that_fails_in_a_turn_has_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    class Arm:
        def __init__(self, label: str, turns: list[str]) -> None:
            self.spec, self._left = gpu_stages.ArmSpec(label, "eager"), turns
            self.turns: list[tuple[float, float, int]] = []

        def turn(self) -> None:
            told.append(self.spec.label)
            if self._left.pop() == "fails":
                raise RuntimeError("CUDA error")

    told: list[str] = []
    monkeypatch.setattr(gpu_stages, "ERRORS", [])
    arms: Any = [Arm("a", ["fails", "ok"]), Arm("b", ["ok"] * 9)]
    gpu_stages.take_turns("mlp", arms, until=0.0)
    assert told == ["a", "b", "a", "b", "b"]


@pytest.mark.parametrize("size", [1, 4, 16])
def test_graphs_are_made_of_as_many_steps_as_an_arm_says(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = Recording(Graphs(monkeypatch, tmp_path))

    def loop(*given: Any, engine: str, **options: Any) -> FastLoop:
        made = FastLoop(*given, engine="eager", **options)
        if engine == "graphed":
            with_graphs(made.step, lane)
        return made

    monkeypatch.setattr(gpu_stages, "FastLoop", loop)
    eager = gpu_stages.TimedArm("mlp", gpu_stages.ArmSpec("eager", "eager"))
    arm = gpu_stages.TimedArm("mlp", gpu_stages.ArmSpec("graph", "graphed", size))
    check_losses(running_means(arm.losses), running_means(eager.losses), arm.tolerance)
    before, captures, num_steps = lane.launches, lane.captures, len(arm.batches)
    assert arm.steps(num_steps) == num_steps
    assert lane.launches - before == num_steps // size + num_steps % size
    assert lane.captures == captures
    arm.two_calls()()
    assert lane.launches - before == num_steps // size + num_steps % size + 3


def test_kernels_and_the_gaps_between_them_are_counted() -> None:
    def kernel(name: str, ts: float, dur: float, cat: str = "kernel") -> dict[str, Any]:
        return {"name": name, "ts": ts, "dur": dur, "cat": cat}

    events = [kernel("b", 14.0, 2.0), kernel("a", 0.0, 10.0), kernel("a", 17.0, 1.0), kernel("x", 0, 9, "cpu_op"), {}]
    found = gpu_stages.kernels_of({"traceEvents": events}, ["kernel"])
    assert (found["num_kernels"], found["busy_us"], found["gaps_us"]) == (3, 13.0, 5.0)
    assert found["kernels"][0] == {"name": "a", "calls": 2, "us": 11.0}


def test_the_check_runs_from_its_command_line(tmp_path: Path) -> None:
    """A whole call of one stage: without a GPU the probe says so, and nothing else would run."""
    given = ["--out", str(tmp_path / "out"), "--stage", "probe", "--budget-s", "60"]
    before = signal.getsignal(signal.SIGTERM)
    try:
        code = gpu.main(given)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert code == (0 if torch.cuda.is_available() else gpu.EXIT_FAILED)
    told = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [told[0]["kind"], told[-1]["kind"]] == ["begin", "end"]
    assert len(list((tmp_path / "out").iterdir())) <= MOST_FILES
    assert gpu.main(given) == gpu.EXIT_USAGE  # nothing is overwritten
