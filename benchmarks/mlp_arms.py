"""A small network on made-up rows, and the arms that train it: same rows, same weights, same order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.arms import BATCH_SIZE, LEARNING_RATE, SEED, count, fast_arms, running_means
from benchmarks.harness import Arm
from fasttrain import FastLoop, resident
from fasttrain.data.resident import ResidentBatches, epoch_order

NUM_ROWS = 20_000
WIDTHS = (64, 32, 10)


@dataclass(frozen=True, kw_only=True, eq=False)
class MlpJob:
    """Rows that a linear map with some noise has labelled, and a network to learn them.

    Attributes:
        inputs: [rows, 64] float32.
        targets: [rows] int64, below 10.
        weights: where every arm starts from.
        device: where every arm trains.
    """

    inputs: Tensor
    targets: Tensor
    weights: dict[str, Tensor]
    device: torch.device

    @classmethod
    def draw(cls, device: torch.device, num_rows: int = NUM_ROWS) -> MlpJob:
        """Draws rows and weights, the same ones each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            inputs = torch.randn(num_rows, WIDTHS[0])
            scores = inputs @ torch.randn(WIDTHS[0], WIDTHS[-1])
            targets = (scores + 2.0 * torch.randn_like(scores)).argmax(1)
            weights = _network().state_dict()
        return cls(inputs=inputs.to(device), targets=targets.to(device), weights=weights, device=device)

    def order(self, epoch: int) -> np.ndarray:
        """See `Job.order`."""
        num_rows = len(self.inputs)
        return epoch_order(num_rows, SEED, epoch)[: num_rows - num_rows % BATCH_SIZE]

    def model(self) -> nn.Module:
        """The network at the job's weights."""
        network = _network()
        network.load_state_dict(self.weights)
        return network.to(self.device)

    def textbook_model(self) -> tuple[nn.Module, torch.optim.Optimizer, nn.Module]:
        """See `Job.textbook_model`."""
        model = self.model()
        return model, torch.optim.Adam(model.parameters(), lr=LEARNING_RATE), nn.CrossEntropyLoss()

    def textbook_batches(self, order: list[int]) -> DataLoader[Any]:
        """See `Job.textbook_batches`."""
        return DataLoader(TensorDataset(self.inputs, self.targets), BATCH_SIZE, sampler=order, drop_last=True)

    def loop(self, engine: str) -> FastLoop:
        """`FastLoop` at the job's weights; raises `EngineError` where the engine cannot run."""
        model, optimizer, loss = self.textbook_model()
        return FastLoop(model, optimizer, loss=loss, engine=engine)

    def resident_batches(self) -> ResidentBatches:
        """The rows as resident batches."""
        return resident(self.inputs, self.targets, batch_size=BATCH_SIZE, device=self.device, seed=SEED)

    def describe(self) -> dict[str, Any]:
        """What a record tells of the job."""
        return {
            "data": "normal rows, labelled by a noisy linear map",
            "train_rows": len(self.inputs),
            "network": f"{'-'.join(map(str, WIDTHS))}, ReLU",
            "loss": "cross-entropy",
            "batch_size": BATCH_SIZE,
            "optimizer": f"Adam, learning rate {LEARNING_RATE:g}",
            "precision": "fp32",
        }


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTHS[0], WIDTHS[1]), nn.ReLU(), nn.Linear(WIDTHS[1], WIDTHS[2]))


class SliceArm:
    """What a careful engineer writes by hand: tensors shuffled and sliced, fused Adam, nothing read on the way."""

    name = "tuned by hand"
    compile_s: float | None = None

    def __init__(self, job: MlpJob, *, threads: int) -> None:
        self.threads = threads
        self.description = f"tensors sliced without a loader; fused Adam; nothing read; {count(threads, 'thread')}"
        self._job = job
        self._epoch = 0
        self._model = job.model()
        self._optimizer = torch.optim.Adam(self._model.parameters(), lr=LEARNING_RATE, fused=True)

    def losses(self, num_batches: int) -> list[float]:
        """See `Arm.losses`."""
        return running_means(self._train(num_batches)[0].tolist())

    def run(self) -> int:
        """See `Arm.run`."""
        losses, correct = self._train(None)
        torch.stack([losses.mean(), correct]).tolist()  # HOST READ: once a pass, its figures
        return len(losses) * BATCH_SIZE

    def _train(self, num_batches: int | None) -> tuple[Tensor, Tensor]:
        order = torch.from_numpy(self._job.order(self._epoch)).to(self._job.device)
        self._epoch += 1
        inputs, targets = self._job.inputs[order].split(BATCH_SIZE), self._job.targets[order].split(BATCH_SIZE)
        losses: list[Tensor] = []
        correct = torch.zeros((), device=self._job.device)
        for x, y in list(zip(inputs, targets, strict=True))[:num_batches]:
            logits = self._model(x)
            loss = F.cross_entropy(logits, y)
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            correct += (logits.detach().argmax(1) == y).sum()
        return torch.stack(losses), correct


def mlp_arms(job: MlpJob, threads: int) -> dict[str, Callable[[], Arm]]:
    """By name, what makes the loop tuned by hand and each arm of `FastLoop`."""
    return {SliceArm.name: lambda: SliceArm(job, threads=threads), **fast_arms(job.loop, job.resident_batches, threads)}
