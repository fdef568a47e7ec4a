"""Canaries: each private torch API still does what the compiled step relies on."""

from __future__ import annotations

import importlib
import pickle
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler

from fasttrain.errors import EngineError
from fasttrain.step import torch_private as private
from fasttrain.step.torch_private.dynamo import _OPTIONS


def test_trace_graph_records_mutation_backward_and_open_sizes() -> None:
    outside = torch.ones(3)

    def step(weight: Tensor, x: Tensor) -> Tensor:
        leaf = weight.detach().requires_grad_()
        loss = (x @ leaf + outside).square().sum()
        [gradient] = torch.autograd.grad(loss, [leaf])
        weight.sub_(gradient, alpha=0.1)
        return loss.detach()

    weight, x = torch.randn(2, 3), torch.randn(4, 2)
    before = weight.clone()
    graph = private.trace_graph(step, [weight, x], [frozenset(), frozenset({0})])
    assert torch.equal(weight, before)
    assert sum(node.op == "placeholder" for node in graph.graph.nodes) == 2
    [attribute] = [node.target for node in graph.graph.nodes if node.op == "get_attr"]
    assert getattr(graph, attribute) is outside
    longer, expected = torch.randn(7, 2), weight.clone()
    torch.testing.assert_close(graph(weight, longer), step(expected, longer))
    torch.testing.assert_close(weight, expected)
    assert not torch.equal(weight, before)


def test_trace_graph_refuses_a_branch_on_a_value() -> None:
    with pytest.raises(Exception, match=r"data.dependent|Could not guard"):
        private.trace_graph(lambda x: x + 1 if x.sum() > 0 else x, [torch.ones(2)], [frozenset()])


def test_factors_of_sums_are_spelled_out() -> None:
    def step(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y).add(y, alpha=0.5).sub_(x, alpha=3)

    x, y = torch.randn(3, 3), torch.randn(3, 3)
    graph = private.trace_graph(step, [x, y], [frozenset(), frozenset()])
    private.prepare_for_inductor(graph)
    assert not any("alpha" in node.kwargs for node in graph.graph.nodes)
    torch.testing.assert_close(graph(x, y), step(x, y))


def test_a_product_with_an_integer_is_one_with_a_float() -> None:
    """Inductor folds `x * 0` to 0, also where x is NaN, and leaves `x * 0.0`."""

    def step(x: Tensor, ids: Tensor) -> Tensor:
        products = [x * 0, 0 * x, x * False, x.mul_(2), x.addcmul(x, x, value=0), x.add(x, alpha=0), 0 / x]
        return torch.stack(products).sum(0) + ids * 0

    x, ids = torch.tensor([1.0, float("nan"), float("inf")]), torch.tensor([3, 4, 5])
    graph = private.trace_graph(step, [x, ids], [frozenset(), frozenset()])
    private.prepare_for_inductor(graph)
    numbers = [
        value
        for node in graph.graph.nodes
        if node.op == "call_function" and "mul" in str(node.target)
        for value in (*node.args, *node.kwargs.values())
        if isinstance(value, int | float)
    ]
    assert [type(each) for each in numbers].count(int) == 1, "of the product of integers"
    assert [type(each) for each in numbers].count(float) == 7
    torch.testing.assert_close(graph(x.clone(), ids), step(x.clone(), ids), equal_nan=True)


def test_scalars_are_settled_before_tensors_use_them() -> None:
    def step(x: Tensor, count: Tensor) -> Tensor:
        return x * (1 - 0.9**count)

    x, count = torch.randn(3), torch.tensor(2.0, dtype=torch.float64)
    graph = private.trace_graph(step, [x, count], [frozenset(), frozenset()])
    private.prepare_for_inductor(graph)
    assert sum(node.target is torch.ops.aten.as_strided.default for node in graph.graph.nodes) == 1
    torch.testing.assert_close(graph(x, count), step(x, count))


def test_entries_of_an_input_are_left_where_they_are() -> None:
    x, numbers = torch.randn(3), torch.tensor([2.0, 3.0], dtype=torch.float64)
    graph = private.trace_graph(lambda x, numbers: x * numbers[1], [x, numbers], [frozenset(), frozenset()])
    private.prepare_for_inductor(graph)
    assert not any(node.target is torch.ops.aten.as_strided.default for node in graph.graph.nodes)


def test_reported_as_compiling_ends_with_its_context() -> None:
    with private.reported_as_compiling():
        assert torch.compiler.is_compiling()
    with pytest.raises(ZeroDivisionError), private.reported_as_compiling():
        _ = 1 / 0
    assert not torch.compiler.is_compiling()


def test_has_onednn_lstm_sees_the_lstm_alone() -> None:
    def graph(cell: nn.RNNBase) -> torch.fx.GraphModule:
        weights = [weight.detach() for weight in cell.parameters()]
        names = [name for name, _ in cell.named_parameters()]

        def run(x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(cell, dict(zip(names, tensors, strict=True)), (x,))[0]

        inputs = [torch.randn(2, 5, 3), *weights]
        return private.trace_graph(run, inputs, [frozenset()] * len(inputs))

    assert private.has_onednn_lstm(graph(nn.LSTM(3, 4)))
    assert not private.has_onednn_lstm(graph(nn.GRU(3, 4)))
    with private.without_onednn():
        assert not private.has_onednn_lstm(graph(nn.LSTM(3, 4)))


def test_without_onednn_ends_with_its_context() -> None:
    assert torch.backends.mkldnn.enabled
    with private.without_onednn():
        assert not torch.backends.mkldnn.enabled
    with pytest.raises(ZeroDivisionError), private.without_onednn():
        _ = 1 / 0
    assert torch.backends.mkldnn.enabled


def test_a_graph_is_unpickled_where_nothing_else_of_the_compiler_is_imported() -> None:
    graph = private.trace_graph(lambda x: x * 2, [torch.ones(2)], [frozenset()])
    private.prepare_for_inductor(graph)
    code = """
import sys
from fasttrain.step.torch_private import unpickle_with_graph
assert "torch._dynamo" not in sys.modules
print(unpickle_with_graph(sys.stdin.buffer.read())(21))
"""
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(graph), capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"tensor(42.)\n"), done.stderr.decode()


def caused_by(cause: BaseException) -> Exception:
    error = RuntimeError("this step cannot be compiled")
    error.__cause__ = cause
    return error


def test_lacks_resources_tells_the_surroundings_from_the_step() -> None:
    for cause in (
        OSError(28, "No space left on device"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        InductorError(CppCompileError(["g++"], "cannot execute"), None),
        InductorError(InvalidCxxCompiler(), None),
    ):
        assert private.lacks_resources(caused_by(cause))
    assert not private.lacks_resources(caused_by(InductorError(NotImplementedError("no such operator"), None)))


def test_trace_graph_refuses_what_is_decided_by_an_open_size() -> None:
    def step(x: Tensor) -> Tensor:
        return x.sum() if x.shape[0] > 3 else x.prod()

    with pytest.raises(EngineError, match="decided by the number of values"):
        private.trace_graph(step, [torch.ones(5)], [frozenset({0})])
    private.trace_graph(step, [torch.ones(5)], [frozenset()])
    private.trace_graph(lambda x: x / x.shape[0] if x.shape[0] > 1 else x, [torch.ones(5)], [frozenset({0})])


def test_tensor_check_refuses_an_open_size_below_two() -> None:
    twice = torch.ones(3)
    for tensors in ([torch.ones(3), torch.ones(3)], [twice, twice]):
        differ = private.tensor_check(tensors, [frozenset({0}), frozenset()])
        assert differ([torch.ones(2), torch.ones(3)]) is None
        assert "fewer than two" in str(differ([torch.ones(1), torch.ones(3)]))
        assert "fewer than two" in str(differ([torch.ones(0), torch.ones(3)]))


def test_tensor_check_sees_what_a_program_trusts() -> None:
    tensor = nn.Parameter(torch.randn(3, 4))
    differ = private.tensor_check([tensor, torch.zeros(2)], [frozenset(), frozenset({0})])
    assert differ([tensor, torch.ones(2)]) is None
    assert differ([tensor, torch.ones(9)]) is None
    for changed in (
        nn.Parameter(torch.randn(3, 5)),
        nn.Parameter(torch.randn(4, 3).t()),
        nn.Parameter(torch.randn(3, 4).double()),
        nn.Parameter(torch.randn(3, 4), requires_grad=False),
    ):
        assert isinstance(differ([changed, torch.ones(2)]), str)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert isinstance(differ([tensor, torch.ones(2)]), str)
    with torch.inference_mode():
        assert isinstance(differ([tensor, torch.ones(2)]), str)
    assert differ([tensor, torch.ones(2)]) is None


class Doubling(nn.Module):
    def forward(self, total: Tensor, x: Tensor) -> Tensor:
        total.add_(x)
        return x * 2


def test_a_package_is_compiled_and_run_and_changes_its_inputs(tmp_path: Path) -> None:
    total, x = torch.zeros(3), torch.arange(3.0)
    program = torch.export.export(Doubling(), (total, x), strict=False)
    path = str(tmp_path / "doubling.pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        private.compile_package(program, path)
    run = private.flat_runner(path, torch.device("cpu"))
    for _ in range(2):
        [doubled] = run([total, x])
        assert torch.equal(doubled, x * 2)
    assert torch.equal(total, x * 2)


def test_examples_are_exported_with_and_take_no_memory() -> None:
    huge = (torch.Size([1 << 20, 1 << 20]), (1 << 20, 1), torch.float32, torch.device("cpu"))  # four terabytes
    small = (torch.Size([2, 3]), (1, 2), torch.float64, torch.device("cpu"))
    examples = private.examples_of([huge, small])
    assert [(each.shape, each.stride(), each.dtype, each.device) for each in examples] == [huge, small]
    [sliced] = private.examples_of([small], [0])
    assert (sliced.shape, sliced.stride(), sliced.storage_offset()) == (*small[:2], 1)
    total, x = torch.zeros(3), torch.arange(3.0)
    kinds = [(each.shape, each.stride(), each.dtype, each.device) for each in (total, x)]
    program = torch.export.export(Doubling(), private.examples_of(kinds), strict=False)
    assert torch.equal(program.module()(total, x), x * 2)
    assert torch.equal(total, x)


def test_compilations_tell_of_breaks_and_of_what_is_compiled_again() -> None:
    begin = time.time()

    def doubled(x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        torch._dynamo.graph_break()
        return x + 1

    compiled = torch.compile(doubled, backend="eager", dynamic=False)
    for size in (2, 3):
        compiled(torch.ones(size))
    found = [each for each in private.compilations(begin) if each.file == __file__]
    line = doubled.__code__.co_firstlineno
    assert {each.line for each in found if not each.is_after_break} == {line}
    assert {each.line for each in found if each.is_after_break} == {line + 2}
    assert any(each.recompile_reason is not None and "size mismatch" in each.recompile_reason for each in found)
    assert private.compilations(time.time()) == []


# Dynamo's capture: see also tests/step/test_capture.py, which shows what the guards notice.

SCALE = 2.0
SHIFT = torch.ones(3)


class Scaling(nn.Module):
    offset = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(3))


def captured(function: Any, **arguments: Any) -> tuple[private.DynamoCapture, dict[str, Any]]:
    found = private.capture_function(function, arguments, [])
    return found, private.scope_of(function, arguments)


def test_capture_reads_inputs_by_name_and_returns_what_the_function_does() -> None:
    weight = torch.full((3,), 5.0)

    def step(model: Any, batch: Any) -> Any:
        return {"y": (model.fc(batch["x"][0]) + model.mean + SHIFT) * weight, "scale": SCALE}, batch["x"][0]

    model, batch = Scaling(), {"x": [torch.randn(2, 4)], "unread": object()}
    found, scope = captured(step, model=model, batch=batch)
    assert {(each.name, each.argument, each.size_of) for each in found.inputs} == {
        ("batch['x'][0]", "batch", None),
        ("model.fc.weight", "model", None),
        ("model.fc.bias", "model", None),
        ("model.mean", "model", None),
        ("SHIFT", None, None),
        ("weight", None, None),
    }
    assert found.holds(scope)
    inputs = found.read(model, batch)
    assert {id(each) for each in inputs} == {
        id(each) for each in (batch["x"][0], model.fc.weight, model.fc.bias, model.mean, SHIFT, weight)
    }
    outputs = found.graph(*inputs)
    result, x = found.result(outputs, model, batch)
    wanted, _ = step(model, batch)
    assert x is batch["x"][0]
    assert result["scale"] == SCALE
    torch.testing.assert_close(result["y"], wanted["y"])
    assert step.__code__ in found.codes


def test_capture_tells_the_first_guard_that_does_not_hold_with_the_users_line() -> None:
    def step(model: Any, batch: Any) -> Any:
        return (model.fc(batch) * model.offset,)

    model = Scaling()
    found, scope = captured(step, model=model, batch=torch.ones(2, 4))
    assert found.holds(scope)
    model.offset = 2.0
    assert not found.holds(scope)
    told = found.first_broken(scope)
    assert "offset" in told
    assert "test_torch_private.py:" in told


def test_capture_leaves_sizes_open_and_takes_the_mark_back() -> None:
    def step(batch: Any) -> Any:
        return (batch[0].sum() / batch[0].shape[0] * batch[1],)

    batch = [torch.ones(5), torch.ones(2)]
    found = private.capture_function(step, {"batch": batch}, [(batch[0], 0)])
    assert [vars(tensor) for tensor in batch] == [{}, {}]
    assert [each.size_of for each in found.inputs if each.size_of] == [("batch[0]", 0)]
    for length in (5, 9, 2):
        other = [torch.ones(length), torch.ones(2)]
        assert found.holds(private.scope_of(step, {"batch": other}))
        torch.testing.assert_close(found.graph(*found.read(other))[0], torch.ones(2))


def test_capture_replaces_buffers_and_nothing_else() -> None:
    def replaced(model: Any, batch: Any) -> Any:
        model.mean = model.mean + batch
        return (model.mean,)

    def kept(model: Any, batch: Any) -> Any:
        model.last = batch + 1
        return (model.last,)

    model, batch = Scaling(), torch.ones(3)
    before = model.mean
    found, _ = captured(replaced, model=model, batch=batch)
    assert model.mean is before
    assert len(found.graph(*found.read(model, batch))) == 1
    with pytest.raises(
        EngineError, match=r"changes Python objects.*'model.last = batch . 1' in test_torch_private.py:"
    ):
        captured(kept, model=model, batch=batch)
    assert not hasattr(model, "last")


@pytest.mark.parametrize("name", _OPTIONS)
def test_a_torch_without_one_of_dynamos_options_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    have = {each: object() for each in _OPTIONS if each != name}
    monkeypatch.setattr(torch._dynamo, "config", SimpleNamespace(**have))
    with pytest.raises(EngineError, match=rf"this torch \({re.escape(torch.__version__)}\) is not known to .*{name}"):
        captured(lambda batch: (batch + 1,), batch=torch.ones(3))


def test_dynamo_has_every_option() -> None:
    config = importlib.import_module("torch._dynamo.config")
    assert [name for name in _OPTIONS if not hasattr(config, name)] == []
    assert config.side_effect_replay_policy in ("silent", "warn", "info", "debug", "error")


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("Adam", ["exp_avg", "exp_avg_sq", None, "step"]),
        ("AdamW", ["exp_avg", "exp_avg_sq", None, "step"]),
        ("SGD", ["momentum_buffer"]),
        ("Adagrad", ["sum", "step"]),
    ],
)
def test_an_optimizers_listing_is_replaced_before_torch_reads_fused(kind: str, names: list[str | None]) -> None:
    weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    options = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer: Any = getattr(torch.optim, kind)(weights, lr=0.1, **options)
    listed: list[Any] = []

    def listing(torchs: Any, group: Any, *lists: list[Any]) -> Any:
        group["fused"] = True
        result = torchs(group, *lists)
        listed[:] = [list(each) for each in lists]
        return result

    for _ in range(2):
        for weight in weights[:2]:
            weight.grad = torch.ones_like(weight)
        private.replace_listing(optimizer, listing)
        with torch.profiler.profile() as profile:
            optimizer.step()
        private.restore_listing(optimizer, listing)
        optimizer.param_groups[0]["fused"] = None
        assert any("_fused_" in event.key for event in profile.key_averages())
    wanted = [weights[:2], [weight.grad for weight in weights[:2]]]
    wanted += [[optimizer.state[weight][name] for weight in weights[:2]] if name else [] for name in names]
    assert [[*map(id, each)] for each in listed] == [[*map(id, each)] for each in wanted]
    assert "_init_group" not in vars(optimizer)
