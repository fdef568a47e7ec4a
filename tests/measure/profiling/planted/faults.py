"""Loops with one fault each; the line is marked with what a profile must call it."""

import csv
import functools
import io
import logging
import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fasttrain import FastLoop
from fasttrain.measure.profiling.profiler import Profiler
from tests.measure.profiling.planted.parts import Parts, Rows, endless, loader, loss_func

Loop = Callable[[Profiler], object]
FAULTS: dict[str, Loop] = {}


def fault(loop: Loop) -> Loop:
    FAULTS[loop.__name__] = loop
    return loop


@fault
def item_of_the_loss(prof: Profiler) -> None:
    parts, total = Parts(), 0.0
    for x, y in endless(parts.batches(), prof):
        loss = parts.train_on(x, y)
        total += loss.item()  # FAULT: host read


@fault
def float_of_the_loss(prof: Profiler) -> None:
    parts, total = Parts(), 0.0
    for x, y in endless(parts.batches(), prof):
        total += float(parts.train_on(x, y))  # FAULT: host read


@fault
def branch_on_a_tensor(prof: Profiler) -> None:
    parts = Parts()
    for x, y in endless(parts.batches(), prof):
        loss = parts.train_on(x, y)
        if loss.isnan():  # FAULT: host read
            raise ArithmeticError


@fault
def predictions_to_the_cpu(prof: Profiler) -> None:
    parts = Parts()
    for x, y in endless(parts.batches(), prof):
        parts.train_on(x, y)
        with torch.no_grad():
            hits = parts.model(x).argmax(1).cpu()  # FAULT: host read
        assert len(hits)


@fault
def loss_to_numpy_in_a_callback(prof: Profiler) -> None:
    parts = Parts()

    def on_batch(loss: Tensor) -> None:
        loss.numpy()  # FAULT: host read

    for x, y in endless(parts.batches(), prof):
        on_batch(parts.train_on(x, y))


@fault
def print_of_a_tensor(prof: Profiler) -> None:
    parts = Parts()
    for x, y in endless(parts.batches(), prof):
        loss = parts.train_on(x, y)
        print(loss)  # FAULT: host read  # noqa: T201


@fault
def boolean_index(prof: Profiler) -> None:
    parts = Parts()
    for x, y in endless(parts.batches(), prof):
        kept = y >= 0
        parts.train_on(x[kept], y)  # FAULT: host read


@fault
def item_in_a_watcher_of_fastloop(prof: Profiler) -> None:
    parts = Parts()
    loop = FastLoop(parts.model, parts.optimizer, loss=loss_func, engine="eager")
    last = [0.0]

    def watch(batches: int, samples: int, seconds: float, metrics: object) -> None:
        last[0] = metrics.totals[0].item()  # FAULT: host read  # pyright: ignore
        prof.step()

    while not prof.is_done:
        loop.train(parts.batches(), watch=watch)


@fault
def print_of_a_line_every_step(prof: Profiler) -> None:
    parts = Parts()
    for step, (x, y) in enumerate(endless(parts.batches(), prof)):
        parts.train_on(x, y)
        print(f"step {step}")  # FAULT: logging every step  # noqa: T201


@fault
def logger_every_step(prof: Profiler) -> None:
    parts = Parts()
    logger = logging.getLogger("planted")
    logger.propagate = False
    logger.handlers = [logging.StreamHandler(io.StringIO())]
    logger.setLevel(logging.INFO)
    for step, (x, y) in enumerate(endless(parts.batches(), prof)):
        parts.train_on(x, y)
        logger.info("step %d", step)  # FAULT: logging every step
    logger.handlers = []


@fault
def csv_row_every_step(prof: Profiler) -> None:
    parts = Parts()
    writer = csv.writer(io.StringIO())
    for step, (x, y) in enumerate(endless(parts.batches(), prof)):
        parts.train_on(x, y)
        writer.writerow([step])  # FAULT: logging every step


@fault
def clone_of_the_batch(prof: Profiler) -> None:
    parts = Parts()
    for x, y in endless(parts.batches(), prof):
        parts.train_on(x.clone(), y)  # FAULT: extra copy


@fault
def to_double_and_back(prof: Profiler) -> None:
    parts = Parts()
    for x, y in endless(parts.batches(), prof):
        x = x.double()
        x = x.float()  # FAULT: extra copy
        parts.train_on(x, y)


@fault
def tensor_of_a_tensor(prof: Profiler) -> None:
    parts = Parts()
    for x, y in endless(parts.batches(), prof):
        x = x.to(torch.float32, copy=True)  # FAULT: extra copy
        parts.train_on(x, y)


@fault
def list_of_losses(prof: Profiler) -> None:
    parts, losses = Parts(), []
    for x, y in endless(parts.batches(), prof):
        loss = parts.train_on(x, y)
        losses.append(loss)  # FAULT: growing container


@fault
def dict_of_predictions(prof: Profiler) -> None:
    parts, kept = Parts(), {}
    for step, (x, y) in enumerate(endless(parts.batches(), prof)):
        parts.train_on(x, y)
        with torch.no_grad():
            predictions = parts.model(x)
        kept[step] = (predictions, y)  # FAULT: growing container


@fault
def sum_of_losses_with_their_graphs(prof: Profiler) -> None:
    parts = Parts()

    class Meter:
        total = torch.zeros(())

        def update(self, loss: Tensor) -> None:
            self.total = self.total + loss  # FAULT: memory grows

    meter = Meter()
    for x, y in endless(parts.batches(), prof):
        meter.update(parts.attached_loss(x, y))


@fault
def losses_in_place_in_one_tensor_with_their_graphs(prof: Profiler) -> None:
    parts = Parts()
    losses = torch.zeros(8)
    for step, (x, y) in enumerate(endless(parts.batches(), prof)):
        loss = parts.attached_loss(x, y)
        losses[step % 8] = loss  # FAULT: memory grows


@fault
def moving_average_of_validation_with_its_graphs(prof: Profiler) -> None:
    """No backward pass lets the activations go."""
    parts, average = Parts(), torch.zeros(())
    for x, y in endless(parts.batches(), prof):
        parts.train_on(x, y)
        loss = loss_func(parts.model(x), y)
        average = 0.9 * average + 0.1 * loss  # FAULT: memory grows


@fault
def module_that_keeps_its_activations(prof: Profiler) -> None:
    parts = Parts()

    class Recorded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recent: deque[Tensor] = deque()

        def forward(self, x: Tensor) -> Tensor:
            self.recent.append(x.detach())  # FAULT: growing container
            return x

    parts.model.append(Recorded())
    for x, y in endless(parts.batches(), prof):
        parts.train_on(x, y)


@fault
def module_with_a_cache_that_never_hits(prof: Profiler) -> None:
    parts = Parts()

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cache: dict[int, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            key = x._version * 10_000 + len(self.cache)
            if key not in self.cache:
                self.cache[key] = torch.tanh(x.detach())  # FAULT: growing container
            return x + self.cache[key]

    parts.model.append(Cached())
    for x, y in endless(parts.batches(), prof):
        parts.train_on(x, y)


@fault
def chain_of_closures(prof: Profiler) -> None:
    """No container holds it, and no graph."""
    parts = Parts()

    def kept(predictions: Tensor, before: Callable[[], object]) -> Callable[[], object]:
        return lambda: (predictions, before)

    history: Callable[[], object] = object
    for x, y in endless(parts.batches(), prof):
        parts.train_on(x, y)
        with torch.no_grad():
            predictions = parts.model(x).softmax(1)  # FAULT: memory grows
        history = kept(predictions, history)
    assert history is not object


@fault
def cached_function(prof: Profiler) -> None:
    parts = Parts()

    @functools.lru_cache(maxsize=100_000)
    def mask(step: int) -> Tensor:
        return torch.tensor([step % 2, 1] * 64)  # FAULT: memory grows

    for step, (x, y) in enumerate(endless(parts.batches(), prof)):
        parts.train_on(x * mask(step)[:, None], y)


@fault
def slow_item(prof: Profiler) -> None:
    parts = Parts()

    class SlowRows(Rows):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:  # FAULT: slow __getitem__
            time.sleep(20e-6)
            return super().__getitem__(index)

    for x, y in endless(loader(SlowRows(parts)), prof):
        parts.train_on(x, y)


@fault
def item_that_parses_text(prof: Profiler) -> None:
    parts = Parts()
    lines = [",".join(f"{value:.4f}" for value in row) for row in parts.x.tolist()]

    class Lines(Rows):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:  # FAULT: slow __getitem__
            return torch.tensor([float(field) for field in lines[index].split(",")]), self.y[index]

    for x, y in endless(loader(Lines(parts)), prof):
        parts.train_on(x, y)


@fault
def graph_break(prof: Profiler) -> None:
    parts = Parts()

    @torch.compile(backend="eager")
    def forward(x: Tensor, y: Tensor) -> Tensor:
        x = x / 2
        torch._dynamo.graph_break()  # FAULT: graph break
        return loss_func(parts.model(x), y)

    for x, y in endless(parts.batches(), prof):
        parts.optimizer.zero_grad()
        forward(x, y).backward()
        parts.optimizer.step()


@fault
def changing_shapes(prof: Profiler) -> None:
    parts = Parts()

    @torch.compile(backend="eager", dynamic=False)  # FAULT: recompilation
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return loss_func(parts.model(x), y)

    for step, (x, y) in enumerate(endless(parts.batches(), prof)):
        size = 128 - step % 3
        parts.optimizer.zero_grad()
        forward(x[:size], y[:size]).backward()
        parts.optimizer.step()
