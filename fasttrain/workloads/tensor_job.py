"""A classifier over tensors: what the jobs have in common whose rows are tensors of one shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fasttrain.data.resident import ResidentBatches, resident
from fasttrain.workloads.common import SEED, seeded, whole_batches

__all__ = ["TensorJob"]

LEARNING_RATE = 1e-3


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorJob:
    """Rows of inputs and class indices, and a network that learns them by cross-entropy; see `Job`.

    Attributes:
        name: see `Job.name`.
        device: where every arm trains.
        inputs: [rows, ...], on the host.
        targets: class indices, [rows] or [rows, positions], int64, on the host.
        network: makes the network, its weights drawn from torch's generator; its logits are [batch, classes] or
            [batch, classes, positions].
        dataset: makes the textbook's dataset: pairs of one row's input and target.
        batch_size: see `Job.batch_size`.
        optimizer_kind: built over the parameters at `LEARNING_RATE`.
        memory_format: of the fast model's convolutions; the textbook's stay contiguous.
        tolerance: see `Job.tolerance`.
        facts: what `describe` tells besides: of the data and of the network.
    """

    name: str
    device: torch.device
    inputs: Tensor
    targets: Tensor
    network: Callable[[], nn.Module]
    dataset: Callable[[], Dataset[Any]]
    batch_size: int
    optimizer_kind: type[torch.optim.Adam] = torch.optim.Adam
    memory_format: torch.memory_format = torch.contiguous_format
    tolerance: float = 1e-5
    facts: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def num_rows(self) -> int:
        """See `Job.num_rows`."""
        return len(self.targets)

    @property
    def weights(self) -> dict[str, Tensor]:
        """Where every arm starts from, by the names of the network's state, on the host."""
        return self._drawn().state_dict()

    def order(self, epoch: int) -> np.ndarray:
        """See `Job.order`."""
        return whole_batches(self.num_rows, self.batch_size, epoch)

    def model(self) -> nn.Module:
        """See `Job.model`."""
        model = self._drawn().to(self.device)
        return model.to(memory_format=self.memory_format)  # pyright: ignore[reportCallIssue]

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """See `Job.optimizer`."""
        return self.optimizer_kind(model.parameters(), lr=LEARNING_RATE)

    def forward(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """See `Job.forward`; batches are pairs of inputs and targets."""
        inputs, targets = batch
        logits = model(inputs)
        return F.cross_entropy(logits, targets), logits, targets

    def batches(self) -> ResidentBatches:
        """See `Job.batches`."""
        return resident(self.inputs, self.targets, batch_size=self.batch_size, device=self.device, seed=SEED)

    def textbook_model(self) -> tuple[nn.Module, torch.optim.Optimizer, nn.Module]:
        """See `Job.textbook_model`."""
        model = self._drawn().to(self.device)
        return model, self.optimizer(model), nn.CrossEntropyLoss()

    def textbook_batches(self, order: Iterable[int]) -> DataLoader[Any]:
        """See `Job.textbook_batches`."""
        return DataLoader(self.dataset(), self.batch_size, sampler=order, drop_last=True)

    def describe(self) -> dict[str, Any]:
        """See `Job.describe`."""
        return {
            **self.facts,
            "train_rows": self.num_rows,
            "input_shape": list(self.inputs.shape[1:]),
            "loss": "cross-entropy",
            "batch_size": self.batch_size,
            "optimizer": f"{self.optimizer_kind.__name__}, learning rate {LEARNING_RATE:g}",
            "precision": "fp32",
        }

    def _drawn(self) -> nn.Module:
        with seeded(SEED):
            return self.network()
