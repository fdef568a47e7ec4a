# ruff: noqa: T201
"""Runs a drawn job by a plain loop and by FastLoop, step for step, and says what differs."""

from __future__ import annotations

import contextvars
import dataclasses
import enum
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fasttrain import FastLoop, resident
from fasttrain.errors import FasttrainError
from fasttrain.step import compiled, launch, replay
from tests.step import graph_backend
from tests.step.fakes import hasten
from tests.step.fuzz_jobs import Job, draw_job

TOLERANCE = 1e-9

FINE = ("same", "refused", "job")
"""Outcomes that are no finding; "job": the job fails with a plain loop too."""


@dataclasses.dataclass
class Outcome:
    """What came of a job: "same", "refused" (with the reason), "job" (the job itself fails) or a finding."""

    kind: str
    detail: str = ""
    by_program: int = 0
    traces: int = 0
    spans: int = 0
    worst: float = 0.0


# ----------------------------------------------------------------------------------------------- what can be reached


class Picture:
    """Everything reachable from some objects, as paths and plain values."""

    def __init__(self, module: types.ModuleType, roots: dict[str, Any]) -> None:
        self.leaves: dict[str, Any] = {}
        self._module = module.__name__
        self._seen: dict[int, str] = {}
        self._kept: list[Any] = []
        names = {name: value for name, value in vars(module).items() if not name.startswith("__")}
        for name, value in {**roots, **names}.items():
            self._add(name, value)

    def _add(self, path: str, value: Any) -> None:
        if isinstance(
            value, (bool, int, str, bytes, type(None), type(...), torch.dtype, torch.device, range, slice, complex)
        ) and not isinstance(value, enum.Enum):
            self.leaves[path] = (type(value).__name__, repr(value).replace(self._module, "job"))
            return
        if isinstance(value, float):
            self.leaves[path] = (type(value).__name__, value)
            return
        if id(value) in self._seen:
            self.leaves[path] = ("same as", self._seen[id(value)])
            return
        self._seen[id(value)] = path
        self._kept.append(value)
        self._open(path, value)

    def _open(self, path: str, value: Any) -> None:
        kind = type(value)
        is_ours = getattr(kind, "__module__", "") == self._module or str(kind.__module__).startswith("fuzz_home")
        self.leaves[path] = ("type", kind.__qualname__)
        if isinstance(value, Tensor):
            copied = value.detach().clone() if kind in (Tensor, nn.Parameter) else repr(value)
            # Fused kernels count steps in single precision.
            dtype = "any" if path.startswith("opt") and path.endswith("'step']") else str(value.dtype)
            self.leaves[path] = ("tensor", kind.__name__, tuple(value.shape), dtype, value.requires_grad, value.is_leaf)
            self.leaves[path + "#"] = copied
            for name, entry in vars(value).items():
                self._add(f"{path}.{name}", entry)
            hooks = value._backward_hooks
            self._add(path + ".hooks", None if not hooks else dict(hooks))
            return
        if isinstance(value, (np.ndarray, np.generic)):
            self.leaves[path] = ("numpy", str(value.dtype), repr(value))
        elif isinstance(value, types.FunctionType):
            own = (
                value.__module__ == self._module
                or value.__code__.co_filename.startswith("<")
                or self._module in value.__code__.co_filename
            )
            self.leaves[path] = ("function", value.__qualname__, value.__code__.co_code if own else None)
            if own:
                self._add(path + ".defaults", value.__defaults__)
                self._add(path + ".kwdefaults", value.__kwdefaults__)
                self._add(path + ".dict", dict(vars(value)))
                for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
                    try:
                        self._add(f"{path}.<{name}>", cell.cell_contents)
                    except ValueError:
                        self.leaves[f"{path}.<{name}>"] = "empty"
        elif isinstance(value, type):
            self.leaves[path] = ("class", value.__qualname__)
            if value.__module__ == self._module:
                for name, entry in vars(value).items():
                    if name not in ("__dict__", "__weakref__", "__module__", "_abc_impl", "__doc__", "__annotations__"):
                        self._add(f"{path}.{name}", entry)
        elif isinstance(value, (dict, types.MappingProxyType)):
            for number, (key, entry) in enumerate(list(value.items())):
                is_plain = isinstance(key, str) or (isinstance(key, (int, tuple)) and "hooks" not in path)
                name = f"{number}:{key!r}" if is_plain else f"{number}"
                self._add(f"{path}[{name}]", entry)
            if is_ours:
                self._attributes(path, value)
        elif isinstance(value, (list, tuple, set, frozenset)) or kind.__name__ == "deque":
            entries = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else list(value)
            self.leaves[path + ".len"] = len(entries)
            for number, entry in enumerate(entries):
                self._add(f"{path}[{number}]", entry)
        elif isinstance(value, random.Random):
            self.leaves[path] = ("random", hash(value.getstate()))
        elif isinstance(value, types.ModuleType):
            if value.__name__ == "fuzz_home" or re.search(r"_m\d$", value.__name__):
                self._attributes(path, value)
        elif isinstance(value, itertools.count):
            self.leaves[path] = ("count", repr(value))
        elif isinstance(value, torch.Generator):
            self.leaves[path] = ("generator", hash(value.get_state().numpy().tobytes()))
        elif kind.__name__ in ("list_iterator", "Queue"):
            self.leaves[path] = (
                kind.__name__,
                repr(value.__reduce__()[2]) if kind.__name__ == "list_iterator" else value.qsize(),
            )
        elif isinstance(value, contextvars.ContextVar):
            self._add(path + ".get", value.get(None))
        elif isinstance(value, threading.local):
            self._attributes(path, value)
        elif isinstance(value, weakref.ref):
            self._add(path + "()", value())
        elif isinstance(value, (classmethod, staticmethod, types.MethodType)):
            self._add(path + ".__func__", value.__func__)
            if isinstance(value, types.MethodType):
                self._add(path + ".__self__", value.__self__)
        elif isinstance(value, property):
            self._add(path + ".fget", value.fget)
        elif kind.__module__ == "functools" and hasattr(value, "func"):
            self._add(path + ".func", value.func)
            self._add(path + ".args", getattr(value, "args", None))
            self._add(path + ".keywords", getattr(value, "keywords", None))
        elif (
            isinstance(value, (nn.Module, torch.optim.Optimizer, types.SimpleNamespace))
            or is_ours
            or kind.__module__ == "collections"
        ):
            self._attributes(path, value)

    def _attributes(self, path: str, value: Any) -> None:
        names = dict(vars(value)) if hasattr(value, "__dict__") else {}
        for slot in getattr(type(value), "__slots__", ()):
            if slot not in ("__weakref__", "__dict__"):
                try:
                    names[slot] = object.__getattribute__(value, slot)
                except AttributeError:
                    pass
        if isinstance(value, types.ModuleType):
            names = {name: entry for name, entry in names.items() if not name.startswith("__")}
        for name in sorted(names):
            if isinstance(value, torch.optim.Optimizer) and name in (
                "_opt_called",
                "_need_device_dtype_check_for_fused",
                "_warned_capturable_if_run_uncaptured",
            ):
                continue
            self._add(f"{path}.{name}", names[name])


def differences(plain: Picture, ours: Picture, tolerance: float = TOLERANCE) -> tuple[list[str], float]:
    """Paths at which two pictures differ, and the largest relative difference of numbers."""
    found: list[str] = []
    worst = 0.0
    for path in [*plain.leaves, *(each for each in ours.leaves if each not in plain.leaves)]:
        one, two = plain.leaves.get(path, "nothing"), ours.leaves.get(path, "nothing")
        if isinstance(one, Tensor) and isinstance(two, Tensor):
            # With NaN among the gradients, Adam's fused kernel keeps the largest that is a number.
            is_largest = path.endswith("'max_exp_avg_sq']#") and bool(one.isnan().any())
            distance = 0.0 if is_largest else relative(one, two)
            worst = max(worst, distance)
            if not distance <= tolerance:
                found.append(f"{path}: {distance:.3g} apart")
        elif isinstance(one, Tensor) or isinstance(two, Tensor):
            found.append(f"{path}: {one} and {two}")
        elif isinstance(one, tuple) and isinstance(two, tuple) and len(one) == 2 and one[0] == two[0] == "float":
            if not (
                one[1] == two[1]
                or (math.isnan(one[1]) and math.isnan(two[1]))
                or abs(one[1] - two[1]) <= tolerance * abs(one[1])
            ):
                found.append(f"{path}: {one[1]} and {two[1]}")
        elif one != two:
            found.append(f"{path}: {str(one)[:200]} and {str(two)[:200]}")
    return found, worst


def relative(one: Tensor, two: Tensor) -> float:
    """The largest difference over the largest entry; NaN equals NaN."""
    if one.shape != two.shape:
        return math.inf
    if not one.is_floating_point():
        return 0.0 if torch.equal(one, two) else math.inf
    a, b = one.double().flatten(), two.double().flatten()
    if not torch.equal(a.isnan(), b.isnan()) or not torch.equal(a.isinf(), b.isinf()):
        return math.inf
    finite = a.isfinite()
    if not torch.equal(a[~finite & ~a.isnan()], b[~finite & ~b.isnan()]):
        return math.inf
    a, b = a[finite], b[finite]
    if not a.numel():
        return 0.0
    return float((a - b).abs().max() / max(float(a.abs().max()), 1e-3))


# ----------------------------------------------------------------------------------------------- one side


class Side:
    """A copy of the job, with the process-wide state that belongs to it."""

    def __init__(self, job: Job, folder: Path, name: str) -> None:
        self.job = job
        self.home = types.ModuleType("fuzz_home")
        self._globals: dict[str, Any] = {}
        self._patched: dict[Any, Any] = {}
        self.context = contextvars.copy_context()
        path = folder / f"{name}.py"
        path.write_text(job.source)
        self.name = name
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        self._state = self._take()
        self._path = path
        self.module: Any = None
        self.env: dict[str, Any] = {}
        self.gone: str | None = None

    def _take(self) -> Any:
        return (
            random.getstate(),
            np.random.get_state(),
            torch.get_rng_state(),
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_anomaly_enabled(),
            torch.is_grad_enabled(),
            _hook_tables(),
            dict(os.environ),
            {key: getattr(*key) for key in _PATCHABLE},
            torch.is_autocast_enabled("cpu"),
            nn.Module.named_parameters.__defaults__,
        )

    def _put(self, state: Any) -> None:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])
        torch.set_default_dtype(state[3])
        torch.set_num_threads(state[4])
        torch.use_deterministic_algorithms(state[5])
        torch.autograd.set_detect_anomaly(state[6], check_nan=True)
        torch.set_grad_enabled(state[7])
        for table, entries in zip(_tables(), state[8], strict=True):
            if dict(table) != entries:
                table.clear()
                table.update(entries)
        if dict(os.environ) != state[9]:
            for key in set(os.environ) - set(state[9]):
                del os.environ[key]
            os.environ.update(state[9])
        for (owner, attribute), value in state[10].items():
            if getattr(owner, attribute) is not value:
                setattr(owner, attribute, value)
        nn.Module.named_parameters.__defaults__ = state[12]

    def global_state(self) -> dict[str, Any]:
        state = self._state
        return {
            "random": hash(state[0]),
            "numpy": hash(str(state[1])),
            "torch": hash(state[2].numpy().tobytes()),
            "dtype": state[3],
            "threads": state[4],
            "deterministic": state[5],
            "anomaly": state[6],
            "grad": state[7],
            "hooks": [len(each) for each in state[8]],
            "environment": sorted((k, v) for k, v in state[9].items() if "TORCHINDUCTOR" not in k),
            "autocast": state[11],
        }

    @contextmanager
    def active(self) -> Iterator[None]:
        before = self._take()
        self._put(self._state)
        sys.modules["fuzz_home"] = self.home
        try:
            yield
        finally:
            self._state = self._take()
            self._put(before)
            sys.modules.pop("fuzz_home", None)

    def load(self) -> None:
        torch.set_default_dtype(torch.float64)
        spec = importlib.util.spec_from_file_location(self.name, self._path)
        assert spec is not None
        assert spec.loader is not None
        self.module = importlib.util.module_from_spec(spec)
        sys.modules[self.name] = self.module
        spec.loader.exec_module(self.module)
        model, opt, forward = self.module.build()
        self.env = {"model": model, "opt": opt, "forward": forward}

    def change(self, statement: str) -> str | None:
        env = {name: self.env[name] for name in ("model", "opt")}
        code = compile(statement, "<change>", "exec")
        vars(self.module).pop("__builtins__", None)
        try:
            exec(code, vars(self.module), env)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    def close(self) -> None:
        for name in [name for name in sys.modules if name.startswith(self.name)]:
            del sys.modules[name]

    def picture(self) -> Picture:
        return Picture(
            self.module, {"model": self.env["model"], "opt": self.env["opt"], "opt_state": _optimizer_state(self.env)}
        )


def _arguments(side: Side) -> dict[str, Any]:
    """Those of FastLoop."""
    given: dict[str, Any] = dict(side.job.options)
    if "metrics" in given:
        given["metrics"] = {"metric": side.module.metric}
    if "loss" in given:
        given["loss"] = side.module.CRITERION
    else:
        given["forward"] = side.env["forward"]
    return given


def _optimizer_state(env: dict[str, Any]) -> Any:
    return [dict(env["opt"].state.get(p, {})) for group in env["opt"].param_groups for p in group["params"]]


def _tables() -> list[Any]:
    from torch.nn.modules import module
    from torch.optim import optimizer

    return [
        module._global_forward_hooks,
        module._global_forward_pre_hooks,
        module._global_backward_hooks,
        module._global_backward_pre_hooks,
        module._global_forward_hooks_always_called,
        module._global_forward_hooks_with_kwargs,
        optimizer._global_optimizer_pre_hooks,
        optimizer._global_optimizer_post_hooks,
    ]


def _hook_tables() -> list[Any]:
    return [dict(table) for table in _tables()]


_PATCHABLE = [
    (nn.Tanh, "forward"),
    (torch.nn.functional, "mse_loss"),
    (torch, "tanh"),
    (nn.Linear, "forward"),
    (torch.nn.functional, "linear"),
    (torch.nn.functional, "gelu"),
    (nn.Dropout, "forward"),
    (nn.Module, "__call__"),
    (math, "exp"),
]


def _data(job: Job) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(job.seed)
    count = job.steps * (8 if job.is_resident else int(str(job.options.get("accumulate", 1))))
    return [
        (
            torch.randn(5, 4, generator=generator, dtype=torch.float64),
            torch.randn(5, 3, generator=generator, dtype=torch.float64),
        )
        for _ in range(count)
    ]


def _plain_epoch(side: Side, batches: list[Any]) -> tuple[float, float | None]:
    env, job = side.env, side.job
    model, opt, forward = env["model"], env["opt"], env["forward"]
    found = [(module, module.training) for module in model.modules()]
    model.train()
    accumulate = int(str(job.options.get("accumulate", 1)))
    losses: list[Tensor] = []
    metrics: list[Tensor] = []
    metric, criterion = side.module.metric, side.module.CRITERION
    if "loss" in job.options:

        def forward(model: Any, batch: Any) -> Any:
            out = model(batch[0])
            return criterion(out, batch[1]), out, batch[1]

    if not hasattr(side, "metric"):
        side.metric = metric
    try:
        _zero_gradients(model, opt)
        for number, batch in enumerate(batches, 1):
            loss, out, y = forward(model, batch)
            if "metrics" in job.options:
                with torch.no_grad():
                    metrics.append(side.metric(loss.detach(), out, y).detach())
            (loss / accumulate if accumulate > 1 else loss).backward()
            losses.append(loss.detach())
            if number % accumulate == 0 or number == len(batches):
                parameters = list(model.parameters())
                if "clip_value" in job.options:
                    torch.nn.utils.clip_grad_value_(parameters, job.options["clip_value"])
                if "clip_norm" in job.options:
                    torch.nn.utils.clip_grad_norm_(parameters, job.options["clip_norm"])
                opt.step()
                _zero_gradients(model, opt)
    finally:
        for module, mode in found:
            module.training = mode
    return float(torch.stack(losses).mean()), float(torch.stack(metrics).mean()) if metrics else None


def _zero_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """As documented: each optimizer step starts without gradients, those of the model's other parameters included."""
    model.zero_grad()
    optimizer.zero_grad()


def _pair(batch: Any) -> list[Tensor]:
    return [batch["x"], batch["y"]] if isinstance(batch, dict) else list(batch)


class _Busy:
    """Another thread that evaluates the model and draws random numbers while a step runs."""

    def __init__(self, side: Side, is_on: bool) -> None:
        self.errors: list[str] = []
        self._side = side
        self._is_on = is_on

    def __enter__(self) -> _Busy:
        if self._is_on:
            self._stop = threading.Event()
            self._own = random.Random(3)
            self._thread = threading.Thread(target=self._work)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._is_on:
            self._stop.set()
            self._thread.join()

    def _work(self) -> None:
        layer = nn.utils.skip_init(nn.Linear, 3, 3, dtype=torch.float64).requires_grad_(False)
        layer.weight.fill_(1.0)
        layer.bias.fill_(1.0)
        while not self._stop.is_set():
            self._own.random()
            try:
                with torch.no_grad():
                    out = (
                        self._side.env["model"].head.weight.sum()
                        if hasattr(self._side.env["model"].head, "weight")
                        else torch.ones(())
                    )
                    again = layer(torch.ones(1, 3, dtype=torch.float64))
                if type(out) not in (Tensor,) or type(again) is not Tensor or not torch.is_tensor(out):
                    self.errors.append(f"another thread was given a {type(out).__name__}")
            except Exception as error:
                self.errors.append(f"another thread: {type(error).__name__}: {error}")


COUNTS: Counter[str] = Counter()


class _CountingProgram(graph_backend.GraphProgram):
    def run(self, inputs: list[Tensor]) -> Tensor:
        COUNTS["span" if hasattr(self._traced, "step") else "program"] += 1
        return super().run(inputs)


class _CountingPending(graph_backend.GraphPending):
    def load(self) -> graph_backend.GraphProgram:
        COUNTS["trace"] += 1
        return _CountingProgram(self.traced)


def run_job(job: Job, folder: Path, monkeypatch: pytest.MonkeyPatch, *, is_compiled: bool = False) -> Outcome:
    """Both ways, step by step."""
    if not is_compiled:
        graph_backend.use_graphs(monkeypatch)
        monkeypatch.setattr("fasttrain.step.compiler.Pending", _CountingPending)
    monkeypatch.setattr(replay, "ENOUGH_STEPS", 1)
    for module in (launch, compiled):
        monkeypatch.setattr(module, "FROM_STEPS", 1)
    hasten(monkeypatch)
    COUNTS.clear()
    plain, ours = Side(job, folder, f"fuzz_{job.seed}_p"), Side(job, folder, f"fuzz_{job.seed}_o")
    try:
        outcome = _run(job, plain, ours)
    finally:
        plain.close()
        ours.close()
    outcome.by_program, outcome.traces, outcome.spans = COUNTS["program"], COUNTS["trace"], COUNTS["span"]
    return outcome


def _run(job: Job, plain: Side, ours: Side) -> Outcome:
    for side in (plain, ours):
        with side.active():
            try:
                side.load()
            except Exception as error:
                return Outcome("job", f"{type(error).__name__}: {error}")
    with ours.active():
        loop = FastLoop(ours.env["model"], ours.env["opt"], **_arguments(ours))
    data, worst = _data(job), 0.0
    per_step = len(data) // job.steps
    sources: dict[str, Any] = {}
    for step in range(job.steps):
        for change in [each for each in job.changes if each.step == step]:
            told: list[str | None] = []
            for side in (plain, ours):
                with side.active():
                    told.append(side.change(change.statement))
            if told[0] != told[1] and str(told[0]).replace("_p", "") != str(told[1]).replace("_o", ""):
                return Outcome("other error of a change", f"{change.statement!r}: {told[0]} and {told[1]}")
        given: list[Any] = []
        for side in (plain, ours):
            chosen = [(x.clone(), y.clone()) for x, y in data[step * per_step : (step + 1) * per_step]]
            with side.active():
                if job.is_resident:
                    if side.name not in sources:
                        columns = [torch.cat([each[at] for each in data[:8]]) for at in (0, 1)]
                        sources[side.name] = resident(*columns, batch_size=5, device="cpu", seed=4)
                    given.append(sources[side.name])
                else:
                    given.append([side.module.make_batch(x, y, step) for x, y in chosen])
        plain_error = our_error = None
        with plain.active():
            try:
                with warnings.catch_warnings(), redirect_stdout(io.StringIO()) as out:
                    warnings.simplefilter("ignore")
                    expected = _plain_epoch(plain, list(given[0]))
            except Exception as error:
                plain_error = error
        plain_out = out.getvalue()
        before = ours.picture()
        with ours.active(), _Busy(ours, job.has_thread) as busy:
            try:
                with warnings.catch_warnings(), redirect_stdout(io.StringIO()) as out:
                    warnings.simplefilter("ignore")
                    result = loop.train(given[1])
            except Exception as error:
                our_error = error
                text = "".join(traceback.format_exception(error))
        our_out = out.getvalue()
        if busy.errors:
            return Outcome("thread", busy.errors[0])
        if plain_error is not None:
            if our_error is None:
                return Outcome("no error", f"step {step}: plain raises {type(plain_error).__name__}: {plain_error}")
            return Outcome("job", f"both raise at step {step}: {type(plain_error).__name__}: {plain_error}"[:300])
        if our_error is not None:
            if not isinstance(our_error, FasttrainError) or job.options["engine"] == "auto":
                return Outcome("crash", f"step {step}: {text}")
            # The fused kernel and NaN once more (see `differences`).
            if "max_exp_avg_sq" in str(our_error):
                return Outcome("refused", "NaN under a fused Adam with amsgrad", worst=worst)
            if "differ from eager" in str(our_error) or "cannot run:" in str(our_error):
                return Outcome("verify", f"step {step}: {our_error}")
            found, _ = differences(before, ours.picture(), 0.0)
            found = [each for each in found if ".grad" not in each and "TICKS" not in each and "RANDOM" not in each]
            if found and len(given[1]) == 1:
                return Outcome("changed by a refusal", f"step {step}: {our_error}: {found[:6]}")
            return Outcome("refused", str(our_error), worst=worst)
        if plain_out != our_out:
            return Outcome("output", f"step {step}: {plain_out!r} and {our_out!r}; {loop.step.engine}")
        if expected[1] is not None:
            apart = relative(
                torch.tensor(expected[1], dtype=torch.float64),
                torch.tensor(result.metrics["metric"], dtype=torch.float64),
            )
            if not apart <= TOLERANCE:
                return Outcome("metric", f"step {step}: plain {expected[1]}, ours {result.metrics}; {loop.step.engine}")
        distance = relative(
            torch.tensor(expected[0], dtype=torch.float64), torch.tensor(result.loss, dtype=torch.float64)
        )
        if not distance <= TOLERANCE:
            return Outcome("loss", f"step {step}: plain {expected[0]}, ours {result.loss}; {loop.step.engine}")
        found, apart = differences(plain.picture(), ours.picture())
        worst = max(worst, apart, distance)
        if found:
            return Outcome("objects", f"step {step}: {found[:8]}; {loop.step.engine}")
        one, two = plain.global_state(), ours.global_state()
        if not job.is_resident:
            apart_batches = [
                i
                for i, (p, o) in enumerate(zip(given[0], given[1], strict=True))
                for a, b in zip(_pair(p), _pair(o), strict=True)
                if not relative(a.detach(), b.detach()) <= TOLERANCE or a.requires_grad != b.requires_grad
            ]
            if apart_batches:
                return Outcome("batch", f"step {step}: batches {apart_batches}; {loop.step.engine}")
        if one != two:
            return Outcome(
                "process", f"step {step}: {[(key, one[key], two[key]) for key in one if one[key] != two[key]]}"[:600]
            )
    with ours.active():
        loop.step.close()
        reason = str(loop.step.engine.reason)
    return Outcome("same", reason, worst=worst)


def main(arguments: list[str]) -> None:
    """`SEED`: prints the recipe and what comes of it. `FIRST LAST [RECORD]`: runs these seeds, prints each finding.

    RECORD is a JSON file of counts: outcomes, refusals by reason, engines reached, and the largest difference.
    """
    torch.set_num_threads(1)
    if len(arguments) == 1:
        job = draw_job(int(arguments[0]))
        print(job.recipe())
        print(run_once(job))
        return
    first, last = int(arguments[0]), int(arguments[1])
    record: dict[str, Any] = {
        "draws": 0, "outcomes": Counter(), "refusals": Counter(), "findings": [], "draws_by_program": 0,
        "draws_by_spans": 0, "traces": 0, "steps_by_program": 0, "worst_relative_difference": 0.0,
    }  # fmt: skip
    begin = time.perf_counter()
    for seed in range(first, last):
        job = draw_job(seed)
        with redirect_stderr(io.StringIO()):
            outcome = run_once(job)
        record["draws"] += 1
        record["outcomes"][outcome.kind] += 1
        record["draws_by_program"] += outcome.by_program > 0
        record["draws_by_spans"] += outcome.spans > 0
        record["traces"] += outcome.traces
        record["steps_by_program"] += outcome.by_program
        record["worst_relative_difference"] = max(record["worst_relative_difference"], outcome.worst)
        if outcome.kind == "refused":
            record["refusals"][re.sub(r": ['\"].*", "", outcome.detail.replace(f"fuzz_{seed}_o", "job"))[:100]] += 1
        elif outcome.kind not in FINE:
            record["findings"].append({"seed": seed, "kind": outcome.kind, "detail": outcome.detail[-300:]})
            statements = [each.statement for each in job.changes]
            print(seed, outcome.kind, outcome.detail[-1200:], job.traits, statements, flush=True)
        if len(arguments) > 2 and (seed % 50 == 49 or seed == last - 1):
            about = {"seeds": [first, seed + 1], "torch": torch.__version__, "python": sys.version.split()[0]}
            written = {**about, "seconds": round(time.perf_counter() - begin, 1), **record}
            written["refusals"] = dict(record["refusals"].most_common())
            Path(arguments[2]).write_text(json.dumps(written, indent=1) + "\n")
    print({key: value for key, value in record.items() if key != "findings"})


def run_once(job: Job) -> Outcome:
    """One job in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_CACHE_HOME", folder)
        return run_job(job, Path(folder), monkeypatch)


if __name__ == "__main__":
    main(sys.argv[1:])
