"""The traced graph, uncompiled and in double precision, against the eager loop: every optimizer, every model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.data.ragged import Ragged
from fasttrain.device import Choice
from fasttrain.errors import EngineError
from fasttrain.metrics import RunningMetrics
from fasttrain.step.eager import EagerEngine
from fasttrain.step.spec import StepSpec, normalise_forward
from fasttrain.step.trace import Mismatch, TracedStep, trace_step

ASKED = Choice("eager", "asked for")

CPU = torch.device("cpu")
NUM_STEPS = 20


@pytest.fixture(autouse=True)
def _small_and_double() -> Iterator[None]:
    """Double precision, and one thread: these models are far too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


class Bags(nn.Module):
    """A linear layer on one-hot rows, computed from the rows' ids."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(9, 1)

    def forward(self, rows: Ragged) -> Tensor:
        values = self.fc1.weight.view(-1).index_select(0, rows.values)
        return torch.segment_reduce(values, "sum", lengths=rows.lengths, unsafe=True) + self.fc1.bias


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.cell = kind(3, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.cell(self.embedding(ids))[0][:, -1])


class Transformer(nn.Module):
    """One layer of attention; input and output embeddings are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.qkv = nn.Linear(4, 12)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        query, key, value = self.qkv(self.norm(hidden)).unflatten(-1, (2, 6)).transpose(1, 2).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.head(hidden + mixed.transpose(1, 2).flatten(-2)).transpose(1, 2)


class ByShape(nn.Module):
    """Python control flow on shapes, which a trace may fix."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[0] - 3):
            x = x * 1.1
        return self.fc(x)


class PartlyUsed(nn.Module):
    """Has a layer that gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.unused = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Averaging(nn.Module):
    """Replaces a buffer in every forward instead of changing it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.fc(x - self.mean)


def numbers(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(*shape, generator=generator)


def indices(high: int, *shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randint(0, high, shape, generator=generator)


def bags(generator: torch.Generator) -> Ragged:
    lengths = torch.randint(1, 6, (5,), generator=generator)
    return Ragged(torch.randint(0, 9, (int(lengths.sum()),), generator=generator).int(), lengths)


@dataclass(frozen=True)
class Case:
    """A model, what its batches are made of and its loss."""

    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Any]
    targets: Callable[[torch.Generator], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]


def bce(predictions: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(predictions, targets.double())


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def frozen_mlp() -> nn.Module:
    model = mlp()
    model[0].requires_grad_(False)
    return model


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))


def cnn_channels_last() -> nn.Module:
    return cnn().to(memory_format=torch.channels_last)


def images_channels_last(generator: torch.Generator) -> Tensor:
    return torch.randn(5, 1, 4, 4, generator=generator).to(memory_format=torch.channels_last)


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.4), nn.Tanh(), nn.Linear(5, 3))


CASES = {
    "sparse": Case(Bags, bags, indices(2, 5), bce),
    "mlp": Case(mlp, numbers(5, 4), indices(3, 5), F.cross_entropy),
    "frozen": Case(frozen_mlp, numbers(5, 4), indices(3, 5), F.cross_entropy),
    "shapes": Case(ByShape, numbers(5, 4), indices(3, 5), F.cross_entropy),
    "dropout": Case(with_dropout, numbers(5, 4), indices(3, 5), F.cross_entropy),
    "cnn": Case(cnn, numbers(5, 1, 4, 4), indices(3, 5), F.cross_entropy),
    "channels-last": Case(cnn_channels_last, images_channels_last, indices(3, 5), F.cross_entropy),
    "unused": Case(PartlyUsed, numbers(5, 4), indices(3, 5), F.cross_entropy),
    "averaging": Case(Averaging, numbers(5, 4), indices(3, 5), F.cross_entropy),
    "gru": Case(lambda: Recurrent(nn.GRU), indices(7, 5, 3), indices(3, 5), F.cross_entropy),
    "lstm": Case(lambda: Recurrent(nn.LSTM), indices(7, 5, 3), indices(3, 5), F.cross_entropy),
    "transformer": Case(Transformer, indices(7, 2, 3), indices(7, 2, 3), F.cross_entropy),
}

optim = torch.optim
OPTIMIZERS: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
    "sgd": (optim.SGD, {"lr": 0.05}),
    "sgd-momentum": (optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    "sgd-nesterov": (optim.SGD, {"lr": 0.005, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "adam": (optim.Adam, {"lr": 0.01}),
    "adam-amsgrad": (optim.Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.01}),
    "adamw": (optim.AdamW, {"lr": 0.01, "maximize": True}),
    "rmsprop": (optim.RMSprop, {"lr": 0.01}),
    "rmsprop-centered": (optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.9, "weight_decay": 0.01}),
    "adagrad": (optim.Adagrad, {"lr": 0.05, "lr_decay": 0.01, "weight_decay": 0.01}),
    "adadelta": (optim.Adadelta, {"lr": 0.5, "weight_decay": 0.01}),
    "nadam": (optim.NAdam, {"lr": 0.01, "weight_decay": 0.01, "decoupled_weight_decay": True}),
    "radam": (optim.RAdam, {"lr": 0.01, "weight_decay": 0.01}),
    "adamax": (optim.Adamax, {"lr": 0.01, "weight_decay": 0.01}),
    "asgd": (optim.ASGD, {"lr": 0.01, "t0": 5, "weight_decay": 0.01}),
    "rprop": (optim.Rprop, {"lr": 0.01}),
}


def make(case: Case, optimizer: tuple[type[optim.Optimizer], dict[str, Any]], **options: Any) -> StepSpec:
    """A step over a fresh, equally initialised model; its optimizer has two groups, the second at half the rate."""
    torch.manual_seed(7)
    model = case.build()
    kind, kwargs = optimizer
    parameters = list(model.parameters())
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": kwargs["lr"] / 2}]
    defaults: dict[str, Any] = {
        "precision": "fp32",
        "accumulate": 1,
        "clip_norm": None,
        "clip_value": None,
        "scaler": None,
    }
    return StepSpec(
        model=model,
        optimizer=kind(groups, **kwargs),
        forward=normalise_forward(None, case.loss),
        device=CPU,
        metrics=RunningMetrics(CPU),
        **(defaults | options),
    )


def batches(case: Case, count: int = NUM_STEPS + 1) -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    return [(case.inputs(generator), case.targets(generator)) for _ in range(count)]


def run_graph(traced: TracedStep, batch: Any) -> Tensor:
    inputs = traced.inputs(batch)
    assert not isinstance(inputs, Mismatch), inputs.reason
    return traced.run(inputs)


def everything(spec: StepSpec) -> dict[str, Any]:
    """All that a step changes."""
    return {"model": spec.model.state_dict(), "optimizer": spec.optimizer.state_dict(), "metrics": spec.metrics.totals}


def assert_same(found: StepSpec, wanted: StepSpec, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(everything(found), everything(wanted), rtol=rtol, atol=rtol * 1e-2)


def steps_agree(case: Case, optimizer: tuple[type[optim.Optimizer], dict[str, Any]], **options: Any) -> None:
    """The first step eagerly in both, then the graph in one and the eager engine in the other."""
    data = batches(case)
    traced_spec, eager_spec = make(case, optimizer, **options), make(case, optimizer, **options)
    eager, starter = EagerEngine(eager_spec, ASKED), EagerEngine(traced_spec, ASKED)
    torch.manual_seed(11)
    eager.step(data[0])
    torch.manual_seed(11)
    starter.step(data[0])
    random_state = torch.get_rng_state()
    traced = trace_step(traced_spec, data[0])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same(traced_spec, eager_spec)
    for batch in data[1:]:
        torch.set_rng_state(random_state)
        wanted = eager.step(batch)
        after = torch.get_rng_state()
        torch.set_rng_state(random_state)
        found = run_graph(traced, batch)
        assert torch.equal(torch.get_rng_state(), after), "the graph draws other random numbers"
        random_state = after
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert_same(traced_spec, eager_spec)
    assert all(parameter.grad is None for parameter in traced_spec.model.parameters())


EVERY_OPTIMIZER_MEETS = ("sparse", "mlp", "dropout", "cnn", "gru", "transformer")
PAIRS = [
    (optimizer, model)
    for optimizer in OPTIMIZERS
    for model in CASES
    if model in EVERY_OPTIMIZER_MEETS or optimizer in ("sgd-momentum", "adam")
]


@pytest.mark.parametrize(("optimizer", "model"), PAIRS)
def test_the_graph_gives_eagers_numbers(optimizer: str, model: str) -> None:
    steps_agree(CASES[model], OPTIMIZERS[optimizer])


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
    assert any("bfloat16" in str(node.args) + str(node.kwargs) for node in traced.graph.graph.nodes)
    for batch in data[1:]:
        torch.testing.assert_close(run_graph(traced, batch), eager.step(batch), rtol=1e-3, atol=0)


def started(
    case: Case, optimizer: tuple[type[optim.Optimizer], dict[str, Any]], **options: Any
) -> tuple[StepSpec, Any]:
    """A step whose optimizer has made its state, and a batch."""
    spec = make(case, optimizer, **options)
    [batch] = batches(case, 1)
    EagerEngine(spec, ASKED).step(batch)
    return spec, batch


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
    saved["param_groups"][0]["betas"] = (0.5, 0.9)
    spec.optimizer.load_state_dict(saved)
    assert not traced.rebind()
    assert isinstance(traced.inputs(batch), Mismatch)


def test_where_nothing_was_replaced_there_is_nothing_to_take_up() -> None:
    spec, batch = started(MLP, ADAM)
    assert not trace_step(spec, batch).rebind()


def with_forward(spec: StepSpec, forward: Callable[[nn.Module, Any], Any]) -> StepSpec:
    return StepSpec(**{**vars(spec), "forward": normalise_forward(forward, None)})


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
    graph = pickle.loads(pickle.dumps(traced.graph))
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
    torch.testing.assert_close(metrics.totals[2], wanted)


class Counting(optim.SGD):
    """Keeps a count of its steps as a Python number."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for state in self.state.values():
            state["count"] = state.get("count", 0) + 1


class CountingInGroup(optim.SGD):
    """Keeps a count of its steps in its parameter groups, as some optimizers from elsewhere do."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1


SGD_OPTIONS = SGD[1]
OUTSIDE = nn.Parameter(torch.ones(3, dtype=torch.float64))


def branching(model: nn.Module, batch: Any) -> Tensor:
    predictions = model(batch[0])
    return predictions.sum() if predictions.sum() > 0 else -predictions.sum()


def outside(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) * OUTSIDE).sum()


def hooked_optimizer(spec: StepSpec) -> StepSpec:
    spec.optimizer.register_step_post_hook(lambda *_: None)
    return spec


def hooked_parameter(spec: StepSpec) -> StepSpec:
    next(spec.model.parameters()).register_hook(lambda gradient: gradient)
    return spec


def shared_memory(spec: StepSpec) -> StepSpec:
    first, second = list(spec.model.parameters())[1::2]
    second.data = first.data[:3]
    return spec


def scaled_product(model: nn.Module, batch: Any) -> Tensor:
    return torch.addmm(torch.ones(3), batch[0], torch.ones(4, 3), alpha=0.5).sum() + model(batch[0]).sum()


REFUSED: dict[str, tuple[Callable[[], tuple[StepSpec, Any]], str]] = {
    "a branch on a value": (lambda: with_started(lambda spec: with_forward(spec, branching)), "cannot be traced"),
    "a product with a factor": (lambda: with_started(lambda spec: with_forward(spec, scaled_product)), "167313"),
    "a parameter from outside": (lambda: with_started(lambda spec: with_forward(spec, outside)), "requires a gradient"),
    "an optimizer hook": (lambda: with_started(hooked_optimizer), "hooks"),
    "a gradient hook": (lambda: with_started(hooked_parameter), "gradient hooks"),
    "shared memory": (lambda: with_started(shared_memory), "share memory"),
    "no state yet": (lambda: (make(MLP, ADAM), batches(MLP, 1)[0]), "run one step eagerly"),
    "a count in the state": (lambda: started(MLP, (Counting, SGD_OPTIONS)), "Python value"),
    "a count in the groups": (lambda: started(MLP, (CountingInGroup, SGD_OPTIONS)), "parameter groups"),
    "accumulation": (lambda: with_started(lambda spec: StepSpec(**{**vars(spec), "accumulate": 2})), "accumulate=2"),
    "an object in the batch": (lambda: (started(MLP, SGD)[0], (object(), torch.zeros(1))), "object"),
}


def with_started(change: Callable[[StepSpec], StepSpec]) -> tuple[StepSpec, Any]:
    spec, batch = started(MLP, SGD)
    return change(spec), batch


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
