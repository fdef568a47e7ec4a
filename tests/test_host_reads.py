"""The counter sees every kind of read, and a step makes none."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from fasttrain import FastLoop, resident
from fasttrain.reference import train_epoch
from tests.host_reads import HostReads

READS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "bool": lambda x: bool(x[0] > 0),
    "float": lambda x: float(x[0]),
    "int": lambda x: int(x[0]),
    "str": lambda x: str(x),
    "format": lambda x: f"{x[0]:.3f}",
    "nonzero": lambda x: x.nonzero(),
    "boolean index": lambda x: x[x > 0],
    "if": lambda x: 1 if x[0] > 0 else 0,
    "asarray": lambda x: np.asarray(x),
    "torch.equal": lambda x: torch.equal(x, x),
    "from C++": lambda x: torch.arange(3).repeat_interleave(torch.tensor([1, 2, 3])) if x[0].is_nonzero() else None,
}


@pytest.mark.parametrize("kind", READS)
def test_the_counter_sees(kind: str) -> None:
    x = torch.ones(3)
    with HostReads() as reads:
        READS[kind](x)
    assert reads.count >= 1


def test_the_counter_passes_what_waits_for_nothing() -> None:
    x = torch.ones(3, requires_grad=True)
    with HostReads() as reads:
        (x.detach().clone().to(torch.float64) * 2).sum().add_(1)
        (x * 2).sum().backward()
    assert reads.count == 0


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Dropout(0.1), nn.Linear(6, 3))


def data(rows: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 8, generator=generator), torch.randint(0, 3, (rows,), generator=generator)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0, "clip_value": 0.5}, {"accumulate": 2}])
def test_a_step_makes_no_host_read(optimizer: type[torch.optim.Optimizer], options: dict[str, float]) -> None:
    model = mlp()
    loop = FastLoop(model, optimizer(model.parameters(), lr=0.01), loss=nn.CrossEntropyLoss(), **options)  # pyright: ignore
    batches = list(resident(*data(), batch_size=8, device="cpu"))
    loop.train(batches)  # the first batch of the first epoch is looked at
    during: list[int] = []
    with HostReads() as reads:
        loop.train(batches, watch=lambda *_: during.append(reads.count))
    assert during == [0] * 8


def test_watching_the_running_metrics_makes_no_host_read() -> None:
    model = mlp()
    loop = FastLoop(model, torch.optim.SGD(model.parameters(), lr=0.01), loss=nn.CrossEntropyLoss())
    batches = resident(*data(), batch_size=8, device="cpu")
    loop.train(batches)
    seen: list[object] = []
    during: list[int] = []

    def watch(_batches: int, _samples: int, _seconds: float, metrics: object) -> None:
        seen.append(metrics.read_late())  # pyright: ignore
        during.append(reads.count)

    with HostReads() as reads:
        loop.train(batches, watch=watch)
    assert during == [0] * 8
    assert seen[0] is None
    assert all(readout is not None for readout in seen[1:])


def test_the_textbook_reads_twice_a_step() -> None:
    x, y = data()
    model = mlp()
    batches = list(zip(x.split(8), y.split(8), strict=True))
    with HostReads() as reads:
        train_epoch(model, batches, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.01))
    assert reads.count >= 2 * len(batches)
