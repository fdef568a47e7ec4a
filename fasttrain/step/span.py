"""Several steps over the rows of resident data, traced: what they hold for, and how many are worth one launch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fasttrain.data.ragged import Ragged
from fasttrain.data.resident import ResidentBatches, Span
from fasttrain.errors import EngineError
from fasttrain.step.recorded import TracedGraph
from fasttrain.step.spec import StepSpec
from fasttrain.step.trace import Mismatch, TracedStep
from fasttrain.step.unroll import Unrolling, takes_rows

__all__ = ["LEAST_STEPS", "TracedSpan", "fewest_launches", "may_have_spans", "most_steps"]

MOST_STEPS, LEAST_STEPS = 16, 4
"""Steps of a span. From 8 to 16 a review step gains another 6%, and compiling takes twice as long."""

MOST_NODES = 2_000
"""Operators of all steps together: what compiles in about a minute."""

MOST_BYTES = 1 << 20
"""Of a step's state and batch: a step that moves more takes so long that what a launch costs does not show."""


def most_steps(step: TracedStep, batch: Sequence[Tensor]) -> int:
    """How many steps may be one program, by the size of a step alone; 1 where a call does not weigh in it.

    On a GPU it is always 1: several steps are one CUDA graph there.

    Args:
        step: as it was traced.
        batch: the tensors of its batch.
    """
    if step.spec.device.type != "cpu" or not step.is_whole:
        return 1
    if sum(tensor.nbytes for tensor in (*step.tensors, *batch)) > MOST_BYTES:
        return 1
    calls = [node.target for node in step.parts[0].graph.graph.nodes if node.op == "call_function"]
    if torch.ops.aten.convolution.default in calls:
        return 1
    steps = min(MOST_STEPS, MOST_NODES // len(calls))
    return steps if steps >= LEAST_STEPS else 1


def may_have_spans(batches: Iterable[Any]) -> bool:
    """Whether some of these batches may be given to an engine as a span."""
    return isinstance(batches, ResidentBatches) and batches.num_whole >= LEAST_STEPS


def fewest_launches(sizes: Iterable[int], num_batches: int) -> int | None:
    """The size of launches by which an epoch takes fewest, its remainder batch by batch; the largest of equals.

    Args:
        sizes: to choose from.
        num_batches: of the epoch.

    Returns:
        The size, or None where all are larger than the epoch.
    """
    fitting = [size for size in sizes if size <= num_batches]
    return min(fitting, key=lambda size: (num_batches // size + num_batches % size, -size), default=None)


MOST_PADDED = 1 << 22
"""Entries of a batch whose rows are padded to the longest of all."""


class TracedSpan:
    """Several steps over the rows of one resident source as one graph, and what it holds for.

    Args:
        step: the step, whose guards are the span's.
        batch: one of its batches.
        source: whose rows.
        steps: how many.

    Attributes:
        spec: of the step.
        step, source, steps: see above.
        tables: the tensors of the source's columns.
        parts: the one graph. It takes the step's state and options, the source's columns, the numbers of the rows of
            all batches, [steps * batch size], and closed-over tensors; it returns the losses, [steps].
        due: which of the parts is to run: the one.

    Raises:
        EngineError: batches are not what the source's columns give, or need more of its rows than their sums.
    """

    due = 0

    def __init__(self, step: TracedStep, batch: Any, source: ResidentBatches, steps: int) -> None:
        self.spec: StepSpec = step.spec
        self.step = step
        self.source = source
        self.steps = steps
        columns = _read_columns(source.columns, step.leaf_places)
        self.tables = [each for column in columns for each in (column if isinstance(column, Ragged) else (column,))]
        leaves, standing = step.leaves(batch), step.standing_inputs()
        if leaves is None or isinstance(standing, Mismatch):
            raise EngineError("the step has changed since it was traced")
        _refuse_other_leaves(leaves, columns, source.batch_size)
        graph = step.parts[0].graph
        unrolling = Unrolling.of(len(standing), columns, steps, source.batch_size, _padded_to(source))
        if not takes_rows(graph, unrolling):
            raise EngineError("rows of unequal length are used otherwise than by sums")
        rows = torch.zeros(steps * source.batch_size, dtype=torch.int64, device=source.device)
        inputs = [*standing, *self.tables, rows, *step.parts[0].closed_over]
        self._of_rows = len(standing) + len(self.tables)
        self._last = tuple(inputs)
        self.parts = [TracedGraph(graph, inputs, [frozenset()] * len(inputs), unrolling, anywhere=[self._of_rows])]

    def inputs(self, span: Span, *, is_checked: bool = False) -> list[Tensor] | Mismatch:
        """The graph's inputs for a span, or why it does not hold. Makes no host read.

        Args:
            span: see above.
            is_checked: whether it held for the span just before, and no code of the user's has run since.
        """
        return self.inputs_of(span.source, span.rows, is_checked=is_checked)

    def inputs_of(self, source: ResidentBatches, rows: Tensor, *, is_checked: bool = False) -> list[Tensor] | Mismatch:
        """The same for the rows of all batches, [steps * batch size], of a source."""
        if is_checked:
            return [rows if at == self._of_rows else tensor for at, tensor in enumerate(self._last)]
        if source is not self.source or len(rows) != self.steps * source.batch_size:
            return Mismatch("the resident data")
        standing = self.step.standing_inputs()
        if isinstance(standing, Mismatch):
            return standing
        found = [*standing, *self.tables, rows, *self.step.parts[0].closed_over]
        reason = self.parts[0].differ(found)
        if reason is not None:
            return Mismatch(reason)
        self._last = tuple(found)  # a program takes its list of inputs for its own
        return found


def _padded_to(source: ResidentBatches) -> int | None:
    """What rows of unequal length are padded to; None where they need not be, or there are none.

    Raises:
        EngineError: that would be far more than there is in them.
    """
    if source.device.type == "cpu" or not source.longest:
        return None
    if source.longest * source.batch_size > MOST_PADDED:
        raise EngineError(
            f"the longest row has {source.longest:,} entries, and {source.batch_size} rows padded to it are too many"
        )
    return source.longest


def _read_columns(columns: Sequence[Tensor | Ragged], places: Sequence[int | None]) -> list[Tensor | Ragged]:
    """The columns that forward reads: those whose tensors have these numbers among all tensors of a batch.

    Raises:
        EngineError: it reads one of the two tensors of rows of unequal length without the other.
    """
    found: list[Tensor | Ragged] = []
    first = 0
    for column in columns:
        of_column = range(first, first + (2 if isinstance(column, Ragged) else 1))
        first = of_column.stop
        if all(place in places for place in of_column):
            found.append(column)
        elif any(place in places for place in of_column):
            raise EngineError("rows of unequal length are used otherwise than by sums")
    return found


def _refuse_other_leaves(leaves: Sequence[Tensor], columns: Sequence[Tensor | Ragged], rows: int) -> None:
    """Raises EngineError where the tensors of a batch are not, one by one, what is gathered from the columns."""
    wanted = [each for column in columns for each in _gathered(column, rows)]
    found = [(leaf.dtype, leaf.shape) for leaf in leaves]
    are_alike = [dtype == got[0] and size in (None, got[1]) for (dtype, size), got in zip(wanted, found, strict=False)]
    if len(found) != len(wanted) or not all(are_alike):
        raise EngineError("batches hold other tensors than the columns that they are gathered from")


def _gathered(column: Tensor | Ragged, rows: int) -> list[tuple[torch.dtype, torch.Size | None]]:
    """Dtype and size (None: any) of each tensor that a batch has of a column."""
    if isinstance(column, Ragged):
        return [(column.values.dtype, None), (column.offsets.dtype, torch.Size([rows + 1]))]
    return [(column.dtype, torch.Size([rows, *column.shape[1:]]))]
