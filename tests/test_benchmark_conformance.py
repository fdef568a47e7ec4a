"""The record of torch's test modules and optimizers, and the table that is made from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables
from benchmarks.conformance import ConformanceRecord, Outcome, markdown, read_record
from fasttrain.errors import DataError
from fasttrain.measure.bench.record import write_record
from tests.test_benchmark_errors import ENVIRONMENT


def record(*outcomes: Outcome) -> ConformanceRecord:
    return ConformanceRecord(
        command="python -m tests.step.conformance --compile",
        created="2026-01-02T03:04:05+00:00",
        environment=ENVIRONMENT,
        rule="all of them",
        num_steps=4,
        num_inputs=1_813,
        num_distinct=750,
        outcomes=outcomes,
    )


SAME = Outcome(name="nn.Linear", number=0, is_module=True)
REFUSED = [
    Outcome(
        name="nn.CTCLoss",
        number=number,
        is_module=True,
        why=f"refused: it reads a | length: 'x = f(x)' in a.py:{number}",
    )
    for number in (0, 7)
]
EAGER = Outcome(name="Muon", number=1, is_module=False, why="optimizer eager: its products have factors")
DIFFERENT = Outcome(name="SGD", number=2, is_module=False, difference="1 is not 2")


def test_a_record_survives_the_file_and_is_in_the_tables(tmp_path: Path) -> None:
    path = tmp_path / "benchmarks" / "results" / "conformance-cpu.json"
    write_record(record(SAME, *REFUSED, EAGER), path)
    assert read_record(path) == record(SAME, *REFUSED, EAGER)
    assert tables.update(tmp_path, is_check=False) == [tmp_path / "benchmarks" / "README.md"]
    assert markdown(record(SAME, *REFUSED, EAGER)) in (tmp_path / "benchmarks" / "README.md").read_text()


def test_the_table_counts_and_tells_each_reason_once() -> None:
    page = markdown(record(SAME, *REFUSED, EAGER, DIFFERENT))
    assert "| inputs of modules | 3 | 1 | 0 | 2 | 0 |" in page
    assert "| settings of optimizers | 2 | 0 | 1 | 0 | 1 |" in page
    assert "- nn.CTCLoss (2): refused: it reads a \\| length\n" in page
    assert "- Muon (1): optimizer eager: its products have factors\n" in page
    assert "- DIFFERENT: SGD, 2: 1 is not 2\n" in page
    assert "3 inputs of 2 modules; torch's database has 1,813, of which 750" in page


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (["schema_version"], 2, "schema version 1"),
        (["kind"], "errors", "schema version 1"),
        (["num_inputs"], 0, "num_inputs"),
        (["outcomes", 0, "number"], -1, "number"),
        (["outcomes", 0, "is_module"], 1, "true or false"),
    ],
    ids=lambda given: str(given)[:30],
)
def test_damaged_records_are_refused(where: list[Any], value: Any, message: str, tmp_path: Path) -> None:
    content = node = json.loads(json.dumps(record(SAME).to_dict()))
    for key in where[:-1]:
        node = node[key]
    node[where[-1]] = value
    path = tmp_path / "record.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        read_record(path)
