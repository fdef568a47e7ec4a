"""torch's own test databases: every module and every optimizer, as a captured graph and compiled, against plain steps.

`python -m tests.step.conformance` compares the captured graphs of every input of every module and of every setting of
every optimizer. `--compile` has them compiled, many to a program, and writes benchmarks/results/conformance-cpu.json.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import shlex
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import combinations, zip_longest
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn, optim

from benchmarks.conformance import ConformanceRecord, Outcome
from benchmarks.places import RESULTS, log
from fasttrain.errors import FasttrainError
from fasttrain.measure.bench.record import write_record
from fasttrain.measure.environment import environment, load_average, now
from fasttrain.metrics import RunningMetrics
from fasttrain.step import candidate
from fasttrain.step.eager import EagerEngine
from fasttrain.step.spec import StepSpec, normalise_forward
from fasttrain.step.trace import trace_step
from fasttrain.step.train_step import TrainStep, make_engine
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
    """An entry of a database, or several.

    Attributes:
        build: makes the model, equal each time.
        optimizer: makes the optimizer of a model.
        batch: what the model is called with in a step, new each time: arguments and keyword arguments.
    """

    build: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], optim.Optimizer]
    batch: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]


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


def batch_of(args: tuple[Any, ...], kwargs: dict[str, Any], number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs, as new tensors; the first is another for each step."""

    def new(value: Any, factor: float = 1.0) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach() * factor if value.is_floating_point() else value.clone()

    first = [new(value, 1 - 0.05 * number) for value in args[:1]]
    return (*first, *map(new, args[1:])), {name: new(value) for name, value in kwargs.items()}


def plain_steps(job: Job) -> tuple[list[Tensor], dict[str, Any]]:
    """The losses and the final state of a plain PyTorch loop."""
    model = job.build()
    optimizer = job.optimizer(model)
    losses: list[Tensor] = []
    for number in range(NUM_STEPS):
        torch.manual_seed(number)
        batch = job.batch(number)

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
    losses = [EagerEngine(spec, ASKED).step(job.batch(0))]
    traced = trace_step(spec, job.batch(1))
    for number in range(1, NUM_STEPS):
        torch.manual_seed(number)
        losses.append(run_graph(traced, job.batch(number)).clone())
    return losses, {"model": model.state_dict(), "optimizer": spec.optimizer.state_dict()}, traced.why_eager or ""


def compiled_steps(job: Job) -> tuple[list[Tensor], dict[str, Any], str]:
    """The same by the compiled engine: from the third on by program, which is verified in the second."""
    model = job.build()
    step = TrainStep(model, job.optimizer(model), forward, engine="compiled")
    losses: list[Tensor] = []
    with mock.patch.object(candidate, "VERIFIED_BATCHES", 1):
        for number in range(NUM_STEPS):
            torch.manual_seed(number)
            losses.append(step(job.batch(number)).clone())
    found = step.engine
    step.close()
    assert found.value == "compiled", found
    assert "ran eagerly" not in found.reason, found
    why_eager = found.reason.partition("steps eagerly: ")[2]
    return losses, {"model": model.state_dict(), "optimizer": step.spec.optimizer.state_dict()}, why_eager


def why_not_compiled(job: Job, steps: Callable[[Job], tuple[list[Tensor], dict[str, Any], str]] = graph_steps) -> str:
    """Compares steps with plain ones; returns why the job, or only its optimizer, is not compiled, else nothing.

    Raises:
        AssertionError: they differ.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the modules, over settings that are rarely meant
        wanted_losses, wanted = plain_steps(job)
        try:
            losses, found, why_eager = steps(job)
        except FasttrainError as error:
            return f"refused: {error}"
    close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12, "equal_nan": True}
    torch.testing.assert_close((losses, found["model"]), (wanted_losses, wanted["model"]), **close)
    for group in (*found["optimizer"]["param_groups"], *wanted["optimizer"]["param_groups"]):
        group.pop("fused", None)  # the eager engine chooses it where it was left open, and its Adam counts in fp32
    torch.testing.assert_close(found["optimizer"], wanted["optimizer"], check_dtype=False, **close)
    return why_eager and f"optimizer eager: {why_eager}"


def module_jobs(info: Any) -> list[Job]:
    return [_module_job(info, each) for each in _module_inputs(info)]


def _module_inputs(info: Any) -> list[Any]:
    torch.manual_seed(0)
    return list(info.module_inputs_func(info, device="cpu", dtype=DTYPE, requires_grad=False, training=True))


def distinct_inputs(info: Any) -> list[int]:
    """The inputs of a module that have two settings together which no input before them has.

    What is left out repeats the settings of others in a new combination.
    """
    settings = [_settings_of(each) for each in _module_inputs(info)]
    names = sorted({name for each in settings for name in each})
    seen: set[Any] = set()
    chosen: list[int] = []
    for number, each in enumerate(settings):
        pairs = set(combinations([(name, each.get(name)) for name in names], 2))
        if not chosen or not pairs <= seen:
            chosen.append(number)
            seen |= pairs
    return chosen


def _settings_of(given: Any) -> dict[str, str]:
    """What an input sets, by name: every option, and of tensors all but their values."""
    found: dict[str, str] = {}

    def visit(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found[name] = f"{value.dtype} {list(value.shape)} {value.stride()}"
        elif isinstance(value, tuple | list):
            found[name] = f"{type(value).__name__} of {len(value)}"
            for number, each in enumerate(value):
                visit(f"{name}[{number}]", each)
        elif isinstance(value, bool | int | float | str | torch.dtype | torch.device | None):
            found[name] = repr(value)
        else:
            found[name] = getattr(value, "__qualname__", type(value).__name__)
            own = value.named_modules() if isinstance(value, nn.Module) else [("", value)]
            for path, each in own:
                for key, setting in getattr(each, "__dict__", {}).items():
                    if isinstance(setting, bool | int | float | str | None):
                        visit(f"{name}.{path}.{key}", setting)

    for role, call in (("made of", given.constructor_input), ("called with", given.forward_input)):
        for key, value in {**dict(enumerate(call.args)), **call.kwargs}.items() if call is not None else ():
            visit(f"{role} {key}", value)
    return found


def momentum(model: nn.Module) -> optim.Optimizer:
    return optim.SGD(model.parameters(), lr=0.001, momentum=0.9)


def _module_job(info: Any, given: Any) -> Job:
    made, called = given.constructor_input, given.forward_input
    args, kwargs = (called.args, called.kwargs) if called is not None else ((), {})

    def build() -> nn.Module:
        torch.manual_seed(1)
        module = info.module_cls(*copy.deepcopy(made.args), **copy.deepcopy(made.kwargs)).to(DTYPE).train()
        if isinstance(module, nn.modules.lazy.LazyModuleMixin):
            with torch.no_grad():
                module(*args, **kwargs)
        return Scaled(module)

    return Job(build, momentum, partial(batch_of, args, kwargs))


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
    return Job(build, lambda model: kind(model.parameters(), **copy.deepcopy(kwargs)), partial(batch_of, (inputs,), {}))


# Compiled, many to a program: most of what a compiler takes is the same for one layer and for twenty.


class Bundle(nn.Module):
    """Modules that do not touch each other. Keeps each one's loss, for the sum would hide one that is NaN."""

    losses: Tensor

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.each = nn.ModuleList(modules)
        self.register_buffer("losses", torch.zeros(len(modules), dtype=DTYPE))

    def forward(self, *batches: Any) -> tuple[Tensor, ...]:
        pairs = zip(self.each, batches, strict=True)
        losses = [torch.as_tensor(forward(module, batch), dtype=DTYPE) for module, batch in pairs]
        self.losses = torch.stack(losses).detach()
        return tuple(losses)


def bundle_of_modules(jobs: Sequence[Job]) -> Job:
    def build() -> nn.Module:
        return Bundle([job.build() for job in jobs])

    return Job(build, momentum, lambda number: (tuple(job.batch(number) for job in jobs), {}))


def bundle_of_settings(info: Any, jobs: Sequence[Job], settings: Sequence[dict[str, Any]]) -> Job:
    """One optimizer with a group for each setting."""

    def build() -> nn.Module:
        return Bundle([job.build() for job in jobs])

    def optimizer(model: nn.Module) -> optim.Optimizer:
        groups = [
            {"params": list(module.parameters()), **copy.deepcopy(setting)}
            for module, setting in zip(model.get_submodule("each").children(), settings, strict=True)
        ]
        return info.optim_cls(groups)

    return Job(build, optimizer, lambda number: (tuple(job.batch(number) for job in jobs), {}))


Task = str | list[tuple[str, int]]
"""What one process compiles: all settings of an optimizer, or inputs of modules, by name and number."""


def tasks(per_program: int) -> list[Task]:
    """Distinct inputs, the first of each module, then the second, and so on; and the optimizers, in between."""
    queues = [[(info.name, number) for number in distinct_inputs(info)] for info in module_db]
    rounds = [each for turn in zip_longest(*queues) for each in turn if each is not None]
    refused = [(name, number) for name, number in rounds if number in REFUSED.get(name, {})]
    taken = [each for each in rounds if each not in refused]
    programs = [taken[first : first + per_program] for first in range(0, len(taken), per_program)]
    optimizers = [info.optim_cls.__name__ for info in optim_db]
    every = zip_longest(programs, optimizers)
    return [refused, *(each for pair in every for each in pair if each is not None)]


def outcomes_of(task: Task, end: float) -> list[Outcome]:
    """Compiles and compares; nothing once the time is over."""
    if time.time() > end:
        return []
    return outcomes_of_optimizer(task) if isinstance(task, str) else outcomes_of_inputs(task)


def outcomes_of_inputs(inputs: Sequence[tuple[str, int]]) -> list[Outcome]:
    """Of inputs of modules, in one program; where something is wrong with it, of each half. Refused ones: alone."""
    torch.set_default_dtype(torch.float32)
    infos = {info.name: info for info in module_db}
    made = {name: module_jobs(infos[name]) for name, _ in inputs}
    jobs = [made[name][number] for name, number in inputs]
    if all(number in REFUSED.get(name, {}) for name, number in inputs):
        found = [compared(job, graph_steps) for job in jobs]
    else:
        found = [compared(jobs[0] if len(jobs) == 1 else bundle_of_modules(jobs))] * len(jobs)
        if any(found[0]) and len(jobs) > 1:
            log(f"in two halves, for: {found[0]}")
            middle = len(jobs) // 2
            return [*outcomes_of_inputs(inputs[:middle]), *outcomes_of_inputs(inputs[middle:])]
    return [
        Outcome(name=name, number=number, is_module=True, why=why, difference=difference)
        for (name, number), (why, difference) in zip(inputs, found, strict=True)
    ]


def outcomes_of_optimizer(name: str) -> list[Outcome]:
    """Of every setting of an optimizer, in one program."""
    torch.set_default_dtype(DTYPE)
    info = next(each for each in optim_db if each.optim_cls.__name__ == name)
    jobs, settings = optimizer_jobs(info), [each.kwargs for each in info.optim_inputs_func("cpu")]
    if NOT_WHOLE.get(name, "").startswith("refused"):
        found = [compared(job, graph_steps) for job in jobs]
    else:
        found = [compared(bundle_of_settings(info, jobs, settings))] * len(jobs)
    return [
        Outcome(name=name, number=number, is_module=False, why=why, difference=difference)
        for number, (why, difference) in enumerate(found)
    ]


def compared(job: Job, steps: Any = compiled_steps) -> tuple[str | None, str | None]:
    """Why a job is not compiled, and what differs; None where there is nothing to tell."""
    try:
        return why_not_compiled(job, steps) or None, None
    except AssertionError as error:
        return None, " ".join(str(error).split())[:500] or "differs"


RULE = (
    "in train mode; of each module those that have two settings together (of its options, or shapes and types of its "
    "tensors) which no input before them has; the first of each module, then the second of each, and so on, "
    "{per_program} to a program, until the time was over"
)


def write_compiled(arguments: argparse.Namespace, given: Sequence[str], folder: str) -> int:
    """Compiles and writes the record after each program; returns the exit code."""
    started_at, end = environment(CPU), time.time() + 60 * arguments.minutes
    num_inputs = sum(len(module_jobs(info)) for info in module_db)
    num_distinct = sum(len(distinct_inputs(info)) for info in module_db)
    outcomes: list[Outcome] = []

    def write() -> None:
        record = ConformanceRecord(
            command=shlex.join(["python", "-m", "tests.step.conformance", *given]),
            created=now(),
            environment={**started_at, "load_average_after": load_average()},
            rule=RULE.format(per_program=arguments.per_program),
            num_steps=NUM_STEPS,
            num_inputs=num_inputs,
            num_distinct=num_distinct,
            outcomes=tuple(sorted(outcomes, key=lambda each: (not each.is_module, each.name, each.number))),
        )
        write_record(record, arguments.out)

    todo = tasks(arguments.per_program)
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn"), _begin_worker, (folder,)) as workers:
        for found in workers.map(outcomes_of, todo, [end] * len(todo)):
            outcomes += found
            names = ", ".join(f"{each.name} {each.number}" for each in found)
            log(f"{len(outcomes)}: {names}: {Counter(each.difference or each.why or 'the same' for each in found)}")
            write()
    return int(any(each.difference for each in outcomes))


def _begin_worker(folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["XDG_CACHE_HOME"] = folder


# Captured, one by one.


def check(job: Job, expected: str | None, name: str) -> None:
    """Fails where graph and plain steps differ, or where a job is compiled or not against what is expected."""
    why = why_not_compiled(job)
    assert (not why) if expected is None else re.match(expected, why), f"{name}: {why or 'is compiled now'}"


MOST_IN_A_TEST = 3
"""Inputs of a module; `python -m tests.step.conformance` compares all, a trace of a Transformer takes seconds."""


def check_inputs(info: Any) -> None:
    """Fails where a distinct input of a module is not as expected; of many, some that are evenly spread."""
    refused, jobs, distinct = REFUSED.get(info.name, {}), module_jobs(info), distinct_inputs(info)
    num = min(len(distinct), MOST_IN_A_TEST)
    chosen = {distinct[place * len(distinct) // num] for place in range(num)}
    for number in sorted(chosen | {min(refused, default=0)}):
        check(jobs[number], refused.get(number), f"{info.name}, input {number}")


def check_all() -> int:
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
        log(f"{count:5} {what}")
    return int(any("unexpected" in what for what in counts))


def _outcome(job: Job, expected: str | None, name: str) -> str:
    try:
        check(job, expected, name)
    except Exception as error:
        log(f"{name}: {error}")
        return "unexpected"
    return expected or "the same"


def main(given: Sequence[str]) -> int:
    """Compares graphs or, with `--compile`, programs; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.step.conformance", description=__doc__)
    parser.add_argument("--compile", action="store_true", help="compile, and write the record")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--minutes", type=float, default=60.0, help="after these, no program is begun (default: 60)")
    parser.add_argument("--per-program", type=int, default=24, help="inputs of modules in a program (default: 24)")
    parser.add_argument("--out", type=Path, default=RESULTS / "conformance-cpu.json", help="the record")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    if not options.compile:
        return check_all()
    with tempfile.TemporaryDirectory(prefix="conformance-cache-") as folder:
        return write_compiled(options, given, folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
