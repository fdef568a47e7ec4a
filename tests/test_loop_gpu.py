"""The loop on CUDA: the textbook's numbers, and no wait in steady state."""

from typing import Any

import pytest
import torch
from torch import nn

from fasttrain import FastLoop, TrainStep, resident
from fasttrain.data.ragged import Ragged
from fasttrain.reference import train_epoch
from fasttrain.workloads.onehot import ReviewClassifier, review_forward
from tests.host_waits import host_waits_are_errors

pytestmark = pytest.mark.gpu

NUM_FEATURES = 500


def data(rows: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 20, generator=generator), torch.randint(0, 3, (rows,), generator=generator)


def mlp(device: str = "cuda") -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3)).to(device)


def reviews(num_outputs: int, rows: int = 512) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(0, 30, (rows,), generator=generator)
    ids = torch.cat([torch.randperm(NUM_FEATURES, generator=generator)[:n] for n in lengths.tolist()]).int()
    labels = torch.randint(0, max(2, num_outputs), (rows,), generator=generator)
    return {"x_data": Ragged.of_lengths(ids, lengths), "y_target": labels.float() if num_outputs == 1 else labels}


@pytest.mark.parametrize("path", ["resident", "streamed"])
def test_parity_with_the_textbook(path: str) -> None:
    x, y = data()
    batches = resident(x, y, batch_size=32, device="cuda" if path == "resident" else "cpu", seed=4)
    orders = [torch.from_numpy(batches.order(epoch)).split(32) for epoch in range(3)]
    reference, wanted = mlp(), []
    optimizer = torch.optim.Adam(reference.parameters(), lr=0.01)
    for order in orders:
        loader = [(x[rows], y[rows]) for rows in order]
        train_epoch(reference, loader, nn.CrossEntropyLoss(), optimizer, "cuda", lambda *pair: wanted.append(pair))
    model = mlp()
    loop = FastLoop(model, torch.optim.Adam(model.parameters(), lr=0.01), loss=nn.CrossEntropyLoss())
    got: list[Any] = []
    for _ in orders:
        loop.train(batches, watch=lambda _b, _s, _t, metrics: got.append(metrics.compute()))
    for readout, (loss, accuracy) in zip(got, wanted, strict=True):
        assert readout.loss == pytest.approx(loss, rel=1e-5)
        assert readout.accuracy == pytest.approx(accuracy, rel=1e-6)


@pytest.mark.parametrize("num_outputs", [1, 4])
def test_reviews_on_the_device_give_the_numbers_of_the_cpu(num_outputs: int) -> None:
    losses: dict[str, list[float]] = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = ReviewClassifier(NUM_FEATURES, num_outputs).to(device)
        step = TrainStep(model, torch.optim.Adam(model.parameters(), lr=0.01, fused=True), review_forward)
        losses[device] = [
            step(batch).item() for batch in resident(reviews(num_outputs), batch_size=32, device=device, seed=1)
        ]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0}, {"accumulate": 2}])
def test_a_step_never_waits(precision: str, options: dict[str, Any]) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    loop = FastLoop(model, optimizer, loss=nn.CrossEntropyLoss(), precision=precision, **options)
    batches = resident(*data(), batch_size=32, device="cuda")
    loop.train(batches)
    steps = iter(batches)
    next(steps)
    with host_waits_are_errors():
        for batch in steps:
            loop.step(batch)
            loop.step.metrics.read_late()
    assert loop.step.metrics.compute().loss is not None


@pytest.mark.parametrize("num_outputs", [1, 4])
def test_an_epoch_of_reviews_never_waits(num_outputs: int) -> None:
    """Order, gather, step and readout, from the first batch to the last."""
    model = ReviewClassifier(NUM_FEATURES, num_outputs).cuda()
    loop = FastLoop(model, torch.optim.Adam(model.parameters(), lr=0.01, fused=True), review_forward)
    batches = resident(reviews(num_outputs), batch_size=32, device="cuda")
    loop.train(batches)
    with host_waits_are_errors():
        for batch in batches:
            loop.step(batch)
            loop.step.metrics.read_late()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_stays_near_fp32(precision: str) -> None:
    losses: dict[str, float] = {}
    for each in ("fp32", precision):
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
        loop = FastLoop(model, optimizer, loss=nn.CrossEntropyLoss(), precision=each)
        batches = resident(*data(), batch_size=32, device="cuda", seed=1)
        losses[each] = [loop.train(batches).loss for _ in range(3)][-1]
    assert losses[precision] == pytest.approx(losses["fp32"], rel=2e-2)


def test_compiled_gives_the_numbers_of_eager() -> None:
    losses: dict[str, list[float]] = {}
    for engine in ("eager", "compiled"):
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
        step = TrainStep(model, optimizer, loss=nn.CrossEntropyLoss(), engine=engine)
        losses[engine] = [step(batch).item() for batch in resident(*data(), batch_size=32, device="cuda", seed=1)]
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-4)


def test_the_users_own_unfused_steps_may_come_before_and_after() -> None:
    """Unfused Adam keeps its step counts on the host: the fused kernel must not be handed those."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x, y = (tensor.cuda() for tensor in data())

    def own_step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    own_step()
    FastLoop(model, optimizer, loss=nn.CrossEntropyLoss()).train([(x, y)] * 3)
    own_step()
    fresh = mlp()
    optimizer = torch.optim.Adam(fresh.parameters(), lr=0.01)
    FastLoop(fresh, optimizer, loss=nn.CrossEntropyLoss()).train([(x, y)])
    model = fresh
    own_step()
