"""Writes the tables of benchmarks/README.md and of the top README.md from benchmarks/results/*.json."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import compiling, conformance, errors, fuzz, loops, recording
from benchmarks.places import REPOSITORY, log
from benchmarks.records import Record, Series, read_record
from fasttrain.errors import DataError, FasttrainError
from fasttrain.measure.bench import record as bench
from fasttrain.measure.bench.record import BenchRecord
from fasttrain.measure.bench.summary import (
    command,
    commit_of,
    conditions_of,
    fastest,
    machine_of,
    markdown,
    num_blocks,
    number,
    ranged,
    summarise,
    table,
    text,
)
from fasttrain.measure.files import write_text
from fasttrain.measure.strict import read_json
from fasttrain.workloads.job import JOBS

BEGIN = "<!-- benchmarks:begin -->"
END = "<!-- benchmarks:end -->"

MAIN_ARMS = ("auto", "graphed", "compiled", "eager")
"""The first of them that was measured is shown in the top README: what `resident` data give."""

RECORD, DROP_IN = "record", "drop-in"
"""Shown before and after it: what a user gets who keeps the DataLoader, with and without `record`."""

WORKLOADS = tuple(JOBS)
"""In the order of the tables; others follow."""

INTRODUCTION = """\
# Benchmarks

This file is written by `python -m benchmarks.tables` from the records in `results/`; a test checks that it is up to
date. Measure on a machine that does nothing else.

- `pytest benchmarks/`: the quick suite: loops and parts, a few rounds each, ratios at the end. It writes nothing unless
  asked (`--benchmark-json FILE`).
- `python -m fasttrain bench --workload reviews --peers --out benchmarks/results/reviews-cpu.json`: arms of a workload
  (`reviews`, `mlp`, `cnn`, `chars`) against each other, and peers (`peers/`), where they are installed:
  `pip install '.[peers]'`.
- `python -m benchmarks.commands`: whole commands in fresh processes, their time and memory, and the speed of text;
  writes `results/commands-cpu.json`.
- `python -m benchmarks.swap`: what `auto` costs beside `eager` (first step, trace, swap, a short and a long job);
  writes `results/swap-reviews-cpu.json`. With `--jobs 5 10 20 60`, jobs that take eager so many seconds.
- `python -m benchmarks.compiling`: CPU seconds until there is a program, by part (imports, export, C++), with an empty
  cache and with what earlier programs have left; writes `results/compiling-cpu.json`.
- `python -m benchmarks.recording`: ways to read the reviews once (`record`, converted by hand, MONAI's and Hugging
  Face's datasets where they are installed), by lines, first and later epochs; writes
  `results/recording-reviews-cpu.json`.
- `python -m fasttrain bench --aa eager --workload mlp --out benchmarks/results/noise/mlp-cpu.json`: an arm against
  itself, the blocks on which a test tries the verdicts.
- `python -m benchmarks.live`: 20 comparisons of the newest commit with itself; writes `results/live-mlp-cpu.json`.
- `python -m tests.step.errors`: how far compiled steps are from exact ones, beside eager steps; writes
  `results/errors-cpu.json`.
- `python -m tests.step.conformance --compile`: torch's own test modules and optimizers, compiled, against plain
  PyTorch; writes `results/conformance-cpu.json`.
- `python -m tests.public_loops_speed`: training loops as books and public repositories have them, compiled, against
  plain PyTorch; writes `results/public-loops-cpu.json`.
- `python -m tests.step.fuzzing record 5000 100 benchmarks/results/fuzz-cpu.json`: random training jobs, by FastLoop and
  by a plain loop.
- `python -m benchmarks.gpu`: checks and measures fasttrain on a machine with one CUDA GPU in two calls of 6 and 4
  minutes. `python -m benchmarks.gpu pack` first puts data and wheels into `.data/` and `.whl/`, which travel with the
  checkout; then, on that machine, `python -m benchmarks.gpu --call 1 --out OUT`, and after its results were read
  `python -m benchmarks.gpu --call 2 --out OUT2 --archive OUT`. Each result is one line of `OUT/results.jsonl`, written
  at once. `python -m benchmarks.gpu --help` says more; `--device cpu` rehearses it without a GPU.
- `python -m benchmarks.tables`: writes this file and the table in the top README; with `--check` it writes nothing and
  exits with 1 if they are not up to date.

`bench` measures in blocks: in each, every arm has a fresh process that imports, checks the losses of its first 20 steps
against the textbook's loop (scikit-learn, another algorithm, has none that could be) and warms up. When all are ready
they take turns, 50 ms each, in random order in each round, all but one asleep; a median polish over the rounds takes
out what the machine's speed did in the meantime. Order of rows, gathering, steps and the readout of loss and accuracy
are inside; evaluation is not. It is a median: what an arm does in fewer than half of its turns does not show, and is
noted where an arm's steps took 10% longer in all than the others' did. An arm whose single call takes longer has longer
turns, on which short disturbances weigh more. The arm `record` is timed from its second epoch on; the seconds of its
first, which reads and records the rows, stand in the line below the table that says what it is.

An arm is flagged where more work than cores was there before the rounds (load), where its process had to wait for a
core (waited) or used one in the others' turns (awake), where memory came back from the disk (swapped), or where CPU or
GPU were slowed down (throttled); the rounds of such a block are repeated, up to two times.

All processes of a benchmark share one cache of compiled programs, empty at first (with `--keep-cache` the user's own,
which is kept; the record notes it): "compile" is what an arm's first
process waited (another engine may have filled the cache by then), and the median of the later ones. Peak memory is the
process's on the CPU, with the job's data, and that of torch's allocator on CUDA. All processes of a block are there at
once: with every peer that takes 7 GB.

Figures are medians over the blocks, with the range from smallest to largest. A ratio is formed within each block, and
the median and the range of those are shown; above 1 is faster. Every arm has one thread, or as many as the heading
says. Where the textbook was measured with torch's own number too, "times textbook" is the faster one; "times jax" is
the faster of JAX's arms.
"""

NO_RECORDS = "\nNo results are recorded yet.\n"

KINDS = {module.KIND: module for module in (recording, compiling, errors, conformance, loops, fuzz)}
"""Records with a table of their own, by kind."""

Found = tuple[list[BenchRecord], list[Record], list[str]]


def main(arguments: Sequence[str]) -> int:
    """Writes or checks the files; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is not up to date")
    options = parser.parse_args(arguments)
    try:
        stale = update(REPOSITORY, is_check=options.check)
    except FasttrainError as error:
        log(f"benchmarks.tables: {error}")
        return 2
    for path in stale:
        log(f"{'not up to date' if options.check else 'written'}: {path}")
    return 1 if options.check and stale else 0


def update(root: Path, *, is_check: bool) -> list[Path]:
    """Brings both README files up to date with the records under `root`/benchmarks/results.

    The top README may be missing.

    Args:
        root: the repository.
        is_check: write nothing.

    Returns:
        The files that were not up to date.

    Raises:
        DataError: a record is damaged, or the top README has no block for the table.
    """
    folder = root / "benchmarks"
    found = read_results(folder / "results")
    wanted = {folder / "README.md": benchmarks_page(found)}
    front = root / "README.md"
    if front.is_file():
        wanted[front] = with_block(front.read_text(encoding="utf-8"), headline(found), str(front))
    stale = [path for path, page in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != page]
    if not is_check:
        for path in stale:
            write_text(path, wanted[path], "the page")
    return stale


def read_results(folder: Path) -> Found:
    """Records of `bench` in the order of their workloads, those of other measurements, and the sections of `KINDS`.

    Raises:
        DataError: a file is none of these.
    """
    trainings: list[BenchRecord] = []
    others: list[Record] = []
    sections: list[str] = []
    for path in sorted(folder.glob("*.json")):
        content = read_json(path)
        kind = content.get("kind") if isinstance(content, dict) else None
        if kind == "bench":
            trainings.append(bench.read_record(path))
        elif kind in KINDS:
            sections.append(KINDS[kind].section_of(path))
        else:
            others.append(read_record(path))
    return sorted(trainings, key=place), others, sections


def place(record: BenchRecord) -> tuple[int, str, int]:
    """Where a training comes in the tables."""
    name = record.workload["name"]
    return WORKLOADS.index(name) if name in WORKLOADS else len(WORKLOADS), where(record), record.design.threads


def where(record: BenchRecord) -> str:
    """The device, and the threads if there were several."""
    found, threads = record.environment, record.design.threads
    device = "cpu" if found["device"] == found["cpu"] else "cuda"
    return device + (f", {threads} threads" if threads > 1 else "")


def benchmarks_page(found: Found) -> str:
    """The whole of benchmarks/README.md."""
    trainings, others, of_kinds = found
    sections = [
        *(f"\n{markdown(each, f'Training: {job(each)}')}" for each in trainings),
        *(section(each) for each in others),
        *(f"\n{each}" for each in of_kinds),
    ]
    return INTRODUCTION + ("".join(sections) or NO_RECORDS)


def headline(found: Found) -> str:
    """The table of the top README: up to three rows each training, and under what they were measured."""
    trainings, _, _ = found
    if not trainings:
        return NO_RECORDS.lstrip()
    columns = ["job", "arm", "samples/s", "times textbook", "times tuned", "times JAX"]
    rows = [row for record in trainings for row in main_rows(record)]
    machines: dict[str, list[str]] = {}
    for record in trainings:
        machines.setdefault(machine_of(record.environment), []).append(f"{job(record)}: {text(measured(record))}")
    conditions = "".join(f"- {text(machine)}: {'; '.join(told)}.\n" for machine, told in machines.items())
    return f"{table(columns, rows, num_left=2)}\n{conditions}"


def main_rows(record: BenchRecord) -> list[list[str]]:
    """Of a training: `RECORD`, the main arm and `DROP_IN`, where they were measured; ranges stand behind the ratios."""
    arms = {arm.label: arm for arm in summarise(record)}
    main = next((label for label in MAIN_ARMS if label in arms), DROP_IN)
    others = [fastest(record, kind) for kind in ("textbook", "tuned", "jax")]
    rows: list[list[str]] = []
    for label in dict.fromkeys([RECORD, main, DROP_IN]):
        if label in arms:
            ratios = [None if other is None else arms[label].ratios.get(other) for other in others]
            cells = ["" if ratio is None else ranged(ratio, "x") for ratio in ratios]
            rows.append([job(record), label, number(arms[label].rate.median), *cells])
    return rows


def job(record: BenchRecord) -> str:
    """What was trained, and where."""
    return text(f"{record.workload['name']}, {where(record)}")


def measured(record: BenchRecord) -> str:
    """How much was measured of a training, of which code and when."""
    return f"{num_blocks(record)} blocks, {commit_of(record.environment)}, {record.created[:10]}"


# Of other records, such as that of whole commands.


def section(record: Record) -> str:
    """A record with all that was noted."""
    workload = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in record.workload.items())
    notes = "".join(f"- {text(note)}\n" for note in record.notes)
    columns = [*header(record), "what it is"]
    rows = [[*figures(record, name), text(series.description)] for name, series in record.series.items()]
    return (
        f"\n## {text(record.title)}\n\n{table(columns, rows)}\n{described(record)}\n\n"
        f"- workload: {text(workload)}\n{notes}\nMeasured by {command(record.command)}.\n"
    )


def with_block(page: str, block: str, name: str) -> str:
    """The page with the text between the two marks replaced.

    Raises:
        DataError: the marks are not there, once each and in order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise DataError(f"must hold {BEGIN} and, after it, {END}, once each", file=name)
    return f"{before}{BEGIN}\n{block}{END}{after}"


def header(record: Record) -> list[str]:
    """Of the columns that `figures` fills."""
    return ["", "median (range)", f"times {text(record.yardstick)} (range)", "n"]


def figures(record: Record, name: str) -> list[str]:
    """Cells of a series: its name, its figure, its ratio to the yardstick (empty where it has none), its repeats."""
    series, ratio = record.series[name], record.ratios.get(name)
    return [text(name), figure(series), "" if ratio is None else figure(ratio), str(len(series.values))]


def figure(series: Series) -> str:
    """Median, unit and range."""
    low, high = min(series.values), max(series.values)
    spread = "" if len(series.values) == 1 else f" ({number(low)} to {number(high)})"
    return f"{number(series.median)}{'x' if series.unit == 'x' else ' ' + text(series.unit)}{spread}"


def described(record: Record) -> str:
    """One line: where and when the figures of a record come from."""
    return f"{text(conditions_of(record.environment, record.created))}."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
