"""The whole command in fresh processes: against the textbook's script, its second start, its memory, its text speed.

The fast command and the textbook's script run the same epochs from the same file, nothing cached (each repeat has an
empty cache of programs), one after the other in random order in each repeat, both with one thread for torch unless told
otherwise. Nothing is extrapolated.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.children import Ran, run_child
from benchmarks.places import RESULTS, log
from benchmarks.records import Record, Series, ratios_to, write_record
from fasttrain.data.table import read_reviews
from fasttrain.data.text import encode_reviews
from fasttrain.errors import DataError, FasttrainError
from fasttrain.measure.bench.plan import orders
from fasttrain.measure.environment import environment, load_average, now
from fasttrain.workloads.common import data_dir

ENOUGH_PATIENCE = "100"
"""Of both commands: every epoch that was asked for is run."""

COPIES = 10
ORDER_SEED = 0

WHOLE = "train, cold"
TEXTBOOK = "textbook script"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where children work: a table, and a folder for what they write."""

    data: Path
    scratch: Path

    def train(self, *options: str, data: Path | None = None, is_cold: bool = False) -> Ran:
        """Runs `python -m fasttrain train` in a fresh process; `is_cold`: with a cache of its own, which is empty."""
        out = tempfile.mkdtemp(dir=self.scratch)
        given = ("--data", str(data or self.data), "--out", f"{out}/run", "--device", "cpu", "--json")
        cache = Path(out, "cache") if is_cold else self.scratch / "cache"
        return run_child("-m", "fasttrain", "train", *given, *options, cache=cache)

    def textbook(self, epochs: int, threads: int) -> Ran:
        """Runs the textbook's script in a fresh process."""
        options = ("--data", str(self.data), "--epochs", str(epochs), "--patience", ENOUGH_PATIENCE)
        threads_option = ("--threads", str(threads))
        return run_child("-m", "benchmarks.textbook", *options, *threads_option, cache=self.scratch / "cache")

    def first_step(self) -> float:
        """Seconds from the start of a fresh `train` process to the end of its first step, cache in use."""
        out = tempfile.mkdtemp(dir=self.scratch)
        options = ("--data", str(self.data), "--out", f"{out}/run", "--device", "cpu", "--epochs", "1")
        begin = time.time()
        run_child("-m", "benchmarks.first_step", f"{out}/stepped_at", *options, cache=self.scratch / "cache")
        return float(Path(out, "stepped_at").read_text()) - begin


def main(arguments: Sequence[str]) -> int:
    """Measures and writes the record; returns the exit code."""
    options = parse(arguments)
    try:
        measure(options, arguments)
    except FasttrainError as error:
        log(f"benchmarks.commands: {error}")
        return 2
    return 0


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Measures and writes the record."""
    started_at = environment(torch.device("cpu"))
    with tempfile.TemporaryDirectory(prefix="fasttrain-bench-") as scratch:
        place = Place(data=options.data.resolve(), scratch=Path(scratch))
        series, notes = against_textbook(place, options)
        series |= starts(place, options.start_repeats)
        series |= tenfold(place)
        series |= text_to_csr(place.data, options.text_repeats)
    record = Record(
        benchmark="commands",
        title="Whole commands, cpu",
        command=shlex.join(["python", "-m", "benchmarks.commands", *arguments]),
        created=now(),
        environment={**started_at, "load_average_after": load_average()},
        workload={"data": options.data.name, "epochs": options.epochs, "batch_size": 128},
        series=series,
        yardstick=TEXTBOOK,
        ratios=ratios_to(series, TEXTBOOK, [WHOLE, TEXTBOOK]),
        refused={},
        notes=notes,
    )
    path = options.out or RESULTS / "commands-cpu.json"
    write_record(record, path)
    log(f"written: {path}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.commands", description=__doc__)
    parser.add_argument("--epochs", type=int, default=20, help="of both whole commands (default: 20)")
    parser.add_argument(
        "--repeats", type=int, default=1, help="of each command (default: 1: the textbook takes minutes)"
    )
    parser.add_argument("--start-repeats", type=int, default=3, help="of the second start (default: 3)")
    parser.add_argument("--text-repeats", type=int, default=5, help="of text to CSR (default: 5)")
    parser.add_argument("--textbook-threads", type=int, default=1, help="give the number that is fastest (default: 1)")
    parser.add_argument("--data", type=Path, default=data_dir() / "reviews_lite.csv.gz", help="a .csv or .csv.gz")
    parser.add_argument("--out", type=Path, help="the record (default: benchmarks/results/commands-cpu.json)")
    options = parser.parse_args(arguments)
    repeats = (options.repeats, options.start_repeats, options.text_repeats)
    if min(options.epochs, options.textbook_threads, *repeats) < 1:
        parser.error("every number must be 1 or more")
    if not options.data.is_file():
        parser.error(f"{options.data} does not exist: set $FASTTRAIN_DATA, or give --data")
    return options


def against_textbook(place: Place, options: argparse.Namespace) -> tuple[dict[str, Series], list[str]]:
    """The whole command and the textbook's whole script, cold, for the same epochs; and what they reached."""
    epochs, threads = options.epochs, options.textbook_threads
    ran: dict[str, list[Ran]] = {WHOLE: [], TEXTBOOK: []}
    for repeat, names in zip(range(1, options.repeats + 1), orders(list(ran), ORDER_SEED), strict=False):
        for name in names:
            log(f"repeat {repeat}/{options.repeats}: {name}, epochs {epochs}")
            if name == WHOLE:
                wanted = ("--no-cache", "--epochs", str(epochs), "--patience", ENOUGH_PATIENCE)
                got = place.train(*wanted, is_cold=True)
            else:
                got = place.textbook(epochs, threads)
            log(f"{got.seconds:.1f} s, peak {got.peak_mb:.0f} MB")
            ran[name].append(got)
    whole = f"`train --no-cache --epochs {epochs}`"
    textbook = f"the book's whole script, epochs {epochs}, torch threads {threads}, from process start to exit"
    series = {
        WHOLE: seconds_of(ran[WHOLE], f"{whole}, from process start to exit"),
        TEXTBOOK: seconds_of(ran[TEXTBOOK], textbook),
        "peak memory": peaks_of(ran[WHOLE], f"of {whole}"),
    }
    return series, [what_they_reached(ran, epochs)]


def what_they_reached(ran: dict[str, list[Ran]], epochs: int) -> str:
    """The test accuracy of the command and of the textbook's script.

    Raises:
        DataError: one of them ran another number of epochs.
    """
    reached = {name: [json.loads(got.output) for got in each] for name, each in ran.items()}
    wrong = [result["epochs"] for results in reached.values() for result in results if result["epochs"] != epochs]
    if wrong:
        raise DataError(f"a command ran {wrong[0]} epochs where {epochs} were asked for")
    accuracies = [f"{name} {results[0]['test_accuracy']:.2f}%" for name, results in reached.items()]
    return f"test accuracy after epochs {epochs}: {', '.join(accuracies)}"


def starts(place: Place, repeats: int) -> dict[str, Series]:
    """The command started again with what an earlier run has left in the cache."""
    log("filling the cache, then the second start")
    place.train("--epochs", "1")
    first_steps = tuple(place.first_step() for _ in range(repeats))
    log(f"first step after {', '.join(f'{seconds:.1f}' for seconds in first_steps)} s")
    description = "`train` with the table cached, from process start to the end of the first step"
    return {"second start, first step": Series(description=description, unit="s", values=first_steps)}


def tenfold(place: Place) -> dict[str, Series]:
    """Peak memory on a table of ten times the size."""
    log(f"writing a table of {COPIES} times the size")
    table = place.scratch / "tenfold.csv"
    rows = write_copies(place.data, table, COPIES)
    log(f"training an epoch on its {rows:,} rows")
    ran = place.train("--no-cache", "--epochs", "1", data=table)
    log(f"{ran.seconds:.1f} s, peak {ran.peak_mb:.0f} MB")
    table_mb = table.stat().st_size / 1e6
    description = f"`train --no-cache --epochs 1` on {rows:,} rows ({table_mb:.0f} MB of text)"
    return {f"peak memory, {COPIES} times the table": peaks_of([ran], description)}


def write_copies(source: Path, target: Path, copies: int) -> int:
    """Writes a table some times over, each time in another order of rows; returns the rows written."""
    with open_text(source) as lines:
        header, *rows = csv.reader(lines)
    draw = random.Random(ORDER_SEED)
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for _ in range(copies):
            draw.shuffle(rows)
            writer.writerows(rows)
    return copies * len(rows)


def text_to_csr(path: Path, repeats: int) -> dict[str, Series]:
    """Reading and encoding a table, in MB of uncompressed text a second."""
    with open_text(path) as lines:
        megabytes = sum(len(line.encode()) for line in lines) / 1e6
    rates: list[float] = []
    for _ in range(repeats):
        begin = time.perf_counter()
        encode_reviews(read_reviews(path))
        rates.append(megabytes / (time.perf_counter() - begin))
    log(f"text to CSR: {', '.join(f'{rate:.0f}' for rate in rates)} MB/s")
    description = f"reading {path.name} and encoding all splits, {megabytes:.1f} MB uncompressed"
    return {"text to CSR": Series(description=description, unit="MB/s", values=tuple(rates))}


def open_text(path: Path) -> Any:
    """A table's text, unpacked where it is .gz; line ends as they are."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8", newline="")


def seconds_of(ran: Sequence[Ran], description: str) -> Series:
    """The time that processes took."""
    return Series(description=description, unit="s", values=tuple(each.seconds for each in ran))


def peaks_of(ran: Sequence[Ran], description: str) -> Series:
    """The peak memory of processes."""
    return Series(description=description, unit="MB", values=tuple(each.peak_mb for each in ran))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
