"""One copy of a drawn job, with the settings of the process that belong to it."""

from __future__ import annotations

import importlib.util
import math
import os
import random
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.step.fuzz_jobs import Job
from tests.step.fuzz_pictures import Picture

__all__ = ["Side"]


class Side:
    """A copy of the job, with the process-wide state that belongs to it."""

    def __init__(self, job: Job, folder: Path, name: str) -> None:
        self.job = job
        self.home = types.ModuleType("fuzz_home")
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
            [read() for read, _ in _FLAGS],
            [*sys.argv],
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
        for (read, write), value in zip(_FLAGS, state[13], strict=True):
            if read() != value:
                write(value)
        sys.argv[:] = state[14]

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
            "flags": state[13],
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


def _default_device_is_set() -> bool:
    return getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None) is not None


_FLAGS: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
    (lambda: torch.is_autocast_enabled("cpu"), lambda value: torch.set_autocast_enabled("cpu", value)),
    (lambda: torch.get_autocast_dtype("cpu"), lambda value: torch.set_autocast_dtype("cpu", value)),
    (lambda: torch.backends.cudnn.benchmark, lambda value: setattr(torch.backends.cudnn, "benchmark", value)),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda value: setattr(torch.backends.cuda.matmul, "allow_tf32", value),
    ),
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
    (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
    (
        torch.is_deterministic_algorithms_warn_only_enabled,
        lambda value: torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled(), warn_only=value),
    ),
    (
        lambda: torch.utils.deterministic.fill_uninitialized_memory,
        lambda value: setattr(torch.utils.deterministic, "fill_uninitialized_memory", value),
    ),
    (_default_device_is_set, lambda value: torch.set_default_device("cpu" if value else None)),
]
"""torch's global settings: how each is read and written."""

_PATCHABLE = [
    (torch.Tensor, "tanh"),
    (torch.Tensor, "square"),
    (torch.optim.SGD, "step"),
    (sys.modules["torch.optim.sgd"], "sgd"),
    (nn.Module, "train"),
    (nn.Module, "parameters"),
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
