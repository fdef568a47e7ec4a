"""Fresh processes of Python: what each took and printed, one alone or two beside each other."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from benchmarks.places import REPOSITORY
from fasttrain.errors import DataError, FasttrainError

__all__ = ["Command", "Ran", "peak_mb", "run_child", "run_side_by_side"]

TRADE_S = 0.05
"""So often two processes trade their cores: the speed of a core of a shared machine changes within seconds."""

LAST_WORDS = 2_000
"""Characters of what a failed process said that are told."""


class Command(NamedTuple):
    """What a child of Python runs: its arguments, and the folder under which it caches."""

    arguments: Sequence[str]
    cache: Path


class Ran(NamedTuple):
    """What a child process took and printed."""

    seconds: float
    peak_mb: float
    output: str


def run_child(*arguments: str, cache: Path) -> Ran:
    """Runs Python in a fresh process, with its own cache folder, and waits for it.

    Raises:
        FasttrainError: it failed; its last words are in the message.
    """
    with _started(Command(arguments, cache)) as child:
        return child.ran()


def run_side_by_side(commands: Sequence[Command]) -> list[Ran]:
    """Runs two commands at the same time, each on a core of its own; they trade cores all the time.

    What one core's speed does to one of them it does to the other: their ratio holds where that of two runs one after
    the other would tell of the machine.

    Raises:
        FasttrainError: one of them failed, or there are no two cores, or none can be chosen here (outside Linux).
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < len(commands):
        raise FasttrainError(f"{len(commands)} processes side by side need as many cores; to be had: {len(cores)}")
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(len(commands)))
        children = [stack.enter_context(_started(command)) for command in commands]
        waiting = [pool.submit(child.ran) for child in children]
        _trade_cores(children, waiting, cores[-len(commands) :])
        failed = [each for each in wait(waiting, return_when=FIRST_EXCEPTION).done if each.exception() is not None]
        return [each.result() for each in failed or waiting]


def _trade_cores(children: Sequence[_Child], waiting: Sequence[Future[Ran]], cores: list[int]) -> None:
    """Until one has ended; the other stays where it is."""
    while not any(each.done() for each in waiting):
        for child, core in zip(children, cores, strict=True):
            child.move(core)
        cores = [*cores[1:], cores[0]]
        wait(waiting, timeout=TRADE_S)


class _Child:
    """A process that has been started."""

    def __init__(self, process: subprocess.Popen[bytes], output: IO[bytes], errors: IO[bytes]) -> None:
        self.process = process
        self._output = output
        self._errors = errors
        self._begin = time.perf_counter()

    def ran(self) -> Ran:
        """Waits for its end."""
        # wait4, not RUSAGE_CHILDREN: that is the largest of all children so far.
        _, status, usage = os.wait4(self.process.pid, 0)
        seconds = time.perf_counter() - self._begin
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self._output.seek(0)
        self._errors.seek(0)
        if self.process.returncode != 0:
            said = self._errors.read().decode(errors="replace")[-LAST_WORDS:]
            command = " ".join(map(str, self.process.args))  # pyright: ignore[reportArgumentType]  # it is a list
            raise FasttrainError(f"{command} exited with {self.process.returncode}: {said}")
        return Ran(seconds, peak_mb(usage), self._output.read().decode())

    def move(self, core: int) -> None:
        """All its threads; what it has started stays where it is."""
        with suppress(FileNotFoundError):  # it has ended
            for thread in Path(f"/proc/{self.process.pid}/task").iterdir():
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(int(thread.name), {core})


@contextmanager
def _started(command: Command) -> Generator[_Child]:
    """A process; however this is left, it has ended then."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, *command.arguments],
            cwd=REPOSITORY,
            env={**os.environ, "XDG_CACHE_HOME": str(command.cache)},
            stdout=output,
            stderr=errors,
        )
        try:
            yield _Child(process, output, errors)
        finally:
            process.kill()
            process.wait()


def peak_mb(usage: resource.struct_rusage) -> float:
    """Peak resident memory of a process, MB (10**6 bytes).

    On Linux a child starts with its parent's size as its peak, so that only more than that is its own.

    Raises:
        DataError: it is not more.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if usage.ru_maxrss <= own:
        raise DataError(f"a child's peak memory hides behind that of this process, {own * unit / 1e6:.0f} MB")
    return usage.ru_maxrss * unit / 1e6
