"""A `DataLoader` over columns of tensors, read as resident data: the loader's own batches, in its own order.

The order is drawn from the same generators, at the same moments, as the loader draws it: after an epoch they are in the
state in which the loader leaves them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)
from torch.utils.data.distributed import DistributedSampler

from fasttrain.data.batch import map_tensors
from fasttrain.data.columns import Column, DenseColumn
from fasttrain.data.resident import ResidentBatches, ResidentEpoch, Span
from fasttrain.device import Choice, free_bytes
from fasttrain.errors import DataError

__all__ = [
    "IndexBatches",
    "LoaderEpoch",
    "Replayable",
    "ReplayedBatches",
    "Sources",
    "is_plain_batching",
    "resident_loader",
]

Batch = Any

MOST_KEPT = 2
"""Loaders whose resident batches are kept: usually one of the train and one of the validation split."""

MOST_COMPARED = 4_096
"""Indices of a `Subset` that are compared before each step; those of a longer one are before each pass."""

_SAMPLERS = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler)

_OWN_METHODS = ("__iter__", "__getitem__", "__getitems__", "__len__")


class IndexBatches(Iterator[Any]):
    """The indices that one pass of a loader reads, one batch at a time, drawn when the loader would draw them.

    A loader draws a seed for its workers at the start of a pass, also without workers, and reads its sampler
    `prefetch_factor * num_workers` batches ahead.

    Args:
        loader: over a map-style dataset.
        is_first_pass: a loader with persistent workers draws the seed in its first pass only.
    """

    def __init__(self, loader: DataLoader[Any], *, is_first_pass: bool = True) -> None:
        sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        has_workers = loader.num_workers > 0
        self._indices = iter(sampler)
        if _draw_seed(loader, is_first_pass=is_first_pass) and has_workers:
            self._indices = iter(sampler)  # so does the loader: a sampler may draw when it is asked for an iterator
        self._ahead: list[Any] = []
        self._is_ahead = has_workers
        for _ in range((loader.prefetch_factor or 0) * loader.num_workers):
            self._read()

    def __iter__(self) -> IndexBatches:
        """Itself."""
        return self

    def __next__(self) -> Any:
        """The indices of the next batch: a list, or one index where the loader makes no batches."""
        if not self._is_ahead:
            return next(self._indices)
        if not self._ahead:
            raise StopIteration
        self._read()
        return self._ahead.pop(0)

    def _read(self) -> None:
        missing = object()
        found = next(self._indices, missing)
        if found is not missing:
            self._ahead.append(found)


def _draw_seed(loader: DataLoader[Any], *, is_first_pass: bool) -> bool:
    """Draws the seed for workers as the loader does at the start of a pass; whether it does."""
    is_due = is_first_pass or not (loader.num_workers and loader.persistent_workers)
    if is_due:
        torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
    return is_due


def is_read_ahead(loader: DataLoader[Any]) -> bool:
    """Whether reading all indices of a pass at its first batch draws the same numbers, as seen by everybody else.

    It does where torch's own samplers draw from nobody else's generator, or at the first index alone, and where a
    sampler of the user's own says so by an attribute `reads_ahead = True`.
    """
    sampler = loader.sampler if loader.batch_sampler is None else _inner_sampler(loader.batch_sampler)
    if getattr(sampler, "reads_ahead", False) is True:
        return True
    if type(sampler) is not RandomSampler:
        return type(sampler) in _SAMPLERS and not _is_changed(type(sampler))
    if _is_changed(RandomSampler):
        return False
    if sampler.generator is None:
        return True
    is_one_permutation = not sampler.replacement and sampler.num_samples <= len(sampler.data_source)
    # torch draws another permutation after the last index, which a generator that others use would show.
    return is_one_permutation and sampler.generator is not torch.default_generator


def is_plain_batching(loader: DataLoader[Any]) -> bool:
    """Whether torch's own `BatchSampler` makes the batches, of any sampler."""
    return loader.batch_sampler is not None and _inner_sampler(loader.batch_sampler) is not None


def _inner_sampler(batch_sampler: Any) -> Any:
    """The sampler of torch's own `BatchSampler`; None of any other."""
    is_plain = type(batch_sampler) is BatchSampler and not _is_changed(BatchSampler)
    return batch_sampler.sampler if is_plain else None


def _is_changed(kind: type) -> bool:
    """Whether a class of torch's has a method that is not torch's."""
    methods = [vars(kind)[name] for name in _OWN_METHODS if name in vars(kind)]
    return any(getattr(method, "__module__", None) != kind.__module__ for method in methods)


def why_not_recognised(loader: DataLoader[Any]) -> str:
    """Why a loader, whatever its dataset, is none of those of `resident_loader`; empty where it is one."""
    if type(loader) is not DataLoader or _is_changed(DataLoader):
        return "the loader is not torch's own DataLoader"
    if loader.num_workers:
        return f"the loader has {loader.num_workers} workers"
    if loader.pin_memory:
        return "the loader pins memory"
    if loader.collate_fn is not default_collate:
        return "the loader has a collate_fn of its own"
    sampler = None if loader.batch_sampler is None else _inner_sampler(loader.batch_sampler)
    if sampler is None:
        return "the loader has a batch_sampler that is not torch's own, or makes no batches"
    if type(sampler) not in _SAMPLERS or _is_changed(type(sampler)):
        return f"the loader has a sampler of its own, {type(sampler).__name__}"
    return ""


def resident_loader(loader: DataLoader[Any], device: torch.device) -> LoaderBatches | str:
    """Resident batches that are those of a loader, or why there are none.

    These loaders are recognised: no subclass; over a `TensorDataset`, a `StackDataset` of tensors or of these, or a
    `Subset` of one of them, with the default `collate_fn`, no workers, no pinned memory, and batches made by torch's
    own `BatchSampler` of one of its own samplers.

    Args:
        loader: see above.
        device: where the batches are to be. On the CPU the user's own tensors are read; on another device they are
            copied, and copied again where their versions have changed.
    """
    why_not = why_not_recognised(loader)
    if why_not:
        return why_not
    columns = _Columns(loader.dataset)
    if columns.why_not:
        return columns.why_not
    tensors = columns.read()
    if isinstance(tensors, str):
        return tensors
    others = [each for each in tensors if each.device != device]
    if device.type == "cpu" and others:
        return f"the dataset is on {others[0].device}"
    free = free_bytes(device)
    if others and free is not None and sum(each.nbytes for each in others) > free // 2:
        return f"the dataset does not fit in the memory of {device}"
    return LoaderBatches(loader, columns, tensors, device)


class Sources:
    """Finds resident data behind the iterables that a training loop is given, and keeps what it has found.

    Args:
        device: where the steps run.

    Attributes:
        choice: where the batches of the last pass came from ("resident", "recorded" or "streamed"), and why.
        is_transitional: whether that pass was not resident and the next one over the same batches will be.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: list[LoaderBatches] = []
        self.choice = Choice("streamed", "there was no pass yet")
        self.is_transitional = False

    def of(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """Resident batches that are the same ones, else the iterable itself."""
        if isinstance(batches, Iterator):
            return batches  # a pass that has begun
        self.is_transitional = False
        if isinstance(batches, Replayable):
            found = batches.resident(self._device)
            self.choice, self.is_transitional = batches.choice, batches.is_transitional
            return batches if isinstance(found, str) else found
        if isinstance(batches, ResidentBatches):
            self.choice = Choice("resident", "the batches are resident data")
        elif not isinstance(batches, DataLoader):
            self.choice = Choice("streamed", f"the batches come from a {type(batches).__name__}")
        else:
            return self._of_loader(cast("DataLoader[Any]", batches))
        return batches

    def _of_loader(self, loader: DataLoader[Any]) -> Iterable[Batch]:
        kept = next((each for each in self._kept if each.loader is loader), None)
        is_kept = kept is not None and kept.is_current() and not why_not_recognised(loader)
        found = kept if is_kept and kept is not None else resident_loader(loader, self._device)
        self._kept = [each for each in self._kept if each.loader is not loader]
        if isinstance(found, str):
            self.choice = Choice("streamed", found)
            return loader
        self.choice = Choice("resident", f"the loader's rows are those of a {type(loader.dataset).__name__}")
        self._kept = [*self._kept, found][-MOST_KEPT:]
        return found


class _Columns:
    """The tensors whose rows a dataset gives.

    Args:
        dataset: of a loader.

    Attributes:
        why_not: why the dataset is not recognised; empty where it is.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._subsets: list[Subset[Any]] = []
        while type(dataset) is Subset and not _is_changed(Subset):
            self._subsets.append(cast("Subset[Any]", dataset))
            dataset = cast("Subset[Any]", dataset).dataset
        self._dataset = dataset
        self.why_not = "" if self._is_known(dataset) else f"the dataset, {type(dataset).__name__}, is code of its own"
        self._indices: list[tuple[Sequence[int], np.ndarray]] = []

    def _is_known(self, dataset: Any) -> bool:
        if type(dataset) not in (TensorDataset, StackDataset) or _is_changed(type(dataset)):
            return False
        if type(dataset) is TensorDataset:
            return True
        parts = dataset.datasets.values() if isinstance(dataset.datasets, dict) else dataset.datasets
        return all(isinstance(part, Tensor) or self._is_known(part) for part in parts)

    def stamp(self) -> object:
        """What the rows are gathered by, other than the values of the tensors: equal while that is the same."""
        chain: list[object] = [type(self._dataset)]
        for subset in self._subsets:
            indices = subset.indices
            is_short = isinstance(indices, list) and len(indices) <= MOST_COMPARED
            content = list(indices) if is_short else getattr(indices, "_version", None)
            chain.append((type(subset), id(subset.dataset), id(indices), len(indices), content))
        if self._is_known(self._dataset):
            chain += [
                (id(each), each.data_ptr(), each.shape, each.stride(), each.dtype, each.requires_grad)
                for each in _tensors_of(self._dataset)
            ]
        return chain

    def read(self) -> list[Tensor] | str:
        """The tensors as they are now, or why their rows cannot be gathered."""
        found = list(_tensors_of(self._dataset))
        return next(filter(None, map(_why_not_gathered, found)), "") or found

    def rebuild(self, leaves: Sequence[Any]) -> Batch:
        """A batch of rows, as the default `collate_fn` builds it."""
        return _built(self._dataset, iter(leaves))

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """The rows of the tensors for indices of the dataset, [n], int64."""
        for place, subset in enumerate(self._subsets):
            if place == len(self._indices):
                self._indices.append(((), np.empty(0, dtype=np.int64)))
            known, rows = self._indices[place]
            if not isinstance(subset.indices, list) or known != subset.indices:
                known, rows = list(subset.indices), np.asarray(subset.indices, dtype=np.int64).reshape(-1)
                self._indices[place] = known, rows
            indices = rows[indices]
        num_rows = len(cast("Any", self._dataset))
        if len(indices) and not -num_rows <= indices.min() <= indices.max() < num_rows:
            raise IndexError(f"the sampler gives an index that is out of range for a dataset of {num_rows} rows")
        return np.where(indices < 0, indices + num_rows, indices)


def _tensors_of(dataset: Any) -> Iterator[Tensor]:
    if isinstance(dataset, Tensor):
        yield dataset
    elif type(dataset) is TensorDataset:
        yield from dataset.tensors
    else:
        for part in dataset.datasets.values() if isinstance(dataset.datasets, dict) else dataset.datasets:
            yield from _tensors_of(part)


def _built(dataset: Any, leaves: Iterator[Any]) -> Batch:
    if isinstance(dataset, Tensor):
        return next(leaves)
    if type(dataset) is TensorDataset:
        return [next(leaves) for _ in dataset.tensors]
    if isinstance(dataset.datasets, dict):
        return {name: _built(part, leaves) for name, part in dataset.datasets.items()}
    return [_built(part, leaves) for part in dataset.datasets]


def _why_not_gathered(tensor: Tensor) -> str:
    """Why rows that are gathered from a tensor would not be what `torch.stack` makes of them; empty where they are."""
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        return f"the dataset has a tensor that is no plain one: {type(tensor).__name__}"
    if tensor.requires_grad:
        return "the dataset has a tensor that requires gradients"
    if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg() or tensor.ndim == 0 or len(tensor) == 0:
        return "the dataset has a tensor whose rows are not one after the other in memory"
    if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64) or tensor.device.type == "meta":
        return f"the dataset has a tensor of {tensor.dtype} on {tensor.device}, which cannot be gathered"
    return ""


class ReplayedBatches(ResidentBatches, ABC):
    """Resident batches in the order of a loader, which are the loader's.

    Args:
        loader: with torch's own `BatchSampler`.
        columns: what batches are gathered from.
        rebuild: makes a batch of what is gathered from each column.
        device: where the batches are.

    Attributes:
        loader: see above.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        columns: Sequence[Tensor | Column],
        rebuild: Callable[[Sequence[Any]], Batch],
        device: torch.device,
    ) -> None:
        # Shuffled, so that rows are copied: a batch is the caller's.
        size = cast("BatchSampler", loader.batch_sampler).batch_size
        super().__init__(columns, rebuild, batch_size=size, device=device, shuffle=True, seed=0, drop_last=False)
        self.loader = loader

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.loader)

    @property
    def every_row(self) -> ResidentBatches:
        """Itself: an evaluation has the loader's own batches."""
        return self

    def __iter__(self) -> LoaderEpoch:
        """One pass of the loader."""
        return LoaderEpoch(self)

    @abstractmethod
    def rows_of(self, indices: np.ndarray) -> np.ndarray:
        """The rows for indices of the dataset, [n], int64."""

    @abstractmethod
    def is_current(self) -> bool:
        """Whether batches are gathered from what the loader reads now."""

    @abstractmethod
    def refresh(self) -> bool:
        """Takes up changes of the rows in the middle of a pass; whether what was gathered before is out of date."""


class Replayable(ABC):
    """A loader that a training loop may read as resident data."""

    @property
    @abstractmethod
    def choice(self) -> Choice:
        """Where its batches come from now, and why."""

    @property
    @abstractmethod
    def is_transitional(self) -> bool:
        """Whether the pass that begins now is not resident, and the next one will be."""

    @abstractmethod
    def resident(self, device: torch.device) -> ReplayedBatches | str:
        """Batches of the pass that begins now, or why there are none that are resident."""


class LoaderBatches(ReplayedBatches):
    """The batches of a recognised loader as resident batches (see `resident_loader`).

    The user may change the tensors or replace them, in a pass and between two: a batch is made of the rows as they are
    when the loader would read them. Changes through a numpy array that shares a tensor's memory are seen on the CPU.
    """

    def __init__(
        self, loader: DataLoader[Any], columns: _Columns, tensors: Sequence[Tensor], device: torch.device
    ) -> None:
        super().__init__(loader, tensors, columns.rebuild, device)
        self._known = columns
        self._tensors = list(tensors)
        self._stamp = columns.stamp()
        self._versions = [each._version for each in tensors]  # pyright: ignore[reportPrivateUsage]

    def rows_of(self, indices: np.ndarray) -> np.ndarray:
        """See `ReplayedBatches.rows_of`."""
        return self._known.rows(indices)

    def is_current(self) -> bool:
        """See `ReplayedBatches.is_current`."""
        batch_sampler = cast("BatchSampler", self.loader.batch_sampler)
        return batch_sampler.batch_size == self.batch_size and self._known.stamp() == self._stamp

    def refresh(self) -> bool:
        """See `ReplayedBatches.refresh`: copies tensors that have changed to the device."""
        versions = [each._version for each in self._tensors]  # pyright: ignore[reportPrivateUsage]
        if versions == self._versions:
            # A numpy array may share the memory, and change it without a new version.
            return any(not each.untyped_storage().resizable() for each in self._tensors if each.device.type == "cpu")
        for place, (old, new) in enumerate(zip(self._versions, versions, strict=True)):
            column = self.columns[place]
            if old != new and isinstance(column, DenseColumn) and column.rows.device != self._tensors[place].device:
                column.rows.copy_(self._tensors[place], non_blocking=True)
        self._versions = versions
        return True


class LoaderEpoch(ResidentEpoch):
    """One pass of a loader over resident rows: batches one by one, or several at a time.

    Args:
        source: whose rows.
        is_first_pass: see `IndexBatches`.
    """

    def __init__(self, source: ReplayedBatches, *, is_first_pass: bool = True) -> None:
        super().__init__(source, np.empty(0, dtype=np.int64))
        self._replayed = source
        self._is_read_ahead = is_read_ahead(source.loader)
        self._indices: Iterator[Any] = iter(())
        if self._is_read_ahead:
            _draw_seed(source.loader, is_first_pass=is_first_pass)
        else:
            self._indices = IndexBatches(source.loader, is_first_pass=is_first_pass)
        self._batch_sampler = cast("BatchSampler", source.loader.batch_sampler)
        self._order_of_pass: _Order | None = None
        self._indices_read = np.empty(0, dtype=np.int64)
        self._is_finished = self._is_live = False
        self._collate = source.loader.collate_fn
        self._live_at = 0

    def __next__(self) -> Batch:
        """The next batch."""
        self._read()
        return self._read_live() if self._is_live else super().__next__()

    def take(self, most: int) -> Span | None:
        """See `ResidentEpoch.take`; one batch where the sampler is not to be read ahead."""
        self._read()
        return None if self._is_live else super().take(most)

    def _read(self) -> None:
        """Where no row is left to be given out, reads the rows of the pass, or of its next batch."""
        if not self._is_live and not self._replayed.is_current():
            self._is_live, self._live_at = True, self._next * self._source.batch_size
        if self._replayed.refresh():
            self._block = []
        at = self._live_at if self._is_live else self._next * self._source.batch_size
        if self._is_finished or at < len(self._indices_read):
            return
        if not self._is_read_ahead:
            found = next(self._indices, None)
            self._is_finished = found is None
            if found is not None and any(type(key) is not int for key in found):
                raise DataError(
                    "the sampler gives indices that are no whole numbers: give the loop the loader's batches"
                )
            self._begin(np.empty(0, dtype=np.int64) if found is None else np.asarray(found, dtype=np.int64))
        elif self._order_of_pass is None:
            self._order_of_pass = _Order(self._batch_sampler.sampler)
            sampler: Any = self._batch_sampler.sampler
            is_short_dropped = self._batch_sampler.drop_last
            used = len(self._batch_sampler) * self._source.batch_size if is_short_dropped else len(sampler)
            self._begin(self._order_of_pass.read(used))
        else:
            self._order_of_pass.finish()
            self._is_finished = True

    def _begin(self, indices: np.ndarray) -> None:
        self._indices_read, self._live_at = indices, 0
        self._set_order(np.empty(0, dtype=np.int64) if self._is_live else self._replayed.rows_of(indices))

    def _read_live(self) -> Batch:
        """The next batch as the loader reads it: what it is gathered from was replaced in the middle of the pass."""
        size = self._source.batch_size if self._batch_sampler.drop_last else self._batch_sampler.batch_size
        keys: list[int] = self._indices_read[self._live_at : self._live_at + size].tolist()
        if not keys:
            raise StopIteration
        self._live_at += len(keys)
        dataset: Any = self._replayed.loader.dataset
        many = getattr(dataset, "__getitems__", None)
        batch = self._collate(many(keys) if many else [dataset[key] for key in keys])
        return map_tensors(batch, lambda tensor: tensor.to(self._source.device))


class _Order:
    """The order of one pass of a sampler that is read ahead.

    A permutation is drawn directly: torch's sampler takes 3 ms to give 39,200 numbers one by one, which is a third of
    an epoch of the reviews.

    Args:
        sampler: one of torch's own.
        is_direct: whether permutations are drawn directly; None: where this release of torch draws them so.
    """

    def __init__(self, sampler: Any, *, is_direct: bool | None = None) -> None:
        self._generator: torch.Generator | None = None
        self._size = 0
        if type(sampler) is RandomSampler and not sampler.replacement and is_direct is not False:
            if is_direct or (sampler.num_samples == len(sampler.data_source) and _draws_permutations()):
                self._size = len(sampler.data_source)
            self._generator = sampler.generator
        self._left: Iterator[Any] = iter(()) if self._size else iter(sampler)

    def read(self, count: int) -> np.ndarray:
        """The first numbers, [count], int64."""
        if not self._size:
            return np.fromiter(self._left, dtype=np.int64, count=count) if count else np.empty(0, dtype=np.int64)
        generator = self._generator
        if generator is None:
            generator = torch.Generator()
            generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
        return torch.randperm(self._size, generator=generator).numpy()[:count]

    def finish(self) -> None:
        """Goes past the last number, where torch's sampler draws a permutation more."""
        if self._size and self._generator is not None:
            torch.randperm(self._size, generator=self._generator)
        deque(self._left, maxlen=0)


@cache
def _draws_permutations() -> bool:
    """Whether this release of torch draws a permutation as `_Order` does, by its numbers and its generators' states."""

    def draw(sampler: RandomSampler, *, is_direct: bool) -> tuple[list[int], list[int], list[int]]:
        torch.set_rng_state(before)
        own = torch.Generator() if sampler.generator is None else sampler.generator.manual_seed(7)
        order = _Order(sampler, is_direct=is_direct)
        numbers = order.read(5).tolist()
        order.finish()
        return numbers, torch.get_rng_state().tolist(), own.get_state().tolist()

    before = torch.get_rng_state()
    try:
        samplers = [RandomSampler(range(5), generator=each) for each in (None, torch.Generator())]
        return all(draw(each, is_direct=True) == draw(each, is_direct=False) for each in samplers)
    finally:
        torch.set_rng_state(before)
