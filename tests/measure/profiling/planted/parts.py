"""What the planted loops share: a model that is large enough for a step to be more than overhead."""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fasttrain.measure.profiling.profiler import Profiler

ROWS, FEATURES, CLASSES, BATCH = 1024, 64, 10, 128

loss_func = nn.CrossEntropyLoss()


class Parts:
    """Model, optimizer and batches, the same ones each time."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(FEATURES, 512), nn.ReLU(), nn.Linear(512, CLASSES))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.x, self.y = torch.randn(ROWS, FEATURES), torch.randint(0, CLASSES, (ROWS,))

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.x.split(BATCH), self.y.split(BATCH), strict=True))

    def train_on(self, x: Tensor, y: Tensor) -> Tensor:
        """A clean step."""
        return self.attached_loss(x, y).detach()

    def attached_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The same, but the loss still has its graph."""
        self.optimizer.zero_grad()
        loss = loss_func(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        return loss


def endless(batches, prof: Profiler):
    """Epoch after epoch, until the profile is complete."""
    while not prof.is_done:
        for batch in batches:
            yield batch
            prof.step()
            if prof.is_done:
                return


class Rows(Dataset):
    """Rows that are in memory."""

    def __init__(self, parts: Parts) -> None:
        self.x, self.y = parts.x, parts.y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


def loader(rows: Dataset) -> DataLoader:
    return DataLoader(rows, BATCH)
