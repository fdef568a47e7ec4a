"""A device that ends a copy only when something waits for it: the worst there can be for `prefetch`.

Whatever the code does not wait for has not happened yet.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fasttrain.data.stream import Prefetcher

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
