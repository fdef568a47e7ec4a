"""Small models of every kind, optimizers of every kind, and steps made of them: for the tests of the traced step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.data.ragged import Ragged
from fasttrain.device import Choice
from fasttrain.metrics import RunningMetrics
from fasttrain.step.eager import EagerEngine
from fasttrain.step.spec import StepSpec, normalise_forward

ASKED = Choice("eager", "asked for")

CPU = torch.device("cpu")
NUM_STEPS = 20


class Bags(nn.Module):
    """A linear layer on one-hot rows, computed from the rows' ids."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(9, 1)

    def forward(self, rows: Ragged) -> Tensor:
        values = self.fc1.weight.view(-1).index_select(0, rows.values)
        return torch.segment_reduce(values, "sum", offsets=rows.offsets, unsafe=True) + self.fc1.bias


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
    return Ragged.of_lengths(torch.randint(0, 9, (int(lengths.sum()),), generator=generator).int(), lengths)


@dataclass(frozen=True)
class Case:
    """A model, what its batches are made of and its loss."""

    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Any]
    targets: Callable[[torch.Generator], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]


def bce(predictions: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(predictions, targets.to(predictions.dtype))


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


def make(
    case: Case,
    optimizer: tuple[type[optim.Optimizer], dict[str, Any]],
    make_scaler: Callable[[], torch.amp.GradScaler | None] = lambda: None,
    seed: int = 7,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> StepSpec:
    """A step over a fresh, equally initialised model; its optimizer has two groups, the second at half the rate."""
    torch.manual_seed(seed)
    model = case.build().to(dtype)
    kind, kwargs = optimizer
    parameters = list(model.parameters())
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": kwargs["lr"] / 2}]
    defaults: dict[str, Any] = {
        "precision": "fp32",
        "accumulate": 1,
        "clip_norm": None,
        "clip_value": None,
    }
    return StepSpec(
        model=model,
        optimizer=kind(groups, **kwargs),
        forward=normalise_forward(None, case.loss),
        device=CPU,
        metrics=RunningMetrics(CPU),
        scaler=make_scaler(),
        **(defaults | options),
    )


def batches(case: Case, count: int = NUM_STEPS + 1, seed: int = 3) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [(case.inputs(generator), case.targets(generator)) for _ in range(count)]


def started(
    case: Case, optimizer: tuple[type[optim.Optimizer], dict[str, Any]], **options: Any
) -> tuple[StepSpec, Any]:
    """A step whose optimizer has made its state, and a batch."""
    spec = make(case, optimizer, **options)
    [batch] = batches(case, 1)
    EagerEngine(spec, ASKED).step(batch)
    return spec, batch


def with_forward(spec: StepSpec, forward: Callable[[nn.Module, Any], Any]) -> StepSpec:
    """The step with another forward."""
    return StepSpec(**{**vars(spec), "forward": normalise_forward(forward, None)})


def everything(spec: StepSpec) -> dict[str, Any]:
    """All that a step changes."""
    return {"model": spec.model.state_dict(), "optimizer": spec.optimizer.state_dict(), "metrics": spec.metrics.totals}


def assert_same(found: StepSpec, wanted: StepSpec, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(everything(found), everything(wanted), rtol=rtol, atol=rtol * 1e-2)
