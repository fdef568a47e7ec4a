"""What programs and verdicts are known by: all that they depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache, partial
from importlib.resources import files
from importlib.resources.abc import Traversable
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from fasttrain.data.batch import tensors
from fasttrain.data.ragged import Ragged
from fasttrain.device import cpu_features, device_name, versions
from fasttrain.step.build import GraphJob
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
        repr(spec.model),
        [
            (name, value.shape, value.dtype)
            for name, value in spec.model.state_dict().items()
            if isinstance(value, Tensor)  # a module's extra state may be anything
        ],
        type(spec.optimizer).__qualname__,
        options,
        [(leaf.shape, leaf.dtype) for leaf in leaves],
        (spec.precision, spec.accumulate, spec.clip_norm, spec.clip_value),
        _code_of(spec.forward),
        sorted({repr(_code_of(type(module).forward)) for module in spec.model.modules()}),
        versions()["fasttrain"],
        torch.get_num_threads(),
        *_machine(spec.device),
    )


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


def _code_of(value: Any, seen: set[int] | None = None) -> object:
    """What a function, or an object that can be called, computes as far as its code and plain values tell.

    Args:
        value: the function or object.
        seen: the ids of those that were met before: it may hold itself, or a loop that holds it.
    """
    if isinstance(value, _PLAIN):
        return repr(value)
    seen = set() if seen is None else seen
    if id(value) in seen:
        return "met before"
    seen.add(id(value))
    if isinstance(value, CodeType):
        constants = [_code_of(each, seen) if isinstance(each, CodeType) else repr(each) for each in value.co_consts]
        return value.co_code, value.co_names, constants
    if isinstance(value, FunctionType):
        held = [*(value.__defaults__ or ()), *_contents(value.__closure__ or ())]
        return _code_of(value.__code__, seen), [_code_of(each, seen) for each in held]
    if isinstance(value, MethodType):
        return _code_of(value.__func__, seen)
    if isinstance(value, nn.Module):
        return repr(value), _code_of(type(value).forward, seen), _plain(vars(value))
    if isinstance(value, partial):
        return _code_of(cast("Any", value).func, seen), _plain(cast("Any", value).keywords)
    kind: Any = type(value)
    if kind.__module__.startswith(_OWN):
        return kind.__qualname__, [_code_of(each, seen) for each in getattr(value, "__dict__", {}).values()]
    return getattr(value, "__qualname__", kind.__qualname__)


def _contents(cells: Iterable[CellType]) -> Iterator[Any]:
    """What a function closes over and was given a value already."""
    for cell in cells:
        with suppress(ValueError):
            yield cell.cell_contents


def _plain(values: dict[str, Any]) -> list[tuple[str, str]]:
    return sorted((name, repr(value)) for name, value in values.items() if isinstance(value, _PLAIN))


_PLAIN = (bool, int, float, str, bytes, type(None))
_OWN = __name__.partition(".")[0]


def _machine(device: torch.device) -> tuple[str, ...]:
    # Programs are compiled with -march=native: for all that this processor has, whatever torch itself makes of it.
    capability = torch.backends.cpu.get_cpu_capability()
    return str(torch.__version__), device.type, device_name(device), capability, cpu_features()


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:40]
