"""Every private torch API that the compiled step needs, in one place. Each has a canary in tests/step/test_torch_private.py.

Written against torch 2.11 to 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "flat_runner",
    "has_gradient_hooks",
    "module_tables",
    "optimizer_hooks",
    "reported_as_compiling",
    "tensor_check",
    "trace_graph",
    "without_onednn",
]


def trace_graph(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], dynamic_dims: Sequence[frozenset[int]]
) -> torch.fx.GraphModule:
    """Records the ATen operators of `function(*inputs)` without running them.

    Args:
        function: a function of the inputs; its in-place changes of them are recorded as such.
        inputs: example tensors, of which nothing but the metadata is looked at.
        dynamic_dims: for each input, the dimensions whose size is left open.

    Returns:
        A graph with one placeholder an input. Real tensors that the function met are its attributes (`get_attr` nodes).
    """
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False, allow_non_fake_inputs=True)
    fakes: list[Tensor] = []
    for index, (tensor, dims) in enumerate(zip(inputs, dynamic_dims, strict=True)):
        sizes = [DimDynamic.DYNAMIC if dim in dims else DimDynamic.STATIC for dim in range(tensor.dim())]
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        source = ConstantSource(f"input_{index}")
        fakes.append(mode.from_tensor(tensor.detach(), symbolic_context=context, source=source))
    # "symbolic" decomposes more than it must where all shapes are fixed.
    tracing_mode = "symbolic" if any(dynamic_dims) else "fake"
    return make_fx(function, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(*fakes)


@contextmanager
def reported_as_compiling() -> Iterator[None]:
    """Makes `torch.compiler.is_compiling()` true: optimizers then keep their step counts as tensors (no `.item()`)."""
    previous = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = previous


def flat_runner(package: str, device: torch.device) -> Callable[[list[Tensor]], list[Tensor]]:
    """Loads an AOTInductor package; the result takes the flat list of inputs (and empties it) and returns all outputs.

    Calling the loader's C++ half directly saves the pytree round trip of `AOTICompiledModel.__call__` on every step.

    Args:
        package: path of the .pt2 file.
        device: where the program runs.
    """
    from torch._inductor import aoti_load_package

    device_index = -1 if device.index is None else device.index
    model: Any = aoti_load_package(package, run_single_threaded=True, device_index=device_index)
    return model.loader.boxed_run


def optimizer_hooks(optimizer: torch.optim.Optimizer) -> list[dict[int, Any]]:
    """The dicts that hold the hooks of this optimizer's step and those of all optimizers."""
    from torch.optim import optimizer as module

    own: Any = optimizer
    return [
        own._optimizer_step_pre_hooks,
        own._optimizer_step_post_hooks,
        module._global_optimizer_pre_hooks,
        module._global_optimizer_post_hooks,
    ]


def has_gradient_hooks(parameter: Tensor) -> bool:
    """True where Python code runs when this tensor's gradient is made or accumulated."""
    return bool(parameter._backward_hooks) or bool(parameter._post_accumulate_grad_hooks)


def module_tables(module: torch.nn.Module) -> list[dict[str, Any]]:
    """The dicts that hold a module's parameters, buffers, children and hooks; they live as long as the module."""
    own: Any = module
    return [
        own._parameters,
        own._buffers,
        own._modules,
        own._forward_hooks,
        own._forward_pre_hooks,
        own._backward_hooks,
        own._backward_pre_hooks,
    ]


def tensor_check(tensors: Sequence[Tensor], open_dims: Sequence[frozenset[int]]) -> Callable[[Sequence[Tensor]], str | None]:
    """A check that tensors are of the same type, dtype, device, sizes, strides and requires_grad as these.

    Args:
        tensors: examples.
        open_dims: for each, the dimensions whose size may vary.

    Returns:
        A function of as many tensors that gives None, or says what differs. It takes 0.1 us a tensor; it also notices
        autocast and inference mode.
    """
    from torch._C._dynamo.guards import TensorGuards

    sizes = [
        [None if dim in dims else size for dim, size in enumerate(tensor.shape)]
        for tensor, dims in zip(tensors, open_dims, strict=True)
    ]
    strides = [list(tensor.stride()) for tensor in tensors]
    guards: Any = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    names = [f"input {index}" for index in range(len(tensors))]

    def check(found: Sequence[Tensor]) -> str | None:
        return None if guards.check(*found) else str(guards.check_verbose(*found, tensor_check_names=names))

    return check


@contextmanager
def without_onednn() -> Iterator[None]:
    """Turns oneDNN off. The public context (`torch.backends.mkldnn.flags`) also sets TF32, which warns."""
    was_enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(was_enabled)
