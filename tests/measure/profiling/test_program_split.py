"""A compiled step under the tracer: what is slow in it is found in the kernel, and the part of the step, that it is in.

Compiling takes 20 to 40 s, so one program shows all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttrain.device import cpp_compiler
from fasttrain.measure.profiling.origins import NOT_ATTRIBUTED
from fasttrain.measure.profiling.passes import CountPass, TracePass
from fasttrain.measure.profiling.phases import Phases
from fasttrain.measure.profiling.trace_summary import TraceSummary
from fasttrain.step.build import GraphJob
from fasttrain.step.cache import ProgramCache, default_folder
from fasttrain.step.compiler import program_key
from fasttrain.step.program import StepProgram, compile_graph
from fasttrain.step.trace import TracedStep, trace_step
from fasttrain.step.train_step import TrainStep

ROWS, WIDTH, CLASSES, STEPS, WAVES = 256, 64, 64, 20, 40


def slow_metric(_loss: Tensor, predictions: Tensor, _targets: Tensor) -> Tensor:
    """Takes longer than all the rest of the step: 650,000 sines."""
    for _ in range(WAVES):
        predictions = predictions.sin()
    return predictions.sum()


def train_step() -> TrainStep:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = nn.CrossEntropyLoss()
    return TrainStep(model, optimizer, loss=loss, engine="eager", metrics={"slow": slow_metric})


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(ROWS, WIDTH, generator=generator)
    return inputs, torch.randint(0, CLASSES, (ROWS,), generator=generator)


def marked_program(traced: TracedStep, folder: Path) -> StepProgram:
    """The program of a step, as the cache keeps it for the profiler; it runs instead of an ordinary one too."""
    job = GraphJob.of(traced.parts[0]).marked()
    package = folder / "marked.pt2"
    compile_graph(job.graph, job.inputs, job.open_dims, package, job.origins)
    kept = ProgramCache(default_folder()).add(program_key(job), package, "a test")
    return StepProgram([kept], traced)


def run(program: StepProgram, traced: TracedStep, given: Any) -> Tensor:
    inputs: Any = traced.inputs(given)
    return program.run(inputs)


def summary_of(program: StepProgram, traced: TracedStep, given: Any, folder: Path) -> TraceSummary:
    """Of a trace of some steps."""
    phases = Phases()
    watch = TracePass(phases, folder / "trace.json.gz")
    with phases:
        watch.start()
        for _ in range(STEPS):
            run(program, traced, given)
            watch.step(1)
        watch.stop()
    return watch.summary()


def flops_of(step: Callable[[], object]) -> float:
    """As a profile counts them."""
    watched = CountPass(begin_s=0.0)
    watched.start()
    step()
    watched.stop()
    return watched.flops.flops


@pytest.mark.skipif(cpp_compiler() is None, reason="needs a C++ compiler")
def test_what_is_slow_is_found_in_its_kernel(tmp_path: Path) -> None:
    given, step, eager = batch(), train_step(), train_step()
    step(given), eager(given)
    traced = trace_step(step.spec, given)
    program = marked_program(traced, tmp_path)
    torch.testing.assert_close(run(program, traced, given), eager(given))

    summary = summary_of(program, traced, given, tmp_path)
    whole = summary.phases["program"]
    rows = [row for row in summary.operators if row.phase == "program"]
    slowest = max(rows, key=lambda row: row.self_us)
    assert slowest.name.startswith("metrics: ")
    assert "sin" in slowest.name
    assert slowest.calls == STEPS
    assert summary.program["metrics"] > 0.3 * whole  # half of it on a quiet machine
    assert any("optimizer" in origin for origin in summary.program)
    assert summary.program[NOT_ATTRIBUTED] < 0.2 * whole
    assert sum(summary.program.values()) == pytest.approx(whole) == pytest.approx(sum(row.self_us for row in rows))
    products = {"forward": 0, "backward": 0}
    for row in rows:
        if "product_" in row.name or row.name.endswith("mm_out"):  # a loop of ours or ATen's, by the processor
            products[row.name.partition(":")[0]] += row.calls
    assert products == {"forward": 2 * STEPS, "backward": 3 * STEPS}
    # Neither kernels nor empty events are operators, but what ATen dispatches in a kernel is.
    assert 0 < summary.num_operators < 20 * STEPS
    assert summary.num_operators % STEPS == 0

    forward = 2 * ROWS * (WIDTH * 32 + 32 * CLASSES)
    of_inputs = 2 * ROWS * 32 * CLASSES
    assert flops_of(lambda: run(program, traced, given)) == flops_of(lambda: eager(given)) == 2 * forward + of_inputs
