"""From a traced step to its program: by the cache where it is known, by a compiling child where not."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

from fasttrain.step.batch_layout import refuse_unplain
from fasttrain.step.build import Build, GraphJob
from fasttrain.step.cache import ProgramCache, Verdict, default_folder
from fasttrain.step.identity import job_signature, program_key
from fasttrain.step.program import StepProgram
from fasttrain.step.span import TracedSpan
from fasttrain.step.spec import StepSpec
from fasttrain.step.trace import TracedStep, trace_step

__all__ = ["Compiler", "Pending"]

Batch = Any


Traced = TypeVar("Traced", TracedStep, TracedSpan)


class Pending(Generic[Traced]):
    """A program that is on its way: a package for each part of the step, made one after the other.

    Attributes:
        traced: the step that it is of.
        trace_s: how long the trace took.
        compile_s: how long the children took; None while one runs, or where the cache had all packages.
    """

    def __init__(self, cache: ProgramCache, traced: Traced, trace_s: float) -> None:
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

    def load(self) -> StepProgram:
        """The program. It must be ready.

        Raises:
            EngineError: it cannot be loaded.
        """
        return StepProgram(self._packages, self.traced)

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

    Raises:
        EngineError: the program cache cannot be trusted or made.
    """

    def __init__(self, spec: StepSpec) -> None:
        self.cache = ProgramCache(default_folder())
        self._spec = spec
        self._signature: str | None = None

    def begin(self, batch: Batch, refuse_unfit: Callable[[TracedStep], None] = lambda _: None) -> Pending[TracedStep]:
        """Traces the step, which takes a while, and has its program made if the cache does not have it.

        Args:
            batch: an example, on the device.
            refuse_unfit: raises EngineError for what is not to be compiled.

        Raises:
            EngineError: the step cannot be traced, is unfit, or no child can be started.
        """
        begin = time.perf_counter()
        traced = trace_step(self._spec, batch)
        refuse_unfit(traced)
        return Pending(self.cache, traced, time.perf_counter() - begin)

    def pending(self, traced: TracedSpan) -> Pending[TracedSpan]:
        """Has the program of a span made if the cache does not have it.

        Raises:
            EngineError: no child can be started.
        """
        return Pending(self.cache, traced, 0.0)

    def has(self, traced: TracedSpan) -> bool:
        """Whether the cache has the program of a span, so that no child is needed for it."""
        return all(self.cache.find(program_key(GraphJob.of(part))) is not None for part in traced.parts)

    def verdict(self, batch: Batch) -> Verdict | None:
        """What was measured of a step that looks like this one, on this machine.

        Raises:
            EngineError: the batch holds tensors that no compiled step takes.
        """
        refuse_unplain(batch)
        self._signature = job_signature(self._spec, batch)
        return self.cache.verdict(self._signature)

    def remember(self, verdict: Verdict) -> None:
        """Keeps what was measured; where it cannot be written, the next run measures again."""
        if self._signature is not None:
            with suppress(OSError):
                self.cache.remember(self._signature, verdict)
