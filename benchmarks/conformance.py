"""The record of torch's own test modules and optimizers, compiled and compared with plain PyTorch; checks and table.

`python -m tests.step.conformance --compile` makes it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.records import record_node
from fasttrain.measure.bench.summary import command, conditions_of, table, text
from fasttrain.measure.strict import Node

KIND = "conformance"

SCHEMA_VERSION = 1
"""Raise it when a field changes its meaning, appears or goes; files of another version are refused."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one input of a module, or of one setting of an optimizer.

    Attributes:
        name: of the module or optimizer.
        number: of the input or setting, as torch's database lists them.
        is_module: a module; else an optimizer.
        why: why it is not compiled, or only its optimizer steps eagerly; None: it is compiled and the same.
        difference: what differs from plain PyTorch; None: nothing.
    """

    name: str
    number: int
    is_module: bool
    why: str | None = None
    difference: str | None = None

    @property
    def is_refused(self) -> bool:
        """Nothing of it is compiled."""
        return self.why is not None and self.why.startswith("refused: ")

    @classmethod
    def from_node(cls, node: Node) -> Outcome:
        """Reads one; raises `DataError`."""
        return cls(
            name=node.text("name"),
            number=node.integer("number"),
            is_module=node.flag("is_module"),
            why=node.text_or_none("why"),
            difference=node.text_or_none("difference"),
        )


@dataclass(frozen=True, kw_only=True)
class ConformanceRecord:
    """What became of all that was compiled.

    Attributes:
        command: what makes it again.
        created: when, ISO 8601 in UTC.
        environment: machine, versions, commit, load.
        rule: which inputs were taken, in words.
        num_steps: of each run.
        num_inputs: of all modules together in torch's database.
        num_distinct: of these, those that the rule allows.
        outcomes: of what was taken.
    """

    command: str
    created: str
    environment: dict[str, Any]
    rule: str
    num_steps: int
    num_inputs: int
    num_distinct: int
    outcomes: tuple[Outcome, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"kind": KIND, "schema_version": SCHEMA_VERSION, **asdict(self)}


def read_record(path: Path) -> ConformanceRecord:
    """Reads a record.

    Raises:
        DataError: the file is not one; it is named.
    """
    with record_node(path, KIND, SCHEMA_VERSION) as node:
        return ConformanceRecord(
            command=node.text("command"),
            created=node.text("created"),
            environment=node.plain("environment"),
            rule=node.text("rule"),
            num_steps=node.integer("num_steps", 1),
            num_inputs=node.integer("num_inputs", 1),
            num_distinct=node.integer("num_distinct", 1),
            outcomes=tuple(Outcome.from_node(each) for each in node.nodes("outcomes")),
        )


def section_of(path: Path) -> str:
    """The section of benchmarks/README.md that a record's file gives; raises `DataError`."""
    return markdown(read_record(path))


def markdown(record: ConformanceRecord) -> str:
    """The section of benchmarks/README.md."""
    modules, optimizers = (
        [each for each in record.outcomes if each.is_module is is_module] for is_module in (True, False)
    )
    rows = [counted("inputs of modules", modules), counted("settings of optimizers", optimizers)]
    notes = [f"inputs: {record.rule}", *reasons(record.outcomes), *differences(record.outcomes)]
    listed = "".join(f"- {text(note)}\n" for note in notes)
    return (
        f"## torch's test modules and optimizers, compiled, cpu\n\n{introduction(record, modules)}\n"
        f"{table(['', 'taken', 'the same', 'optimizer eager, the same', 'refused', 'different'], rows)}\n{listed}\n"
        f"{text(conditions_of(record.environment, record.created))}. Made by {command(record.command)}.\n"
    )


def introduction(record: ConformanceRecord, modules: Sequence[Outcome]) -> str:
    """What the table shows."""
    return (
        f"Losses of {record.num_steps} steps in double precision and the state after them, by the compiled engine and "
        "by a plain PyTorch loop; the same: within a relative 1e-9. Taken are "
        f"{len(modules)} inputs of {len({each.name for each in modules})} modules; torch's database has "
        f"{record.num_inputs:,}, of which {record.num_distinct} have two settings together that no other has.\n"
    )


def counted(what: str, outcomes: Sequence[Outcome]) -> list[str]:
    """A row of the table."""
    good = [each for each in outcomes if each.difference is None]
    counts = [
        len(outcomes),
        sum(each.why is None for each in good),
        sum(each.why is not None and not each.is_refused for each in good),
        sum(each.is_refused for each in good),
        len(outcomes) - len(good),
    ]
    return [what, *map(str, counts)]


def reasons(outcomes: Sequence[Outcome]) -> list[str]:
    """Each reason once, with what it is the reason of."""
    found: dict[str, dict[str, int]] = {}
    for each in outcomes:
        if each.why is not None and each.difference is None:
            names = found.setdefault(_PLACE.sub("", each.why), {})
            names[each.name] = names.get(each.name, 0) + 1
    return [f"{', '.join(f'{name} ({num})' for name, num in names.items())}: {why}" for why, names in found.items()]


_PLACE = re.compile(r": '[^']*' in \S+\.py:\d+$")
"""The line of the test's own forward, which every refusal names."""


def differences(outcomes: Sequence[Outcome]) -> list[str]:
    """What differs."""
    return [f"DIFFERENT: {each.name}, {each.number}: {each.difference}" for each in outcomes if each.difference]
