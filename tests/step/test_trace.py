"""The traced graph, uncompiled and in double precision, against the eager loop: every optimizer, every model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from fasttrain.errors import EngineError
from fasttrain.metrics import RunningMetrics
from fasttrain.step import trace as trace_module
from fasttrain.step.eager import EagerEngine
from fasttrain.step.spec import StepSpec
from fasttrain.step.trace import Mismatch, trace_step
from tests.step.agreement import run_graph, steps_agree
from tests.step.models import (
    ASKED,
    CASES,
    CPU,
    OPTIMIZERS,
    Case,
    assert_same,
    batches,
    everything,
    make,
    numbers,
    started,
    with_forward,
)

pytestmark = pytest.mark.usefixtures("in_double")

EVERY_OPTIMIZER_MEETS = ("sparse", "mlp", "dropout", "cnn", "gru", "transformer")
PAIRS = [
    (optimizer, model)
    for optimizer in OPTIMIZERS
    for model in CASES
    if model in EVERY_OPTIMIZER_MEETS or optimizer in ("sgd-momentum", "adam")
]


# A bias of the keys shifts all scores of a query alike, so its gradient is zero but for rounding (1e-18), and Adam
# divides that by its own root: the order in which a graph adds up shows in the bias (2e-11 after 20 steps).
RTOL = {("adamw", "transformer"): 1e-8}


@pytest.mark.parametrize(("optimizer", "model"), PAIRS)
def test_the_graph_gives_eagers_numbers(optimizer: str, model: str) -> None:
    steps_agree(CASES[model], OPTIMIZERS[optimizer], rtol=RTOL.get((optimizer, model), 1e-10))


MLP, ADAM, SGD = CASES["mlp"], OPTIMIZERS["adam"], OPTIMIZERS["sgd-momentum"]


@pytest.mark.parametrize(
    "options", [{"clip_norm": 0.05}, {"clip_value": 0.01}, {"clip_norm": 0.03, "clip_value": 0.02}]
)
def test_clipping_is_part_of_the_graph(options: dict[str, Any]) -> None:
    steps_agree(MLP, SGD, **options)


def test_autocast_is_part_of_the_graph() -> None:
    torch.set_default_dtype(torch.float32)
    data = batches(MLP)
    spec, eager_spec = make(MLP, SGD, precision="bf16"), make(MLP, SGD, precision="bf16")
    eager = EagerEngine(eager_spec, ASKED)
    EagerEngine(spec, ASKED).step(data[0])
    eager.step(data[0])
    traced = trace_step(spec, data[0])
    assert any("bfloat16" in str(node.args) + str(node.kwargs) for node in traced.parts[0].graph.graph.nodes)
    for batch in data[1:]:
        torch.testing.assert_close(run_graph(traced, batch), eager.step(batch), rtol=1e-3, atol=0)


def test_schedulers_move_the_rates_without_a_new_trace() -> None:
    (spec, batch), (eager_spec, _) = started(MLP, ADAM), started(MLP, ADAM)
    traced, eager = trace_step(spec, batch), EagerEngine(eager_spec, ASKED)
    for factor in (0.5, 3.0, 0.1):
        for group, other in zip(spec.optimizer.param_groups, eager_spec.optimizer.param_groups, strict=True):
            group["lr"] *= factor
            other["lr"] *= factor
        run_graph(traced, batch)
        eager.step(batch)
    assert_same(spec, eager_spec)


def test_a_rate_that_is_a_tensor_is_an_input() -> None:
    case = MLP
    model = case.build()
    rate = torch.tensor(0.1)
    spec = make(case, SGD)
    spec = StepSpec(**{**vars(spec), "model": model, "optimizer": optim.SGD(model.parameters(), lr=rate)})
    [batch] = batches(case, 1)
    traced = trace_step(spec, batch)
    before = copy.deepcopy(model.state_dict())
    rate.zero_()
    run_graph(traced, batch)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_loaded_state_dict_is_taken_up() -> None:
    (spec, batch), (eager_spec, _) = started(MLP, ADAM), started(MLP, ADAM)
    traced, eager = trace_step(spec, batch), EagerEngine(eager_spec, ASKED)
    saved = copy.deepcopy(spec.optimizer.state_dict())
    run_graph(traced, batch)
    eager.step(batch)
    spec.optimizer.load_state_dict(saved)
    eager_spec.optimizer.load_state_dict(copy.deepcopy(saved))
    assert isinstance(traced.inputs(batch), Mismatch)
    assert traced.rebind()
    run_graph(traced, batch)
    eager.step(batch)
    assert_same(spec, eager_spec)


def test_what_changed_in_kind_is_not_taken_up() -> None:
    spec, batch = started(MLP, ADAM)
    traced = trace_step(spec, batch)
    saved = spec.optimizer.state_dict()
    saved["param_groups"][0]["eps"] = 1e-3
    spec.optimizer.load_state_dict(saved)
    assert not traced.rebind()
    assert isinstance(traced.inputs(batch), Mismatch)


def test_where_nothing_was_replaced_there_is_nothing_to_take_up() -> None:
    spec, batch = started(MLP, ADAM)
    assert not trace_step(spec, batch).rebind()


def test_a_tensor_that_forward_closes_over_is_an_input() -> None:
    spec, batch = started(MLP, SGD)
    weights = torch.tensor([1.0, 2.0, 3.0])
    spec = with_forward(spec, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], weight=weights))
    traced = trace_step(spec, batch)
    for change in (1.0, 5.0):
        weights[0] = change
        wanted = F.cross_entropy(spec.model(batch[0]), batch[1], weight=weights).detach()
        torch.testing.assert_close(run_graph(traced, batch), wanted)


def test_one_tensor_may_be_there_twice() -> None:
    case = Case(lambda: nn.Linear(4, 4), numbers(5, 4), numbers(5, 4), F.mse_loss)
    spec, (x, _) = started(case, SGD)
    rate = torch.tensor(0.1)
    for group in spec.optimizer.param_groups:
        group["lr"] = rate
    wanted = F.mse_loss(spec.model(x), x).detach()
    torch.testing.assert_close(run_graph(trace_step(spec, (x, x)), (x, x)), wanted)


@pytest.mark.parametrize("model", ["sparse", "dropout", "transformer"])
def test_a_graph_survives_pickling(model: str) -> None:
    spec, batch = started(CASES[model], ADAM)
    traced = trace_step(spec, batch)
    graph = pickle.loads(pickle.dumps(traced.parts[0].graph))
    inputs = traced.inputs(batch)
    assert not isinstance(inputs, Mismatch)
    copies = [tensor.detach().clone() for tensor in inputs]
    random_state = torch.get_rng_state()
    loss = traced.run(inputs)
    torch.set_rng_state(random_state)
    with torch.no_grad():
        assert torch.equal(graph(*copies), loss)
    torch.testing.assert_close(copies, [tensor.detach() for tensor in inputs], rtol=0, atol=0)


def test_user_metrics_are_part_of_the_graph() -> None:
    spec, batch = started(MLP, SGD)
    metrics = RunningMetrics(CPU, {"spread": lambda loss, predictions, targets: predictions.std()})
    spec = StepSpec(**{**vars(spec), "metrics": metrics})
    wanted = spec.model(batch[0]).std().detach()
    run_graph(trace_step(spec, batch), batch)
    torch.testing.assert_close(metrics.totals[4], wanted)


OUTSIDE = nn.Parameter(torch.ones(3, dtype=torch.float64))


def branching(model: nn.Module, batch: Any) -> Tensor:
    predictions = model(batch[0])
    return predictions.sum() if predictions.sum() > 0 else -predictions.sum()


def outside(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) * OUTSIDE).sum()


def hooked_parameter(spec: StepSpec) -> StepSpec:
    next(spec.model.parameters()).register_hook(lambda gradient: gradient)
    return spec


def shared_memory(spec: StepSpec) -> StepSpec:
    first, second = list(spec.model.parameters())[1::2]
    second.data = first.data[:3]
    return spec


def scaled_product(model: nn.Module, batch: Any) -> Tensor:
    return torch.addmm(torch.ones(3), batch[0], torch.ones(4, 3), alpha=0.5).sum() + model(batch[0]).sum()


def holding_a_buffer(spec: StepSpec) -> StepSpec:
    norm = nn.BatchNorm1d(3)
    model = nn.Sequential(spec.model, norm)
    mean = norm.running_mean
    assert mean is not None
    metrics = RunningMetrics(CPU, {"mean": lambda loss, predictions, targets: mean.norm()})
    return StepSpec(**{**vars(spec), "model": model, "metrics": metrics})


def test_a_metric_may_read_a_buffer_of_the_model_directly() -> None:
    found, batch = with_started(holding_a_buffer)
    wanted, _ = with_started(holding_a_buffer)
    eager = EagerEngine(wanted, ASKED)
    for engine in (eager, EagerEngine(found, ASKED)):
        engine.step(batch)
    traced = trace_step(found, batch)
    for other in batches(MLP, 3):
        torch.testing.assert_close(run_graph(traced, other), eager.step(other))
    assert found.metrics.totals[4] > 0
    assert_same(found, wanted)


def sparse_buffer(spec: StepSpec) -> StepSpec:
    spec.model.register_buffer("adjacency", torch.eye(3).to_sparse())
    return spec


MATRIX = torch.eye(5, dtype=torch.float64).to_sparse()


def by_a_sparse_matrix(model: nn.Module, batch: Any) -> Tensor:
    return torch.sparse.mm(MATRIX, model(batch[0])).sum()


def raising(model: nn.Module, batch: Any) -> Tensor:
    raise LookupError("no such thing")


class Parallel(nn.parallel.DistributedDataParallel):
    """As the real one, without the processes that it needs."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return self.module(*inputs, **kwargs)


def in_parallel(spec: StepSpec) -> StepSpec:
    return StepSpec(**{**vars(spec), "model": Parallel(spec.model)})


REFUSED: dict[str, tuple[Callable[[], tuple[StepSpec, Any]], str]] = {
    "a branch on a value": (
        lambda: with_started(lambda spec: with_forward(spec, branching)),
        r"reads the value of a tensor .* on the host .*'return predictions.sum\(\) if .*' in test_trace.py:",
    ),
    "a product with a factor": (lambda: with_started(lambda spec: with_forward(spec, scaled_product)), "167313"),
    "a parameter from outside": (
        lambda: with_started(lambda spec: with_forward(spec, outside)),
        "needs the gradient of",
    ),
    "a gradient hook": (lambda: with_started(hooked_parameter), "gradient hooks"),
    "shared memory": (lambda: with_started(shared_memory), "share memory"),
    "a sparse buffer": (lambda: with_started(sparse_buffer), "'adjacency' has the layout torch.sparse_coo"),
    "a sparse matrix": (
        lambda: with_started(lambda spec: with_forward(spec, by_a_sparse_matrix)),
        "reads a sparse tensor.*'return torch.sparse.mm.*' in test_trace.py:",
    ),
    "an error of forward": (
        lambda: with_started(lambda spec: with_forward(spec, raising)),
        r"forward raises LookupError\('no such thing'\): 'raise LookupError.*' in test_trace.py:",
    ),
    "several processes": (lambda: with_started(in_parallel), "DistributedDataParallel"),
    "an object in the batch": (
        lambda: (started(MLP, SGD)[0], (object(), torch.zeros(1))),
        "neither a tensor nor a plain",
    ),
}


def with_started(change: Callable[[StepSpec], StepSpec]) -> tuple[StepSpec, Any]:
    spec, batch = started(MLP, SGD)
    return change(spec), batch


def test_where_the_optimizer_has_no_state_yet_its_step_is_not_recorded() -> None:
    why = trace_step(make(MLP, ADAM), batches(MLP, 1)[0]).why_eager
    assert why is not None
    assert "run one step eagerly" in why


@pytest.mark.parametrize("where", ["StepState", "use_kernels", "prepare_for_inductor", "Capture"])
def test_an_error_anywhere_in_a_trace_is_an_engine_error(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that `auto` trains on."""

    def fails(*_: Any) -> None:
        raise ZeroDivisionError("torch was not made for this")

    spec, batch = started(MLP, SGD)
    monkeypatch.setattr(trace_module, where, fails)
    with pytest.raises(EngineError, match="ZeroDivisionError: torch was not"):
        trace_step(spec, batch)


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_trace_would_get_wrong_is_refused_and_leaves_no_trace(name: str) -> None:
    build, reason = REFUSED[name]
    spec, batch = build()
    before = copy.deepcopy(everything(spec))
    groups = [dict(group) for group in spec.optimizer.param_groups]
    parameters = list(spec.model.parameters())
    random_state = torch.get_rng_state()
    with pytest.raises(EngineError, match=reason):
        trace_step(spec, batch)
    torch.testing.assert_close(everything(spec), before, rtol=0, atol=0)
    assert groups == spec.optimizer.param_groups
    assert all(a is b for a, b in zip(parameters, spec.model.parameters(), strict=True))
    assert torch.equal(random_state, torch.get_rng_state())
    assert not torch.compiler.is_compiling()
    assert torch.backends.mkldnn.enabled
