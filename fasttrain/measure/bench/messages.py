"""What a parent and the process of an arm tell each other, as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fasttrain.errors import FasttrainError
from fasttrain.measure.strict import Node

__all__ = ["ArmState", "ArmTask", "ProcessDiedError", "Slice", "Started"]


class ProcessDiedError(FasttrainError):
    """The process of an arm ended, or did not answer in time.

    Args:
        how: in a few words.
        last_words: more of what it said last.
    """

    def __init__(self, how: str, last_words: str = "") -> None:
        super().__init__(how)
        self.last_words = last_words


@dataclass(frozen=True, kw_only=True)
class ArmTask:
    """What a process is to run.

    Attributes:
        source: of the arm, as `find_factory` takes it.
        workload: the name of the job.
        device: "cpu", "cuda" or "cuda:N".
        threads: torch's.
        reference: running losses that the arm must give; None: it is the reference, and is not timed.
        warmup_s: least seconds of steps before any is timed.
    """

    source: str
    workload: str
    device: str
    threads: int
    reference: tuple[float, ...] | None
    warmup_s: float = 0.0

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> ArmTask:
        """What `asdict` made, once it went through JSON."""
        fields: dict[str, Any] = {**given}
        fields["reference"] = None if given["reference"] is None else tuple(given["reference"])
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class Started:
    """What a process tells once its arm is ready to be timed.

    Attributes:
        refused: why the arm cannot run or must not be timed; nothing else is set then.
        workload: what the job tells of itself.
        tolerance: of the job.
        running_losses: of a reference.
        description: of the arm.
        agreement: the largest relative difference to the reference's running losses; None: another algorithm.
        samples_per_step: rows that a step trains on.
        import_s: from the start of the process until everything was imported.
        first_step_s: the first step, with what it compiles.
    """

    refused: str | None = None
    workload: dict[str, Any] | None = None
    tolerance: float = 0.0
    running_losses: tuple[float, ...] = ()
    description: str = ""
    agreement: float | None = None
    samples_per_step: int = 1
    import_s: float = 0.0
    first_step_s: float = 0.0

    @classmethod
    def from_node(cls, node: Node) -> Started:
        """Reads one; raises `DataError`: a user's arm runs in the process that wrote it."""
        return cls(
            refused=node.text_or_none("refused"),
            workload=node.plain("workload") if node.has("workload") else None,
            tolerance=node.number("tolerance"),
            running_losses=node.numbers("running_losses"),
            description=node.text("description"),
            agreement=node.number_or_none("agreement"),
            samples_per_step=node.integer("samples_per_step", 1),
            import_s=node.number("import_s"),
            first_step_s=node.number("first_step_s"),
        )


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Some steps in a row, until the device was done.

    Attributes:
        seconds: that they took.
        steps: how many.
        waited_s: of these, for a core.
        others_s: before that, since its slice before: the others' turns.
        awake_s: CPU seconds that its process used in these.
    """

    seconds: float
    steps: int
    waited_s: float
    others_s: float
    awake_s: float

    @classmethod
    def from_node(cls, node: Node) -> Slice:
        """Reads one; raises `DataError`."""
        return cls(
            seconds=node.number("seconds", is_positive=True),
            steps=node.integer("steps", 1),
            waited_s=node.number("waited_s"),
            others_s=node.number("others_s"),
            awake_s=node.number("awake_s"),
        )


@dataclass(frozen=True, kw_only=True)
class ArmState:
    """What is known of an arm after its steps.

    Attributes:
        compile_s: waiting for a trace or a compiler so far; None where the arm knows of none.
        peak_bytes: of the process (CPU) or of the device's allocator (CUDA); None: unknown.
        engine: what ran the steps in the end, and why; None where that is no question.
    """

    compile_s: float | None
    peak_bytes: int | None
    engine: str | None

    @classmethod
    def from_node(cls, node: Node) -> ArmState:
        """Reads one; raises `DataError`."""
        return cls(
            compile_s=node.number_or_none("compile_s"),
            peak_bytes=node.integer_or_none("peak_bytes"),
            engine=node.text_or_none("engine"),
        )
