"""Checks and measures fasttrain on a machine with one CUDA GPU, within a budget of minutes.

A GPU is often lent for minutes, on a machine without a network. So the check runs in two calls, of 6 and 4 minutes;
whatever cuts a call off, what came before is on disk.

1. Where there is a network, in the root of a checkout: `python -m benchmarks.gpu pack`. It puts the data into `.data/`
   and the wheels that the other machine may lack into `.whl/`; git ignores both folders. Copy the checkout with them.
2. On the machine with the GPU, in the root of the checkout, at most 6 minutes:
   `python -m benchmarks.gpu --call 1 --out OUT`
3. Read `OUT/results.jsonl` and mend what failed. Keep it and `OUT/programs-*.tar` in `.data/call-1`.
4. On that machine again, at most 4 minutes: `python -m benchmarks.gpu --call 2 --out OUT2`.
   It runs what failed again, tests that passed left out; then it tries variants of the compiled programs, and measures
   reviews in two blocks. The compiled programs come from `.data/call-1`.

Stages run in the order of what their results are worth, and each has a deadline, fixed from the start: what a stage
does not use, those after it may; what takes too long is interrupted, and takes time from no other.

A rehearsal on a machine without a GPU: `python -m benchmarks.gpu --call 1 --out OUT --device cpu --budget-s 1800`. With
`--sabotage STAGE=fail`, `hang` or `deaf` a stage fails, hangs, or hangs and ignores Ctrl-C.

OUT holds at most 8 files: `results.jsonl`, one JSON object a line, written at once; `check.tar.gz` with logs, records
and profiles; `programs-N.tar` with the compiled programs; an archive has at most 16 MiB. The archives are rewritten
after each group of stages. `--budget-s` scales the deadlines of all stages; `--stage NAME` runs only some. Settings of
the GPU and its driver are left as they are; TF32 is off (NVIDIA_TF32_OVERRIDE=0).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu_archive import Archive, restore_programs
from benchmarks.places import REPOSITORY, log

DATA = ("reviews_lite.csv.gz", "mnist_t10k.npz", "tinyshakespeare.txt")
WHEELS = ("tyro", "docstring-parser", "typeguard")
"""Of pure Python, for the command line: what else it needs comes with torch."""

WORKLOADS = ("reviews", "mlp", "cnn", "chars", "chars-bf16")

VARIANTS = {
    "reviews": ("pdl",),
    "mlp": ("combo", "foreach", "pdl"),
    "cnn": ("cudnn-norm", "contiguous", "bf16"),
    "chars": ("combo", "foreach"),
}
"""Of the compiled program, by workload; see `gpu_stages.VARIANTS`."""

PREDICTED_US = {
    "reviews": (15, 20),
    "mlp": (40, 50),
    "cnn": (140, 180),
    "chars": (800, 1000),
    "chars-bf16": (350, 450),
}
"""Of a step of the fastest arm on an H200, as predicted before the first run."""

TARGETS = (
    "reviews: 6 to 8 million samples a second",
    "reviews, mlp: 15 times the eager loop over resident tensors, 500 times the textbook",
    "cnn with bf16 and channels_last, chars: 3 times the fp32 textbook",
    "no host sync in steady state",
)

MARGIN_S = 12.0
"""Of the budget, kept for the last stage's end and the last archive."""

GRACE_S = 4.0
"""An interrupted stage has so long to write what it has."""

LEAST_S = 2.0
"""With less time left before its deadline, a stage is not started."""

LOOK_S = 0.2

TOLD = 300
"""Characters of an error in the summary."""

TEST_PROCESSES = 8
"""Of 16 cores; the stages beside the tests compile five programs."""

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

NO_DEVICE = 2
"""The exit code of a stage that finds no GPU."""


class Stage(NamedTuple):
    """A process: the arguments of Python."""

    name: str
    arguments: list[str]


class Group(NamedTuple):
    """Stages that run side by side, and the seconds that they have, before these are scaled to the budget."""

    seconds: float
    stages: list[Stage]


def inner(name: str, *arguments: str) -> Stage:
    """A stage of `gpu_stages`."""
    return Stage(name, ["-m", "benchmarks.gpu_stages", *arguments])


def first_call() -> list[Group]:
    """The stages of the first call, in order."""
    programs = [inner(f"programs-{name}", "programs", name) for name in WORKLOADS]
    return [
        Group(24, [inner("probe", "probe")]),
        Group(140, [*programs, Stage("tests", tests())]),
        *[Group(24, [inner(f"headline-{name}", "headline", name)]) for name in WORKLOADS],
        Group(12, [Stage("overlap", overlap())]),
        Group(8, [inner("ceilings", "ceilings")]),
        Group(34, [inner("bench-reviews", "bench", "reviews", "1")]),
        Group(26, [inner("bench-mlp", "bench", "mlp", "1")]),
    ]


def second_call(earlier: Sequence[dict[str, Any]]) -> list[Group]:
    """The stages of the second call: what failed in the first, the variants, and reviews once more.

    The more has failed, the fewer of the others are reached.

    Args:
        earlier: results of the first call.
    """
    failed = {each["stage"] for each in earlier if each["kind"] == "stage" and each["how"] != "ok"} - {"probe"}
    again = [group._replace(stages=[each for each in group.stages if each.name in failed]) for group in first_call()]
    variants = [(workload, name) for workload, names in VARIANTS.items() for name in names]
    programs = [inner(f"programs-{workload}-{name}", "programs", workload, name) for workload, name in variants]
    return [
        Group(16, [inner("probe", "probe")]),
        *[group for group in again if group.stages],
        Group(80, programs),
        *[Group(20, [inner(f"variants-{workload}", "variants", workload)]) for workload in VARIANTS],
        Group(50, [inner("bench-reviews-2", "bench", "reviews", "2")]),
    ]


def tests() -> list[str]:
    """The tests that need a GPU, by path; warnings are no errors here.

    Most of them compile, which a file's tests would do one after the other in one process.
    """
    paths = sorted((REPOSITORY / "tests").rglob("test_*.py"))
    marked = [path.relative_to(REPOSITORY) for path in paths if "mark.gpu" in path.read_text("utf-8")]
    can_spread = importlib.util.find_spec("xdist") is not None
    spread = ["-n", str(TEST_PROCESSES), "--dist", "worksteal"] if can_spread else []
    return [*pytest_command(), "-m", "gpu", "-k", "not copies_run_while", *spread, *map(str, marked)]


def overlap() -> list[str]:
    """The one test that measures times: alone."""
    return [*pytest_command(), "-k", "copies_run_while", "tests/data/test_stream_gpu.py"]


def pytest_command() -> list[str]:
    """Of pytest, which appends each outcome to the results."""
    plugins = ["-p", "benchmarks.gpu_stages", "-p", "no:cacheprovider"]
    if not importlib.metadata.entry_points(group="pytest11", name="fasttrain"):
        plugins += ["-p", "fasttrain.measure.pytest_plugin"]
    return ["-m", "pytest", "-q", "-W", "default", *plugins]


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Appends one JSON object as a line, which is on disk when this returns; several processes may do so."""
    line = json.dumps(record, ensure_ascii=False, default=str).encode() + b"\n"
    descriptor = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
    try:
        os.write(descriptor, line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The results of a file; a line that was cut off is left out."""
    found: list[dict[str, Any]] = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


class Running:
    """A stage that runs, in a session of its own.

    Args:
        stage: which.
        check: whose.
        planned_s: seconds after which it is to end.
        deadline: when it is interrupted; later, where stages before it have left time.
    """

    def __init__(self, stage: Stage, check: Check, planned_s: float, deadline: float) -> None:
        self.stage = stage
        self.how = ""
        self.is_over = False
        self.begin = time.time()
        self.compilers: set[str] = set()
        self._work = check.work
        self._mark = f"FASTTRAIN_CHECK_MARK={uuid.uuid4().hex}"
        self._scratch = check.work / "tmp" / stage.name
        self._scratch.mkdir(parents=True, exist_ok=True)
        variables = check.variables(stage.name, self._scratch, min(self.begin + planned_s, deadline), deadline)
        variables.update([self._mark.split("=")])
        # A shell has what it starts in the background ignore Ctrl-C, and a child inherits that, but no handler.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with (check.work / "logs" / f"{stage.name}.txt").open("ab") as output:
                self.process = subprocess.Popen(
                    [sys.executable, *check.command(stage)],
                    cwd=REPOSITORY,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=variables,
                    start_new_session=True,
                )
        finally:
            signal.signal(signal.SIGINT, before)

    def look(self) -> bool:
        """Whether it still runs; keeps the logs of the compilers that it has started."""
        for folder in self._scratch.glob("fasttrain-build-*"):
            self.compilers.add(folder.name)
            kept = self._work / "logs" / f"{self.stage.name}-{folder.name}.txt"
            if not kept.exists():
                with suppress(OSError):
                    os.link(folder / "log", kept)  # stays when the folder goes
        if not self.how and self.process.poll() is not None:
            code = self.process.returncode
            self.how = "ok" if code == 0 else f"exit code {code}"
        return not self.how

    def interrupt(self, reason: str) -> None:
        """Ctrl-C, if it still runs."""
        if self.look():
            self.how = reason
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGINT)

    def end(self, until: float) -> None:
        """Waits for it until then, and ends it and all that it has started."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, until - time.time()))
        for process in processes_of(self.process.pid, self._mark.encode()):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self._scratch, ignore_errors=True)
        self.is_over = True


def processes_of(leader: int, mark: bytes) -> list[int]:
    """Ids of the processes of a stage: of its session, and those in other sessions that have inherited its mark."""
    found: list[int] = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # it has ended meanwhile, or is another user's
            if os.getsid(int(name)) == leader or mark in Path("/proc", name, "environ").read_bytes().split(b"\0"):
                found.append(int(name))
    return [each for each in found if each != os.getpid()]


SABOTAGE = {
    "fail": "raise SystemExit(3)",
    "hang": "import time; time.sleep(86400)",
    "deaf": "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(86400)'], start_new_session=True)\n"
    "time.sleep(86400)",
}


class Check:
    """One call of the check.

    Args:
        out: what is kept of it.
        work: a folder for all that it makes.
        budget_s: seconds that it may take.
        device: "cuda" or "cpu".
        data: the folder of data, if there is one.
        sabotage: stages that are to fail, and how.
        earlier: results of an earlier call; tests that have passed there are left out.
    """

    def __init__(
        self,
        out: Path,
        work: Path,
        budget_s: float,
        *,
        device: str = "cuda",
        data: Path | None = None,
        sabotage: dict[str, str] | None = None,
        earlier: Path | None = None,
    ) -> None:
        self.begin = time.time()
        self.out = out
        self.work = work
        self.results = out / "results.jsonl"
        self._budget_s = budget_s
        self._device = device
        self._data = data
        self._sabotage = sabotage or {}
        self._earlier = earlier
        self._site = work / "site"
        self._programs: set[str] = set()
        out.mkdir(parents=True, exist_ok=True)
        for name in ("logs", "records", "profiles", "cache", "tmp", "site"):
            (work / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        self.archive = Archive(out, work, self.tell)

    def tell(self, record: dict[str, Any]) -> None:
        """Appends a result."""
        append_line(self.results, {**record, "t": round(time.time() - self.begin, 1)})

    def unpack_wheels(self, folder: Path) -> list[str]:
        """Makes packages of pure Python importable for the stages; returns the names of their files."""
        wheels = sorted(folder.glob("*-none-any.whl"))
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as packed:
                packed.extractall(self._site)
        return [wheel.name for wheel in wheels]

    def command(self, stage: Stage) -> list[str]:
        """What Python is given for a stage."""
        how = self._sabotage.get(stage.name)
        return stage.arguments if how is None else ["-c", SABOTAGE[how]]

    def variables(self, stage: str, scratch: Path, until: float, deadline: float) -> dict[str, str]:
        """The environment of a stage."""
        paths = [str(self._site), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        folders = {"FASTTRAIN_DATA": self._data, "FASTTRAIN_CHECK_EARLIER": self._earlier}
        return {
            **os.environ,
            **threads,
            **{name: str(path) for name, path in folders.items() if path is not None},
            "NVIDIA_TF32_OVERRIDE": "0",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(scratch),
            "XDG_CACHE_HOME": str(self.work / "cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"),
            "FASTTRAIN_CHECK_STAGE": stage,
            "FASTTRAIN_CHECK_RESULTS": str(self.results.resolve()),
            "FASTTRAIN_CHECK_WORK": str(self.work),
            "FASTTRAIN_CHECK_DEVICE": self._device,
            "FASTTRAIN_CHECK_BEGIN": str(self.begin),
            "FASTTRAIN_CHECK_UNTIL": str(until),
            "FASTTRAIN_CHECK_DEADLINE": str(deadline),
        }

    def run(self, groups: Sequence[Group], planned_s: float | None = None) -> bool:
        """Runs all groups, each until its deadline; returns whether all stages ended well.

        Deadlines are fixed from the start: what one group does not use, those after it may.

        Args:
            groups: in order.
            planned_s: seconds that the budget is scaled to; of all groups if not given. Where the groups have more,
                the last ones have no time.
        """
        scale = (self._budget_s - MARGIN_S) / (planned_s or sum(group.seconds for group in groups))
        end = self.begin + self._budget_s - MARGIN_S
        deadline, is_well = self.begin, True
        for group in groups:
            deadline = min(deadline + scale * group.seconds, end)
            ended = self._run_group(group, deadline, scale * group.seconds)
            is_well = is_well and all(how == "ok" for how in ended.values())
            if ended.get("probe") == f"exit code {NO_DEVICE}":
                log("there is no GPU: nothing else can run here; see results.jsonl")
                return False
        return is_well

    def _run_group(self, group: Group, deadline: float, planned_s: float) -> dict[str, str]:
        """Runs the stages of a group side by side; returns how each ended."""
        left_s = deadline - time.time()
        if left_s < LEAST_S:
            for stage in group.stages:
                self._ended(stage.name, "no time was left", 0.0, 0)
            return dict.fromkeys((stage.name for stage in group.stages), "no time was left")
        running: list[Running] = []
        reason = "interrupted: the check was ended"
        try:
            for stage in group.stages:
                running.append(Running(stage, self, planned_s, deadline))
            self._wait(running, deadline)
            reason = f"interrupted after {time.time() - running[0].begin:.0f} s"
        finally:
            left = [each for each in running if not each.is_over]
            for each in left:
                each.interrupt(reason)
            until = time.time() + GRACE_S
            for each in left:
                self._end(each, until)
            self.archive.write()
        return {each.stage.name: each.how for each in running}

    def _wait(self, running: Sequence[Running], deadline: float) -> None:
        """Waits until all have ended, or the deadline; notes each one's end, and keeps what it has made, at once."""
        alive = list(running)
        while alive and time.time() < deadline:
            time.sleep(LOOK_S)
            for each in [each for each in alive if not each.look()]:
                alive.remove(each)
                self._end(each, time.time())
                if alive:
                    self.archive.write()

    def _end(self, running: Running, until: float) -> None:
        running.end(until)
        self._ended(running.stage.name, running.how, time.time() - running.begin, len(running.compilers))

    def _ended(self, name: str, how: str, seconds: float, compilers: int) -> None:
        programs = {path.stem for path in self.work.glob("cache/**/programs/*.pt2")}
        new, self._programs = sorted(programs - self._programs), programs | self._programs
        seconds = round(seconds, 1)
        record = {"kind": "stage", "stage": name, "how": how, "seconds": seconds, "compilers": compilers}
        self.tell({**record, "new_programs": new})
        log(f"{time.time() - self.begin:6.1f} s  {name}: {how}, {seconds} s, {compilers} compilers")


def summary(results: Sequence[dict[str, Any]]) -> str:
    """A short table: how stages ended, and what was predicted beside what was measured."""
    lines = [f"{each['stage']}: {each['how']}" for each in results if each["kind"] == "stage" and each["how"] != "ok"]
    errors = [each for each in results if each["kind"] == "error" and "KeyboardInterrupt" not in each["error"]]
    lines += [f"{each['stage']}: {each['what']}: {each['error'][:TOLD]}" for each in errors]
    lines += [f"test failed: {each['test']}" for each in results if each["kind"] == "test" and each["how"] == "failed"]
    timed = last_times(results)
    for each in timed:
        told = "" if each["agrees"] else "; its losses are not those of the first arm"
        told += "" if each["kind"] == "step" else f" ({each['kind'].removeprefix('step, ')})"
        lines.append(f"{each['workload']} {each['arm']}: {each['step_us']:.1f} us a step (n={each['n']}){told}")
    lines += ["workload: predicted us, measured us (fastest arm), times eager", *predicted_and_measured(timed)]
    for each in (each for each in results if each["kind"] == "bench"):
        rate = f"{each['samples_per_s']:,.0f} samples/s" if each.get("samples_per_s") else each.get("refused")
        lines.append(f"{each['stage']} {each['arm']}: {rate}")
    lines += [f"target: {each}" for each in TARGETS]
    return "\n".join(lines)


def last_times(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last time of a step that a stage has told of each arm: of all rounds, or of what came before it ended."""
    kinds = ("step", "step, so far", "step, alone")
    return list({(each["stage"], each["arm"]): each for each in results if each["kind"] in kinds}.values())


def predicted_and_measured(timed: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each workload; an arm whose losses are not those of eager steps does not count."""
    lines: list[str] = []
    for workload, (low, high) in PREDICTED_US.items():
        found = [each for each in timed if each["workload"] == workload and each["agrees"]]
        best = min(found, key=lambda each: each["step_us"], default=None)
        measured = "not measured"
        if best is not None:
            eager = next((each["step_us"] for each in found if each["arm"] == "eager"), None)
            ratio = "-" if eager is None else f"{eager / best['step_us']:.2f}x"
            measured = f"{best['step_us']:.1f} ({best['arm']}), {ratio}"
        lines.append(f"{workload}: {low} to {high}, {measured}")
    return lines


def recompiled(results: Sequence[dict[str, Any]]) -> list[str]:
    """Stages that measure, and had something compiled all the same though the stage of programs had ended well."""
    stages = {each["stage"]: each for each in results if each["kind"] == "stage"}
    found: list[str] = []
    for name, each in stages.items():
        kind, _, workload = name.partition("-")
        before = stages.get(f"programs-{workload.removesuffix('-2')}")
        if kind in ("headline", "bench") and before is not None and before["how"] == "ok" and each["compilers"]:
            found.append(name)
    return found


def pack(data: Path) -> int:
    """Fills `.data/` and `.whl/`; returns the exit code."""
    (REPOSITORY / ".data").mkdir(exist_ok=True)
    missing = [name for name in DATA if not (data / name).is_file()]
    for name in DATA:
        if name not in missing:
            shutil.copyfile(data / name, REPOSITORY / ".data" / name)
    if missing:
        log(f"{data} has no {', '.join(missing)}: name the folder of data with --data")
        return EXIT_USAGE
    git = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    (REPOSITORY / ".data" / "commit").write_text(commit + "\n", "utf-8")
    shutil.rmtree(REPOSITORY / ".whl", ignore_errors=True)
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "-d", str(REPOSITORY / ".whl")]
    return subprocess.run([sys.executable, "-m", "pip", "download", *options, *WHEELS], check=False).returncode


def data_folder(given: Path | None) -> Path | None:
    """Where the data is: the given folder, `.data`, `$FASTTRAIN_DATA` or `shared/data` beside the checkout."""
    usual = [REPOSITORY / ".data", os.environ.get("FASTTRAIN_DATA"), REPOSITORY.parent / "shared" / "data"]
    folders = [given] if given is not None else [Path(each) for each in usual if each]
    return next((each.resolve() for each in folders if (each / DATA[0]).is_file()), None)


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__, formatter_class=raw)
    parser.add_argument("command", nargs="?", choices=("run", "pack"), default="run")
    parser.add_argument("--call", type=int, choices=(1, 2), default=1)
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="empty folder for what is kept")
    parser.add_argument("--budget-s", type=float, help="seconds in all; by default what the call needs")
    parser.add_argument("--stage", action="append", help="run only this stage; may be repeated")
    parser.add_argument("--data", type=Path, help="folder of data; by default .data, then $FASTTRAIN_DATA")
    parser.add_argument(
        "--archive", type=Path, help="what an earlier call has left; by default .data/call-1 for call 2"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--sabotage", action="append", default=[], metavar="STAGE=HOW", help=", ".join(SABOTAGE))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Runs the check; returns the exit code: 0 if all stages ended well."""
    options = parsed(arguments)
    if options.command == "pack":
        return pack(options.data or data_folder(None) or REPOSITORY.parent / "shared" / "data")
    options.out = options.out.resolve()
    if (options.out / "results.jsonl").exists():
        log(f"{options.out} holds the results of an earlier call: give --out an empty folder")
        return EXIT_USAGE
    archive = options.archive or (REPOSITORY / ".data" / "call-1" if options.call == 2 else None)
    if archive is not None and not (archive / "results.jsonl").is_file():
        log(f"{archive} holds no results of an earlier call: name its folder with --archive")
        return EXIT_USAGE
    archive = None if archive is None else archive.resolve()
    earlier = [] if archive is None else read_lines(archive / "results.jsonl")
    groups = first_call() if options.call == 1 else second_call(earlier)
    planned_s = sum(group.seconds for group in (groups if options.call == 1 else second_call([])))
    if options.stage:
        groups = [group._replace(stages=[s for s in group.stages if s.name in options.stage]) for group in groups]
        groups = [group for group in groups if group.stages]
        planned_s = sum(group.seconds for group in groups)
    if not groups:
        log(f"there is no stage {', '.join(options.stage)} in this call")
        return EXIT_USAGE
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as work:
        return run_check(options, Path(work), groups, planned_s, archive)


def run_check(
    options: argparse.Namespace, work: Path, groups: list[Group], planned_s: float, archive: Path | None
) -> int:
    """Runs groups of stages; returns the exit code."""
    budget_s = options.budget_s or planned_s + MARGIN_S
    data = data_folder(options.data)
    sabotage = dict(each.split("=") for each in options.sabotage)
    earlier = None if archive is None else archive / "results.jsonl"
    check = Check(options.out, work, budget_s, device=options.device, data=data, sabotage=sabotage, earlier=earlier)
    restored = 0 if archive is None else restore_programs(archive, work)
    commit = REPOSITORY / ".data" / "commit"
    about = {"call": options.call, "device": options.device, "budget_s": budget_s, "data": data, "restored": restored}
    about["wheels"] = check.unpack_wheels(REPOSITORY / ".whl")
    about["packed_commit"] = commit.read_text("utf-8").strip() if commit.is_file() else None
    check.tell({"kind": "begin", **about, "unix_time": check.begin})
    code = EXIT_FAILED
    try:
        code = 0 if check.run(groups, planned_s) else EXIT_FAILED
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    results = read_lines(check.results)
    seconds = round(time.time() - check.begin, 1)
    check.tell({"kind": "end", "code": code, "seconds": seconds, "compiled_again": recompiled(results)})
    print(summary(results))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
