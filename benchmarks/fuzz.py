"""The record of random training jobs, run by FastLoop and by a plain PyTorch loop; its checks and its section.

`python -m tests.step.fuzzing record 5000 100 FILE` makes it.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.records import record_node
from fasttrain.measure.bench.summary import command, conditions_of, table, text
from fasttrain.measure.strict import Node

KIND = "fuzz"

SCHEMA_VERSION = 1
"""Raise it when a field changes its meaning, appears or goes; files of another version are refused."""

FINE = ("same", "refused", "job", "excused")
"""Outcomes that are no finding; "job": the job fails with a plain loop too."""

OBJECTS = ("objects", "batch", "process", "changed by a refusal")
"""Findings of which an object or a setting is otherwise than after the plain loop."""


@dataclass
class Outcome:
    """What came of a job: "same", "refused" (with the reason), "job" (the job itself fails) or a finding."""

    kind: str
    detail: str = ""
    by_program: int = 0
    traces: int = 0
    spans: int = 0
    worst: float = 0.0


@dataclass(kw_only=True)
class Draws:
    """What came of some jobs.

    Attributes:
        draws: how many.
        cpu_s: processor time, of compiling children too.
        outcomes: how many of each kind.
        refusals: of those refused, how many for each reason.
        excused: of those excused, likewise.
        draws_by_program: jobs of which some steps ran by program.
        draws_by_spans: jobs of which several steps ran in one call.
        traces: programs.
        steps_by_program: steps run by program.
        worst_relative_difference: the largest, of losses, metrics and all tensors.
        objects_changed: findings of the kinds `OBJECTS`.
        findings: what was found, to look into.
    """

    draws: int = 0
    cpu_s: float = 0.0
    outcomes: dict[str, int] = field(default_factory=dict[str, int])
    refusals: dict[str, int] = field(default_factory=dict[str, int])
    excused: dict[str, int] = field(default_factory=dict[str, int])
    draws_by_program: int = 0
    draws_by_spans: int = 0
    traces: int = 0
    steps_by_program: int = 0
    worst_relative_difference: float = 0.0
    objects_changed: int = 0
    findings: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def add(self, seed: int, outcome: Outcome, about: list[str]) -> None:
        """Counts a job."""
        _count(self.outcomes, {outcome.kind: 1})
        self.draws_by_program += outcome.by_program > 0
        self.draws_by_spans += outcome.spans > 0
        self.traces += outcome.traces
        self.steps_by_program += outcome.by_program
        self.worst_relative_difference = max(self.worst_relative_difference, outcome.worst)
        self.objects_changed += outcome.kind in OBJECTS
        if outcome.kind in ("refused", "excused"):
            _count(self.refusals if outcome.kind == "refused" else self.excused, {family(outcome.detail): 1})
        elif outcome.kind not in FINE:
            found = {"seed": seed, "kind": outcome.kind, "detail": outcome.detail[-600:], "about": about}
            self.findings.append(found)

    def merge(self, other: Draws) -> None:
        """Adds other jobs."""
        for name in ("draws", "cpu_s", "draws_by_program", "draws_by_spans", "traces", "steps_by_program"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.objects_changed += other.objects_changed
        self.worst_relative_difference = max(self.worst_relative_difference, other.worst_relative_difference)
        for name in ("outcomes", "refusals", "excused"):
            _count(getattr(self, name), getattr(other, name))
        self.findings += other.findings


@dataclass(frozen=True, kw_only=True)
class FuzzRecord:
    """What came of all draws.

    Attributes:
        command: what makes it again.
        created: when, ISO 8601 in UTC.
        environment: machine, versions, commit, load.
        tolerance: relative, for the same.
        graphs: the captured graphs ran, operator by operator.
        compiled: of these jobs, some whose programs were compiled.
    """

    command: str
    created: str
    environment: dict[str, Any]
    tolerance: float
    graphs: Draws
    compiled: Draws

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"kind": KIND, "schema_version": SCHEMA_VERSION, **asdict(self)}


def family(reason: str) -> str:
    """A reason without what is of one job: names, lines, numbers."""
    reason = re.sub(r"^epoch \d+: ", "", reason)
    reason = re.sub(r": ['\"].*|[;,(].*", "", reason, flags=re.DOTALL)
    return " ".join("..." if re.search(r"\d|^fuzz_|['\"]", word) else word for word in reason.split())[:100]


def section_of(path: Path) -> str:
    """The section of benchmarks/README.md that a record's file gives; raises `DataError`."""
    with record_node(path, KIND, SCHEMA_VERSION) as node:
        rows = [row("captured graphs", node.node("graphs")), row("compiled", node.node("compiled"))]
        columns = ["", "jobs", "by program", "several steps a call", "the same", "refused", "excused",
                   "fail in PyTorch too", "different", "largest difference"]  # fmt: skip
        return (
            "## Random training jobs, cpu\n\nJobs drawn at random (models, optimizers, where a value stays, what "
            "changes between steps), trained by FastLoop and by a plain PyTorch loop in double precision; the same: "
            f"losses and all objects within a relative {node.number('tolerance'):g}; excused: a program that the "
            "comparison with eager refuses for a known reason. The record is written anew after every few jobs and may "
            f"be ended at any time: the table counts the jobs drawn.\n\n{table(columns, rows)}\n"
            f"{text(conditions_of(node.plain('environment'), node.text('created')))}. "
            f"Made by {command(node.text('command'))}.\n"
        )


def row(what: str, node: Node) -> list[str]:
    """A row of the table."""
    outcomes = Counter({str(name): int(count) for name, count in node.plain("outcomes").items()})
    total = node.integer("draws")
    fine = [outcomes[kind] for kind in ("same", "refused", "excused", "job")]
    counts = [total, node.integer("draws_by_program"), node.integer("draws_by_spans"), *fine, total - sum(fine)]
    return [what, *(f"{count:,}" for count in counts), f"{node.number('worst_relative_difference'):.1e}"]


def _count(found: dict[str, int], more: dict[str, int]) -> None:
    for name, count in more.items():
        found[name] = found.get(name, 0) + count
