"""Programs compiled once more, so that the profiler sees their kernels: for a traced pass alone, never for timing."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from fasttrain.step.build import Build, GraphJob
from fasttrain.step.cache import ProgramCache, default_folder
from fasttrain.step.identity import program_key
from fasttrain.step.program import StepProgram
from fasttrain.step.torch_private.marking import KernelCall, kernel_calls

__all__ = ["KernelCall", "with_marked_kernels"]


@contextmanager
def with_marked_kernels(programs: Iterable[StepProgram]) -> Generator[list[list[KernelCall]]]:
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
