"""Loops in which there is nothing to find."""

from collections import deque
from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from fasttrain import FastLoop, resident
from fasttrain.measure.profiling.profiler import Profiler
from tests.measure.profiling.planted.parts import BATCH, Parts, Rows, endless, loader, loss_func

Loop = Callable[[Profiler], object]
CLEAN: dict[str, Loop] = {}


def clean(loop: Loop) -> Loop:
    CLEAN[loop.__name__] = loop
    return loop


@clean
def plain(prof: Profiler) -> None:
    parts = Parts()
    for x, y in endless(parts.batches(), prof):
        parts.train_on(x, y)


@clean
def sum_on_the_device(prof: Profiler) -> None:
    parts, total, correct = Parts(), torch.zeros(()), torch.zeros(())
    for x, y in endless(parts.batches(), prof):
        parts.optimizer.zero_grad()
        predictions = parts.model(x)
        loss = loss_func(predictions, y)
        loss.backward()
        parts.optimizer.step()
        total += loss.detach()
        correct += (predictions.detach().argmax(1) == y).sum()
    assert total.item() > 0


@clean
def read_now_and_then(prof: Profiler) -> None:
    parts = Parts()
    for step, (x, y) in enumerate(endless(parts.batches(), prof)):
        loss = parts.train_on(x, y)
        if step % 10 == 0:
            print(f"step {step}: {loss.item():.3f}")  # noqa: T201


@clean
def default_adam_with_clipping(prof: Profiler) -> None:
    parts = Parts()
    optimizer = torch.optim.Adam(parts.model.parameters())  # its counts of steps are read on the CPU, wherever it runs
    for x, y in endless(parts.batches(), prof):
        optimizer.zero_grad()
        loss_func(parts.model(x), y).backward()
        torch.nn.utils.clip_grad_norm_(parts.model.parameters(), 1.0)
        optimizer.step()


@clean
def scheduler_every_step(prof: Profiler) -> None:
    parts = Parts()
    scheduler = OneCycleLR(parts.optimizer, max_lr=0.1, total_steps=10_000)
    for x, y in endless(parts.batches(), prof):
        parts.train_on(x, y)
        scheduler.step()


@clean
def fast_loop_over_resident_batches(prof: Profiler) -> None:
    parts = Parts()
    loop = FastLoop(parts.model, parts.optimizer, loss=loss_func, engine="eager")
    batches = resident(parts.x, parts.y, batch_size=BATCH, device="cpu")
    for _ in count():
        loop.train(batches, watch=lambda *_: prof.step())
        if prof.is_done:
            return


@clean
def losses_of_an_epoch_in_one_tensor(prof: Profiler) -> None:
    parts = Parts()
    losses = torch.zeros(8)
    for step, (x, y) in enumerate(endless(parts.batches(), prof)):
        losses[step % 8] = parts.train_on(x, y)


@clean
def cache_that_is_full_after_an_epoch(prof: Profiler) -> None:
    parts, cache = Parts(), {}
    for step, (x, y) in enumerate(endless(parts.batches(), prof)):
        place = step % len(parts.batches())
        if place not in cache:
            cache[place] = x.tanh()
        parts.train_on(cache[place], y)


@clean
def window_of_the_last_losses(prof: Profiler) -> None:
    """Of limited length: that it is not yet full is no fault."""
    parts, losses = Parts(), deque(maxlen=500)
    for x, y in endless(parts.batches(), prof):
        losses.append(parts.train_on(x, y))


@clean
def full_ring_of_tensors(prof: Profiler) -> None:
    """Longer than a pass: of all that a pass has put in, nothing is let go in it."""
    parts = Parts()
    ring = [torch.zeros(128, 10) for _ in range(64)]
    for step, (x, y) in enumerate(endless(parts.batches(), prof)):
        parts.train_on(x, y)
        with torch.no_grad():
            ring[step % 64] = parts.model(x)


@clean
def loss_of_some_batches_at_once(prof: Profiler) -> None:
    """A graph that is joined to those before it, and let go after five steps."""
    parts, total = Parts(), torch.zeros(())
    for step, (x, y) in enumerate(endless(parts.batches(), prof)):
        total = total + loss_func(parts.model(x), y)
        if step % 5 == 4:
            total.backward()
            parts.optimizer.step()
            parts.optimizer.zero_grad()
            total = torch.zeros(())


@clean
def batches_that_become_longer(prof: Profiler) -> None:
    """In use is a little more after each step, of which nothing stays."""
    parts = Parts()
    for step in count():
        rows = min(32 + step, 1024)
        parts.train_on(torch.zeros(rows, 64) + step, parts.y[:rows])
        prof.step()
        if prof.is_done:
            return


@clean
def garbage_in_cycles(prof: Profiler) -> None:
    """It stays until Python collects its garbage, and no longer."""
    parts = Parts()
    for x, y in endless(parts.batches(), prof):
        cycle: list[object] = [parts.train_on(x, y), x.tanh()]
        cycle.append(cycle)


@clean
def loader_of_a_large_model(prof: Profiler) -> None:
    """Rows are quick to load beside what a step takes."""
    parts = Parts()
    width = 2048
    parts.model = nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    parts.optimizer = torch.optim.SGD(parts.model.parameters(), lr=0.01)
    for x, y in endless(loader(Rows(parts)), prof):
        parts.train_on(x, y)


@clean
def compiled_forward(prof: Profiler) -> None:
    parts = Parts()

    @torch.compile(backend="eager")
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return loss_func(parts.model(x), y)

    for x, y in endless(parts.batches(), prof):
        parts.optimizer.zero_grad()
        forward(x, y).backward()
        parts.optimizer.step()


@clean
def accumulated_gradients_and_integers_to_floats(prof: Profiler) -> None:
    parts = Parts()
    rows = [((x * 10).to(torch.int8), y) for x, y in parts.batches()]
    for step, (x, y) in enumerate(endless(rows, prof)):
        loss_func(parts.model(x.float()), y).backward()
        if step % 2:
            parts.optimizer.step()
            parts.optimizer.zero_grad()
