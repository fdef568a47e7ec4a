"""What programs and verdicts are known by: all that they depend on."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn

from fasttrain.data.batch import tensors
from fasttrain.data.ragged import Ragged
from fasttrain.device import cpu_features, device_name, versions
from fasttrain.step.build import GraphJob
from fasttrain.step.guards import PLAIN
from fasttrain.step.spec import StepSpec

__all__ = ["job_signature", "program_key"]

Batch = Any

COMPILING = ("build.py", "kernels.py", "padded.py", "program.py", "torch_private", "unroll.py")
"""What the compiling child does with a job, beside torch's own compiler."""


def program_key(job: GraphJob) -> str:
    """Of everything that a program depends on: graph, constants, shapes, what compiles it, hardware, threads."""
    constants = [
        (name, value.shape, value.dtype, _bytes_of(value))
        for name, value in sorted(job.graph.named_buffers())  # a graph keeps its constants there
    ]
    inputs = [
        ([None if dim in dims else length for dim, length in enumerate(size)], stride, dtype, device)
        for (size, stride, dtype, device), dims in zip(job.inputs, job.open_dims, strict=True)
    ]
    plain = (job.unrolling, job.num_threads, job.origins, job.anywhere)
    return _hash(job.graph.code, constants, inputs, *plain, _compiling_code(), *_machine(job.device))


def job_signature(spec: StepSpec, batch: Batch) -> str:
    """Of what a job looks like from outside: enough to remember what was measured, not to trust a program."""
    options = [
        {name: value for name, value in group.items() if name not in ("params", "param_names", "lr", "initial_lr")}
        for group in spec.optimizer.param_groups
    ]
    leaves = [leaf.offsets if isinstance(leaf, Ragged) else leaf for leaf in tensors(batch)]
    return _hash(
        _name_of(spec.model),
        [
            (name, value.shape, value.dtype)
            for name, value in spec.model.state_dict().items()
            if isinstance(value, Tensor)  # a module's extra state may be anything
        ],
        type(spec.optimizer).__qualname__,
        options,
        [(_shape_of(leaf), leaf.dtype) for leaf in leaves],
        (spec.precision, spec.accumulate, spec.clip_norm, spec.clip_value),
        [(name, _name_of(value), _code_behind(value)) for name, value in _callables_of(spec)],
        [_code_behind(kind) for kind in dict.fromkeys(type(module) for module in spec.model.modules())],
        _source_files(spec),
        versions()["fasttrain"],
        torch.get_num_threads(),
        *_machine(spec.device),
    )


def _shape_of(tensor: Tensor) -> object:
    return type(tensor).__name__ if tensor.is_nested else tensor.shape


def _callables_of(spec: StepSpec) -> list[tuple[str, Any]]:
    """What the user gave to be called: forward or the loss, and the metrics."""
    return [*vars(spec.forward).items(), *spec.metrics.user_metrics.items()]


def _source_files(spec: StepSpec) -> list[str]:
    """Digests of the files that hold the user's functions and module classes: an edit may change what is computed."""
    kinds = [type(module) for module in spec.model.modules()]
    owners = [getattr(value, "__module__", None) for value in (*kinds, *[value for _, value in _callables_of(spec)])]
    found = dict.fromkeys(getattr(sys.modules.get(str(owner)), "__file__", None) for owner in owners)
    return [
        _digest(path) for path in found if path is not None and not path.startswith(os.path.dirname(torch.__file__))
    ]


def _digest(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:  # it is in an archive, or gone
        return path


def _code_behind(value: Any) -> object:
    """The code of a function, of a method, or of a module class's forward, its plain defaults and what it names."""
    function: Any = getattr(value, "forward", value) if isinstance(value, type | nn.Module) else value
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        return None
    names = set(code.co_names).union(*[each.co_names for each in code.co_consts if isinstance(each, CodeType)])
    named: dict[str, Any] = {name: function.__globals__[name] for name in names if name in function.__globals__}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # it has no value yet
            named[name] = cell.cell_contents
    return _code_of(code), _plain(function.__defaults__ or ()), [(name, _told(named[name])) for name in sorted(named)]


def _told(value: Any) -> object:
    """What of a value that a function names makes the job another one."""
    if isinstance(value, FunctionType):
        return _code_of(value.__code__)
    return value if isinstance(value, PLAIN) else _name_of(value)


@cache
def _compiling_code() -> str:
    """Of the files that make a program of a job: others may make another program."""
    here = files("fasttrain.step")
    return _hash(*(file.read_text(encoding="utf-8") for name in COMPILING for file in _sources(here / name)))


def _sources(place: Traversable) -> list[Traversable]:
    if place.is_file():
        return [place]
    return sorted((file for file in place.iterdir() if file.name.endswith(".py")), key=lambda file: file.name)


def _bytes_of(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _code_of(code: CodeType) -> object:
    """What code computes, as far as it is its own: the same in every process."""
    constants = [_code_of(each) if isinstance(each, CodeType) else _constant(each) for each in code.co_consts]
    return code.co_code, code.co_names, constants


def _constant(value: object) -> str:
    # The order of a set is another one in each process.
    return repr(sorted(map(repr, cast("frozenset[object]", value))) if isinstance(value, frozenset) else value)


def _plain(values: Iterable[object]) -> list[object]:
    return [value for value in values if isinstance(value, PLAIN)]


def _plain_attributes(module: nn.Module) -> list[tuple[str, object]]:
    return [(name, value) for name, value in sorted(vars(module).items()) if isinstance(value, PLAIN)]


def _name_of(value: Any) -> str:
    """Of something that is called, or a tensor."""
    if isinstance(value, nn.Module):
        settings = [_plain_attributes(module) for module in value.modules()]
        return f"{value!r} {settings!r}"
    kind = type(value)
    try:
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', kind.__qualname__)}"
    except Exception:  # a __getattr__ of the user's, such as one that looks into a dict
        return f"{kind.__module__}.{kind.__qualname__}"


def _machine(device: torch.device) -> tuple[str, ...]:
    # Programs are compiled with -march=native: for all that this processor has, whatever torch itself makes of it.
    capability = torch.backends.cpu.get_cpu_capability()
    return str(torch.__version__), device.type, device_name(device), capability, cpu_features()


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:40]
