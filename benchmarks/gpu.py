"""The whole check on a machine with a CUDA GPU, in under nine minutes: the gpu tests, the benchmarks, the profiles.

    python -m benchmarks.gpu [--out FOLDER]

Each part has a bound on its time and runs whether or not the one before it failed. The tests, and the compilers of all
programs that the benchmarks need, run side by side; what is timed runs alone. A benchmark that meets its bound keeps
the blocks that it has. Records (small JSON files), profiles and what the parts said go to FOLDER; commit the
records under benchmarks/results/ and the profiles under profiles/. Real data is found through $FASTTRAIN_DATA.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from fasttrain.workloads.job import JOBS

ARMS = ("textbook", "tuned", "eager", "compiled", "graphed", "auto")
WORKLOADS = tuple(JOBS)
PROFILED = ("textbook", "auto")

FIRST_S, BENCH_S, PROFILE_S = 200.0, 60.0, 25.0
TOTAL_S = 520.0
TEST_PROCESSES = 6
"""Of the tests, where pytest-xdist is there: nearly all of their time is the compiler's."""
GRACE_S = 10.0
"""An interrupted part has so long to write what it has."""


class Part(NamedTuple):
    """A command, and the seconds that it may take."""

    name: str
    limit_s: float
    command: list[str]


def parts(out: Path) -> list[list[Part]]:
    """What is run, in this order; the parts of one list side by side."""
    python = [sys.executable, "-m"]
    spread = ["-n", str(TEST_PROCESSES)] if importlib.util.find_spec("xdist") is not None else []
    first = [Part("tests", FIRST_S, [*python, "pytest", "-q", "-m", "gpu", *spread, "tests"])]
    first += [Part(f"programs-{name}", FIRST_S, [*python, "benchmarks.programs", name, "cuda"]) for name in WORKLOADS]
    found = [first]
    for workload in WORKLOADS:
        options = ["--workload", workload, "--device", "cuda"]
        design = ["--arms", *ARMS, "--blocks", "3", "--warmup-s", "0.3", "--timed-s", "0.5"]
        record = ["--out", str(out / f"{workload}-cuda.json")]
        found.append([Part(workload, BENCH_S, [*python, "fasttrain", "bench", *options, *design, *record])])
    for workload in WORKLOADS:
        for arm in PROFILED:
            options = ["--workload", workload, "--engine", arm, "--device", "cuda", "--out", str(out / "profiles")]
            name = f"profile-{workload}-{arm}"
            found.append([Part(name, PROFILE_S, [*python, "fasttrain", "profile", *options])])
    return found


def run_beside(wanted: Sequence[Part], out: Path, limit_s: float) -> dict[str, str]:
    """Runs parts side by side, the output of each in `out`/<name>.txt; says of each how it ended.

    Args:
        wanted: what to run.
        out: where their output goes.
        limit_s: after so long, or after its own limit, a part is interrupted.
    """
    begin = time.perf_counter()
    ended: dict[str, str] = {}
    with ExitStack() as opened:
        logs = [opened.enter_context((out / f"{part.name}.txt").open("wb")) for part in wanted]
        children = [start(part.command, log) for part, log in zip(wanted, logs, strict=True)]
        opened.callback(end, children)  # Ctrl-C reaches this process alone
        for part, child in zip(wanted, children, strict=True):
            bound_s = min(part.limit_s, limit_s)
            try:
                code = child.wait(max(0.0, begin + bound_s - time.perf_counter()))
            except subprocess.TimeoutExpired:
                interrupt(child)
                ended[part.name] = f"interrupted after {bound_s:.0f} s"
            else:
                how = "ok" if code == 0 else f"exit code {code}"
                ended[part.name] = f"{how}, within {time.perf_counter() - begin:.0f} s"
            print(f"{part.name}: {ended[part.name]} (see {out / part.name}.txt)", flush=True)
    return ended


def start(command: list[str], log: BinaryIO) -> subprocess.Popen[bytes]:
    """Starts a command in a session of its own, in which Ctrl-C can be heard."""
    # One thread in the tests and the profiles too, as the arms of a benchmark have.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # A shell has what it starts in the background ignore Ctrl-C, and a child inherits that, but no handler.
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    finally:
        signal.signal(signal.SIGINT, found)


def interrupt(child: subprocess.Popen[bytes]) -> None:
    """Ctrl-C, and the end of it all where that does not help."""
    child.send_signal(signal.SIGINT)
    try:
        child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        for process in session_of(child.pid):
            with suppress(ProcessLookupError):  # it ended meanwhile
                os.kill(process, signal.SIGKILL)
        child.wait()


def end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Interrupts those that still run."""
    for child in children:
        if child.poll() is None:
            interrupt(child)


def session_of(leader: int) -> list[int]:
    """Ids of the processes of a part, which is a session: each process of a benchmark is in a group of its own."""
    found: list[int] = []
    for name in os.listdir("/proc"):
        with suppress(ValueError, ProcessLookupError):  # no process, or one that has ended meanwhile
            process = int(name)
            if os.getsid(process) == leader:
                found.append(process)
    return found


def run_parts(wanted: Sequence[Sequence[Part]], out: Path, total_s: float) -> dict[str, str]:
    """Runs parts while there is time, those of one list side by side; says of each how it ended."""
    begin = time.perf_counter()
    ended: dict[str, str] = {}
    for beside in wanted:
        left_s = total_s - (time.perf_counter() - begin)
        if left_s > 1.0:
            ended |= run_beside(beside, out, left_s)
        else:
            ended |= dict.fromkeys((part.name for part in beside), "no time was left")
    return ended


def main(arguments: Sequence[str]) -> int:
    """Runs all parts; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder for records, profiles and output")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("this machine has no CUDA device that torch can use", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    ended = run_parts(parts(options.out), options.out, TOTAL_S)
    return 0 if all(how.startswith("ok") for how in ended.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
