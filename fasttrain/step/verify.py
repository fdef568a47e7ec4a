"""Does a program give eager's numbers? One rule, judged on a real batch, before a program is used and while it runs.

From one state and one batch, the program and eager each run a step. Rounding makes them differ, and neither is exact:

1. Where they agree within a floor of rounding, the program passes. The floor follows from the precision, the sizes of
   each stored value and of its change, and how certain the gradient is that made the change (`_Judge`).
2. Elsewhere the captured graph decides, run operator by operator: once in the user's precision, once in fp64. Eager
   must agree with the graph, which calls the same kernels; and the program's error against the fp64 step may be at
   most `MULTIPLE` times the graph's own, plus the floor. (What passes 1 passes 2, so the graph need not be run there.)
3. Where there is no fp64 step to compare with, one looser rule, by kinds of tensors, compares the program with eager.
   `Verification.rule` names the reason.

Some of torch's kernels are inexact in fp32: on one CPU thread, batch norm on channels_last images adds up 50,000 values
one after the other, which puts gradients off by up to a fiftieth of the largest. A program that is better passes 2.

One step of a right program may differ by more: where the input of a ReLU is zero but for rounding, its gradient is
there on one side and missing on the other. So whoever calls this refuses a program that differs in two steps in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from fasttrain.errors import first_line
from fasttrain.metrics import FIRST_USER_TOTAL
from fasttrain.step.function import TracedPart
from fasttrain.step.spec import StepSpec
from fasttrain.step.state import METRICS, PARAMETERS, Snapshot, fits_in_memory
from fasttrain.step.torch_private import without_cudnn_tf32
from fasttrain.step.trace import Mismatch, TracedStep

__all__ = ["Verification", "agree", "verify"]

Batch = Any
Run = Callable[[Batch], Tensor]

CHANGE_TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
"""Rounding of a change, by dtype: of the entry's change, or of its tensor's root mean square where that is more."""

GRADIENT_NOISE = 0.1
"""Times the tolerance and the largest gradient of the model: by how much the gradient of any entry is uncertain."""

NUM_ROUNDINGS = 4
"""Times eps and the stored value: an entry is rounded once or twice in a step, on each side."""

STATE_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""By dtype, for tensors that follow no gradient (buffers, counts) and in the looser rule: of the largest change."""

LOSS_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative, by the loss's dtype. Rounding is far below; a lost term is not."""

METRICS_TOLERANCE = 0.02
"""Of the largest change: a prediction at the threshold may fall to either side."""

MULTIPLE = 5.0
"""Times the root mean square of the graph's own error: what the program's error may be."""

MOST_ERROR = 0.25
"""Of the root mean square of a tensor's change: more than this the graph's error never allows."""

FEW = 0.01
"""Of a tensor's entries, how many may be beyond their bounds (see above: a ReLU)."""

FAR, FAR_TIMES = 0.4, 20.0
"""How far those few may be: this share of the change, and so many times the bound. A row of an embedding that stays as
it was is farther."""

LIMIT = 2.5
"""Times the largest change among tensors of a kind: no entry may be farther, however uncertain its gradient is."""

OTHERS = 0.1
"""Times that limit: what counts besides the tensor's own change where no gradient tells what is noise (the running mean
of a batch norm behind another)."""

PARAMETER_SLACK = 10.0
"""In the looser rule, which does not look at gradients: parameters may differ by so many times more."""

GRADIENTS = "gradients"
"""The kind of those that are kept from step to step; see `StepState.kinds` for the others."""


@dataclass(frozen=True)
class Verification:
    """What came of comparing a program with eager.

    Attributes:
        loss: eager's.
        difference: what differs (the tensor's kind and shape, how many entries, by how much, the bound), or that the
            program cannot run; None: it gives eager's numbers.
        rule: what judged it: "equal precision" (it agrees with eager within rounding, so that nothing else had to run),
            "fp64", or "looser: " and the reason why the fp64 step could not judge.
    """

    loss: Tensor
    difference: str | None
    rule: str


def verify(traced: TracedStep, batch: Batch, eager: Run, program: Run) -> Verification:
    """Runs a step by program and eagerly, from the same state, and leaves the state as eager made it.

    Waits for the device. Eager's step runs exactly once. On CUDA, cuDNN runs without TF32 meanwhile. If the program
    raises, state and batch are put back: a RuntimeError is a difference, any other error is passed on. An error of
    eager's is passed on.

    Args:
        traced: what the program was compiled from; it holds for the batch.
        batch: what both are given.
        eager: runs one step, the reference; returns the loss.
        program: runs one step, the candidate; returns the loss.
    """
    spec, device, tensors, kinds = traced.spec, traced.spec.device, traced.tensors, traced.kinds
    part, inputs = traced.parts[traced.due], traced.inputs(batch)
    assert not isinstance(inputs, Mismatch), inputs.reason
    given = _Given(part, inputs, len(tensors))
    before = Snapshot.of(tensors, device, spec)
    owners = spec.with_gradients()
    with _without_tf32(device):
        tried = _try(program, batch, before, tensors, device, spec, given)
        if isinstance(tried, str):
            return Verification(eager(batch), tried, "none: the program did not run")
        with _gradients_seen(spec, tensors) as seen:
            loss = eager(batch)
        if isinstance(traced.inputs(batch), Mismatch):
            traced.rebind(batch)  # a buffer that forward assigns anew
        got = _side(tried[0], tried[1].copies, tried[1].gradients, owners)
        by_eager = _side(loss, traced.tensors, [each.grad for each in owners], owners)
        old = _side(loss, before.copies, before.gradients, owners).tensors
        followed = [*seen, *by_eager.tensors[len(tensors) :]]
        judge = _Judge(old, [*kinds, *[GRADIENTS] * len(owners)], by_eager, followed)
        reduced = _reduced_precision(part.graph, inputs)
        if reduced is not None:
            difference = judge.differs_loosely(got, reduced)
            return Verification(loss, difference, f"looser: the step computes in {str(reduced).removeprefix('torch.')}")
        if judge.differs(got, by_eager) is None:
            return Verification(loss, None, "equal precision")
        sides = _graph_sides(part, given, before, owners, tensors, device)
    if not isinstance(sides, str):
        by_graph, exact = sides
        wrong_trace = judge.differs(by_graph, by_eager, sides)
        if wrong_trace is not None:
            return Verification(loss, f"the captured graph, operator by operator: {wrong_trace}", "fp64")
        difference = judge.differs(got, exact, sides)
        far = difference and judge.differs(by_graph, exact, sides)
        if far is None:
            return Verification(loss, difference, "fp64")
        sides = f"the captured graph itself is too far from its fp64 step: {far}"
    return Verification(loss, judge.differs_loosely(got, loss.dtype), f"looser: {sides}")


def agree(traced: TracedStep, batch: Batch, wanted: Run, got: Run) -> Verification:
    """Compares two ways of running the same steps at equal precision, such as several steps in one call and one by one.

    It judges by the looser rule. State, batch and errors are treated as `verify` treats them.

    Args:
        traced: the step.
        batch: what both are given; neither changes it.
        wanted: the reference, whose state stays; returns the loss.
        got: the candidate; returns the loss.
    """
    device, tensors = traced.spec.device, traced.tensors
    before = Snapshot.of(tensors, device)
    with _without_tf32(device):
        tried = _try(got, batch, before, tensors, device)
        if isinstance(tried, str):
            return Verification(wanted(batch), tried, "none: the program did not run")
        loss = wanted(batch)
    judge = _Judge(_side(loss, before.copies).tensors, traced.kinds, _side(loss, traced.tensors))
    precision = _reduced_precision(traced.parts[0].graph, tensors) or loss.dtype
    difference = judge.differs_loosely(_side(tried[0], tried[1].copies), precision)
    return Verification(loss, difference, "looser: the same program's steps, run in two ways")


class _Given:
    """The inputs of a graph besides the state, as they were before a step that may change them (a batch, gradients)."""

    def __init__(self, part: TracedPart, inputs: Sequence[Tensor], num_state: int) -> None:
        end = len(inputs) - len(part.closed_over)
        self._inputs = inputs[num_state:end]
        self._copies = [each.clone() for each in self._inputs]
        self._closed_over = inputs[end:]

    @torch.no_grad()
    def put_back(self) -> None:
        for each, copy in zip(self._inputs, self._copies, strict=True):
            if not torch.equal(each, copy):
                each.copy_(copy)

    def inputs(self, state: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
        """New tensors for a graph; real and complex ones of this precision, None: of their own."""
        return [_in(each, dtype, copy=True) for each in (*state, *self._copies, *self._closed_over)]


def _try(
    program: Run,
    batch: Batch,
    before: Snapshot,
    tensors: Sequence[Tensor],
    device: torch.device,
    spec: StepSpec | None = None,
    given: _Given | None = None,
) -> tuple[Tensor, Snapshot] | str:
    """The loss of one step and the state as it left it, or why it cannot run. State, gradients, batch are put back."""
    try:
        loss = program(batch)
    except RuntimeError as error:  # some operators compile and then refuse to run (oneDNN's LSTM)
        return f"it cannot run: {error}"
    else:
        return loss, Snapshot.of(tensors, device, spec)
    finally:
        before.restore(tensors, device, spec)
        if given is not None:
            given.put_back()


@contextmanager
def _gradients_seen(spec: StepSpec, tensors: Sequence[Tensor]) -> Generator[list[Tensor | None]]:
    """Notes the gradients of an eager step that is run inside.

    Yields:
        For each tensor of the state, filled in while the step runs: the gradient of the parameter that it is, or whose
        state of the same shape it is; None where there is none. The step may scale or clip them afterwards.
    """
    found: list[Tensor | None] = [None] * len(tensors)
    places = {id(tensor): place for place, tensor in enumerate(tensors)}

    def note(parameter: Tensor) -> None:
        for each in (parameter, *spec.optimizer.state.get(parameter, {}).values()):
            if isinstance(each, Tensor) and each.shape == parameter.shape and id(each) in places:
                found[places[id(each)]] = parameter.grad

    with ExitStack() as hooks:
        for parameter in spec.trained():
            if parameter.requires_grad:
                hooks.callback(parameter.register_post_accumulate_grad_hook(note).remove)
        yield found


class _Side(NamedTuple):
    """Results of one step: the loss, then the state tensors and the kept gradients (complex tensors viewed as real)."""

    loss: Tensor
    tensors: list[Tensor]


def _side(
    loss: Tensor, state: Sequence[Tensor], gradients: Sequence[Tensor | None] = (), owners: Sequence[Tensor] = ()
) -> _Side:
    """A gradient that is not there is a zero, which takes no memory worth naming."""
    kept = [owner.new_zeros(()) if each is None else each for each, owner in zip(gradients, owners, strict=True)]
    return _Side(loss, [_real(each.detach()) for each in (*state, *kept)])


def _graph_sides(
    part: TracedPart,
    given: _Given,
    before: Snapshot,
    owners: Sequence[Tensor],
    tensors: Sequence[Tensor],
    device: torch.device,
) -> tuple[_Side, _Side] | str:
    """The captured graph's step in the user's precision and in fp64, or why there is none. Changes nothing."""
    if not fits_in_memory([*tensors] * 3, device):
        return "copies of the step's state in fp64 do not fit in memory"
    places = {id(tensors[place]): len(tensors) + at for at, place in enumerate(part.reached) if part.part == "gather"}

    def side(run: Callable[..., Tensor], dtype: torch.dtype | None) -> _Side:
        torch.set_rng_state(before.rng)
        if before.cuda_rng is not None:
            torch.cuda.set_rng_state(before.cuda_rng, device)
        inputs = given.inputs(before.copies, dtype)
        loss = run(*inputs)
        gradients = [inputs[places[id(each)]] if id(each) in places else None for each in owners]
        return _side(loss, inputs[: len(tensors)], gradients, owners)

    generators, operators = Snapshot.of([], device), _Operators(part.graph)
    try:
        with torch.no_grad():
            by_graph = side(operators.run, None)
            if not any(dtype in _WIDER for dtype in operators.dtypes.values()):
                return by_graph, by_graph
            exact = side(_InDouble(part.graph, operators.dtypes).run, torch.float64)
    except Exception as error:  # of operators that are not made for fp64, of hard-coded dtypes, of too little memory
        return f"there is no fp64 step: {first_line(error)}"
    finally:
        generators.restore([], device)
    return by_graph, _where_real(by_graph, exact)


_WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128}


class _Operators(Interpreter):
    """Runs a graph operator by operator, and notes the dtypes of the tensors that these make."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.dtypes: dict[Node, torch.dtype] = {}

    def run_node(self, n: Node) -> Any:
        """One operator."""
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.dtypes[n] = result.dtype
        return result


class _InDouble(Interpreter):
    """Runs a graph in fp64: where an operator names fp32 (forward's `.float()`), it makes fp64.

    Random numbers are drawn in the graph's own dtypes and then widened: torch draws other numbers in fp64.
    """

    def __init__(self, graph: GraphModule, dtypes: dict[Node, torch.dtype]) -> None:
        super().__init__(graph)
        self._dtypes = dtypes

    def run_node(self, n: Node) -> Any:
        """One operator; whatever it makes in fp32 (from whole numbers, or a constant) is widened."""
        is_drawn = torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())
        result = self._draw(n) if is_drawn else super().run_node(n)
        return tuple(map(_widened, result)) if isinstance(result, tuple | list) else _widened(result)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """With the dtypes among its arguments widened."""
        if target is torch.ops.aten.view.dtype:
            raise RuntimeError("the step reads numbers as the bits of another dtype")
        wide = [_WIDER.get(each, each) if isinstance(each, torch.dtype) else each for each in args]
        named = {
            name: _WIDER.get(each, each) if isinstance(each, torch.dtype) else each for name, each in kwargs.items()
        }
        return super().call_function(target, tuple(wide), named)

    def _draw(self, n: Node) -> Any:
        inputs = {each: self.env[each] for each in n.all_input_nodes}
        narrow = {
            each: value.to(self._dtypes[each]) if isinstance(value, Tensor) else value for each, value in inputs.items()
        }
        target: Any = n.target
        result = target(*map_arg(n.args, narrow.__getitem__), **map_arg(n.kwargs, narrow.__getitem__))
        for each, value in inputs.items():
            drawn = narrow[each]
            if isinstance(value, Tensor) and drawn is not value and not torch.equal(drawn, value.to(drawn.dtype)):
                value.copy_(drawn)  # by an operator that works in place
            if result is drawn:
                result = value
        return result


def _widened(value: Any) -> Any:
    return _in(value, torch.float64) if isinstance(value, Tensor) else value


def _in(tensor: Tensor, dtype: torch.dtype | None, *, copy: bool = False) -> Tensor:
    """With its real or complex numbers in fp64, where that is asked for."""
    return tensor.to(tensor.dtype if dtype is None else _WIDER.get(tensor.dtype, tensor.dtype), copy=copy)


def _reduced_precision(graph: GraphModule, inputs: Sequence[Tensor]) -> torch.dtype | None:
    """The coarsest dtype of less than 32 bits that a graph is given or names, None where there is none."""
    named = [each for node in graph.graph.nodes for each in (*node.args, *node.kwargs.values())]
    dtypes = {each for each in named if isinstance(each, torch.dtype)} | {each.dtype for each in inputs}
    reduced = [each for each in dtypes if each.is_floating_point and each.itemsize < 4]
    return max(reduced, key=lambda each: torch.finfo(each).eps, default=None)


class _Judge:
    """Compares steps that were made from one state. HOST READ: all of it.

    Args:
        before: the state before the step, and the gradients kept then.
        kinds: of each of these.
        eager: what eager's step made; its changes tell how large rounding may be.
        followed: the gradient that each follows in eager's step, None where there is none; a gradient follows itself.
    """

    def __init__(
        self, before: Sequence[Tensor], kinds: Sequence[str], eager: _Side, followed: Sequence[Tensor | None] = ()
    ) -> None:
        self._before = before
        self._kinds = kinds
        self._eager = eager
        self._followed = followed
        self._precision = eager.loss.dtype  # what is stored in another dtype is as exact as this at best
        # By dtype, too: a count of batches must not set the scale of means.
        self._groups = [(kind, each.dtype) for kind, each in zip(kinds, before, strict=True)]
        self._largest = dict.fromkeys(self._groups, 0.0)
        for place, group in enumerate(self._groups):
            self._largest[group] = max(self._largest[group], _largest(self._change(place)))
        gradients = [_sizes(each) for each in followed if each is not None]
        self._noise = GRADIENT_NOISE * max(map(_largest, gradients), default=0.0)

    def differs(self, got: _Side, wanted: _Side, graph: tuple[_Side, _Side] | None = None) -> str | None:
        """What differs by more than rounding, tensor by tensor and entry by entry.

        Args:
            got: to be judged.
            wanted: what is right.
            graph: the captured graph in the user's precision and in fp64, whose distance rounding may be.
        """
        reason = self._numbers_differ(got, wanted, LOSS_TOLERANCE[self._precision], graph)
        for place, (kind, old) in enumerate(zip(self._kinds, self._before, strict=True)):
            after, right = got.tensors[place], wanted.tensors[place]
            if reason is not None:
                return reason
            if kind == METRICS or not right.numel() or (after.dtype == right.dtype and torch.equal(after, right)):
                continue
            bound, limit = self._bounds(place, graph) if old.is_floating_point() else [old.new_zeros(())] * 2
            error = _distance(after, right)
            count = int((~(error <= bound)).sum())
            is_stale = self._followed[place] is None and self._is_stale(place, after)
            if is_stale or count > FEW * error.numel() or not bool((error <= limit).all()):
                at = int((error - bound).nan_to_num(nan=torch.inf).argmax())
                off, allowed = (each.expand_as(error).flatten()[at].item() for each in (error, bound))
                reason = (
                    f"{kind}: a tensor of shape {list(right.shape)} changes otherwise: {count} of {error.numel()} "
                    f"entries differ by more than rounding can do, one by {off:.3g}; {allowed:.3g} is the bound, and "
                    f"eager changes them by {_largest(self._change(place)):.3g} at most"
                )
                reason = self._stale(place) if torch.equal(after, old) else reason
        return reason

    def _bounds(self, place: int, graph: tuple[_Side, _Side] | None) -> tuple[Tensor, Tensor]:
        """By how much each entry of a tensor may differ, and by how much a few may.

        How uncertain an entry's change is follows from its gradient: one that is small beside the model's largest is,
        relatively, uncertain, and where it is zero but for rounding (a bias in front of batch norm), an optimizer that
        divides by its size makes whole steps of noise.
        """
        old, change, followed = self._before[place], self._change(place), self._followed[place]
        dtype = max(old.dtype, self._precision, key=lambda each: torch.finfo(each).eps)
        typical, tolerance = change.square().mean().sqrt(), CHANGE_TOLERANCE[dtype]
        rounding = NUM_ROUNDINGS * torch.finfo(dtype).eps * (_finite(old.abs().double()) + change)
        scale, limit = change.clamp(min=typical), LIMIT * self._largest[self._groups[place]]
        if followed is None:
            scale = change.new_tensor(_largest(change) + OTHERS * self._largest[self._groups[place]])
            noise, rounding = STATE_TOLERANCE[dtype] * scale, rounding.max()
        elif self._kinds[place] == GRADIENTS:
            noise = tolerance * (scale + self._noise)
        else:
            share = tolerance * self._noise / _sizes(followed)  # squared, too: in an average of squares
            noise = (scale * (tolerance + share + share.square())).nan_to_num(nan=torch.inf, posinf=torch.inf)
        if graph is not None:
            own = _finite(_distance(graph[0].tensors[place], graph[1].tensors[place])).square().mean().sqrt()
            rounding = rounding + (MULTIPLE * own).clamp(max=MOST_ERROR * typical)
        return noise + rounding, (FAR * scale + FAR_TIMES * noise).clamp(max=limit) + rounding

    def differs_loosely(self, got: _Side, precision: torch.dtype) -> str | None:
        """What differs from eager by more than the dtypes' tolerances, of the largest change in tensors of a kind."""
        coarsest = max(
            LOSS_TOLERANCE.get(each, LOSS_TOLERANCE[torch.bfloat16]) for each in (precision, self._precision)
        )
        reason = self._numbers_differ(got, self._eager, coarsest)
        for (kind, dtype), largest in self._largest.items():
            if reason is not None or kind == METRICS:
                continue
            members = [place for place, group in enumerate(self._groups) if group == (kind, dtype)]
            sides = [[side.tensors[place] for place in members] for side in (got, self._eager)]
            bound = farthest = 0.0
            if dtype.is_floating_point:
                tolerance = max(
                    STATE_TOLERANCE.get(each, STATE_TOLERANCE[torch.bfloat16]) for each in (dtype, precision)
                )
                rounding = 1e-6 * max(_largest(_finite(right.abs().double())) for right in sides[1])
                bound = tolerance * largest * (PARAMETER_SLACK if kind == PARAMETERS else 1.0) + rounding
                farthest = max(bound, LIMIT * largest)
            errors = torch.cat([_distance(after, right).flatten() for after, right in zip(*sides, strict=True)])
            count, allowed = int((~(errors <= bound)).sum()), FEW * errors.numel() if kind == PARAMETERS else 0
            if count > allowed or not bool((errors <= farthest).all()):
                reason = f"{kind}: {count} of {errors.numel()} entries differ by more than {bound:.3g}, at most by "
                reason += f"{errors.max().item():.3g}"
            for place, after in zip(members, sides[0], strict=True):
                reason = self._stale(place) if self._is_stale(place, after) else reason
        return reason

    def _numbers_differ(
        self, got: _Side, wanted: _Side, tolerance: float, graph: tuple[_Side, _Side] | None = None
    ) -> str | None:
        """What differs in the loss and the totals of the metrics, one by one: a large one must not hide a small one."""

        def slack(of: Callable[[_Side], Tensor]) -> Tensor | float:
            return 0.0 if graph is None else MULTIPLE * _finite(_distance(of(graph[0]), of(graph[1])))

        bound = tolerance * _finite(wanted.loss.double().abs()) + slack(lambda side: side.loss)
        if not bool((_distance(got.loss, wanted.loss) <= bound).all()):
            return f"the loss is {got.loss.item():.9g}, not {wanted.loss.item():.9g} within {bound.item():.3g}"
        for place in [place for place, kind in enumerate(self._kinds) if kind == METRICS]:
            after, right, change = got.tensors[place], wanted.tensors[place], METRICS_TOLERANCE * self._change(place)
            bounds = 1e-9 * _finite(right.abs()) + slack(lambda side, place=place: side.tensors[place])
            bounds[0] += bound
            bounds[1] += change[1:FIRST_USER_TOTAL].max()
            bounds[2:FIRST_USER_TOTAL] = 0.0
            bounds[FIRST_USER_TOTAL:] += change[FIRST_USER_TOTAL:] + 1e-4
            is_close = _distance(after, right) <= bounds
            names = ["the loss", "accuracy", *["what accuracy counts"] * (FIRST_USER_TOTAL - 2), "the user's metrics"]
            for at in [at for at in range(right.numel()) if not is_close[at]]:
                name = names[min(at, FIRST_USER_TOTAL)]
                return f"metrics: the total of {name} is {after[at].item():.9g}, not {right[at].item():.9g}"
        return None

    def _change(self, place: int) -> Tensor:
        return _finite(_distance(self._eager.tensors[place], self._before[place]))

    def _is_stale(self, place: int, got: Tensor) -> bool:
        """Whether a tensor stays as it is, and eager changes it by more than rounding."""
        old = self._before[place]
        return torch.equal(got, old) and _largest(self._change(place)) > 1e-6 * _largest(_finite(old.abs().double()))

    def _stale(self, place: int) -> str:
        change = _largest(self._change(place))
        shape = list(self._before[place].shape)
        return f"{self._kinds[place]}: a tensor of shape {shape} stays as it is, eager changes it by {change:.3g}"


def _where_real(graph: _Side, exact: _Side) -> _Side:
    """The exact step where it tells what is right: not of whole numbers, nor of what overflows in the graph's dtype."""
    pairs = zip((graph.loss, *graph.tensors), (exact.loss, *exact.tensors), strict=True)
    [loss, *tensors] = [
        torch.where(mine.isfinite(), right, mine) if mine.is_floating_point() else mine for mine, right in pairs
    ]
    return _Side(loss, tensors)


def _distance(tensor: Tensor, other: Tensor) -> Tensor:
    """Of each entry, in double precision; 0 where both are the same infinity (a mask's) or both no number."""
    tensor, other = tensor.double(), other.double()
    is_same = (tensor == other) | (tensor.isnan() & other.isnan())
    return (tensor - other).abs().masked_fill(is_same, 0.0)


def _sizes(gradient: Tensor) -> Tensor:
    return _finite(_real(gradient.detach()).abs().double())


def _finite(values: Tensor) -> Tensor:
    return values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _largest(values: Tensor) -> float:
    return values.max().item() if values.numel() else 0.0


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _without_tf32(device: torch.device) -> AbstractContextManager[None]:
    """TF32 rounds a convolution's inputs to 10 bits, and the two sides may call other kernels of cuDNN."""
    return without_cudnn_tf32() if device.type == "cuda" else nullcontext()
