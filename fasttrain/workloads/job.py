"""What every arm of a benchmark trains: the same data, the same weights and the same order of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fasttrain.data.resident import ResidentBatches
from fasttrain.errors import ConfigError
from fasttrain.workloads.chars import chars_job
from fasttrain.workloads.cnn import cnn_job
from fasttrain.workloads.mlp import mlp_job
from fasttrain.workloads.review_job import review_job

__all__ = ["JOBS", "Job", "load_job"]


class Job(Protocol):
    """A training job in two forms, the textbook's and the fast one, which must give the same numbers.

    Two jobs of one name on one kind of device are equal in all but the objects: weights, data and order are pure
    functions of the job's name and of the data that `describe` names.
    """

    @property
    def name(self) -> str:
        """Its name in `JOBS`."""
        ...

    @property
    def device(self) -> torch.device:
        """Where every arm trains."""
        ...

    @property
    def batch_size(self) -> int:
        """Rows in a batch."""
        ...

    @property
    def num_rows(self) -> int:
        """Rows (samples) of the train split."""
        ...

    @property
    def tolerance(self) -> float:
        """How far, relatively, an arm's running loss in fp32 may be from the textbook's."""
        ...

    def order(self, epoch: int) -> np.ndarray:
        """Row numbers in the order of an epoch (from 0), the short last batch left out: [rows used], int64."""
        ...

    def model(self) -> nn.Module:
        """A fast model at the job's weights, on the device."""
        ...

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The job's optimizer over a model's parameters, `fused` and `foreach` left open."""
        ...

    def forward(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, predictions and targets of a batch of `batches`, as `FastLoop` takes them."""
        ...

    def batches(self) -> ResidentBatches:
        """The rows on the device, in the job's order, before its first epoch."""
        ...

    def textbook_model(self) -> tuple[nn.Module, torch.optim.Optimizer, nn.Module]:
        """The textbook's model at the same weights, on the device; its optimizer and its loss."""
        ...

    def textbook_batches(self, order: Iterable[int]) -> DataLoader[Any]:
        """The textbook's Dataset in a DataLoader that takes the rows in this order, for `reference.train_epoch`."""
        ...

    def describe(self) -> dict[str, Any]:
        """What must agree for two results to be comparable: plain JSON."""
        ...


JOBS: dict[str, Callable[[torch.device], Job]] = {
    "reviews": review_job,
    "mlp": mlp_job,
    "cnn": cnn_job,
    "chars": chars_job,
}


def load_job(name: str, device: torch.device) -> Job:
    """Makes a job by its name.

    Raises:
        ConfigError: there is no job of this name.
        DataError: the job's data is not there.
    """
    if name not in JOBS:
        raise ConfigError(f"workload {name!r}: use one of {', '.join(JOBS)}")
    return JOBS[name](device)
