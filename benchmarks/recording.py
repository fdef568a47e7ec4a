"""Ways to read the reviews once, side by side: the lines that change, the first epoch, later epochs, the numbers.

In each block every side has a fresh process, one after the other. It prepares its data and trains the textbook's
classifier with `FastLoop` for an epoch (the first), until it is decided what runs the steps (not timed), and for some
epochs more (the later ones). The losses of 20 steps are compared with those of the textbook's own loop.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import fasttrain
from benchmarks.children import run_child
from benchmarks.places import RESULTS, log
from benchmarks.records import record_node
from fasttrain.errors import DataError, FasttrainError
from fasttrain.measure.bench.arm import CHECKED_STEPS
from fasttrain.measure.bench.losses import running_means
from fasttrain.measure.bench.record import write_record
from fasttrain.measure.bench.summary import command, conditions_of, table, text
from fasttrain.measure.environment import environment, load_average, now
from fasttrain.reference import train_epoch
from fasttrain.workloads.common import SEED
from fasttrain.workloads.job import load_job
from fasttrain.workloads.review_job import ReviewJob

KIND = "recording"

SCHEMA_VERSION = 1
"""Raise it when a field changes its meaning, appears or goes; files of another version are refused."""

LATER_EPOCHS = 3
TIMES = "first_s", "later_s"
PLAIN = "plain loader"
LOADER = "DataLoader(dataset, batch_size=128, shuffle=True, drop_last=True, generator=generator)"
FORWARD = """
def forward(model, batch):
    x, y = batch["x_data"].float(), batch["y_target"].float()
    y_pred = model(x)
    return loss_func(y_pred, y), y_pred, y
"""

SIDES = {
    PLAIN: f"loader = {LOADER}\n{FORWARD}",
    "fasttrain.record": f"loader = fasttrain.record({LOADER})\n{FORWARD}",
    "TensorDataset by hand": f"""
x = torch.zeros(len(dataset), dataset.num_features, dtype=torch.uint8)
y = torch.zeros(len(dataset), dtype=torch.int64)
for index in range(len(dataset)):
    row = dataset[index]
    x[index], y[index] = torch.from_numpy(row["x_data"]), row["y_target"]
dataset = TensorDataset(x, y)
loader = {LOADER}
{FORWARD.replace('["x_data"]', "[0]").replace('["y_target"]', "[1]")}""",
    "MONAI CacheDataset": f"""
from monai.data import CacheDataset
dataset = CacheDataset(dataset, transform=[], progress=False)
loader = {LOADER}
{FORWARD}""",
    "Hugging Face datasets, with_format": f"""
import datasets
def rows():
    for index in range(len(dataset)):
        yield dataset[index]
dataset_of_rows = datasets.Dataset.from_generator(rows).with_format("torch")
loader = {LOADER.replace("dataset", "dataset_of_rows")}
{FORWARD}""",
}
"""What a user writes; each has the names `dataset`, `generator` and `loss_func`, and makes `loader` and `forward`."""


@dataclass(frozen=True)
class Side:
    """One of `SIDES`: lines that differ from those over the plain loader; by block, seconds of preparation and first
    epoch, and of the median later epoch; the largest relative difference of its running losses to the textbook's."""

    name: str
    lines: int
    first_s: tuple[float, ...]
    later_s: tuple[float, ...]
    difference: float


@dataclass(frozen=True, kw_only=True)
class RecordingRecord:
    """All sides; `refused` has those that are not installed, with the reason."""

    command: str
    created: str
    environment: dict[str, Any]
    sides: tuple[Side, ...]
    refused: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"kind": KIND, "schema_version": SCHEMA_VERSION, **asdict(self)}


def read_record(path: Path) -> RecordingRecord:
    """Reads a record; raises `DataError`, which names the file, where it is none."""
    with record_node(path, KIND, SCHEMA_VERSION) as node:
        sides = [
            Side(each.text("name"), each.integer("lines"), *map(each.numbers, TIMES), each.number("difference"))
            for each in node.nodes("sides")
        ]
        if any(not each.first_s or len(each.first_s) != len(each.later_s) for each in sides):
            raise DataError("a side needs as many first epochs as later ones: measure again")
        return RecordingRecord(
            command=node.text("command"),
            created=node.text("created"),
            environment=node.plain("environment"),
            sides=tuple(sides),
            refused={name: node.node("refused").text(name) for name in node.node("refused").names()},
        )


def section_of(path: Path) -> str:
    """The section of benchmarks/README.md that a record's file gives; raises `DataError`."""
    record = read_record(path)
    columns = ["data", "lines changed", "first epoch, s", "later epochs, s", "numbers of the textbook's loop"]
    rows: list[list[str]] = []
    for each in record.sides:
        same = f"{'yes' if each.difference <= ReviewJob.tolerance else 'no'}: losses within {each.difference:.1g}"
        rows.append([text(each.name), str(each.lines), _ranged(each.first_s), _ranged(each.later_s), same])
    rows += [[text(name), str(changed_lines(name)), text(why), "", ""] for name, why in record.refused.items()]
    counts = " or ".join(map(str, sorted({len(each.first_s) for each in record.sides})))
    return (
        "## Ways to read the reviews once, cpu\n\n"
        "`FastLoop` trains the textbook's classifier over each. First epoch: with what is prepared before it; later "
        "epochs: once it is decided what runs the steps. Lines: of those that make the loader and the forward pass. "
        f"Medians over {counts} blocks, with the range; one thread.\n\n"
        f"{table(columns, rows)}\n"
        f"{text(conditions_of(record.environment, record.created))}. Measured by {command(record.command)}.\n"
    )


def _ranged(values: Sequence[float]) -> str:
    digits = 1 if statistics.median(values) >= 1 else 3
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def changed_lines(name: str) -> int:
    """Lines of a side that are not those over the plain loader."""
    theirs, ours = ([line for line in SIDES[each].splitlines() if line] for each in (PLAIN, name))
    return sum(line.startswith("+ ") for line in difflib.ndiff(theirs, ours))


def main(arguments: Sequence[str]) -> int:
    """Measures and writes the record; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recording", description=__doc__)
    parser.add_argument("--blocks", type=int, default=3, choices=range(1, 100), metavar="N", help="(default: 3)")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{KIND}-reviews-cpu.json", help="the record")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)  # in a fresh process
    options = parser.parse_args(arguments)
    if options.side is not None:
        with tempfile.TemporaryDirectory(prefix="fasttrain-datasets-") as folder:
            os.environ["HF_DATASETS_CACHE"] = folder  # else a later block would find what an earlier one has prepared
            print(json.dumps(run_side(options.side)))
        return 0
    try:
        started_at = environment(torch.device("cpu"))
        sides, refused = measure(options.blocks)
        record = RecordingRecord(
            command=shlex.join(["python", "-m", "benchmarks.recording", *arguments]),
            created=now(),
            environment={**started_at, "load_average_after": load_average()},
            sides=sides,
            refused=refused,
        )
        write_record(record, options.out)
    except FasttrainError as error:
        log(f"benchmarks.recording: {error}")
        return 2
    log(section_of(options.out))
    return 0


def measure(blocks: int) -> tuple[tuple[Side, ...], dict[str, str]]:
    """Runs every side in every block; their processes share nothing but compiled programs."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
    refused: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="fasttrain-recording-") as cache:
        for block in range(blocks):
            for name in [*SIDES] if block % 2 == 0 else [*SIDES][::-1]:
                told = run_child("-m", "benchmarks.recording", "--side", name, cache=Path(cache)).output
                ran = json.loads(told.splitlines()[-1])
                log(f"block {block + 1}/{blocks}: {name}: {ran}")
                if "refused" in ran:
                    refused[name] = ran["refused"]
                else:
                    found[name].append(ran)
    sides: list[Side] = []
    for name, ran in found.items():
        if ran:
            times = (tuple(each[key] for each in ran) for key in TIMES)
            sides.append(Side(name, changed_lines(name), *times, max(each["difference"] for each in ran)))
    return tuple(sides), refused


def run_side(name: str) -> dict[str, Any]:
    """Trains over one side in this process."""
    torch.set_num_threads(1)
    job = load_job("reviews", torch.device("cpu"))
    model, optimizer, loss_func = job.textbook_model()
    dataset, generator = job.textbook_batches([]).dataset, torch.Generator().manual_seed(SEED)
    names: dict[str, Any] = {"dataset": dataset, "generator": generator, "loss_func": loss_func}
    names |= {"torch": torch, "fasttrain": fasttrain, "DataLoader": DataLoader, "TensorDataset": TensorDataset}
    plain = eval(LOADER, names)
    begin = time.perf_counter()
    try:
        exec(SIDES[name], names)
    except ModuleNotFoundError as error:
        return {"refused": f"{error.name} is not installed"}
    loader, forward = names["loader"], names["forward"]
    loop = fasttrain.FastLoop(model, optimizer, forward)
    loop.train(loader)
    first_s = time.perf_counter() - begin
    loop.step.settle(loop.step.sources.of(loader))
    later_s = statistics.median(loop.train(loader).seconds for _ in range(LATER_EPOCHS))
    # The first losses of new models, over the batches that FastLoop takes and by the textbook's loop.
    (ours, optimizer, _), (theirs, their_optimizer, _) = job.textbook_model(), job.textbook_model()
    step = fasttrain.TrainStep(ours, optimizer, forward, engine="eager")
    generator.manual_seed(SEED)
    found = [step(batch).item() for batch in islice(iter(step.sources.of(loader)), CHECKED_STEPS)]
    generator.manual_seed(SEED)
    batches = islice(iter(plain), CHECKED_STEPS)
    wanted = [train_epoch(theirs, [batch], loss_func, their_optimizer).loss for batch in batches]
    pairs = zip(running_means(found), running_means(wanted), strict=True)
    difference = max(abs(our_loss - their_loss) / their_loss for our_loss, their_loss in pairs)
    return {"first_s": first_s, "later_s": later_s, "difference": difference, "source": loop.source.value}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
