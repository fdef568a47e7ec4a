"""The counter sees every kind of read, and a step makes none."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasttrain import FastLoop, count_host_reads, resident
from fasttrain.measure.host_reads import Read
from fasttrain.measure.profiling.operator_counts import FlopCount
from fasttrain.reference import train_epoch
from fasttrain.step.torch_private import tensor_check

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
    "index": lambda x: [1, 2, 3][x[0].long()],
    "in": lambda x: 1.0 in x,
    "print": lambda x: print(x),  # noqa: T201
    "set by boolean index": lambda x: x.index_put_((x > 0,), torch.zeros(3)),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "one_hot": lambda x: F.one_hot(x.long()),
    "synchronize": lambda x: torch.cpu.synchronize(),
    "from C++": lambda x: torch.arange(3).repeat_interleave(torch.tensor([1, 2, 3])) if x[0].is_nonzero() else None,
}


@pytest.mark.parametrize("kind", READS)
def test_the_counter_sees(kind: str) -> None:
    x = torch.ones(3)
    with count_host_reads() as reads:
        READS[kind](x)
    assert reads.count >= 1
    assert {read.file for read in reads.reads} == {__file__}
    assert reads.reads[0].line == READS[kind].__code__.co_firstlineno


def test_a_read_is_counted_once_with_its_line() -> None:
    x = torch.ones(3)
    line = inspect.currentframe().f_lineno  # pyright: ignore
    with count_host_reads() as reads:
        for _ in range(3):
            str(x)
        x[0].item()
    places = [Read(__file__, line + 3, "str or print", 3), Read(__file__, line + 4, "item", 1)]
    assert reads.reads == places
    assert reads.count == 4


def test_a_read_in_a_backward_pass_is_seen() -> None:
    class Reader(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * grad.sum().item()

    x = torch.ones(3, requires_grad=True)
    with count_host_reads() as reads:
        Reader.apply(x).sum().backward()  # pyright: ignore
    assert [(read.what, read.count) for read in reads.reads] == [("item", 1)]


def test_a_compiled_step_still_runs_while_it_is_counted() -> None:
    """The guards of a program look at dispatch keys, which a dispatch mode around the step would change."""
    x = torch.ones(3)
    differs = tensor_check([x], [frozenset()])
    with count_host_reads():
        assert differs([x]) is None


def test_the_counter_passes_what_waits_for_nothing() -> None:
    x = torch.ones(3, requires_grad=True)
    with count_host_reads() as reads:
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
    with count_host_reads() as reads:
        loop.train(batches, watch=lambda *_: during.append(reads.count))
    assert during == [0] * 8


def test_watching_the_running_metrics_makes_no_host_read() -> None:
    model = mlp()
    loop = FastLoop(model, torch.optim.SGD(model.parameters(), lr=0.01), loss=nn.CrossEntropyLoss())
    batches = list(resident(*data(), batch_size=8, device="cpu"))  # a list: one step a call
    loop.train(batches)
    seen: list[object] = []
    during: list[int] = []

    def watch(_batches: int, _samples: int, _seconds: float, metrics: object) -> None:
        seen.append(metrics.read_late())  # pyright: ignore
        during.append(reads.count)

    with count_host_reads() as reads:
        loop.train(batches, watch=watch)
    assert during == [0] * 8
    assert seen[0] is None
    assert all(readout is not None for readout in seen[1:])


def test_the_textbook_reads_twice_a_step() -> None:
    x, y = data()
    model = mlp()
    batches = list(zip(x.split(8), y.split(8), strict=True))
    with count_host_reads() as reads:
        train_epoch(model, batches, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.01))
    assert reads.count >= 2 * len(batches)


def test_what_is_on_the_cpu_wherever_the_training_runs_is_no_read() -> None:
    x, y = data()
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())  # its default code reads how many steps it has made

    class Rows(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(x)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return x[index], int(y[index])

    with count_host_reads() as reads:
        for inputs, targets in torch.utils.data.DataLoader(Rows(), 8, shuffle=True):
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    assert reads.reads == []


def test_functions_of_torch_compile_run_uncompiled() -> None:
    def halved(x: torch.Tensor) -> torch.Tensor:
        return x / 2 if x.sum().item() else x

    compiled = torch.compile(halved, backend="eager")
    compiled(torch.ones(3))
    with count_host_reads() as reads:
        compiled(torch.ones(3))
    line = halved.__code__.co_firstlineno + 1
    assert reads.reads == [Read(__file__, line, "item", 1)]


@pytest.mark.parametrize("engine", ["textbook", "eager"])
def test_flops_are_those_of_the_matrices(engine: str) -> None:
    batches = [(torch.randn(16, 8), torch.randint(0, 3, (16,)))]
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loop = FastLoop(model, optimizer, loss=nn.CrossEntropyLoss(), engine="eager")
    with FlopCount() as counted:
        if engine == "eager":
            loop.train(batches)
        else:
            train_epoch(model, batches, nn.CrossEntropyLoss(), optimizer)
    forward = 2 * 16 * (8 * 6 + 6 * 3)
    assert counted.flops == 2 * forward + 2 * 16 * 6 * 3  # the inputs need no gradient
    assert "relu" in counted.not_counted
