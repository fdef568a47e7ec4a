"""A small training job in single precision, and the eager run that every other way of running it must agree with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.step.train_step import TrainStep

Batch = tuple[Tensor, Tensor]
Change = Callable[[TrainStep], Any]

ROUNDING = 2e-5
"""By how much the numbers of a program may differ from eager's, in single precision."""


def model() -> nn.Module:
    """With dropout, so that random numbers count, and batch norm, so that buffers do."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.ReLU(), nn.Linear(5, 3))


def batches(count: int, rows: int = 8) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(rows, 6, generator=generator), torch.randint(0, 3, (rows,), generator=generator))
        for _ in range(count)
    ]


def train_step(engine: str, **options: Any) -> TrainStep:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
    return TrainStep(net, optimizer, loss=F.cross_entropy, engine=engine, **options)


def started(engine: str, **options: Any) -> TrainStep:
    """With more steps expected than any compiler takes."""
    step = train_step(engine, **options)
    step.expect(10_000_000)
    return step


def everything(step: TrainStep) -> dict[str, Any]:
    """All that a step changes, the running metrics as they are read out and the random generator included."""
    readout = step.metrics.compute()
    return {
        "model": step.spec.model.state_dict(),
        "optimizer": step.spec.optimizer.state_dict(),
        "totals": step.metrics.totals,
        "readout": (readout.loss, readout.accuracy),
        "rng": torch.get_rng_state(),
        "scaler": {} if step.spec.scaler is None else step.spec.scaler.state_dict(),
    }


def run(step: TrainStep, data: Sequence[Batch], changes: dict[int, Change] | None = None) -> list[float]:
    """The losses of a run from a fixed seed; `changes` are made before the steps of these numbers."""
    torch.manual_seed(11)
    losses: list[float] = []
    for number, batch in enumerate(data):
        if changes and number in changes:
            changes[number](step)
        losses.append(step(batch).item())
    step.flush()
    return losses


def assert_as_eager(
    step: TrainStep,
    data: Sequence[Batch],
    changes: dict[int, Change] | None = None,
    *,
    rtol: float = 0.0,
    **options: Any,
) -> list[float]:
    """Runs the job (with these options) both ways and compares all that a step changes; returns the losses."""
    eager = train_step("eager", **options)
    wanted = run(eager, data, changes)
    expected = copy.deepcopy(everything(eager))
    losses = run(step, data, changes)
    torch.testing.assert_close(losses, wanted, rtol=rtol, atol=rtol)
    torch.testing.assert_close(everything(step), expected, rtol=rtol, atol=rtol)
    return losses
