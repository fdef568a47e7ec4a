"""The record of CPU seconds to a program, and the table that is made from it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.compiling import Case, CompilingRecord, markdown, read_record
from benchmarks.compiling_child import EXPORT, IMPORTS, PARTS, Meter, part_of
from fasttrain.errors import DataError
from fasttrain.measure.bench.record import write_record
from tests.test_benchmark_errors import ENVIRONMENT


def case(manner: str, **parts: tuple[float, ...]) -> Case:
    every = {part: parts.get(part, (0.0, 0.0, 0.0)) for part in PARTS}
    return Case(workload="mlp", manner=manner, parts=every, wall_s=(5.0, 6.0, 4.0))


RECORD = CompilingRecord(
    command="python -m benchmarks.compiling",
    created="2026-01-02T03:04:05+00:00",
    environment=ENVIRONMENT,
    cases=(case("cold", imports=(3.0, 1.0, 2.0), probes=(1.0, 1.5, 0.5)), case("warm", imports=(2.0, 2.5, 2.25))),
)


def test_a_record_survives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "compiling.json"
    write_record(RECORD, path)
    assert read_record(path) == RECORD
    _, _, [section] = tables.read_results(tmp_path)
    assert section == markdown(RECORD)


def test_the_table_has_medians_and_totals() -> None:
    page = markdown(RECORD)
    assert "| imports | 2.00 | 2.25 |" in page
    assert "| probes | 1.00 |  |" in page, "what took nothing is empty"
    assert "| in all | 2.5 (2.5 to 4.0) | 2.2 (2.0 to 2.5) |" in page
    assert "Medians over 3 repeats" in page


@pytest.mark.parametrize("lost", ["part", "repeat"])
def test_a_record_that_lacks_something_is_refused(lost: str, tmp_path: Path) -> None:
    path = tmp_path / "compiling.json"
    write_record(RECORD, path)
    content = json.loads(path.read_text())
    parts = content["cases"][0]["parts"]
    if lost == "part":
        del parts["headers"]
    else:
        parts["headers"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="mlp, cold: needs all parts, as many values each"):
        read_record(path)


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("g++ -x c++-header /kept/headers/key/header.h -O3 -o header.h.gch", "headers"),
        ("g++ /tmp/header.hpp -E -P -o header.i", "headers"),
        ("g++ /kept/c7.wrapper.cpp -O1 -c -o /kept/c7.wrapper.o", "wrapper C++"),
        ("g++ /kept/tmp1/own.cpp -O1 -c -o /kept/c7.wrapper.o", "wrapper C++"),
        ("g++ /kept/c8.kernel.cpp -O3 -c -o /kept/c8.kernel.o", "kernels C++"),
        ("g++ /kept/objects/tmp1/interface.cpp -O1 -c -o interface.o", "interface C++"),
        ("g++ /kept/c7.wrapper.o /kept/c8.kernel.o /kept/w.o -O3 -shared -o c7.so", "linking"),
        ("g++ /kept/c9.cpp -O3 -shared -fPIC -o c9.so", "probes"),
        ("python -c import sys; cdll.LoadLibrary('c9.so')", "probes"),
        ("g++ --version", "rest"),
    ],
)
def test_a_command_is_of_a_part(command: str, part: str) -> None:
    assert part_of(command) == part


METER = """
import subprocess, sys, time
from benchmarks.compiling_child import EXPORT, Meter, own_cpu_s

def work(seconds):
    end = own_cpu_s() + seconds
    while own_cpu_s() < end:
        pass

meter = Meter()
meter.start()
meter.timed(EXPORT, work)(0.2)
work(0.3)
subprocess.run([sys.executable, "-c", "sum(range(10_000_000)) # LoadLibrary"], check=True)
meter.tell(0.0)
meter.tell(0.0)
"""


def test_the_seconds_of_functions_and_commands_are_counted() -> None:
    ran = subprocess.run([sys.executable, "-c", METER], capture_output=True, text=True, check=True)
    first, second = (json.loads(line)["parts"] for line in ran.stdout.splitlines())
    assert 0.2 <= first[EXPORT] < 0.25
    assert first["lowering and code"] >= 0.3
    assert first["probes"] > 0.02
    assert 0 <= first[IMPORTS] < 1
    assert sum(second.values()) < 0.1


def test_an_import_within_an_import_is_counted_once() -> None:
    meter = Meter()
    spent: list[str] = []

    def inner() -> None:
        spent.append("inner")

    timed = meter.timed(IMPORTS, meter.timed(IMPORTS, inner))
    timed()
    assert spent == ["inner"]
