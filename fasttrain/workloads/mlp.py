"""The mlp job: a network so small that nearly all of a step is Python and the launching of operators."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import TensorDataset

from fasttrain.workloads.common import SEED, seeded
from fasttrain.workloads.tensor_job import TensorJob

__all__ = ["mlp_job"]

NUM_ROWS = 20_000
WIDTHS = (64, 32, 10)
NOISE = 2.0
"""Of the labels' scores, whose own standard deviation is 8 (64 inputs of variance 1)."""


def mlp_job(device: torch.device, num_rows: int = NUM_ROWS) -> TensorJob:
    """Made-up rows that a linear map with some noise has labelled, and a network of one hidden layer to learn them.

    Args:
        device: where it trains.
        num_rows: how many rows to make.
    """
    with seeded(SEED):
        inputs = torch.randn(num_rows, WIDTHS[0])
        scores = inputs @ torch.randn(WIDTHS[0], WIDTHS[-1])
        targets = (scores + NOISE * torch.randn_like(scores)).argmax(1)
    return TensorJob(
        name="mlp",
        device=device,
        inputs=inputs,
        targets=targets,
        network=_network,
        dataset=lambda: TensorDataset(inputs, targets),
        batch_size=128,
        facts={
            "data": f"normal rows, labelled by a noisy linear map (seed {SEED})",
            "network": f"{'-'.join(map(str, WIDTHS))}, ReLU",
        },
    )


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTHS[0], WIDTHS[1]), nn.ReLU(), nn.Linear(WIDTHS[1], WIDTHS[2]))
