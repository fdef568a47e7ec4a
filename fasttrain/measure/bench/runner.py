"""Starts the fresh processes of arms, and asks them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from fasttrain.errors import ConfigError, DataError
from fasttrain.measure.bench.messages import ArmState, ArmTask, ProcessDiedError, Slice, Started
from fasttrain.measure.bench.sources import NOT_THERE
from fasttrain.measure.strict import Node
from fasttrain.step.cache import ProgramCache, default_folder

__all__ = ["THREAD_VARIABLES", "ArmProcess", "ArmRunner", "check_users_arm", "fresh_caches"]

TIMEOUT_S = 900.0
"""A process that does not answer for so long has died: the longest part is a compiler, which takes a minute or two."""

GRACE_S = 3.0
"""So long a process may take to end of itself."""

LOOK_S = 1.0
"""So often a process that does not answer is looked after."""

LAST_WORDS = 1_500
"""Characters of a dead process's output that are kept."""

LAST_LINE = 300

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""What libraries take their number of threads from when they are loaded."""


Message = TypeVar("Message", Started, Slice, ArmState)


class ArmProcess:
    """The process of an arm, which waits to be asked.

    Args:
        child: the process.
        connection: to it.
        output: the file that holds what it prints.
        timeout_s: after so long without an answer it is given up.
        task: what it is to run.

    Attributes:
        started: what it told once it was ready.

    Raises:
        ProcessDiedError: it ended before it was ready, or took too long.
    """

    def __init__(
        self, child: subprocess.Popen[bytes], connection: Connection, output: Path, timeout_s: float, task: ArmTask
    ) -> None:
        self._child = child
        self._connection = connection
        self._output = output
        self._timeout_s = timeout_s
        self.started = self._ask(asdict(task), Started.from_node)

    def slice(self, seconds: float, core: int) -> Slice:
        """Has it run steps for about so long, on one of the cores if it has one thread; raises `ProcessDiedError`."""
        return self._ask([seconds, core], Slice.from_node)

    def state(self) -> ArmState:
        """What is known of its arm by now; raises `ProcessDiedError`."""
        return self._ask(None, ArmState.from_node)

    def _ask(self, request: Any, read: Callable[[Node], Message]) -> Message:
        try:
            self._connection.send_bytes(json.dumps(request).encode())
            self._await_answer()
            answer = self._connection.recv_bytes()
        except (EOFError, OSError):
            raise self._death() from None
        try:
            return read(Node(json.loads(answer), "its answer"))
        except (ValueError, DataError) as error:
            end(self._child)
            raise ProcessDiedError(str(error)) from None

    def _await_answer(self) -> None:
        deadline = time.monotonic() + self._timeout_s
        while not self._connection.poll(min(LOOK_S, self._timeout_s)):
            # What it has started may have inherited the connection, which then stays open.
            if self._child.poll() is not None and not self._connection.poll(0):
                raise self._death()
            if time.monotonic() > deadline:
                end(self._child)  # others have their turns now
                raise ProcessDiedError(f"it was ended after {self._timeout_s:g} s")

    def _death(self) -> ProcessDiedError:
        """Of a process that failed: in short what it said last, which is mostly the exception, and more of it."""
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(GRACE_S)
        with self._output.open("rb") as file:
            file.seek(max(0, self._output.stat().st_size - 4 * LAST_WORDS))
            said = file.read().decode(errors="replace").strip()[-LAST_WORDS:]
        last_line = said.splitlines()[-1][:LAST_LINE] if said else "it said nothing"
        return ProcessDiedError(f"exit code {self._child.returncode}: {last_line}", said)


class ArmRunner:
    """Starts processes of arms, each a Python of its own, in the folder of this process.

    Args:
        variables: environment variables, beside those of this process. With an XDG_CACHE_HOME among them, each process
            decides anew what runs its steps: programs are shared, what an earlier process has measured of them is not.
        folder: where the processes run; None: where this one does.
        timeout_s: after so long without an answer a process is ended, and has died.
    """

    def __init__(
        self, variables: Mapping[str, str], *, folder: Path | None = None, timeout_s: float = TIMEOUT_S
    ) -> None:
        self._variables = dict(variables)
        self._folder = folder
        self._timeout_s = timeout_s

    @contextmanager
    def __call__(self, task: ArmTask) -> Generator[ArmProcess]:
        """A process that is ready to be timed; however this is left, it has ended then, with what it has started.

        Raises:
            ProcessDiedError: it ended before it was ready, or took too long.
        """
        if "XDG_CACHE_HOME" in self._variables:
            ProgramCache(default_folder(self._variables)).forget()
        threads = dict.fromkeys(THREAD_VARIABLES, str(task.threads))
        with tempfile.TemporaryDirectory(prefix="fasttrain-arm-") as scratch, ExitStack() as stack:
            output = Path(scratch, "output")
            connection, childs = map(stack.enter_context, Pipe())
            child = subprocess.Popen(
                [sys.executable, "-m", "fasttrain.measure.bench.process", str(childs.fileno()), repr(time.time())],
                cwd=self._folder,
                env={**os.environ, **threads, **self._variables},
                stdin=subprocess.DEVNULL,
                stdout=stack.enter_context(output.open("wb")),
                stderr=subprocess.STDOUT,
                process_group=0,
                pass_fds=[childs.fileno()],
            )
            stack.enter_context(_ended(child))
            childs.close()  # so that its end is seen here
            yield ArmProcess(child, connection, output, self._timeout_s, task)
            connection.close()
            with suppress(subprocess.TimeoutExpired):
                child.wait(GRACE_S)


def check_users_arm(source: str) -> None:
    """Looks for an arm of a user's own, in a process of its own. What else is wrong with it, its blocks will say.

    Args:
        source: "module:function".

    Raises:
        ConfigError: there is no such module or function.
    """
    command = [sys.executable, "-m", "fasttrain.measure.bench.sources", source]
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if ran.returncode == NOT_THERE:
        raise ConfigError(ran.stderr.strip().splitlines()[-1])


@contextmanager
def fresh_caches() -> Generator[dict[str, str]]:
    """Variables that lead compilers to an empty cache of this benchmark's own, so that the first compile is a cold one.

    Torch's own compiler has another folder, which outlives processes too.
    """
    with tempfile.TemporaryDirectory(prefix="fasttrain-bench-") as folder:
        yield {"XDG_CACHE_HOME": folder, "TORCHINDUCTOR_CACHE_DIR": str(Path(folder, "inductor"))}


@contextmanager
def _ended(child: subprocess.Popen[bytes]) -> Generator[None]:
    try:
        yield
    finally:
        end(child)


def end(child: subprocess.Popen[bytes]) -> None:
    """Ends a process that leads a group, if it has not ended, with what it has started, such as a compiler."""
    with suppress(ProcessLookupError, PermissionError):  # all have ended; the second is what macOS says then
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
