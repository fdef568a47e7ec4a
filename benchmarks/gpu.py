"""The whole check on a machine with a CUDA GPU, in under nine minutes: the gpu tests, the benchmarks, the profiles.

    python -m benchmarks.gpu [--out FOLDER]

Each part has a bound on its time and runs whether or not the one before it failed. A benchmark that meets its bound
keeps the blocks that it has. Records (small JSON files), profiles and what the parts said go to FOLDER; commit the
records under benchmarks/results/ and the profiles under profiles/. Real data is found through $FASTTRAIN_DATA.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

ARMS = ("textbook", "tuned", "eager", "compiled", "graphed", "auto")
WORKLOADS = ("reviews", "mlp", "cnn", "chars")
PROFILED = ("textbook", "auto")

TESTS_S, BENCH_S, PROFILE_S = 90.0, 95.0, 40.0
TOTAL_S = 520.0
GRACE_S = 10.0
"""An interrupted part has so long to write what it has."""


class Part(NamedTuple):
    """A command, and the seconds that it may take."""

    name: str
    limit_s: float
    command: list[str]


def parts(out: Path) -> list[Part]:
    """What is run, in this order."""
    python = [sys.executable, "-m"]
    found = [Part("tests", TESTS_S, [*python, "pytest", "-q", "-m", "gpu", "tests"])]
    for workload in WORKLOADS:
        options = ["--workload", workload, "--device", "cuda"]
        design = ["--arms", *ARMS, "--blocks", "3", "--warmup-s", "0.3", "--timed-s", "0.5"]
        record = ["--out", str(out / f"{workload}-cuda.json")]
        found.append(Part(workload, BENCH_S, [*python, "fasttrain", "bench", *options, *design, *record]))
    for workload in WORKLOADS:
        for arm in PROFILED:
            options = ["--workload", workload, "--engine", arm, "--device", "cuda", "--out", str(out / "profiles")]
            name = f"profile-{workload}-{arm}"
            found.append(Part(name, PROFILE_S, [*python, "fasttrain", "profile", *options]))
    return found


def run_part(part: Part, out: Path, limit_s: float) -> str:
    """Runs a part, its output in `out`/<name>.txt, and says how it ended.

    Args:
        part: what to run.
        out: where its output goes.
        limit_s: after so long it is interrupted.
    """
    begin = time.perf_counter()
    with (out / f"{part.name}.txt").open("wb") as log:
        child = start(part.command, log)
        try:
            code = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            interrupt(child)
            return f"interrupted after {limit_s:.0f} s"
    return f"{'ok' if code == 0 else f'exit code {code}'}, {time.perf_counter() - begin:.0f} s"


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


def session_of(leader: int) -> list[int]:
    """Ids of the processes of a part, which is a session: each process of a benchmark is in a group of its own."""
    found: list[int] = []
    for name in os.listdir("/proc"):
        with suppress(ValueError, ProcessLookupError):  # no process, or one that has ended meanwhile
            process = int(name)
            if os.getsid(process) == leader:
                found.append(process)
    return found


def run_parts(wanted: Sequence[Part], out: Path, total_s: float) -> dict[str, str]:
    """Runs parts while there is time; says of each how it ended."""
    begin = time.perf_counter()
    ended: dict[str, str] = {}
    for part in wanted:
        left_s = total_s - (time.perf_counter() - begin)
        ended[part.name] = run_part(part, out, min(part.limit_s, left_s)) if left_s > 1.0 else "no time was left"
        print(f"{part.name}: {ended[part.name]} (see {out / part.name}.txt)", flush=True)
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
