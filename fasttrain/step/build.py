"""Compiling a traced step in a child process that holds none of the user's code.

The parent writes the graph and the shapes of its inputs into a private folder and goes on training; the child exports
and compiles at low priority, with bounds on threads and memory, and leaves a package or the reason why there is none.
It ends when the parent does.
"""

from __future__ import annotations

import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fasttrain.device import total_bytes
from fasttrain.errors import EngineError
from fasttrain.step.kernels import define_operators
from fasttrain.step.padded import spelled_out
from fasttrain.step.program import compile_graph
from fasttrain.step.recorded import InputKind, TracedGraph
from fasttrain.step.shared_folder import held
from fasttrain.step.toolkit import cuda_environment
from fasttrain.step.torch_private import lacks_resources, origins_of, unpickle_with_graph
from fasttrain.step.unroll import Unrolling, unroll

__all__ = ["Build", "ChildEndedError", "GraphJob"]

TIMEOUT_S = 900.0
"""A child that takes longer is ended; large models take minutes."""

MEMORY_SHARE = 0.5
"""The share of the machine's memory that a child may take."""

GPU_CHILD_BYTES = 16 << 30
"""A child that compiles for a GPU may take at least this much: what CUDA maps into a process counts too, and a virtual
machine may report little memory at first and more as it is used."""

GPU_COMPILE_THREADS = 4
"""Processes in which a child compiles the kernels of a program for a GPU; for a CPU it compiles them in its own."""

GPU_BYTES = 2 << 30
"""Of a GPU's memory, what must be free for a child: its CUDA context, and room to try its kernels out."""

REFUSED = 65
"""The child's exit code where torch cannot compile the step (`EX_DATAERR`); every other one is of the surroundings."""


class ChildEndedError(EngineError):
    """The child was killed, took too long, or lacked something (memory, a disk that is not full, a C++ compiler).

    That says nothing of the step, and a later run may try again.
    """


@dataclass(frozen=True, kw_only=True)
class GraphJob:
    """What a child needs: plain data and a graph of ATen operators.

    Attributes:
        graph: the step.
        unrolling: how the graph that is compiled is made of the step's; None: it is that.
        inputs: what each input is like.
        open_dims: for each input, the dimensions whose size is left open.
        num_threads: that the program is to run with.
        origins: which part of the step each call of the graph is of, where the profiler is to see the program's
            kernels; None: it is to be as fast as it can be.
        anywhere: the places of the inputs that begin anywhere in memory, where the compiler asks for that.
    """

    graph: torch.fx.GraphModule
    inputs: list[InputKind]
    open_dims: list[frozenset[int]]
    num_threads: int
    unrolling: Unrolling | None = None
    origins: list[str] | None = None
    anywhere: tuple[int, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the program is to run."""
        return self.inputs[0][3]

    @classmethod
    def of(cls, part: TracedGraph) -> GraphJob:
        """The job of compiling a part of a step, for as many threads as torch has now."""
        return cls(
            graph=part.recorded,
            inputs=part.kinds,
            open_dims=part.open_dims,
            num_threads=torch.get_num_threads(),
            unrolling=part.unrolling,
            anywhere=part.anywhere if part.kinds[0][3].type == "cuda" else (),
        )

    def unrolled(self) -> GraphJob:
        """The same job with the graph that is compiled."""
        graph = self.graph if self.unrolling is None else unroll(self.graph, self.unrolling)
        if self.device.type != "cpu":
            graph = spelled_out(graph, self.device, None if self.unrolling is None else self.unrolling.longest)
        return replace(self, graph=graph, unrolling=None)

    def marked(self) -> GraphJob:
        """The job of the same program with kernels that the profiler sees."""
        job = self.unrolled()
        return replace(job, origins=origins_of(job.graph))


class Build:
    """A compilation under way in a child process. Close it, or let it be collected: the child then ends.

    Args:
        job: what to compile.
        inductor_folder: a private folder in which Inductor keeps what serves the next child too (what the compiler can
            do); None for one that goes with this child.

    Raises:
        EngineError: the child cannot be started.
    """

    def __init__(self, job: GraphJob, inductor_folder: Path | None = None) -> None:
        self._begin = time.perf_counter()
        self._inductor_folder = inductor_folder
        _refuse_full_gpu(job)
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="fasttrain-build-"))  # mode 0700
        except OSError as error:
            raise EngineError(f"the compiling child cannot be started: {error}") from error
        try:
            self._child = self._start(job)
        except Exception as error:  # a graph can hold what cannot be pickled, and pickle raises all kinds of errors
            shutil.rmtree(self._folder, ignore_errors=True)
            raise EngineError(f"the compiling child cannot be started: {error}") from error
        self._end = weakref.finalize(self, _end_child, self._child, self._folder, os.getpid())

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._begin

    def poll(self) -> Path | None:
        """The finished package, None while it is under way.

        Raises:
            ChildEndedError: the child was killed, took too long, or failed because of its surroundings.
            EngineError: it could not compile the step. The message holds what it said last.
        """
        status = self._child.poll()
        if status is None:
            if self.seconds > TIMEOUT_S:
                self.close()
                raise ChildEndedError(f"the compiling child took longer than {TIMEOUT_S:.0f} s and was ended")
            return None
        package = self._folder / "step.pt2"
        if status == 0 and package.is_file():
            return package
        _kill_group(self._child.pid)  # where it was killed, the C++ compiler that it had started runs on
        said = self._last_words()
        self.close()
        kind = EngineError if status == REFUSED else ChildEndedError
        raise kind(f"the compiling child {_how_it_ended(status)}{said}")

    def wait(self) -> Path:
        """Waits for the package; errors as in `poll`."""
        while (package := self.poll()) is None:
            try:
                self._child.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                continue
        return package

    def close(self) -> None:
        """Ends the child if it runs and removes its files. Nothing is left behind."""
        self._end()

    def _start(self, job: GraphJob) -> subprocess.Popen[bytes]:
        (self._folder / "job").write_bytes(pickle.dumps(job))
        kept = self._inductor_folder or self._folder / "inductor"
        with held(kept) as hold, (self._folder / "log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "fasttrain.step.build", str(self._folder)],
                stdin=subprocess.PIPE,  # closes when this process ends: the child's sign to end too
                stdout=log,
                stderr=log,
                pass_fds=(hold,),
                env=self._environment(job, kept),
                start_new_session=True,  # Ctrl-C is for the training, and killing reaches the compiler's children
            )

    def _last_words(self) -> str:
        lines = (self._folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""

    def _environment(self, job: GraphJob, kept: Path) -> dict[str, str]:
        (kept / "tmp").mkdir(mode=0o700, parents=True, exist_ok=True)
        return {
            **os.environ,
            "OMP_NUM_THREADS": str(job.num_threads),
            "TORCHINDUCTOR_COMPILE_THREADS": str(GPU_COMPILE_THREADS if job.device.type == "cuda" else 1),
            # Inductor's own choices are folders of /tmp that are not private, of its precompiled headers too.
            "TORCHINDUCTOR_CACHE_DIR": str(kept),
            "TMPDIR": str(kept / "tmp"),
            "PYTHONSAFEPATH": "1",  # the folder that the training was started in may hold anybody's torch.py
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            **(cuda_environment(self._folder) if job.device.type == "cuda" else {}),
        }


def _refuse_full_gpu(job: GraphJob) -> None:
    """Raises ChildEndedError where the training leaves a child no room on their GPU."""
    device = job.device
    if device.type == "cuda":
        # The compiler tries kernels out on inputs of its own.
        needed = GPU_BYTES + 2 * sum(math.prod(size) * dtype.itemsize for size, _, dtype, _ in job.inputs)
        free, _ = torch.cuda.mem_get_info(device)
        if free < needed:
            raise ChildEndedError(
                f"the compiling child needs {needed / 1e9:.1f} GB on {device}, and {free / 1e9:.1f} GB are free"
            )


def _end_child(child: subprocess.Popen[bytes], folder: Path, parent: int) -> None:
    if os.getpid() != parent:  # a fork of the training (a loader's worker) ends: the child is not its own
        return
    if child.stdin is not None:
        child.stdin.close()
    if child.returncode is None:  # it was not waited for, so that its process group is still its own
        _kill_group(child.pid)
        child.wait()
    shutil.rmtree(folder, ignore_errors=True)


def _kill_group(leader: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _how_it_ended(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"failed with exit code {status}"


def main(folder: Path) -> int:
    """The child: compiles the job in `folder`, the last line of its output is the reason if it cannot."""
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    os.nice(19)
    define_operators()
    # From a folder that the parent has just made for itself alone (mode 0700).
    given: GraphJob = unpickle_with_graph((folder / "job").read_bytes())
    _bound_memory(given.device)
    job = given.unrolled()
    torch.set_num_threads(job.num_threads)
    partial = folder / "partial.pt2"
    try:
        compile_graph(job.graph, job.inputs, job.open_dims, partial, job.origins, job.anywhere)
    except EngineError as error:
        print(" ".join(str(error).split()), file=sys.stderr)  # noqa: T201
        return 1 if lacks_resources(error) else REFUSED
    partial.rename(folder / "step.pt2")
    return 0


def _end_with_the_parent() -> None:
    # Not through sys.stdin: the interpreter cannot shut down while a thread holds its lock.
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def _bound_memory(device: torch.device) -> None:
    """Bounds what this process allocates, by the machine's memory as it is now."""
    total = total_bytes(torch.device("cpu"))
    if total is not None:
        import resource

        bound = max(int(total * MEMORY_SHARE), GPU_CHILD_BYTES if device.type == "cuda" else 0)
        resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
