"""How far compiled steps are from exact ones, beside eager steps: every optimizer with every model of the tests.

`python -m tests.step.errors` compiles 180 programs (about half an hour; they stay in the cache) and writes
benchmarks/results/errors-cpu.json. From the same state, weights and batches as they are after an eager step in single
precision, it runs 20 steps eagerly in double precision, eagerly in single precision and by the program.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.errors import ErrorRecord, Errors, Pair
from benchmarks.places import RESULTS, log
from fasttrain.errors import EngineError, FasttrainError
from fasttrain.measure.bench.record import write_record
from fasttrain.measure.environment import environment, load_average, now
from fasttrain.step.compiler import Compiler, Pending
from fasttrain.step.eager import EagerEngine
from fasttrain.step.program import StepProgram
from fasttrain.step.spec import StepSpec
from fasttrain.step.state import StepState
from fasttrain.step.trace import Mismatch, TracedStep
from tests.step.models import ASKED, CASES, CPU, NUM_STEPS, OPTIMIZERS, Case, batches, make

Run = Callable[[Any], Tensor]

NUM_SEEDS = 11
"""Weights and batches of a pair; the medians count, because a single run's rounding is luck."""


def main(arguments: Sequence[str]) -> int:
    """Measures and writes the record; returns the exit code."""
    options = parse(arguments)
    started_at = environment(CPU)
    names = [(optimizer, model) for model in options.models for optimizer in options.optimizers]
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), torch.set_num_threads, (1,)) as workers:
        pairs: list[Pair] = []
        for pair in workers.map(measure, *zip(*names, strict=True)):
            log(f"{len(pairs) + 1}/{len(names)}: {pair.optimizer} with {pair.model}: {pair.ratio or pair.refused}")
            pairs.append(pair)
    record = ErrorRecord(
        command=shlex.join(["python", "-m", "tests.step.errors", *arguments]),
        created=now(),
        environment={**started_at, "load_average_after": load_average()},
        num_steps=NUM_STEPS,
        optimizers={name: described(name) for name in options.optimizers},
        pairs=tuple(pairs),
    )
    try:
        write_record(record, options.out)
    except FasttrainError as error:
        log(f"tests.step.errors: {error}")
        return 2
    log(f"written: {options.out}")
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m tests.step.errors", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="pairs measured at a time (default: 2)")
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES), help="(default: all)")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), help="(default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS / "errors-cpu.json", help="the record")
    return parser.parse_args(arguments)


def described(name: str) -> str:
    """An optimizer and its options, as one writes them."""
    kind, options = OPTIMIZERS[name]
    return f"{kind.__name__}({', '.join(f'{key}={value}' for key, value in options.items())})"


def measure(optimizer: str, model: str) -> Pair:
    """Compiles one step and measures it."""
    try:
        with closing(begin(optimizer, model)) as pending:
            pending.wait()
            return compare(optimizer, model, pending)
    except EngineError as error:
        return Pair(optimizer=optimizer, model=model, refused=str(error))


def begin(optimizer: str, model: str) -> Pending:
    """Has the program of a step made, if the cache does not have it.

    Raises:
        EngineError: the step cannot be traced as a whole.
    """
    case = CASES[model]
    [first] = batches(case, 1)
    pending = Compiler(started(case, optimizer, 0, first)).begin(first)
    assert isinstance(pending.traced, TracedStep)
    if pending.traced.why_eager is not None:
        pending.close()
        raise EngineError(pending.traced.why_eager)
    return pending


def compare(optimizer: str, model: str, pending: Pending) -> Pair:
    """Runs the program, which must be ready, and its rivals."""
    traced: Any = pending.traced
    program: Any = pending.load()
    runs = [one_run(CASES[model], optimizer, seed, traced, program) for seed in range(NUM_SEEDS)]
    eager, compiled = (gathered([run[place] for run in runs]) for place in range(2))
    return Pair(optimizer=optimizer, model=model, eager=eager, compiled=compiled)


class Error(NamedTuple):
    """Of one run; see `Errors`."""

    parameters: float
    losses: float
    farthest: str


def gathered(runs: Sequence[Error]) -> Errors:
    """Of all runs."""
    parameters, losses, farthest = zip(*runs, strict=True)
    return Errors(parameters=parameters, losses=losses, farthest=farthest)


def started(case: Case, optimizer: str, seed: int, batch: Any, dtype: torch.dtype = torch.float32) -> StepSpec:
    """A step whose optimizer has made its state."""
    spec = make(case, OPTIMIZERS[optimizer], seed=seed, dtype=dtype)
    EagerEngine(spec, ASKED).step(to(dtype, batch))
    return spec


def one_run(case: Case, optimizer: str, seed: int, traced: TracedStep, program: StepProgram) -> tuple[Error, Error]:
    """From one state and over the same batches: eager's error and the program's."""
    first, *data = batches(case, seed=seed)
    spec, exact = (started(case, optimizer, seed, first, dtype) for dtype in (torch.float32, torch.float64))
    put_state(spec, into=StepState(exact).tensors)
    put_state(spec, into=traced.tensors)
    right = losses(EagerEngine(exact, ASKED).step, [to(torch.float64, batch) for batch in data])
    eager = losses(EagerEngine(spec, ASKED).step, data)
    ours = losses(partial(by_program, traced, program), data)
    return error(spec, exact, eager, right), error(traced.spec, exact, ours, right)


@torch.no_grad()
def put_state(spec: StepSpec, into: Sequence[Tensor]) -> None:
    """Copies all that a step changes, in the other's dtype."""
    for mine, theirs in zip(StepState(spec).tensors, into, strict=True):
        theirs.copy_(mine)


def by_program(traced: TracedStep, program: StepProgram, batch: Any) -> Tensor:
    """One step by the program."""
    inputs = traced.inputs(batch)
    assert not isinstance(inputs, Mismatch), inputs.reason
    loss = program.run(inputs)
    traced.finish()
    return loss


def losses(run: Run, data: Sequence[Any]) -> list[float]:
    """Of each step; the random numbers of a step are the same in every run."""
    found: list[float] = []
    for number, batch in enumerate(data):
        torch.manual_seed(number)
        found.append(run(batch).item())
    return found


def error(spec: StepSpec, exact: StepSpec, losses: Sequence[float], right: Sequence[float]) -> Error:
    """How far a run is from the exact one."""
    pairs = zip(spec.model.named_parameters(), exact.model.parameters(), strict=True)
    off = {name: ((mine - wanted).abs().max() / wanted.abs().max()).item() for (name, mine), wanted in pairs}
    farthest = max(off, key=off.__getitem__)
    of_losses = max(abs(mine - wanted) / abs(wanted) for mine, wanted in zip(losses, right, strict=True))
    return Error(off[farthest], of_losses, farthest)


def to(dtype: torch.dtype, batch: Any) -> Any:
    """The batch with its real numbers in this dtype."""
    return tuple(each.to(dtype) if isinstance(each, Tensor) and each.is_floating_point() else each for each in batch)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
