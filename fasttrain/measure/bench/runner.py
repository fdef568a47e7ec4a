"""Starts the fresh process of a block, and reads what it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fasttrain.errors import ConfigError, DataError
from fasttrain.measure.bench.sources import NOT_THERE
from fasttrain.measure.bench.task import BlockResult, BlockTask
from fasttrain.measure.strict import read_json
from fasttrain.step.cache import ProgramCache, default_folder

__all__ = ["THREAD_VARIABLES", "BlockRunner", "check_users_arm", "fresh_caches"]

TIMEOUT_S = 900.0
"""A process that takes longer has died: the longest part is a compiler, which takes a minute or two."""

LAST_WORDS = 1_500
"""Characters of a dead process's output that are kept."""

LAST_LINE = 300

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""What libraries take their number of threads from when they are loaded."""


class BlockRunner:
    """Runs tasks, each in a Python of its own, in the folder of this process.

    Args:
        variables: environment variables, beside those of this process. With an XDG_CACHE_HOME among them, each process
            decides anew what runs its steps: programs are shared, what an earlier process has measured of them is not.
        folder: where the processes run; None: where this one does.
        timeout_s: after so long a process is ended, and has died.
    """

    def __init__(
        self, variables: Mapping[str, str], *, folder: Path | None = None, timeout_s: float = TIMEOUT_S
    ) -> None:
        self._variables = dict(variables)
        self._folder = folder
        self._timeout_s = timeout_s

    def __call__(self, task: BlockTask) -> BlockResult:
        """Runs a task and waits for it; however this ends, the process has ended too."""
        if "XDG_CACHE_HOME" in self._variables:
            ProgramCache(default_folder(self._variables)).forget()
        threads = dict.fromkeys(THREAD_VARIABLES, str(task.threads))
        with tempfile.TemporaryDirectory(prefix="fasttrain-block-") as scratch:
            task_file, result_file, output = (Path(scratch, name) for name in ("task.json", "result.json", "output"))
            task_file.write_text(json.dumps(task.to_dict()), encoding="utf-8")
            command = [sys.executable, "-m", "fasttrain.measure.bench.block", str(task_file), str(result_file)]
            with output.open("wb") as file:
                child = subprocess.Popen(
                    [*command, repr(time.time())],
                    cwd=self._folder,
                    env={**os.environ, **threads, **self._variables},
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    process_group=0,
                )
                with _ended(child):
                    try:
                        child.wait(self._timeout_s)
                    except subprocess.TimeoutExpired:
                        return BlockResult(died=f"it was ended after {self._timeout_s:g} s")
            if child.returncode != 0:
                return _dead(output, child.returncode)
            try:
                return BlockResult.from_dict(read_json(result_file))
            except DataError as error:
                return BlockResult(died=str(error))


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
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)  # with what it has started, such as a compiler
            child.wait()


def _dead(output: Path, code: int) -> BlockResult:
    """Of a process that failed: in short what it said last, which is mostly the exception, and more of it."""
    said = output.read_text(encoding="utf-8", errors="replace").strip()[-LAST_WORDS:]
    last_line = said.splitlines()[-1][:LAST_LINE] if said else "it said nothing"
    return BlockResult(died=f"exit code {code}: {last_line}", last_words=said)
