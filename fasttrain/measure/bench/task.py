"""What a parent and the fresh process of a block tell each other, as JSON files."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fasttrain.measure.bench.record import BlockFigures
from fasttrain.measure.strict import Node

__all__ = ["BlockResult", "BlockTask"]


@dataclass(frozen=True, kw_only=True)
class BlockTask:
    """One arm, once.

    Attributes:
        source: of the arm, as `find_factory` takes it.
        workload: the name of the job.
        device: "cpu", "cuda" or "cuda:N".
        threads: torch's.
        reference: running losses that the arm must give; None: it is the reference, and nothing is timed.
        warmup_s: least seconds of steps before any is timed.
        timed_s: least seconds of timed steps.
        block: number of the block.
        position: of its turn in the block.
    """

    source: str
    workload: str
    device: str
    threads: int
    reference: tuple[float, ...] | None
    warmup_s: float = 0.0
    timed_s: float = 0.0
    block: int = 0
    position: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> BlockTask:
        """What `to_dict` made, once it went through JSON."""
        fields: dict[str, Any] = dict(given)
        if fields["reference"] is not None:
            fields["reference"] = tuple(fields["reference"])
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class BlockResult:
    """What came of it.

    Attributes:
        refused: why the arm cannot run or must not be timed; nothing else is set then.
        died: how a process ended that left no result; nothing but its last words is set then.
        last_words: of a process that died.
        workload: what the job tells of itself.
        tolerance: of the job.
        description: of the arm.
        agreement: the largest relative difference to the reference's running losses; None: another algorithm.
        running_losses: of a reference.
        figures: of an arm that was timed.
    """

    refused: str | None = None
    died: str | None = None
    last_words: str = ""
    workload: dict[str, Any] | None = None
    tolerance: float | None = None
    description: str = ""
    agreement: float | None = None
    running_losses: tuple[float, ...] = ()
    figures: BlockFigures | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, given: Any) -> BlockResult:
        """What `to_dict` made, once it went through JSON.

        Raises:
            DataError: it has another shape: a user's arm runs in the process that wrote it.
        """
        node = Node(given, "the block's result")
        return cls(
            refused=node.text_or_none("refused"),
            died=node.text_or_none("died"),
            last_words=node.text("last_words"),
            workload=node.plain("workload") if node.has("workload") else None,
            tolerance=node.number_or_none("tolerance"),
            description=node.text("description"),
            agreement=node.number_or_none("agreement"),
            running_losses=node.numbers("running_losses"),
            figures=BlockFigures.from_node(node.node("figures")) if node.has("figures") else None,
        )
