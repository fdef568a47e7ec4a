"""`prefetch` without a GPU: a fake lane drives the ring."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fasttrain.data import stream
from fasttrain.data.stream import prefetch
from fasttrain.errors import ConfigError, DeviceError
from tests.data.late_copies import PATIENCE_S, LateCopies, Source, checksums, late, numbered, workers

# The ring: data survives late copies


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_batches_survive_copies_that_end_as_late_as_they_can(lane: LateCopies, depth: int) -> None:
    batches = numbered(20)
    held = list(late(batches, lane, depth))
    lane.finish()
    assert checksums(held) == checksums(batches)


def test_a_slow_consumer_finds_each_batch_whole(lane: LateCopies) -> None:
    batches = numbered(12)
    source = Source(batches)
    seen: list[float] = []
    for index, batch in enumerate(late(source, lane)):
        source.wait_for(min(index + 3, 12))  # the worker has run as far ahead as it may
        lane.finish()
        seen += checksums([batch])
    assert seen == checksums(batches)


def test_a_slow_producer_delivers_each_batch_when_it_is_ready(lane: LateCopies) -> None:
    allowed = threading.Semaphore(0)

    def slow() -> Iterator[Tensor]:
        for batch in numbered(6):
            assert allowed.acquire(timeout=PATIENCE_S)
            yield batch

    held: list[Tensor] = []
    iterator = iter(late(slow(), lane))
    for _ in range(6):
        allowed.release()
        held.append(next(iterator))
    assert next(iterator, None) is None
    lane.finish()
    assert checksums(held) == checksums(numbered(6))


def test_the_worker_runs_no_more_than_depth_batches_ahead(lane: LateCopies) -> None:
    source = Source(numbered(50))
    iterator = iter(late(source, lane, depth=3))
    for index in range(10):
        next(iterator)
        source.wait_for(index + 4)
        # The next pull needs a credit that only this thread gives, so this count cannot change under us.
        assert source.num_pulled == index + 4
    iterator.close()


def test_the_consumer_waits_for_the_copies_and_claims_before_it_gets_a_batch(lane: LateCopies) -> None:
    source = [(torch.ones(2), torch.zeros(3)), (torch.ones(2), torch.zeros(3))]
    for batch in late(source, lane):
        waited = [event for what, event in lane.log if what == "wait consumer"]
        recorded = [event for what, event in lane.log if what == "record side"]
        assert waited[-1] in recorded
        assert [value for what, value in lane.log if what == "claim"][-1] == [t.data_ptr() for t in batch]


def test_the_copies_of_a_batch_wait_for_the_step_that_frees_its_place(lane: LateCopies) -> None:
    list(late(numbered(8), lane, depth=2))
    begin, *steps = [event for what, event in lane.log if what == "record consumer"]
    # Three places: the first three batches wait for what came before the pass, batch n + 3 for step n.
    expected = [begin, begin, begin, *steps]
    order = [(what, event) for what, event in lane.log if what in ("wait side", "upload")]
    gates = [event for what, event in order if what == "wait side"]
    assert gates[:8] == expected[:8]
    for index, (what, _) in enumerate(order[:16]):
        assert what == ("upload" if index % 2 else "wait side")


def test_pinned_memory_is_made_once_and_kept_between_passes(lane: LateCopies) -> None:
    batches = late(numbered(10), lane, depth=2)
    list(batches)
    assert lane.num_pinned_bytes == [64, 64, 64]
    for _ in range(3):
        held = list(batches)
        lane.finish()
        assert checksums(held) == checksums(numbered(10))
    assert len(lane.num_pinned_bytes) == 3


def test_buffers_grow_for_odd_shapes_and_serve_smaller_ones(lane: LateCopies) -> None:
    shapes = [(4,), (9, 3), (1,), (0, 5), (), (64,), (5, 5), (2, 2, 2)]
    dtypes = [torch.float32, torch.int64, torch.bool, torch.bfloat16, torch.complex64, torch.uint8]
    batches = [torch.randint(0, 2, shape).to(dtype) for _ in range(3) for shape in shapes for dtype in dtypes]
    held = list(late(batches, lane, depth=1))
    lane.finish()
    for batch, expected in zip(held, batches, strict=True):
        assert batch.dtype == expected.dtype
        assert torch.equal(batch, expected)
    assert len(lane.num_pinned_bytes) <= 2 * 11  # two slots, and at most one growth for each power of two to 1 KiB


def test_lengths_that_creep_up_pin_a_few_times_only(lane: LateCopies) -> None:
    list(late([torch.zeros(length, dtype=torch.uint8) for length in range(1, 257)], lane, depth=1))
    assert len(lane.num_pinned_bytes) <= 2 * 9  # two slots, and a buffer for each power of two from 1 to 256


def test_memory_format_is_kept_and_gaps_are_closed(lane: LateCopies) -> None:
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    sliced = torch.arange(40).reshape(4, 10)[:, ::2]
    expanded = torch.tensor([7.0]).expand(6)
    [(a, b, c, d)] = late([(image, sliced, expanded, image.mT)], lane)
    lane.finish()
    assert a.is_contiguous(memory_format=torch.channels_last)
    for got, given_ in zip((a, b, c, d), (image, sliced, expanded, image.mT), strict=True):
        assert torch.equal(got, given_)
        assert got.stride() == torch.empty_like(given_).stride()


def test_one_shape_may_change_its_memory_format_between_batches(lane: LateCopies) -> None:
    plain = torch.randn(2, 3, 4, 5)
    batches = [plain, plain.to(memory_format=torch.channels_last)] * 4
    held = list(late(batches, lane))
    lane.finish()
    assert [batch.stride() for batch in held] == [batch.stride() for batch in batches]
    assert all(torch.equal(batch, plain) for batch in held)


def test_tensors_that_the_user_pinned_are_not_staged_and_live_until_their_copy(lane: LateCopies) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def pinned_loader() -> Iterator[Tensor]:
        for index in range(5):
            tensor = torch.full((4,), float(index))
            tensor.pinned_by_user = True
            alive.append(weakref.ref(tensor))
            yield tensor

    held = list(late(pinned_loader(), lane, depth=1))
    lane.finish()
    assert [float(batch[0]) for batch in held] == [0, 1, 2, 3, 4]
    assert lane.num_pinned_bytes == []
    assert [ref() for ref in alive] == [None] * 5


def test_tensors_on_the_device_pass_through_and_are_claimed(lane: LateCopies) -> None:
    resident = lane.on_device(torch.arange(4))
    [(first, second)] = late([(resident, torch.ones(1))], lane)
    assert first is resident
    assert [value for what, value in lane.log if what == "claim"] == [[resident.data_ptr(), second.data_ptr()]]


def test_tensors_that_are_more_than_their_bytes_are_left_to_torch(lane: LateCopies) -> None:
    class Image(Tensor):
        pass

    leaves = [torch.ones(3, requires_grad=True), torch.ones(3).as_subclass(Image)]
    [moved] = late([leaves], lane)
    assert type(moved[1]) is Image
    assert lane.num_pinned_bytes == []


# Passes


def test_an_empty_source_gives_an_empty_pass(lane: LateCopies) -> None:
    batches = late([], lane)
    assert list(batches) == []
    assert list(batches) == []


def test_each_iter_is_a_new_pass_and_two_at_once_do_not_mix(lane: LateCopies) -> None:
    batches = late(numbered(9), lane)
    pairs = list(zip(batches, batches, strict=True))
    lane.finish()
    assert checksums(a for a, _ in pairs) == checksums(numbered(9))
    assert checksums(b for _, b in pairs) == checksums(numbered(9))
    assert len(lane.num_pinned_bytes) == 6
    held = list(batches)
    lane.finish()
    assert checksums(held) == checksums(numbered(9))
    assert len(lane.num_pinned_bytes) == 6


def test_there_is_a_length_where_the_source_has_one() -> None:
    assert len(prefetch(numbered(5), "cpu")) == 5
    assert not hasattr(prefetch(iter(numbered(5)), "cpu"), "__len__")


def test_a_data_loader_goes_through_whole(lane: LateCopies) -> None:
    data = torch.utils.data.TensorDataset(torch.arange(50.0), torch.arange(50))
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    for _ in range(2):
        held = list(late(loader, lane))
        lane.finish()
        assert sorted(torch.cat([x for x, _ in held]).tolist()) == list(range(50))
        assert all(torch.equal(x.long(), y) for x, y in held)
        assert [len(x) for x, _ in held] == [8] * 6 + [2]


# The CPU, and requests that cannot be met


def test_on_the_cpu_there_is_no_thread_and_close_reaches_the_source() -> None:
    source = Source(numbered(5))
    iterator = iter(prefetch(source, torch.device("cpu")))
    next(iterator)
    assert workers() == []
    assert source.num_pulled == 1
    iterator.close()
    assert source.closed_by == [threading.current_thread().name]


def test_on_the_cpu_errors_come_as_they_are() -> None:
    def failing_loader() -> Iterator[int]:
        yield 1
        raise KeyError("row 2")

    seen: list[int] = []
    with pytest.raises(KeyError, match="row 2"):
        seen.extend(prefetch(failing_loader(), "cpu"))


@pytest.mark.parametrize("depth", [0, -1])
def test_a_depth_below_one_is_refused(depth: int) -> None:
    with pytest.raises(ConfigError, match=rf"depth={depth}: .* 1 or more"):
        prefetch([], "cpu", depth=depth)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "meta", "mps"])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(DeviceError, match=f"'{device}'.*use auto, cpu, cuda"):
        prefetch([], device)


def test_a_cuda_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(stream.torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match="'cuda:2' was asked for, but this machine has 2"):
        prefetch([], "cuda:2")
    monkeypatch.setattr(stream.torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"'cuda' was asked for, but .*use cpu"):
        prefetch([], torch.device("cuda"))
