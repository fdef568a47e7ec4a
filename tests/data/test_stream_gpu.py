"""`prefetch` on a real CUDA device: the ring under slow consumers and producers, host waits, overlap."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from statistics import median

import pytest
import torch
from torch import Tensor

from fasttrain.data.stream import prefetch
from tests.host_waits import host_waits_are_errors

pytestmark = pytest.mark.gpu

CYCLES_PER_MS = 1_500_000  # of torch.cuda._sleep; clocks of 1 to 2 GHz make it 0.75 to 1.5 ms
PATIENCE_S = 30


def numbered(num_batches: int, size: int = 1 << 16) -> list[dict[str, Tensor]]:
    ramp = torch.arange(size)
    return [{"ids": (ramp * (index + 1)) % 8191, "target": torch.tensor(index)} for index in range(num_batches)]


def host_checksums(batches: list[dict[str, Tensor]]) -> list[int]:
    return [int((b["ids"] * torch.arange(b["ids"].numel())).sum() + b["target"]) for b in batches]


def add_checksum(sums: Tensor, index: int, batch: dict[str, Tensor], ramp: Tensor) -> None:
    size = batch["ids"].numel()
    sums[index].copy_((batch["ids"] * ramp[:size]).sum() + batch["target"])


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("pinned", [False, True])
def test_a_slow_device_reads_every_batch_whole(depth: int, pinned: bool) -> None:
    batches = numbered(40)
    expected = host_checksums(batches)
    source = [{key: t.pin_memory() for key, t in b.items()} for b in batches] if pinned else batches
    ramp = torch.arange(1 << 16, device="cuda")
    sums = torch.zeros(40, dtype=torch.int64, device="cuda")
    loader = prefetch(source, "cuda", depth=depth)
    for _ in range(2):
        sums.zero_()
        with host_waits_are_errors():
            for index, batch in enumerate(loader):
                torch.cuda._sleep(2 * CYCLES_PER_MS)  # the host runs ahead of the reads that follow
                add_checksum(sums, index, batch, ramp)
                del batch  # its memory is free for the allocator while the device still has to read it
        assert sums.tolist() == expected


def test_a_slow_loader_of_odd_shapes_is_whole() -> None:
    allowed = threading.Semaphore(0)
    sizes = [1 << 16, 3, 0, 1 << 10, (1 << 16) - 1, 17]
    batches = [numbered(1, size)[0] for size in sizes] * 3

    def slow() -> Iterator[dict[str, Tensor]]:
        for batch in batches:
            assert allowed.acquire(timeout=PATIENCE_S)
            yield batch

    ramp = torch.arange(1 << 16, device="cuda")
    sums = torch.zeros(len(batches), dtype=torch.int64, device="cuda")
    iterator = iter(prefetch(slow(), "cuda"))
    for index in range(len(batches)):
        allowed.release()
        add_checksum(sums, index, next(iterator), ramp)
    assert next(iterator, None) is None
    assert sums.tolist() == host_checksums(batches)


def test_a_consumer_on_its_own_stream_reads_whole_batches() -> None:
    batches = numbered(30)
    ramp = torch.arange(1 << 16, device="cuda")
    sums = torch.zeros(30, dtype=torch.int64, device="cuda")
    own = torch.cuda.Stream()
    own.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(own):
        for index, batch in enumerate(prefetch(batches, "cuda")):
            torch.cuda._sleep(CYCLES_PER_MS)
            add_checksum(sums, index, batch, ramp)
    own.synchronize()
    assert sums.tolist() == host_checksums(batches)


def test_a_loader_that_works_on_the_device_is_ordered_with_the_consumer() -> None:
    data = torch.zeros(20, 1 << 14, device="cuda")
    torch.cuda._sleep(20 * CYCLES_PER_MS)
    data += torch.arange(20, device="cuda")[:, None]  # queued, not done, when the pass starts

    def gathering() -> Iterator[Tensor]:
        for index in range(20):
            yield data[index] * 2

    sums = torch.stack([batch.sum() for batch in prefetch(gathering(), "cuda")])
    assert sums.tolist() == [2.0 * index * (1 << 14) for index in range(20)]


def test_batches_keep_memory_format_and_belong_to_the_caller() -> None:
    image = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    resident = torch.ones(2, device="cuda")
    held = list(prefetch([(image + index, resident, "name") for index in range(10)], "cuda:0"))
    for index, (moved, same, name) in enumerate(held):
        assert moved.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(moved.cpu(), image + index)
        assert same is resident
        assert name == "name"


def test_an_early_end_leaves_no_thread_and_an_error_comes_through() -> None:
    for batch in prefetch(numbered(30), "cuda"):
        assert batch["ids"].is_cuda
        break
    gc.collect()
    assert "fasttrain-prefetch" not in [thread.name for thread in threading.enumerate()]

    def failing_loader() -> Iterator[Tensor]:
        yield torch.ones(3)
        raise KeyError("row 2")

    iterator = iter(prefetch(failing_loader(), "cuda"))
    assert next(iterator).sum().item() == 3
    with pytest.raises(KeyError, match="row 2"):
        next(iterator)


def test_device_memory_in_flight_is_bounded() -> None:
    """The host could run 60 steps ahead of a device this slow; the ring holds it to a few batches."""
    num_bytes, depth = 4 << 20, 2
    batches = [torch.zeros(num_bytes, dtype=torch.uint8)] * 60
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    for batch in prefetch(batches, "cuda", depth=depth):
        torch.cuda._sleep(3 * CYCLES_PER_MS)
        batch.add_(1)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_reserved() - before
    # Blocks in use, blocks whose step is queued, and the allocator's rounding to segments of 20 MiB.
    assert peak <= 3 * (depth + 1) * num_bytes + (40 << 20)


def test_copies_run_while_the_consumer_computes() -> None:
    batches = [torch.zeros(16 << 20, dtype=torch.uint8)] * 30
    pinned, target = batches[0].pin_memory(), torch.empty_like(batches[0], device="cuda")
    target.copy_(pinned, non_blocking=True)
    alone = elapsed_of_copy(pinned, target)
    gaps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    step_done = None
    for _ in prefetch(batches, "cuda"):
        batch_there = torch.cuda.Event(enable_timing=True)
        batch_there.record()
        if step_done is not None:
            gaps.append((step_done, batch_there))
        torch.cuda._sleep(15 * CYCLES_PER_MS)
        step_done = torch.cuda.Event(enable_timing=True)
        step_done.record()
    torch.cuda.synchronize()
    waited_ms = median(first.elapsed_time(second) for first, second in gaps)
    assert waited_ms < alone / 2, f"the stream waits {waited_ms:.3f} ms a batch, a copy takes {alone:.3f} ms"


def elapsed_of_copy(pinned: Tensor, target: Tensor) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    target.copy_(pinned, non_blocking=True)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
