"""`FastLoop` over recorded loaders: the numbers of a plain PyTorch loop, several steps a call."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from fasttrain import ConfigError, FastLoop, record

NUM_ROWS, NUM_WORDS = 40, 60


class Words(Dataset[dict[str, Any]]):
    """Rows of mostly zeros, as a textbook makes them."""

    def __init__(self) -> None:
        self.reads = 0
        self.weight = 1.0

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = np.zeros(NUM_WORDS, dtype=np.float32)
        row[[(index * 7 + step * step) % NUM_WORDS for step in range(4)]] = self.weight
        return {"x_data": row, "y_target": index % 2, "name": f"row {index}"}


def forward(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    predictions = model(batch["x_data"].double()).squeeze(1)
    targets = batch["y_target"].double()
    return nn.functional.binary_cross_entropy_with_logits(predictions, targets), predictions, targets


def network() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(NUM_WORDS, 5), nn.Dropout(0.2), nn.Tanh(), nn.Linear(5, 1)).double()
    return model, torch.optim.SGD(model.parameters(), 0.5, momentum=0.5, foreach=False)


SAMPLERS = {
    "shuffle": lambda: {"shuffle": True, "drop_last": True},
    "in order": lambda: {},
    "generator": lambda: {"shuffle": True, "generator": torch.Generator().manual_seed(5)},
    "default generator": lambda: {"shuffle": True, "generator": torch.default_generator},
    "replacement": lambda: {"sampler": RandomSampler(range(NUM_ROWS), replacement=True)},
    "subset": lambda: {"sampler": SubsetRandomSampler([1, 3, 8, 9, 11, 30, 22])},
    "weighted": lambda: {"sampler": WeightedRandomSampler([1.0, 2.0] * 20, 30)},
}


def plain_losses(options: dict[str, Any], epochs: int) -> tuple[list[float], nn.Module, Tensor]:
    model, optimizer = network()
    loader = DataLoader(Words(), batch_size=6, **options)
    torch.manual_seed(1)
    losses: list[float] = []
    for _ in range(epochs):
        in_epoch: list[Tensor] = []
        for batch in loader:
            optimizer.zero_grad()
            loss = forward(model, batch)[0]
            loss.backward()
            optimizer.step()
            in_epoch.append(loss.detach())
        losses.append(float(torch.stack(in_epoch).mean()))
    return losses, model, torch.get_rng_state()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_recorded_loader_trains_as_a_plain_loop_does(sampler: str) -> None:
    losses, plain, state = plain_losses(SAMPLERS[sampler](), 4)
    model, optimizer = network()
    loop = FastLoop(model, optimizer, forward, engine="eager")
    loader = record(DataLoader(Words(), batch_size=6, **SAMPLERS[sampler]()))
    torch.manual_seed(1)
    results = [loop.train(loader) for _ in range(4)]
    assert [result.source for result in results] == ["streamed", "resident", "resident", "resident"]
    assert [result.loss for result in results] == pytest.approx(losses, rel=1e-12)
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), state)


def test_compiled_steps_walk_over_recorded_rows() -> None:
    losses, _, _ = plain_losses(SAMPLERS["shuffle"](), 4)
    model, optimizer = network()
    loop = FastLoop(model, optimizer, forward, engine="compiled")
    loader = record(DataLoader(Words(), batch_size=6, **SAMPLERS["shuffle"]()))
    torch.manual_seed(1)
    results = [loop.train(loader) for _ in range(4)]
    assert [result.engine for result in results] == ["eager", "compiled", "compiled", "compiled"]
    assert [result.loss for result in results] == pytest.approx(losses, rel=1e-10)
    [column, _] = loop.step.sources.of(loader).columns  # pyright: ignore[reportAttributeAccessIssue]
    assert column.kind.form == "sparse"


def test_evaluation_uses_the_loaders_own_batches() -> None:
    model, optimizer = network()
    loop = FastLoop(model, optimizer, forward, engine="eager")
    loader = DataLoader(Words(), batch_size=6)
    recorded = record(loader)
    for _ in range(3):
        assert loop.evaluate(recorded).loss == pytest.approx(loop.evaluate(loader).loss, rel=1e-12)
    assert loop.source.value == "streamed"
    assert loop.evaluate(recorded).source == "resident"


def test_a_dataset_that_changes_between_epochs_is_recorded_anew() -> None:
    dataset = Words()
    model, optimizer = network()
    loop = FastLoop(model, optimizer, forward, engine="eager")
    loader = record(DataLoader(dataset, batch_size=6))
    sources = [loop.train(loader).source for _ in range(2)]
    dataset.weight = 2.0
    sources += [loop.train(loader).source for _ in range(2)]
    assert "Words.weight has changed" in loader.choice.reason or loader.choice.value == "resident"
    dataset.weight = 1.0
    sources.append(loop.train(loader).source)
    assert sources == ["streamed", "resident", "streamed", "resident", "resident"]


def losses_with_changes(*, is_recorded: bool) -> list[float]:
    dataset = Words()
    model, optimizer = network()
    loop = FastLoop(model, optimizer, forward, engine="eager")
    loader = DataLoader(dataset, batch_size=6)
    source = record(loader) if is_recorded else loader
    torch.manual_seed(1)
    losses = [loop.train(source).loss for _ in range(2)]
    changes = iter([1.0, 3.0, 3.0, 3.0, 2.0, 2.0, 2.0])

    def watch(*_: Any) -> None:
        dataset.weight = next(changes)

    return [*losses, loop.train(source, watch=watch).loss, loop.train(source).loss]


def test_a_change_in_the_middle_of_a_pass_is_seen() -> None:
    assert losses_with_changes(is_recorded=True) == pytest.approx(losses_with_changes(is_recorded=False), rel=1e-12)


def test_what_record_refuses() -> None:
    loader = DataLoader(Words(), batch_size=6)
    with pytest.raises(ConfigError, match="recorded already"):
        record(record(loader))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="takes a torch"):
        record([1, 2])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="workers -1"):
        record(loader, workers=-1)
    with pytest.raises(ConfigError, match="then must be a function"):
        record(loader, then=3)  # pyright: ignore[reportArgumentType]
