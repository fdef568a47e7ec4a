"""The eager engine, operator by operator, and `torch.compile` as an engine to measure against.

The eager engine is the textbook's step without its waits. It uses a fused optimizer only where that is known to give
the same numbers: `KERNEL_FAULTS` lists the faults of torch's fused kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fasttrain.data.resident import Span
from fasttrain.device import Choice, autocast_dtype, cpp_compiler
from fasttrain.errors import ConfigError, EngineError
from fasttrain.metrics import Scoring, scoring_of
from fasttrain.step.spec import Forward, StepOutput, StepSpec
from fasttrain.step.torch_private import (
    dynamo_error,
    note_step,
    replace_listing,
    restore_listing,
    run_backward,
    scaler_tensors,
    step_optimizer,
    tensor_check,
    was_step_taken,
)

__all__ = [
    "KERNEL_FAULTS",
    "EagerEngine",
    "FusedWhereOpen",
    "KernelFault",
    "TorchCompileEngine",
    "Update",
    "eager_meanwhile",
    "raise_index_error",
    "require_compiler",
    "run_forward",
]

Batch = Any


class EagerEngine:
    """Runs each step operator by operator: fused optimizer where left open, gradients set to None, no host read.

    One exception: a `GradScaler` (fp16) reads the device once a step, unless the optimizer was made with `fused=True`.

    Args:
        spec: the step.
        choice: why it is this engine.
        forward: what runs in place of the spec's forward (a compiled form of it), None for itself.

    Attributes:
        choice: what runs, and why.
        compile_s: None: nothing is compiled.
        span: 0: nothing is gained by running several steps a call.
        has_stepped: whether the optimizer has stepped, and so made its state.
    """

    def __init__(self, spec: StepSpec, choice: Choice, forward: Forward | None = None) -> None:
        self.choice = choice
        self._spec = spec
        self._forward = forward or spec.forward
        self._needs_closure = spec.needs_closure
        self._fused_where_open = FusedWhereOpen(spec.optimizer)
        self.compile_s: float | None = None
        self.span = 0
        self.has_stepped = False
        self._untrained: list[Tensor] | None = None

    def step(self, batch: Batch) -> Tensor:
        """See `Engine.step`."""
        if self._needs_closure:
            return self._step_with_closure(batch)
        loss = self.gather(batch)
        self.apply_if_due()
        return loss

    def gather(self, batch: Batch) -> Tensor:
        """The first half of a step: forward, backward of `loss / accumulate`, metrics. Returns the loss as `step` does.

        The first batch of a group starts without gradients, as after `model.zero_grad()`: no parameter of the model or
        the optimizer has one.
        """
        spec = self._spec
        if not spec.gathered.count:
            self._zero_gradients()  # the user may have left some, or have given the optimizer new parameters
        output = run_forward(spec, self._forward, batch)
        scoring = self._scoring(output)  # before the backward pass, which frees the graph
        scaled = output.loss if spec.accumulate == 1 else output.loss / spec.accumulate
        self._backward(scaled if spec.scaler is None else spec.scaler.scale(scaled))
        loss = output.loss.detach()
        spec.metrics.update(loss, output.predictions, output.targets, scoring=scoring)
        spec.gathered.count += 1
        return loss

    def apply_if_due(self) -> None:
        """The second half: clipping and the optimizer's step, where the gradients hold all batches of a group."""
        if self._spec.gathered.count == self._spec.accumulate:
            self._apply()

    def flush(self) -> None:
        """See `Engine.flush`."""
        if self._spec.gathered.count:
            self._apply()
        self._untrained = None  # the model may have others when the next epoch begins

    def steps(self, span: Span) -> Tensor:
        """See `Engine.steps`."""
        return torch.stack([self.step(batch) for batch in span.batches()])

    def expect(self, steps: int) -> None:
        """See `Engine.expect`: eager has nothing to plan."""

    def settle(self, batches: Iterable[Batch]) -> None:
        """See `Engine.settle`: nothing is to be decided."""

    def close(self) -> None:
        """See `Engine.close`: nothing runs beside eager."""

    def _scoring(self, output: StepOutput) -> Scoring | None:
        """How this batch's accuracy is found."""
        return scoring_of(*output)

    def _step_with_closure(self, batch: Batch) -> Tensor:
        """A step of an optimizer that evaluates the loss as often as it likes; metrics count the first evaluation."""
        spec = self._spec
        losses: list[Tensor] = []

        def closure() -> Tensor:
            self._zero_gradients()
            output = run_forward(spec, self._forward, batch)
            scoring = None if losses else self._scoring(output)
            self._backward(output.loss)
            if spec.clip_norm is not None or spec.clip_value is not None:
                self._clip()
            if not losses:
                losses.append(output.loss.detach())
                spec.metrics.update(losses[0], output.predictions, output.targets, scoring=scoring)
            return output.loss.detach()  # LBFGS makes a float of it: PyTorch warns where it requires a gradient

        optimizer: Any = spec.optimizer  # its annotation has closures return a float
        optimizer.step(closure)
        self._zero_gradients()
        self.has_stepped = True
        if not losses:
            raise ConfigError(f"{type(spec.optimizer).__name__}.step did not call its closure, so there is no loss")
        return losses[0]

    def _backward(self, loss: Tensor) -> None:
        if type(loss) is not Tensor:
            loss.backward()
            return
        # A new one each time: autograd may hand it on as a parameter's gradient, which is changed in place.
        run_backward(loss, torch.ones_like(loss))

    def _apply(self) -> None:
        spec = self._spec
        spec.gathered.count = 0  # first: a step that fails is not gone on with
        if spec.clip_norm is not None or spec.clip_value is not None:
            self._clip()
        with self._fused_where_open:
            if spec.scaler is None:
                step_optimizer(spec.optimizer)
            else:
                spec.scaler.step(spec.optimizer)
                spec.scaler.update()
        if not self.has_stepped and (spec.scaler is None or was_step_taken(spec.scaler)):
            self.has_stepped = True
            note_step(spec.optimizer)
        self._zero_gradients()

    def _zero_gradients(self) -> None:
        """Not by `Optimizer.zero_grad`, which takes 13 us for two parameters; this takes 1."""
        if self._untrained is None:
            self._untrained = self._spec.untrained()
        for parameter in self._spec.trained():
            parameter.grad = None
        for parameter in self._untrained:
            parameter.grad = None

    def _clip(self) -> None:
        """As `torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)`; values are clipped before the norm."""
        spec = self._spec
        self._untrained = spec.untrained()  # this loop over the model is a small part of what clipping takes
        if spec.scaler is not None:
            spec.scaler.unscale_(spec.optimizer)
            self._unscale_untrained(spec.scaler, self._untrained)
        parameters = list(spec.model.parameters())
        if spec.clip_value is not None:
            torch.nn.utils.clip_grad_value_(parameters, spec.clip_value)
        if spec.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, spec.clip_norm)

    def _unscale_untrained(self, scaler: torch.amp.GradScaler, parameters: Iterable[Tensor]) -> None:
        """What `GradScaler.unscale_` leaves scaled, since the optimizer does not have it."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        tensors = scaler_tensors(scaler)
        if gradients and tensors is not None:
            inverse = tensors[0].double().reciprocal().float()
            for gradient in gradients:
                gradient.mul_(inverse)


def run_forward(spec: StepSpec, forward: Forward, batch: Batch) -> StepOutput:
    """The forward pass at the spec's precision."""
    dtype = autocast_dtype(spec.precision)
    if dtype is None:
        return forward(spec.model, batch)
    # No weight cache: it would outlive the step in a captured graph (pytorch#71631); each weight is cast once anyway.
    with torch.autocast(spec.device.type, dtype=dtype, cache_enabled=False):
        return forward(spec.model, batch)


def eager_meanwhile(spec: StepSpec) -> str | None:
    """Why steps run eagerly for now, whatever is compiled; None where nothing asks for that."""
    if spec.meanwhile.why_eager:
        return spec.meanwhile.why_eager
    if torch.is_anomaly_enabled():
        return "torch.autograd.set_detect_anomaly is on, and only eager steps are checked by it"
    return None


def raise_index_error(spec: StepSpec, batches: Iterable[Batch], error: RuntimeError) -> None:
    """Raises PyTorch's own IndexError, from the user's line, where a program has met an index out of range.

    The program has not finished its step; forward runs again on its batches, eagerly, to find the line.

    Raises:
        IndexError: an index, such as an id for an embedding, is out of range.
    """
    if not any(said in str(error) for said in _OUT_OF_RANGE):
        return
    with torch.no_grad():
        for batch in batches:
            try:
                run_forward(spec, spec.forward, batch)
            except IndexError as found:
                raise found from None  # without the thirty lines of the program's own message
    raise IndexError("an index in the batch, such as an id for an embedding, is out of range") from error


_OUT_OF_RANGE = ("index out of bounds", "index out of range in the ids of rows")
"""What compiled programs say: code of their compiler, followed by names of its variables, and our own kernels."""

_NUMBERS = ("lr", "betas", "eps", "weight_decay", "momentum", "dampening", "lr_decay")
"""Options that fused kernels take as numbers."""

_NUMBER = (int, float)
"""Not `int | float`, which Python would make anew in each of seven comparisons: 1 us."""


class FusedWhereOpen:
    """Runs the optimizer's fused kernels where the user left `fused` and `foreach` open, which they stay.

    On a CPU torch's default is one operator after the other: 117 us for a linear model's Adam where the fused kernel
    takes 64 (Xeon with AMX, one thread). Fused kernels run only where they are known to give the same numbers (see
    `KERNEL_FAULTS`); a group that meets a fault runs as torch runs it by default. Gradients, state and parameters may
    be other tensors, or lie otherwise in memory, than in the step before: they are compared within every step, where
    torch lists them for its kernels (hooks may have changed them before), and the faults are looked for again where
    something differs. What is listed for the comparison saves torch from listing it: see LOG.md for the times.

    Use it as a context around `optimizer.step()`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._fused: dict[int, dict[str, Any]] = {}
        self._updated: dict[int, list[int]] = {}
        self._listings: dict[int, _Listing] = {}

    def __enter__(self) -> None:
        """From now on `optimizer.step()` sets `fused` in groups that leave it open."""
        replace_listing(self._optimizer, self._list)

    def __exit__(self, *error: object) -> None:
        """Leaves `fused` open again."""
        restore_listing(self._optimizer, self._list)
        for group in self._fused.values():
            group["fused"] = None
        self._fused = {}

    def _list(self, listing: Callable[..., Any], group: dict[str, Any], *lists: list[Any]) -> Any:
        """Fills the lists as `listing`, torch's own function, does: parameters, gradients, and each kind of state."""
        if self._fused.pop(id(group), None) is not None:  # a step that goes over its groups again
            group["fused"] = None
        if not _is_open(group):
            return listing(group, *lists)
        state: dict[Tensor, dict[str, Any]] = self._optimizer.state
        known = self._listings.get(id(group))
        if known is not None and known.fill(group, state, lists):
            if known.is_right:
                self._set_fused(group)
            return known.result
        devices = ("cpu",) if type(self._optimizer) is torch.optim.Adagrad else ("cpu", "cuda")
        is_right = _is_right(group, state, devices)
        if is_right:
            self._set_fused(group)
        result = listing(group, *lists)
        self._learn(group, lists, is_right, result)
        return result

    def _set_fused(self, group: dict[str, Any]) -> None:
        group["fused"] = True
        self._fused[id(group)] = group

    def _learn(self, group: dict[str, Any], lists: Sequence[list[Any]], is_right: bool, result: Any) -> None:
        """Keeps what was listed where the same parameters come twice: gradients that come and go would need many."""
        key, updated = id(group), [*map(id, lists[0])]
        is_again = self._updated.get(key) == updated
        groups = {id(each) for each in self._optimizer.param_groups}
        self._updated = {each: ids for each, ids in self._updated.items() if each in groups} | {key: updated}
        self._listings = {each: known for each, known in self._listings.items() if each in groups and each != key}
        if is_again:
            names = _names(lists, self._optimizer.state)
            tensors = [each for values in lists for each in values]
            if names is not None and all(type(each) in _PLAIN and each.layout is torch.strided for each in tensors):
                self._listings[key] = _Listing(group, lists, names, is_right=is_right, result=result)


_GRADIENT = attrgetter("grad")


class _Listing:
    """An optimizer's tensor lists for one parameter group, kept to fill and check the next step's in one pass.

    Attributes:
        is_right: whether no fault was met.
        result: what torch's function returned.
    """

    def __init__(
        self, group: dict[str, Any], lists: Sequence[list[Any]], names: list[str | None], *, is_right: bool, result: Any
    ) -> None:
        self.is_right, self.result = is_right, result
        self._members: list[Tensor] = [*group["params"]]
        self._updated: list[Tensor] = [*lists[0]]
        self._others = [each for each in self._members if each.grad is None]
        self._readers = [itemgetter(name) for name in names if name is not None]
        self._filled = [0, 1, *(place for place, name in enumerate(names, 2) if name is not None)]
        self._options = _listed_by(group)
        tensors = [each for values in lists for each in values]
        self._differ = tensor_check(tensors, [frozenset()] * len(tensors))

    def fill(self, group: dict[str, Any], state: dict[Tensor, dict[str, Any]], lists: Sequence[list[Any]]) -> bool:
        """Fills the lists and returns True, or leaves them empty where something is not as it was."""
        members = group["params"]
        if len(members) != len(self._members) or not all(map(is_, members, self._members)):
            return False
        if _listed_by(group) != self._options or (self._others and any(each.grad is not None for each in self._others)):
            return False
        filled = [self._updated, [*map(_GRADIENT, self._updated)]]
        tensors = [*self._updated, *filled[1]]
        try:
            entries = [*map(state.__getitem__, self._updated)] if self._readers else ()
            for read in self._readers:
                filled.append([*map(read, entries)])
                tensors += filled[-1]
        except KeyError:
            return False
        if self._differ(tensors) is not None:
            return False
        for place, values in zip(self._filled, filled, strict=True):
            lists[place].extend(values)
        return True


def _listed_by(group: dict[str, Any]) -> tuple[Any, bool]:
    """The options of open groups that decide what is listed."""
    return group.get("amsgrad"), group.get("momentum", 0) != 0


def _names(lists: Sequence[list[Any]], state: dict[Tensor, dict[str, Any]]) -> list[str | None] | None:
    """The kind of state in each list after parameters and gradients, None for an empty list; None where unknown."""
    parameters, gradients, *columns = lists
    if not parameters or not all(each.grad is gradient for each, gradient in zip(parameters, gradients, strict=True)):
        return None
    found: list[str | None] = []
    for column in columns:
        if not column:
            found.append(None)
            continue
        names = [name for name, value in state.get(parameters[0], {}).items() if value is column[0]]
        if len(names) != 1 or [id(state[each].get(names[0])) for each in parameters] != [*map(id, column)]:
            return None
        found += names
    return found


def _is_right(group: dict[str, Any], state: dict[Tensor, dict[str, Any]], devices: Collection[str]) -> bool:
    """Whether the group meets no fault."""
    updates: list[Update] = []
    for parameter in group["params"]:
        gradient = parameter.grad
        if gradient is not None:
            if type(parameter) not in _PLAIN or parameter.device.type not in devices:
                return False
            if type(gradient) is not Tensor or gradient.layout is not torch.strided:
                return False
            updates.append(Update(parameter, gradient, state.get(parameter, {}), bool(group.get("amsgrad"))))
    return not any(fault.is_met(updates) for fault in KERNEL_FAULTS)


_PLAIN = (nn.Parameter, Tensor)


def _is_open(group: dict[str, Any]) -> bool:
    """Whether the user left the choice of kernels to torch, and the options are numbers, as fused kernels take them."""
    if group["fused"] is not None or group["foreach"] is not None or group.get("differentiable"):
        return False
    for name in _NUMBERS:
        value = group.get(name, 0)
        if not isinstance(value, _NUMBER) and not (
            isinstance(value, tuple) and all(isinstance(each, _NUMBER) for each in cast("tuple[Any, ...]", value))
        ):
            return False
    return True


class Update(NamedTuple):
    """What one step of an optimizer does to a parameter starts from these."""

    parameter: Tensor
    gradient: Tensor
    entries: dict[str, Any]
    is_amsgrad: bool = False


class KernelFault(NamedTuple):
    """What torch's fused kernels get wrong, or are not known to get right.

    Attributes:
        what: the fault.
        issue: where it was reported.
        versions: of torch, in which it was seen.
        is_met: whether the updates of a group meet it.
    """

    what: str
    issue: str
    versions: str
    is_met: Callable[[Sequence[Update]], bool]


def _has_gaps_or_other_layout(updates: Sequence[Update]) -> bool:
    return not all(_is_dense(each.parameter) and _is_laid_out_as(each.gradient, each.parameter) for each in updates)


def _has_state_in_another_layout(updates: Sequence[Update]) -> bool:
    return not all(
        _is_laid_out_as(value, parameter)
        for parameter, _, entries, _ in updates
        for name, value in entries.items()
        if isinstance(value, Tensor) and name != "step"
    )


def _has_another_dtype(updates: Sequence[Update]) -> bool:
    dtypes = (torch.float32, torch.float64)
    return not all(
        parameter.dtype in dtypes
        and gradient.dtype == parameter.dtype
        and all(
            value.dtype == parameter.dtype
            for name, value in entries.items()
            if isinstance(value, Tensor) and name != "step"
        )
        for parameter, gradient, entries, _ in updates
    )


def _has_late_gradients(updates: Sequence[Update]) -> bool:
    buffers = [entries.get("momentum_buffer") is None for _, _, entries, _ in updates]
    return any(buffers) and not all(buffers)


def _keeps_largest(updates: Sequence[Update]) -> bool:
    return any(each.is_amsgrad for each in updates)


def _has_counts_elsewhere(updates: Sequence[Update]) -> bool:
    return any(
        isinstance(step := entries.get("step"), Tensor) and step.device != parameter.device
        for parameter, _, entries, _ in updates
    )


KERNEL_FAULTS = (
    KernelFault(
        "a parameter, or its gradient, is a strided view: the kernel walks over numel() elements from data_ptr(), and "
        "overwrites what lies between",
        "pytorch#106951, pytorch#110758",
        "2.11 to 2.13, CPU; refused on CUDA",
        _has_gaps_or_other_layout,
    ),
    KernelFault(
        "optimizer state in another memory format than the parameter: elements are paired by their place in memory",
        "NVIDIA/physicsnemo#1597, NVIDIA/physicsnemo#1614",
        "2.11 to 2.13, CPU; refused on CUDA",
        _has_state_in_another_layout,
    ),
    KernelFault(
        "bfloat16 and float16 under SGD: whole vectors stay as they are; other optimizers round otherwise",
        "pytorch#191763",
        "2.12 and 2.13, CPU",
        _has_another_dtype,
    ),
    KernelFault(
        "SGD with momentum, where some gradients were None in the first step: the list of buffers holds None",
        "not reported",
        "2.11 to 2.13",
        _has_late_gradients,
    ),
    KernelFault(
        "amsgrad, where a gradient is NaN: the last elements, which fill no vector, keep the largest that is a number",
        "not reported",
        "2.13, CPU",
        _keeps_largest,
    ),
    KernelFault(
        "step counts that unfused steps left on another device than the parameters: they are refused",
        "not reported",
        "2.11 to 2.13, CUDA",
        _has_counts_elsewhere,
    ),
)
"""When fused kernels are not used. A release of torch that mends a fault takes its row away; the test of the row
(tests/step/test_eager_fused.py) fails where torch has mended it."""


def _is_laid_out_as(tensor: Tensor, other: Tensor) -> bool:
    """Whether equal positions of the two are equal places in memory, counted from their first elements."""
    strides, others = tensor.stride(), other.stride()
    if strides == others:
        return tensor.shape == other.shape
    if tensor.shape != other.shape:
        return False
    return all(a == b for a, b, size in zip(strides, others, other.shape, strict=True) if size != 1)


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill their memory without gaps or overlaps, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


class TorchCompileEngine(EagerEngine):
    """Runs forward and loss (and, through autograd, backward) as compiled programs. The second step waits for them.

    A compiled forward does not show which loss it calls: accuracy is found as in the first step, which runs eagerly, in
    all batches whose predictions and targets have as many dimensions and the dtypes of the first.

    Args:
        spec: the step.
        choice: why it is this engine.

    Raises:
        EngineError: this machine has no compiler for the device, or torch cannot compile this forward.
    """

    def __init__(self, spec: StepSpec, choice: Choice) -> None:
        if spec.device.type == "cpu":
            require_compiler()
        super().__init__(spec, choice)
        self._kinds: Any = None
        self._first_scoring: Scoring | None = None

    def step(self, batch: Any) -> Tensor:
        """See `Engine.step`."""
        if self._kinds is None:  # the very first step runs eagerly
            return super().step(batch)
        if self.compile_s is None:
            self._forward = torch.compile(self._spec.forward)
            return self._compiling_step(batch)
        return super().step(batch)

    def _scoring(self, output: StepOutput) -> Scoring | None:
        kinds = [(each.dim(), each.dtype) for each in output[1:] if each is not None]
        if self._kinds is None:
            self._kinds, self._first_scoring = kinds, scoring_of(*output)
        return self._first_scoring if kinds == self._kinds else None

    def _compiling_step(self, batch: Any) -> Tensor:
        begin = time.perf_counter()
        try:
            loss = super().step(batch)
        except dynamo_error() as error:
            raise EngineError(f"engine 'torch-compile' cannot compile this forward: {error}") from error
        self.compile_s: float | None = time.perf_counter() - begin
        return loss


def require_compiler() -> None:
    """Checks that there is a C++ compiler.

    Raises:
        EngineError: there is none.
    """
    if cpp_compiler() is None:
        raise EngineError(
            "a compiled engine needs a C++ compiler, and none is on the PATH (set CXX or install g++); engine 'eager' "
            "needs none"
        )
