"""Writes the tables of benchmarks/README.md and of the top README.md from benchmarks/results/*.json."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import REPOSITORY, log
from benchmarks.records import Record, Series, read_record, times_better
from fasttrain.errors import DataError, FasttrainError

BEGIN = "<!-- benchmarks:begin -->"
END = "<!-- benchmarks:end -->"

MAIN_ARMS = ("tuned by hand", "eager", "compiled", "auto", "jax", "native")
"""Arms that the top README shows, beside the yardstick."""

ALSO_COMPARED = ("tuned by hand", "jax")
"""Arms that the others are compared with too, in benchmarks/README.md, where a record has them."""

INTRODUCTION = """\
# Benchmarks

This file is written by `python -m benchmarks.tables` from the records in `results/`; a test checks that it is up to
date. Measure on a machine that does nothing else.

- `pytest benchmarks/`: the quick suite: loops and parts, a few rounds each, ratios at the end. It writes nothing unless
  asked (`--benchmark-json FILE`).
- `python -m benchmarks.reviews`: training on reviews, samples/s of every arm, interleaved; writes
  `results/reviews-<device>.json`.
- `python -m benchmarks.mlp`: the same for a small network; writes `results/mlp-<device>.json`.
- `python -m benchmarks.commands`: whole commands in fresh processes, their time and memory, and the speed of text;
  writes `results/commands-cpu.json`.
- `python -m benchmarks.tables`: writes this file and the table in the top README; with `--check` it writes nothing and
  exits with 1 if they are not up to date.

Figures are medians over the repeats, with the range from smallest to largest. A ratio is formed within each repeat, and
the median and the range of those are shown; above 1 is better than the yardstick, whose own ratio is 1. An arm whose
losses leave the textbook's is not timed. Peers (`peers/`) take part where they are installed: `pip install '.[peers]'`.
"""

NO_RECORDS = "\nNo results are recorded yet.\n"


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
    found = [read_record(path) for path in (folder / "results").glob("*.json")]
    records = sorted(found, key=lambda record: (not is_training(record), record.benchmark != "reviews", record.title))
    wanted = {folder / "README.md": benchmarks_page(records)}
    front = root / "README.md"
    if front.is_file():
        wanted[front] = with_block(front.read_text(encoding="utf-8"), headline(records), str(front))
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if not is_check:
        for path in stale:
            path.write_text(wanted[path], encoding="utf-8")
    return stale


def benchmarks_page(records: Sequence[Record]) -> str:
    """The whole of benchmarks/README.md."""
    return INTRODUCTION + ("".join(section(record) for record in records) or NO_RECORDS)


def section(record: Record) -> str:
    """A record with all that was noted."""
    workload = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in record.workload.items())
    refused = [f"not timed: {name}: {reason}" for name, reason in record.refused.items()]
    notes = "".join(f"- {text(note)}\n" for note in [*record.notes, *refused])
    others = [name for name in ALSO_COMPARED if name in record.ratios]
    columns = [*header(record), *[f"times {text(name)}" for name in others], "what it is"]
    rows = [
        [*figures(record, name), *[against(record, name, other) for other in others], text(series.description)]
        for name, series in record.series.items()
    ]
    return (
        f"\n## {text(record.title)}\n\n{table(columns, rows)}\n{conditions(record)}\n\n"
        f"- workload: {text(workload)}\n{notes}\nMeasured by {command(record)}\n"
    )


def headline(records: Sequence[Record]) -> str:
    """The tables of the top README: one of all trainings, and one of each other record."""
    trainings = [record for record in records if is_training(record)]
    parts = [summary(trainings)] if trainings else []
    for record in records:
        if not is_training(record):
            rows = [figures(record, name) for name in record.series]
            parts.append(f"**{text(record.title)}**\n\n{table(header(record), rows)}\n{origin(record)}")
    return "\n".join(parts) or NO_RECORDS.lstrip()


def is_training(record: Record) -> bool:
    """True for a record of arms that train, whose yardstick is the textbook's loop."""
    return record.series[record.yardstick].unit == "samples/s"


def summary(records: Sequence[Record]) -> str:
    """A row a training: samples/s of the main arms, and how many times the yardstick's that is."""
    arms = [arm for arm in MAIN_ARMS if any(arm in record.series for record in records)]
    rows = [
        [text(record.title), number(record.series[record.yardstick].median), *[rate(record, arm) for arm in arms]]
        for record in records
    ]
    sources = "\n".join(f"- {text(record.title)}: {origin(record)}" for record in records)
    return f"{table(['samples/s (times the textbook)', 'textbook', *map(text, arms)], rows)}\n{sources}"


def rate(record: Record, name: str) -> str:
    """Samples/s of an arm and its ratio to the yardstick; empty where it was not timed."""
    series, ratio = record.series.get(name), record.ratios.get(name)
    return "" if series is None or ratio is None else f"{number(series.median)} ({number(ratio.median)}x)"


def origin(record: Record) -> str:
    """One line: under what a record was measured, and by which command."""
    return f"{conditions(record)} Measured by {command(record)}\n"


def against(record: Record, name: str, other: str) -> str:
    """The median ratio of a series to another one; empty where it has none to the yardstick."""
    if name not in record.ratios:
        return ""
    return f"{number(times_better(record.series[name], record.series[other]).median)}x"


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


def number(value: float) -> str:
    """Three significant digits, thousands set apart, no exponent."""
    digits = 0
    while abs(value) * 10**digits < 99.95 and digits < 9:
        digits += 1
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.{digits}f}"


def conditions(record: Record) -> str:
    """One line: where and when the figures of a record come from."""
    found = record.environment
    commit = found.get("commit")
    built = "no commit" if commit is None else f"commit {commit[:10]}"
    changed = " with uncommitted changes" if found.get("has_uncommitted_changes") else ""
    machine = found["device"] if found["device"] == found["cpu"] else f"{found['device']}, {found['cpu']}"
    return text(
        f"{machine}, {found['cores']} cores; torch {found['torch']}, Python {found['python']}, fasttrain "
        f"{found['fasttrain']}, {built}{changed}; {record.created[:10]}; load average "
        f"{found['load_average']} before, {found['load_average_after']} after."
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all but words, in the first column and under "what it is", to the right."""
    rule = ["---" if number == 0 or column == "what it is" else "---:" for number, column in enumerate(columns)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [columns, rule, *rows])


def command(record: Record) -> str:
    """What measures a record again, as code."""
    return f"`{' '.join(record.command.replace('`', ' ').split())}`."


def text(given: str) -> str:
    """Text that cannot break out of a cell or a paragraph."""
    return " ".join(given.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
