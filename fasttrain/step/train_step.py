"""`TrainStep`: one training step of the user's model, for a loop that the user keeps.

A compiled step in steady state passes these modules, in this order:

1. `train_step`: the public object.
2. `ladder`: which of eager and the compiled programs runs; when to verify or to compile.
3. `candidate`: one compiled program and where it is on its way up the ladder.
4. `walk` (resident rows) or `program` (batches): calls the machine code, once a step or many steps a call.
5. `trace`: the guards and the inputs of the program: parameters, optimizer state, options, batch.
6. `capture`: the guards on what the user's forward read.

An eager step passes `train_step`, `ladder` (under "auto") and `eager`. `make_engine` says which engine runs a step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor, nn

from fasttrain.data.loader import Sources
from fasttrain.data.resident import Span
from fasttrain.device import Choice, choose_precision, resolve_device
from fasttrain.errors import ConfigError, EngineError
from fasttrain.metrics import Metric, RunningMetrics
from fasttrain.step.build import cuda_home
from fasttrain.step.candidate import Backend, ProgramBackend
from fasttrain.step.cudagraph import GraphBackend
from fasttrain.step.eager import EagerEngine, TorchCompileEngine, require_compiler
from fasttrain.step.ladder import Ladder
from fasttrain.step.spec import (
    Engine,
    StepSpec,
    check_functions,
    check_model,
    check_optimizer,
    describe,
    normalise_forward,
    run_steps,
)
from fasttrain.step.timing import Waits

__all__ = ["EngineName", "TrainStep", "explain_auto", "make_engine"]

Batch = Any


class TrainStep:
    """Steps 1, 4 and 5 of the book's loop around the user's 2 and 3: zero the gradients, backward, optimizer step.

    The model must be in train mode, its batches on the device. The model, its parameters and the optimizer stay the
    user's: the very same tensors are updated in place.

    An optimizer that needs a closure (LBFGS) steps eagerly: each evaluation zeroes the gradients, runs forward and
    backward and clips; loss and metrics are those of the first evaluation of a step.

    `copy.deepcopy` makes an independent step, with copies of the model and the optimizer, at the same point of the
    training; it compiles or loads its programs anew. A step cannot be pickled: save the `state_dict()`s.

    Args:
        model: the model; not moved.
        optimizer: over the model's parameters; neither its options nor its state are replaced (but "graphed" moves
            step counts that are on the host to the parameters' device).
        forward: (model, batch) -> loss, or (loss, predictions, targets).
        loss: instead of forward, (predictions, targets) -> loss, for (inputs, targets) batches.
        device: where the step runs; None is where the model is.
        precision: "fp32", "bf16", "fp16" or "auto" (see `fasttrain.device.choose_precision`).
        engine: "auto", "eager", "compiled", "graphed" (on CUDA) or "torch-compile".
        accumulate: N: `(loss / N).backward()` for each batch, and an optimizer step at each Nth batch and at the last.
            A short last group is divided by N too, so that each of its batches counts as much as any other.
        clip_norm: `torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)` before each optimizer step: over all
            of the model's parameters, also those that the optimizer does not have, and over no others.
        clip_value: `torch.nn.utils.clip_grad_value_(model.parameters(), clip_value)`, before the norm is clipped.
        metrics: by name: functions (loss, predictions, targets) -> scalar tensor, of which an epoch has the mean of the
            batches' values; or objects with `update(predictions, targets)`, `compute()` and `reset()` (as torchmetrics
            has), which are computed from the whole epoch. Steps with one of the latter run eagerly.

    Attributes:
        metrics: the running metrics; `compute()` reads them (and waits), `reset()` starts anew.
        device: where the step runs.
        precision: what the forward pass runs in, with the reason.
        sources: where batches come from.

    Raises:
        ConfigError: an option, or their combination, cannot work.
        DeviceError: the machine lacks the device or is no good at the precision.
        EngineError: the requested engine cannot run here.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        forward: Callable[[nn.Module, Batch], Any] | None = None,
        *,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        device: str | torch.device | None = None,
        precision: str = "fp32",
        engine: str = "auto",
        accumulate: int = 1,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        check_model(model)
        check_functions(forward, loss, metrics)
        check_optimizer(optimizer, model, [forward, loss, metrics])
        self.device = _agreed_device(model, device)
        self.precision = choose_precision(precision, self.device)
        self.metrics = RunningMetrics(self.device, metrics)
        self.sources = Sources(self.device)
        self.spec = StepSpec(
            model=model,
            optimizer=optimizer,
            forward=normalise_forward(forward, loss),
            device=self.device,
            precision=self.precision.value,  # pyright: ignore[reportArgumentType]  # checked by choose_precision
            accumulate=accumulate,
            clip_norm=clip_norm,
            clip_value=clip_value,
            metrics=self.metrics,
            scaler=torch.amp.GradScaler(self.device.type) if self.precision.value == "fp16" else None,
        )
        self._engine_name = engine
        self._engine = make_engine(engine, self.spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainStep:
        """An independent step over copies of the user's objects; functions, as always, are not copied."""
        step = object.__new__(type(self))
        memo[id(self)] = step
        _copy_optimizer(self.spec.optimizer, memo)
        own = {name: value for name, value in vars(self).items() if name not in ("_engine", "sources")}
        vars(step).update(copy.deepcopy(own, memo))
        step.sources = Sources(step.device)
        step._engine = make_engine(step._engine_name, step.spec)
        return step

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuses pickling: programs and the functions of a step belong to this process."""
        raise TypeError(
            "a TrainStep cannot be pickled or copied by copy.copy: save model.state_dict() and optimizer.state_dict() "
            "and make a new one from them; copy.deepcopy makes an independent copy"
        )

    def __call__(self, batch: Batch) -> Tensor:
        """One step. Makes no host read.

        Args:
            batch: whatever forward takes, on the device.

        Returns:
            The batch's loss: a detached scalar on the device.
        """
        self.spec.meanwhile.why_eager = ""
        return self._engine.step(batch)

    @property
    def engine(self) -> Choice:
        """What runs the steps now (such as "eager" or "compiled"), and why."""
        return self._engine.choice

    @property
    def compile_s(self) -> float | None:
        """Seconds that steps have waited for a trace or a compiler so far; None where there was no wait."""
        return self._engine.compile_s

    def expect(self, steps: int) -> None:
        """Tells how many steps are to come: whether compiling can pay depends on it. Without it, none are expected."""
        self._engine.expect(steps)

    def run(self, batches: Iterable[Batch]) -> Iterator[Batch | Span]:
        """Steps on all the batches while it is iterated over, several a call where the engine can.

        Args:
            batches: as `step` takes them; of `resident(...)`, and of a `DataLoader` over tensors (see
                `fasttrain.data.loader.resident_loader`), several steps may be one call.

        Yields:
            After each call, what it ran: a batch, or a `Span` of several.
        """
        placed = iter(self.sources.of(batches))
        is_transitional = self.sources.is_transitional  # a program for this pass would not serve the next one
        self.spec.meanwhile.why_eager = "rows are recorded in this pass" if is_transitional else ""
        return run_steps(self._engine, placed)

    @property
    def span(self) -> int:
        """How many steps the engine would run in one call now (see `steps`); 0: it takes batches one by one."""
        return self._engine.span

    def steps(self, span: Span) -> Tensor:
        """Several steps, in one call where the engine can. Makes no host sync.

        Args:
            span: the next batches of a resident epoch, `iter(resident(...)).take(step.span)`.

        Returns:
            The batches' losses: [steps], detached, on the device.
        """
        self.spec.meanwhile.why_eager = ""
        return self._engine.steps(span)

    def settle(self, batches: Iterable[Batch]) -> None:
        """Trains on until it is decided what runs the steps, and waits for the compiler meanwhile.

        Args:
            batches: where one pass over them is too short, there are more.
        """
        placed = self.sources.of(batches)
        self.spec.meanwhile.why_eager = ""
        self._engine.settle(placed)

    def close(self) -> None:
        """Ends what runs beside the training (a compiling child).

        Steps may follow; under "auto" they compile nothing until more are expected (`expect`).
        """
        self._engine.close()

    def flush(self) -> None:
        """Steps the optimizer with what an unfinished accumulation has gathered; call it after the last batch.

        Each batch of a short group has added the gradients of `loss / accumulate`, as those of a full group.
        """
        self._engine.flush()


def _copy_optimizer(optimizer: torch.optim.Optimizer, memo: dict[int, Any]) -> None:
    """Puts a copy of the optimizer into a memo, with the attributes that `Optimizer.__getstate__` leaves out."""
    copied = copy.deepcopy(optimizer, memo)
    for name, value in vars(optimizer).items():
        if name not in vars(copied) and not callable(value):  # hooks and a scheduler's wrapper are of the original
            setattr(copied, name, copy.deepcopy(value, memo))


def _agreed_device(model: nn.Module, device: str | torch.device | None) -> torch.device:
    """The one device of the model's parameters and buffers, which must be `device` where that is given."""
    given: Any = device
    if given is not None and not isinstance(given, str | torch.device):
        raise ConfigError(
            f"device must be a name such as 'cpu' or 'cuda:0', or a torch.device; it is {describe(given)}"
        )
    found = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(found) > 1:
        raise ConfigError(f"the model is spread over {', '.join(map(str, found))}; move it to one device first")
    home = resolve_device(found.pop()) if found else torch.device("cpu")
    if device is None:
        return home
    wanted = resolve_device(device)
    if wanted.type != home.type or wanted.index not in (None, home.index):
        raise ConfigError(
            f"device {str(device)!r} was asked for, but the model is on {home}: move it there before its optimizer is "
            "made (an optimizer keeps the parameters that it was given)"
        )
    return home


EngineName = Literal["auto", "eager", "compiled", "torch-compile", "graphed"]


def explain_auto(device: torch.device) -> Choice:
    """What "auto" does on a device, before any step has run."""
    try:
        _require_compiler(device)
    except EngineError as error:
        return Choice("eager", str(error))
    best = "compiled" if device.type == "cpu" else "graphed"
    return Choice(
        f"eager, then {best}",
        "a child process compiles the whole step where the steps that are left can repay it; the program is kept if it "
        "gives the same numbers and is measured faster",
    )


def make_engine(wanted: str, spec: StepSpec) -> Engine:
    """The engine of that name for a step.

    Raises:
        ConfigError: there is no such engine.
        EngineError: it cannot run this step here.
    """
    if wanted not in get_args(EngineName):
        raise ConfigError(f"engine {wanted!r}: use one of {', '.join(get_args(EngineName))}")
    choice = Choice(wanted, "asked for")
    if spec.needs_closure and wanted in ("compiled", "graphed"):
        raise EngineError(f"engine {wanted!r} cannot run this step: {spec.why_closure}; use engine 'eager' or 'auto'")
    if wanted == "auto" and spec.needs_closure:
        return EagerEngine(spec, Choice("eager", spec.why_closure))
    if wanted == "eager":
        return EagerEngine(spec, choice)
    if wanted == "torch-compile":
        return TorchCompileEngine(spec, choice)
    if wanted == "auto" and (planned := explain_auto(spec.device)).value == "eager":
        return EagerEngine(spec, planned)
    if wanted != "auto":
        _require_compiler(spec.device)
    waits = Waits()
    choice = Choice("eager", "there were too few steps to measure anything") if wanted == "auto" else choice
    return Ladder(spec, choice, _backend(wanted, spec, waits), waits, waits_for_compiler=wanted != "auto")


def _require_compiler(device: torch.device) -> None:
    """Raises EngineError where this machine cannot compile a step for a device."""
    require_compiler()
    if device.type == "cuda":
        cuda_home()


def _backend(wanted: str, spec: StepSpec, waits: Waits) -> Backend:
    """What an engine's compiled steps run by."""
    if wanted == "graphed" or (wanted == "auto" and spec.device.type == "cuda"):
        return GraphBackend(spec, waits, is_required=wanted == "graphed")
    return ProgramBackend(spec)
