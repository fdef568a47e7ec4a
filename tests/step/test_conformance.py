"""torch's own test databases: every module and every optimizer as a captured graph, against plain PyTorch steps.

The tests take the first input of each module and the first refused one, and all settings of each optimizer.
`python -m tests.step.test_conformance` takes every input of every module and prints how many agree.
"""

from __future__ import annotations

import copy
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn, optim

from fasttrain.errors import FasttrainError
from fasttrain.metrics import RunningMetrics
from fasttrain.step.eager import EagerEngine
from fasttrain.step.plan import make_engine
from fasttrain.step.spec import StepSpec, normalise_forward
from fasttrain.step.trace import trace_step
from tests.step.agreement import run_graph
from tests.step.models import ASKED, CPU

_flags = torch.backends.flags_frozen.__globals__

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch's own tests, over what they import
    may_set_flags = _flags["__allow_nonbracketed_mutation_flag"]
    from torch.testing._internal.common_modules import module_db
    from torch.testing._internal.common_optimizers import optim_db

    # They forbid the whole process to set flags of cuDNN, which other tests do.
    _flags["__allow_nonbracketed_mutation_flag"] = may_set_flags

DTYPE = torch.float64
NUM_STEPS = 4

NO_LENGTHS = "refused: ctc_loss reads the lengths of its sequences on the host"
NO_COUNT = "refused: a BatchNorm with momentum=None reads on the host"
NO_MASK = "refused: nn.TransformerEncoder and nn.Transformer compare a mask with the causal one on the host"
NO_VARIANCE = "refused: gaussian_nll_loss reads on the host whether a variance is negative"

REFUSED: dict[str, dict[int, str]] = {
    "nn.BatchNorm1d": {2: NO_COUNT},
    "nn.BatchNorm2d": {1: NO_COUNT},
    "nn.BatchNorm3d": {1: NO_COUNT},
    "nn.CTCLoss": dict.fromkeys(range(40), NO_LENGTHS),
    "nn.Transformer": dict.fromkeys(range(32, 64), NO_MASK),
    "nn.TransformerEncoder": dict.fromkeys(range(19, 35), NO_MASK),
    "nn.GaussianNLLLoss": dict.fromkeys(range(5), NO_VARIANCE),
}
"""By module and number of its input, what is not compiled, and the words that say why."""

NOT_WHOLE = {
    "Adafactor": "optimizer eager: the step of Adafactor reads the value of a tensor",
    "LBFGS": "refused: .*LBFGS evaluates the loss several times a step",
    "Muon": "optimizer eager: its products have factors",
    "SparseAdam": "refused: the gradient of weight is sparse",
}
"""By optimizer, why it is not compiled at all, or steps eagerly after a compiled backward pass."""


class Job(NamedTuple):
    """One entry of a database.

    Attributes:
        build: makes the model, equal each time.
        optimizer: makes the optimizer of a model.
        args, kwargs: what the model is called with.
    """

    build: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], optim.Optimizer]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Scaled(nn.Module):
    """A module whose first floating-point input is multiplied by a parameter, so that its backward always runs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.scale = nn.Parameter(torch.tensor(0.9, dtype=DTYPE))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            args = (args[0] * self.scale, *args[1:])
        return self.module(*args, **kwargs)


def loss_of(output: Any) -> Any:
    """A scalar that all floating-point tensors of an output go into, with bounded gradients."""
    if isinstance(output, tuple | list):
        return sum(loss_of(each) for each in output)
    return nn.functional.softsign(output).mean() if isinstance(output, Tensor) and output.is_floating_point() else 0.0


def forward(model: nn.Module, batch: Any) -> Tensor:
    args, kwargs = batch
    return loss_of(model(*args, **kwargs))


def batch_of(job: Job, number: int) -> Any:
    """The inputs, as new tensors; the first is another for each step."""

    def new(value: Any, factor: float = 1.0) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach() * factor if value.is_floating_point() else value.clone()

    first = [new(value, 1 - 0.05 * number) for value in job.args[:1]]
    return (*first, *map(new, job.args[1:])), {name: new(value) for name, value in job.kwargs.items()}


def plain_steps(job: Job) -> tuple[list[Tensor], dict[str, Any]]:
    """The losses and the final state of a plain PyTorch loop."""
    model = job.build()
    optimizer = job.optimizer(model)
    losses: list[Tensor] = []
    for number in range(NUM_STEPS):
        torch.manual_seed(number)
        batch = batch_of(job, number)

        def closure(batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            loss = forward(model, batch)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).detach())
    return losses, {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def graph_steps(job: Job) -> tuple[list[Tensor], dict[str, Any], str]:
    """The same by one eager step and then the captured graph; and why the optimizer steps eagerly, if it does."""
    model = job.build()
    spec = StepSpec(
        model=model,
        optimizer=job.optimizer(model),
        forward=normalise_forward(forward, None),
        device=CPU,
        precision="fp32",
        accumulate=1,
        clip_norm=None,
        clip_value=None,
        metrics=RunningMetrics(CPU),
        scaler=None,
    )
    if spec.needs_closure:
        make_engine("compiled", spec)  # refuses it before anything is traced
    torch.manual_seed(0)
    losses = [EagerEngine(spec, ASKED).step(batch_of(job, 0))]
    traced = trace_step(spec, batch_of(job, 1))
    for number in range(1, NUM_STEPS):
        torch.manual_seed(number)
        losses.append(run_graph(traced, batch_of(job, number)).clone())
    return losses, {"model": model.state_dict(), "optimizer": spec.optimizer.state_dict()}, traced.why_eager or ""


def why_not_compiled(job: Job) -> str:
    """Compares graph and plain steps; returns why the job, or only its optimizer, is not compiled, else nothing.

    Raises:
        AssertionError: they differ.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the modules, over settings that are rarely meant
        wanted_losses, wanted = plain_steps(job)
        try:
            losses, found, why_eager = graph_steps(job)
        except FasttrainError as error:
            return f"refused: {error}"
    close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12, "equal_nan": True}
    torch.testing.assert_close((losses, found["model"]), (wanted_losses, wanted["model"]), **close)
    for group in (*found["optimizer"]["param_groups"], *wanted["optimizer"]["param_groups"]):
        group.pop("fused", None)  # the eager engine chooses it where it was left open, and its Adam counts in fp32
    torch.testing.assert_close(found["optimizer"], wanted["optimizer"], check_dtype=False, **close)
    return why_eager and f"optimizer eager: {why_eager}"


def module_jobs(info: Any) -> list[Job]:
    def momentum(model: nn.Module) -> optim.Optimizer:
        return optim.SGD(model.parameters(), lr=0.001, momentum=0.9)

    torch.manual_seed(0)
    given = info.module_inputs_func(info, device="cpu", dtype=DTYPE, requires_grad=False, training=True)
    return [_module_job(info, each, momentum) for each in given]


def _module_job(info: Any, given: Any, optimizer: Callable[[nn.Module], optim.Optimizer]) -> Job:
    made, called = given.constructor_input, given.forward_input
    args, kwargs = (called.args, called.kwargs) if called is not None else ((), {})

    def build() -> nn.Module:
        torch.manual_seed(1)
        module = info.module_cls(*copy.deepcopy(made.args), **copy.deepcopy(made.kwargs)).to(DTYPE).train()
        if isinstance(module, nn.modules.lazy.LazyModuleMixin):
            with torch.no_grad():
                module(*args, **kwargs)
        return Scaled(module)

    return Job(build, optimizer, args, kwargs)


def optimizer_jobs(info: Any) -> list[Job]:
    return [_optimizer_job(info.optim_cls, each.kwargs) for each in info.optim_inputs_func("cpu")]


def _optimizer_job(kind: type[optim.Optimizer], kwargs: dict[str, Any]) -> Job:
    is_sparse = kind is optim.SparseAdam

    def build() -> nn.Module:
        torch.manual_seed(1)
        if is_sparse:
            return nn.Embedding(7, 3, sparse=True).to(DTYPE)
        has_bias = kind is not optim.Muon  # which takes matrices alone
        return nn.Sequential(nn.Linear(4, 5, bias=has_bias), nn.Tanh(), nn.Linear(5, 3, bias=has_bias)).to(DTYPE)

    generator = torch.Generator().manual_seed(2)
    inputs = torch.tensor([1, 5, 1, 3]) if is_sparse else torch.randn(6, 4, generator=generator, dtype=DTYPE)
    return Job(build, lambda model: kind(model.parameters(), **copy.deepcopy(kwargs)), (inputs,), {})


@pytest.mark.parametrize("info", module_db, ids=lambda info: info.name)
def test_modules(info: Any) -> None:
    refused = REFUSED.get(info.name, {})
    for number, job in enumerate(module_jobs(info)):
        if number in (0, min(refused, default=0)):
            check(job, refused.get(number), f"{info.name}, input {number}")


@pytest.mark.usefixtures("in_double")  # NAdam keeps a product in the default type
@pytest.mark.parametrize("info", optim_db, ids=lambda info: info.optim_cls.__name__)
def test_optimizers(info: Any) -> None:
    for number, job in enumerate(optimizer_jobs(info)):
        check(job, NOT_WHOLE.get(info.optim_cls.__name__), f"{info.optim_cls.__name__}, setting {number}")


def check(job: Job, expected: str | None, name: str) -> None:
    """Fails where graph and plain steps differ, or where a job is compiled or not against what is expected."""
    why = why_not_compiled(job)
    assert (not why) if expected is None else re.match(expected, why), f"{name}: {why or 'is compiled now'}"


def main() -> int:
    """Every input of every module and every setting of every optimizer; prints what is not expected, then counts."""
    counts: Counter[str] = Counter()
    every = [(info.name, module_jobs(info), REFUSED.get(info.name, {})) for info in module_db]
    for name, jobs, refused in every:
        for number, job in enumerate(jobs):
            counts[f"modules: {_outcome(job, refused.get(number), f'{name}, input {number}')}"] += 1
    torch.set_default_dtype(DTYPE)
    for info in optim_db:
        name = info.optim_cls.__name__
        for number, job in enumerate(optimizer_jobs(info)):
            counts[f"optimizers: {_outcome(job, NOT_WHOLE.get(name), f'{name}, setting {number}')}"] += 1
    for what, count in sorted(counts.items()):
        print(f"{count:5} {what}")  # noqa: T201
    return int(any("unexpected" in what for what in counts))


def _outcome(job: Job, expected: str | None, name: str) -> str:
    try:
        check(job, expected, name)
    except Exception as error:
        print(f"{name}: {error}", flush=True)  # noqa: T201
        return "unexpected"
    return expected or "the same"


if __name__ == "__main__":
    sys.exit(main())
