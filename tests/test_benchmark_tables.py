"""Records of measurements and the tables that are made from them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import tables
from benchmarks.records import Record, Series, ratios_to, read_record, write_record
from fasttrain import DataError
from fasttrain.measure.bench import record as bench
from fasttrain.measure.bench.record import BenchRecord
from tests.measure.bench import bench_fakes

REPOSITORY = Path(__file__).parent.parent
RESULTS = sorted((REPOSITORY / "benchmarks" / "results").glob("*.json"))

figures = st.floats(1e-6, 1e12)


def small_record(*, rates: tuple[float, ...] = (4_000.0, 5_000.0), **changes: Any) -> Record:
    series = {
        "textbook": Series(description="the book's loop", unit="samples/s", values=(100.0, 50.0)),
        "fast": Series(description="a | loop <b>", unit="samples/s", values=rates),
        "peak": Series(description="memory", unit="MB", values=(612.0,)),
    }
    environment = {
        "cpu": "A CPU",
        "device": "A CPU",
        "cores": 4,
        "torch": "2.13.0",
        "python": "3.11.7",
        "fasttrain": "0.1.0",
        "commit": "0123456789abcdef",
        "has_uncommitted_changes": False,
        "load_average": 0.1,
        "load_average_after": 1.2,
    }
    fields: dict[str, Any] = {
        "benchmark": "commands",
        "title": "Commands, cpu",
        "command": "python -m benchmarks.commands",
        "created": "2026-01-02T03:04:05+00:00",
        "environment": environment,
        "workload": {"train_rows": 39_200},
        "series": series,
        "yardstick": "textbook",
        "ratios": ratios_to(series, "textbook", ["textbook", "fast"]),
        "refused": {"compiled": "no compiler"},
        "notes": ["a note"],
    }
    return Record(**{**fields, **changes})


@given(values=st.lists(st.tuples(figures, figures), min_size=1, max_size=9), unit=st.sampled_from(["s", "samples/s"]))
@settings(deadline=None)
def test_records_survive_the_file(
    values: list[tuple[float, float]], unit: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ours, theirs = zip(*values, strict=True)
    series = {
        "a": Series(description="ours", unit=unit, values=ours),
        "b": Series(description="theirs", unit=unit, values=theirs),
    }
    ratios = ratios_to(series, "b", ["a"])
    record = small_record(series=series, yardstick="b", ratios=ratios)
    path = tmp_path_factory.getbasetemp() / "record.json"
    write_record(record, path)
    assert read_record(path) == record
    is_better = ours[0] < theirs[0] if unit == "s" else ours[0] > theirs[0]
    assert (ratios["a"].values[0] > 1) == is_better


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (["schema_version"], 2, "schema version 1"),
        (["series"], [], "'series' must be a dict"),
        (["series", "fast", "values", 0], 10**400, "finite"),
        (["series", "fast", "values", 0], "4000", "finite"),
        (["series", "fast", "values", 0], True, "finite"),
        (["series", "fast", "values", 0], -1.0, "finite"),
        (["series", "fast", "values"], [], "finite"),
        (["series", "fast", "median"], 4_600.0, "does not belong"),
        (["ratios", "fast", "values", 0], 41.0, "does not belong|do not follow"),
        (["ratios", "peak"], {"description": "", "unit": "x", "values": [1.0]}, "does not belong"),
        (["yardstick"], "nobody", "none of the series"),
        (["environment", "cores"], "four", "'cores'"),
        (["workload", "train_rows"], float("inf"), "not finite"),
        (["notes", 0], 3, "must be text"),
    ],
    ids=lambda given: str(given)[:30],
)
def test_damaged_records_are_refused(where: list[Any], value: Any, message: str, tmp_path: Path) -> None:
    content = node = json.loads(json.dumps(small_record().to_dict()))
    for key in where[:-1]:
        node = node[key]
    node[where[-1]] = value
    path = tmp_path / "record.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as raised:
        read_record(path)
    assert raised.value.file == str(path)


def repository(folder: Path, *records: Record | BenchRecord, front: str | None = None) -> Path:
    (folder / "benchmarks").mkdir(parents=True)
    for number, record in enumerate(records):
        path = folder / "benchmarks" / "results" / f"{number}.json"
        if isinstance(record, BenchRecord):
            bench.write_record(record, path)
        else:
            write_record(record, path)
    if front is not None:
        (folder / "README.md").write_text(front)
    return folder


FRONT = f"# A title\n\nbefore\n{tables.BEGIN}\nold\n{tables.END}\nafter\n"


def test_tables_are_written_and_then_up_to_date(tmp_path: Path) -> None:
    root = repository(tmp_path / "r", small_record(), front=FRONT)
    stale = [root / "benchmarks" / "README.md", root / "README.md"]
    assert tables.update(root, is_check=True) == stale
    assert (root / "README.md").read_text() == FRONT
    assert tables.update(root, is_check=False) == stale
    assert tables.update(root, is_check=True) == []
    front = (root / "README.md").read_text()
    assert front.startswith("# A title\n\nbefore\n")
    assert front.endswith(f"{tables.END}\nafter\n")
    page = (root / "benchmarks" / "README.md").read_text()
    assert "| fast | 4,500 samples/s (4,000 to 5,000) | 70.0x (40.0 to 100) | 2 | a \\| loop &lt;b> |" in page
    assert "| peak | 612 MB |  | 1 | memory |" in page
    assert "A CPU, 4 cores; torch 2.13.0" in page
    assert "No results are recorded yet." in front  # of trainings

    record = small_record(notes=["another note"])
    write_record(record, root / "benchmarks" / "results" / "0.json")
    assert tables.update(root, is_check=True) == stale[:1]  # the top README shows no notes


def training(name: str, **step_s: tuple[float, ...]) -> BenchRecord:
    arms = {label.replace("_", "-"): bench_fakes.arm(*seconds) for label, seconds in step_s.items()}
    return bench_fakes.record(arms, workload={"name": name})


def test_the_top_table_has_a_row_for_each_training(tmp_path: Path) -> None:
    first = training("mlp", textbook=(8e-3, 8e-3), eager=(1e-3, 1e-3), compiled=(1e-3, 2e-3), mine=(1.0, 1.0))
    arms = {"textbook": (8e-3,), "tuned": (4e-3,), "jax_scan": (2e-3,), "jax_step": (1e-3,), "eager": (3e-3,)}
    second = training("reviews", **arms, auto=(2e-3,), drop_in=(4e-3,))
    recorded = training("cnn", textbook=(8e-3,), drop_in=(4e-3,), auto=(1e-3,), record=(2e-3,))
    many = replace(second, design=replace(second.design, threads=4))
    peers_alone = training("chars", textbook=(8e-3,), jax_step=(1e-3,))
    root = repository(tmp_path / "r", first, many, second, recorded, peers_alone, front=FRONT)
    tables.update(root, is_check=False)
    front = (root / "README.md").read_text()
    rows = [line for line in front.splitlines() if line.startswith("|")]
    assert rows == [
        "| job | arm | samples/s | times textbook | times tuned | times JAX |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        "| reviews, cpu | auto | 64,000 | 4.00x | 2.00x | 0.500x |",
        "| reviews, cpu | drop-in | 32,000 | 2.00x | 1.00x | 0.250x |",
        "| reviews, cpu, 4 threads | auto | 64,000 | 4.00x | 2.00x | 0.500x |",
        "| reviews, cpu, 4 threads | drop-in | 32,000 | 2.00x | 1.00x | 0.250x |",
        "| mlp, cpu | compiled | 96,000 | 6.00x (4.00 to 8.00) |  |  |",
        "| cnn, cpu | record | 64,000 | 4.00x |  |  |",
        "| cnn, cpu | auto | 128,000 | 8.00x |  |  |",
        "| cnn, cpu | drop-in | 32,000 | 2.00x |  |  |",
    ]
    measured = {
        "reviews, cpu": 1,
        "reviews, cpu, 4 threads": 1,
        "mlp, cpu": 2,
        "cnn, cpu": 1,
        "chars, cpu": 1,
    }  # 2 were planned
    told = "; ".join(f"{job}: {num} blocks, commit 0123456789, 2026-01-02" for job, num in measured.items())
    assert f"- A CPU, 4 cores; torch 2.13.0, Python 3.11.7: {told}.\n" in front
    page = (root / "benchmarks" / "README.md").read_text()
    assert "| arm | samples/s | us a step | times textbook | times tuned | times jax-step | blocks |" in page
    assert "| mine |" in page
    assert "## Training: reviews, cpu, 4 threads\n" in page


def test_the_top_table_tells_of_blocks_that_were_measured() -> None:
    found = training("mlp", textbook=(8e-3,) * 20, eager=(1e-3,) * 13)
    found = replace(found, design=replace(found.design, blocks=15, extended=True))
    assert tables.measured(found).startswith("20 blocks, ")


def test_a_record_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        write_record(small_record(), tmp_path / "file" / "record.json")


def test_records_of_other_things_keep_their_own_table(tmp_path: Path) -> None:
    series = {"whole command": Series(description="all of it", unit="s", values=(2.0,))}
    ratios = ratios_to(series, "whole command", ["whole command"])
    record = small_record(series=series, yardstick="whole command", ratios=ratios)
    root = repository(tmp_path / "r", record, front=FRONT)
    tables.update(root, is_check=False)
    assert "| whole command | 2.00 s | 1.00x | 1 |" in (root / "benchmarks" / "README.md").read_text()


def test_tables_do_without_a_top_readme_and_without_records(tmp_path: Path) -> None:
    root = repository(tmp_path / "r")
    assert tables.update(root, is_check=False) == [root / "benchmarks" / "README.md"]
    assert "No results are recorded yet." in (root / "benchmarks" / "README.md").read_text()
    assert not (root / "README.md").exists()


@pytest.mark.parametrize(
    "front", ["", tables.BEGIN, tables.END, f"{tables.END}\n{tables.BEGIN}\n", FRONT + FRONT], ids=repr
)
def test_a_top_readme_without_its_block_is_an_error(front: str, tmp_path: Path) -> None:
    root = repository(tmp_path / "r", small_record(), front=front)
    with pytest.raises(DataError, match="once each"):
        tables.update(root, is_check=False)
    assert (root / "README.md").read_text() == front


@pytest.mark.skipif(not RESULTS, reason="no results are committed yet")
def test_the_committed_tables_are_up_to_date() -> None:
    assert tables.update(REPOSITORY, is_check=True) == [], "run python -m benchmarks.tables"


def test_the_committed_records_are_whole() -> None:
    assert sum(map(len, tables.read_results(REPOSITORY / "benchmarks" / "results"))) == len(RESULTS)
