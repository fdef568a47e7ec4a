"""`prefetch` without a GPU: a fake lane drives the ring, and ends a copy only when something waits for it.

That is the worst device there can be: whatever the code does not wait for has not happened yet.
"""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import threading
import traceback
import weakref
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from fasttrain.data import stream
from fasttrain.data.stream import Prefetcher, prefetch
from fasttrain.errors import ConfigError, DeviceError

PATIENCE_S = 10  # how long a test waits for what must happen; none waits for what must not


class LateCopies:
    """A stand-in for `_CudaLane`: a copy is queued until something waits for it or reads its result."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._pending: list[tuple[Tensor, Callable[[], Tensor | None]]] = []
        self._num_done = 0
        self._device_storages: set[int] = set()
        self._kept: list[Tensor] = []
        self._in_worker = threading.local()
        self.num_pinned_bytes: list[int] = []
        self.log: list[tuple[str, Any]] = []

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        self._in_worker.yes = True
        yield
        self._in_worker.yes = False

    def pinned(self, num_bytes: int) -> Tensor:
        self.num_pinned_bytes.append(num_bytes)
        return torch.full((num_bytes,), 0xAB, dtype=torch.uint8)

    def is_pinned(self, leaf: Tensor) -> bool:
        return getattr(leaf, "pinned_by_user", False)

    def holds(self, leaf: Tensor) -> bool:
        return leaf.numel() > 0 and leaf.data_ptr() in self._device_storages

    def upload(self, host: Tensor) -> Tensor:
        target = torch.empty_like(host)
        with self._lock:
            self._kept.append(target)  # so that no other tensor gets its address
            self._device_storages.add(target.data_ptr())
            self._pending.append((target, weakref.ref(host) if self.is_pinned(host) else lambda: host))
        self.log.append(("upload", tuple(host.shape)))
        return target

    def record(self) -> LateEvent:
        where = "side" if getattr(self._in_worker, "yes", False) else "consumer"
        with self._lock:
            event = LateEvent(self, self._num_done + len(self._pending), where)
        self.log.append(("record " + where, event))
        return event

    def wait(self, event: LateEvent) -> None:
        where = "side" if getattr(self._in_worker, "yes", False) else "consumer"
        assert event.where != where, "a stream that waits for itself orders nothing"
        self.log.append(("wait " + where, event))

    def claim(self, tensors: list[Tensor]) -> None:
        assert not getattr(self._in_worker, "yes", False)
        self.log.append(("claim", [tensor.data_ptr() for tensor in tensors]))

    def finish(self, num_copies: int | None = None) -> None:
        """Runs the copies that are queued, oldest first, up to the given count since the start."""
        with self._lock:
            while self._pending and (num_copies is None or self._num_done < num_copies):
                target, source = self._pending.pop(0)
                host = source()
                assert host is not None, "a pinned tensor was freed before its copy"
                target.copy_(host)
                self._num_done += 1

    def on_device(self, tensor: Tensor) -> Tensor:
        """A tensor of the fake device, outside of any batch."""
        target = self.upload(tensor)
        self.finish()
        return target


class LateEvent:
    def __init__(self, lane: LateCopies, num_copies: int, where: str) -> None:
        self._lane = lane
        self._num_copies = num_copies
        self.where = where

    def synchronize(self) -> None:
        self._lane.finish(self._num_copies)


@pytest.fixture
def lane() -> LateCopies:
    return LateCopies()


@pytest.fixture(autouse=True)
def _no_worker_left() -> Iterator[None]:
    yield
    assert workers() == []


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fasttrain-prefetch"]


def late(source: Iterable[Any], lane: LateCopies, depth: int = 2) -> Prefetcher[Any]:
    return Prefetcher(source, lane, depth)


def checksums(batches: Iterable[Tensor]) -> list[float]:
    weights = torch.arange(1, 65, dtype=torch.float64)
    return [float((batch.flatten().double() * weights[: batch.numel()]).sum()) for batch in batches]


def numbered(num_batches: int, size: int = 8) -> list[Tensor]:
    return [torch.arange(size) + 100 * index for index in range(num_batches)]


class Source:
    """An iterator that counts what was pulled from it and whether it was closed, and by whom."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = iter(batches)
        self.num_pulled = 0
        self.closed_by: list[str] = []
        self.pulled = threading.Condition()

    def __iter__(self) -> Source:
        return self

    def __next__(self) -> Any:
        batch = next(self._batches)
        with self.pulled:
            self.num_pulled += 1
            self.pulled.notify_all()
        return batch

    def close(self) -> None:
        self.closed_by.append(threading.current_thread().name)

    def wait_for(self, num_pulled: int) -> None:
        with self.pulled:
            assert self.pulled.wait_for(lambda: self.num_pulled >= num_pulled, PATIENCE_S)


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


# The end of a pass


def test_an_error_of_the_loader_comes_at_its_place_with_its_traceback(lane: LateCopies) -> None:
    def failing_loader() -> Iterator[Tensor]:
        yield from numbered(3)
        raise KeyError("row 384")

    iterator = iter(late(failing_loader(), lane, depth=5))
    held = [next(iterator) for _ in range(3)]
    with pytest.raises(KeyError, match="row 384") as caught:
        next(iterator)
    assert "failing_loader" in [entry.name for entry in traceback.extract_tb(caught.value.__traceback__)]
    assert workers() == []
    assert lane._pending == []
    assert next(iterator, None) is None
    assert checksums(held) == checksums(numbered(3))


def test_an_error_of_a_copy_reaches_the_consumer_and_the_next_pass_starts_afresh(
    lane: LateCopies, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = late(numbered(4), lane)
    with monkeypatch.context() as patch:
        patch.setattr(lane, "upload", lambda host: (_ for _ in ()).throw(MemoryError("device full")))
        with pytest.raises(MemoryError, match="device full"):
            list(batches)
    held = list(batches)
    lane.finish()
    assert checksums(held) == checksums(numbered(4))


def test_an_error_leaves_no_cycle_that_holds_the_callers_frames(lane: LateCopies) -> None:
    class Marker:
        pass

    def failing_loader() -> Iterator[Tensor]:
        raise ValueError("bad")
        yield

    def consume() -> weakref.ref[Marker]:
        marker = Marker()
        with pytest.raises(ValueError, match="bad"):
            list(late(failing_loader(), lane))
        return weakref.ref(marker)

    gc.collect()
    gc.disable()
    try:
        ref = consume()
        assert ref() is None
    finally:
        gc.enable()


def test_an_error_of_iter_itself_is_raised_at_once(lane: LateCopies) -> None:
    with pytest.raises(TypeError, match="not iterable"):
        iter(late(3, lane))


@pytest.mark.parametrize("num_taken", [0, 1, 7])
def test_break_joins_the_worker_and_closes_the_source(lane: LateCopies, num_taken: int) -> None:
    source = Source(numbered(30))
    iterator = iter(late(source, lane))
    for _ in range(num_taken):
        next(iterator)
    del iterator
    assert workers() == []
    assert source.closed_by == ["fasttrain-prefetch"]
    assert source.num_pulled <= num_taken + 3


def test_a_for_loop_left_by_an_error_of_the_consumer_ends_the_pass(lane: LateCopies) -> None:
    source = Source(numbered(30))

    def consume() -> None:
        for _ in late(source, lane):
            raise RuntimeError("step failed")

    with pytest.raises(RuntimeError, match="step failed"):
        consume()
    gc.collect()
    assert source.closed_by == ["fasttrain-prefetch"]


def test_close_ends_the_pass_and_drops_what_was_loaded_ahead(lane: LateCopies) -> None:
    source = Source(numbered(30))
    iterator = iter(late(source, lane))
    next(iterator)
    source.wait_for(3)
    iterator.close()
    assert workers() == []
    assert next(iterator, None) is None
    iterator.close()
    assert source.closed_by == ["fasttrain-prefetch"]
    assert iterator._worker.ready.empty()


def test_an_early_end_waits_for_the_copies_under_way(lane: LateCopies) -> None:
    iterator = iter(late(Source(numbered(30)), lane))
    batch = next(iterator)
    iterator.close()
    assert lane._pending == []
    assert checksums([batch]) == checksums(numbered(1))


def test_a_loader_error_that_was_loaded_ahead_is_not_raised_after_a_break(lane: LateCopies) -> None:
    def failing_loader() -> Iterator[Tensor]:
        yield from numbered(2)
        raise KeyError("never reached by the consumer")

    iterator = iter(late(failing_loader(), lane))
    next(iterator)
    iterator.close()


def test_an_error_of_closing_the_source_is_raised(lane: LateCopies) -> None:
    def careless() -> Iterator[Tensor]:
        try:
            yield from numbered(9)
        finally:
            raise OSError("cannot remove the spool")

    iterator = iter(late(careless(), lane))
    next(iterator)
    with pytest.raises(OSError, match="spool"):
        iterator.close()


def test_ctrl_c_while_the_consumer_waits_ends_the_pass(lane: LateCopies, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(numbered(30))
    iterator = iter(late(source, lane))
    next(iterator)

    def interrupt(event: LateEvent) -> None:
        raise KeyboardInterrupt

    original = lane.wait
    side = lane._in_worker
    monkeypatch.setattr(
        lane, "wait", lambda event: original(event) if getattr(side, "yes", False) else interrupt(event)
    )
    with pytest.raises(KeyboardInterrupt):
        next(iterator)
    assert workers() == []
    assert source.closed_by == ["fasttrain-prefetch"]


def test_a_pass_in_a_reference_cycle_is_ended_by_the_collector(lane: LateCopies) -> None:
    source = Source(numbered(30))
    iterator = iter(late(source, lane))
    next(iterator)
    cycle: list[Any] = [iterator]
    cycle.append(cycle)
    del iterator, cycle
    gc.collect()
    assert workers() == []
    assert source.closed_by == ["fasttrain-prefetch"]


def test_an_exhausted_source_is_not_closed(lane: LateCopies) -> None:
    source = Source(numbered(4))
    list(late(source, lane))
    assert source.closed_by == []


def test_a_process_ends_with_a_pass_still_open() -> None:
    program = """
import torch
from tests.data.test_stream import LateCopies, late, numbered
iterator = iter(late(numbered(30), LateCopies()))
print(next(iterator).shape)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "torch.Size([8])\n", "")


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


# Structures


class Pair(NamedTuple):
    ids: Any
    target: Any


@dataclass(frozen=True, slots=True)
class Frozen:
    ids: Any
    target: Any


@dataclass
class Checked:
    ids: Any
    num_made: list[int] = field(default_factory=list)
    half: Any = field(init=False)

    def __post_init__(self) -> None:
        self.num_made.append(1)
        self.half = self.ids / 2


def leaves() -> st.SearchStrategy[Any]:
    tensors = st.builds(
        lambda shape, dtype: torch.arange(int(np.prod(shape))).reshape(shape).to(dtype),
        st.lists(st.integers(0, 4), max_size=3),
        st.sampled_from([torch.float32, torch.int64, torch.uint8, torch.bool, torch.float16]),
    )
    others = st.none() | st.integers() | st.text(max_size=3) | st.just(np.arange(3)) | st.just(torch.Size([2, 3]))
    return tensors | others


def nested() -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.tuples(inner, inner)
            | st.dictionaries(st.text(max_size=2), inner, max_size=3)
            | st.builds(Pair, inner, inner)
            | st.builds(Frozen, inner, inner)
            | st.dictionaries(st.text(max_size=2), inner, max_size=3).map(OrderedDict)
        ),
        max_leaves=12,
    )


def assert_same(got: Any, expected: Any) -> None:
    assert type(got) is type(expected)
    if isinstance(expected, Tensor):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
    elif isinstance(expected, dict):
        assert list(got) == list(expected)
        for key in expected:
            assert_same(got[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert_same(a, b)
    elif isinstance(expected, Frozen):
        assert_same((got.ids, got.target), (expected.ids, expected.target))
    else:
        assert got is expected


@settings(deadline=None, max_examples=60)
@given(batches=st.lists(nested(), max_size=6), depth=st.integers(1, 3))
def test_any_structure_arrives_as_it_left(batches: list[Any], depth: int) -> None:
    lane = LateCopies()
    held = list(late(batches, lane, depth))
    lane.finish()
    assert len(held) == len(batches)
    for got, expected in zip(held, batches, strict=True):
        assert_same(got, expected)


@settings(deadline=None, max_examples=40)
@given(batch=nested())
def test_on_the_cpu_a_batch_is_yielded_itself(batch: Any) -> None:
    [got] = prefetch([batch], "cpu")
    assert got is batch


def test_what_was_handed_in_is_not_changed(lane: LateCopies) -> None:
    ids = torch.arange(3)
    batch = {"ids": ids, "rest": [ids, Pair(ids, "x")]}
    before = copy.copy(batch)
    [moved] = late([batch], lane)
    assert batch["ids"] is ids
    assert batch["rest"] is before["rest"]
    assert moved["ids"] is not ids
    assert moved["rest"] is not batch["rest"]


def test_dataclasses_are_copied_without_their_constructor(lane: LateCopies) -> None:
    batch = Checked(torch.arange(4.0))
    [moved] = late([batch], lane)
    lane.finish()
    assert moved.num_made == [1]
    assert torch.equal(moved.half, torch.arange(4.0) / 2)
    assert moved.half is not batch.half


def test_kinds_of_mappings_lists_and_tuples_are_kept(lane: LateCopies) -> None:
    class Rows(list[Any]):
        name = "rows"

    grouped: defaultdict[str, Any] = defaultdict(list, ids=torch.ones(2))
    encoded = UserDict(ids=torch.ones(2))
    best = torch.arange(6.0).reshape(2, 3).max(dim=1)
    [moved] = late([(grouped, encoded, Rows([torch.ones(1)]), best)], lane)
    assert [type(part) for part in moved] == [defaultdict, UserDict, Rows, type(best)]
    assert moved[0]["absent"] == []
    assert encoded["ids"] is not moved[1]["ids"]


def test_a_packed_sequence_keeps_its_batch_sizes_on_the_host(lane: LateCopies) -> None:
    packed = pack_sequence([torch.arange(3), torch.arange(2)], enforce_sorted=False)
    [moved] = late([packed], lane)
    lane.finish()
    assert type(moved) is PackedSequence
    assert moved.batch_sizes is packed.batch_sizes
    assert moved.data is not packed.data
    assert torch.equal(moved.unsorted_indices, packed.unsorted_indices)


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
    with pytest.raises(DeviceError, match=f"'{device}'.*use 'cpu', 'cuda'"):
        prefetch([], device)


def test_a_cuda_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(stream.torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match="'cuda:2': this machine has 2 usable CUDA devices"):
        prefetch([], "cuda:2")
    monkeypatch.setattr(stream.torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="'cuda': this machine has 0 usable CUDA devices; use 'cpu'"):
        prefetch([], torch.device("cuda"))
