"""The record of two revisions: one benchmark with an arm of each, and what is each revision's own, as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fasttrain.errors import DataError
from fasttrain.measure.bench.record import BenchRecord
from fasttrain.measure.strict import Node, read_json
from fasttrain.measure.verdict.sides import REVISIONS, BenchArm

__all__ = ["RevisionArm", "RevisionRecord", "read_revisions"]

SCHEMA_VERSION = 1
"""Raise it when a field changes its meaning, appears or goes; files of another version are refused."""


@dataclass(frozen=True, kw_only=True)
class RevisionArm:
    """What is a revision's own.

    Attributes:
        label: of its arm in the benchmark.
        commit: its full hash.
        workload: what it trained, as its own job describes it.
    """

    label: str
    commit: str
    workload: dict[str, Any]

    @classmethod
    def from_node(cls, node: Node) -> RevisionArm:
        """Reads one; raises `DataError`."""
        return cls(label=node.text("label"), commit=node.text("commit"), workload=node.plain("workload"))


@dataclass(frozen=True, kw_only=True)
class RevisionRecord:
    """Two revisions that were measured in the same blocks.

    Attributes:
        revisions: A and B.
        bench: the blocks of both; its work and its commit are of neither.
    """

    revisions: tuple[RevisionArm, RevisionArm]
    bench: BenchRecord

    def sides(self, sources: tuple[Path, Path]) -> tuple[BenchArm, BenchArm]:
        """A and B as arms of a benchmark, each with its own work and commit.

        Args:
            sources: where A and B are said to be from.
        """
        a, b = (self._side(own, source) for own, source in zip(self.revisions, sources, strict=True))
        return a, b

    def _side(self, own: RevisionArm, source: Path) -> BenchArm:
        environment = {**self.bench.environment, "commit": own.commit, "has_uncommitted_changes": False}
        record = replace(self.bench, workload=own.workload, environment=environment)
        return BenchArm(path=source, label=own.label, record=record)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": REVISIONS,
            "revisions": [asdict(own) for own in self.revisions],
            "bench": self.bench.to_dict(),
        }

    @classmethod
    def from_dict(cls, given: Any) -> RevisionRecord:
        """What `to_dict` made, once it went through JSON.

        Raises:
            DataError: it has another schema version or shape, or a value that cannot be.
        """
        node = Node(given, "the record")
        if node.text("kind") != REVISIONS:
            kind = node.text("kind")
            raise DataError(f"is a record of kind {kind!r:.40}, not of two revisions: give two files or arms, A and B")
        if not node.has("schema_version") or node.integer("schema_version") != SCHEMA_VERSION:
            raise DataError(f"is not a record of two revisions of schema version {SCHEMA_VERSION}: measure again")
        node.node("bench")
        bench = BenchRecord.from_dict(given["bench"])
        found = [RevisionArm.from_node(each) for each in node.nodes("revisions")]
        labels = [own.label for own in found]
        if len(labels) != 2 or len({*labels} & {*bench.arms}) != 2:
            raise DataError(f"needs two revisions, each with an arm of its own, not {labels!r:.80}")
        return cls(revisions=(found[0], found[1]), bench=bench)


def read_revisions(path: Path) -> RevisionRecord:
    """Reads a record of two revisions.

    Raises:
        DataError: the file is not one; it is named.
    """
    content = read_json(path)
    try:
        return RevisionRecord.from_dict(content)
    except DataError as error:
        raise DataError(error.problem, file=str(path)) from None
