"""Processes that benchmarks start: what they took, how they fail, and that two of them share the cores evenly."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import children
from benchmarks.children import Command, peak_mb, run_child, run_side_by_side
from fasttrain import DataError, FasttrainError

needs_cores = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two cores"
)

BUSY = """
import sys, time
end, seen = time.perf_counter() + float(sys.argv[1]), set()
while time.perf_counter() < end:
    with open("/proc/self/stat") as file:
        seen.add(int(file.read().rsplit(")", 1)[1].split()[36]))
print(*seen)
"""
"""Keeps a core busy for so many seconds, and prints which cores it was on."""


def test_a_failed_command_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FasttrainError, match=r"exited with 1.*(?s:.*)no table"):
        run_child("-c", "raise SystemExit('no table')", cache=tmp_path)


@needs_cores
def test_two_processes_run_at_once_and_trade_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "peak_mb", lambda _: 1.0)  # which hides behind the tests' own
    first, second = run_side_by_side([Command(["-c", BUSY, seconds], tmp_path) for seconds in ("0.5", "1.5")])
    traded = set(sorted(os.sched_getaffinity(0))[-2:])  # they may have begun on another one
    assert all(traded <= set(map(int, each.output.split())) for each in (first, second))
    assert 0.5 < first.seconds < second.seconds
    assert second.seconds > 1.5


@needs_cores
def test_one_of_two_that_fails_ends_the_other(tmp_path: Path) -> None:
    commands = [Command(["-c", BUSY, "60"], tmp_path), Command(["-c", "raise SystemExit('no table')"], tmp_path)]
    for order in (commands, commands[::-1]):
        with pytest.raises(FasttrainError, match="no table"):
            run_side_by_side(order)


def test_side_by_side_needs_two_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    with pytest.raises(FasttrainError, match="to be had: 1"):
        run_side_by_side([Command(["-c", ""], tmp_path)] * 2)


def test_peak_memory_below_the_parents_is_not_believed() -> None:
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    usage: Any = SimpleNamespace(ru_maxrss=2 * own)
    unit = 1 if sys.platform == "darwin" else 1024
    assert peak_mb(usage) == pytest.approx(2 * own * unit / 1e6)
    with pytest.raises(DataError, match="hides"):
        peak_mb(SimpleNamespace(ru_maxrss=own))  # pyright: ignore[reportArgumentType]
