"""Canaries: each private torch API still does what the compiled step relies on."""

from __future__ import annotations

import functools
import math
import pickle
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler
from torch.nn.modules import module
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fasttrain.errors import EngineError
from fasttrain.step import torch_private as private


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


def test_optimizer_hooks_see_every_kind() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    tables = private.optimizer_hooks(optimizer)
    assert not any(tables)
    for register in (
        optimizer.register_step_pre_hook,
        optimizer.register_step_post_hook,
        register_optimizer_step_pre_hook,
        register_optimizer_step_post_hook,
    ):
        handle = register(lambda *_: None)
        assert any(tables)
        handle.remove()
        assert not any(tables)


def test_run_backward_is_backward() -> None:
    weight, frozen = torch.ones(3, requires_grad=True), torch.ones(3)
    for times in (1, 2):
        loss = (weight * frozen).square().sum()
        private.run_backward(loss, torch.ones(()))
        assert torch.equal(weight.grad, torch.full((3,), 2.0 * times))  # accumulates
        assert frozen.grad is None
    with pytest.raises(RuntimeError, match="second time"):
        private.run_backward(loss, torch.ones(()))
    with pytest.raises(RuntimeError, match="does not require grad"):
        private.run_backward(frozen.sum(), torch.ones(()))


def ranges_of(optimizer: torch.optim.Optimizer) -> list[str]:
    """The profiler's ranges that a step opens, whether or not anybody profiles."""
    opened: list[str] = []
    record_function = torch.autograd.profiler.record_function

    def noted(name: str) -> Any:
        opened.append(name)
        return record_function(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd.profiler, "record_function", noted)
        private.step_optimizer(optimizer)
    return opened


def one_weight(kind: type[torch.optim.Optimizer] = torch.optim.SGD) -> torch.optim.Optimizer:
    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    return kind([weight], lr=0.25)  # type: ignore[call-arg]


def stepped(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.param_groups[0]["params"][0] == 0.75)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, type("Sub", (torch.optim.AdamW,), {})])
def test_a_plain_step_opens_no_range(kind: type[torch.optim.Optimizer]) -> None:
    optimizer = one_weight(kind)
    before = optimizer.param_groups[0]["params"][0].item()
    assert ranges_of(optimizer) == []
    assert optimizer.param_groups[0]["params"][0].item() < before


def test_a_profiled_step_opens_its_range() -> None:
    optimizer = one_weight()
    with torch.profiler.profile():
        assert ranges_of(optimizer) == ["Optimizer.step#SGD.step"]
    assert stepped(optimizer)


def test_hooks_of_a_step_are_called() -> None:
    optimizer = one_weight()
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    private.step_optimizer(optimizer)
    assert called == ["before", "after"]
    assert stepped(optimizer)


def test_a_scheduler_knows_of_the_step() -> None:
    optimizer = one_weight()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert ranges_of(optimizer) == []
    scheduler.step()  # warns, which is an error here, if it believes that there was no step
    assert stepped(optimizer)


def test_a_step_that_the_user_replaced_is_called() -> None:
    called: list[str] = []

    def watched(step: Any) -> Any:
        @functools.wraps(step)
        def wrapper(*arguments: Any) -> Any:
            called.append("wrapper")
            return step(*arguments)

        return wrapper

    by_class = one_weight(type("Watched", (torch.optim.SGD,), {"step": watched(torch.optim.SGD.step)}))
    on_instance = one_weight()
    on_instance.step = watched(on_instance.step)  # type: ignore[method-assign]
    unbound = one_weight()
    unbound.step = functools.partial(watched(torch.optim.SGD.step), unbound)  # type: ignore[method-assign]
    for optimizer in (by_class, on_instance, unbound):
        called.clear()
        private.step_optimizer(optimizer)
        assert called == ["wrapper"]
        assert stepped(optimizer)


def test_gradient_hooks_are_seen() -> None:
    for name in ("register_hook", "register_post_accumulate_grad_hook"):
        parameter = nn.Parameter(torch.ones(1))
        assert not private.has_gradient_hooks(parameter)
        assert eval(private.NO_GRADIENT_HOOKS.format("parameter"))
        handle = getattr(parameter, name)(lambda _: None)
        assert private.has_gradient_hooks(parameter)
        assert not eval(private.NO_GRADIENT_HOOKS.format("parameter"))
        handle.remove()
        assert not private.has_gradient_hooks(parameter)
        assert eval(private.NO_GRADIENT_HOOKS.format("parameter"))


def test_the_tensors_of_a_scaler_and_whether_it_has_skipped() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    assert private.scaler_tensors(scaler) is None
    for factor, is_taken in ((1.0, True), (math.inf, False), (1.0, True)):
        scaler.scale(parameter.sum() * factor).backward()
        before = parameter.item()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert private.was_step_taken(scaler) == is_taken == (parameter.item() != before)
    found = private.scaler_tensors(scaler)
    assert found is not None
    assert [tensor.item() for tensor in found] == [4.0, 1]
    scaler.update(32.0)
    scaler.load_state_dict({**scaler.state_dict(), "_growth_tracker": 5})
    assert [tensor.item() for tensor in found] == [32.0, 5], "they stay the same tensors"


def test_a_scheduler_that_is_made_after_a_step_does_not_miss_it() -> None:
    """Warnings are errors here."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    private.note_step(optimizer)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


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
    assert (done.returncode, done.stdout) == (0, b"tensor(42)\n"), done.stderr.decode()


def test_module_tables_see_members_and_hooks() -> None:
    module = nn.BatchNorm1d(2)
    child = nn.Linear(1, 1)
    module.add_module("child", child)
    held = [value for table in private.module_tables(module) for value in table.values()]
    assert {id(module.weight), id(module.running_mean), id(child)} <= set(map(id, held))
    for name in (
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ):
        count = sum(map(len, private.module_tables(module)))
        handle = getattr(module, name)(lambda *_: None)
        assert sum(map(len, private.module_tables(module))) == count + 1
        handle.remove()


def test_global_module_hooks_see_every_kind() -> None:
    for register in (
        module.register_module_forward_pre_hook,
        module.register_module_forward_hook,
        module.register_module_full_backward_pre_hook,
        module.register_module_full_backward_hook,
    ):
        count = sum(map(len, private.global_module_hooks()))
        handle = register(lambda *_: None)
        assert sum(map(len, private.global_module_hooks())) == count + 1
        handle.remove()


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
