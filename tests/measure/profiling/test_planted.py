"""Every planted fault is found, with its file and line; in clean loops nothing is."""

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest

from fasttrain import profile, record
from fasttrain.measure.places import shown
from fasttrain.measure.profiling.profiler import Profiler
from fasttrain.measure.profiling.record import Finding
from tests.measure.profiling.planted.clean import CLEAN
from tests.measure.profiling.planted.faults import FAULTS
from tests.measure.profiling.planted.parts import Parts, Rows, endless, loader


def findings(loop: Callable[[Profiler], object], out: Path) -> list[Finding]:
    with profile("planted", steps=12, out=out) as prof:
        loop(prof)
    return prof.result.findings


def planted(loop: Callable[[Profiler], object]) -> tuple[str, str, int]:
    """Kind, file and line of the fault: the line says it."""
    lines, first = inspect.getsourcelines(loop)
    [(number, line)] = [(number, line) for number, line in enumerate(lines, start=first) if "# FAULT: " in line]
    return line.partition("# FAULT: ")[2].partition("#")[0].strip(), shown(str(inspect.getsourcefile(loop))), number


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_nothing_else(name: str, tmp_path: Path) -> None:
    found = findings(FAULTS[name], tmp_path)
    assert [(each.kind, each.file, each.line) for each in found] == [planted(FAULTS[name])]


def test_there_are_enough_faults() -> None:
    assert len(FAULTS) == 27
    kinds = {planted(loop)[0] for loop in FAULTS.values()}
    assert len(kinds) == 8


@pytest.mark.parametrize(("name", "is_told"), [("slow_item", True), ("item_of_the_loss", False)])
def test_a_slow_loader_that_is_not_recorded_is_told_of_record(name: str, is_told: bool, tmp_path: Path) -> None:
    [found] = findings(FAULTS[name], tmp_path)
    assert ("give the loop fasttrain.record(loader)" in found.advice) == is_told


def recorded(prof: Profiler) -> None:
    parts = Parts()
    for x, y in endless(record(loader(Rows(parts))), prof):
        parts.train_on(x, y)


def test_a_recorded_loader_is_not_told_of_record(tmp_path: Path) -> None:
    assert all("fasttrain.record" not in each.advice for each in findings(recorded, tmp_path))


@pytest.mark.parametrize("name", CLEAN)
def test_in_a_clean_loop_nothing_is_found(name: str, tmp_path: Path) -> None:
    assert findings(CLEAN[name], tmp_path) == []
