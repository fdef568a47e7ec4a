"""From a traced step to its program: keys, the cache, and the compiling child where the cache has none.

It also says whether the steps to come repay a program, and makes programs whose kernels the profiler can see.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn

from fasttrain.data.batch import tensors
from fasttrain.data.columns import ColumnKind
from fasttrain.data.ragged import Ragged
from fasttrain.data.resident import Span
from fasttrain.device import cpu_features, device_name, versions
from fasttrain.errors import EngineError
from fasttrain.step.build import Ahead, Build, GraphJob, ahead_of, note_ahead
from fasttrain.step.cache import ProgramCache, Verdict, default_folder
from fasttrain.step.guards import PLAIN
from fasttrain.step.program import StepProgram
from fasttrain.step.spec import StepSpec
from fasttrain.step.torch_private.marking import KernelCall, kernel_calls
from fasttrain.step.trace import TracedStep, trace_step
from fasttrain.step.walk import TracedWalk, WalkingProgram

__all__ = ["Compiler", "KernelCall", "Pending", "job_signature", "program_key", "shortfall", "with_marked_kernels"]

COMPILE_AHEAD = "FASTTRAIN_COMPILE_AHEAD"
"""The environment variable that turns compiling for later runs off where it is "0"."""

EXPECTED_COMPILE_S = 25.0
EXPECTED_TRACE_S, TRACE_S_A_MODULE = 0.7, 0.03
"""A trace: of a model, and of each module in it (100 modules: 3 s, 500 modules: 16 s of CPU; Xeon, torch 2.13)."""

SMALL_STEP_S = 2e-3
GAIN_OF_SMALL_STEPS, GAIN_OF_LARGE_STEPS = 0.5, 0.05
"""What to expect before anything is measured: the time of small steps is overhead, which compiling removes; that of
large ones is in matrix products, which it does not touch."""


class Pending:
    """A program that is on its way: a package for each part of the step, made one after the other.

    Attributes:
        traced: what is compiled: a step that takes its batch, or one that walks over resident rows.
        trace_s: how long the trace took.
        compile_s: how long the children took; None while one runs, or where the cache had all packages.
    """

    def __init__(self, cache: ProgramCache, traced: TracedStep | TracedWalk, trace_s: float) -> None:
        self.traced = traced
        self.trace_s = trace_s
        self.compile_s: float | None = None
        self._cache = cache
        self._jobs = [GraphJob.of(part) for part in traced.parts]
        self._packages: list[Path] = []
        self._builds: list[Build] = []
        self._advance()

    def is_ready(self) -> bool:
        """True once the program can be loaded.

        Raises:
            EngineError: a child failed, or cannot be started.
        """
        if len(self._packages) < len(self._jobs):
            self._arrived(self._builds[-1].poll())
        return len(self._packages) == len(self._jobs)

    def wait(self) -> None:
        """Waits until it can be loaded; errors as in `is_ready`."""
        while len(self._packages) < len(self._jobs):
            self._arrived(self._builds[-1].wait())

    def load(self) -> StepProgram | WalkingProgram:
        """The program. It must be ready.

        Raises:
            EngineError: it cannot be loaded.
        """
        if isinstance(self.traced, TracedWalk):
            return WalkingProgram(self._packages, self.traced)
        return StepProgram(self._packages, self.traced)

    def leave(self, signature: str) -> int | None:
        """Has the child go on for later runs of the job, if it makes all that is missing.

        Returns:
            Its process id; None where none goes on.
        """
        if not self._builds or len(self._packages) + 1 != len(self._jobs) or ahead_of(self._cache) is not None:
            return None
        key, what = program_key(self._jobs[-1]), type(self.traced.spec.model).__name__
        pid = self._builds[-1].leave(Ahead(cache=str(self._cache.folder), key=key, what=what, signature=signature))
        if pid is not None:
            with suppress(OSError):
                note_ahead(self._cache, pid, what)
        return pid

    def close(self) -> None:
        """Ends the child, if one still runs."""
        for build in self._builds:
            build.close()

    def _advance(self) -> None:
        """Takes packages from the cache, up to the first that it does not have: a child makes that."""
        for job in self._jobs[len(self._packages) :]:
            package = self._cache.find(program_key(job))
            if package is None:
                self._builds.append(Build(job, self._cache.inductor_folder))
                return
            self._packages.append(package)

    def _arrived(self, package: Path | None) -> None:
        if package is None:
            return
        self.compile_s = (self.compile_s or 0.0) + self._builds[-1].seconds
        key = program_key(self._jobs[len(self._packages)])
        with suppress(OSError):  # the cache is full or gone: the program serves this run
            package = self._cache.add(key, package, type(self.traced.spec.model).__name__)
        self._packages.append(package)
        self._advance()


class Compiler:
    """Makes programs of one step, and remembers what was measured of them.

    Args:
        spec: the step.

    Attributes:
        why_single: why the last step that was given resident rows cannot walk over them; empty where it can.

    Raises:
        EngineError: the program cache cannot be trusted or made.
    """

    def __init__(self, spec: StepSpec) -> None:
        self.cache = ProgramCache(default_folder())
        self.why_single = ""
        self._spec = spec
        self._signature: str | None = None

    def begin(self, work: Any, refuse_unfit: Callable[[TracedStep], None] = lambda _: None) -> Pending:
        """Traces the step, which takes a while, and has its program made if the cache does not have it.

        Args:
            work: a batch, on the device, or a `Span` of resident rows, over which the program walks if it can.
            refuse_unfit: raises EngineError for what is not to be compiled.

        Raises:
            EngineError: the step cannot be traced, is unfit, or no child can be started.
        """
        begin = time.perf_counter()
        batch = work.batch() if isinstance(work, Span) else work
        traced = trace_step(self._spec, batch)
        refuse_unfit(traced)
        found = self._walking(traced, batch, work) if isinstance(work, Span) else traced
        return Pending(self.cache, found, time.perf_counter() - begin)

    def verdict(self, work: Any) -> Verdict | None:
        """What was measured on this machine of a step that looks like this one and is given such batches."""
        batch = work.batch() if isinstance(work, Span) else work
        rows = [column.kind for column in work.source.columns] if isinstance(work, Span) else None
        self._signature = job_signature(self._spec, batch, rows)
        return self.cache.verdict(self._signature)

    def is_ready(self) -> bool:
        """Whether the program of the job that `verdict` was asked about was compiled after an earlier run."""
        return self._signature is not None and self.cache.is_ready(self._signature)

    def is_seen_again(self) -> bool:
        """Counts a run of this job that ends before its program is ready; whether to compile for later runs.

        That is the second such run, and if its program did not get ready, the fourth, the eighth and so on.
        """
        may_compile = os.environ.get(COMPILE_AHEAD, "1") != "0"
        if self._signature is None or not may_compile or ahead_of(self.cache) is not None:
            return False
        try:
            count = self.cache.note_short(self._signature)
        except OSError:
            return False
        return count > 1 and count & (count - 1) == 0

    def leave(self, pending: Pending) -> int | None:
        """Has the child of a program go on for later runs; see `Pending.leave`."""
        return None if self._signature is None else pending.leave(self._signature)

    def remember(self, verdict: Verdict) -> None:
        """Keeps what was measured; where it cannot be written, the next run measures again."""
        if self._signature is not None:
            with suppress(OSError):
                self.cache.remember(self._signature, verdict)

    def _walking(self, traced: TracedStep, batch: Any, span: Span) -> TracedStep | TracedWalk:
        """The step over the resident rows; the step itself where it cannot walk."""
        self.why_single = ""
        try:
            return TracedWalk(traced, batch, span.source)
        except EngineError as error:
            self.why_single = str(error)
            return traced


def shortfall(
    steps: int, eager_s: float, known: Verdict | None, num_modules: int, *, is_ready: bool = False
) -> str | None:
    """Why so many steps cannot repay a program, None if they can.

    Args:
        steps: that are to come.
        eager_s: what one takes eagerly.
        known: what was measured of the program in an earlier run, if it was.
        num_modules: of the model.
        is_ready: whether the program is in the cache, though none was measured yet.
    """
    if steps <= 0:
        return (
            "no more steps are expected: where batches have no length and in a loop of your own, say how many are to "
            "come (TrainStep.expect)"
        )
    trace_s = known.trace_s if known is not None else EXPECTED_TRACE_S + TRACE_S_A_MODULE * num_modules
    compile_s = 0.0 if is_ready else EXPECTED_COMPILE_S
    gain = GAIN_OF_SMALL_STEPS if eager_s < SMALL_STEP_S else GAIN_OF_LARGE_STEPS
    if known is not None and known.program_us is not None:
        compile_s, gain = 0.0, 1.0 - known.program_us / known.eager_us
    alone = len(os.sched_getaffinity(0)) < 2 if hasattr(os, "sched_getaffinity") else False
    cost_s = 2.0 * trace_s + (compile_s if alone else 0.0)
    saved_s = max(0.0, steps * eager_s - compile_s) * gain
    if saved_s >= cost_s:
        return None
    return (
        f"the {steps:,} steps that are left take about {steps * eager_s:.1f} s: too little to repay a compiled program "
        f"(ready in {compile_s:.0f} s, then {gain:.0%} faster)"
    )


Batch = Any

COMPILING = ("build.py", "kernels.py", "program.py", "torch_private")
"""What the compiling child does with a job, beside torch's own compiler."""


def program_key(job: GraphJob) -> str:
    """Of everything that a program depends on: graph, constants, shapes, what compiles it, hardware, threads."""
    constants = [
        (name, value.shape, value.dtype, _bytes_of(value))
        for name, value in sorted(job.graph.named_buffers())  # a graph keeps its constants there
    ]
    inputs = [
        ([None if dim in dims else length for dim, length in enumerate(size)], stride, dtype, device)
        for (size, stride, dtype, device), dims in zip(job.inputs, job.open_dims, strict=True)
    ]
    plain = (job.longest, job.num_threads, job.origins, job.anywhere)
    return _hash(job.graph.code, constants, inputs, *plain, _compiling_code(), *_machine(job.device))


def job_signature(spec: StepSpec, batch: Batch, rows: Sequence[ColumnKind] | None) -> str:
    """Of what a job looks like from outside: enough to remember what was measured, not to trust a program.

    Args:
        spec: the step.
        batch: one of its batches.
        rows: what the columns of resident data are like; None for a batch that is passed by itself.
    """
    options = [
        {name: value for name, value in group.items() if name not in ("params", "param_names", "lr", "initial_lr")}
        for group in spec.optimizer.param_groups
    ]
    leaves = [leaf.offsets if isinstance(leaf, Ragged) else leaf for leaf in tensors(batch)]
    return _hash(
        _name_of(spec.model),
        [
            (name, value.shape, value.dtype)
            for name, value in spec.model.state_dict().items()
            if isinstance(value, Tensor)  # a module's extra state may be anything
        ],
        type(spec.optimizer).__qualname__,
        options,
        [(_shape_of(leaf), leaf.dtype) for leaf in leaves],
        (spec.precision, spec.accumulate, spec.clip_norm, spec.clip_value, rows),
        [(name, _name_of(value), _code_behind(value)) for name, value in _callables_of(spec)],
        [_code_behind(kind) for kind in dict.fromkeys(type(module) for module in spec.model.modules())],
        _source_files(spec),
        versions()["fasttrain"],
        torch.get_num_threads(),
        *_machine(spec.device),
    )


def _shape_of(tensor: Tensor) -> object:
    return type(tensor).__name__ if tensor.is_nested else tensor.shape


def _callables_of(spec: StepSpec) -> list[tuple[str, Any]]:
    """What the user gave to be called: forward or the loss, and the metrics."""
    return [*vars(spec.forward).items(), *spec.metrics.user_metrics.items()]


def _source_files(spec: StepSpec) -> list[str]:
    """Digests of the files that hold the user's functions and module classes: an edit may change what is computed."""
    kinds = [type(module) for module in spec.model.modules()]
    owners = [getattr(value, "__module__", None) for value in (*kinds, *[value for _, value in _callables_of(spec)])]
    found = dict.fromkeys(getattr(sys.modules.get(str(owner)), "__file__", None) for owner in owners)
    return [
        _digest(path) for path in found if path is not None and not path.startswith(os.path.dirname(torch.__file__))
    ]


def _digest(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:  # it is in an archive, or gone
        return path


def _code_behind(value: Any) -> object:
    """The code of a function, of a method, or of a module class's forward, its plain defaults and what it names."""
    function: Any = getattr(value, "forward", value) if isinstance(value, type | nn.Module) else value
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        return None
    names = set(code.co_names).union(*[each.co_names for each in code.co_consts if isinstance(each, CodeType)])
    named: dict[str, Any] = {name: function.__globals__[name] for name in names if name in function.__globals__}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # it has no value yet
            named[name] = cell.cell_contents
    return _code_of(code), _plain(function.__defaults__ or ()), [(name, _told(named[name])) for name in sorted(named)]


def _told(value: Any) -> object:
    """What of a value that a function names makes the job another one."""
    if isinstance(value, FunctionType):
        return _code_of(value.__code__)
    return value if isinstance(value, PLAIN) else _name_of(value)


@cache
def _compiling_code() -> str:
    """Of the files that make a program of a job: others may make another program."""
    here = files("fasttrain.step")
    return _hash(*(file.read_text(encoding="utf-8") for name in COMPILING for file in _sources(here / name)))


def _sources(place: Traversable) -> list[Traversable]:
    if place.is_file():
        return [place]
    return sorted((file for file in place.iterdir() if file.name.endswith(".py")), key=lambda file: file.name)


def _bytes_of(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _code_of(code: CodeType) -> object:
    """What code computes, as far as it is its own: the same in every process."""
    constants = [_code_of(each) if isinstance(each, CodeType) else _constant(each) for each in code.co_consts]
    return code.co_code, code.co_names, constants


def _constant(value: object) -> str:
    # The order of a set is another one in each process.
    return repr(sorted(map(repr, cast("frozenset[object]", value))) if isinstance(value, frozenset) else value)


def _plain(values: Iterable[object]) -> list[object]:
    return [value for value in values if isinstance(value, PLAIN)]


def _plain_attributes(module: nn.Module) -> list[tuple[str, object]]:
    return [(name, value) for name, value in sorted(vars(module).items()) if isinstance(value, PLAIN)]


def _name_of(value: Any) -> str:
    """Of something that is called, or a tensor."""
    if isinstance(value, nn.Module):
        settings = [_plain_attributes(module) for module in value.modules()]
        return f"{value!r} {settings!r}"
    kind = type(value)
    try:
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', kind.__qualname__)}"
    except Exception:  # a __getattr__ of the user's, such as one that looks into a dict
        return f"{kind.__module__}.{kind.__qualname__}"


def _machine(device: torch.device) -> tuple[str, ...]:
    # Programs are compiled with -march=native: for all that this processor has, whatever torch itself makes of it.
    capability = torch.backends.cpu.get_cpu_capability()
    return str(torch.__version__), device.type, device_name(device), capability, cpu_features()


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:40]


@contextmanager
def with_marked_kernels(programs: Iterable[StepProgram | WalkingProgram]) -> Generator[list[list[KernelCall]]]:
    """Has programs run with kernels that the profiler sees meanwhile; waits for the compiler where the cache has none.

    Args:
        programs: of this process.

    Yields:
        The kernels of each part of each program, in the order in which a run calls them.

    Raises:
        EngineError: one cannot be compiled so.
    """
    with ExitStack() as entered:
        cache: ProgramCache | None = None
        calls: list[list[KernelCall]] = []
        for program in programs:
            cache = cache or ProgramCache(default_folder())
            packages = [_package(GraphJob.of(part).marked(), cache, entered) for part in program.parts]
            entered.enter_context(program.running(packages))
            calls += map(kernel_calls, packages)
        yield calls


def _package(job: GraphJob, cache: ProgramCache, entered: ExitStack) -> Path:
    """From the cache, or compiled; what is compiled and cannot be kept there lives as long as `entered`."""
    key = program_key(job)
    package = cache.find(key)
    if package is not None:
        return package
    build = Build(job, cache.inductor_folder)
    entered.callback(build.close)
    package = build.wait()
    with suppress(OSError):  # the cache is full or gone
        package = cache.add(key, package, "a program for the profiler")
    return package
