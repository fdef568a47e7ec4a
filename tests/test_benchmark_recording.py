"""The record of ways to read the reviews once, the table that is made from it, and the sides themselves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import recording, tables
from benchmarks.recording import PLAIN, SIDES, RecordingRecord, Side, changed_lines, read_record
from fasttrain.errors import DataError
from fasttrain.measure.bench.record import write_record
from fasttrain.workloads.generate import generate_reviews
from fasttrain.workloads.review_job import review_job
from tests.test_benchmark_errors import ENVIRONMENT

SIDE = Side(PLAIN, 0, (6.0, 5.0, 7.0), (0.05, 0.04, 0.06), 0.0)

RECORD = RecordingRecord(
    command="python -m benchmarks.recording",
    created="2026-01-02T03:04:05+00:00",
    environment=ENVIRONMENT,
    sides=(SIDE, replace(SIDE, name="fasttrain.record", lines=1, difference=0.1)),
    refused={"MONAI CacheDataset": "monai is not installed"},
)


def test_a_record_survives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "recording.json"
    write_record(RECORD, path)
    assert read_record(path) == RECORD


def test_the_table_tells_lines_epochs_and_numbers(tmp_path: Path) -> None:
    write_record(RECORD, tmp_path / "recording.json")
    _, _, [page] = tables.read_results(tmp_path)
    assert "| plain loader | 0 | 6.0 (5.0 to 7.0) | 0.050 (0.040 to 0.060) | yes: losses within 0 |" in page
    assert "| fasttrain.record | 1 | 6.0 (5.0 to 7.0) | 0.050 (0.040 to 0.060) | no: losses within 0.1 |" in page
    assert "| MONAI CacheDataset | 2 | monai is not installed |  |  |" in page
    assert "Medians over 3 blocks" in page


def test_a_record_that_lacks_a_block_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recording.json"
    write_record(RECORD, path)
    content = json.loads(path.read_text())
    content["sides"][1]["later_s"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="as many first epochs as later ones"):
        read_record(path)


def test_lines_are_those_that_a_user_changes() -> None:
    found = {name: changed_lines(name) for name in SIDES}
    assert found.pop(PLAIN) == 0
    assert found.pop("fasttrain.record") == 1
    assert found == {
        "TensorDataset by hand": 7,
        "MONAI CacheDataset": 2,
        "Hugging Face datasets, with_format": 6,
    }


@pytest.mark.parametrize(
    ("name", "source"),
    [(PLAIN, "streamed"), ("fasttrain.record", "resident"), ("TensorDataset by hand", "resident")],
)
def test_a_side_trains_the_textbooks_numbers(name: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job: Any = review_job(torch.device("cpu"), generate_reviews(4_000).table)
    monkeypatch.setattr(recording, "load_job", lambda *_: job)
    monkeypatch.setattr(recording.fasttrain.TrainStep, "settle", lambda *_: None)
    threads = torch.get_num_threads()
    try:
        found = recording.run_side(name)
    finally:
        torch.set_num_threads(threads)
    assert found["difference"] < job.tolerance
    assert found["source"] == source


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIDES, PLAIN, "import no_such_package")
    monkeypatch.setattr(recording, "load_job", lambda *_: review_job(torch.device("cpu"), generate_reviews(400).table))
    assert recording.run_side(PLAIN) == {"refused": "no_such_package is not installed"}
