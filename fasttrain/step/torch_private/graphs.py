"""Tracing with torch's private APIs: how a function becomes a graph, and what a graph needs before it is compiled."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import pickle
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from fasttrain.errors import EngineError

__all__ = [
    "global_module_hooks",
    "has_onednn_lstm",
    "is_changed",
    "prepare_for_inductor",
    "reported_as_compiling",
    "trace_graph",
    "unpickle_with_graph",
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

    Raises:
        EngineError: what the function computes depends on an open size otherwise than through operators.
    """
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    if any(tensor.shape[dim] < 2 for tensor, dims in zip(inputs, dynamic_dims, strict=True) for dim in dims):
        raise EngineError("a batch of fewer than two values does not show what a longer one needs: trace another")
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes, static_shapes=False, allow_non_fake_inputs=True)
    fakes: list[Tensor] = []
    for index, (tensor, dims) in enumerate(zip(inputs, dynamic_dims, strict=True)):
        sizes = [DimDynamic.DYNAMIC if dim in dims else DimDynamic.STATIC for dim in range(tensor.dim())]
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        source = ConstantSource(f"input_{index}")
        fakes.append(mode.from_tensor(tensor.detach(), symbolic_context=context, source=source))
    # "symbolic" decomposes more than it must where all shapes are fixed.
    tracing_mode = "symbolic" if any(dynamic_dims) else "fake"
    with fx_traceback.preserve_node_meta():  # among it, what `recorded_as` notes
        graph = make_fx(function, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(*fakes)
    # What follows from a size of two or more is no guard; what is one was decided for this example alone.
    if shapes.guards:
        decided = ", ".join(str(guard.expr) for guard in shapes.guards)
        raise EngineError(
            f"what forward computes is decided by the number of values of a batch ({decided}), which is another for "
            "each: use operators on tensors in place of Python's numbers and branches"
        )
    return graph


def unpickle_with_graph(pickled: bytes) -> Any:
    """Unpickles an object that holds a graph. The bytes must come from a folder that only this user can write to."""
    # A graph that is unpickled is traced again, which looks at this module and does not import it.
    import_module("torch._higher_order_ops.triton_kernel_wrap")
    return pickle.loads(pickled)


def prepare_for_inductor(graph: torch.fx.GraphModule) -> None:
    """Rewrites, in place, what Inductor computes wrongly or many times over. The values stay the same.

    What is left holds nothing of the trace but `origins_of`, so that it can be pickled for a process that compiles it.

    Raises:
        EngineError: there is an operator that Inductor gets wrong and that is not worth rewriting.
    """
    _spell_out_factors(graph)
    _make_factors_floats(graph)
    _settle_scalars(graph)
    for node in graph.graph.nodes:
        node.meta = {name: value for name, value in node.meta.items() if name == "custom"}
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


def _make_factors_floats(graph: torch.fx.GraphModule) -> None:
    """Turns `x * 0` into `x * 0.0` where x holds floating-point numbers.

    Inductor folds a product with the integer 0 (or False) to 0, also where x is infinite or NaN, and 0 * NaN is NaN. It
    keeps a product with 0.0.
    """
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor):
            continue
        if not (value.is_floating_point() or value.is_complex()):
            continue
        if node.target in _PRODUCTS:
            node.args = (node.args[0], *[_float_of(each) for each in node.args[1:]])
        elif node.target in _SUMS_OF_PRODUCTS:
            node.kwargs = {name: _float_of(each) for name, each in node.kwargs.items()}


def _float_of(value: Any) -> Any:
    return float(value) if isinstance(value, int) else value


def _is_of_one_dtype(first: Any, second: Any) -> bool:
    """Where it is not, nothing is fused, and the factor must stay where it is: it is applied in the wider dtype."""
    are_tensors = isinstance(first, torch.fx.Node) and isinstance(second, torch.fx.Node)
    return are_tensors and first.meta["val"].dtype == second.meta["val"].dtype


_aten = torch.ops.aten


_SCALED_SUMS = (_aten.add.Tensor, _aten.add_.Tensor, _aten.sub.Tensor, _aten.sub_.Tensor)


_PRODUCTS = (_aten.mul.Tensor, _aten.mul_.Tensor, _aten.mul.Scalar, _aten.mul_.Scalar)


_SUMS_OF_PRODUCTS = (*_SCALED_SUMS, _aten.addcmul.default, _aten.addcmul_.default)


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


def global_module_hooks() -> list[dict[int, Any]]:
    """The dicts that hold the hooks of all modules' forward and backward."""
    return [_global_forward_pre_hooks, _global_forward_hooks, _global_backward_pre_hooks, _global_backward_hooks]


def is_changed(graph: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """Whether a graph writes to what one of its nodes gives, or to a view of that."""
    aliases = {node}
    for each in graph.graph.nodes:
        schema = getattr(each.target, "_schema", None)
        for argument, given in zip([] if schema is None else schema.arguments, each.args, strict=False):
            if isinstance(given, torch.fx.Node) and given in aliases and argument.alias_info is not None:
                if argument.alias_info.is_write:
                    return True
                aliases.add(each)
    return False


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
