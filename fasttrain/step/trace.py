"""From the user's model, forward, optimizer and one batch: one graph of the whole training step.

Forward, loss, backward, clipping, the user's own optimizer and the running metrics are recorded together. The graph
changes the very tensors of the user's objects in place, so that their `state_dict()`s are right at any moment.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fasttrain.errors import EngineError
from fasttrain.step.eager import run_forward
from fasttrain.step.guards import BatchLayout, Guards
from fasttrain.step.spec import StepOutput, StepSpec
from fasttrain.step.torch_private import (
    has_gradient_hooks,
    optimizer_hooks,
    reported_as_compiling,
    tensor_check,
    trace_graph,
    without_onednn,
)

__all__ = ["LearningRates", "Mismatch", "StepState", "TracedStep", "trace_step"]

Batch = Any

_BRANCHES_ON_VALUES = (torch.optim.RAdam, torch.optim.ASGD, torch.optim.Rprop)
"""Their default code branches on values of tensors; their `capturable` code computes the same without."""

_SCALARS = frozenset({"step", "mu_product", "eta", "mu"})
"""State that optimizers read as Python numbers, in double precision."""


class StepState:
    """The tensors that a step reads and changes, in the order of the graph's inputs.

    Args:
        spec: the step.

    Attributes:
        names: what each tensor is.
        tensors: model parameters, other trained parameters, buffers, optimizer state, totals of the metrics.
        groups: for each group of the optimizer, where its parameters are in `tensors`.
        slots: for each trained parameter that has state (by its place in `tensors`), where each entry of it is.
    """

    def __init__(self, spec: StepSpec) -> None:
        self.names: list[str] = []
        self.tensors: list[Tensor] = []
        self._places: dict[int, int] = {}
        self.parameters = {name: self._add(name, value) for name, value in spec.model.named_parameters()}
        self.groups = [
            [self._add(f"group {number}", parameter) for parameter in group["params"]]
            for number, group in enumerate(spec.optimizer.param_groups)
        ]
        self.buffers = {name: self._add(name, value) for name, value in spec.model.named_buffers()}
        self.slots = dict(self._add_slots(spec.optimizer))
        self.totals = self._add("metrics", spec.metrics.totals)

    @property
    def signature(self) -> Any:
        """Everything about the state but which objects hold it and their values."""
        metadata = [(t.shape, t.dtype, t.stride(), t.device, t.requires_grad) for t in self.tensors]
        return self.names, metadata, self.parameters, self.groups, self.buffers, self.slots, self.totals

    def _add(self, name: str, tensor: Tensor) -> int:
        place = self._places.get(id(tensor))
        if place is None:
            place = self._places[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
            self.names.append(name)
        return place

    def _add_slots(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, dict[str, int]]]:
        for place in [place for group in self.groups for place in group]:
            entries: dict[str, Any] = optimizer.state.get(self.tensors[place], {})
            found = {
                key: self._add(f"{key} of {self.names[place]}", value)
                for key, value in entries.items()
                if isinstance(value, Tensor)
            }
            if found:
                yield place, found


class LearningRates:
    """The groups' learning rates as scalar tensors, so that a graph can take them as inputs.

    Args:
        optimizer: whose `param_groups` are read; a rate that is a tensor already is passed on as it is.
        device: where the rates live.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        # Python's floats are doubles, and so is what eager optimizers compute with them.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._own = [torch.zeros((), dtype=dtype, device=device) for _ in optimizer.param_groups]
        self._filled: list[float | None] = [None] * len(self._own)

    def current(self) -> list[Tensor]:
        """The rates of this moment, one a group."""
        rates: list[Tensor] = []
        for index, group in enumerate(self._optimizer.param_groups):
            rate = group["lr"]
            if isinstance(rate, Tensor):
                rates.append(rate)
                continue
            if rate != self._filled[index]:
                self._own[index].fill_(rate)
                self._filled[index] = rate
            rates.append(self._own[index])
        return rates


class Mismatch(NamedTuple):
    """Why a traced step does not hold now."""

    reason: str


class TracedStep:
    """A whole training step as a graph, and what it holds for.

    Args:
        spec: the step.
        graph: takes state, rates, batch and closed-over tensors, in this order; changes the state in place and returns
            the loss.
        batch: the example that was traced.
        state: the tensors that it changes.
        rates: the learning rates.
        closed_over: tensors that forward reads without being given them.

    Attributes:
        spec: the step.
        graph: see above.
        open_dims: for each input of the graph, the dimensions whose size is left open.
    """

    def __init__(
        self,
        spec: StepSpec,
        graph: torch.fx.GraphModule,
        batch: Batch,
        state: StepState,
        rates: LearningRates,
        closed_over: list[Tensor],
    ) -> None:
        self.spec = spec
        self.graph = graph
        self._layout = BatchLayout(batch)
        self._rates = rates
        self._closed_over = closed_over
        self._bind(state)
        leaves = self._layout.flatten(batch)
        assert leaves is not None
        example = self._all_inputs(leaves)
        fixed: list[frozenset[int]] = [frozenset()] * (len(example) - len(leaves) - len(closed_over))
        self.open_dims = [*fixed, *self._layout.open_dims, *[frozenset[int]()] * len(closed_over)]
        self._differ = tensor_check(example, self.open_dims)

    def inputs(self, batch: Batch) -> list[Tensor] | Mismatch:
        """The graph's inputs for a batch, or why the graph does not hold for it or for the user's objects as they are.

        Makes no host read.
        """
        reason = self._guards.mismatch()
        if reason is not None:
            return Mismatch(reason)
        leaves = self._layout.flatten(batch)
        if leaves is None:
            return Mismatch("the structure of the batch")
        inputs = self._all_inputs(leaves)
        reason = self._differ(inputs)
        return inputs if reason is None else Mismatch(reason)

    @torch.no_grad()
    def run(self, inputs: list[Tensor]) -> Tensor:
        """One step, operator by operator as recorded: what a compiled program must agree with.

        Returns:
            The batch's loss, detached.
        """
        return self.graph(*inputs)

    def rebind(self) -> bool:
        """Takes up tensors that were replaced by others of the same kind, as `load_state_dict` does.

        Returns:
            False where more has changed than that: trace anew.
        """
        before, state = self._guards, StepState(self.spec)
        if state.signature != self._signature:
            return False
        self._bind(state)
        if not self._guards.agree(before):
            self._guards = before
            return False
        return True

    def _bind(self, state: StepState) -> None:
        self._tensors = state.tensors
        self._signature = state.signature
        self._guards = Guards(self.spec)

    def _all_inputs(self, leaves: list[Tensor]) -> list[Tensor]:
        return [*self._tensors, *self._rates.current(), *leaves, *self._closed_over]


def trace_step(spec: StepSpec, batch: Batch) -> TracedStep:
    """Records one whole step. Nothing is run and nothing of the user's objects is changed.

    Args:
        spec: the step; its optimizer must have made its state, so run the first step eagerly.
        batch: an example, on the device.

    Raises:
        EngineError: the step cannot be traced; the message says why.
    """
    _refuse_unsupported(spec)
    layout = BatchLayout(batch)
    leaves = layout.flatten(batch)
    assert leaves is not None
    state = StepState(spec)
    _refuse_overlaps(state)
    rates = LearningRates(spec.optimizer, spec.device)
    inputs = [*state.tensors, *rates.current(), *leaves]
    fixed: list[frozenset[int]] = [frozenset()] * (len(inputs) - len(leaves))
    try:
        # The oneDNN LSTM has no backward that can be compiled; without it, torch records the cell's own operators.
        with without_onednn():
            graph = trace_graph(_WholeStep(spec, state, layout), inputs, [*fixed, *layout.open_dims])
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(f"this step cannot be traced: {_first_line(error)}") from error
    closed_over = _lift_closed_over(graph)
    _settle_scalars(graph)
    return TracedStep(spec, graph, batch, state, rates, closed_over)


class _WholeStep:
    """The step as a function of its tensors; see `TracedStep.graph` for their order."""

    def __init__(self, spec: StepSpec, state: StepState, layout: BatchLayout) -> None:
        self._spec = spec
        self._state = state
        self._layout = layout
        self._places = [place for group in state.groups for place in group]
        self._trained = [place for place in self._places if state.tensors[place].requires_grad]

    def __call__(self, *inputs: Tensor) -> Tensor:
        num_state, num_rates = len(self._state.tensors), len(self._state.groups)
        state = list(inputs[:num_state])
        rates = inputs[num_state : num_state + num_rates]
        batch = self._layout.rebuild(inputs[num_state + num_rates :])
        with torch.enable_grad():
            variables = {place: state[place].detach().requires_grad_() for place in self._trained}
            output = self._forward({**dict(enumerate(state)), **variables}, batch)
            gradients = torch.autograd.grad(output.loss, list(variables.values()), allow_unused=True)
        with torch.no_grad():
            for place, gradient in zip(self._trained, gradients, strict=True):
                # A copy, as autograd makes where a gradient is shared or expanded; it costs a compiled step nothing.
                state[place].grad = None if gradient is None else gradient.clone()
            self._clip([state[place] for place in self._trained])
            _OptimizerStep(self._spec.optimizer, self._state, state, rates).run()
            cells = list(state[self._state.totals].unbind())
            self._spec.metrics.accumulate(cells, *output, 1.0)
        return output.loss.detach()

    def _forward(self, tensors: dict[int, Tensor], batch: Batch) -> StepOutput:
        places = {**self._state.parameters, **self._state.buffers}
        members = {f"model.{name}": tensors[place] for name, place in places.items()}
        given = dict(members)
        output = torch.func.functional_call(_ForwardModule(self._spec), members, (batch,))
        for name, place in self._state.buffers.items():
            # A buffer that forward replaces instead of changing it: the user's own tensor takes the new value.
            if members[f"model.{name}"] is not given[f"model.{name}"]:
                tensors[place].copy_(members[f"model.{name}"].detach())
        return output

    def _clip(self, parameters: list[Tensor]) -> None:
        spec = self._spec
        if spec.clip_value is not None:
            torch.nn.utils.clip_grad_value_(parameters, spec.clip_value, foreach=False)
        if spec.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, spec.clip_norm, foreach=False)


class _ForwardModule(nn.Module):
    """Brings the user's function into a module, so that `functional_call` can swap the model's tensors for it."""

    def __init__(self, spec: StepSpec) -> None:
        super().__init__()
        self.model = spec.model
        self._spec = spec

    def forward(self, batch: Batch) -> StepOutput:
        return run_forward(self._spec, self._spec.forward, batch)


class _OptimizerStep:
    """The step of the user's optimizer, by its own code, over stand-ins for its tensors.

    It runs in a twin that shares the optimizer's attributes and has groups and state of its own, so that nothing of the
    user's has to be put back.

    Args:
        optimizer: the user's.
        state: where everything is.
        tensors: the stand-ins, in the order of `state`; trained ones have their gradients.
        rates: stand-ins for the learning rates, one a group.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, state: StepState, tensors: list[Tensor], rates: Sequence[Tensor]
    ) -> None:
        self._optimizer = optimizer
        self._state = state
        self._tensors = tensors
        self._twin: Any = object.__new__(type(optimizer))
        self._twin.__dict__.update(optimizer.__dict__)
        self._twin.__dict__.pop("step", None)  # a scheduler's wrapper, bound to the user's optimizer
        self._twin.param_groups = [
            self._group(group, places, rate)
            for group, places, rate in zip(optimizer.param_groups, state.groups, rates, strict=True)
        ]
        self._twin.state = defaultdict(dict, {tensors[place]: self._entries(place) for place in state.slots})

    def run(self) -> None:
        """Steps the twin and brings what it changed to the stand-ins."""
        groups = [dict(group) for group in self._twin.param_groups]
        before = {parameter: dict(entries) for parameter, entries in self._twin.state.items()}
        with reported_as_compiling(), _TensorsForNumbers():
            type(self._optimizer).step(self._twin)
        if any(group != old for group, old in zip(self._twin.param_groups, groups, strict=True)):
            raise EngineError(f"{self._name} changes its parameter groups in every step: a graph would not see that")
        for parameter, entries in self._twin.state.items():
            for key, value in entries.items():
                if key not in before.get(parameter, {}):
                    raise EngineError(f"{self._name} has not made its state yet: run one step eagerly, then trace")
                self._write_back(parameter, key, before[parameter][key], value)

    @property
    def _name(self) -> str:
        return type(self._optimizer).__name__

    def _group(self, group: dict[str, Any], places: list[int], rate: Tensor) -> dict[str, Any]:
        twin = {**group, "params": [self._tensors[place] for place in places], "lr": rate}
        # One operator after the other: the compiler fuses them itself, and fused kernels cannot be recorded.
        twin.update({name: False for name in ("foreach", "fused") if name in group})
        if isinstance(self._optimizer, _BRANCHES_ON_VALUES):
            twin["capturable"] = True
        return twin

    def _entries(self, place: int) -> dict[str, Any]:
        entries = dict(self._optimizer.state[self._state.tensors[place]])
        for key, slot in self._state.slots[place].items():
            stand_in = self._tensors[slot]
            entries[key] = stand_in.double() if key in _SCALARS and stand_in.dim() == 0 else stand_in
        return entries

    def _write_back(self, parameter: Tensor, key: str, old: Any, new: Any) -> None:
        if not isinstance(old, Tensor):
            if new is not old and new != old:
                raise EngineError(f"{self._name} keeps {key!r} as a Python value: a graph would not change it")
            return
        slots = next(s for place, s in self._state.slots.items() if self._tensors[place] is parameter)
        home = self._tensors[slots[key]]
        if new is not home:
            home.copy_(new)


class _TensorsForNumbers(TorchFunctionMode):
    """Lets optimizers use scalar tensors where torch takes only numbers: `add(x, y, alpha=rate)` and its kin."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Multiplies the second operand by a factor that is a tensor, which is what these operators do with numbers."""
        kwargs = kwargs or {}
        for name in ("alpha", "value"):
            factor = kwargs.get(name)
            if isinstance(factor, Tensor) and len(args) > 1:
                kwargs = {key: value for key, value in kwargs.items() if key != name}
                args = (args[0], args[1] * factor, *args[2:])
        return func(*args, **kwargs)


def _refuse_unsupported(spec: StepSpec) -> None:
    """Raises EngineError for what a trace would silently get wrong."""
    if spec.accumulate != 1:
        raise EngineError(f"a compiled step cannot accumulate gradients yet (accumulate={spec.accumulate})")
    if spec.scaler is not None:
        raise EngineError("a compiled step cannot scale gradients yet (precision fp16)")
    if any(optimizer_hooks(spec.optimizer)):
        raise EngineError("the optimizer has hooks: a compiled step would not call them")
    if any("lr" not in group for group in spec.optimizer.param_groups):
        raise EngineError(f"{type(spec.optimizer).__name__} has a parameter group without 'lr'")
    for parameter in (*spec.model.parameters(), *spec.trained()):
        if type(parameter) not in (Tensor, nn.Parameter):
            raise EngineError(f"the model has a parameter of type {type(parameter).__name__}: only plain tensors are traced")
        if has_gradient_hooks(parameter):
            raise EngineError("a parameter has gradient hooks: a compiled step would not call them")


def _refuse_overlaps(state: StepState) -> None:
    """Raises EngineError where two tensors of the state share memory: a graph cannot know that."""
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.untyped_storage().nbytes() - tensor.storage_offset(), name)
        for name, tensor in zip(state.names, state.tensors, strict=True)
        if tensor.numel()
    )
    for (_, end, first), (begin, _, second) in zip(spans, spans[1:], strict=False):
        if begin < end:
            raise EngineError(f"{first!r} and {second!r} share memory without being one tensor")


def _lift_closed_over(graph: torch.fx.GraphModule) -> list[Tensor]:
    """Turns the real tensors that were met while tracing into inputs of the graph, after the others."""
    lifted: list[Tensor] = []
    nodes = list(graph.graph.nodes)
    last = [node for node in nodes if node.op == "placeholder"][-1]
    for node in nodes:
        if node.op != "get_attr" or all(user.target is _LIFT_FRESH for user in node.users):
            continue  # the second kind is a constant made in forward: torch.tensor(2.0)
        tensor = getattr(graph, node.target)
        if tensor.requires_grad:
            raise EngineError(
                f"forward uses a tensor of shape {list(tensor.shape)} that requires a gradient and is no parameter of the "
                "model: register it as one"
            )
        with graph.graph.inserting_after(last):
            last = graph.graph.placeholder(f"closed_over_{len(lifted)}")
        last.meta = dict(node.meta)
        node.replace_all_uses_with(last)
        graph.graph.erase_node(node)
        lifted.append(tensor)
    graph.recompile()
    return lifted


def _settle_scalars(graph: torch.fx.GraphModule) -> None:
    """Has each scalar that the optimizer derives (bias corrections and the like) computed once, into memory.

    Inductor would compute it anew for every vector of every parameter: for Adam two calls of `pow` per 16 weights. It
    never computes through `as_strided`, which changes nothing on a scalar.
    """
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not _is_double_scalar(node):
            continue
        readers = [user for user in node.users if isinstance(user.meta.get("val"), Tensor) and user.meta["val"].dim()]
        if not readers:
            continue
        with graph.graph.inserting_after(node):
            settled = graph.graph.call_function(torch.ops.aten.as_strided.default, (node, [], []))
        settled.meta = dict(node.meta)
        for reader in readers:
            reader.replace_input_with(node, settled)
    graph.recompile()


def _is_double_scalar(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 0 and value.dtype == torch.float64


_LIFT_FRESH = torch.ops.aten.lift_fresh_copy.default


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
