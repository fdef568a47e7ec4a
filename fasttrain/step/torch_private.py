"""Every private torch API that the compiled step needs, in one place, for torch 2.11 to 2.13.

Each function has a canary in tests/step/test_torch_private.py.
"""

# The private names of torch are this file's whole purpose.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import pickle
import sys
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import CodeType
from typing import Any, cast

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled as _is_profiling
from torch.autograd.graph import _engine_run_backward
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fasttrain.errors import EngineError

__all__ = [
    "Compilation",
    "compilations",
    "compile_package",
    "flat_runner",
    "has_gradient_hooks",
    "has_onednn_lstm",
    "module_tables",
    "note_step",
    "optimizer_hooks",
    "prepare_for_inductor",
    "reported_as_compiling",
    "run_backward",
    "scaler_tensors",
    "step_optimizer",
    "tensor_check",
    "trace_graph",
    "unpickle_with_graph",
    "was_step_taken",
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


def unpickle_with_graph(pickled: bytes) -> Any:
    """Unpickles an object that holds a graph. The bytes must come from a folder that only this user can write to."""
    # A graph that is unpickled is traced again, which looks at this module and does not import it.
    import_module("torch._higher_order_ops.triton_kernel_wrap")
    return pickle.loads(pickled)


def prepare_for_inductor(graph: torch.fx.GraphModule) -> None:
    """Rewrites, in place, what Inductor computes wrongly or many times over. The values stay the same.

    What is left holds nothing of the trace, so that it can be pickled for a process that compiles it.

    Raises:
        EngineError: there is an operator that Inductor gets wrong and that is not worth rewriting.
    """
    _spell_out_factors(graph)
    _settle_scalars(graph)
    for node in graph.graph.nodes:
        node.meta = {}
    vars(graph).pop("shape_env", None)
    graph.recompile()


def _spell_out_factors(graph: torch.fx.GraphModule) -> None:
    """Turns `x + alpha * y`, where it is one operator, into two.

    Inductor fuses a matrix product and a sum into `addmm` and forgets the factor on the way (pytorch#167313), which is
    where SGD's weight decay on a linear layer would go.

    Raises:
        EngineError: there is a product with a factor of its own, which Inductor gets wrong as well.
    """
    for node in list(graph.graph.nodes):
        if node.target in _SCALED_PRODUCTS and {node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)} != {1}:
            raise EngineError(f"{node.target} with alpha or beta is not compiled correctly by torch (pytorch#167313)")
        if node.target not in _SCALED_SUMS or node.kwargs.get("alpha", 1) == 1 or not _is_of_one_dtype(*node.args):
            continue
        with graph.graph.inserting_before(node):
            scaled = graph.graph.call_function(torch.ops.aten.mul.Tensor, (node.args[1], node.kwargs["alpha"]))
        scaled.meta["val"] = node.args[1].meta["val"]
        node.args = (node.args[0], scaled)
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "alpha"}


def _is_of_one_dtype(first: Any, second: Any) -> bool:
    """Where it is not, nothing is fused, and the factor must stay where it is: it is applied in the wider dtype."""
    are_tensors = isinstance(first, torch.fx.Node) and isinstance(second, torch.fx.Node)
    return are_tensors and first.meta["val"].dtype == second.meta["val"].dtype


_aten = torch.ops.aten
_SCALED_SUMS = (_aten.add.Tensor, _aten.add_.Tensor, _aten.sub.Tensor, _aten.sub_.Tensor)
_SCALED_PRODUCTS = (_aten.addmm.default, _aten.baddbmm.default, _aten.addmv.default, _aten.addbmm.default)


def _settle_scalars(graph: torch.fx.GraphModule) -> None:
    """Has each scalar that the optimizer derives (bias corrections and the like) computed once, into memory.

    Inductor would compute it anew for every vector of every parameter: for Adam two calls of `pow` per 16 weights. It
    never computes through `as_strided`, which changes nothing on a scalar.
    """
    for node in list(graph.graph.nodes):
        # An entry of an input is in memory already (and Inductor would take `as_strided` of it for the first one).
        is_entry = node.target is torch.ops.aten.select.int and node.args[0].op == "placeholder"
        if node.op != "call_function" or is_entry or not _is_double_scalar(node):
            continue
        readers = [user for user in node.users if isinstance(user.meta.get("val"), Tensor) and user.meta["val"].dim()]
        if not readers:
            continue
        with graph.graph.inserting_after(node):
            settled = graph.graph.call_function(torch.ops.aten.as_strided.default, (node, [], []))
        settled.meta = dict(node.meta)
        for reader in readers:
            reader.replace_input_with(node, settled)


def _is_double_scalar(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 0 and value.dtype == torch.float64


@contextmanager
def reported_as_compiling() -> Generator[None]:
    """Makes `torch.compiler.is_compiling()` true: optimizers then keep their step counts as tensors (no `.item()`)."""
    previous = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = previous


def compile_package(program: torch.export.ExportedProgram, path: str) -> None:
    """Compiles an exported program into an AOTInductor package (.pt2) at `path`."""
    from torch._inductor import aoti_compile_and_package

    # Random numbers must be eager's own, so its kernels are called for them.
    configs = {"fallback_random": True}
    with warnings.catch_warnings():
        # torch warns of its own use of what it has deprecated; no code of the user's runs here.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        aoti_compile_and_package(program, package_path=path, inductor_configs=configs)


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
    return loader.boxed_run


def optimizer_hooks(optimizer: torch.optim.Optimizer) -> list[dict[int, Any]]:
    """The dicts that hold the hooks of this optimizer's step and those of all optimizers."""
    own: Any = optimizer
    return [
        own._optimizer_step_pre_hooks,
        own._optimizer_step_post_hooks,
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
    ]


def run_backward(loss: Tensor, one: Tensor) -> None:
    """`loss.backward()`, without the 10 of 40 us that its own checks of arguments take (a BCE of 128 rows).

    Args:
        loss: a plain scalar.
        one: of its dtype and shape, on its device: the gradient of the loss by itself.

    Raises:
        RuntimeError: as `backward` does.
    """
    _engine_run_backward((loss,), (one,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def step_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """`optimizer.step()`, without the profiler's range around it where nobody profiles and nothing is hooked.

    The range alone takes 26 of the 136 us of a linear model's fused Adam (Xeon with AMX, one thread).
    """
    whole: Any = type(optimizer).step
    is_ranged = getattr(whole, "__code__", None) is _ranged_code()
    scheduled = vars(optimizer).get("step")  # a scheduler's wrapper, which notes that there was a step
    is_scheduler = hasattr(scheduled, "_wrapped_by_lr_sched") and cast("Any", scheduled).__wrapped__ is whole
    is_plain = scheduled is None or is_scheduler
    if not is_ranged or not is_plain or any(optimizer_hooks(optimizer)) or _is_profiling():
        optimizer.step()
        return
    if scheduled is not None:
        vars(optimizer)["_opt_called"] = True
    whole.__wrapped__(optimizer)


def note_step(optimizer: torch.optim.Optimizer) -> None:
    """Notes that the optimizer has stepped, for schedulers that are made later: they warn where they see no step.

    They only see calls of `step`, and a compiled step makes none.
    """
    vars(optimizer)["_opt_called"] = True


@cache
def _ranged_code() -> CodeType:
    """The code of the wrapper that torch puts around every optimizer's step."""
    return cast("Any", torch.optim.Optimizer.profile_hook_step)(lambda: None).__code__


def scaler_tensors(scaler: torch.amp.GradScaler) -> tuple[Tensor, Tensor] | None:
    """A scaler's factor and its count of good steps, scalars; None before it has scaled a loss."""
    if scaler._scale is None or scaler._growth_tracker is None:
        return None
    return scaler._scale, scaler._growth_tracker


def was_step_taken(scaler: torch.amp.GradScaler) -> bool:
    """False where the scaler has skipped the last step, or where the last step has made it grow."""
    return bool(scaler._get_growth_tracker())  # HOST READ: eager scaling has read whether to skip already


def has_gradient_hooks(parameter: Tensor) -> bool:
    """True where Python code runs when this tensor's gradient is made or accumulated."""
    own: Any = parameter
    return bool(own._backward_hooks) or bool(own._post_accumulate_grad_hooks)


NO_GRADIENT_HOOKS = "not {0}._backward_hooks and not {0}._post_accumulate_grad_hooks"
"""`not has_gradient_hooks` as an expression."""


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


def tensor_check(
    tensors: Sequence[Tensor], open_dims: Sequence[frozenset[int]]
) -> Callable[[Sequence[Tensor]], str | None]:
    """A check that tensors are of the same type, dtype, device, sizes, strides and requires_grad as these.

    Args:
        tensors: examples; a tensor may be there twice.
        open_dims: for each, the dimensions whose size may vary.

    Returns:
        A function of as many tensors that gives None, or says what differs. It takes 0.1 us a tensor; it also notices
        autocast and inference mode.
    """
    places = {id(tensor): place for place, tensor in reversed(list(enumerate(tensors)))}
    first = sorted(places.values())
    again = [place for place in range(len(tensors)) if place not in first]
    check_first = _tensor_guards([tensors[place] for place in first], [open_dims[place] for place in first])
    check_again = [(place, _tensor_guards([tensors[place]], [open_dims[place]])) for place in again]
    if not again:
        return check_first

    def check(found: Sequence[Tensor]) -> str | None:
        reasons = (differ([found[place]]) for place, differ in check_again)
        return check_first([found[place] for place in first]) or next(filter(None, reasons), None)

    return check


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


def has_onednn_lstm(graph: torch.fx.GraphModule) -> bool:
    """True where an LSTM was recorded as the one operator of oneDNN."""
    return any(node.target is _aten.mkldnn_rnn_layer.default for node in graph.graph.nodes)


@contextmanager
def without_onednn() -> Generator[None]:
    """Turns oneDNN off. The public context (`torch.backends.mkldnn.flags`) also sets TF32, which warns."""
    was_enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(was_enabled)


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
