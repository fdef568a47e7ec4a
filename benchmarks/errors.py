"""The record of how far compiled steps are from exact ones, beside eager steps; its checks and its table.

`python -m tests.step.errors` measures it: the models and optimizers are those of the tests.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.records import record_node
from fasttrain.errors import DataError
from fasttrain.measure.bench.summary import command, conditions_of, table, text
from fasttrain.measure.strict import Node

KIND = "errors"

SCHEMA_VERSION = 1
"""Raise it when a field changes its meaning, appears or goes; files of another version are refused."""

BOUND = 2.0
"""A compiled step's error may be so many times eager's."""


class Ratio(NamedTuple):
    """Compiled error over eager error: of the parameters after the run, and of the losses during it."""

    parameters: float
    losses: float


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Distances of runs in single precision from the same runs in double precision, one entry a run.

    Attributes:
        parameters: the largest of the parameters, each relative to its largest entry, after the last step.
        losses: the largest of the steps, relative.
        farthest: the parameter that is farthest off.
    """

    parameters: tuple[float, ...]
    losses: tuple[float, ...]
    farthest: tuple[str, ...]

    @classmethod
    def from_node(cls, node: Node) -> Errors:
        """Reads one; raises `DataError`."""
        found = cls(
            parameters=node.numbers("parameters"), losses=node.numbers("losses"), farthest=node.texts("farthest")
        )
        lengths = {len(found.parameters), len(found.losses), len(found.farthest)}
        if lengths == {0} or len(lengths) != 1 or not all(found.parameters + found.losses):
            raise DataError("errors must be lists of as many positive numbers and names: measure again")
        return found


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An optimizer with a model.

    Attributes:
        optimizer, model: their names.
        refused: why there is no program; None where there is one.
        eager: of the eager runs; None without a program.
        compiled: of the program's runs over the same batches from the same states; None without a program.
    """

    optimizer: str
    model: str
    refused: str | None = None
    eager: Errors | None = None
    compiled: Errors | None = None

    @property
    def ratio(self) -> Ratio | None:
        """Of the medians over the runs; None without a program."""
        if self.eager is None or self.compiled is None:
            return None
        return Ratio(
            statistics.median(self.compiled.parameters) / statistics.median(self.eager.parameters),
            statistics.median(self.compiled.losses) / statistics.median(self.eager.losses),
        )

    @classmethod
    def from_node(cls, node: Node) -> Pair:
        """Reads one; raises `DataError`."""
        eager, compiled = (
            Errors.from_node(node.node(name)) if node.has(name) else None for name in ("eager", "compiled")
        )
        pair = cls(
            optimizer=node.text("optimizer"),
            model=node.text("model"),
            refused=node.text_or_none("refused"),
            eager=eager,
            compiled=compiled,
        )
        if (pair.ratio is None) != (pair.refused is not None):
            raise DataError(f"{pair.optimizer} with {pair.model} has neither errors nor a reason, or both")
        return pair


@dataclass(frozen=True, kw_only=True)
class ErrorRecord:
    """Every optimizer with every model.

    Attributes:
        command: what measures it again.
        created: when, ISO 8601 in UTC.
        environment: machine, versions, commit, load.
        num_steps: of each run.
        optimizers: by name, the optimizer and its options.
        pairs: all of them.
    """

    command: str
    created: str
    environment: dict[str, Any]
    num_steps: int
    optimizers: dict[str, str]
    pairs: tuple[Pair, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"kind": KIND, "schema_version": SCHEMA_VERSION, **asdict(self)}


def read_record(path: Path) -> ErrorRecord:
    """Reads a record.

    Raises:
        DataError: the file is not one; it is named.
    """
    with record_node(path, KIND, SCHEMA_VERSION) as node:
        described = node.node("optimizers")
        return ErrorRecord(
            command=node.text("command"),
            created=node.text("created"),
            environment=node.plain("environment"),
            num_steps=node.integer("num_steps", 1),
            optimizers={name: described.text(name) for name in described.names()},
            pairs=tuple(Pair.from_node(each) for each in node.nodes("pairs")),
        )


def section_of(path: Path) -> str:
    """The section of benchmarks/README.md that a record's file gives; raises `DataError`."""
    return markdown(read_record(path))


def markdown(record: ErrorRecord) -> str:
    """The section of benchmarks/README.md."""
    by_name = {(pair.optimizer, pair.model): pair for pair in record.pairs}
    models = list(dict.fromkeys(pair.model for pair in record.pairs))
    rows = [
        [text(described), *(cell(by_name.get((optimizer, model))) for model in models)]
        for optimizer, described in record.optimizers.items()
    ]
    notes = "".join(f"- {text(note)}\n" for note in summary(record))
    return (
        f"## Errors of compiled steps in single precision, cpu\n\n{introduction(record)}\n"
        f"{table(['', *map(text, models)], rows)}\n{notes}\n"
        f"{text(conditions_of(record.environment, record.created))}. Measured by {command(record.command)}.\n"
    )


def introduction(record: ErrorRecord) -> str:
    """What the table shows."""
    counts = sorted({len(pair.eager.parameters) for pair in record.pairs if pair.eager is not None})
    return (
        f"Compiled error over eager error, after {record.num_steps} steps from one state over the same batches; where "
        "it is below 1, the program is more exact. An error is the largest difference of a parameter from a run in "
        "double precision, relative to the parameter's largest entry, and of a pair the median over "
        f"{' or '.join(map(str, counts))} runs with other weights and batches. Where a gradient is zero but for "
        "rounding (the bias of attention's keys), many optimizers make whole steps of noise, eagerly and compiled.\n"
    )


def cell(pair: Pair | None) -> str:
    """A pair's ratio."""
    if pair is None:
        return ""
    return "refused" if pair.ratio is None else f"{pair.ratio.parameters:.2f}"


def summary(record: ErrorRecord) -> list[str]:
    """The largest ratios, the pairs beyond the bound, and those without a program with the reason."""
    ratios = [(pair, pair.ratio) for pair in record.pairs if pair.ratio is not None]
    notes: list[str] = []
    if ratios:
        middle = statistics.median(ratio.parameters for _, ratio in ratios)
        for name, place in (("parameters", 0), ("losses", 1)):
            pair, ratio = max(ratios, key=lambda each, place=place: each[1][place])
            notes.append(f"{name}: the largest ratio is {ratio[place]:.2f} ({pair.optimizer} with {pair.model})")
        beyond = [(pair, ratio) for pair, ratio in ratios if ratio.parameters > BOUND]
        notes.append(f"{len(beyond)} of {len(ratios)} programs are beyond {BOUND:g}; the median ratio is {middle:.2f}")
        notes += [explained(pair, ratio) for pair, ratio in beyond]
    return notes + refusals(record.pairs)


def explained(pair: Pair, ratio: Ratio) -> str:
    """The figures of a pair that is beyond the bound."""
    assert pair.eager is not None
    assert pair.compiled is not None
    ours, theirs = (statistics.median(each.parameters) for each in (pair.compiled, pair.eager))
    where = statistics.mode(pair.compiled.farthest)
    return (
        f"{pair.optimizer} with {pair.model}: {ratio.parameters:.2f}; compiled {ours:.2g}, eager {theirs:.2g}, mostly "
        f"in {where}; the losses' ratio is {ratio.losses:.2f}"
    )


def refusals(pairs: Sequence[Pair]) -> list[str]:
    """Why pairs have no program, each reason once."""
    reasons = dict.fromkeys(pair.refused for pair in pairs if pair.refused is not None)
    named = {
        reason: ", ".join(f"{pair.optimizer} with {pair.model}" for pair in pairs if pair.refused == reason)
        for reason in reasons
    }
    return [f"refused: {names}: {reason}" for reason, names in named.items()]
