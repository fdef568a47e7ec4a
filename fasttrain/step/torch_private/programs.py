"""Compiling with torch's private APIs: packages and what runs them, checks of inputs, what Dynamo has compiled."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttrain.step.torch_private.marking import MARKS, kernels_apart

__all__ = [
    "Compilation",
    "compilations",
    "compile_package",
    "dynamo_error",
    "examples_of",
    "flat_runner",
    "lacks_resources",
    "tensor_check",
]


def examples_of(
    kinds: Sequence[tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]], anywhere: Sequence[int] = ()
) -> tuple[Tensor, ...]:
    """Tensors of these sizes, strides, dtypes and devices to export a graph with; they take no memory.

    Args:
        kinds: see above.
        anywhere: the places of those that are to begin in the middle of some memory: of the others, the compiler takes
            it for granted that they begin where memory does.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return tuple(
            torch.empty_strided(size, stride, dtype=dtype, device=device)
            if place not in anywhere
            else _after_one_entry(size, stride, dtype, device)
            for place, (size, stride, dtype, device) in enumerate(kinds)
        )


def _after_one_entry(size: torch.Size, stride: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    extent = 2 + sum(max(0, length - 1) * step for length, step in zip(size, stride, strict=True))
    return torch.empty(extent, dtype=dtype, device=device).as_strided(size, stride, 1)


def compile_package(program: torch.export.ExportedProgram, path: str, *, is_marked: bool = False) -> None:
    """Compiles an exported program into an AOTInductor package (.pt2) at `path`.

    Args:
        program: what to compile.
        path: where the package goes.
        is_marked: the profiler is to see its kernels (see `marking`); it is slower for that.
    """
    from torch._inductor import aoti_compile_and_package, config

    from fasttrain.step.torch_private.cpp import inputs_unchecked  # which only the child that compiles needs
    from fasttrain.step.torch_private.scratch import small_buffers_kept

    # Random numbers must be eager's own, so its kernels are called for them. Whether padding a product pays, on a GPU,
    # would be measured beside the training. A step's inputs are checked before they are handed over.
    configs = {"fallback_random": True, "shape_padding": False, "size_asserts": False, **(MARKS if is_marked else {})}
    if hasattr(config.aot_inductor, "enable_line_tables"):
        configs["aot_inductor.enable_line_tables"] = False  # they take a tenth of the C++ compiler's time
    with (
        warnings.catch_warnings(),
        small_buffers_kept(),
        inputs_unchecked(),
        kernels_apart() if is_marked else nullcontext(),
    ):
        # torch warns of its own use of what it has deprecated; no code of the user's runs here.
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # whether to use them is for the user to say
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        aoti_compile_and_package(program, package_path=path, inductor_configs=configs)


def lacks_resources(error: BaseException) -> bool:
    """True where compiling failed because of memory, disk, permissions or the C++ compiler, by the error's causes.

    Code that the C++ compiler refuses cannot be told from a compiler that does not work, and counts as the latter.
    """
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    cause: Any = error
    while cause is not None:
        kinds = (MemoryError, OSError, subprocess.SubprocessError, CppCompileError, InvalidCxxCompiler)
        if isinstance(cause, kinds) or "can't allocate memory" in str(cause):
            return True
        before = None if cause.__suppress_context__ else cause.__context__
        # Inductor keeps what it wraps, and cuts the chain.
        cause = getattr(cause, "inner_exception", None) or cause.__cause__ or before
    return False


def flat_runner(package: str, device: torch.device) -> Callable[[list[Tensor]], list[Tensor]]:
    """Loads an AOTInductor package; the result takes the flat list of inputs (and empties it) and returns all outputs.

    The C++ loader without its Python half: that imports the whole of Inductor first (2 s, where loading takes 2 ms),
    and walks a pytree on every step.

    Args:
        package: path of the .pt2 file.
        device: where the program runs.
    """
    index: Any = device.index  # None for "the current one", which its annotation leaves out
    num_runners, is_single_threaded = 1, True
    extension: Any = torch._C  # its stubs leave this part out
    loader = extension._aoti.AOTIModelPackageLoader(
        package, "model", is_single_threaded, num_runners, -1 if index is None else index
    )
    if device.type != "cuda":
        return loader.boxed_run

    def run(inputs: list[Tensor]) -> list[Tensor]:
        with torch.cuda.device(device):  # it takes the stream of whatever device is the current one
            return loader.boxed_run(inputs)

    return run


def tensor_check(
    tensors: Sequence[Tensor], open_dims: Sequence[frozenset[int]]
) -> Callable[[Sequence[Tensor]], str | None]:
    """A check that tensors are of the same type, dtype, device, sizes, strides and requires_grad as these.

    Args:
        tensors: examples; a tensor may be there twice.
        open_dims: for each, the dimensions whose size may vary.

    Returns:
        A function of as many tensors that gives None, or says what differs. It takes 0.1 us a tensor; it also notices
        autocast and inference mode. An open size below two differs: a trace takes for granted that there is none.
    """
    check_open = _open_sizes(open_dims)
    places = {id(tensor): place for place, tensor in reversed(list(enumerate(tensors)))}
    first = sorted(places.values())
    again = [place for place in range(len(tensors)) if place not in first]
    check_first = _tensor_guards([tensors[place] for place in first], [open_dims[place] for place in first])
    check_again = [(place, _tensor_guards([tensors[place]], [open_dims[place]])) for place in again]
    if not again:
        return check_first if check_open is None else lambda found: check_first(found) or check_open(found)

    def check(found: Sequence[Tensor]) -> str | None:
        reasons = (differ([found[place]]) for place, differ in check_again)
        differs = check_first([found[place] for place in first]) or next(filter(None, reasons), None)
        return differs or (None if check_open is None else check_open(found))

    return check


def _open_sizes(open_dims: Sequence[frozenset[int]]) -> Callable[[Sequence[Tensor]], str | None] | None:
    """A check that no open size is below two, None where none is open."""
    places = [(place, dim) for place, dims in enumerate(open_dims) for dim in sorted(dims)]

    def check(found: Sequence[Tensor]) -> str | None:
        for place, dim in places:
            if found[place].shape[dim] < 2:
                return f"input {place} has fewer than two entries in dimension {dim}, whose size is open"
        return None

    return check if places else None


def _tensor_guards(tensors: list[Tensor], open_dims: list[frozenset[int]]) -> Callable[[Sequence[Tensor]], str | None]:
    """Dynamo's guards of these tensors, which refuse one that is there twice."""
    from torch._C._dynamo.guards import TensorGuards

    sizes = [
        [None if dim in dims else size for dim, size in enumerate(tensor.shape)]
        for tensor, dims in zip(tensors, open_dims, strict=True)
    ]
    strides = [list(tensor.stride()) for tensor in tensors]
    make: Any = TensorGuards  # annotated for one tensor only
    guards = make(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    names = [f"input {index}" for index in range(len(tensors))]

    def check(found: Sequence[Tensor]) -> str | None:
        return None if guards.check(*found) else str(guards.check_verbose(*found, tensor_check_names=names))

    return check


def dynamo_error() -> type[Exception]:
    """What `torch.compile` raises, when it is called, where it cannot compile."""
    from torch._dynamo.exc import TorchDynamoException  # of its own: it takes a second

    return TorchDynamoException


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """One compilation of a function by Dynamo.

    Attributes:
        file, line: where the function begins; after a graph break, where it goes on.
        is_after_break: it is the rest of a function after a graph break.
        breaks: why tracing began anew: graph breaks, among others.
        recompile_reason: the guard that failed; None for a first compilation.
    """

    file: str
    line: int
    is_after_break: bool
    breaks: tuple[str, ...]
    recompile_reason: str | None


def compilations(since_s: float) -> list[Compilation]:
    """What Dynamo has compiled in this process since a time (of `time.time`); the last 64 compilations at most."""
    dynamo: Any = sys.modules.get("torch._dynamo.utils")  # importing it takes seconds; unused, it has compiled nothing
    if dynamo is None:
        return []
    return [
        Compilation(
            file=each.co_filename,
            line=each.co_firstlineno,
            is_after_break=each.co_name.startswith("torch_dynamo_resume_in_"),
            breaks=tuple(sorted(each.restart_reasons or ())),
            recompile_reason=each.recompile_reason,
        )
        for each in dynamo.get_compilation_metrics()
        if each.co_filename is not None and each.start_time_us >= since_s * 1e6
    ]
