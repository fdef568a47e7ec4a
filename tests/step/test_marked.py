"""Marked programs: which part of a step each recorded call is of, and that they are never taken for ordinary ones."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch._inductor.codegen.cpp import CppScheduling

from fasttrain.step.build import GraphJob
from fasttrain.step.compiler import program_key
from fasttrain.step.function import TracedPart
from fasttrain.step.program import StepProgram
from fasttrain.step.torch_private import origins_of, recorded_as, unpickle_with_graph
from fasttrain.step.torch_private.marking import KernelCall, kernel_calls, kernels_apart, with_origins
from fasttrain.step.trace import trace_step
from fasttrain.step.train_step import TrainStep


def traced_part(**options: int) -> TracedPart:
    """Of a step of SGD with weight decay and momentum, whose factors are spelt out and whose scalars are settled."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01, momentum=0.9)
    step = TrainStep(model, optimizer, loss=nn.CrossEntropyLoss(), engine="eager", **options)
    batch = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    for _ in range(options.get("accumulate", 1)):
        step(batch)
    return trace_step(step.spec, batch).parts[0]


def origins_by_target(part: TracedPart) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    calls = [node for node in part.graph.graph.nodes if node.op == "call_function"]
    calls = [node for node in calls if getattr(node.target, "namespace", "") != "profiler"]
    for node, origin in zip(calls, origins_of(part.graph), strict=True):
        found.setdefault(str(node.target), set()).add(origin)
    return found


def test_every_call_is_of_a_part_of_the_step() -> None:
    found = origins_by_target(traced_part())
    assert found["aten.addmm.default"] == {"forward"}
    assert found["aten.nll_loss_forward.default"] == {"forward"}
    assert found["aten.mm.default"] == {"backward"}
    assert found["aten.argmax.default"] == {"metrics"}
    assert set().union(*found.values()) == {"forward", "backward", "optimizer", "metrics"}


def test_gathering_gradients_is_of_the_backward_pass() -> None:
    found = origins_by_target(traced_part(accumulate=2))
    assert set().union(*found.values()) == {"forward", "backward", "metrics"}


def test_what_was_put_into_a_graph_is_of_what_it_was_put_before() -> None:
    def function(x: Tensor) -> Tensor:
        with recorded_as("forward"):
            x = x.sin()
        with recorded_as("metrics"):
            return x.cos()

    graph = torch.fx.experimental.proxy_tensor.make_fx(function)(torch.ones(2))
    assert origins_of(graph) == ["", ""], "nothing is noted where nothing asks for notes"
    with torch.fx.traceback.preserve_node_meta():
        graph = torch.fx.experimental.proxy_tensor.make_fx(function)(torch.ones(2))
    [_, _, cosine, _] = graph.graph.nodes
    with graph.graph.inserting_before(cosine):
        graph.graph.call_function(torch.ops.aten.neg.default, (cosine.args[0],))
    assert origins_of(graph) == ["forward", "metrics", "metrics"]


def test_the_child_gets_the_origins_of_the_same_calls() -> None:
    job = GraphJob.of(traced_part()).marked()
    sent: GraphJob = unpickle_with_graph(pickle.dumps(job))
    assert sent.origins is not None
    interpreted = with_origins(sent.graph, sent.origins)
    traces = [
        node.stack_trace
        for node in interpreted.get_submodule("graph").graph.nodes
        if node.target is torch.ops.aten.mm.default
    ]
    assert traces == ["backward"]


def test_a_marked_program_has_a_key_of_its_own() -> None:
    job = GraphJob.of(traced_part())
    assert job.origins is None
    assert program_key(job.marked()) != program_key(job)
    assert program_key(job.marked()) == program_key(job.marked())


def test_loops_are_apart_only_meanwhile() -> None:
    before = CppScheduling.MAX_FUSED_KERNEL_ARGS_NUM
    with kernels_apart():
        assert before > CppScheduling.MAX_FUSED_KERNEL_ARGS_NUM == 0
    assert before == CppScheduling.MAX_FUSED_KERNEL_ARGS_NUM


def test_kernels_are_read_in_the_order_of_their_calls(tmp_path: Path) -> None:
    package = tmp_path / "package.pt2"
    known = {
        "cpp_fused_relu_2:10": {"stack_traces": ["optimizer", "forward", 'File "x.py"']},
        "aoti_torch_cpu_mm_out:9": {"stack_traces": ["backward"]},
        "aoti_torch_cpu_mm_out:1": {"stack_traces": []},
    }
    with zipfile.ZipFile(package, "w") as files:
        files.writestr("package/data/aotinductor/model/kernel_information.json", json.dumps(known))
    assert kernel_calls(package) == [
        KernelCall("aoti_torch_cpu_mm_out", ()),
        KernelCall("aoti_torch_cpu_mm_out", ("backward",)),
        KernelCall("cpp_fused_relu_2", ("forward", "optimizer")),
    ]


def test_other_packages_run_only_meanwhile() -> None:
    traced = mock.Mock(due=0)
    loaded: list[str] = []

    def load(package: str, _device: object) -> object:
        loaded.append(package)
        return lambda _inputs: [package]

    with mock.patch("fasttrain.step.program.flat_runner", load):
        program = StepProgram([Path("plain")], traced)
        with program.running([Path("marked")]):
            assert program.run([]) == "marked"
        assert program.run([]) == "plain"
    assert loaded == ["plain", "marked"]
