"""The eager step against the book's: gradients, their zeroing, and optimizers that fused kernels would break."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain import TrainStep

STEPS = 6


class Offset(nn.Module):
    """Its loss holds a parameter of one entry as it is, so that autograd hands the loss's own gradient on to it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(3, 1)
        self.b = nn.Parameter(torch.zeros(1))


def offset_loss(model: Offset, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.mse_loss(model.scale(x).squeeze(1), y) + model.b


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(8, 3, generator=generator), torch.randn(8, generator=generator)) for _ in range(STEPS)]


def made(kind: type[nn.Module] = Offset) -> nn.Module:
    torch.manual_seed(5)
    return kind()


def by_the_book(model: Any, optimizer: torch.optim.Optimizer, forward: Any, **clip: float) -> None:
    for batch in batches():
        optimizer.zero_grad()
        forward(model, batch).sum().backward()
        if "clip_value" in clip:
            nn.utils.clip_grad_value_(model.parameters(), clip["clip_value"])
        if "clip_norm" in clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip["clip_norm"])
        optimizer.step()


def same(model: nn.Module, other: nn.Module) -> None:
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize("clip", [{"clip_value": 0.1}, {"clip_norm": 0.2}])
def test_a_gradient_that_is_changed_in_place_is_the_steps_own(clip: dict[str, float]) -> None:
    ours, theirs = made(), made()
    step = TrainStep(ours, torch.optim.SGD(ours.parameters(), lr=0.1), offset_loss, engine="eager", **clip)  # type: ignore[arg-type]
    for batch in batches():
        step(batch)
    by_the_book(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), offset_loss, **clip)
    same(ours, theirs)


def test_gradients_from_before_a_step_do_not_count() -> None:
    ours, theirs = made(), made()
    step = TrainStep(ours, torch.optim.SGD(ours.parameters(), lr=0.1), offset_loss, engine="eager")  # type: ignore[arg-type]
    for batch in batches():
        offset_loss(ours, batch).sum().backward()  # type: ignore[arg-type]
        step(batch)
    by_the_book(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), offset_loss)
    same(ours, theirs)


def test_a_parameter_that_is_added_later_starts_without_a_gradient() -> None:
    ours, theirs = made(), made()
    optimizers = [torch.optim.SGD([model.b], lr=0.1) for model in (ours, theirs)]  # type: ignore[list-item]
    step = TrainStep(ours, optimizers[0], offset_loss, engine="eager")  # type: ignore[arg-type]
    for batch in batches():
        step(batch)
    by_the_book(theirs, optimizers[1], offset_loss)
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        optimizer.add_param_group({"params": list(model.scale.parameters())})  # type: ignore[union-attr]
    for parameter in theirs.parameters():
        parameter.grad = None
    for batch in batches():
        step(batch)
    by_the_book(theirs, optimizers[1], offset_loss)
    same(ours, theirs)


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 3, sparse=True)


def sparse_loss(model: Sparse, batch: tuple[Tensor, Tensor]) -> Tensor:
    ids = batch[0].abs().mul(3).long().clamp(max=9)
    return model.table(ids).square().sum()


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # of torch's own Adagrad
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad])
def test_sparse_gradients_train(kind: Any) -> None:
    ours, theirs = made(Sparse), made(Sparse)
    step = TrainStep(ours, kind(ours.parameters(), lr=0.1), sparse_loss, engine="eager")  # type: ignore[arg-type]
    for batch in batches():
        step(batch)
    by_the_book(theirs, kind(theirs.parameters(), lr=0.1), sparse_loss)
    same(ours, theirs)
