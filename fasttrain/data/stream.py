"""Batches brought to the device ahead of the step that uses them.

Each pass over a `Prefetcher` has one worker thread. It pulls a batch from the user's iterable, writes it into
a slot of pinned memory and starts its copies to the device on a side stream. Two queues join the threads:

    worker  ── ready: a batch on the device, the event of its copies ──>  consumer
    worker  <── credits: the event after the step that used a batch  ──  consumer

Three rules keep the data whole and the memory bounded:

1. A slot is written again only after the event of the copies out of it. The worker waits for it, on the host.
2. The consumer's stream waits for that event, on the device, and each tensor is recorded on that stream, so
   that the allocator gives its memory to no later copy while a queued step still reads it.
3. The copies of batch n + depth + 1 wait, on the device, for the step of batch n. Without this the device
   memory in flight would grow with how far Python runs ahead of the device.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import cycle
from queue import SimpleQueue
from typing import Any, Generic, NoReturn, TypeVar, cast

import torch
from torch import Tensor

from fasttrain.data.batch import map_tensors
from fasttrain.device import resolve_device
from fasttrain.errors import ConfigError

__all__ = ["Prefetcher", "prefetch"]

T = TypeVar("T")

COLLECTED_S = 5.0
"""How long a pass that nobody refers to any more waits for its worker to end."""


def prefetch(batches: Iterable[T], device: torch.device | str, *, depth: int = 2) -> Prefetcher[T]:
    """Yields the same batches, with their tensors on `device` before they are asked for.

    On CUDA a worker thread stays up to `depth` batches ahead. On the CPU there is no thread, and a batch that
    is there already is yielded as it is.

    Tensors are found in tuples, lists, dicts, namedtuples and dataclasses, nested in any way, and keep shape,
    dtype and memory format. Tensors already on `device`, and all that is no tensor, are passed through.

    What is yielded belongs to the caller. The iterable runs in the worker thread, ahead of the consumer. If
    it draws random numbers, give it a generator of its own. If it yields pinned tensors, which are copied
    from as they lie, it must not write to them again.

    Args:
        batches: a DataLoader or any other iterable; each pass calls `iter(batches)`, in the caller's thread.
        device: where the tensors go, "cpu" or a CUDA device.
        depth: batches that are kept ready beyond the one in use, 1 or more.

    Returns:
        An iterable for any number of passes, in turn or at once, with a length where `batches` has one.

    Raises:
        ConfigError: `depth` is below 1.
        DeviceError: `device` is unknown, or this machine does not have it.
    """
    if depth < 1:
        raise ConfigError(f"depth={depth}: prefetch needs a depth of 1 or more; 2 is the default")
    place = resolve_device(device)
    if place == torch.device("cuda"):
        place = torch.device("cuda", torch.cuda.current_device())
    lane = _CudaLane(place) if place.type == "cuda" else None
    kind = _SizedPrefetcher if isinstance(batches, Sized) else Prefetcher
    return kind(batches, lane, depth)


class Prefetcher(Generic[T]):
    """A re-iterable source of batches on the device, made by `prefetch`.

    Its iterators have a `close()`, as generators do. A pass that ends early (`break`, an exception,
    `close()`, garbage collection, end of the process) lets the iterable finish the batch it is working on,
    calls `close()` on the iterable's own iterator where it has one, and joins the worker. Every end of a
    pass waits for the copies under way. Pinned memory is kept for the next pass.

    An error of the iterable is raised after the batches that came before it, as the object that it raised.

    While a pass is open, capture CUDA graphs with `capture_error_mode="thread_local"`: the worker allocates.
    """

    def __init__(self, batches: Iterable[T], lane: _CudaLane | None, depth: int) -> None:
        self._batches = batches
        self._lane = lane
        self._depth = depth
        self._spares: list[list[_Slot]] = []

    def __iter__(self) -> _Pass[T] | Generator[T, None, None]:
        """Starts a pass."""
        iterator = iter(self._batches)
        if self._lane is None:
            return _on_cpu(iterator)
        return _Pass(_Worker(iterator, self._lane, self._spares, self._depth))


class _SizedPrefetcher(Prefetcher[T]):
    def __len__(self) -> int:
        return len(cast(Sized, self._batches))


def _on_cpu(iterator: Iterator[T]) -> Generator[T, None, None]:
    try:
        for batch in iterator:
            # HOST READ: only where a tensor of the batch is on another device.
            yield map_tensors(batch, lambda leaf: leaf.to("cpu"))
    except BaseException:
        _close(iterator)
        raise


def _close(iterator: Iterator[Any]) -> None:
    getattr(iterator, "close", lambda: None)()


class _CudaLane:
    """What the ring asks of CUDA; `record`, `wait`, `claim` concern the calling thread's current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # One stream for all passes: the allocator pools blocks by stream, and a new one for each pass would
        # strand the blocks of the pass before (pytorch-image-models#2784).
        self._stream = torch.cuda.Stream(device)

    def side_stream(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream)

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def is_pinned(self, leaf: Tensor) -> bool:
        return leaf.is_pinned()

    def holds(self, leaf: Tensor) -> bool:
        return leaf.device == self._device

    def upload(self, host: Tensor) -> Tensor:
        return host.to(self._device, non_blocking=True)

    def record(self) -> torch.cuda.Event:
        # blocking: the worker's wait sleeps, where the default would spin on a core that the loader needs.
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def claim(self, tensors: list[Tensor]) -> None:
        stream = torch.cuda.current_stream(self._device)
        for tensor in tensors:
            tensor.record_stream(stream)


@dataclass(eq=False)
class _Loaded:
    """A batch whose copies have started: its structure, its tensors, the event after the copies."""

    batch: Any
    tensors: list[Tensor]
    copied: torch.cuda.Event


@dataclass(eq=False)
class _Slot:
    """Pinned memory for one batch; by the tensor's position a flat buffer, which only grows, and a view into it."""

    buffers: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    views: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    sources: list[Tensor] = field(default_factory=list[Tensor])
    copied: torch.cuda.Event | None = None

    def reclaim(self) -> None:
        """Waits until the copies out of this slot have finished."""
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None
        self.sources.clear()

    def load(self, batch: Any, lane: _CudaLane) -> _Loaded:
        """Writes a batch into this slot and starts the copies to the device."""
        tensors: list[Tensor] = []

        def move(leaf: Tensor) -> Tensor:
            if lane.holds(leaf):
                moved = leaf
            elif _is_plain(leaf) and not lane.is_pinned(leaf):
                moved = lane.upload(self._stage(len(tensors), leaf, lane))
            else:
                self.sources.append(leaf)
                moved = lane.upload(leaf)
            tensors.append(moved)
            return moved

        moved = map_tensors(batch, move)
        self.copied = lane.record()
        return _Loaded(moved, tensors, self.copied)

    def _stage(self, position: int, leaf: Tensor, lane: _CudaLane) -> Tensor:
        view = self.views.get(position)
        if view is None or (view.shape, view.dtype, view.stride()) != (leaf.shape, leaf.dtype, leaf.stride()):
            view = self.views[position] = self._view_for(position, leaf, lane)
        return view.copy_(leaf)

    def _view_for(self, position: int, leaf: Tensor, lane: _CudaLane) -> Tensor:
        num_bytes = leaf.numel() * leaf.element_size()
        buffer = self.buffers.get(position)
        if buffer is None or buffer.numel() < num_bytes:
            # Powers of two: pinning takes milliseconds, and batches that creep up must not pin each time.
            buffer = self.buffers[position] = lane.pinned(1 << max(num_bytes - 1, 0).bit_length())
        # The strides that Tensor.to would choose: channels_last stays channels_last, gaps and overlaps go.
        strides = torch.empty_like(leaf, device="meta").stride()
        return buffer[:num_bytes].view(leaf.dtype).as_strided(leaf.shape, strides)


def _is_plain(leaf: Tensor) -> bool:
    """Whether a tensor is no more than its bytes, shape and dtype; any other is left to `Tensor.to`."""
    is_special = leaf.requires_grad or leaf.is_quantized or leaf.is_nested or leaf.layout is not torch.strided
    return type(leaf) is Tensor and leaf.is_cpu and not is_special


class _Worker:
    """The producing side of a pass. It does not know the consuming side, so that that can be collected."""

    def __init__(self, source: Iterator[Any], lane: _CudaLane, spares: list[list[_Slot]], depth: int) -> None:
        self.lane = lane
        self.ready: SimpleQueue[_Loaded | None] = SimpleQueue()
        self.credits: SimpleQueue[torch.cuda.Event] = SimpleQueue()
        self._source = source
        self._ring = spares.pop() if spares else [_Slot() for _ in range(depth + 1)]
        self._spares = spares
        self._is_stopped = False
        self._is_exhausted = False
        self.error: BaseException | None = None
        self._close_error: BaseException | None = None
        # What the caller has queued so far comes before anything that the iterable does on the device.
        self._begin = lane.record()
        for _ in self._ring:
            self.credits.put(self._begin)
        # daemon: a pass still open at the end of the process must not hold it up; weakref.finalize stops it.
        self._thread = threading.Thread(target=self._run, name="fasttrain-prefetch", daemon=True)
        self._thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """Ends the pass from the consumer's side and raises what closing the iterable's iterator raised.

        Args:
            timeout: seconds to wait for the worker's end, which it comes to by itself; None: as long as it takes.
        """
        self._is_stopped = True
        self.credits.put(self._begin)  # wakes a worker that waits for room
        if threading.current_thread() is self._thread:
            return  # the garbage collector came by in the worker itself, which ends on its own
        self._thread.join(timeout)
        if self._thread.is_alive():
            return
        self.error = None  # of a batch that nobody asked for
        while not self.ready.empty():
            self.ready.get()
        if self._close_error is not None:
            raise self._close_error

    def _run(self) -> None:
        self.error = _error_of(self._feed)
        self.ready.put(None)
        if not self._is_exhausted:
            self._close_error = _error_of(lambda: _close(self._source))
        del self._source  # a DataLoader's processes end with its iterator

    def _feed(self) -> None:
        with self.lane.side_stream():
            try:
                for slot in cycle(self._ring):
                    self.lane.wait(self.credits.get())
                    if self._is_stopped or not self._load_next(slot):
                        break
            finally:
                for slot in self._ring:
                    slot.reclaim()
        # A ring that an error broke off is dropped: its events may not cover the copies that it had started.
        self._spares.append(self._ring)

    def _load_next(self, slot: _Slot) -> bool:
        try:
            batch = next(self._source)
        except StopIteration:
            self._is_exhausted = True
            return False
        slot.reclaim()
        self.ready.put(slot.load(batch, self.lane))
        return True


def _error_of(action: Callable[[], None]) -> BaseException | None:
    # BaseException: whatever ends the worker must reach the consumer, which would wait for ever without it.
    try:
        action()
    except BaseException as error:
        return error
    return None


class _Pass(Iterator[T]):
    """The consuming side of one pass."""

    def __init__(self, worker: _Worker) -> None:
        self._worker = worker
        self._owes_credit = False
        # The collector may come by while this thread holds a lock that the worker needs to end (`threading.enumerate`
        # holds one), so that it must not wait for ever.
        self._finalizer = weakref.finalize(self, worker.stop, COLLECTED_S)

    def __next__(self) -> T:
        if not self._finalizer.alive:
            raise StopIteration
        try:
            item = self._take()
        except BaseException:  # a KeyboardInterrupt, above all
            self.close()
            raise
        if item is None:
            self._finish()
        return item.batch

    def close(self) -> None:
        """Ends the pass, as a generator's `close` does; the worker has ended when this returns."""
        if self._finalizer.detach() is not None:
            self._worker.stop()

    def _take(self) -> _Loaded | None:
        worker = self._worker
        if self._owes_credit:
            worker.credits.put(worker.lane.record())
        item = worker.ready.get()
        self._owes_credit = True
        if item is not None:
            worker.lane.wait(item.copied)
            worker.lane.claim(item.tensors)
        return item

    def _finish(self) -> NoReturn:
        error = self._worker.error
        try:
            self.close()
        finally:
            try:
                raise error if error is not None else StopIteration
            finally:
                del error  # its traceback holds this frame: as a cycle it would keep the caller's tensors alive
