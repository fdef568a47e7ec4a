"""Compiling a traced step in a child process that holds none of the user's code.

The parent writes the graph and the shapes of its inputs into a private folder and goes on training; the child exports
and compiles at low priority, with bounds on threads and memory, and leaves a package or the reason why there is none.
It ends when the parent does. One that has left a package stays for a while and takes the next job: torch and its
compiler take 4 s of CPU to import. One that is told to goes on for a later run of the job (`Build.leave`).
"""

from __future__ import annotations

import atexit
import gc
import json
import math
import os
import pickle
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fasttrain.device import total_bytes
from fasttrain.errors import EngineError
from fasttrain.step.cache import ProgramCache, has_too_much, held
from fasttrain.step.kernels import define_operators, spelled_out
from fasttrain.step.program import compile_graph
from fasttrain.step.torch_private import lacks_resources, origins_of, unpickle_with_graph

if TYPE_CHECKING:  # the compiling child needs no `function`, the training no `cpp`
    from fasttrain.step.function import InputKind, TracedGraph
    from fasttrain.step.torch_private.cpp import Kept

__all__ = [
    "AHEAD_S",
    "Ahead",
    "Build",
    "ChildEndedError",
    "GraphJob",
    "ahead_of",
    "cuda_environment",
    "cuda_home",
    "end_idle_child",
    "note_ahead",
    "stop_ahead",
]

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

IDLE_S = 30.0
"""How long a child that has done a job waits for the next one."""

PAUSE_S = 3.0
"""How long such a child does nothing at first: the training tries the program that it has just been given."""

IDLE_BYTES = 1 << 30
"""A child that has taken more memory than this does not stay; with a small program it takes half of it."""

GC_THRESHOLD = 100_000
"""So many new objects let a child look for garbage: by Python's own 700, that takes 0.7 of its 9 s."""

DONE = "done"
"""The file by which a child that stays says that the package is whole."""

AHEAD = "ahead"
"""The file by which a job's child is told to go on for the next run, once the training has ended."""

AHEAD_S = 120.0
"""How long such a child goes on at most."""

STAY = "stay"
"""The argument that tells a child to stay."""

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
        inputs: what each input is like.
        open_dims: for each input, the dimensions whose size is left open.
        num_threads: that the program is to run with.
        origins: which part of the step each call of the graph is of, where the profiler is to see the program's
            kernels; None: it is to be as fast as it can be.
        anywhere: the places of the inputs that begin anywhere in memory, where the compiler asks for that.
        longest: of a `TracedGraph`.
    """

    graph: torch.fx.GraphModule
    inputs: list[InputKind]
    open_dims: list[frozenset[int]]
    num_threads: int
    origins: list[str] | None = None
    anywhere: tuple[int, ...] = ()
    longest: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the program is to run."""
        return self.inputs[0][3]

    @classmethod
    def of(cls, part: TracedGraph) -> GraphJob:
        """The job of compiling a part of a step, for as many threads as torch has now."""
        return cls(
            graph=part.graph,
            inputs=part.kinds,
            open_dims=part.open_dims,
            num_threads=torch.get_num_threads(),
            anywhere=part.anywhere if part.kinds[0][3].type == "cuda" else (),
            longest=part.longest,
        )

    def spelled_out(self) -> GraphJob:
        """The same job with the graph that is compiled for its device."""
        if self.device.type == "cpu":
            return self
        return replace(self, graph=spelled_out(self.graph, self.device, self.longest))

    def marked(self) -> GraphJob:
        """The job of the same program with kernels that the profiler sees."""
        job = self.spelled_out()
        return replace(job, origins=origins_of(job.graph))


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """Where a child that goes on for a later run puts its program.

    Attributes:
        cache: the folder of the program cache.
        key: of the program.
        what: the program is of, as the cache shows it.
        signature: of the job.
    """

    cache: str
    key: str
    what: str
    signature: str


def note_ahead(cache: ProgramCache, pid: int, what: str) -> None:
    """Notes which child compiles for later runs. Raises OSError where that cannot be written."""
    note = json.dumps({"pid": pid, "until": time.time() + AHEAD_S, "what": what})
    cache.ahead_path.write_text(note, encoding="utf-8")


def ahead_of(cache: ProgramCache) -> tuple[int, str] | None:
    """The child that compiles for later runs, as its process id and what it compiles; None where there is none."""
    try:
        known = json.loads(cache.ahead_path.read_text(encoding="utf-8"))
        pid, until, what = int(known["pid"]), float(known["until"]), str(known["what"])
        # Where there is no /proc, the time alone tells a child from another process of the same number.
        command = Path(f"/proc/{pid}/cmdline")
        is_it = not Path("/proc/self").exists() or b"fasttrain.step.build" in command.read_bytes()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (pid, what) if is_it and time.time() < until else None


def stop_ahead(cache: ProgramCache) -> int | None:
    """Ends the child that compiles for later runs; returns its process id, None where there was none."""
    found = ahead_of(cache)
    if found is None:
        return None
    _kill_group(found[0])
    cache.ahead_path.unlink(missing_ok=True)
    return found[0]


_left: list[subprocess.Popen[bytes]] = []
"""Children that go on for later runs; Python reaps those that have ended when it starts another process."""


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
        _refuse_full_gpu(job)
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="fasttrain-build-"))  # mode 0700
        except OSError as error:
            raise EngineError(f"the compiling child cannot be started: {error}") from error
        self._kept = inductor_folder or self._folder / "inductor"
        # A child for a GPU holds memory of it. What is kept in this job's own folder goes with the job.
        self._may_stay = inductor_folder is not None and job.device.type == "cpu"
        self._manner = [STAY] if self._may_stay else []
        self._is_done = False
        try:
            (self._folder / "job").write_bytes(pickle.dumps(job))
            self._environment = self._environment_of(job)
            idle = self._taken() if self._may_stay else None
            self._was_idle = idle is not None
            self._child = idle or self._started()
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
        package = self._folder / "step.pt2"
        if self._is_done:
            return package
        status = self._child.poll()
        if status is None and (self._folder / DONE).is_file():
            self._leave_idle()
            status = 0
        if status is None:
            if self.seconds > TIMEOUT_S:
                self.close()
                raise ChildEndedError(f"the compiling child took longer than {TIMEOUT_S:.0f} s and was ended")
            return None
        if status == 0 and package.is_file():
            self._is_done = True
            return package
        if status == 0 and self._was_idle:  # it ended just when the job was given to it
            self._was_idle = False
            self._end.detach()
            _end_child(self._child, None, os.getpid())
            self._child = self._started()
            self._end = weakref.finalize(self, _end_child, self._child, self._folder, os.getpid())
            return None
        _kill_group(self._child.pid)  # where it was killed, the C++ compiler that it had started runs on
        said = self._last_words()
        self.close()
        kind = EngineError if status == REFUSED else ChildEndedError
        raise kind(f"the compiling child {_how_it_ended(status)}{said}")

    def wait(self) -> Path:
        """Waits for the package; errors as in `poll`."""
        while (package := self.poll()) is None:
            try:
                self._child.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                continue
        return package

    def close(self) -> None:
        """Ends the child if it has not done the job, and removes its files. Nothing is left behind."""
        self._end()

    def leave(self, note: Ahead) -> int | None:
        """Has the child go on, for a later run: it puts the program into the cache itself and removes its files.

        It outlives this process by `AHEAD_S` seconds at most.

        Returns:
            The child's process id; None where it has ended already, and nothing goes on.
        """
        if self._is_done or self._child.poll() is not None or not self._end.alive:
            return None
        (self._folder / AHEAD).write_text(json.dumps(asdict(note)), encoding="utf-8")
        self._end.detach()
        assert self._child.stdin is not None
        self._child.stdin.close()
        _left.append(self._child)  # until it has ended, or this process has
        return self._child.pid

    def _started(self) -> subprocess.Popen[bytes]:
        """A child of its own."""
        with held(self._kept) as hold, (self._folder / "log").open("wb") as log:
            (self._kept / "tmp").mkdir(mode=0o700, parents=True, exist_ok=True)
            return subprocess.Popen(
                [sys.executable, "-m", "fasttrain.step.build", str(self._folder), str(self._kept), *self._manner],
                stdin=subprocess.PIPE,  # closes when this process ends: the child's sign to end too
                stdout=log,
                stderr=log,
                pass_fds=(hold,),
                env=self._environment,
                start_new_session=True,  # Ctrl-C is for the training, and killing reaches the compiler's children
            )

    def _taken(self) -> subprocess.Popen[bytes] | None:
        """The child that waits for a job, with this job; None where there is none, or it is not fit."""
        idle = _take_idle()
        if idle is None:
            return None
        child, environment = idle
        try:
            assert child.stdin is not None
            if child.poll() is None and environment == self._environment:
                child.stdin.write(os.fsencode(self._folder) + b"\0")
                child.stdin.flush()
                return child
        except OSError:  # it has just ended
            pass
        _end_child(child, None, os.getpid())
        return None

    def _leave_idle(self) -> None:
        """Has the child, which has done its job, wait for the next one."""
        self._end.detach()
        self._end = weakref.finalize(self, _end_child, None, self._folder, os.getpid())
        if self._may_stay and not has_too_much(self._kept):  # which a child that stays would hold
            _keep_idle(self._child, self._environment)
        else:
            _end_child(self._child, None, os.getpid())

    def _last_words(self) -> str:
        lines = (self._folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""

    def _environment_of(self, job: GraphJob) -> dict[str, str]:
        return {
            **os.environ,
            "OMP_NUM_THREADS": str(job.num_threads),
            "TORCHINDUCTOR_COMPILE_THREADS": str(GPU_COMPILE_THREADS if job.device.type == "cuda" else 1),
            # Inductor's own choices are folders of /tmp that are not private, of its precompiled headers too.
            "TORCHINDUCTOR_CACHE_DIR": str(self._kept),
            "TMPDIR": str(self._kept / "tmp"),
            "PYTHONSAFEPATH": "1",  # the folder that the training was started in may hold anybody's torch.py
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            **(cuda_environment(self._folder) if job.device.type == "cuda" else {}),
        }


_Idle = tuple[subprocess.Popen[bytes], dict[str, str]]

_idle: list[tuple[int, _Idle]] = []
"""The child that waits for a job, at most one, with its environment and behind the process that it is of."""

_idle_lock = threading.Lock()


def end_idle_child() -> None:
    """Ends the child that waits for the next job, if there is one."""
    idle = _take_idle()
    if idle is not None:
        _end_child(idle[0], None, os.getpid())


def _take_idle() -> _Idle | None:
    with _idle_lock:
        parent, idle = _idle.pop() if _idle else (os.getpid(), None)
    return idle if parent == os.getpid() else None  # a fork of the training: the child is not its own


def _keep_idle(child: subprocess.Popen[bytes], environment: dict[str, str]) -> None:
    end_idle_child()
    atexit.unregister(end_idle_child)
    atexit.register(end_idle_child)
    with _idle_lock:
        _idle.append((os.getpid(), (child, environment)))


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


def _end_child(child: subprocess.Popen[bytes] | None, folder: Path | None, parent: int) -> None:
    if os.getpid() != parent:  # a fork of the training (a loader's worker) ends: the child is not its own
        return
    if child is not None:
        if child.stdin is not None:
            with suppress(OSError):  # it has ended before it took the next job
                child.stdin.close()
        if child.returncode is None:  # it was not waited for, so that its process group is still its own
            _kill_group(child.pid)
            child.wait()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _kill_group(leader: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _how_it_ended(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"failed with exit code {status}"


def main(folder: Path, kept: Path | None = None, *, may_stay: bool = False) -> int:
    """The child: compiles the job in `folder`, the last line of its output is the reason if it cannot.

    Args:
        folder: of the job.
        kept: where what serves other programs too is kept; None: nowhere.
        may_stay: whether it is to take further jobs, whose folders come through its input.
    """
    from fasttrain.step.torch_private.cpp import cpp_kept_in

    folders: queue.SimpleQueue[Path] = queue.SimpleQueue()
    current = [folder]
    threading.Thread(target=_listen, args=(folders, current), daemon=True).start()
    os.nice(19)
    gc.set_threshold(GC_THRESHOLD, *gc.get_threshold()[1:])
    define_operators()
    # From a folder that the parent has just made for itself alone (mode 0700).
    given: GraphJob = unpickle_with_graph((folder / "job").read_bytes())
    _bound_memory(given.device)
    with nullcontext() if kept is None or given.device.type != "cpu" else cpp_kept_in(kept) as cpp:
        while True:
            status = _compile(given, folder)
            if (folder / AHEAD).is_file():
                return _keep_for_later(folder)
            if status or not may_stay or _peak_bytes() > IDLE_BYTES:
                return status
            try:
                (folder / DONE).touch()
                folder = current[0] = _next_folder(folders, cpp)
                _write_into(folder / "log")
                given = unpickle_with_graph((folder / "job").read_bytes())
            except (queue.Empty, OSError):
                return 0


def _next_folder(folders: queue.SimpleQueue[Path], cpp: Kept | None) -> Path:
    """Of the next job; while there is none, makes what further programs need. Raises `queue.Empty`."""
    with suppress(queue.Empty):
        return folders.get(timeout=PAUSE_S)
    if cpp is not None:
        cpp.make_wanted(lambda: not folders.empty())
    return folders.get(timeout=IDLE_S)


def _compile(given: GraphJob, folder: Path) -> int:
    """Does a job; returns the exit code."""
    job = given.spelled_out()
    torch.set_num_threads(job.num_threads)
    partial = folder / "partial.pt2"
    try:
        compile_graph(job.graph, job.inputs, job.open_dims, partial, job.origins, job.anywhere)
    except EngineError as error:
        print(" ".join(str(error).split()), file=sys.stderr)  # noqa: T201
        return 1 if lacks_resources(error) else REFUSED
    partial.rename(folder / "step.pt2")
    return 0


def _keep_for_later(folder: Path) -> int:
    """Puts the program into the cache, for a later run of the job, and removes the folder."""
    note = Ahead(**json.loads((folder / AHEAD).read_text(encoding="utf-8")))
    package = folder / "step.pt2"
    try:
        if package.is_file():
            cache = ProgramCache(Path(note.cache))
            cache.add(note.key, package, note.what)
            cache.note_ready(note.signature)
    except (EngineError, OSError):  # the cache is full or gone
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _listen(folders: queue.SimpleQueue[Path], current: list[Path]) -> None:
    """Takes the folders of further jobs; ends this process with the parent, or some time after where it is told to."""
    # Not through sys.stdin: the interpreter cannot shut down while a thread holds its lock.
    told = b""
    while read := os.read(0, 1 << 12):
        *whole, told = (told + read).split(b"\0")
        for each in whole:
            folders.put(Path(os.fsdecode(each)))
    if (current[0] / AHEAD).is_file():
        time.sleep(AHEAD_S)
        shutil.rmtree(current[0], ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def _write_into(log: Path) -> None:
    """Has output and errors go into another file from now on."""
    with log.open("wb") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())


def _peak_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _bound_memory(device: torch.device) -> None:
    """Bounds what this process allocates, by the machine's memory as it is now."""
    total = total_bytes(torch.device("cpu"))
    if total is not None:
        import resource

        bound = max(int(total * MEMORY_SHARE), GPU_CHILD_BYTES if device.type == "cuda" else 0)
        resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(Path, sys.argv[2:3]), may_stay=STAY in sys.argv[3:]))


HEADERS = ("cuda.h", "crt/host_defines.h", "nv/target")
"""Those that the compiler has asked for; in wheels each is of another package."""

DRIVER = "libcuda.so"
USUAL_HOME = Path("/usr/local/cuda")
MAPS = Path("/proc/self/maps")

NVCC_S = 10.0
"""How long `nvcc` may take to tell where its toolkit is; it takes milliseconds."""


def cuda_home() -> Path:
    """The folder of a toolkit whose headers a program for CUDA can be compiled with.

    Raises:
        EngineError: there is none.
    """
    home = next(filter(_is_toolkit, _homes()), None)
    if home is None:
        raise EngineError(
            "compiling for a GPU needs the CUDA headers, and none were found: install the CUDA toolkit (and set "
            "CUDA_HOME), or its packages of headers, `pip install nvidia-cuda-crt nvidia-cuda-cccl`"
        )
    return home


def cuda_environment(folder: Path) -> dict[str, str]:
    """The environment variables by which torch's compiler finds headers and driver.

    torch's own search goes wrong where `nvcc` is a script in another folder, does not look into wheels, and expects a
    `libcuda.so`, which most machines have under its full name alone.

    Args:
        folder: an empty one, which stays while the compiler runs.

    Raises:
        EngineError: there are no such headers.
    """
    home = cuda_home()
    found = {"CUDA_HOME": str(home), "CPATH": _joined("CPATH", *map(str, _include_folders(home)))}
    driver = _loaded_driver()
    if driver is not None:
        (folder / DRIVER).symlink_to(driver)
        found["LIBRARY_PATH"] = _joined("LIBRARY_PATH", str(folder))
    return found


def _homes() -> Iterator[Path]:
    """Where a toolkit may be, the user's own word first."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if name in os.environ:
            yield Path(os.environ[name])
    yield USUAL_HOME
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        yield Path(nvcc).resolve().parents[1]
        yield from _home_by_nvcc(nvcc)
    wheels = Path(torch.__file__).parents[1] / "nvidia"
    yield from sorted(wheels.glob("cu[0-9]*"), reverse=True)


def _home_by_nvcc(nvcc: str) -> Iterator[Path]:
    """The toolkit's folder as `nvcc` itself tells: where that is a script, the folder is not near the script."""
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=NVCC_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return
    # Of the toolkit's settings, which nvcc prints to stderr: "#$ TOP=/opt/cuda/bin/.."
    for top in re.findall(r"^#\$ TOP=(.+)$", ended.stderr + "\n" + ended.stdout, flags=re.MULTILINE):
        yield Path(top.strip()).resolve()


def _is_toolkit(home: Path) -> bool:
    folders = _include_folders(home)
    return all(any((folder / header).is_file() for folder in folders) for header in HEADERS)


def _include_folders(home: Path) -> list[Path]:
    return [home / "include", home / "include" / "cccl"]


def _joined(name: str, *folders: str) -> str:
    """A search path with folders in front of those that are there already."""
    return os.pathsep.join([*folders, *filter(None, [os.environ.get(name)])])


def _loaded_driver() -> str | None:
    """The file of the CUDA driver that this process has loaded, None where it has none or the system does not tell."""
    try:
        lines = MAPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    files = (line.split(maxsplit=5)[-1] for line in lines)
    return next((file for file in files if Path(file).name.startswith(DRIVER)), None)
