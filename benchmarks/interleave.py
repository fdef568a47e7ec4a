"""What the interleaved benchmarks share: their options, the check before timing, the record after it."""

from __future__ import annotations

import argparse
import importlib
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.arms import FastArm, count
from benchmarks.harness import (
    Arm,
    check_losses,
    command_line,
    environment_variables,
    load_average,
    log,
    measure,
    now,
    with_threads,
)
from benchmarks.records import Record, Series, ratios_to, write_record
from fasttrain.errors import DataError, EngineError

CHECKED_BATCHES = 20
TOLERANCE = 1e-5
ORDER_SEED = 0

Makers = dict[str, Callable[[], Arm]]


@dataclass
class Prepared:
    """The arms that may be timed, those that may not with the reason, and what their preparation showed."""

    arms: list[Arm] = field(default_factory=list[Arm])
    refused: dict[str, str] = field(default_factory=dict[str, str])
    notes: list[str] = field(default_factory=list[str])


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One interleaved benchmark.

    Attributes:
        benchmark: its name; `benchmarks.<name>` is its module.
        title: the heading of its table.
        workload: what the arms work on.
        environment: as it was before anything ran.
        textbooks: arms of the textbook; the first one's losses are what the others must give, the faster one is the
            yardstick.
        makers: of the other arms, by name; one that cannot run here raises `EngineError` when it is made.
        notes: what a reader of the figures has to know.
    """

    benchmark: str
    title: str
    workload: dict[str, Any]
    environment: dict[str, Any]
    textbooks: Sequence[Arm]
    makers: Makers
    notes: Sequence[str] = ()

    def run(self, options: argparse.Namespace, arguments: Sequence[str], out: Path) -> None:
        """Prepares the arms, times them and writes the record."""
        with empty_cache():
            prepared = prepare({**{arm.name: lambda arm=arm: arm for arm in self.textbooks}, **self.makers})
            rates = measure(prepared.arms, repeats=options.repeats, min_seconds=options.seconds, seed=ORDER_SEED)
        series = {
            arm.name: Series(description=arm.description, unit="samples/s", values=tuple(rates[arm.name]))
            for arm in prepared.arms
        }
        yardstick = max((arm.name for arm in self.textbooks), key=lambda name: series[name].median)
        record = Record(
            benchmark=self.benchmark,
            title=self.title,
            command=command_line(f"benchmarks.{self.benchmark}", arguments),
            created=now(),
            environment={**self.environment, "load_average_after": load_average()},
            workload=self.workload,
            series=series,
            yardstick=yardstick,
            ratios=ratios_to(series, yardstick, list(series)),
            refused=prepared.refused,
            notes=[*prepared.notes, *engines(prepared.arms), *self.notes, *conditions(options)],
        )
        write_record(record, out)
        log(f"written: {out}")


@contextmanager
def empty_cache() -> Generator[None]:
    """A cache of programs for this measurement alone, so that every record tells what compiling takes."""
    with tempfile.TemporaryDirectory(prefix="fasttrain-cache-") as folder, environment_variables(XDG_CACHE_HOME=folder):
        yield


def option_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The options that every interleaved benchmark has."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--repeats", type=int, default=5, help="how often each arm is timed (default: 5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="least seconds of passes in a repeat (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of every arm but one (default: 1)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--out", type=Path, help=f"the record (default: benchmarks/results/{name}-<device>.json)")
    return parser


def peer(module: str, job: Any, threads: int, build: str = "build") -> Callable[[], Arm]:
    """What makes the arm of a peer; it raises `EngineError` where the peer is not installed."""

    def make() -> Arm:
        try:
            found = importlib.import_module(f"benchmarks.peers.{module}")
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("benchmarks"):
                raise
            raise EngineError(f"{error.name} is not installed: pip install '.[peers]'") from error
        return getattr(found, build)(job, threads)

    return make


def prepare(makers: Makers) -> Prepared:
    """Makes every arm, checks its losses against the first one's, and runs its first pass."""
    prepared = Prepared()
    wanted: list[float] | None = None
    for name, make in makers.items():
        log(f"checking and warming up: {name}")
        begin = time.perf_counter()
        try:
            arm = make()
            with_threads(arm.threads)
            losses = arm.losses(CHECKED_BATCHES)
            wanted = wanted or losses
            shown = _agreement(losses, wanted)
            arm.run()
        except (EngineError, DataError) as error:
            prepared.refused[name] = str(error)
            log(f"not timed: {name}: {error}")
            continue
        prepared.arms.append(arm)
        compiled = "" if arm.compile_s is None else f", {arm.compile_s:.1f} s of it waiting for a trace or a compiler"
        seconds = time.perf_counter() - begin
        prepared.notes.append(
            f"{name}: {shown}; made, checked and warmed up in {seconds:.1f} s{compiled}, in no figure"
        )
        log(prepared.notes[-1])
    return prepared


def engines(arms: Sequence[Arm]) -> list[str]:
    """What ran the steps of each `FastLoop` in the end, and why."""
    loops = [(arm.name, arm.loop.step.engine) for arm in arms if isinstance(arm, FastArm)]
    return [f"{name}: ended on {engine.value}: {engine.reason}" for name, engine in loops]


def conditions(options: argparse.Namespace) -> list[str]:
    """How the arms were timed."""
    return [
        f"{count(options.repeats, 'repeat')}; in each, every arm once in random order, {options.seconds:g} s or more",
        "order of rows, gathering, steps and the readout of loss and accuracy are inside; the first pass, compilers "
        "and evaluation are not",
    ]


def _agreement(losses: list[float] | None, wanted: list[float] | None) -> str:
    """How close the losses are, in words; raises `DataError` where they are not close enough."""
    if losses is None or wanted is None:
        return "another algorithm, whose losses are not the textbook's"
    return f"losses within {check_losses(losses, wanted, TOLERANCE):.1g} of the textbook's"
