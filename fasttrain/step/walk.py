"""Multi-step training over resident data: one compiled step that takes its batch by a cursor and advances the cursor.

    TracedStep -> TracedWalk (whose graph is rewritten by a Walk) -> WalkingProgram, or CapturedWalk on CUDA

K steps are K calls of one program, whatever K is: the program's inputs hold the order of the rows of many batches, the
number of the next batch (the cursor), and a column for the losses.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fasttrain.data.columns import Column, ColumnKind, carrier
from fasttrain.data.resident import ResidentBatches, Span
from fasttrain.errors import EngineError, first_line
from fasttrain.step.eager import raise_index_error
from fasttrain.step.function import TracedGraph
from fasttrain.step.kernels import define_operators
from fasttrain.step.program import Runner, load_runner
from fasttrain.step.torch_private import is_changed, native_loop
from fasttrain.step.trace import Mismatch, TracedStep

__all__ = [
    "StepsFailedError",
    "TracedWalk",
    "Walk",
    "WalkState",
    "WalkingProgram",
    "kind_of",
    "raise_failed",
    "takes_rows",
]

_aten = torch.ops.aten

MOST_STEPS = 1_024
"""Steps of a call. It is a constant, so that the program does not depend on the length of an epoch; at 25 us a step,
the least that was measured, a call then takes 26 ms."""

LEAST_STEPS, MOST_ENTRIES = 64, 1 << 20
"""Where batches are so large that the order of `MOST_STEPS` of them would have more entries than this, the order holds
fewer batches, but never fewer than 64: a CUDA graph of 16 steps is run three times before it is captured."""

VALUES_AN_ENTRY = 8
"""Values of a sparse column's rows for each that is not zero, from which on products are made of the entries alone."""

MOST_PADDED = 1 << 22
"""Entries of a batch whose rows are padded to the longest of all."""


class StepsFailedError(EngineError):
    """A step failed after it may have changed some of the state. Nothing may go on from that state, eagerly or not."""


class WalkState(NamedTuple):
    """The inputs of a walking program that are its own.

    Attributes:
        order: the numbers of the rows of each batch, [most steps, batch rows], int64.
        cursor: which batch comes next, [1], int64; the program adds 1.
        losses: of each step, [most steps]; the program writes one.
    """

    order: Tensor
    cursor: Tensor
    losses: Tensor

    def begin(self, span: Span) -> None:
        """Puts in the rows of a span, and the cursor on the first of its batches. No host read."""
        self.order[: span.steps].view(-1).copy_(span.rows, non_blocking=True)
        self.cursor.zero_()


@dataclass(frozen=True, kw_only=True)
class Walk:
    """How the graph of a walking step is made from the graph of a step on a batch.

    Attributes:
        first_leaf: which of the step's inputs is the first tensor of a batch.
        kinds: of the columns that batches are gathered from, in the order of the batch's tensors.
        rows: in a batch.
        longest: entries of the longest row that has entries of its own number, where the graph is to hold for no longer
            ones; None: for any.
        multiplies: for each column, whether products of matrices with its rows are made from their entries alone.
    """

    first_leaf: int
    kinds: tuple[ColumnKind, ...]
    rows: int
    longest: int | None = None
    multiplies: tuple[bool, ...] = ()

    def leaves(self, graph: GraphModule) -> tuple[list[Node], list[Node], list[Node]]:
        """The inputs of a step's graph: those before a batch's tensors, these, and those after."""
        nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
        end = self.first_leaf + sum(kind.num_leaves for kind in self.kinds)
        return nodes[: self.first_leaf], nodes[self.first_leaf : end], nodes[end:]

    def ragged_leaves(self, graph: GraphModule) -> set[Node]:
        """The inputs of a step's graph that are a batch's rows of unequal length."""
        _, leaves, _ = self.leaves(graph)
        are_ragged = [kind.form == "ragged" for kind in self.kinds for _ in range(kind.num_leaves)]
        return {leaf for leaf, is_ragged in zip(leaves, are_ragged, strict=True) if is_ragged}

    def __call__(self, graph: GraphModule) -> GraphModule:
        """The graph of a step that takes its batch from the columns by itself.

        Args:
            graph: of a step on a batch, which `takes_rows`.

        Returns:
            A graph that takes the columns' tables in place of the batch's tensors and, after them, the tensors of a
            `WalkState`. It returns nothing: it writes the loss into the state.
        """
        define_operators()
        before, leaves, after = self.leaves(graph)
        made = Graph()
        place = {node: made.placeholder(f"before_{at}") for at, node in enumerate(before)}
        tables = [
            [made.placeholder(f"column_{at}_{table}") for table in range(len(kind.tables))]
            for at, kind in enumerate(self.kinds)
        ]
        order, cursor, losses = map(made.placeholder, WalkState._fields)
        place.update({node: made.placeholder(f"after_{at}") for at, node in enumerate(after)})
        batch = made.call_function(_aten.index_select.default, (order, 0, cursor))
        chosen = made.call_function(_aten.view.default, (batch, [self.rows]))
        taken = [
            each
            for kind, own in zip(self.kinds, tables, strict=True)
            for each in _TAKEN[kind.form](made, kind, own, chosen, self.rows)
        ]
        place.update(zip(leaves, taken, strict=True))
        loss = made.call_function(_aten.view.default, (self._append(made, graph, place, chosen), [1]))
        written = made.call_function(_aten.index_put.default, (losses, [cursor], loss))
        made.call_function(_aten.copy_.default, (losses, written))
        advanced = made.call_function(_aten.add.Tensor, (cursor, 1))
        made.call_function(_aten.copy_.default, (cursor, advanced))
        made.output(())
        walking = GraphModule(graph, made)
        for table, is_multiplied in zip(tables, self.multiplies, strict=False):
            if is_multiplied:
                _multiply_entries(walking, table[0], self.rows)
        walking.recompile()
        return walking

    def _append(self, made: Graph, graph: GraphModule, place: dict[Node, Node], chosen: Node) -> Any:
        """Copies the step; returns its loss."""
        ragged = self.ragged_leaves(graph)
        for node in graph.graph.nodes:
            if node.op == "output":
                return torch.fx.map_arg(node.args[0], place.__getitem__)
            if node.op == "placeholder":
                continue
            copied = place[node] = made.node_copy(node, place.__getitem__)
            if not ragged.isdisjoint(node.all_input_nodes):
                copied.kwargs = {"chosen": chosen}
        raise AssertionError("a graph has an output")


def _take_dense(made: Graph, kind: ColumnKind, tables: list[Node], chosen: Node, _rows: int) -> list[Node]:
    [table] = tables
    [(_, stored)] = kind.tables
    found = made.call_function(_aten.index_select.default, (table, 0, chosen))
    if stored != (wide := carrier(kind.dtype)):
        found = made.call_function(_aten._to_copy.default, (found,), {"dtype": wide})
    return [_viewed(made, found, kind.dtype)]


def _take_sparse(made: Graph, kind: ColumnKind, tables: list[Node], chosen: Node, rows: int) -> list[Node]:
    ids, offsets, *values = tables
    arguments = (values[0] if values else None, ids, offsets, kind.shape.numel(), carrier(kind.dtype), chosen)
    found = made.call_function(torch.ops.fasttrain.dense_rows.default, arguments)
    shaped = made.call_function(_aten.view.default, (found, [rows, *kind.shape]))
    return [_viewed(made, shaped, kind.dtype)]


def _take_ragged(_made: Graph, _kind: ColumnKind, tables: list[Node], _chosen: Node, _rows: int) -> list[Node]:
    return tables  # sums take the chosen rows of the whole table


def _viewed(made: Graph, found: Node, dtype: torch.dtype) -> Node:
    """What was found, in the dtype that it is carried for."""
    return found if carrier(dtype) == dtype else made.call_function(_aten.view.dtype, (found, dtype))


_TAKEN = {"dense": _take_dense, "sparse": _take_sparse, "ragged": _take_ragged}
"""By the form of a column: a batch's tensors of it, made from its tables."""


def _multiply_entries(graph: GraphModule, ids: Node, rows: int) -> None:
    """Makes products of matrices with a sparse column's rows from their entries, in place.

    The rows are made in full for what else is done with them, and not at all where there is nothing else. See
    `kernels.sum_rows` and `kernels.spread_rows` for weights and gradients that are infinite or NaN.

    Args:
        graph: of a walk.
        ids: of the column.
        rows: in a batch.
    """
    [dense] = ids.users
    matrices, nodes = _matrices_of(graph, dense, rows)
    for product in list(graph.graph.nodes):
        if product.target not in (_aten.mm.default, _aten.addmm.default) or {*product.kwargs.values()} - {1}:
            continue
        *bias, first, second = product.args
        if (first in matrices) == (second in matrices):
            continue
        with graph.graph.inserting_before(product):
            made = _product_of_entries(dense, matrices, first, second)
            if bias:
                made.append(graph.graph.call_function(_aten.add.Tensor, (made[-1], bias[0])))
        for each in made:
            each.meta = dict(product.meta)
        product.replace_all_uses_with(made[-1])
        graph.graph.erase_node(product)
    for node in reversed(nodes):
        if not node.users:
            graph.graph.erase_node(node)


def _matrices_of(graph: GraphModule, dense: Node, rows: int) -> tuple[dict[Node, bool], list[Node]]:
    """The nodes that are a sparse column's rows as one matrix, and whether transposed; and all that these come from."""
    matrices: dict[Node, bool] = {}
    nodes: list[Node] = []
    num_values, own = cast("Any", dense.args[3:5])
    matrix = [rows, num_values]
    ahead: list[tuple[Node, list[int], Any, bool]] = [(dense, matrix, own, False)]
    while ahead:
        node, shape, dtype, is_transposed = ahead.pop(0)
        nodes.append(node)
        is_new = node.target in (torch.ops.fasttrain.dense_rows.default, _aten._to_copy.default)
        if is_new and is_changed(graph, node):
            continue
        if shape == matrix and dtype in (torch.float32, torch.float64):
            matrices[node] = is_transposed
        for user in node.users:
            if user.target in _SAME:
                ahead.append((user, shape, dtype, is_transposed))
            elif user.target in _VIEWS and not is_transposed:
                ahead.append((user, _resolved(user.args[1], rows * num_values), dtype, False))
            elif _is_transpose(user) and shape == matrix:
                ahead.append((user, shape, dtype, not is_transposed))
            elif user.target is _aten._to_copy.default and [*user.kwargs] == ["dtype"] and dtype == own:
                ahead.append((user, shape, user.kwargs["dtype"], is_transposed))
    return matrices, nodes


_SAME = (_aten.detach.default, _aten.alias.default)
_VIEWS = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default)


def _resolved(sizes: Any, num_values: int) -> list[int]:
    """The sizes of a view, of which one may be -1."""
    known = math.prod(size for size in sizes if size != -1)
    return [num_values // known if size == -1 else size for size in sizes]


def _is_transpose(node: Node) -> bool:
    dims: Any = node.args[1:]
    if node.target is _aten.permute.default:
        return list(dims[0]) == [1, 0]
    is_swap = node.target is _aten.transpose.int and {dim % 2 for dim in dims} == {0, 1}
    return is_swap or node.target is _aten.t.default


def _product_of_entries(dense: Node, matrices: dict[Node, bool], first: Node, second: Node) -> list[Node]:
    """The nodes that compute a product, one of whose factors is a matrix of rows; the last of them is the product."""
    values, ids, offsets, num_values, _, chosen = dense.args
    graph, made = dense.graph, list[Node]()
    is_first = first in matrices
    other, is_transposed = (second, matrices[first]) if is_first else (first, matrices[second])

    def transposed(node: Node) -> Node:
        if _is_transpose(node):
            return cast("Node", node.args[0])
        made.append(graph.call_function(_aten.t.default, (node,)))
        return made[-1]

    # rows @ w.T and w @ rows.T are sums of weights for each row; rows.T @ g and g.T @ rows are gradients of weights.
    given = other if is_transposed else transposed(other)
    if is_first != is_transposed:
        operator, arguments = torch.ops.fasttrain.sum_rows.default, (given, ids, offsets)
    else:
        operator, arguments = torch.ops.fasttrain.spread_rows.default, (given, ids, offsets, num_values)
    options = {"chosen": chosen, "scales": values, "is_product": True}
    made.append(graph.call_function(operator, arguments, options))
    if is_transposed:
        transposed(made[-1])
    return made


def takes_rows(graph: GraphModule, walk: Walk) -> bool:
    """Whether a graph sums the rows of unequal length that it is given, and does nothing else with them."""
    readers = [user for leaf in walk.ragged_leaves(graph) for user in leaf.users]
    return all(getattr(user.target, "namespace", "") == "fasttrain" for user in readers)


class TracedWalk:
    """A step that walks over the rows of one resident source, as a graph, and what that holds for.

    Args:
        step: the step, whose guards are the walk's.
        batch: one of its batches.
        source: whose rows.

    Attributes:
        spec: of the step.
        step: see above.
        source: a weak reference, so that the program does not keep the data alive.
        tables: those of the source's columns; none once the source is gone.
        most_steps: of a call.
        parts: the one graph (see `Walk`). It takes the step's state and options, the tables, the tensors of a
            `WalkState` and closed-over tensors.
        due: which of the parts is to run: the one.

    Raises:
        EngineError: the step is more than one graph; or its batches are not what the source's columns give, or it needs
            more of their rows of unequal length than sums.
    """

    due = 0

    def __init__(self, step: TracedStep, batch: Any, source: ResidentBatches) -> None:
        self.spec = step.spec
        self.step = step
        self._rows = source.batch_size
        self.most_steps = max(LEAST_STEPS, min(MOST_STEPS, MOST_ENTRIES // source.batch_size))
        if not step.is_whole:
            raise EngineError(
                "one graph does not hold the whole step (its gradients are accumulated, or its optimizer steps eagerly)"
            )
        columns = _read_columns(source.columns, step.leaf_places)
        self._bind(source, columns)
        self._table_kinds = [_kind(table) for table in self.tables]
        leaves, standing = step.leaves(batch), step.standing_examples()
        if leaves is None:
            raise EngineError("forward reads the batch in another way than when it was traced")
        _refuse_other_leaves(leaves, columns, source.batch_size)
        graph = step.parts[0].graph
        self._kinds = tuple(column.kind for column in columns)
        walk = Walk(
            first_leaf=len(standing),
            kinds=self._kinds,
            rows=source.batch_size,
            longest=_padded_to(source),
            multiplies=tuple(map(_has_few_entries, columns)),
        )
        if not takes_rows(graph, walk):
            raise EngineError("rows of unequal length are used otherwise than by sums")
        self._standing = standing
        inputs = self._assembled(self.new_state())
        self.parts = [TracedGraph(walk(graph), inputs, [frozenset()] * len(inputs), walk.longest)]

    def take(self, source: ResidentBatches) -> bool:
        """Walks over other resident data from now on, where they are like those that it knows; whether it does."""
        if source is self.source() or source.batch_size != self._rows:
            return False
        try:
            columns, longest = _read_columns(source.columns, self.step.leaf_places), _padded_to(source)
        except EngineError:
            return False
        if tuple(column.kind for column in columns) != self._kinds or longest != self.parts[0].longest:
            return False
        if [_kind(table) for column in columns for table in column.tables] != self._table_kinds:
            return False
        self._bind(source, columns)
        return True

    def _bind(self, source: ResidentBatches, columns: Sequence[Column]) -> None:
        self.tables = [table for column in columns for table in column.tables]
        self.source = weakref.ref(source, self._forget)

    def _forget(self, source: weakref.ref[ResidentBatches]) -> None:
        if source is self.source:
            self.tables = []

    def new_state(self) -> WalkState:
        """Creates the state of one program. `order` is zeros, valid rows: CUDA graphs run before it is filled."""
        device, rows = self.spec.device, self._rows
        return WalkState(
            torch.zeros(self.most_steps, rows, dtype=torch.int64, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.zeros(self.most_steps, dtype=self.step.parts[0].loss_dtype, device=device),
        )

    def inputs(self, source: ResidentBatches, state: WalkState) -> list[Tensor] | Mismatch:
        """The graph's inputs, or why it does not hold: to be asked once a call of many steps. Makes no host read.

        Args:
            source: whose rows the call is to take.
            state: of the program that is to run.
        """
        if source is not self.source():
            return Mismatch("the resident data")
        standing = self.step.standing_inputs()
        if isinstance(standing, Mismatch):
            return standing
        self._standing = standing
        found = self._assembled(state)
        reason = self.parts[0].differ(found)
        return found if reason is None else Mismatch(reason)

    def _assembled(self, state: WalkState) -> list[Tensor]:
        return [*self._standing, *self.tables, *state, *self.step.parts[0].closed_over]


Loop = Callable[[list[Tensor], int], None]
"""Runs one graph so many times on the same inputs."""


class WalkingProgram:
    """A compiled step that walks, with a state and (in C) a container of its own: no other thread's program waits.

    On the CPU the steps of a call are called from C where that can be (see `torch_private.native_loop`), else, and on
    other devices, from Python.

    Args:
        packages: the compiled package of the one part; read here and not needed afterwards.
        traced: what it was compiled from.

    Raises:
        EngineError: it cannot be loaded.
    """

    def __init__(self, packages: Sequence[Path], traced: TracedWalk) -> None:
        self._traced = traced
        self._state = traced.new_state()
        self._loop = self._loaded(packages)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._traced.spec.device

    @property
    def parts(self) -> Sequence[TracedGraph]:
        """What was compiled."""
        return self._traced.parts

    @property
    def due(self) -> TracedGraph:
        """The part that every step runs."""
        return self.parts[0]

    def inputs_of(self, span: Span) -> list[Tensor] | Mismatch:
        """What each step of a span is given, or why the program does not hold (see `TracedWalk.inputs`)."""
        return self._traced.inputs(span.source, self._state)

    def run(self, span: Span) -> Tensor | Mismatch:
        """The steps of a span. Makes no host read.

        Args:
            span: of at most `TracedWalk.most_steps` steps.

        Returns:
            The losses, [steps], a tensor of their own; or why the program does not hold, and nothing has run.

        Raises:
            IndexError: an index in a batch, such as an id for an embedding, is out of range: PyTorch's own error, from
                the line of the user's code.
            StepsFailedError: a step failed.
        """
        inputs = self.inputs_of(span)
        if isinstance(inputs, Mismatch):
            return inputs
        self._state.begin(span)
        try:
            self._loop(inputs, span.steps)
        except RuntimeError as error:
            raise_failed(self._traced, self._state, span, error)
        return self._state.losses[: span.steps].clone()

    @property
    def steps_done(self) -> int:
        """How many steps of the last call are done. HOST READ: after an error in it."""
        return int(self._state.cursor)

    def once(self, inputs: list[Tensor]) -> None:
        """One step on inputs with a state of the caller's, as a CUDA graph captures it."""
        self._loop(inputs, 1)

    @contextmanager
    def running(self, packages: Sequence[Path]) -> Generator[None]:
        """Has another package run meanwhile, compiled from the same graph.

        Raises:
            EngineError: it cannot be loaded.
        """
        before, self._loop = self._loop, self._loaded(packages)
        try:
            yield
        finally:
            self._loop = before

    def _loaded(self, packages: Sequence[Path]) -> Loop:
        [package] = packages
        native = native_loop(package) if self.device.type == "cpu" else None
        return _python_loop(load_runner(package, self.device)) if native is None else native


def _python_loop(run: Runner) -> Loop:
    def loop(inputs: list[Tensor], steps: int) -> None:
        for _ in range(steps):
            run([*inputs])  # it empties the list

    return loop


def raise_failed(traced: TracedWalk, state: WalkState, span: Span, error: RuntimeError) -> NoReturn:
    """Raises the exception for a failed step of a span. HOST READ: of the cursor.

    Args:
        traced: what ran.
        state: which it ran with; the cursor says how many steps are done.
        span: whose steps.
        error: of the program.

    Raises:
        IndexError: an index is out of range (see `raise_index_error`).
        StepsFailedError: in every other case.
    """
    try:
        done = int(state.cursor)
    except RuntimeError:  # after an error inside a kernel, CUDA answers nothing any more
        told = "an unknown number"
    else:
        told = f"{done}"
        raise_index_error(traced.spec, map(span.batch, [done]), error)
    raise StepsFailedError(
        f"the compiled step failed after {told} of the {span.steps} steps of this call; the model and the optimizer "
        "may be partly updated and are not to be trusted: restore them from a checkpoint and create a new step "
        f"({first_line(error)})"
    ) from error


def kind_of(source: ResidentBatches) -> object:
    """What decides whether a step can walk over resident data: the kinds of their rows, not how many there are."""
    return source.batch_size, tuple(column.kind for column in source.columns)


def _has_few_entries(column: Column) -> bool:
    """Whether products with a column's rows are made from their entries: on the CPU, where that takes less time.

    The tables that a walk takes are of one size, so that this holds for all data that it takes.
    """
    if column.kind.form != "sparse":
        return False
    ids, _, *values = column.tables
    are_known = all(each.dtype in (torch.int32, torch.int64, torch.float32, torch.float64) for each in values)
    return (
        ids.device.type == "cpu" and are_known and len(ids) * VALUES_AN_ENTRY <= len(column) * column.kind.shape.numel()
    )


def _kind(table: Tensor) -> tuple[object, ...]:
    return table.shape, table.stride(), table.dtype, table.device


def _padded_to(source: ResidentBatches) -> int | None:
    """What rows that have entries of their own number are padded to; None where they need not be, or there are none.

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


def _read_columns(columns: Sequence[Column], places: Sequence[int | None]) -> list[Column]:
    """The columns that forward reads: those whose tensors have these numbers among all tensors of a batch.

    Raises:
        EngineError: it reads one of the two tensors of rows of unequal length without the other.
    """
    found: list[Column] = []
    first = 0
    for column in columns:
        of_column = range(first, first + column.kind.num_leaves)
        first = of_column.stop
        if all(place in places for place in of_column):
            found.append(column)
        elif any(place in places for place in of_column):
            raise EngineError("rows of unequal length are used otherwise than by sums")
    return found


def _refuse_other_leaves(leaves: Sequence[Tensor], columns: Sequence[Column], rows: int) -> None:
    """Raises EngineError where the tensors of a batch are not, one by one, what is gathered from the columns."""
    wanted = [each for column in columns for each in _gathered(column.kind, rows)]
    found = [(leaf.dtype, leaf.shape) for leaf in leaves]
    are_alike = [dtype == got[0] and size in (None, got[1]) for (dtype, size), got in zip(wanted, found, strict=False)]
    if len(found) != len(wanted) or not all(are_alike):
        raise EngineError("batches hold other tensors than the columns that they are gathered from")


def _gathered(kind: ColumnKind, rows: int) -> list[tuple[torch.dtype, torch.Size | None]]:
    """Dtype and size (None: any) of each tensor that a batch has of a column."""
    if kind.form == "ragged":
        return [(kind.dtype, None), (torch.int64, torch.Size([rows + 1]))]
    return [(kind.dtype, torch.Size([rows, *kind.shape]))]
