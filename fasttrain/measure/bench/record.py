"""The record of a benchmark: every raw figure of every block, under what it was measured, as JSON of schema 3.

Pairs of two arms are formed by the block's number. Nothing here imports torch: records are read without it.
"""

from __future__ import annotations

import json
import os
import re
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from fasttrain.errors import DataError
from fasttrain.measure.files import write_text
from fasttrain.measure.strict import Node, read_json
from fasttrain.measure.verdict.stats import Noise

__all__ = [
    "ArmRecord",
    "BenchRecord",
    "BlockFigures",
    "Design",
    "Storable",
    "check_target",
    "noise_from",
    "read_record",
    "with_threads",
    "write_record",
]

SCHEMA_VERSION = 3
"""Raise it when a field changes its meaning, appears or goes; files of another version are refused."""

SHOWN_OF_ENVIRONMENT = ("cpu", "device", "torch", "python", "fasttrain")
"""Text that every record's environment has; more is in it."""


OWN_THREADS = re.compile(", ([0-9]{1,6}) threads$")
"""In the label of an arm that has another number than the rest; see `with_threads`."""


@dataclass(frozen=True, kw_only=True)
class BlockFigures:
    """What one fresh process of an arm gave.

    Attributes:
        block: its number, from 0; arms of one number are pairs.
        position: when its process was started, from 0.
        step_s: seconds of a step, at the speed that the machine had in the median round; see `rounds.levels`.
        steps: that were timed.
        seconds: that they took.
        rounds: in which they were, the arms of the block taking turns.
        samples_per_step: rows that a step trains on.
        import_s: from the start of the process until everything was imported.
        compile_s: waiting for a trace or a compiler; None where the arm knows of none.
        first_step_s: the first step, with what it compiles.
        peak_bytes: of the process (CPU) or of the device's allocator (CUDA); None: unknown.
        runnable: threads of others that ran or waited for a core just before the rounds; None: unknown.
        flags: what was wrong with the machine: "load" (with what ran just before, more threads wanted to run than there
            are cores), "waited" (the process had to wait for a core while it was timed), "awake" (it used one in the
            others' turns), "swapped" (memory came back from disk), "throttled".
        repeats: attempts at the rounds of this block before, of which a flag or a death made nothing.
        engine: what ran the steps in the end, and why; None where that is no question.
    """

    block: int
    position: int
    step_s: float
    steps: int
    seconds: float
    rounds: int
    samples_per_step: int
    import_s: float
    compile_s: float | None
    first_step_s: float
    peak_bytes: int | None
    runnable: int | None = None
    flags: tuple[str, ...] = ()
    repeats: int = 0
    engine: str | None = None

    @property
    def excess(self) -> float:
        """How much longer its steps took in all than `step_s` tells: 0.1 is 10%."""
        return self.seconds / self.steps / self.step_s - 1

    @property
    def samples_per_s(self) -> float:
        """Rows trained on a second."""
        return self.samples_per_step / self.step_s

    @classmethod
    def from_node(cls, node: Node) -> BlockFigures:
        """Reads one; raises `DataError`."""
        return cls(
            block=node.integer("block"),
            position=node.integer("position"),
            step_s=node.number("step_s", is_positive=True),
            steps=node.integer("steps", 1),
            seconds=node.number("seconds", is_positive=True),
            rounds=node.integer("rounds", 1),
            samples_per_step=node.integer("samples_per_step", 1),
            import_s=node.number("import_s"),
            compile_s=node.number_or_none("compile_s"),
            first_step_s=node.number("first_step_s"),
            peak_bytes=node.integer_or_none("peak_bytes"),
            runnable=node.integer_or_none("runnable"),
            flags=node.texts("flags"),
            repeats=node.integer("repeats"),
            engine=node.text_or_none("engine"),
        )


@dataclass(frozen=True, kw_only=True)
class ArmRecord:
    """One arm of a benchmark.

    Attributes:
        description: what it is, in words.
        agreement: the largest relative difference of its running losses to the reference's; None: another algorithm,
            which has none to compare.
        tolerance: what that difference may be.
        blocks: its figures, one entry a block, in order.
        repeated: figures of attempts that were flagged, and repeated; not to be judged by.
    """

    description: str
    agreement: float | None
    tolerance: float
    blocks: tuple[BlockFigures, ...]
    repeated: tuple[BlockFigures, ...] = ()

    @property
    def step_s(self) -> float:
        """The median over the blocks."""
        return statistics.median(block.step_s for block in self.blocks)

    @property
    def samples_per_s(self) -> tuple[float, ...]:
        """Of each block."""
        return tuple(block.samples_per_s for block in self.blocks)

    @classmethod
    def from_node(cls, node: Node) -> ArmRecord:
        """Reads one.

        Raises:
            DataError: it has another shape, no block or a block twice.
        """
        blocks = tuple(BlockFigures.from_node(each) for each in node.nodes("blocks"))
        numbers = [block.block for block in blocks]
        if not numbers or numbers != sorted(set(numbers)):
            raise DataError(f"an arm needs blocks in order, each once, not {numbers!r:.60}")
        return cls(
            description=node.text("description"),
            agreement=node.number_or_none("agreement"),
            tolerance=node.number("tolerance"),
            blocks=blocks,
            repeated=tuple(BlockFigures.from_node(each) for each in node.nodes("repeated")),
        )


@dataclass(frozen=True, kw_only=True)
class Design:
    """How a benchmark was laid out, before it ran.

    Attributes:
        blocks: that were planned.
        extended: the one extension, to twice as many, was made.
        warmup_s: least seconds of steps before any is timed.
        timed_s: seconds of timed steps of an arm in a block, on average over the arms; there are 20 rounds at least.
        slice_s: how long an arm's turn in a round is meant to take. A turn is a number of calls, by what they took in
            the turn before; where one call takes longer, it is the whole turn.
        threads: of every arm that has no number of its own in its name.
        seed: of the order of the arms in each block.
    """

    blocks: int
    extended: bool
    warmup_s: float
    timed_s: float
    slice_s: float
    threads: int
    seed: int

    def threads_of(self, label: str) -> int:
        """Torch's threads of an arm."""
        own = OWN_THREADS.search(label)
        return self.threads if own is None else int(own[1])

    @classmethod
    def from_node(cls, node: Node) -> Design:
        """Reads one; raises `DataError`."""
        return cls(
            blocks=node.integer("blocks", 1),
            extended=node.flag("extended"),
            warmup_s=node.number("warmup_s"),
            timed_s=node.number("timed_s"),
            slice_s=node.number("slice_s"),
            threads=node.integer("threads", 1),
            seed=node.integer("seed"),
        )


@dataclass(frozen=True, kw_only=True)
class BenchRecord:
    """One benchmark, whole.

    Attributes:
        workload: what `Job.describe` tells, with the job's name.
        command: what measures it again.
        created: when, ISO 8601 in UTC.
        environment: machine, versions, commit, load.
        design: its layout.
        arms: by label, in the order that they were asked for.
        refused: arms that are not timed, with the reason.
        noise: of this machine, where it was measured; see `--aa`.
        notes: what a reader of the figures has to know.
    """

    workload: dict[str, Any]
    command: str
    created: str
    environment: dict[str, Any]
    design: Design
    arms: dict[str, ArmRecord]
    refused: dict[str, str]
    noise: Noise | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"schema_version": SCHEMA_VERSION, "kind": "bench", **asdict(self)}

    @classmethod
    def from_dict(cls, given: Any) -> BenchRecord:
        """What `to_dict` made, once it went through JSON.

        Raises:
            DataError: it has another schema version or shape, or a value that cannot be.
        """
        node = Node(given, "the record")
        if not node.has("schema_version") or node.integer("schema_version") != SCHEMA_VERSION:
            raise DataError(f"is not a benchmark's record of schema version {SCHEMA_VERSION}: measure again")
        if node.text("kind") != "bench":
            raise DataError(f"is a record of kind {node.text('kind')!r:.40}, not of a benchmark")
        _check_shown(node)
        refused = node.node("refused")
        return cls(
            workload=node.plain("workload"),
            command=node.text("command"),
            created=node.text("created"),
            environment=node.plain("environment"),
            design=Design.from_node(node.node("design")),
            arms={name: ArmRecord.from_node(arm) for name, arm in node.named("arms").items()},
            refused={name: refused.text(name) for name in refused.names()},
            noise=noise_from(node.node("noise")) if node.has("noise") else None,
            notes=node.texts("notes"),
        )


def with_threads(source: str, threads: int) -> str:
    """The label of an arm that has a number of threads of its own, which `Design.threads_of` finds in it."""
    return f"{source}, {threads} threads"


def check_target(path: Path) -> None:
    """Checks that a file can be written, before what goes into it is measured. Nothing is made or changed.

    Args:
        path: of the file; it, and folders above it, need not be there.

    Raises:
        DataError: it cannot be written there.
    """
    if path.is_dir():
        raise DataError("is a folder: name a file", file=str(path))
    if path.exists() and not os.access(path, os.W_OK):
        raise DataError("cannot be written: it is read-only for this user", file=str(path))
    if path.exists() and not path.is_file():  # a device or a pipe is not replaced
        return
    folder = next(folder for folder in Path(os.path.realpath(path)).parents if folder.exists())
    if not folder.is_dir():
        raise DataError(f"cannot be written: {folder} is no folder", file=str(path))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise DataError(f"cannot be written: {folder} is read-only for this user", file=str(path))


class Storable(Protocol):
    """A record that `write_record` writes."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        ...


def write_record(record: Storable, path: Path) -> None:
    """Writes a record as JSON, in place of an older one at once. Folders above it are made.

    Raises:
        DataError: it cannot be written there.
    """
    content = json.dumps(record.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, content + "\n", "the record")


def read_record(path: Path) -> BenchRecord:
    """Reads a record.

    Raises:
        DataError: the file is not one; it is named.
    """
    content = read_json(path)
    try:
        return BenchRecord.from_dict(content)
    except DataError as error:
        raise DataError(error.problem, file=str(path)) from None


def noise_from(node: Node) -> Noise:
    """Reads what an arm against itself told; raises `DataError`."""
    return Noise(
        floor=node.number("floor"), smallest_effect=node.number("smallest_effect"), pairs=node.integer("pairs", 1)
    )


def _check_shown(record: Node) -> None:
    """Refuses what tables could not show."""
    environment, workload = record.node("environment"), record.node("workload")
    for name in SHOWN_OF_ENVIRONMENT:
        environment.text(name)
    environment.integer("cores", 1)
    environment.number_or_none("load_average")
    environment.number_or_none("load_average_after")
    if environment.has("commit"):
        environment.text("commit")
    if environment.has("has_uncommitted_changes"):
        environment.flag("has_uncommitted_changes")
    workload.text("name")
