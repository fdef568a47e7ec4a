"""The record of compiled steps' errors, and the table that is made from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables
from benchmarks.errors import ErrorRecord, Errors, Pair, markdown, read_record
from fasttrain.errors import DataError
from fasttrain.measure.bench.record import write_record

ENVIRONMENT = {
    "cpu": "A CPU",
    "device": "A CPU",
    "cores": 4,
    "torch": "2.13.0",
    "python": "3.11.7",
    "fasttrain": "0.1.0",
    "commit": "0123456789abcdef",
    "load_average": 0.1,
    "load_average_after": 1.2,
}


def errors(*parameters: float, loss: float = 1e-7) -> Errors:
    num_runs = len(parameters)
    return Errors(parameters=parameters, losses=(loss,) * num_runs, farthest=("weight",) * num_runs)


def record(*pairs: Pair) -> ErrorRecord:
    return ErrorRecord(
        command="python -m tests.step.errors",
        created="2026-01-02T03:04:05+00:00",
        environment=ENVIRONMENT,
        num_steps=20,
        optimizers={"sgd": "SGD(lr=0.05)", "adam": "Adam(lr=0.01)"},
        pairs=pairs,
    )


GOOD = Pair(optimizer="sgd", model="mlp", eager=errors(1e-7, 2e-7, 9e-7), compiled=errors(3e-7, 1e-7, 1e-7))
BEYOND = Pair(optimizer="adam", model="mlp", eager=errors(1e-7), compiled=errors(3e-7, loss=2e-7))
REFUSED = Pair(optimizer="adam", model="cnn", refused="a | reason")


def test_a_ratio_is_that_of_the_medians() -> None:
    assert GOOD.ratio == (0.5, 1.0)
    assert REFUSED.ratio is None


def test_a_record_survives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "errors.json"
    write_record(record(GOOD, BEYOND, REFUSED), path)
    assert read_record(path) == record(GOOD, BEYOND, REFUSED)


def test_the_table_shows_ratios_what_is_beyond_and_what_was_refused() -> None:
    page = markdown(record(GOOD, BEYOND, REFUSED))
    assert "|  | mlp | cnn |" in page
    assert "| SGD(lr=0.05) | 0.50 |  |" in page
    assert "| Adam(lr=0.01) | 3.00 | refused |" in page
    assert "parameters: the largest ratio is 3.00 (adam with mlp)" in page
    assert "losses: the largest ratio is 2.00 (adam with mlp)" in page
    assert "1 of 2 programs are beyond 2; the median ratio is 1.75" in page
    assert "adam with mlp: 3.00; compiled 3e-07, eager 1e-07, mostly in weight; the losses' ratio is 2.00" in page
    assert "refused: adam with cnn: a \\| reason" in page
    assert "the median over 1 or 3 runs" in page


def test_the_tables_of_all_results_hold_it(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks" / "results"
    write_record(record(GOOD), folder / "errors-cpu.json")
    assert tables.update(tmp_path, is_check=False) == [tmp_path / "benchmarks" / "README.md"]
    assert markdown(record(GOOD)) in (tmp_path / "benchmarks" / "README.md").read_text()


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (["schema_version"], 2, "schema version 1"),
        (["kind"], "bench", "schema version 1"),
        (["num_steps"], 0, "num_steps"),
        (["environment", "cores"], "four", "cores"),
        (["pairs", 0, "eager", "parameters", 0], 0.0, "positive"),
        (["pairs", 0, "eager", "parameters"], [1e-7], "as many"),
        (["pairs", 0, "compiled", "losses"], [], "as many"),
        (["pairs", 0, "eager"], None, "neither errors nor a reason"),
        (["pairs", 0, "refused"], "a reason", "or both"),
        (["pairs", 0, "compiled", "farthest", 0], 3, "text"),
    ],
    ids=lambda given: str(given)[:30],
)
def test_damaged_records_are_refused(where: list[Any], value: Any, message: str, tmp_path: Path) -> None:
    content = node = json.loads(json.dumps(record(GOOD).to_dict()))
    for key in where[:-1]:
        node = node[key]
    node[where[-1]] = value
    path = tmp_path / "record.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as raised:
        read_record(path)
    assert raised.value.file == str(path)
