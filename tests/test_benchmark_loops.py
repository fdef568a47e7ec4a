"""The record of public training loops, and the table that is made from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables
from benchmarks.loops import Loop, LoopsRecord, markdown, read_record
from fasttrain.errors import DataError
from fasttrain.measure.bench.record import write_record
from tests.test_benchmark_errors import ENVIRONMENT

COMPILED = Loop(
    name="tiny_bert",
    engine="compiled",
    reason=None,
    loss_difference=3e-16,
    plain_step_s=(4e-4, 6e-4, 5e-4),
    step_s=(2e-4, 2e-4, 1e-4),
)
EAGER = Loop(
    name="lbfgs", engine="eager", reason="a | reason", loss_difference=0.0, plain_step_s=(4e-3,), step_s=(5e-3,)
)


def record(*loops: Loop) -> LoopsRecord:
    return LoopsRecord(
        command="python -m tests.public_loops_speed",
        created="2026-01-02T03:04:05+00:00",
        environment=ENVIRONMENT,
        rows=8,
        turn_s=0.1,
        loops=loops,
    )


def test_a_record_survives_the_file_and_is_in_the_tables(tmp_path: Path) -> None:
    path = tmp_path / "benchmarks" / "results" / "public-loops-cpu.json"
    write_record(record(COMPILED, EAGER), path)
    assert read_record(path) == record(COMPILED, EAGER)
    assert tables.update(tmp_path, is_check=False) == [tmp_path / "benchmarks" / "README.md"]
    assert markdown(record(COMPILED, EAGER)) in (tmp_path / "benchmarks" / "README.md").read_text()


def test_the_table_shows_the_ratio_of_the_medians_and_the_range_of_the_pairs() -> None:
    page = markdown(record(COMPILED, EAGER))
    assert "| tiny bert | compiled | 3e-16 | 500 | 2.50x (2.00 to 5.00) | 3 |" in page
    assert "| lbfgs | eager | 0 | 4,000 | 0.800x (0.800 to 0.800) | 1 |" in page
    assert "- lbfgs: a \\| reason\n" in page


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (["schema_version"], 2, "schema version 1"),
        (["kind"], "errors", "schema version 1"),
        (["rows"], 0, "rows"),
        (["loops", 0, "step_s"], [1e-4], "pairs"),
        (["loops", 0, "step_s", 0], 0.0, "positive"),
        (["loops", 0, "reason"], "a reason", "or neither"),
    ],
    ids=lambda given: str(given)[:30],
)
def test_damaged_records_are_refused(where: list[Any], value: Any, message: str, tmp_path: Path) -> None:
    content = node = json.loads(json.dumps(record(COMPILED).to_dict()))
    for key in where[:-1]:
        node = node[key]
    node[where[-1]] = value
    path = tmp_path / "record.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        read_record(path)
