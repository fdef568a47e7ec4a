"""The traced graph, uncompiled and in double precision, against the eager loop: every optimizer, every kind of model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.data.ragged import Ragged
from fasttrain.errors import EngineError
from fasttrain.metrics import RunningMetrics
from fasttrain.step.eager import EagerEngine
from fasttrain.step.spec import StepSpec, normalise_forward
from fasttrain.step.trace import Mismatch, TracedStep, trace_step

CPU = torch.device("cpu")
NUM_STEPS = 20


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


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


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.4), nn.Tanh(), nn.Linear(5, 3))


CASES = {
    "sparse": Case(Bags, bags, indices(2, 5), bce),
    "mlp": Case(mlp, numbers(5, 4), indices(3, 5), F.cross_entropy),
    "frozen": Case(frozen_mlp, numbers(5, 4), indices(3, 5), F.cross_entropy),
    "shapes": Case(ByShape, numbers(5, 4), indices(3, 5), F.cross_entropy),
    "dropout": Case(with_dropout, numbers(5, 4), indices(3, 5), F.cross_entropy),
    "cnn": Case(cnn, numbers(5, 1, 4, 4), indices(3, 5), F.cross_entropy),
    "gru": Case(lambda: Recurrent(nn.GRU), indices(7, 5, 3), indices(3, 5), F.cross_entropy),
    "lstm": Case(lambda: Recurrent(nn.LSTM), indices(7, 5, 3), indices(3, 5), F.cross_entropy),
    "transformer": Case(Transformer, indices(7, 2, 3), indices(7, 2, 3), F.cross_entropy),
}

O = torch.optim
OPTIMIZERS: dict[str, tuple[type[O.Optimizer], dict[str, Any]]] = {
    "sgd": (O.SGD, {"lr": 0.05}),
    "sgd-momentum": (O.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    "sgd-nesterov": (O.SGD, {"lr": 0.005, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "adam": (O.Adam, {"lr": 0.01}),
    "adam-amsgrad": (O.Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.01}),
    "adamw": (O.AdamW, {"lr": 0.01, "maximize": True}),
    "rmsprop": (O.RMSprop, {"lr": 0.01}),
    "rmsprop-centered": (O.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.9, "weight_decay": 0.01}),
    "adagrad": (O.Adagrad, {"lr": 0.05, "lr_decay": 0.01, "weight_decay": 0.01}),
    "adadelta": (O.Adadelta, {"lr": 0.5, "weight_decay": 0.01}),
    "nadam": (O.NAdam, {"lr": 0.01, "weight_decay": 0.01, "decoupled_weight_decay": True}),
    "radam": (O.RAdam, {"lr": 0.01, "weight_decay": 0.01}),
    "adamax": (O.Adamax, {"lr": 0.01, "weight_decay": 0.01}),
    "asgd": (O.ASGD, {"lr": 0.01, "t0": 5, "weight_decay": 0.01}),
    "rprop": (O.Rprop, {"lr": 0.01}),
}


def make(case: Case, optimizer: tuple[type[O.Optimizer], dict[str, Any]], **options: Any) -> StepSpec:
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


def steps_agree(case: Case, optimizer: tuple[type[O.Optimizer], dict[str, Any]], **options: Any) -> None:
    """The first step eagerly in both, then the graph in one and the eager engine in the other."""
    data = batches(case)
    traced_spec, eager_spec = make(case, optimizer, **options), make(case, optimizer, **options)
    eager, starter = EagerEngine(eager_spec), EagerEngine(traced_spec)
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


@pytest.mark.parametrize("model", CASES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_graph_gives_eagers_numbers(optimizer: str, model: str) -> None:
    steps_agree(CASES[model], OPTIMIZERS[optimizer])
