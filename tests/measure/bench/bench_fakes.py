"""Records and blocks that are made up, for the tests of benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fasttrain.measure.bench.record import ArmRecord, BenchRecord, BlockFigures, Design
from fasttrain.measure.bench.task import BlockResult, BlockTask

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
        "design": Design(blocks=2, extended=False, warmup_s=0.5, timed_s=1.0, threads=1, seed=0),
        "arms": arms,
        "refused": {},
    }
    return BenchRecord(**{**fields, **changes})


class FakeRunner:
    """Runs no process: an arm's step takes what `step_s` says of its source, block by block, over and over."""

    def __init__(self, step_s: dict[str, Sequence[float | BlockResult]]) -> None:
        self.tasks: list[BlockTask] = []
        self._step_s = step_s
        self._calls = dict.fromkeys(step_s, 0)

    def __call__(self, task: BlockTask) -> BlockResult:
        self.tasks.append(task)
        if task.reference is None:
            return BlockResult(workload={"name": task.workload}, tolerance=1e-5, running_losses=(0.7, 0.6))
        given = self._step_s[task.source]
        found = given[self._calls[task.source] % len(given)]
        self._calls[task.source] += 1
        if isinstance(found, BlockResult):
            return found
        timed = figures(task.block, found, position=task.position)
        return BlockResult(description=f"the arm {task.source}", agreement=1e-7, tolerance=1e-5, figures=timed)


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
