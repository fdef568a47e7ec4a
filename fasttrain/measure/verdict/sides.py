"""The two sides of a comparison: where they are read from, and whether they can be compared at all."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttrain.comparison import Difference, Side
from fasttrain.errors import ConfigError, DataError
from fasttrain.measure.bench.record import ArmRecord, BenchRecord, read_record
from fasttrain.measure.profiling.file import read_profile
from fasttrain.measure.profiling.record import Profile
from fasttrain.measure.strict import read_json

__all__ = [
    "REVISIONS",
    "BenchArm",
    "StoredProfile",
    "contradictions",
    "differences_of",
    "file_of",
    "open_profile",
    "open_side",
]

HARDWARE = ("cpu", "cores", "device")
VERSIONS = ("python", "torch", "numpy", "cuda", "driver")
"""Of the environment: with another of these, times cannot be compared. Version and commit of fasttrain may differ."""

WHO_WORKS = ("arm", "engine")
"""In a profile's workload: what did the work, which is what is compared, and no part of the work itself."""

ALWAYS_DIFFERENT = ("load_average", "load_average_after")
"""Of the environment: says nothing by being different."""

REVISIONS = "revisions"
"""Kind of a record that holds both sides: two revisions, measured live."""

DEFAULT_ARM = "auto"
"""Of a benchmark's record that is given without an arm: what a user gets who asks for nothing."""

MOST_SHOWN = 120


@dataclass(frozen=True, kw_only=True)
class BenchArm:
    """An arm of a benchmark's record."""

    path: Path
    label: str
    record: BenchRecord

    @property
    def arm(self) -> ArmRecord:
        """Its figures."""
        return self.record.arms[self.label]

    def seconds(self, label: str | None = None, *, is_whole: bool = False) -> dict[int, float]:
        """Seconds a row by block.

        Args:
            label: of another arm of its record; this one's by default.
            is_whole: by all timed steps together, in place of the median turns.
        """
        arm = self.arm if label is None else self.record.arms[label]
        return {
            block.block: (block.seconds / block.steps if is_whole else block.step_s) / block.samples_per_step
            for block in arm.blocks
        }

    def side(self) -> Side:
        """What a comparison keeps of it."""
        record = self.record
        return Side(
            label=self.label,
            source=str(self.path),
            created=record.created,
            command=record.command,
            step_s=self.arm.step_s,
            workload=record.workload,
            environment={**record.environment, "threads": record.design.threads_of(self.label)},
        )


@dataclass(frozen=True, kw_only=True)
class StoredProfile:
    """A profile and where it is from."""

    path: Path
    profile: Profile

    def side(self) -> Side:
        """What a comparison keeps of it."""
        profile = self.profile
        return Side(
            label=profile.name,
            source=str(self.path),
            created=profile.created,
            command=profile.command,
            step_s=profile.step_us / 1e6,
            workload=profile.workload,
            environment=profile.environment,
        )


def open_side(given: str) -> BenchArm | StoredProfile:
    """Reads a file, or an arm of one that is given as `file:arm`.

    Raises:
        DataError: there is no such file, or it is no record.
        ConfigError: the record has no such arm, or is of both sides.
    """
    path, label = _split(given)
    content = read_json(path)
    kind = content.get("kind") if isinstance(content, Mapping) else None
    if kind == "profile" and label is None:
        return open_profile(path)
    if kind == "profile":
        raise ConfigError(f"{given}: a profile has no arms; give the file alone")
    if kind == REVISIONS:
        raise ConfigError(f"{given} holds two revisions, which are A and B: give the file alone")
    if kind != "bench":
        raise DataError("is neither a benchmark's record nor a profile", file=str(path))
    record = read_record(path)
    return BenchArm(path=path, label=_known_arm(record, label or DEFAULT_ARM, path), record=record)


def file_of(given: str) -> Path:
    """The file of a side that is given as a file or as `file:arm`."""
    return _split(given)[0]


def open_profile(path: Path) -> StoredProfile:
    """Reads a profile.

    Raises:
        DataError: it is none; the file is named.
    """
    return StoredProfile(path=path, profile=read_profile(path))


def differences_of(a: Side, b: Side, *, harmless: Collection[str] = ()) -> list[Difference]:
    """What differs in the work and in the environment, the fatal ones first.

    Args:
        a: one of the two.
        b: the other one.
        harmless: of the environment: what else may differ.
    """
    fatal = {*HARDWARE, *VERSIONS, "threads"} - {*harmless}
    found = [
        _difference(f"work: {name}", a.workload.get(name), b.workload.get(name), is_fatal=True)
        for name in {**a.workload, **b.workload}
        if a.workload.get(name) != b.workload.get(name) and name not in WHO_WORKS
    ]
    for name in {**a.environment, **b.environment}:
        ours, theirs = a.environment.get(name), b.environment.get(name)
        if ours != theirs and name not in ALWAYS_DIFFERENT:
            found.append(_difference(name, ours, theirs, is_fatal=name in fatal))
    return sorted(found, key=lambda each: not each.is_fatal)


def contradictions(a: Side, b: Side) -> list[Difference]:
    """The fatal differences in what both sides tell; what only one of them tells contradicts nothing."""
    told = {"work: " + name for name in {*a.workload} & {*b.workload}} | {*a.environment} & {*b.environment}
    return [each for each in differences_of(a, b) if each.is_fatal and each.name in told]


def _split(given: str) -> tuple[Path, str | None]:
    """A file and an arm. Both may have colons in their names: it is the files that there are that tell."""
    if ":" not in given or Path(given).exists():
        return Path(given), None
    parts = given.split(":")
    splits = [(Path(":".join(parts[:i])), ":".join(parts[i:])) for i in range(1, len(parts))]
    return next((each for each in splits if each[0].is_file()), splits[0])


def _known_arm(record: BenchRecord, label: str, path: Path) -> str:
    if label in record.arms:
        return label
    if label in record.refused:
        raise ConfigError(f"{path}: arm {label!r} was not timed: {record.refused[label]}")
    raise ConfigError(f"{path}: no arm {label!r:.80}; use {path}:ARM with one of {', '.join(record.arms)}")


def _difference(name: str, a: Any, b: Any, *, is_fatal: bool) -> Difference:
    return Difference(name=name, a=_shown(a), b=_shown(b), is_fatal=is_fatal)


def _shown(value: Any) -> str:
    if value is None:
        return "not told"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 1] + "…"
