"""A revision against itself, measured live again and again: how often `compare` calls one of two equal sides faster."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.places import REPOSITORY, RESULTS, log
from benchmarks.records import Record, Series, write_record
from fasttrain.errors import FasttrainError
from fasttrain.measure.environment import environment, load_average, now
from fasttrain.measure.verdict.revisions import find_revision
from fasttrain.workloads.job import JOBS

VERDICTS = ("FASTER", "SLOWER", "SAME", "INCONCLUSIVE")

Compared = dict[str, Any]
"""What `compare --json` prints."""


def main(arguments: Sequence[str]) -> int:
    """Measures and writes the record; returns the exit code."""
    options = parse(arguments)
    started_at = environment(torch.device("cpu"))
    found: list[Compared] = []
    ended: list[str] = []
    try:
        revision = find_revision("HEAD", REPOSITORY).commit  # one for all, whatever is committed meanwhile
        for number in range(1, options.comparisons + 1):
            found.append(compare(revision, options))
            told = "{verdict}, {speedup:.3f} {interval}, {pairs} pairs".format(**found[-1])
            log(f"comparison {number}/{options.comparisons}: {told}")
    except (FasttrainError, KeyboardInterrupt) as error:
        ended = [f"ended early: {error or 'interrupted'}"]
        log(f"benchmarks.live: {ended[0]}")
    if not found:
        return 2
    record = Record(
        benchmark="live",
        title=f"A revision against itself, {options.workload}, cpu",
        command=shlex.join(["python", "-m", "benchmarks.live", *arguments]),
        created=now(),
        environment={**started_at, "load_average_after": load_average()},
        workload={"name": options.workload, "arm": options.arm, "blocks": options.blocks},
        series=series(found),
        yardstick="speedup",
        ratios={},
        refused={},
        notes=[*notes(found, options.blocks), *ended],
    )
    path = options.out or RESULTS / f"live-{options.workload}-cpu.json"
    write_record(record, path)
    log(f"written: {path}")
    return 2 if ended else 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.live", description=__doc__)
    parser.add_argument("--workload", choices=sorted(JOBS), default="mlp")
    parser.add_argument("--arm", default="eager", help="both sides (default: eager)")
    parser.add_argument("--comparisons", type=int, default=20, help="(default: 20)")
    parser.add_argument("--blocks", type=int, default=7, help="of each comparison, at its first look (default: 7)")
    parser.add_argument("--out", type=Path, help="the record (default: benchmarks/results/live-<workload>-cpu.json)")
    options = parser.parse_args(arguments)
    if options.comparisons < 1 or options.blocks < 1:
        parser.error("every number must be 1 or more")
    return options


def compare(revision: str, options: argparse.Namespace) -> Compared:
    """One comparison of a revision with itself.

    Raises:
        FasttrainError: it gave no verdict.
    """
    sides = ["--rev", revision, revision, "--workload", options.workload, "--arm", options.arm]
    design = ["--blocks", str(options.blocks), "--device", "cpu", "--json"]
    command = [sys.executable, "-m", "fasttrain", "compare", *sides, *design]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    try:
        found: Compared = json.loads(ran.stdout)
    except ValueError:
        raise FasttrainError(f"compare ended with exit code {ran.returncode}: {ran.stderr[-500:]}") from None
    if found["verdict"] not in VERDICTS:
        raise FasttrainError(f"compare gave {found['verdict']}: {'; '.join(found['reasons'])}")
    return found


def series(found: Sequence[Compared]) -> dict[str, Series]:
    """The estimates, and the ends of their intervals."""
    lower, upper = ([each["interval"][end] for each in found] for end in (0, 1))
    given = {
        "speedup": ("time of A over that of B, which are the same code", [each["speedup"] for each in found]),
        "interval, lower end": ("of each comparison", lower),
        "interval, upper end": ("of each comparison", upper),
    }
    return {
        name: Series(description=description, unit="x", values=tuple(values))
        for name, (description, values) in given.items()
    }


def notes(found: Sequence[Compared], blocks: int) -> list[str]:
    """The verdicts, and what they were reached with."""
    counts = Counter(each["verdict"] for each in found)
    verdicts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
    extended = sum(each["pairs"] > blocks for each in found)
    margins = sorted({f"{each['margin']:.1%}" for each in found})
    return [
        f"of {len(found)} comparisons: {verdicts}",
        f"margin {', '.join(margins)}; {extended} looked a second time, at twice the blocks",
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
