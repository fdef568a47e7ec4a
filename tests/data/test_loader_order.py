"""Loaders that need no word: `FastLoop` trains on the very batches of a plain DataLoader over tensors, in its order.

The oracle is a plain PyTorch loop in float64: equal batches, bit by bit; equal weights after training through dropout,
which draws from the same generator as the sampler; equal states of all generators afterwards.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, StackDataset, Subset, TensorDataset, default_collate

from fasttrain import FastLoop, Interrupted
from tests.data.record_loaders import ORDERS, Event, Order, leaves, seed_all, states

EPOCHS = 3
NUM_ROWS = 22
NUM_FEATURES = 6

# Datasets of columns --------------------------------------------------------------------------------------------------


def features() -> Tensor:
    return torch.sin(torch.arange(NUM_ROWS * 6.0, dtype=torch.float64)).reshape(NUM_ROWS, NUM_FEATURES)


def targets() -> Tensor:
    return torch.cos(torch.arange(NUM_ROWS, dtype=torch.float64))


def images() -> Tensor:
    """[rows, channels, height, width] in the memory format channels_last; default_collate gives contiguous batches."""
    pixels = torch.sin(torch.arange(NUM_ROWS * 12.0, dtype=torch.float64)).reshape(NUM_ROWS, 3, 2, 2)
    return pixels.contiguous(memory_format=torch.channels_last)


def plain() -> TensorDataset:
    return TensorDataset(features(), targets())


SOME = [3, 3, 21, 0, 7, 8, 9, 10, 11, 19, 2, 5]

DATASETS: dict[str, Callable[[], Any]] = {
    "tensors": plain,
    "one tensor": lambda: TensorDataset(features()),
    "stacked": lambda: StackDataset(features(), targets()),
    "stacked by name": lambda: StackDataset(x=features(), y=targets()),
    "stacked tensor datasets": lambda: StackDataset(TensorDataset(features()), plain()),
    "subset": lambda: Subset(plain(), SOME),
    "subset by range": lambda: Subset(plain(), range(2, 20, 2)),  # pyright: ignore[reportArgumentType]
    "subset by tensor": lambda: Subset(plain(), torch.tensor(SOME)),  # pyright: ignore[reportArgumentType]
    "subset by array": lambda: Subset(plain(), np.array(SOME)),  # pyright: ignore[reportArgumentType]
    "subset with negative indices": lambda: Subset(plain(), [-1, 4, -22, 0, 5, -3]),
    "nested subset": lambda: Subset(Subset(plain(), SOME), [0, 2, 4, 6, 11, 1, 1]),
    "subset of stacked": lambda: Subset(StackDataset(x=features(), y=plain()), SOME),
    "a tensor": features,
    "a list": lambda: list(zip(features(), targets().tolist(), strict=True)),
    "channels last": lambda: TensorDataset(images(), targets()),
    "transposed": lambda: TensorDataset(features().t().contiguous().t(), targets()),
    "transposed images": lambda: TensorDataset(images().transpose(2, 3), targets()),
    "every second": lambda: TensorDataset(features().repeat_interleave(2, 1)[:, ::2], targets()),
    "every second row": lambda: TensorDataset(features().repeat_interleave(2, 0)[::2], targets()),
    "expanded": lambda: TensorDataset(features()[:, :1].expand(-1, NUM_FEATURES), targets()),
    "flipped": lambda: TensorDataset(features().flip(0), targets()),
    "requires grad": lambda: TensorDataset(features().requires_grad_(), targets()),
    "float32": lambda: TensorDataset(features().float(), targets().float()),
    "bfloat16": lambda: TensorDataset(features().bfloat16(), targets().half()),
    "ints": lambda: TensorDataset(torch.arange(NUM_ROWS * 2).reshape(-1, 2), torch.arange(NUM_ROWS) % 3),
    "bytes and bools": lambda: TensorDataset(torch.arange(NUM_ROWS).byte(), torch.arange(NUM_ROWS) % 2 == 0),
    "0-d rows": lambda: TensorDataset(targets(), targets()),
    "no columns": lambda: TensorDataset(features(), torch.zeros(NUM_ROWS, 0), targets()),
    "parameters": lambda: TensorDataset(nn.Parameter(features()), targets()),
    "one memory twice": lambda: TensorDataset(*[features()] * 2),
    "not finite": lambda: TensorDataset(features().div(0).nan_to_num(1, 2, -0.0), targets()),
}


class Doubling(TensorDataset):
    """A dataset of the user's own: its rows are not its tensors'."""

    def __getitem__(self, index: Any) -> Any:
        return tuple(2 * each for each in super().__getitem__(index))


class Reversed(DataLoader[Any]):
    """A loader of the user's own."""

    def __iter__(self) -> Any:
        return iter(list(super().__iter__())[::-1])


def halved(rows: list[Any]) -> Any:
    return [column / 2 for column in default_collate(rows)]


# Jobs -----------------------------------------------------------------------------------------------------------------


@dataclass
class World:
    """A loader with its generator, and what the user does before an epoch and after a step."""

    loader: Any
    generator: torch.Generator | None = None
    before: Callable[[int], Any] = lambda epoch: None
    after_step: Callable[[int, int], Any] = lambda epoch, number: None


@dataclass(frozen=True)
class Job:
    name: str
    make: Callable[[], World]
    # Where `fused` is left open FastLoop may choose it, and its last bits differ.
    optimizer: Callable[[Any], torch.optim.Optimizer] = lambda weights: torch.optim.SGD(
        weights, 0.1, momentum=0.9, fused=False
    )


def job(name: str, dataset: str = "tensors", order: str = "shuffle", **options: Any) -> Job:
    def make() -> World:
        rows = DATASETS[dataset]()
        chosen: Order = ORDERS[order](rows)
        loader = DataLoader(rows, **{"batch_size": 4, **chosen.options, **options})
        return World(loader, chosen.generator, chosen.before)

    return Job(name, make)


def changed(name: str, change: Callable[[Any, int], Any], dataset: str = "tensors", **options: Any) -> Iterator[Job]:
    """The user changes something between epochs, or between steps: after the second step of each epoch."""

    def between_epochs() -> World:
        loader = DataLoader(DATASETS[dataset](), batch_size=4, shuffle=True, **options)
        return World(loader, before=lambda epoch: change(loader, epoch))

    def between_steps() -> World:
        loader = DataLoader(DATASETS[dataset](), batch_size=4, shuffle=True, **options)
        return World(loader, after_step=lambda epoch, number: change(loader, epoch) if number == 1 else None)

    yield Job(f"{name} between epochs", between_epochs)
    yield Job(f"{name} between steps", between_steps)


def made(name: str, make: Callable[[], Any]) -> Job:
    return Job(name, lambda: World(make()))


def jobs() -> Iterator[Job]:
    for dataset in DATASETS:
        yield job(dataset, dataset)
    for order in ORDERS:
        yield job(f"order: {order}", "tensors", order)
    for order in ("shuffle", "replacement generator", "weighted", "sequential"):
        for drop_last in (False, True):
            yield job(f"drop_last={drop_last}: {order}", "tensors", order, drop_last=drop_last, batch_size=5)
    yield job("one batch, larger than the data", batch_size=100)
    yield job("one row a batch", batch_size=1, dataset="subset")
    yield job("no batches", batch_size=None)
    yield job("no batches, channels last", "channels last", batch_size=None)
    yield job("no batches, every second", "every second", batch_size=None)
    yield job("own collate", collate_fn=halved)
    yield job("workers", num_workers=2)
    yield made("own dataset", lambda: DataLoader(Doubling(features(), targets()), 4, shuffle=True))
    yield made("own loader", lambda: Reversed(plain(), 4, shuffle=True))
    yield from changes()


def changes() -> Iterator[Job]:
    def in_place(loader: Any, epoch: int) -> None:
        loader.dataset.tensors[0][5:15] += epoch + 1

    def through_numpy(loader: Any, epoch: int) -> None:
        loader.dataset.tensors[0].numpy()[5:15] += epoch + 1

    def replaced(loader: Any, epoch: int) -> None:
        loader.dataset.tensors = (features() + epoch, targets())

    def one_replaced_in_a_subset(loader: Any, epoch: int) -> None:
        loader.dataset.dataset.tensors = (features() + epoch, targets())

    def more_columns(loader: Any, epoch: int) -> None:
        loader.dataset.tensors = (features(), features() + epoch, targets())

    def data_replaced(loader: Any, epoch: int) -> None:
        loader.dataset.tensors[0].data = features() - epoch

    def indices_replaced(loader: Any, epoch: int) -> None:
        loader.dataset.indices = list(range(epoch, epoch + 12))

    def indices_in_place(loader: Any, epoch: int) -> None:
        loader.dataset.indices[2:9] = [epoch] * 7

    def stacked_replaced(loader: Any, epoch: int) -> None:
        loader.dataset.datasets = (features() + epoch, targets())

    def stacked_in_place(loader: Any, epoch: int) -> None:
        loader.dataset.datasets[0].mul_(1.5)

    def collate_replaced(loader: Any, epoch: int) -> None:
        loader.collate_fn = halved if epoch % 2 else default_collate

    def batch_size(loader: Any, epoch: int) -> None:
        loader.batch_sampler.batch_size = 3 + epoch

    def loader_generator(loader: Any, epoch: int) -> None:
        loader.generator = torch.Generator().manual_seed(epoch)

    def sampler_generator(loader: Any, epoch: int) -> None:
        loader.sampler.generator = torch.Generator().manual_seed(epoch)

    def seeded(loader: Any, epoch: int) -> None:
        torch.manual_seed(epoch)

    def drawn(loader: Any, epoch: int) -> None:
        torch.rand(3)

    def looked_at(loader: Any, epoch: int) -> None:
        next(iter(loader))

    def becomes_own(loader: Any, epoch: int) -> None:
        loader.dataset.__class__ = Doubling if epoch % 2 else TensorDataset

    yield from changed("tensors in place", in_place)
    yield from changed("tensors through numpy", through_numpy)
    yield from changed("tensors replaced", replaced)
    yield from changed("tensors of a subset replaced", one_replaced_in_a_subset, "subset")
    yield from changed("column added", more_columns)
    yield from changed("data replaced", data_replaced)
    yield from changed("indices replaced", indices_replaced, "subset")
    yield from changed("indices in place", indices_in_place, "subset")
    yield from changed("stacked replaced", stacked_replaced, "stacked")
    yield from changed("stacked in place", stacked_in_place, "stacked")
    yield from changed("collate_fn replaced", collate_replaced)
    yield from changed("batch size", batch_size)
    yield from changed("generator of the loader", loader_generator)
    yield from changed("generator of the sampler", sampler_generator)
    yield from changed("torch seeded", seeded)
    yield from changed("torch drawn from", drawn)
    yield from changed("a batch looked at", looked_at)
    yield from changed("class of the dataset", becomes_own)

    def shrunk() -> World:
        dataset = plain()
        loader = DataLoader(dataset, batch_size=4, shuffle=True)

        def shrink(epoch: int) -> None:
            dataset.tensors = tuple(each[: NUM_ROWS - 3 * epoch] for each in (features(), targets()))

        return World(loader, before=shrink)

    def weights_changed() -> World:
        order = ORDERS["weighted"](plain())
        loader = DataLoader(plain(), batch_size=4, **order.options)
        return World(loader, before=lambda epoch: order.options["sampler"].weights[: 5 * epoch].zero_())

    yield Job("fewer rows each epoch", shrunk)
    yield Job("weights changed between epochs", weights_changed)


JOBS = list(jobs())


# The plain loop and FastLoop ------------------------------------------------------------------------------------------


@dataclass
class Run:
    seen: list[list[Event]] = field(default_factory=list[list[Event]])
    losses: list[float] = field(default_factory=list[float])
    weights: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    states: list[Any] = field(default_factory=list[Any])
    grads: list[Any] = field(default_factory=list[Any])

    def check(self, oracle: Run) -> None:
        assert len(self.seen) == len(oracle.seen), "steps"
        for number, (mine, theirs) in enumerate(zip(self.seen, oracle.seen, strict=True)):
            assert mine == theirs, f"step {number}"
        assert self.losses == pytest.approx(oracle.losses, rel=1e-12, nan_ok=True)
        for name, value in oracle.weights.items():
            assert list(leaves(self.weights[name])) == list(leaves(value)), name
        assert self.states == oracle.states
        assert self.grads == oracle.grads


class Training:
    """A model with dropout, its optimizer, and a forward that writes down each batch; all from the same start."""

    def __init__(self, job: Job) -> None:
        seed_all()
        self.world, self.run = job.make(), Run()
        torch.manual_seed(11)
        self.model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1)).double()
        self.optimizer = job.optimizer(self.model.parameters())

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        self.run.seen.append(list(leaves(batch)))
        columns = [each.double().reshape(-1, 1) for each in _tensors(batch)]
        out = model(torch.cat(columns).clamp(-9, 9))
        return (out - columns[-1].mean()).square().mean()

    def noted(self) -> None:
        """What an epoch leaves: the generators, the gradients of the data."""
        self.run.states.append(states(self.world.generator))
        data = getattr(self.world.loader.dataset, "tensors", ())
        # A result of a function keeps no gradient, and torch warns of who asks.
        grads = [each.grad for each in data if each.is_leaf and each.grad is not None]
        self.run.grads.append([list(leaves(each)) for each in grads])

    def end(self) -> Run:
        self.run.weights = copy.deepcopy(self.model.state_dict())
        return self.run


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    else:
        for each in batch.values() if isinstance(batch, dict) else batch:
            yield from _tensors(each)


def plain_loop(job: Job, *, stop_at: int | None = None) -> Run:
    training = Training(job)
    world = training.world
    training.model.train()
    for epoch in range(EPOCHS):
        world.before(epoch)
        losses: list[float] = []
        for number, batch in enumerate(world.loader):
            training.optimizer.zero_grad()
            loss = training.forward(training.model, batch)
            loss.backward()
            training.optimizer.step()
            losses.append(loss.item())
            world.after_step(epoch, number)
            if number == stop_at:
                break
        if stop_at is None:
            training.run.losses.append(sum(losses) / len(losses))
        training.noted()
    return training.end()


def fast_loop(job: Job, *, stop_at: int | None = None) -> Run:
    training = Training(job)
    world = training.world
    loop = FastLoop(training.model, training.optimizer, training.forward, engine="eager")
    for epoch in range(EPOCHS):
        world.before(epoch)

        def watch(batches: int, *_: Any, epoch: int = epoch) -> None:
            world.after_step(epoch, batches - 1)
            if batches - 1 == stop_at:
                raise Interrupted

        try:
            result = loop.train(world.loader, watch=watch)
            training.run.losses.append(result.loss)
        except Interrupted:
            assert stop_at is not None
        training.noted()
    return training.end()


def names(job: Job) -> str:
    return job.name


@pytest.mark.parametrize("job", JOBS, ids=names)
def test_trains_on_the_loaders_own_batches(job: Job) -> None:
    fast_loop(job).check(plain_loop(job))


RESIDENT = [
    job(name, dataset, order)
    for name, dataset, order in [
        ("shuffle", "tensors", "shuffle"),
        ("generator", "tensors", "shuffle generator"),
        ("default generator", "stacked by name", "default generator"),
        ("replacement", "subset", "replacement"),
        ("weighted", "tensors", "weighted generator"),
        ("distributed", "tensors", "distributed"),
        ("draws at each index", "tensors", "draws torch"),
    ]
]


@pytest.mark.parametrize("stop_at", [0, 1, 2])
@pytest.mark.parametrize("job", RESIDENT, ids=names)
def test_an_epoch_that_ends_early_has_drawn_what_the_loader_had(job: Job, stop_at: int) -> None:
    fast_loop(job, stop_at=stop_at).check(plain_loop(job, stop_at=stop_at))


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda weights: torch.optim.Adam(weights, 0.01, fused=False),
        lambda weights: torch.optim.AdamW(weights, 0.01, fused=False, amsgrad=True),
        lambda weights: torch.optim.RMSprop(weights, 0.01, momentum=0.5),
    ],
    ids=["Adam", "AdamW", "RMSprop"],
)
def test_with_other_optimizers(optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
    chosen = Job("", job("").make, optimizer)
    fast_loop(chosen).check(plain_loop(chosen))


@pytest.mark.parametrize("job", RESIDENT, ids=names)
def test_a_step_in_the_users_own_loop(job: Job) -> None:
    training = Training(job)
    step = FastLoop(training.model, training.optimizer, training.forward, engine="eager").step
    training.model.train()
    for epoch in range(EPOCHS):
        training.world.before(epoch)
        step.metrics.reset()
        for _ in step.run(training.world.loader):
            pass
        step.flush()
        loss = step.metrics.compute().loss
        assert loss is not None
        training.run.losses.append(loss)
        training.noted()
    training.end().check(plain_loop(job))


@pytest.mark.parametrize("job", [each for each in JOBS if "step" not in each.name], ids=names)
def test_evaluates_the_loaders_own_batches(job: Job) -> None:
    """All batches in their order, the dropped last one left out, shuffled where the loader shuffles."""
    training = Training(job)
    loop = FastLoop(training.model, training.optimizer, training.forward, engine="eager")
    for epoch in range(2):
        training.world.before(epoch)
        training.run.losses.append(loop.evaluate(training.world.loader).loss)
        training.noted()
    oracle = Training(job)
    oracle.model.eval()
    for epoch in range(2):
        oracle.world.before(epoch)
        losses: list[tuple[float, int]] = []
        with torch.no_grad():
            for batch in oracle.world.loader:
                first = next(_tensors(batch))
                losses.append((oracle.forward(oracle.model, batch).item(), len(first) if first.dim() else 1))
        weight = sum(samples for _, samples in losses)
        oracle.run.losses.append(sum(loss * samples for loss, samples in losses) / weight)
        oracle.noted()
    training.end().check(oracle.end())


def test_train_and_evaluate_in_turn_with_one_generator() -> None:
    """As in a program: one generator for both loaders, and the loaders looked at by hand between epochs."""

    def program(is_fast: bool) -> Run:
        training = Training(RESIDENT[1])
        generator = training.world.generator
        val = DataLoader(plain(), batch_size=5, shuffle=True, generator=generator)
        loop = FastLoop(training.model, training.optimizer, training.forward, engine="eager")
        for _ in range(EPOCHS):
            if is_fast:
                loop.train(training.world.loader)
                loop.evaluate(val)
            else:
                training.model.train()
                for batch in training.world.loader:
                    training.optimizer.zero_grad()
                    training.forward(training.model, batch).backward()
                    training.optimizer.step()
                training.model.eval()
                with torch.no_grad():
                    for batch in val:
                        training.forward(training.model, batch)
            training.run.seen.append(list(leaves(next(iter(val)))))
            training.run.losses += [random.random(), float(torch.rand(()))]
            training.noted()
        return training.end()

    program(is_fast=True).check(program(is_fast=False))


@pytest.mark.parametrize("job", [each for each in RESIDENT if each.name != "draws at each index"], ids=names)
def test_is_taken_as_resident_data(job: Job) -> None:
    training = Training(job)
    loop = FastLoop(training.model, training.optimizer, training.forward, engine="eager")
    training.world.before(0)
    assert loop.train(training.world.loader).source == "resident"
    assert loop.source.value == "resident"


class OwnTensors(TensorDataset):
    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(index)


class OwnLoader(DataLoader[Any]):
    pass


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (lambda: DataLoader(OwnTensors(features(), targets()), batch_size=4), "OwnTensors"),
        (lambda: OwnLoader(plain(), batch_size=4), "torch's own DataLoader"),
        (lambda: DataLoader(plain(), batch_size=4, collate_fn=lambda rows: default_collate(rows)), "collate_fn"),
        (lambda: DataLoader(plain(), batch_size=4, num_workers=1), "1 workers"),
        (lambda: DataLoader(plain(), batch_size=4, sampler=list(range(9))), "sampler of its own, list"),
        (lambda: DataLoader(plain(), batch_size=4, sampler=own_sampler()), "sampler of its own"),
        (lambda: DataLoader(plain(), batch_sampler=[[0, 1], [2, 3]]), "batch_sampler"),
        (lambda: DataLoader(TensorDataset(features().t().contiguous().t(), targets()), batch_size=4), "one after the"),
        (lambda: DataLoader(TensorDataset(features().requires_grad_(), targets()), batch_size=4), "gradients"),
    ],
)
def test_any_other_loader_is_streamed(loader: Callable[[], DataLoader[Any]], reason: str) -> None:
    model = nn.Linear(NUM_FEATURES, 1).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loop = FastLoop(model, optimizer, lambda model, batch: (model(batch[0]).squeeze(1) - batch[1]).square().mean())
    assert loop.train(loader()).source == "streamed"
    assert reason in loop.source.reason


def own_sampler() -> Any:
    class Own(torch.utils.data.Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(8))

        def __len__(self) -> int:
            return 8

    return Own()


# The harness itself ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["order", "seed", "values", "strides", "steps"])
def test_harness_sees_a_fault(fault: str) -> None:
    oracle = plain_loop(job("", "channels last"))
    broken = copy.deepcopy(oracle)
    if fault == "order":
        broken.seen[0], broken.seen[1] = broken.seen[1], broken.seen[0]
    elif fault == "seed":
        broken.states[1] = broken.states[0]
    elif fault == "values":
        broken.weights["0.weight"][0, 0] = torch.nextafter(broken.weights["0.weight"][0, 0], torch.tensor(9.0).double())
    elif fault == "strides":
        broken.seen[2] = list(leaves([features()[:4], targets()[:4]]))
    else:
        broken.seen.pop()
    with pytest.raises(AssertionError):
        broken.check(oracle)
