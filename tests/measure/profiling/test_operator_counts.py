"""FLOPs: a compiled step has those of the eager step that it was traced from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest
import torch

from fasttrain.measure.profiling.operator_counts import FlopCount, graph_flops
from fasttrain.step.trace import Mismatch, trace_step
from fasttrain.step.train_step import TrainStep
from fasttrain.step.walk import Loop, WalkingProgram
from fasttrain.workloads.cnn import cnn_job
from fasttrain.workloads.mlp import mlp_job
from fasttrain.workloads.tensor_job import TensorJob
from tests.step.models import CASES, OPTIMIZERS, started
from tests.step.spans import data_of, taken, trace_walk

CPU = torch.device("cpu")


def test_the_mlps_traced_step_has_eagers_flops() -> None:
    check_flops(mlp_job(CPU, 256))


@pytest.mark.usefixtures("data_dir")
def test_the_cnns_traced_step_has_eagers_flops() -> None:
    check_flops(cnn_job(CPU))


def check_flops(job: TensorJob) -> None:
    model = job.model()
    step = TrainStep(model, job.optimizer(model), job.forward, engine="eager")
    first, second = islice(job.batches(), 2)
    step(first)
    with FlopCount() as eager:
        step(second)
    traced = trace_step(step.spec, second)
    inputs = traced.inputs(second)
    assert not isinstance(inputs, Mismatch)
    before = [tensor.clone() for tensor in inputs]
    found = graph_flops(traced.parts[0].graph, inputs)
    assert found.flops == eager.flops > 0
    assert "argmax" in found.not_counted & eager.not_counted
    assert all(torch.equal(tensor, was) for tensor, was in zip(inputs, before, strict=True)), "it was run"


class Idle(WalkingProgram):
    """Computes nothing: what is counted is what it says that it runs."""

    def _loaded(self, packages: Sequence[Path]) -> Loop:
        return lambda _inputs, _steps: None


def test_each_step_of_a_walking_program_has_the_steps_flops() -> None:
    data = data_of(CASES["mlp"])
    spec, _ = started(CASES["mlp"], OPTIMIZERS["sgd"])
    traced = trace_walk(spec, data)
    program, span = Idle([], traced), taken(iter(data), 3)
    inputs = traced.step.inputs(span.batch())
    assert not isinstance(inputs, Mismatch)
    of_step = graph_flops(traced.step.parts[0].graph, inputs)
    with FlopCount() as counted:
        program.run(span)
    assert counted.flops == 3 * of_step.flops > 0
