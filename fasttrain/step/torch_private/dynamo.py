"""Dynamo's capture of a function as one graph, with guards that can be checked outside of its frame cache."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import ast
import os
import re
import sys
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib import import_module
from math import copysign
from threading import get_ident
from traceback import FrameSummary
from types import BuiltinFunctionType, CodeType, FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from fasttrain.errors import EngineError

__all__ = ["DynamoCapture", "GraphInput", "capture_function", "function_modes", "scope_of"]

_OPTIONS: dict[str, Any] = {
    # Guards that Dynamo leaves out by default, for speed.
    "skip_nnmodule_hook_guards": False,
    "skip_tensor_guards_with_matching_dict_tags": False,
    "assume_dunder_attributes_remain_unchanged": False,
    # Dynamo would draw numpy's random numbers from torch's generator, and a bare graph drops side effects.
    "trace_numpy": False,
    "side_effect_replay_policy": "error",
    "replay_side_effects": False,
    # A host value in the graph would be one read of the device a step.
    "capture_scalar_outputs": False,
    "capture_dynamic_output_shape_ops": False,
    "allow_rnn": True,
    # Eager's first step has warned; Python shows a warning of one line once.
    "ignore_logging_functions": {warnings.warn},
    "trace_autograd_ops": False,
    "suppress_errors": False,
    "verbose": False,
}

_WARNINGS = (
    "The .grad attribute of a Tensor that is not a leaf",
    "Dynamo detected a call to a `functools.lru_cache`-wrapped function",
    ".* should not be instantiated. Methods on autograd functions are all static",
)
"""Of what Dynamo does itself while it captures. Other warnings, and those of other threads, are shown as ever."""

_ATTRIBUTE = r"(\.{0}|\.__dict__\['{0}'\])"  # the second where a class has a __getattr__ of its own
_BUFFERS_OF_MODEL = re.compile(
    rf"L\['model'\]({_ATTRIBUTE.format('_modules')}\['[^']+'\])*"
    rf"({_ATTRIBUTE.format('_buffers')}|{_ATTRIBUTE.format('_non_persistent_buffers_set')})"
)
"""The one thing that forward may replace: a buffer, by another tensor. torch then notes again that it is not saved."""


class GraphInput(NamedTuple):
    """One input of a captured graph.

    Attributes:
        name: the expression that reads it, such as `model._modules['fc'].weight`.
        argument: the function's argument that it is reached through; None: a closure or a global.
        size_of: for the size of a tensor: that tensor's own name and the dimension; None for a tensor.
    """

    name: str
    argument: str | None
    size_of: tuple[str, int] | None


class Guarded(NamedTuple):
    """A Python object that a guard looks at.

    Attributes:
        value: the object.
        name: what the user calls it, with the line that reads it.
        argument: the function's argument that it is reached through; None: a closure or a global.
    """

    value: Any
    name: str
    argument: str | None


class _InputsRead(BaseException):
    """Ends a run of Dynamo's bytecode once it has read the graph's inputs."""

    def __init__(self, inputs: tuple[Any, ...]) -> None:
        self.inputs = inputs


class DynamoCapture:
    """A function as Dynamo captured it: a graph, where its inputs come from, and the guards under which it holds.

    Attributes:
        graph: takes what `read` gives and returns a tuple of tensors.
        inputs: what these inputs are.
        objects: every Python object that a guard looks at. While they are alive, none of their ids is used again.
        codes: the code that Dynamo followed, in order.
        names: the attributes and keys that guards ask for.
        modules: the Python modules that code was found in or imports, by name.
    """

    def __init__(
        self, function: FunctionType, output: Any, guards: Any, scope: dict[str, Any], known: Callable[[str], bool]
    ) -> None:
        captured = output.graph_capture_output
        self.graph: torch.fx.GraphModule = output.backend_input.graph_module
        self.codes: list[CodeType] = list(dict.fromkeys(captured.traced_code))
        self._guards = guards
        self._manager: Any = guards.guard_manager
        sources = captured.output_graph.export_metadata.graph_input_idx_to_local_source
        self.inputs = [_graph_input(sources[index]) for index in range(len(sources))]
        guarded, names = captured.output_graph.guards, _names_of_guards(scope, function.__globals__)
        self.objects = _reached(guarded, names)
        self._watched = _loosely_guarded(guarded, names, known)
        self._guard_names = {name: value for name, value in names.items() if name != "L"}
        self.names = {name for guard in guarded for name in re.findall(r"\w+", guard.name)}
        self.modules = {name: import_module(name) for name in captured.import_sources.values()}
        self._backend_id: str = output.backend_input.backend_id
        self._names: dict[str, Any] = {
            **function.__globals__,
            **{alias: _imported(name) for alias, name in captured.import_sources.items()},
            self._backend_id: self._stop,
        }
        self._bytecode = FunctionType(
            captured.bytecode, self._names, closure=captured.closure, argdefs=captured.argdefs
        )

    @staticmethod
    def _stop(*inputs: Any) -> None:
        raise _InputsRead(inputs)

    def holds(self, scope: dict[str, Any]) -> bool:
        """Whether every guard holds, given the function's arguments and closure by name."""
        return self._manager.check(scope) and (not self._watched or self._other_value(scope) is None)

    def first_broken(self, scope: dict[str, Any]) -> str:
        """What the first guard that does not hold is about, with the user's expression and line."""
        found = self._manager.check_verbose(scope)
        if found.result and (name := self._other_value(scope)) is not None:
            return name
        parts = [str(part) for part in found.verbose_code_parts]
        return _described(parts[0]) if parts else "what forward reads"

    def _other_value(self, scope: dict[str, Any]) -> str | None:
        """The name of the first watched value that is another one now."""
        names = {**self._guard_names, "L": scope}
        return next((name for name, code, value in self._watched if not _is_still(value, eval(code, names))), None)

    def read(self, *arguments: Any) -> tuple[Any, ...]:
        """The graph's inputs, read anew from the user's objects."""
        try:
            self._bytecode(*arguments)
        except _InputsRead as found:
            return found.inputs
        raise AssertionError("the bytecode calls the graph")

    def call_where_grad_is_last_turned_off(self, function: Callable[[], None]) -> None:
        """Has the graph call a function of no arguments just before it last turns gradients off."""
        nodes = self.graph.graph.nodes
        found = [each for each in nodes if each.target is torch._C._set_grad_enabled and each.args == (False,)]
        if found:
            with self.graph.graph.inserting_before(found[-1]):
                self.graph.graph.call_function(function)
            self.graph.recompile()

    @property
    def checkpointed(self) -> str | None:
        """The user's line that calls `torch.utils.checkpoint`; None if forward does not call it."""
        checkpoint = torch.ops.higher_order.tag_activation_checkpoint
        for node in self.graph.graph.nodes:
            if node.target is checkpoint:
                frames = re.findall(r'File "(.*)", line (\d+), in .*\n +(.*)', node.meta.get("stack_trace", ""))
                return _place_of([FrameSummary(name, int(number), "", line=line) for name, number, line in frames])
        return None

    def result(self, outputs: Sequence[Any], *arguments: Any) -> Any:
        """What the function returns where the graph returns `outputs`."""

        def returned(*_: Any) -> tuple[Any, ...]:
            return tuple(outputs)

        names = {**self._names, self._backend_id: returned}
        own = self._bytecode
        return FunctionType(own.__code__, names, closure=own.__closure__, argdefs=own.__defaults__)(*arguments)


def capture_function(
    function: FunctionType, arguments: dict[str, Any], open_dims: Sequence[tuple[Tensor, int]]
) -> DynamoCapture:
    """Captures a function of these arguments as one graph. Runs none of its code and changes none of its objects.

    Args:
        function: what to capture. Its globals must be a dict of its own, in which Dynamo keeps names.
        arguments: by name, in order.
        open_dims: tensors and those of their dimensions whose size the graph leaves open.

    Raises:
        EngineError: there is something that no graph can hold; the message names the line.
    """
    from torch._dynamo import config
    from torch._dynamo.convert_frame import fullgraph_capture
    from torch._dynamo.eval_frame import set_enable_dynamic
    from torch._dynamo.hooks import Hooks
    from torch._dynamo.utils import dynamo_timed, get_metrics_context
    from torch._dynamo.variables.torch_function import torch_function_mode_stack_state_mgr

    # `config.patch` would take any name. Without one of these, the graph or its guards might leave something out.
    if missing := [name for name in _OPTIONS if not hasattr(config, name)]:
        raise EngineError(
            f"this torch ({torch.__version__}) is not known to capture a step correctly: torch._dynamo.config has no "
            f"{', '.join(missing)}. Use torch 2.13, or engine='eager'"
        )
    with ExitStack() as stack:
        stack.enter_context(config.patch(_OPTIONS))
        stack.enter_context(get_metrics_context())
        stack.enter_context(dynamo_timed("fullgraph_capture"))
        stack.enter_context(set_enable_dynamic(False))
        stack.enter_context(torch_function_mode_stack_state_mgr)
        stack.enter_context(warnings.catch_warnings())
        for message in _WARNINGS:
            warnings.filterwarnings("ignore", message)
        stack.enter_context(_no_marks_left())
        for tensor, dim in open_dims:
            _leave_open(tensor, dim, stack)
        _forget_lookups()
        changed: list[str] = []
        try:
            try:
                output = fullgraph_capture(function, tuple(arguments.values()))
            except RuntimeError as error:
                changed = _side_effects(error)
                if not changed or not all(map(_BUFFERS_OF_MODEL.fullmatch, changed)):
                    raise
                stack.enter_context(config.patch(side_effect_replay_policy="silent", replay_side_effects=True))
                output = fullgraph_capture(function, tuple(arguments.values()))
            if output.backend_input is None:
                raise EngineError("forward computes nothing from tensors")
            captured = output.graph_capture_output
            known = _known_elsewhere(captured, changed)
            hooks = Hooks(guard_filter_fn=partial(_are_needed, known=known))
            guards = captured.build_guards(function.__code__, hooks)
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(_why_refused(error)) from error
        return DynamoCapture(function, output, guards, scope_of(function, arguments), known)


def function_modes() -> list[TorchFunctionMode]:
    """The torch function modes that are on, without this package's own: those watch and change nothing."""
    return [mode for mode in _get_current_function_mode_stack() if not type(mode).__module__.startswith("fasttrain.")]


def _forget_lookups() -> None:
    """Has Dynamo look modules and classes up again, as they may be others now: it keeps what its first look found."""
    for module, name in (("symbolic_convert", "_import_module"), ("variables.object_protocol", "_get_cached_slots")):
        lookup: Any = getattr(sys.modules.get(f"torch._dynamo.{module}"), name, None)
        if hasattr(lookup, "cache_clear"):
            lookup.cache_clear()


def _known_elsewhere(captured: Any, changed: Sequence[str]) -> Callable[[str], bool]:
    """Returns a function that tells whether an expression reads a tensor that the caller checks itself.

    These are the inputs of the graph, except the batch's tensors, and the buffers that forward replaces.

    Args:
        captured: what Dynamo captured.
        changed: expressions of the dicts that forward writes to, such as a module's `_buffers`.
    """
    sources = captured.output_graph.export_metadata.graph_input_idx_to_local_source.values()
    inputs = {source.name for source in sources if not source.name.startswith("L['batch']")}
    tables = tuple(f"{table}[" for table in changed)
    return lambda name: name in inputs or name.startswith(tables)


def _are_needed(guards: Sequence[Any], known: Callable[[str], bool]) -> list[bool]:
    """Which guards are checked: not those of tensors whose changes the caller notices.

    Nor those of Python's own functions and of this package's code, which do not change.
    """

    def is_needed(guard: Any) -> bool:
        if guard.guard_type == "TORCH_FUNCTION_STATE":
            return False  # see `function_modes`
        if guard.guard_type == "TENSOR_MATCH":
            return not known(guard.name)
        if guard.name.startswith("G['__builtins_dict__"):
            return not isinstance(guard.value, type | BuiltinFunctionType)
        return not guard.name.startswith(_OWN_NAMES)

    return [is_needed(guard) for guard in guards]


_OWN_NAMES = ("G['torch']", "G['__import_fasttrain_dot_step_", "L['device']", "L['dtype']")


def scope_of(function: FunctionType, arguments: dict[str, Any]) -> dict[str, Any]:
    """The locals that guards of a function look at: its arguments and what it closes over."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {**{name: cell.cell_contents for name, cell in cells}, **arguments}


def _leave_open(tensor: Tensor, dim: int, stack: ExitStack) -> None:
    before = set(vars(tensor))
    torch._dynamo.mark_dynamic(tensor, dim)

    def forget() -> None:
        for name in set(vars(tensor)) - before:
            delattr(tensor, name)

    stack.callback(forget)


@contextmanager
def _no_marks_left() -> Generator[None]:
    """Takes back what Dynamo notes on the user's tensors: that the parameters of modules stay where they are."""
    from torch._dynamo import decorators

    mark, thread = decorators.mark_static_address, get_ident()
    marked: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def noted(tensor: Any, guard: bool = False) -> None:
        if get_ident() == thread:
            marked.append((vars(tensor), dict(vars(tensor))))
        mark(tensor, guard)

    decorators.mark_static_address = noted
    try:
        yield
    finally:
        decorators.mark_static_address = mark
        for own, before in reversed(marked):
            for name in set(own) - set(before):
                del own[name]
            own.update(before)


def _imported(name: str) -> Any:
    module = import_module(name)
    if name != "torch._dynamo.utils":
        return module
    # Its bytecode notes each run for a profiler, which takes longer than the rest of it.
    nothing = dict.fromkeys(("record_pregraph_bytecode_enter", "record_pregraph_bytecode_exit"), _nothing)
    return SimpleNamespace(**{**vars(module), **nothing})


def _nothing(*_: object) -> None:
    pass


def _graph_input(source: Any) -> GraphInput:
    from torch._dynamo.source import TensorPropertySource

    size_of = None
    if isinstance(source, TensorPropertySource):
        size_of = _spelled(source.base.name), source.idx or 0
    return GraphInput(_spelled(source.name), _argument_of(source), size_of)


def _argument_of(source: Any) -> str | None:
    """The function's argument that a source begins with, if it begins with one."""
    from torch._dynamo.source import LocalSource

    while getattr(source, "base", None) is not None:
        source = source.base
    return source.local_name if isinstance(source, LocalSource) and source.is_input else None


def _spelled(name: str) -> str:
    """A source's expression as a user would write it."""
    name = re.sub(r"___from_numpy\((.*)\)", r"\1", name)
    name = re.sub(r"\b[LG]\['(?:__import_)?(\w+)'\]", lambda match: match[1].replace("_dot_", "."), name)
    name = re.sub(r"\._modules\['([A-Za-z_]\w*)'\]", r".\1", name)
    name = re.sub(r"\._modules\['(\w+)'\]", r"[\1]", name)
    return re.sub(r"\._(?:parameters|buffers)\['(\w+)'\]", r".\1", name)


def _names_of_guards(scope: dict[str, Any], global_scope: dict[str, Any]) -> dict[str, Any]:
    """The names that the expressions of guards use."""
    from torch._dynamo.guards import _get_closure_vars

    return {**_get_closure_vars(), "L": scope, "G": global_scope}


def _reached(guards: Any, names: dict[str, Any]) -> list[Guarded]:
    """The objects that guards look at, each once."""
    found: dict[int, Guarded] = {}
    for guard in guards:
        if not guard.name:
            continue
        try:
            value = eval(guard.name, names)  # Dynamo's own expression, as its guards evaluate it
        except Exception:  # of what is not there, such as an attribute that `hasattr` was asked about
            continue
        if id(value) not in found:
            name = f"{_spelled(guard.name)}{_place_of(guard.user_stack or ())}"
            found[id(value)] = Guarded(value, name, _argument_of(guard.originating_source))
    return list(found.values())


def _loosely_guarded(
    guards: Any, names: dict[str, Any], known: Callable[[str], bool]
) -> list[tuple[str, CodeType, Any]]:
    """What guards compare too loosely: its name, the expression that reads it, and its value.

    Zeros of either sign are equal. Tensors are compared by their kind: those that forward only looks at, as `a is b`
    does, are no inputs, whose reader would notice another one. Nor are numpy arrays whose shape alone is read. A batch
    has other tensors in each step.
    """
    found: dict[str, tuple[str, CodeType, Any]] = {}
    for guard in guards:
        with suppress(Exception):  # of what is not there
            value = eval(guard.name, names)
            is_zero = type(value) is float and value == 0.0 and not _is_of_torchs_module(guard, names)
            is_array = isinstance(value, Tensor) or type(value).__module__ == "numpy"
            if is_zero or (is_array and not guard.name.startswith("L['batch']") and not known(guard.name)):
                kind = "sign of the zero" if is_zero else "tensor" if isinstance(value, Tensor) else "array"
                what = f"the {kind} {_spelled(guard.name)}"
                found[guard.name] = what, compile(guard.name, guard.name, "eval"), value
    return list(found.values())


def _is_of_torchs_module(guard: Any, names: dict[str, Any]) -> bool:
    """Whether a value is an attribute of one of torch's modules, such as the probability of a dropout."""
    owner = getattr(guard.originating_source, "base", None)
    return owner is not None and type(eval(owner.name, names)).__module__.startswith("torch.nn.")


def _is_still(before: Any, now: Any) -> bool:
    return now is before or (type(now) is float and now == before and copysign(1.0, now) == copysign(1.0, before))


def _described(part: str) -> str:
    """A guard's own words: `expression  # line of code  # file:line in function`."""
    expression, *comments = part.split("  # ")
    where = "".join(f" ({comment.strip()})" for comment in comments[-1:])
    return f"{_spelled(expression).rstrip()}{where}"


def _side_effects(error: BaseException) -> list[str]:
    """The sources that forward changes, if that is what the error is about."""
    _, is_found, listed = str(error).partition("potential sources you can double check: ")
    return ast.literal_eval(listed[: listed.rindex("]") + 1]) if is_found else []


def _place_of_change(error: BaseException, changed: Sequence[str]) -> str:
    """The line of the first side effect: the error does not carry it, but Dynamo's state in its traceback does.

    Args:
        error: Dynamo's.
        changed: the sources of what outlives forward; objects that forward makes and changes itself may come before.
    """
    trace = error.__traceback__
    while trace is not None:
        effects = getattr(trace.tb_frame.f_locals.get("self"), "side_effects", None)
        stacks_by_variable: dict[Any, list[Any]] = getattr(effects, "mutation_user_stacks", {})
        of_changed = [
            stacks
            for variable, stacks in stacks_by_variable.items()
            if getattr(getattr(variable, "source", None), "name", None) in changed
        ]
        for stacks in of_changed or stacks_by_variable.values():
            for stack in stacks:
                if place := _place_of(stack):
                    return place + _place_in_torch(stack)
        trace = trace.tb_next
    return ""


def _place_in_torch(frames: Sequence[Any]) -> str:
    """The line of torch's that does it for the user's, such as a hook of `torch.nn.utils.weight_norm`."""
    folder = os.path.dirname(torch.__file__)
    inner = next(frame for frame in reversed(list(frames)) if not frame.filename.endswith("torch/nn/modules/module.py"))
    if not inner.filename.startswith(folder):
        return ""
    return f", by {os.path.relpath(inner.filename, os.path.dirname(folder))}:{inner.lineno}"


def _why_refused(error: Exception) -> str:
    if changed := _side_effects(error):
        return (
            "forward changes Python objects, which a compiled step would not do"
            f"{_place_of_change(error, changed)}. What is to be kept from step to step belongs in a buffer of the "
            "model (register_buffer)"
        )
    return f"{_advice(str(error))}{_place(error)}"


def _advice(text: str) -> str:
    """What cannot be compiled, and what to write instead, for what users write most often."""
    explained, _, rest = text.partition("from user code:")[0].partition("Hint:")
    told = explained + rest.partition("Developer debug context:")[2]
    for pattern, advice in _ADVICE:
        if found := re.search(pattern, told):
            return advice.format(*found.groups())
    first = explained.strip().partition("\n")[0]
    return f"forward cannot be captured as one graph: {first or 'for an unknown reason'}"


_ADVICE = (
    (
        r"aten\._ctc_loss",
        "ctc_loss reads the lengths of its sequences on the host, and no operators on tensors compute the same; train "
        "this model with engine 'eager'",
    ),
    (
        r"Caused by: return F\.batch_norm\(",
        "a BatchNorm with momentum=None reads on the host how many batches it has seen; give it a number, such as 0.1",
    ),
    (
        r"Caused by: .*multi_head_attention_forward",
        "nn.TransformerEncoder and nn.Transformer compare a mask with the causal one on the host; say beside the mask "
        "whether it is: is_causal=True or False (src_is_causal and tgt_is_causal of nn.Transformer)",
    ),
    (
        r"Caused by: .*gaussian_nll_loss",
        "gaussian_nll_loss reads on the host whether a variance is negative; use operators in its place: "
        "0.5 * (variance.log() + (prediction - target) ** 2 / variance)",
    ),
    (
        r"torch\.distributions|torch/distributions",
        "torch.distributions checks its arguments on the host; switch that off: validate_args=False, or "
        "torch.distributions.Distribution.set_default_validate_args(False)",
    ),
    (
        r"pack_padded_sequence|pad_packed_sequence",
        "forward packs sequences, which reads their lengths on the host; mask the padded steps instead",
    ),
    (
        r"[Dd]ata-dependent|Tensor\.item\(\)|scalar_outputs|_local_scalar_dense|got SymInt|Tensor\.tolist",
        "forward reads the value of a tensor or numpy scalar on the host (as .item(), bool(), tolist() or a branch on "
        "one do); use operators on tensors such as torch.where instead",
    ),
    (
        r"dynamic shape operator|dynamic_output_shape",
        "forward makes a tensor whose size depends on values (as nonzero or a boolean index do); use torch.where or a "
        "mask of fixed size instead",
    ),
    (
        r"trace_numpy|numpy",
        "forward calls numpy, which reads tensors on the host and draws random numbers of its own; use torch instead",
    ),
    (
        r"Random\.|random\.",
        "forward draws random numbers from Python's generator, and a compiled step would keep the first ones; draw "
        "them from torch's instead",
    ),
    (
        r"tp_iternext",
        "forward takes the next value of an iterator, which a compiled step would not do; keep a list, and a "
        "buffer that counts",
    ),
    (
        r"Constraints violated",
        "what forward computes is decided by the number of values of a batch, which is another for each: use operators "
        "on tensors in place of Python's numbers and branches",
    ),
    (r"Observed exception[\s\S]*raised exception (.*)", "forward raises {0}"),
    (
        r"wrap sparse Tensor",
        "forward reads a sparse tensor, which cannot be compiled; use a dense one",
    ),
    (
        r"convert args/kwargs to proxy",
        "forward gives an operator of torch an argument that is neither a tensor nor a plain Python value",
    ),
    (r"function `([^`]+)`[\s\S]*should not be traced", "forward calls {0}, which torch's compiler does not follow"),
)


def _place(error: BaseException) -> str:
    return _place_of(getattr(error, "real_stack", None) or ())


def _place_of(frames: Sequence[Any]) -> str:
    """The user's line: the innermost one that is neither torch's nor ours."""
    inside = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    for frame in reversed(list(frames)):
        if not frame.filename.startswith(inside):
            return f": {(frame.line or '').strip()!r} in {os.path.basename(frame.filename)}:{frame.lineno}"
    return ""
