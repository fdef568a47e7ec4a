"""What `auto` costs beside `eager`: first step, trace, swap, jobs of several lengths, all in fresh processes.

Each repeat runs the long job with eager, with auto and an empty cache, and with auto once more over what that has left,
one after the other. The short job runs with eager and with auto over an empty cache side by side, on two cores that the
two trade all the time: one after the other, they would differ by what the cores' speed does meanwhile.

`--jobs 5 10 20 60` measures, in place of these, jobs that take eager so many seconds: eager, auto with an empty cache,
and auto with the programs of the longest job in the cache.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.children import Command, Ran, run_child, run_side_by_side
from benchmarks.places import RESULTS, log
from benchmarks.records import Record, Series, ratios_to, times_better, write_record
from fasttrain import FastLoop
from fasttrain.errors import DataError, FasttrainError
from fasttrain.measure.bench.plan import orders
from fasttrain.measure.environment import environment, load_average, now
from fasttrain.workloads.job import JOBS, load_job

ORDER_SEED = 0

EAGER, COLD, WARM = "eager", "auto, empty cache", "auto, once more"
SHORT_EAGER, SHORT_AUTO = "short job, eager", "short job, auto"
LONG, SHORT = (EAGER, COLD), (SHORT_EAGER, SHORT_AUTO)


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A training in a process of its own.

    Attributes:
        process_s: from the process's start to its end.
        fit_s: the training.
        first_step_s: from the call of `fit` to the end of its first step.
        steps_s: of each step, or of each launch of several.
        traced_at: the step that waited for the trace; None if none did.
        swapped_at: the first step that a program ran; None if none did.
        trace_s: how long steps waited for a trace or a compiler.
        engine: what ran at the end, and why.
    """

    process_s: float
    fit_s: float
    first_step_s: float
    steps_s: tuple[float, ...]
    traced_at: int | None
    swapped_at: int | None
    trace_s: float
    engine: str

    @property
    def step_s(self) -> float:
        """The median step."""
        return statistics.median(self.steps_s)


def main(arguments: Sequence[str]) -> int:
    """Measures and writes the record; returns the exit code."""
    if arguments and arguments[0] == "--child":
        return child(*arguments[1:])
    options = parse(arguments)
    try:
        measure(options, arguments)
    except FasttrainError as error:
        log(f"benchmarks.swap: {error}")
        return 2
    return 0


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Measures and writes the record."""
    started_at = environment(torch.device("cpu"))
    name, workload = options.workload, {"name": options.workload}
    if options.jobs:
        benchmark, title, found = "jobs", f"Jobs of some seconds, {name}, cpu", figures_of_jobs(run_jobs(options))
    else:
        benchmark, title = "swap", f"What auto costs, {name}, cpu"
        workload |= {"epochs": options.epochs, "epochs of the short job": options.short_epochs}
        found = figures({**run_long(options), **run_short(options)})
    record = Record(
        benchmark=benchmark,
        title=title,
        command=shlex.join(["python", "-m", "benchmarks.swap", *arguments]),
        created=now(),
        environment={**started_at, "load_average_after": load_average()},
        workload=workload,
        **found,
    )
    path = options.out or RESULTS / f"{benchmark}-{name}-cpu.json"
    write_record(record, path)
    log(f"written: {path}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.swap", description=__doc__)
    parser.add_argument("--workload", choices=sorted(JOBS), default="reviews")
    parser.add_argument("--epochs", type=int, default=600, help="of the long job (default: 600)")
    parser.add_argument("--short-epochs", type=int, default=3, help="of the short job (default: 3)")
    parser.add_argument("--repeats", type=int, default=5, help="of each long job (default: 5)")
    parser.add_argument("--short-repeats", type=int, default=20, help="of the two short jobs (default: 20)")
    parser.add_argument("--jobs", type=float, nargs="+", default=[], help="only jobs of so many seconds of eager")
    parser.add_argument("--job-repeats", type=int, default=3, help="of each of these (default: 3)")
    parser.add_argument("--out", type=Path, help="the record (default: benchmarks/results/swap-<workload>-cpu.json)")
    options = parser.parse_args(arguments)
    counts = (options.epochs, options.short_epochs, options.repeats, options.short_repeats, options.job_repeats)
    if min(*counts, *options.jobs) < 1:
        parser.error("every number must be 1 or more")
    return options


def run_long(options: argparse.Namespace) -> dict[str, list[Watched]]:
    """The long job, one after the other."""
    ran: dict[str, list[Watched]] = {EAGER: [], COLD: [], WARM: []}
    for repeat, names in enumerate(islice(orders(LONG, ORDER_SEED), options.repeats), 1):
        with tempfile.TemporaryDirectory(prefix="fasttrain-swap-") as scratch:
            for name in names:
                for each in (COLD, WARM) if name == COLD else (name,):
                    got = watched(run_child(*arguments_of(each, options), cache=Path(scratch)))
                    log(f"repeat {repeat}/{options.repeats}: {each}: {got.process_s:.1f} s, {got.engine}")
                    ran[each].append(got)
    return ran


def run_short(options: argparse.Namespace) -> dict[str, list[Watched]]:
    """The short job, side by side."""
    ran: dict[str, list[Watched]] = {name: [] for name in SHORT}
    for repeat, names in enumerate(islice(orders(SHORT, ORDER_SEED), options.short_repeats), 1):
        with tempfile.TemporaryDirectory(prefix="fasttrain-swap-") as scratch:
            commands = [Command(arguments_of(name, options), Path(scratch, name)) for name in names]
            for name, each in zip(names, run_side_by_side(commands), strict=True):
                ran[name].append(watched(each))
        took = ", ".join(f"{name} {ran[name][-1].process_s:.2f} s" for name in SHORT)
        log(f"side by side {repeat}/{options.short_repeats}: {took}")
    return ran


def run_jobs(options: argparse.Namespace) -> dict[tuple[float, str], list[tuple[Watched, Watched]]]:
    """Pairs of eager and auto, for each job (its eager seconds) and state of the cache.

    They run one after the other: side by side, `auto` would see one core, on which it compiles for long jobs only. What
    the longest job leaves in an empty cache is the full cache of all.
    """
    with tempfile.TemporaryDirectory(prefix="fasttrain-swap-") as scratch:
        first = watched(run_child(*training(options.workload, "eager", options.short_epochs), cache=Path(scratch)))
    epoch_s = first.step_s * len(first.steps_s) / options.short_epochs
    ran: dict[tuple[float, str], list[tuple[Watched, Watched]]] = {}
    for _ in range(options.job_repeats):
        with tempfile.TemporaryDirectory(prefix="fasttrain-swap-") as scratch:
            full = Path(scratch, "full")
            for place, seconds in enumerate(sorted(options.jobs, reverse=True)):
                caches = {COLD: full if place == 0 else Path(scratch, str(place)), WARM: full}
                epochs = max(1, round(seconds / epoch_s))
                eager = _unwatched(options.workload, "eager", epochs, Path(scratch, "eager"))
                for name, cache in caches.items():
                    auto = _unwatched(options.workload, "auto", epochs, cache)
                    ran.setdefault((seconds, name), []).append((eager, auto))
                    log(f"{seconds:g} s, {name}: eager {eager.fit_s:.2f} s, auto {auto.fit_s:.2f} s, {auto.engine}")
    return ran


def _unwatched(workload: str, engine: str, epochs: int, cache: Path) -> Watched:
    return watched(run_child(*training(workload, engine, epochs), UNWATCHED, cache=cache))


UNWATCHED = "unwatched"
"""Tells a child not to look after each step: to ask `auto` what it has chosen takes 2% of a small step."""


def arguments_of(name: str, options: argparse.Namespace) -> list[str]:
    """The arguments of Python for a training."""
    engine = "eager" if name in (EAGER, SHORT_EAGER) else "auto"
    return training(options.workload, engine, options.short_epochs if name in SHORT else options.epochs)


def training(workload: str, engine: str, epochs: int) -> list[str]:
    """The arguments of Python for a training."""
    return ["-m", "benchmarks.swap", "--child", workload, engine, str(epochs)]


def watched(ran: Ran) -> Watched:
    """What a child tells."""
    found = json.loads(ran.output)
    return Watched(process_s=ran.seconds, **{**found, "steps_s": tuple(found["steps_s"])})


def child(workload: str, engine: str, epochs: str, unwatched: str = "") -> int:
    """Trains and prints what it saw."""
    torch.set_num_threads(1)
    job = load_job(workload, torch.device("cpu"))
    model = job.model()
    loop = FastLoop(model, job.optimizer(model), job.forward, engine=engine)
    batches = job.batches()
    times: list[float] = [time.perf_counter()]
    traced_at: list[int] = []
    swapped_at: list[int] = []

    def watch(*_: object) -> None:
        times.append(time.perf_counter())
        if not traced_at and loop.step.compile_s:
            traced_at.append(len(times) - 2)
        if not swapped_at and loop.step.engine.value == "compiled":
            swapped_at.append(len(times) - 2)

    loop.fit(batches, epochs=int(epochs), progress=False, watch=None if unwatched else watch)
    seen = {
        "fit_s": time.perf_counter() - times[0],
        "first_step_s": times[min(1, len(times) - 1)] - times[0],
        "steps_s": [after - before for before, after in pairwise(times)],
        "traced_at": next(iter(traced_at), None),
        "swapped_at": next(iter(swapped_at), None),
        "trace_s": loop.step.compile_s or 0.0,
        "engine": f"{loop.step.engine.value}: {loop.step.engine.reason}",
    }
    print(json.dumps(seen))
    return 0


def figures(ran: dict[str, list[Watched]]) -> dict[str, Any]:
    """The record's series, ratios and notes.

    Raises:
        DataError: auto never swapped in the long job, or compiled in the short one: there is nothing to tell.
    """
    swapped = [*ran[COLD], *ran[WARM]]
    if any(each.swapped_at is None for each in swapped):
        raise DataError("auto did not end on a program in every long run: give more --epochs")
    if any(each.trace_s for each in ran[SHORT_AUTO]):
        raise DataError("auto traced in a short job: give fewer --short-epochs")

    def seconds(description: str, values: Sequence[float]) -> Series:
        return Series(description=description, unit="s", values=tuple(values))

    series = {
        "first step, eager": seconds(
            "of the short job, from the call of `fit` on", [each.first_step_s for each in ran[SHORT_EAGER]]
        ),
        "first step, auto": seconds(
            "the same, side by side, with an empty cache", [each.first_step_s for each in ran[SHORT_AUTO]]
        ),
        "trace": seconds("what `auto` stops for, once", [trace_s(each) for each in ran[COLD]]),
        "swap": seconds(
            "the longest step after the trace and before five steps of the program, cache empty and full",
            [swap_s(each) for each in swapped],
        ),
        "longest stall after the swap": seconds(
            "where several steps become one launch, or the machine has other things to do; cache empty and full",
            [stall_after_swap_s(each) for each in swapped],
        ),
        "swap after the trace, once more": seconds(
            "with the program in the cache, from the trace's end to the first step of the program",
            [swap_after_trace_s(each) for each in ran[WARM]],
        ),
        "short job, eager": seconds("the whole process", [each.process_s for each in ran[SHORT_EAGER]]),
        "short job, auto": seconds(
            "the whole process, side by side, with an empty cache", [each.process_s for each in ran[SHORT_AUTO]]
        ),
        "long job, eager": seconds("the training", [each.fit_s for each in ran[EAGER]]),
        "long job, auto": seconds("the same, with an empty cache", [each.fit_s for each in ran[COLD]]),
        "long job, auto once more": seconds(
            "the same, with the program in the cache", [each.fit_s for each in ran[WARM]]
        ),
    }
    for name in ("first step", "short job"):
        series[f"{name}, times as fast"] = times_better(series[f"{name}, auto"], series[f"{name}, eager"])
    ratios = ratios_to(series, "long job, eager", ["long job, eager", "long job, auto", "long job, auto once more"])
    step_us = 1e6 * statistics.median(each.step_s for each in ran[EAGER])
    ends = [f"{name}: {each[-1].engine}" for name, each in ran.items()]
    return {
        "series": series,
        "yardstick": "long job, eager",
        "ratios": ratios,
        "refused": {},
        "notes": [f"an eager step takes {step_us:.0f} us", *ends],
    }


def figures_of_jobs(jobs: dict[tuple[float, str], list[tuple[Watched, Watched]]]) -> dict[str, Any]:
    """The same for jobs of several lengths."""
    series: dict[str, Series] = {}
    notes: list[str] = []
    for (seconds, name), pairs in jobs.items():
        title = f"job of {seconds:g} s, {name}"
        eager = Series(description="the training, eager", unit="s", values=tuple(pair[0].fit_s for pair in pairs))
        auto = Series(description="the same, auto", unit="s", values=tuple(pair[1].fit_s for pair in pairs))
        series |= {f"{title}: eager": eager, title: auto, f"{title}, times as fast": times_better(auto, eager)}
        notes.append(f"{title}: {pairs[-1][1].engine}")
    return {"series": series, "yardstick": next(iter(series)), "ratios": {}, "refused": {}, "notes": notes}


def trace_s(watched: Watched) -> float:
    """The step in which it was traced."""
    assert watched.traced_at is not None
    return watched.steps_s[watched.traced_at]


def swap_s(watched: Watched) -> float:
    """The longest step after the trace and before five steps of the program: loading, checking and trying included."""
    assert watched.traced_at is not None
    assert watched.swapped_at is not None
    return max(watched.steps_s[watched.traced_at + 1 : watched.swapped_at + 5])


def stall_after_swap_s(watched: Watched) -> float:
    """The longest step, or launch of several, from five steps of the program on."""
    assert watched.swapped_at is not None
    return max(watched.steps_s[watched.swapped_at + 5 :])


def swap_after_trace_s(watched: Watched) -> float:
    """From the end of the step that was traced to the end of the first step of the program."""
    assert watched.traced_at is not None
    assert watched.swapped_at is not None
    return sum(watched.steps_s[watched.traced_at + 1 : watched.swapped_at + 1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
