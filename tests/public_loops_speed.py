"""Public training loops through the compiler, against plain PyTorch: losses, engine and reason, time of a step.

`python -m tests.public_loops_speed` writes benchmarks/results/public-loops-cpu.json. A plain loop and one with
fasttrain, each in a process of its own, take turns; a turn is measured in CPU time, so that other work on the machine
weighs less. Steps of the first epochs, in which programs are made, are not timed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.loops import Loop, LoopsRecord
from benchmarks.places import RESULTS, log
from fasttrain.errors import EngineError
from fasttrain.measure.bench.record import write_record
from fasttrain.measure.environment import environment, load_average, now
from tests import public_loops
from tests.public_loops import BATCHES, EPOCHS, LOOPS, ROWS, TOLERANCE, Expected, Side, trained

TURN_S = 0.1

WARM_STEPS = 4 * BATCHES * EPOCHS

MANY_EPOCHS = 40_000
"""More than any loop needs for its turns."""


class _EndOfTurns(BaseException):
    """Ends a loop that has been timed often enough."""


class Turns:
    """Is told how many steps a loop has made; measures turns of at least `TURN_S` whenever the parent asks for one."""

    def __init__(self, parent: Connection) -> None:
        self._parent = parent
        self._warm_steps = WARM_STEPS
        self._steps = 0
        self._begin = 0.0

    def __call__(self, steps: int) -> None:
        if self._warm_steps > 0:
            self._warm_steps -= steps
            if self._warm_steps <= 0:
                self._wait(None)
            return
        self._steps += steps
        seconds = time.process_time() - self._begin
        if seconds >= TURN_S:
            self._wait(seconds / self._steps)

    def _wait(self, step_s: float | None) -> None:
        self._parent.send(step_s)
        if not self._parent.recv():
            raise _EndOfTurns
        self._steps, self._begin = 0, time.process_time()


def side_of(expected: Expected, engine: str | None, parent: Connection, folder: str) -> None:
    """A child: tells what a loop's losses and states are, and by which engine; then takes turns."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    os.environ["XDG_CACHE_HOME"] = folder
    reason = None
    side = Side(engine)
    try:
        found = trained(expected, side)
    except EngineError as error:
        reason, engine, side = str(error), "eager", Side("eager")
        found = trained(expected, side)
    engines = {step.engine.value for step in side.steps}
    parent.send((found, engines, reason))
    public_loops.EPOCHS = MANY_EPOCHS
    try:
        trained(expected, Side(engine, Turns(parent)))
    except _EndOfTurns:
        parent.close()


def make_programs(place: int, folder: str) -> None:
    """A child: has the programs of a loop made, before anything is timed."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    os.environ["XDG_CACHE_HOME"] = folder
    with suppress(EngineError):
        trained(LOOPS[place], Side("compiled"))


def measure(expected: Expected, num_turns: int, folder: str) -> Loop:
    """Runs both sides of one loop."""
    context = get_context("spawn")
    ends: list[Connection] = []
    for engine in (None, "compiled"):
        end, other = context.Pipe()
        context.Process(target=side_of, args=(expected, engine, other, folder), daemon=True).start()
        other.close()
        ends.append(end)
    plain, ours = ends
    (wanted, _, _), (found, engines, reason) = plain.recv(), ours.recv()
    torch.testing.assert_close(found, wanted, rtol=TOLERANCE, atol=TOLERANCE)
    assert len(engines) == 1, engines
    for end in ends:
        end.recv()  # it is warm
    step_s: list[list[float]] = [[], []]
    for turn in range(num_turns):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            ends[side].send(True)
            step_s[side].append(ends[side].recv())
    for end in ends:
        end.send(False)
    return Loop(
        name=expected.loop.__name__,
        engine=engines.pop(),
        reason=reason,
        loss_difference=max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(found[0], wanted[0], strict=True)),
        plain_step_s=tuple(step_s[0]),
        step_s=tuple(step_s[1]),
    )


def main(arguments: Sequence[str]) -> int:
    """Measures and writes the record after each loop; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.public_loops_speed", description=__doc__)
    names = [each.loop.__name__ for each in LOOPS]
    parser.add_argument("--loops", nargs="+", choices=names, default=names, help="(default: all)")
    parser.add_argument("--cache", help="folder of programs, which is kept (default: one that goes)")
    parser.add_argument("--jobs", type=int, default=2, help="processes that make programs (default: 2)")
    parser.add_argument("--turns", type=int, default=10, help="of each side (default: 10)")
    parser.add_argument("--out", type=Path, default=RESULTS / "public-loops-cpu.json", help="the record")
    options = parser.parse_args(arguments)
    started_at = environment(torch.device("cpu"))
    found: list[Loop] = []
    places = [place for place, each in enumerate(LOOPS) if each.loop.__name__ in options.loops]
    with nullcontext(options.cache) if options.cache else tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(options.jobs, get_context("spawn")) as workers:
            list(workers.map(make_programs, places, [folder] * len(places)))
        for place in places:
            loop = measure(LOOPS[place], options.turns, folder)
            log(f"{loop.name}: {loop.engine}, {loop.loss_difference:.1g}, {loop.ratio:.2f}x; {loop.reason or ''}")
            found.append(loop)
            fields: dict[str, Any] = {
                "command": shlex.join(["python", "-m", "tests.public_loops_speed", *arguments]),
                "created": now(),
                "environment": {**started_at, "load_average_after": load_average()},
                "rows": ROWS,
                "turn_s": TURN_S,
            }
            write_record(LoopsRecord(**fields, loops=tuple(found)), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
