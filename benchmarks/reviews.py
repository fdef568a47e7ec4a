"""Samples/s of training on the review job: the textbook's loop, a hand-tuned one, and FastLoop, interleaved.

Every arm first trains the same 20 batches from the same weights; one whose running loss leaves the textbook's is not
timed. Then each repeat times every arm once, in random order, over whole passes: order of rows, gathering, steps and
the readout of loss and accuracy inside, evaluation and the first pass outside. The yardstick is the textbook at the
number of threads, one or torch's own, that is faster for it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.harness import (
    RESULTS,
    Arm,
    check_losses,
    command_line,
    environment,
    load_average,
    log,
    measure,
    now,
    with_threads,
)
from benchmarks.records import Record, Series, ratios_to, write_record
from benchmarks.review_arms import DenseArm, ReviewJob, TextbookArm, count, default_source, fast_arms
from fasttrain.device import resolve_device
from fasttrain.errors import DataError, EngineError

CHECKED_BATCHES = 20
TOLERANCE = 1e-5
ORDER_SEED = 0


@dataclass
class Prepared:
    """The arms that may be timed, those that may not with the reason, and what their preparation showed."""

    arms: list[Arm] = field(default_factory=list[Arm])
    refused: dict[str, str] = field(default_factory=dict[str, str])
    notes: list[str] = field(default_factory=list[str])


def main(arguments: Sequence[str]) -> int:
    """Measures and writes the record; returns the exit code."""
    options = parse(arguments)
    device = resolve_device(options.device)
    default_threads = torch.get_num_threads()
    started_at = environment(device)
    log("reading the table")
    job = ReviewJob.load(options.data or default_source(), device)
    textbooks = textbook_arms(job, options.threads, default_threads, options.textbook_batches)
    prepared = prepare(job, textbooks, options.threads)
    rates = measure(prepared.arms, repeats=options.repeats, min_seconds=options.seconds, seed=ORDER_SEED)
    series = {
        arm.name: Series(description=arm.description, unit="samples/s", values=tuple(rates[arm.name]))
        for arm in prepared.arms
    }
    yardstick = max((arm.name for arm in textbooks), key=lambda name: series[name].median)
    record = Record(
        benchmark="reviews",
        title=f"Training on reviews, {device.type}",
        command=command_line("benchmarks.reviews", arguments),
        created=now(),
        environment={**started_at, "load_average_after": load_average()},
        workload=job.describe(),
        series=series,
        yardstick=yardstick,
        ratios=ratios_to(series, yardstick, list(series)),
        refused=prepared.refused,
        notes=[*prepared.notes, *conditions(options)],
    )
    path = options.out or RESULTS / f"reviews-{device.type}.json"
    write_record(record, path)
    log(f"written: {path}")
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reviews", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="how often each arm is timed (default: 5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="least seconds of passes in a repeat (default: 1)")
    parser.add_argument("--textbook-batches", type=int, default=40, help="batches in the textbook's pass (default: 40)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads, of every arm but one (default: 1)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--data", type=Path, help="a .csv or .csv.gz (default: reviews_lite, else generated reviews)")
    parser.add_argument("--out", type=Path, help="the record (default: benchmarks/results/reviews-<device>.json)")
    options = parser.parse_args(arguments)
    if options.repeats < 1 or options.textbook_batches < 1 or options.threads < 1:
        parser.error("--repeats, --textbook-batches and --threads must be 1 or more")
    return options


def textbook_arms(job: ReviewJob, threads: int, default_threads: int, num_batches: int) -> list[Arm]:
    """The textbook at the pinned number of threads, and at torch's own where that is another."""
    arms: list[Arm] = [TextbookArm(job, name="textbook", threads=threads, num_batches=num_batches)]
    if default_threads != threads:
        name = f"textbook, {count(default_threads, 'thread')}"
        arms.append(TextbookArm(job, name=name, threads=default_threads, num_batches=num_batches))
    return arms


def prepare(job: ReviewJob, textbooks: Sequence[Arm], threads: int) -> Prepared:
    """Makes every arm, checks its losses against the textbook's, and runs its first pass."""
    prepared = Prepared()
    makers: dict[str, Callable[[], Arm]] = {arm.name: lambda arm=arm: arm for arm in textbooks}
    makers |= {DenseArm.name: lambda: DenseArm(job, threads=threads), **fast_arms(job, threads)}
    wanted: list[float] | None = None
    for name, make in makers.items():
        log(f"checking and warming up: {name}")
        try:
            begin = time.perf_counter()
            arm = make()
            with_threads(arm.threads)
            losses = arm.losses(CHECKED_BATCHES)
            wanted = wanted or losses
            difference = check_losses(losses, wanted, TOLERANCE)
            arm.run()
            seconds = time.perf_counter() - begin
        except (EngineError, DataError) as error:
            prepared.refused[name] = str(error)
            log(f"not timed: {name}: {error}")
            continue
        prepared.arms.append(arm)
        compiled = "" if arm.compile_s is None else f", {arm.compile_s:.1f} s of it for the first compilation"
        prepared.notes.append(
            f"{name}: losses within {difference:.1g} of the textbook's; made, checked and warmed up in {seconds:.1f} s"
            f"{compiled}, in no figure"
        )
        log(prepared.notes[-1])
    return prepared


def conditions(options: argparse.Namespace) -> list[str]:
    """What a reader of the figures has to know."""
    return [
        f"{count(options.repeats, 'repeat')}; in each, every arm once in random order, {options.seconds:g} s or more",
        f"a pass of the textbook is {options.textbook_batches} batches of an epoch, of every other arm a whole epoch",
        "order of rows, gathering, steps and the readout of loss and accuracy are inside; the first pass and "
        "evaluation are not",
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
