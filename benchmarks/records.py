"""A stored measurement of commands, of what `auto` costs or of comparisons: raw values, conditions, as JSON."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fasttrain.errors import DataError
from fasttrain.measure.files import write_text
from fasttrain.measure.strict import Node, read_json

SCHEMA_VERSION = 1
"""Raise it when a field changes its meaning, appears or goes; files of another version are refused."""

LESS_IS_BETTER = ("s", "MB")
"""Units of costs; of anything else, more is better."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """The raw values of one quantity, one a repeat, in the order of the repeats.

    Attributes:
        description: what was measured, in words.
        unit: "samples/s", "s", "MB", "MB/s" or "x" (times).
        values: at least one; finite and positive.
    """

    description: str
    unit: str
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            DataError: there is none, or one that is no finite positive number.
        """
        wrong = [value for value in self.values if not (is_number(value) and 0 < value <= sys.float_info.max)]
        if wrong or not self.values:
            raise DataError(f"the values of {self.description!r} must be finite positive numbers, not {wrong}")

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the median and the range beside the raw values."""
        return {**asdict(self), "median": self.median, "min": min(self.values), "max": max(self.values)}

    @classmethod
    def from_dict(cls, given: Any) -> Series:
        """What `to_dict` made.

        Raises:
            DataError: it has another shape, or its median or range is not that of its values.
        """
        match given:
            case {"description": str(description), "unit": str(unit), "values": [*values]}:
                series = cls(description=description, unit=unit, values=tuple(values))
            case _:
                raise DataError("a series needs a description, a unit and a list of values")
        figures = {name: given.get(name) for name in ("median", "min", "max")}
        if any(figures[name] != value for name, value in series.to_dict().items() if name in figures):
            raise DataError(f"{figures} does not belong to the values of {description!r}: measure again")
        return series


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measurement, whole.

    Attributes:
        benchmark: which one: "commands", "swap", "jobs" or "live".
        title: the heading of its table.
        command: what measures it again.
        created: when, ISO 8601 in UTC.
        environment: machine, versions, commit, load.
        workload: what the arms worked on.
        series: measured quantities by name.
        yardstick: the name of the series that the ratios are to.
        ratios: by name of a series, how many times better than the yardstick it was, repeat by repeat.
        refused: what was not measured, with the reason.
        notes: what a reader of the figures has to know.
    """

    benchmark: str
    title: str
    command: str
    created: str
    environment: dict[str, Any]
    workload: dict[str, Any]
    series: dict[str, Series]
    yardstick: str
    ratios: dict[str, Series]
    refused: dict[str, str]
    notes: list[str]

    def __post_init__(self) -> None:
        """Checks that the ratios follow from the series.

        Raises:
            DataError: they do not, or the yardstick is not among the series.
        """
        if self.yardstick not in self.series:
            raise DataError(f"the yardstick {self.yardstick!r} is none of the series {sorted(self.series)}")
        unknown = sorted(set(self.ratios) - set(self.series))
        if unknown:
            raise DataError(f"ratios of {unknown}, which were not measured")
        for name, found in self.ratios.items():
            wanted = times_better(self.series[name], self.series[self.yardstick])
            is_close = [math.isclose(*pair, rel_tol=1e-9) for pair in zip(wanted.values, found.values, strict=False)]
            if len(found.values) != len(wanted.values) or not all(is_close):
                raise DataError(f"the ratios of {name!r} do not follow from its values: measure again")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        fields = {name: getattr(self, name) for name in _TYPES}
        series = {name: series.to_dict() for name, series in self.series.items()}
        ratios = {name: series.to_dict() for name, series in self.ratios.items()}
        return {"schema_version": SCHEMA_VERSION, **fields, "series": series, "ratios": ratios}

    @classmethod
    def from_dict(cls, given: Any) -> Record:
        """What `to_dict` made.

        Raises:
            DataError: it has another schema version or shape, or figures that contradict each other.
        """
        if not isinstance(given, dict) or given.get("schema_version") != SCHEMA_VERSION:
            raise DataError(f"is not a record of schema version {SCHEMA_VERSION}: measure again")
        for name, kind in _TYPES.items():
            if not isinstance(given.get(name), kind):
                raise DataError(f"{name!r} must be a {kind.__name__}, not {given.get(name)!r:.60}")
        _check_finite(given)
        _check_shown(given)
        series = {name: Series.from_dict(value) for name, value in given["series"].items()}
        ratios = {name: Series.from_dict(value) for name, value in given["ratios"].items()}
        fields: dict[str, Any] = {**{name: given[name] for name in _TYPES}, "series": series, "ratios": ratios}
        return cls(**fields)


_TYPES: dict[str, type] = {
    "benchmark": str,
    "title": str,
    "command": str,
    "created": str,
    "environment": dict,
    "workload": dict,
    "series": dict,
    "yardstick": str,
    "ratios": dict,
    "refused": dict,
    "notes": list,
}


_ENVIRONMENT: dict[str, tuple[type, ...]] = {
    "cpu": (str,),
    "device": (str,),
    "cores": (int,),
    "torch": (str,),
    "python": (str,),
    "fasttrain": (str,),
    "commit": (str, type(None)),
    "has_uncommitted_changes": (bool, type(None)),
    "load_average": (int, float),
    "load_average_after": (int, float),
}
"""What the tables show of the environment; more may be in it."""


def times_better(series: Series, yardstick: Series) -> Series:
    """How many times better a quantity is than the yardstick, pair by pair in the same repeat.

    Raises:
        DataError: they differ in unit or in the number of repeats, so that there are no pairs.
    """
    if series.unit != yardstick.unit or len(series.values) != len(yardstick.values):
        raise DataError(f"{series.description!r} and {yardstick.description!r} make no pairs: units or repeats differ")
    pairs = zip(series.values, yardstick.values, strict=True)
    is_cost = series.unit in LESS_IS_BETTER
    values = tuple(theirs / ours if is_cost else ours / theirs for ours, theirs in pairs)
    return Series(description=series.description, unit="x", values=values)


def ratios_to(series: dict[str, Series], yardstick: str, names: Sequence[str]) -> dict[str, Series]:
    """The ratios of the named series to the yardstick, by name."""
    return {name: times_better(series[name], series[yardstick]) for name in names}


def write_record(record: Record, path: Path) -> None:
    """Writes a record as JSON, in place of an older one at once. Folders above it are made.

    Raises:
        DataError: it cannot be written there.
    """
    content = json.dumps(record.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, content + "\n", "the record")


def read_record(path: Path) -> Record:
    """Reads a record.

    Raises:
        DataError: the file is not one; it is named.
    """
    try:
        return Record.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except DataError as error:
        raise DataError(error.problem, file=str(path)) from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read as JSON: {error}", file=str(path)) from error


def is_number(value: object) -> bool:
    """Whether a value is a number; a bool is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_shown(given: dict[str, Any]) -> None:
    """Refuses what the tables could not show."""
    for name, kinds in _ENVIRONMENT.items():
        if name not in given["environment"] or not isinstance(given["environment"][name], kinds):
            raise DataError(f"the environment's {name!r} is missing or of another type: measure again")
    if not all(isinstance(note, str) for note in [*given["notes"], *given["refused"].values()]):
        raise DataError("notes, and the reasons of refused arms, must be text")


def _check_finite(node: Any) -> None:
    if isinstance(node, float) and not math.isfinite(node):
        raise DataError("holds a number that is not finite: measure again")
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _check_finite(child)


SHOWN_OF_ENVIRONMENT = ("cpu", "device", "torch", "python", "fasttrain")


@contextmanager
def record_node(path: Path, kind: str, schema_version: int) -> Generator[Node]:
    """The content of a record's file, whose kind, schema version and environment have been checked.

    Raises:
        DataError: the file is no such record, also where what is read from the node shows it; the file is named.
    """
    content = read_json(path)
    try:
        node = Node(content, "the record")
        if node.text("kind") != kind or node.integer("schema_version") != schema_version:
            raise DataError(f"is not a record of {kind} of schema version {schema_version}: measure again")
        environment = node.node("environment")
        for name in SHOWN_OF_ENVIRONMENT:
            environment.text(name)
        environment.integer("cores", 1)
        yield node
    except DataError as error:
        raise DataError(error.problem, file=str(path)) from None
