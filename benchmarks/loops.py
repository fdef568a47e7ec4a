"""The record of public training loops, compiled, beside plain PyTorch: checks and table.

`python -m tests.public_loops_speed` measures it.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.records import record_node
from fasttrain.errors import DataError
from fasttrain.measure.bench.summary import command, conditions_of, number, table, text
from fasttrain.measure.strict import Node

KIND = "public loops"

SCHEMA_VERSION = 1
"""Raise it when a field changes its meaning, appears or goes; files of another version are refused."""


@dataclass(frozen=True, kw_only=True)
class Loop:
    """One loop.

    Attributes:
        name: of its function in `tests.public_loops`.
        engine: that its steps reached, asked for `compiled` and, where that is refused, for `eager`.
        reason: why it is not compiled; None where it is.
        loss_difference: the largest of the losses from plain PyTorch's, relative (absolute below one).
        plain_step_s: of each turn, CPU seconds of a step in the plain loop.
        step_s: of each turn, CPU seconds of a step in the loop with fasttrain.
    """

    name: str
    engine: str
    reason: str | None
    loss_difference: float
    plain_step_s: tuple[float, ...]
    step_s: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """How many times as fast as plain PyTorch, by the medians of the turns."""
        return statistics.median(self.plain_step_s) / statistics.median(self.step_s)

    @property
    def ratios(self) -> list[float]:
        """The same of each pair of turns."""
        return [plain / ours for plain, ours in zip(self.plain_step_s, self.step_s, strict=True)]

    @classmethod
    def from_node(cls, node: Node) -> Loop:
        """Reads one; raises `DataError`."""
        loop = cls(
            name=node.text("name"),
            engine=node.text("engine"),
            reason=node.text_or_none("reason"),
            loss_difference=node.number("loss_difference"),
            plain_step_s=node.numbers("plain_step_s"),
            step_s=node.numbers("step_s"),
        )
        if not loop.step_s or len(loop.step_s) != len(loop.plain_step_s) or not all(loop.step_s + loop.plain_step_s):
            raise DataError(f"the turns of {loop.name} must be pairs of positive numbers: measure again")
        if (loop.engine == "compiled") != (loop.reason is None):
            raise DataError(f"{loop.name} is compiled and has a reason why not, or neither: measure again")
        return loop


@dataclass(frozen=True, kw_only=True)
class LoopsRecord:
    """All loops.

    Attributes:
        command: what measures it again.
        created: when, ISO 8601 in UTC.
        environment: machine, versions, commit, load.
        rows: of a batch.
        turn_s: CPU seconds of a turn, at least.
        loops: in the order of `tests.public_loops`.
    """

    command: str
    created: str
    environment: dict[str, Any]
    rows: int
    turn_s: float
    loops: tuple[Loop, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"kind": KIND, "schema_version": SCHEMA_VERSION, **asdict(self)}


def read_record(path: Path) -> LoopsRecord:
    """Reads a record.

    Raises:
        DataError: the file is not one; it is named.
    """
    with record_node(path, KIND, SCHEMA_VERSION) as node:
        return LoopsRecord(
            command=node.text("command"),
            created=node.text("created"),
            environment=node.plain("environment"),
            rows=node.integer("rows", 1),
            turn_s=node.number("turn_s", is_positive=True),
            loops=tuple(Loop.from_node(each) for each in node.nodes("loops")),
        )


def section_of(path: Path) -> str:
    """The section of benchmarks/README.md that a record's file gives; raises `DataError`."""
    return markdown(read_record(path))


def markdown(record: LoopsRecord) -> str:
    """The section of benchmarks/README.md."""
    rows = [row(each) for each in record.loops]
    reasons = "".join(f"- {text(f'{each.name}: {each.reason}')}\n" for each in record.loops if each.reason is not None)
    return (
        f"## Public training loops, cpu\n\n{introduction(record)}\n"
        f"{table(['', 'engine', 'largest loss difference', 'plain, us a step', 'times plain (range)', 'n'], rows)}\n"
        f"Not compiled:\n\n{reasons}\n"
        f"{text(conditions_of(record.environment, record.created))}. Measured by {command(record.command)}.\n"
    )


def introduction(record: LoopsRecord) -> str:
    """What the table shows."""
    return (
        f"Loops as books and public repositories have them, with small models and batches of {record.rows} rows, in "
        "double precision, one thread: what a step costs beside its arithmetic counts most. Losses are compared over 3 "
        "epochs. A plain loop and one with fasttrain, each in a process of its own, take turns of "
        f"{1e3 * record.turn_s:.0f} ms or more of CPU time; the ratio is that of the medians, the range that of the "
        "pairs.\n"
    )


def row(loop: Loop) -> list[str]:
    """A row of the table."""
    low, high = min(loop.ratios), max(loop.ratios)
    return [
        text(loop.name.replace("_", " ")),
        loop.engine,
        f"{loop.loss_difference:.1g}",
        number(1e6 * statistics.median(loop.plain_step_s)),
        f"{number(loop.ratio)}x ({number(low)} to {number(high)})",
        str(len(loop.step_s)),
    ]
