"""Records and blocks that are made up, for the tests of benchmarks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from fasttrain.measure.bench.messages import ArmState, ArmTask, ProcessDiedError, Slice, Started
from fasttrain.measure.bench.plan import ArmSpec, BenchPlan
from fasttrain.measure.bench.record import ArmRecord, BenchRecord, BlockFigures, Design

ENVIRONMENT: dict[str, Any] = {
    "cpu": "A CPU",
    "device": "A CPU",
    "cores": 4,
    "torch": "2.13.0",
    "python": "3.11.7",
    "fasttrain": "0.1.0",
    "commit": "0123456789abcdef",
    "has_uncommitted_changes": False,
    "load_average": 0.1,
    "load_average_after": 1.2,
}


def figures(block: int, step_s: float, **changes: Any) -> BlockFigures:
    fields: dict[str, Any] = {
        "block": block,
        "position": 0,
        "step_s": step_s,
        "steps": 100,
        "seconds": 100 * step_s,
        "rounds": 20,
        "samples_per_step": 128,
        "import_s": 2.0,
        "compile_s": None,
        "first_step_s": 0.01,
        "peak_bytes": 400_000_000,
    }
    return BlockFigures(**{**fields, **changes})


def arm(*step_s: float, **changes: Any) -> ArmRecord:
    blocks = tuple(figures(block, seconds) for block, seconds in enumerate(step_s))
    fields: dict[str, Any] = {"description": "an arm", "agreement": 1e-7, "tolerance": 1e-5, "blocks": blocks}
    return ArmRecord(**{**fields, **changes})


def record(arms: dict[str, ArmRecord], **changes: Any) -> BenchRecord:
    fields: dict[str, Any] = {
        "workload": {"name": "mlp", "train_rows": 20_000},
        "command": "python -m fasttrain bench --workload mlp",
        "created": "2026-01-02T03:04:05+00:00",
        "environment": ENVIRONMENT,
        "design": Design(blocks=2, extended=False, warmup_s=0.5, timed_s=1.0, slice_s=0.05, threads=1, seed=0),
        "arms": arms,
        "refused": {},
    }
    return BenchRecord(**{**fields, **changes})


def plan(*sources: str, **changes: Any) -> BenchPlan:
    arms = tuple(ArmSpec(label=source, source=source, threads=1) for source in sources)
    return BenchPlan(**{"workload": "mlp", "device": "cpu", "arms": arms, "blocks": 3, **changes})


class DiesInRoundsError(ProcessDiedError):
    """A death that comes when the process was ready."""


Given = float | Slice | Started | ProcessDiedError
"""What a fake arm does in a block: seconds of a step, or a slice of it, in the rounds; a refusal or a death before."""


def slice_of(step_s: float, waited_s: float = 0.0, awake_s: float = 0.0) -> Slice:
    steps = math.ceil(0.2 / step_s)
    return Slice(seconds=steps * step_s, steps=steps, waited_s=waited_s, others_s=0.2, awake_s=awake_s)


class FakeProcess:
    """An arm whose steps take what `given` says next: at its start, and when its state was asked for."""

    def __init__(self, started: Started, found: Given, given: Iterator[Given]) -> None:
        self.started = started
        self._found: Given | None = found
        self._given = given

    def slice(self, _seconds: float, _core: int) -> Slice:
        if self._found is None:
            self._found = next(self._given)
        if isinstance(self._found, DiesInRoundsError):
            raise self._found
        assert isinstance(self._found, float | Slice), "the rest comes at the start"
        return self._found if isinstance(self._found, Slice) else slice_of(self._found)

    def state(self) -> ArmState:
        self._found = None
        return ArmState(compile_s=None, peak_bytes=400_000_000, engine=None)


class FakeRunner:
    """Starts no process: an arm does what `step_s` says of its source, block by block, over and over.

    Attributes:
        tasks: that were started.
        living: sources of the arms whose processes have not ended.
        workload: what the processes tell of it.
    """

    def __init__(self, step_s: Mapping[str, Sequence[Given]], workload: Mapping[str, Any] | None = None) -> None:
        self.workload = {"name": "mlp"} if workload is None else dict(workload)
        self.tasks: list[ArmTask] = []
        self.living: list[str] = []
        self._given = {source: itertools.cycle(given) for source, given in step_s.items()}

    @contextmanager
    def __call__(self, task: ArmTask) -> Generator[FakeProcess]:
        self.tasks.append(task)
        about = Started(
            workload=self.workload,
            description=f"the arm {task.source}",
            agreement=1e-7,
            tolerance=1e-5,
            samples_per_step=128,
        )
        given: Iterator[Given] = iter(())
        found: Given = 1e-3
        if task.reference is None:
            about = replace(about, running_losses=(0.7, 0.6))
        else:
            given = self._given[task.source]
            found = next(given)
        if isinstance(found, ProcessDiedError) and not isinstance(found, DiesInRoundsError):
            raise found
        if isinstance(found, Started):
            about = found
        self.living.append(task.source)
        try:
            yield FakeProcess(about, found, given)
        finally:
            self.living.remove(task.source)


class FakeMachine:
    """A watcher that raises the given flags, one turn after the other, and then none.

    Attributes:
        wanted: the threads that wanted to run, as it was told.
    """

    def __init__(self, *flags: tuple[str, ...]) -> None:
        self._flags = list(flags)
        self.wanted: list[int | None] = []

    def before(self) -> int | None:
        return 2

    def flags(self, wanted: int | None) -> tuple[str, ...]:
        self.wanted.append(wanted)
        return self._flags.pop(0) if self._flags else ()
