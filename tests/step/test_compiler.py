"""What a program and a verdict are known by: all that they depend on, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.data.resident import resident
from fasttrain.step import compiler
from fasttrain.step.build import GraphJob
from fasttrain.step.cache import ProgramCache, Verdict
from fasttrain.step.compiler import Compiler, program_key
from fasttrain.step.eager import EagerEngine
from fasttrain.step.program import compile_graph
from fasttrain.step.spec import StepSpec, normalise_forward
from fasttrain.step.torch_private import prepare_for_inductor, trace_graph
from fasttrain.step.trace import trace_step
from fasttrain.step.train_step import TrainStep
from fasttrain.step.walk import TracedWalk
from tests.step.fakes import Graphs
from tests.step.jobs import batches, model, train_step
from tests.step.models import ASKED, CASES, OPTIMIZERS, started
from tests.step.spans import data_of, trace_walk

job_signature = partial(compiler.job_signature, rows=None)


def job(factor: Tensor, example: Tensor, open_dims: frozenset[int] = frozenset()) -> GraphJob:
    """Of a product with a constant that is made in the traced function."""
    value, dtype = factor.tolist(), factor.dtype
    graph = trace_graph(lambda x: x * torch.tensor(value, dtype=dtype), [example], [open_dims])
    prepare_for_inductor(graph)
    kind = (example.shape, example.stride(), example.dtype, example.device)
    return GraphJob(graph=graph, inputs=[kind], open_dims=[open_dims], num_threads=torch.get_num_threads())


TWO, X = torch.tensor(2.0), torch.ones(3, 4)


def test_the_same_step_has_the_same_key() -> None:
    assert program_key(job(TWO, X)) == program_key(job(TWO, torch.zeros(3, 4)))


@pytest.mark.parametrize(
    "other",
    [
        lambda: job(torch.tensor(3.0), X),
        lambda: job(torch.tensor(2.0, dtype=torch.bfloat16), X),
        lambda: job(torch.tensor([2.0, 2.0, 2.0, 2.0]), X),
        lambda: job(TWO, torch.ones(4, 3)),
        lambda: job(TWO, torch.ones(4, 3).t()),
        lambda: job(TWO, X.double()),
        lambda: job(TWO, X, frozenset({0})),
    ],
)
def test_another_step_has_another_key(other: Callable[[], GraphJob]) -> None:
    assert program_key(job(TWO, X)) != program_key(other())


def test_open_sizes_are_not_part_of_the_key() -> None:
    rows = frozenset({0})
    assert program_key(job(TWO, torch.ones(3, 4), rows)) == program_key(job(TWO, torch.ones(7, 4), rows))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("torch.get_num_threads", lambda: 7),
        ("torch.backends.cpu.get_cpu_capability", lambda: "ANOTHER"),
        ("fasttrain.step.compiler.device_name", lambda _: "another processor"),
        ("fasttrain.step.compiler.cpu_features", lambda: "fewer"),
        ("torch.__version__", "0.0"),
    ],
)
def test_threads_hardware_and_versions_are_part_of_key_and_signature(
    name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    [batch] = batches(1)
    before = program_key(job(TWO, X)), job_signature(train_step("eager").spec, batch)
    monkeypatch.setattr(name, value)
    after = program_key(job(TWO, X)), job_signature(train_step("eager").spec, batch)
    monkeypatch.undo()
    assert before[0] != after[0]
    assert before[1] != after[1]


@pytest.mark.parametrize("name", [name if name.endswith(".py") else f"{name}/small.py" for name in compiler.COMPILING])
def test_what_compiles_is_part_of_the_key(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    digest = compiler._compiling_code  # pyright: ignore[reportPrivateUsage]
    package = Path(compiler.__file__).parent
    copy = Path(shutil.copytree(package, tmp_path / "step"))
    before = program_key(job(TWO, X))
    monkeypatch.setattr(compiler, "files", lambda _: copy)
    try:
        digest.cache_clear()
        assert program_key(job(TWO, X)) == before
        with (copy / name).open("a") as file:
            file.write("# another\n")
        digest.cache_clear()
        assert program_key(job(TWO, X)) != before
    finally:
        digest.cache_clear()


def test_a_key_knows_all_code_that_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All of ours that runs while a job is compiled, but for plain data."""
    ran: set[str] = set()
    package = Path(compiler.__file__).parent

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            ran.add(frame.f_code.co_filename)

    wanted, data = job(TWO, X), data_of(CASES["sparse"])
    walking = GraphJob.of(trace_walk(started(CASES["sparse"], OPTIMIZERS["sgd"])[0], data).parts[0])
    sys.setprofile(note)
    try:
        walking.spelled_out()
        made = wanted.spelled_out()
        compile_graph(made.graph, made.inputs, made.open_dims, tmp_path / "step.pt2")
    finally:
        sys.setprofile(None)
    ours = {Path(name).relative_to(package).parts[0] for name in ran if Path(name).is_relative_to(package)}
    assert "torch_private" in ours
    assert ours <= set(compiler.COMPILING)


def altered(**options: Any) -> Callable[[StepSpec], StepSpec]:
    return lambda spec: StepSpec(**{**vars(spec), **options})


class Doubled(nn.Sequential):
    """Looks like the job's own model, and computes something else."""

    def __init__(self) -> None:
        super().__init__(*model())

    def forward(self, input: Any) -> Any:
        return super().forward(input) * 2


Doubled.__name__ = "Sequential"


def with_beta(spec: StepSpec) -> StepSpec:
    spec.optimizer.param_groups[0]["betas"] = (0.5, 0.9)
    return spec


def with_optimizer(spec: StepSpec) -> StepSpec:
    return altered(optimizer=torch.optim.Adam(spec.model.parameters()))(spec)


@pytest.mark.parametrize(
    "change",
    [
        altered(clip_norm=1.0),
        altered(clip_value=1.0),
        altered(precision="bf16"),
        altered(model=nn.Linear(6, 3)),
        altered(accumulate=2),
        altered(forward=normalise_forward(lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]) * 2.0, None)),
        altered(forward=normalise_forward(lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]) * 3.0, None)),
        altered(forward=normalise_forward(None, F.nll_loss)),
        altered(forward=normalise_forward(None, nn.CrossEntropyLoss(label_smoothing=0.1))),
        altered(forward=normalise_forward(None, partial(F.cross_entropy, label_smoothing=0.1))),
        altered(model=Doubled()),
        with_beta,
        with_optimizer,
    ],
)
def test_another_job_has_another_signature(change: Callable[[StepSpec], StepSpec]) -> None:
    [batch] = batches(1)
    spec = train_step("eager").spec
    before = job_signature(spec, batch)
    assert job_signature(train_step("eager").spec, batch) == before
    assert job_signature(change(spec), batch) != before


def counting(_loss: Tensor, predictions: Tensor | None, _targets: Tensor | None) -> Tensor:
    assert predictions is not None
    return of_all(predictions)


def of_all(values: Tensor) -> Tensor:
    return values.sum()


def test_metrics_and_what_they_call_are_part_of_the_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    [batch] = batches(1)
    found = {job_signature(train_step("eager").spec, batch)}
    found.add(job_signature(train_step("eager", metrics={"count": counting}).spec, batch))
    monkeypatch.setitem(globals(), "of_all", lambda values: values.mean())
    found.add(job_signature(train_step("eager", metrics={"count": counting}).spec, batch))
    assert len(found) == 3


class Settings(dict[str, float]):
    """As configurations often are: what is missing is a KeyError."""

    def __getattr__(self, name: str) -> float:
        return self[name]


SETTINGS = Settings(weight=2.0)


def weighted(_loss: Tensor, predictions: Tensor | None, _targets: Tensor | None) -> Tensor:
    assert predictions is not None
    return predictions.sum() * SETTINGS.weight


def test_a_global_that_raises_for_any_attribute_has_a_signature() -> None:
    [batch] = batches(1)
    assert job_signature(train_step("eager", metrics={"weighted": weighted}).spec, batch)


IN_ANOTHER_PROCESS = """
import torch
from fasttrain.step.compiler import job_signature
from fasttrain.step.train_step import TrainStep
A, B, C, D, E = range(5)
def forward(model, batch):
    assert batch.dim() in {1, 2, 3} and A < B < C < D < E
    assert str(batch.dtype) in {"torch.float32", "torch.float64", "torch.bfloat16"}
    return model(batch).sum()
net = torch.nn.Linear(2, 2)
spec = TrainStep(net, torch.optim.SGD(net.parameters()), forward).spec
print(job_signature(spec, torch.ones(2, 2), rows=None))
"""


def test_the_signature_is_the_same_in_every_process() -> None:
    found = {
        subprocess.run(
            [sys.executable, "-c", IN_ANOTHER_PROCESS],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def closing_over(factor: float, smoothing: float) -> Any:
    loss = nn.CrossEntropyLoss(label_smoothing=smoothing)

    def forward(model: nn.Module, batch: Any) -> Tensor:
        return factor * loss(model(batch[0]), batch[1])

    return forward


def test_what_forward_closes_over_is_part_of_the_signature() -> None:
    [batch] = batches(1)
    found = {
        job_signature(altered(forward=normalise_forward(closing_over(*values), None))(train_step("eager").spec), batch)
        for values in ((1.0, 0.0), (2.0, 0.0), (1.0, 0.1), (1.0, 0.0))
    }
    assert len(found) == 3


def test_a_value_that_is_not_there_yet_is_no_part_of_the_signature() -> None:
    def forward(model: nn.Module, batch: Any) -> Tensor:
        return later(model(batch[0]), batch[1])

    [batch] = batches(1)
    spec = altered(forward=normalise_forward(forward, None))(train_step("eager").spec)
    before = job_signature(spec, batch)
    later = F.cross_entropy
    assert job_signature(spec, batch) != before


def test_forward_may_close_over_the_step_that_it_is_of() -> None:
    [batch] = batches(1)

    def signature(factor: float) -> str:
        def forward(model: nn.Module, batch: Any) -> Tensor:
            assert step.spec.model is model
            return F.cross_entropy(model(batch[0]), batch[1]) * factor

        net = model()
        step = TrainStep(net, torch.optim.SGD(net.parameters(), lr=0.1), forward, engine="eager")
        return job_signature(step.spec, batch)

    assert signature(1.0) == signature(1.0) != signature(2.0)


def test_a_function_may_close_over_itself() -> None:
    def fold(model: nn.Module, batch: Any, times: int = 2) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1]) if times == 0 else fold(model, batch, times - 1)

    [batch] = batches(1)
    assert job_signature(altered(forward=normalise_forward(fold, None))(train_step("eager").spec), batch)


class Remembering(nn.Linear):
    """Has state that is no tensor in its `state_dict`."""

    def get_extra_state(self) -> Any:
        return {"seen": 1}


def test_extra_state_of_a_module_may_be_anything() -> None:
    [batch] = batches(1)
    assert job_signature(altered(model=Remembering(6, 3))(train_step("eager").spec), batch)


def test_the_version_is_part_of_the_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    [batch] = batches(1)
    before = job_signature(train_step("eager").spec, batch)
    monkeypatch.setattr("fasttrain.step.compiler.versions", lambda: {"fasttrain": "another"})
    assert job_signature(train_step("eager").spec, batch) != before


def test_the_batch_is_part_of_the_signature_and_the_rate_is_not() -> None:
    spec = train_step("eager").spec
    [batch], [short] = batches(1), batches(1, rows=5)
    before = job_signature(spec, batch)
    assert job_signature(spec, short) != before
    spec.optimizer.param_groups[0]["lr"] = 0.5
    assert job_signature(spec, batch) == before


def test_verdicts_are_kept_for_the_job_that_was_asked_for(own_programs: Path) -> None:
    [batch], [short] = batches(1), batches(1, rows=5)
    verdict = Verdict(eager_us=100.0, program_us=200.0, trace_s=0.5, compile_s=None, refused="not faster")
    compiler = Compiler(train_step("eager").spec)
    compiler.remember(verdict)
    assert compiler.verdict(batch) is None
    compiler.remember(verdict)
    later = Compiler(train_step("eager").spec)
    assert later.verdict(batch) == verdict
    assert later.verdict(short) is None


def test_a_verdict_that_cannot_be_written_is_measured_again(
    own_programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ProgramCache, "remember", full)
    [batch] = batches(1)
    compiler = Compiler(train_step("eager").spec)
    compiler.verdict(batch)
    compiler.remember(Verdict(eager_us=1.0, program_us=1.0, trace_s=1.0, compile_s=None, refused="spoilt"))
    assert compiler.verdict(batch) is None


def test_verdicts_of_resident_rows_and_of_batches_are_apart(own_programs: Path) -> None:
    data = resident(*batches(1, rows=40)[0], batch_size=8, device="cpu")
    epoch = iter(data)
    span, batch = epoch.take(2), next(epoch)
    verdict = Verdict(eager_us=100.0, program_us=200.0, trace_s=0.5, compile_s=None, refused="not faster")
    compiler = Compiler(train_step("eager").spec)
    assert compiler.verdict(span) is None
    compiler.remember(verdict)
    later = Compiler(train_step("eager").spec)
    assert later.verdict(batch) is None
    assert later.verdict(span) == verdict


def test_the_cache_has_a_walking_program_once_it_is_whole(graphs: Graphs) -> None:
    """Nor is it taken for the program of the same step on batches."""
    data = resident(*batches(1, rows=40)[0], batch_size=8, device="cpu")
    spec = train_step("eager").spec
    epoch = iter(data)
    EagerEngine(spec, ASKED).step(next(epoch))
    span = epoch.take(2)
    assert span is not None
    compiler, builds = Compiler(spec), list[int]()

    def begin(work: Any) -> None:
        pending = compiler.begin(work)
        assert isinstance(pending.traced, TracedWalk) == (work is span)
        assert pending.is_ready()
        builds.append(graphs.builds)

    for work in (span, span, span.batch(), span):
        begin(work)
    assert builds == [1, 1, 2, 2]
    home = compiler.cache.find(program_key(GraphJob.of(compiler.begin(span).traced.parts[0])))
    assert home is not None
    home.write_bytes(b"machine")
    begin(span)
    assert graphs.builds == 3


def test_two_constants_of_forward_make_two_programs() -> None:
    """What the key must tell apart: else one job is handed the other's program."""
    [batch] = batches(1)
    keys: set[str] = set()
    for factor in (2.0, 3.0):

        def forward(model: nn.Module, batch: Any, factor: float = factor) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1]) * torch.tensor(factor)

        spec = altered(forward=normalise_forward(forward, None))(train_step("eager").spec)
        EagerEngine(spec, ASKED).step(batch)
        [part] = trace_step(spec, batch).parts
        keys.add(program_key(GraphJob.of(part)))
    assert len(keys) == 2


def test_tensors_that_forward_reads_are_no_part_of_a_program() -> None:
    """Those are inputs: other values, or an expanded tensor, which has no bytes of its own to look at."""
    keys: set[str] = set()
    for value in (2.0, 3.0):
        net, weights = nn.Linear(6, 3), torch.full((1,), value).expand(8)

        def forward(model: nn.Module, batch: Any, weights: Tensor = weights) -> Tensor:
            return (F.cross_entropy(model(batch[0]), batch[1], reduction="none") * weights).mean()

        step = TrainStep(net, torch.optim.SGD(net.parameters(), lr=0.1), forward, engine="eager")
        batch = torch.ones(8, 6), torch.zeros(8, dtype=torch.int64)
        step(batch)
        [part] = trace_step(step.spec, batch).parts
        assert not list(part.graph.buffers())
        keys.add(program_key(GraphJob.of(part)))
    assert len(keys) == 1


def test_an_expanded_constant_has_a_key() -> None:
    held = job(TWO, X)
    held.graph.register_buffer("held", torch.ones(1).expand(4))
    assert program_key(held) != program_key(job(TWO, X))
