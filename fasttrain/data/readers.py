"""Processes that read a dataset's rows while they are recorded: a loader's own workers, and forked readers."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import struct
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from fasttrain.data.purity import Facts, GlobalGenerators

__all__ = ["ForkedReaders", "ReadRows", "logging_loader"]

Batch = Any
Row = Any


class ForkedReaders:
    """Forked processes that read batches of rows ahead, each every nth batch.

    Args:
        dataset: whose rows.
        items: reads the rows of a batch of keys.
        batches: the keys of each batch, in the order in which `take` asks for them.
        count: how many processes.
    """

    def __init__(
        self,
        dataset: Any,
        items: Callable[[Sequence[Any]], Sequence[Row]],
        batches: Sequence[Sequence[Any]],
        count: int,
    ) -> None:
        self._batches = batches
        self._next = 0
        self._children: list[tuple[int, int]] = []
        for number in range(min(count, len(batches))):
            receiving, sending = os.pipe()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads: it only reads rows
                child = os.fork()
            if child == 0:
                with suppress(BaseException):
                    os.close(receiving)
                    _read_ahead(dataset, items, batches[number::count], sending)
                os._exit(0)
            os.close(sending)
            self._children.append((child, receiving))

    def take(self, keys: Sequence[Any]) -> ReadRows | None:
        """The rows of the next batch; None where that is one of other keys, or no process reads any more."""
        if self._next >= len(self._batches) or list(keys) != list(self._batches[self._next]):
            self.close()
            return None
        _, receiving = self._children[self._next % len(self._children)]
        self._next += 1
        written = _received(receiving)
        if written is None:
            self.close()
            return None
        return pickle.loads(written)  # by a child of this process

    def close(self) -> None:
        """Ends the processes."""
        for child, receiving in self._children:
            os.close(receiving)
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(child, 0)
        self._children, self._next = [], len(self._batches)

    def __del__(self) -> None:
        self.close()


def _read_ahead(
    dataset: Any, items: Callable[[Sequence[Any]], Sequence[Row]], batches: Sequence[Sequence[Any]], sending: int
) -> None:
    torch.set_num_threads(1)  # the threads of the parent are not there
    sys.stdout = sys.stderr = open(os.devnull, "w")
    facts = Facts(dataset)
    with open(sending, "wb") as stream:
        for keys in batches:
            generators, begin = GlobalGenerators(), time.perf_counter()
            rows = items(keys)
            found = ReadRows(list(rows), time.perf_counter() - begin, generators.moved())
            found.changed = next((each.name for each in facts.changed() if not each.is_harmless), None)
            written = pickle.dumps(found)
            stream.write(struct.pack("<q", len(written)))
            stream.write(written)
            stream.flush()


def _received(receiving: int) -> bytes | None:
    """One message; None where its sender has ended."""
    head = _exactly(receiving, 8)
    return None if head is None else _exactly(receiving, struct.unpack("<q", head)[0])


def _exactly(receiving: int, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        part = os.read(receiving, min(1 << 20, size - len(parts)))
        if not part:
            return None
        parts += part
    return bytes(parts)


def logging_loader(loader: DataLoader[Any], order: list[Any]) -> DataLoader[Any]:
    """A loader of the same batches, each with the rows that it is made of, pickled.

    Args:
        loader: with workers.
        order: takes up the indices of each batch when they are drawn.
    """
    found = copy.copy(loader)
    is_batched = loader.batch_sampler is not None
    sampler = _Logged(loader.batch_sampler if is_batched else loader.sampler, order)
    vars(found).update(
        {
            "batch_sampler" if is_batched else "sampler": sampler,
            "dataset": _Reader(loader.dataset),
            "collate_fn": _Packed(loader.collate_fn, is_batched=is_batched),
        }
    )
    return found


class _Logged:
    """A sampler whose batches are noted as they are drawn."""

    def __init__(self, sampler: Any, order: list[Any]) -> None:
        self._sampler, self._order = sampler, order

    def __iter__(self) -> Iterator[Any]:
        return _LoggedIterator(iter(self._sampler), self._order)

    def __len__(self) -> int:
        return len(self._sampler)


class _LoggedIterator(Iterator[Any]):
    def __init__(self, found: Iterator[Any], order: list[Any]) -> None:
        self._found, self._order = found, order

    def __next__(self) -> Any:
        keys = next(self._found)
        self._order.append(keys)
        return keys


@dataclass
class ReadRows:
    """Rows as a worker has read them.

    Attributes:
        rows: see above.
        seconds: that it took.
        drawn: the generator that they were drawn from.
        why_collated_there: why `collate_fn` gives other batches elsewhere.
        changed: what has changed in the dataset while they were read.
    """

    rows: Sequence[Row]
    seconds: float
    drawn: str | None
    why_collated_there: str | None = None
    changed: str | None = None


class _Reader:
    """A dataset in a worker, whose rows come as `ReadRows`. All else is the dataset's."""

    def __init__(self, dataset: Any) -> None:
        object.__setattr__(self, "_dataset", dataset)

    def __getattr__(self, name: str) -> Any:
        if name in ("_dataset", "__setstate__", "__getstate__"):
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._dataset, name, value)

    def __reduce__(self) -> Any:
        return _Reader, (self._dataset,)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, key: Any) -> ReadRows:
        return self._read(lambda: [self._dataset[key]])

    def __getitems__(self, keys: list[Any]) -> ReadRows:
        many = getattr(self._dataset, "__getitems__", None)
        return self._read(lambda: many(keys) if many else [self._dataset[key] for key in keys])

    def _read(self, read: Callable[[], Sequence[Row]]) -> ReadRows:
        generators, begin = GlobalGenerators(), time.perf_counter()
        rows = read()
        return ReadRows(rows, time.perf_counter() - begin, generators.moved())


class _Packed:
    """A `collate_fn` in a worker, whose batches come with the rows that they are made of.

    Rows travel as bytes: a tensor by itself would take an open file.
    """

    def __init__(self, collate: Callable[[Any], Batch], *, is_batched: bool) -> None:
        self._collate, self._is_batched = collate, is_batched
        self._facts: Facts | None = None

    def __call__(self, read: ReadRows) -> tuple[bytes, Batch]:
        self._facts = self._facts or Facts(self._collate)
        packed, generators = pickle.dumps(list(read.rows)), GlobalGenerators()
        batch = self._collate(read.rows if self._is_batched else read.rows[0])
        drawn, changed = generators.moved(), self._facts.difference()
        if drawn is not None:
            read.why_collated_there = f"draws from {drawn}"
        elif changed is not None:
            read.why_collated_there = f"changes {changed}"
        read.rows = pickle.loads(packed)  # as they were before collate_fn had them
        return pickle.dumps(read), batch

    def __reduce__(self) -> Any:
        return partial(_Packed, is_batched=self._is_batched), (self._collate,)
