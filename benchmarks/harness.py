"""What every measurement shares: the environment, the interleaving of arms, the check before timing."""

from __future__ import annotations

import gc
import os
import platform
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch

from fasttrain.device import cpu_name, device_name, total_bytes, versions
from fasttrain.errors import DataError

REPOSITORY = Path(__file__).parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"

Clock = Callable[[], float]


class Arm(Protocol):
    """One side of a measurement: a training that can be run pass by pass.

    Attributes:
        name: short and unique.
        description: what it is, in words.
        threads: torch's threads while it runs.
    """

    name: str
    description: str
    threads: int

    def losses(self, num_batches: int) -> list[float] | None:
        """Trains the first batches of the first epoch from the job's weights; the running loss after each.

        None where the algorithm is another, so that its losses must differ.
        """
        ...

    def run(self) -> int:
        """Trains a pass and waits for its figures; returns the samples trained."""
        ...

    @property
    def compile_s(self) -> float | None:
        """Seconds that a compiler took so far; None where there is none."""
        ...


def data_dir() -> Path:
    """The folder of real data: $FASTTRAIN_DATA, or the default beside the repository."""
    return Path(os.environ.get("FASTTRAIN_DATA", REPOSITORY.parent / "shared" / "data"))


def log(message: str) -> None:
    """Tells on stderr how far a measurement is."""
    print(message, file=sys.stderr, flush=True)


def command_line(module: str, arguments: Sequence[str]) -> str:
    """The command that started a measurement."""
    return shlex.join(["python", "-m", module, *arguments])


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def environment(device: torch.device) -> dict[str, Any]:
    """What figures depend on: hardware, versions, commit (None where git does not tell), load average."""
    status = _git("status", "--porcelain", "--", "fasttrain", "benchmarks/*.py")  # what a figure depends on
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "memory_bytes": total_bytes(torch.device("cpu")),
        "device": device_name(device),
        "system": platform.platform(),
        **versions(),
        "commit": _git("rev-parse", "HEAD"),
        "has_uncommitted_changes": None if status is None else status != "",
        "load_average": load_average(),
    }


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_average() -> float:
    """Of the last minute."""
    return round(os.getloadavg()[0], 2)


def _git(*arguments: str) -> str | None:
    """What git says about this repository, None where it does not."""
    try:
        ran = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None


def check_losses(losses: Sequence[float], wanted: Sequence[float], tolerance: float) -> float:
    """The largest relative difference between an arm's losses and the reference's.

    Raises:
        DataError: it is beyond the tolerance, or the losses are not as many.
    """
    if len(losses) != len(wanted):
        raise DataError(f"{len(losses)} losses where the textbook has {len(wanted)}")
    differences = [abs(ours - theirs) / abs(theirs) for ours, theirs in zip(losses, wanted, strict=True)]
    largest = max(differences)
    if not largest <= tolerance:  # so that a loss that is not a number is refused too
        raise DataError(
            f"its losses leave the textbook's: by {largest:.2g} relative at batch {1 + differences.index(largest)}, "
            f"allowed is {tolerance:g}"
        )
    return largest


def interleaved(names: Sequence[str], repeats: int, seed: int) -> Iterator[list[str]]:
    """For each repeat every name once, in random order: what drifts on the machine then hits all alike."""
    draw = random.Random(seed)
    for _ in range(repeats):
        yield draw.sample(names, len(names))


def measure(
    arms: Sequence[Arm], *, repeats: int, min_seconds: float, seed: int, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Times arms against each other.

    Args:
        arms: warmed up.
        repeats: how often each is timed.
        min_seconds: passes are run until they took that long together.
        seed: of the order in each repeat.
        clock: seconds.

    Returns:
        By name the samples/s of each repeat.
    """
    by_name = {arm.name: arm for arm in arms}
    rates: dict[str, list[float]] = {name: [] for name in by_name}
    for repeat, names in enumerate(interleaved(list(by_name), repeats, seed), start=1):
        for name in names:
            rates[name].append(samples_per_s(by_name[name], min_seconds, clock))
            log(f"repeat {repeat}/{repeats}: {name}: {rates[name][-1]:,.0f} samples/s")
    return rates


def samples_per_s(arm: Arm, min_seconds: float, clock: Clock) -> float:
    """Times one arm over as many whole passes as fill the time, with its own number of threads."""
    gc.collect()  # so that no arm pays for what another one left
    samples, begin = 0, clock()
    with_threads(arm.threads)
    while samples == 0 or clock() - begin < min_seconds:
        samples += arm.run()
    return samples / (clock() - begin)


def with_threads(threads: int) -> None:
    """Sets torch's threads, if they are not set so."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@contextmanager
def environment_variables(**wanted: str) -> Generator[None]:
    """Sets environment variables for a while."""
    found = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in found.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
