"""`record`: a user's own loader whose rows are read once, and replayed from then on in the loader's own batches."""

from __future__ import annotations

import copy
import os
import pickle
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, WeightedRandomSampler, default_collate

from fasttrain.data.kept import Kept, KeptFolder, NotWrittenError, default_folder, key_of
from fasttrain.data.loader import (
    IndexBatches,
    LoaderEpoch,
    Replayable,
    ReplayedBatches,
    is_plain_batching,
    is_read_ahead,
)
from fasttrain.data.purity import Facts, GlobalGenerators, length_of, read_again, same_rows, shares_memory, where
from fasttrain.data.readers import FilesRead, ForkedReaders, ReadRows, logging_loader, stamp_of
from fasttrain.data.rows import NotKeptError, RowStore
from fasttrain.device import Choice, free_bytes
from fasttrain.errors import ConfigError, DataError

__all__ = ["RecordedLoader", "record"]

Batch = Any
Row = Any

MEMORY_SHARE = 0.25
"""The share of the free memory that recorded rows may take, unless `memory_bytes` says otherwise."""

MOST_STATES = 4
"""States of a dataset whose rows are kept: such as a dataset that is switched from split to split."""

CHECKED_ROWS, CHECKED_TOGETHER = 256, 64
CHECKED_SHARE = 0.1
"""So many rows, and then so much of the time that reading takes, are read again in a child while they are recorded,
after the first batch at least CHECKED_TOGETHER at once."""

AUDITED_SHARE = 0.01
"""The share of a replayed pass's time in which rows are read again."""

WATCHED_SHARE = 0.05
"""While rows are recorded, the dataset is compared with what it was before each read, in this share of the time."""

WATCHED_BETWEEN, CHEAP_S = 0.5, 0.001
"""Between two replayed batches, where the caller's code runs, it is compared in WATCHED_BETWEEN of the time at most, if
it takes longer than CHEAP_S."""

WATCH_S = 0.02
"""In a pass of several steps a call, it is compared every so many seconds."""

RECORDING = "rows are recorded while they are read"

LACKED_SHARE = 0.25
"""The share of a sampler's rows, at most, that are read before a pass, so that it can be resident."""

MOST_FILES = 1_000
"""Files, of those that rows were read from, whose size and time are compared at the beginning of a pass."""

OPENED_ROWS = 8
"""So many rows, and AUDITED_SHARE of all, are read again when rows are taken from the disk."""


def record(
    loader: DataLoader[Any],
    *,
    then: Callable[[Row], Row] | None = None,
    workers: int = 0,
    memory_bytes: int | None = None,
    keep: str | Path | bool | None = None,
    keep_bytes: int | None = None,
) -> RecordedLoader:
    """Returns the loader's batches, whose rows are read from the dataset once and replayed from then on.

    Every pass gives the batches that the loader would give, bit for bit: the loader's own sampler, batch sampler and
    generator run live, and so does a `collate_fn` of the user's own. Only rows are replayed, and only where they
    depend on their index alone. `FastLoop` trains on recorded rows as on resident data: several steps a call, without
    Python between them.

    Args:
        loader: over a map-style dataset, with any sampler, `collate_fn` and number of workers.
        then: called with each row of each batch, a copy, before rows are collated: the place of random augmentation
            after what is slow to read. It draws what it would draw at the end of the dataset's `__getitem__`.
        workers: forked processes that read rows ahead in the first pass of a loader that has no workers of its own and
            one of torch's samplers.
        memory_bytes: the most that recorded rows may take; rows beyond are read live. None: a quarter of the memory
            that is free.
        keep: a folder in which recorded rows stay on disk, once all are there: the next process replays from its first
            pass on. True: a folder of fasttrain's own, `~/.cache/fasttrain/records`. Rows must be tensors, numpy
            arrays, numbers and texts of one form. A record is used only where nothing has changed that it was made of:
            the dataset's state and code, the files that rows were read from, versions; some rows are read again
            and compared before it is used, and in every pass. What it cannot see is a file that compiled code opens
            under a name that the dataset does not hold.
        keep_bytes: the most that all records in this folder may take; the one that was not used for longest goes
            first. None: a tenth of what is free on the disk, and 50 GB at most.

    Returns:
        An iterable with the loader's length and attributes; see `RecordedLoader.choice` for what it does.

    Raises:
        ConfigError: it is no `DataLoader`, or its dataset is an `IterableDataset`; the folder cannot be made, or is not
            this user's alone.
    """
    given: Any = loader
    if isinstance(given, RecordedLoader):
        raise ConfigError("this loader is recorded already: give record the DataLoader itself")
    if not isinstance(given, DataLoader):
        raise ConfigError(f"record takes a torch.utils.data.DataLoader; this is a {type(given).__name__}")
    dataset: Any = cast("Any", loader.dataset)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise ConfigError(
            f"{type(dataset).__name__} is an IterableDataset: its rows have no index by which they could be replayed; "
            "give the loader as it is"
        )
    if isinstance(workers, bool) or not isinstance(cast("Any", workers), int) or workers < 0:
        raise ConfigError(f"workers {workers!r}: use a whole number, 0 or more")
    if then is not None and loader.num_workers:
        raise ConfigError(
            f"{where(dataset)}: the loader has {loader.num_workers} workers, which draw random numbers of their own, "
            "and `then` runs in this process: make the loader with num_workers=0"
        )
    if then is not None and not callable(then):
        raise ConfigError(f"then must be a function of a row; it is a {type(then).__name__}")
    if memory_bytes is None:
        memory_bytes = int(MEMORY_SHARE * (free_bytes(torch.device("cpu")) or (4 << 30)))
    return RecordedLoader(loader, then, workers, memory_bytes, _folder(keep, keep_bytes))


def _folder(keep: Any, keep_bytes: Any) -> KeptFolder | None:
    if keep_bytes is not None and (type(keep_bytes) is not int or keep_bytes < 1):
        raise ConfigError(f"keep_bytes {keep_bytes!r}: use a whole number, 1 or more")
    if keep is None or keep is False:
        return None
    if keep is not True and (not isinstance(keep, str | Path) or not str(keep)):
        raise ConfigError(f"keep {keep!r}: use the path of a folder, or True for {default_folder()}")
    return KeptFolder(default_folder() if keep is True else Path(keep).expanduser(), keep_bytes)


class RecordedLoader(Replayable):
    """The batches of a loader, from recorded rows; made by `record`. Attributes that it lacks are the loader's.

    Rows are recorded while the first pass reads them. A row that draws from a random generator, reads a clock, counts
    its reads or differs when it is read again ends the pass with a `DataError`. Where the dataset has changed between
    two passes (an attribute, its code, a global that its code reads, a file), rows are recorded anew.

    Attributes:
        loader, then, workers: see `record`.
        passes: how many have begun.
        folder: where rows are kept on disk; None where they are not.
        about_disk: what became of that.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        then: Callable[[Row], Row] | None,
        workers: int,
        memory_bytes: int,
        folder: KeptFolder | None = None,
    ) -> None:
        self.loader = loader
        self.then = then
        self.workers = workers
        self.folder = folder
        self.about_disk = ""
        self._memory_bytes = memory_bytes
        self._recordings: list[_Recording] = []
        self.passes = 0
        self._why_live = ""
        self._is_transitional = False
        self._by_workers: Iterable[tuple[bytes, Batch]] | None = None
        self._choice = Choice("streamed", RECORDING)

    def __len__(self) -> int:
        """Batches in a pass."""
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        """An attribute of the loader."""
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    @property
    def choice(self) -> Choice:
        """Where the batches of the last pass came from ("streamed", "recorded" or "resident"), and why."""
        if not self.about_disk:
            return self._choice
        return Choice(self._choice.value, f"{self._choice.reason}; {self.about_disk}")

    @property
    def is_transitional(self) -> bool:
        """See `Replayable.is_transitional`."""
        return self._is_transitional

    def __iter__(self) -> Iterator[Batch]:
        """One pass of the loader.

        Raises:
            DataError: rows do not depend on their index alone, or one differs from what was recorded.
        """
        is_first, self.passes = self.passes == 0, self.passes + 1
        if self._why_live:
            self._choice = Choice("streamed", self._why_live)
            return iter(self.loader) if self._by_workers is None else map(itemgetter(1), self._by_workers)
        recording = self.begin()
        if self.loader.num_workers and is_first and not recording.is_kept:
            order: list[Any] = []
            self._by_workers = logging_loader(self.loader, order)
            return recording.read_by_workers(iter(self._by_workers), order)
        indices: Iterator[Any] = IndexBatches(self.loader, is_first_pass=is_first)
        if self.workers and not self.loader.num_workers and is_read_ahead(self.loader) and hasattr(os, "fork"):
            indices = recording.read_ahead(indices, self.workers)
        return _Pass(self, recording, indices)

    def resident(self, device: torch.device) -> ReplayedBatches | str:
        """See `Replayable.resident`: what remains unread of a dataset whose rows are recorded is read now."""
        self._is_transitional = False
        why_not = self._why_not_resident()
        if not why_not:
            recording = self.begin()
            self._is_transitional = recording.lacks_many()
            why_not = RECORDING if self._is_transitional else recording.complete() or recording.why_not_collated
            if not why_not:
                found = recording.resident(device)
                if not isinstance(found, str):
                    self._choice = Choice("resident", f"{recording.store.count:,} recorded rows, on {device}")
                    return found
                why_not = found
        if why_not != RECORDING:  # else the choice says why
            self._choice = Choice(self._choice.value, why_not)
        return why_not

    def _why_not_resident(self) -> str:
        if self.then is not None:
            return "`then` is called with each row"
        if self.loader.collate_fn is not default_collate:
            return "the loader has a collate_fn of its own, which is called with recorded rows"
        if not is_plain_batching(self.loader):
            return "the loader has a batch_sampler that is not torch's own, or makes no batches"
        if self.loader.pin_memory:
            return "the loader pins memory"
        if self.folder is not None and not self._why_live and not self._recordings:
            self.begin()
        if self._why_live or self._recordings:
            return self._why_live
        self._is_transitional = True
        return RECORDING

    def begin(self) -> _Recording:
        """The recording of the dataset as it is now, for a pass that begins."""
        for recording in self._recordings:
            if recording.difference() is None:
                self._recordings.remove(recording)
                self._recordings.append(recording)  # the last used comes last
                recording.audit()
                return recording
        others = self._recordings[-(MOST_STATES - 1) :]
        limit = self._memory_bytes - sum(each.store.nbytes for each in others)
        while others and limit < self._memory_bytes // 2:
            limit += others.pop(0).store.nbytes
        reason = RECORDING
        if self._recordings:
            reason = f"rows are recorded anew: {self._recordings[-1].difference()} has changed"
        found = _Recording(self, limit)
        self._recordings = [*others, found]
        self._choice = Choice("streamed", reason)
        if self.folder is not None:
            found.open_kept(self.folder)
        return found

    def note(self, value: str, reason: str) -> None:
        """Says where batches come from."""
        self._choice = Choice(value, reason)

    @property
    def is_live(self) -> bool:
        """Whether rows are read live for good."""
        return bool(self._why_live)

    def stop_recording(self, why: str) -> None:
        """Has rows read live from now on."""
        self._why_live, self._recordings = why, []
        self._choice = Choice("streamed", why)


class _Pass(Iterator[Any]):
    """One pass over a loader that has no workers, or none that are needed."""

    def __init__(self, owner: RecordedLoader, recording: _Recording, indices: Iterator[Any]) -> None:
        self._owner, self._recording, self._indices = owner, recording, indices
        self._begin, self._num_read = time.perf_counter(), recording.num_read
        self._watch_s = self._watched_s = 0.0

    def __next__(self) -> Batch:
        keys = next(self._indices, _END)
        if keys is _END:
            self._finish()
            raise StopIteration
        if not self._owner.is_live and self._has_changed():
            self._recording = self._owner.begin()
        return self._recording.batch(keys)

    def _has_changed(self) -> bool:
        """Whether the dataset was changed between two batches."""
        begin = time.perf_counter()
        if self._watch_s > CHEAP_S and self._watched_s > WATCHED_BETWEEN * (begin - self._begin):
            return self._recording.has_moved()
        found = self._recording.difference() is not None
        self._watch_s = time.perf_counter() - begin
        self._watched_s += self._watch_s
        return found

    def _finish(self) -> None:
        recording = self._recording
        recording.check()
        is_replayed = recording.num_read == self._num_read
        recording.keep_on_disk()
        if is_replayed and not self._owner.is_live:
            recording.pass_s = time.perf_counter() - self._begin
            self._owner.note("recorded", f"{recording.store.count:,} rows are replayed")


_END = object()


class _Recording:
    """The rows of a dataset in one state.

    Args:
        owner: whose rows.
        limit: bytes that they may take.

    Attributes:
        store: the rows.
        num_read: how many were read from the dataset.
        pass_s: seconds that the last replayed pass took.
        why_not_collated: why batches are not made of columns; empty where they are.
        is_kept: whether the rows are on disk.
    """

    def __init__(self, owner: RecordedLoader, limit: int) -> None:
        self._owner = owner
        self._loader = owner.loader
        self._dataset: Any = owner.loader.dataset
        self._limit = limit
        self._length = length_of(self._dataset)
        self.store = RowStore(self._length)
        self.num_read = 0
        self.pass_s = 0.0
        self._is_own_collate = self._loader.collate_fn is not default_collate or owner.then is not None
        is_default = self._loader.batch_sampler is not None and not self._is_own_collate
        self.why_not_collated = "" if is_default else "batches are not made by torch's collate_fn alone"
        self._num_compared = 0
        self._read_s = self._checked_s = self._watched_s = 0.0
        self._num_checked = 0
        self._unchecked: list[Any] = []
        self._is_shared = self._is_live = self._is_pickled = False
        self._ignored: frozenset[str] = frozenset()
        self._files: dict[str, object] = {}
        self._key = self._new_key()
        self.is_kept = False
        self._facts = self._new_facts()
        self._attributes = self._shallow()
        self._random = random.Random(7)  # of its own: which rows are read again
        self._resident: dict[torch.device, _RecordedBatches] = {}
        self._to_read: tuple[list[list[Any]], int] = [], 0
        self._readers: ForkedReaders | None = None

    # Is the dataset still the one that was recorded?

    def _new_facts(self) -> Facts:
        return Facts(self._dataset, ignored=self._ignored)

    def difference(self) -> str | None:
        """What has changed since the rows were recorded."""
        found = self._facts.difference()
        if found is not None:
            return found
        names = list(self._files)
        if len(names) > MOST_FILES:
            names = self._random.sample(names, MOST_FILES)
        return next((name for name in names if stamp_of(name) != self._files[name]), None)

    def has_moved(self) -> bool:
        """Whether attributes of the dataset have been replaced in the middle of a pass."""
        return self._shallow() != self._attributes and self.difference() is not None

    def _shallow(self) -> list[int]:
        return [*map(id, vars(self._dataset).values())] if hasattr(self._dataset, "__dict__") else []

    def audit(self) -> None:
        """Reads some rows again.

        Raises:
            DataError: one differs.
        """
        self.check()
        if self.store.form is None or not self.num_read:
            return
        row_s = self._read_s / self.num_read
        self._audit(max(1, int(AUDITED_SHARE * self.pass_s / max(row_s, 1e-9))))

    def _audit(self, count: int, remedy: str = "") -> None:
        there = self.store.numbers
        for number in self._random.sample(range(len(there)), min(count, len(there), 64)):
            index = int(there[number])
            [kept] = self.store.rows([index])
            if not same_rows(kept, self._row_of_worker(index) if self._is_pickled else self._row(index)):
                raise DataError(
                    f"row {index} of {where(self._dataset)} differs from the row that was recorded: what it is read "
                    "from has changed, or it does not depend on its index alone; "
                    + (remedy or "make a new record(loader) where the data changed, or give the loader itself")
                )
        if self.is_kept:
            self._check_state(is_certain=True)  # this process may not have read a row yet: caches grow, files open

    # On disk.

    def _new_key(self) -> str | None:
        """What the rows are found by on disk; None where they are not kept."""
        folder, loader = self._owner.folder, self._loader
        if folder is None:
            return None
        is_many = loader.batch_sampler is not None and hasattr(self._dataset, "__getitems__")
        try:
            return key_of(self._dataset, self._length, is_many, loader.num_workers > 0, left_out=folder.path)
        except (NotWrittenError, OSError) as error:
            self._owner.about_disk = f"not kept on disk: {error}"
            return None

    def open_kept(self, folder: KeptFolder) -> None:
        """Takes the rows from the disk, where they are there.

        Raises:
            DataError: a row differs from the one that the dataset gives now.
        """
        key = self._key
        if key is None:
            return
        found = folder.find(key)
        if isinstance(found, Kept) and found.store.num_rows != self._length:
            found = "the record on disk has another number of rows"
        if isinstance(found, Kept) and found.is_shared and (self._is_own_collate or self._loader.batch_sampler is None):
            self._key = None
            found = "not taken from disk: rows are memory of the dataset's own, and the loader may hand them out"
        if isinstance(found, str):
            self._owner.about_disk = found
            return
        self.store, self.is_kept = found.store, True
        self.num_read, self._read_s = found.store.count, found.read_s
        self._is_pickled, self._is_shared = found.is_pickled, found.is_shared
        self._files = {name: stamp_of(name) for name in found.files}
        self._owner.about_disk = f"kept in {folder.path}"
        home = folder.path / key
        self._audit(
            max(OPENED_ROWS, int(AUDITED_SHARE * self.num_read)),
            f"the record on disk was made by other code or of other data: delete {home} and run again",
        )

    def keep_on_disk(self) -> None:
        """Keeps the rows on disk once all are there; a disk that is full costs the next process its advantage."""
        folder, store = self._owner.folder, self.store
        if folder is None or self._key is None or self.is_kept or self._owner.is_live or store.form is None:
            return
        numbers = self._universe() if is_plain_batching(self._loader) else np.arange(store.num_rows)
        missing = len(store.missing(numbers))
        if missing and store.nbytes >= self._limit:
            self._owner.about_disk = f"not kept on disk: {self._too_much()}"
            return
        if missing and (missing > (self._loader.batch_size or 1) or self._read_missing()):
            return
        self.check()
        if self._owner.is_live or self.store is not store or self.difference() is not None:
            return
        kept = Kept(
            store=store,
            read_s=float(self._read_s),
            is_pickled=self._is_pickled,
            is_shared=self._is_shared,
            files=tuple(self._files),
        )
        try:
            folder.write(self._key, kept, self._files)
            self._owner.about_disk, self.is_kept = f"kept in {folder.path}", True
        except (NotWrittenError, OSError) as error:
            self._owner.about_disk = f"not kept on disk: {error}"
            self._key = None

    # Batches.

    def batch(self, keys: Any) -> Batch:
        """The batch of what the loader's sampler gave."""
        if self._is_live:
            return self._read_live(keys)
        is_batched = self._loader.batch_sampler is not None
        wanted: list[Any] = list(keys) if is_batched else [keys]
        is_recorded = self.store.has_all(wanted)
        if is_batched and is_recorded and wanted and not self.why_not_collated and self._num_compared >= 4:
            return self.store.batch(wanted)
        rows = self._rows(wanted)
        batch = cast("Any", self._loader.collate_fn)(rows if is_batched else rows[0])
        if self._is_shared and shares_memory(rows, batch):
            self._stop_recording(
                "rows are memory of the dataset's own, and the loader hands them out: a change of a batch changes the "
                "dataset"
            )
        elif self.store.has_all(wanted):
            self._compare(wanted, batch)
        return batch

    def _read_live(self, keys: Any) -> Batch:
        items = self._items(list(keys)) if self._loader.batch_sampler is not None else self._dataset[keys]
        return cast("Any", self._loader.collate_fn)(items)

    def _rows(self, keys: list[Any]) -> Sequence[Row]:
        are_kept = [*map(self.store.has, keys)]
        missing = [key for key, is_kept in zip(keys, are_kept, strict=True) if not is_kept]
        then = self._owner.then
        if len(missing) == len(keys):
            rows = self.read(keys)
            return rows if then is None else [self._then_live(row) for row in rows]
        if missing:
            store, read = self.store, iter(self.read(missing))
            if self.store is not store:
                return self._rows(keys)  # the dataset was changed: what was kept is kept no more
            kept = iter(store.rows([key for key, is_kept in zip(keys, are_kept, strict=True) if is_kept]))
            rows = [next(kept) if is_kept else next(read) for is_kept in are_kept]
        else:
            rows = self.store.rows(keys)
        return rows if then is None else [then(row) for row in rows]

    def _compare(self, keys: list[Any], batch: Batch) -> None:
        """Compares a batch that is made of columns with what `collate_fn` makes, now and then."""
        if self.why_not_collated or self._num_compared >= 4 or not keys:
            return
        if not self.store.is_collated() or not same_rows(self.store.batch(keys), batch):
            self.why_not_collated = "the rows are not such that torch's collate_fn makes batches of columns of them"
            return
        self._num_compared += 1

    def _then_live(self, row: Row) -> Row:
        then = self._owner.then
        assert then is not None
        given = copy.deepcopy(row)
        found = then(given)
        if self._is_shared and not same_rows(given, row):
            raise DataError(
                f"{where(self._dataset)} gives rows that are memory of the dataset's own, and `then` changes them in "
                "place, which would change the dataset: have one of them make a copy"
            )
        return found

    # Reading.

    def _row(self, key: Any) -> Row:
        """One row as the loader reads it."""
        return self._items([key])[0]

    def _row_of_worker(self, key: Any) -> Row:
        """One row as it comes from a worker."""
        return pickle.loads(pickle.dumps(self._row(key)))

    def _items(self, keys: Sequence[Any]) -> Sequence[Row]:
        many = getattr(self._dataset, "__getitems__", None) if self._loader.batch_sampler is not None else None
        return many(list(keys)) if many else [self._dataset[key] for key in keys]

    def read(self, keys: Sequence[Any]) -> Sequence[Row]:
        """Reads rows from the dataset, checks that they depend on their index alone, and keeps them.

        Raises:
            DataError: they do not.
        """
        is_watched = (
            bool(self._to_read[0]) or self._watched_s <= WATCHED_SHARE * self._read_s or self.num_read < CHECKED_ROWS
        )
        if is_watched and self._watch() is not None:
            self._begin_again()
        begin = time.perf_counter()
        rows: Sequence[Row] | None = self._taken(keys)
        is_taken = rows is not None
        if rows is None:
            rows = self._read_watching_generators(keys)
        self._read_s += time.perf_counter() - begin
        self.num_read += len(keys)
        if self._facts.unknown:
            self._stop_recording(f"{self._facts.unknown}, whose state cannot be read")
        self._check_state(is_certain=is_watched)
        if not self._is_live:
            if isinstance(rows, list | tuple) and len(rows) != len(keys):
                raise self._refused(f"{len(keys)} indices give {len(rows)} rows")
            self._read_again(keys, rows, is_pickled=is_taken)
            self._keep(keys, rows)
        return rows

    def read_ahead(self, indices: Iterator[Any], workers: int) -> Iterator[Any]:
        """The same indices, all of them drawn at the first; rows that are not recorded are read by processes."""
        if self._loader.batch_sampler is None:
            yield from indices
            return
        order = list(islice(indices, len(self._loader)))
        met: set[int] = set()
        batches = list[list[Any]]()
        for keys in order:
            missing = [key for key in keys if not self.store.has(key) and key not in met]
            if missing and len(missing) == len(set(missing)):
                batches.append(missing)
            met.update(missing)
        self._to_read = batches[1:], workers  # the first is read here, and checked, before any process is
        yield from order
        self._stop_reading_ahead()
        yield from indices  # nothing, but a sampler may draw at its end

    def _stop_reading_ahead(self) -> None:
        self._to_read = [], 0
        if self._readers is not None:
            self._readers.close()
            self._readers = None

    def _taken(self, keys: Sequence[Any]) -> Sequence[Row] | None:
        """Rows that another process has read."""
        batches, workers = self._to_read
        if not batches or not self.num_read:
            return None
        self._readers = self._readers or ForkedReaders(self._dataset, self._items, batches, workers)
        found = self._readers.take(keys)
        if found is None:
            self._stop_reading_ahead()
            return None
        if found.drawn is not None:
            raise self._refused(f"draws from {found.drawn}")
        if found.changed is not None:
            raise self._refused(f"{found.changed} changes when a row is read")
        self._is_pickled = True
        self._note_files(found.files)
        return found.rows

    def _note_files(self, files: dict[str, object]) -> None:
        """Takes up the files that another process has read rows from."""
        for name, stamp in files.items():
            if self._files.setdefault(name, stamp) != stamp:
                self._files[name] = "changed while rows were read"

    def _begin_again(self) -> None:
        """Forgets the rows that were recorded before the dataset was changed."""
        self._stop_reading_ahead()
        self._length = length_of(self._dataset)
        self.store = RowStore(self._length)
        self._facts, self._attributes = self._new_facts(), self._shallow()
        self._resident, self._files, self._unchecked = {}, {}, []
        if self._key is not None:
            self._key, self._owner.about_disk = None, "not kept on disk: the dataset changed while it was recorded"

    def _keep(self, keys: Sequence[Any], rows: Sequence[Row]) -> None:
        if self.store.nbytes >= self._limit:
            return
        try:
            self.store.put(keys, rows)
        except NotKeptError as error:
            self._stop_recording(f"a row holds a {error}, which cannot be copied")
        why_not = "" if self._key is None or self._is_live else self.store.why_not_written()
        if why_not:
            raise DataError(
                f"{where(self._dataset)} gives {why_not}, which record(loader, keep=...) does not write to disk: give "
                "rows of tensors, numpy arrays, numbers, str and bytes, all of one form, or leave out keep"
            )

    def _stop_recording(self, why: str) -> None:
        self._stop_reading_ahead()
        self._is_live = True
        self._owner.stop_recording(why)

    def _read_watching_generators(self, keys: Sequence[Any]) -> Sequence[Row]:
        generators = GlobalGenerators()
        with FilesRead(self._files):
            rows = self._items(keys)
        drawn = generators.moved()
        if drawn is not None:
            raise self._refused(f"draws from {drawn}")
        return rows

    def _watch(self) -> str | None:
        begin = time.perf_counter()
        found = self._facts.difference()
        self._watched_s += time.perf_counter() - begin
        return found

    def _check_state(self, *, is_certain: bool) -> None:
        """Looks what reading has changed.

        Args:
            is_certain: whether the state was the recorded one just before.
        """
        if not is_certain and not self._watched_s <= WATCHED_SHARE * self._read_s:
            return
        begin = time.perf_counter()
        changed = self._facts.changed()
        self._watched_s += time.perf_counter() - begin
        if not changed:
            return
        if not is_certain:
            self._begin_again()
            return
        counted = [each.name for each in changed if not each.is_harmless]
        if counted:
            self._stop_recording(f"{counted[0]} changes when a row is read, and rows may depend on it")
            return
        # Such as a cache that grows or a file that is opened: the rows' own.
        self._ignored |= {each.name for each in changed}
        self._facts, self._attributes = self._new_facts(), self._shallow()

    def _read_again(self, keys: Sequence[Any], rows: Sequence[Row], *, is_pickled: bool = False) -> None:
        if self._num_checked >= CHECKED_ROWS and self._checked_s > CHECKED_SHARE * self._read_s:
            return
        self._is_pickled = self._is_pickled or is_pickled
        if self._num_checked and len(keys) < CHECKED_TOGETHER:
            self._unchecked += keys
            if len(self._unchecked) >= CHECKED_TOGETHER:
                self.check()
        else:
            self._check(keys, rows)

    def check(self) -> None:
        """Reads rows again that were recorded, and have not been since.

        Raises:
            DataError: one differs.
        """
        keys, self._unchecked = [key for key in self._unchecked if self.store.has(key)], []
        try:
            rows = self.store.rows(keys)
        except NotKeptError as error:
            self._stop_recording(f"a row holds a {error}, which cannot be copied")
        else:
            if keys:
                self._check(keys, rows)

    def _check(self, keys: Sequence[Any], rows: Sequence[Row]) -> None:
        begin = time.perf_counter()
        why, is_shared = read_again(self._row_of_worker if self._is_pickled else self._row, keys, rows)
        self._checked_s += time.perf_counter() - begin
        self._num_checked += len(keys)
        self._is_shared = self._is_shared or is_shared
        if why is not None:
            raise self._refused(why)

    def _refused(self, why: str) -> DataError:
        return DataError(
            f"{where(self._dataset)}: {why}, so that recorded rows would not be the loader's; make what is random or "
            "changes a function of its own, record(loader, then=function), or give the loader itself"
        )

    def read_by_workers(self, passing: Iterator[tuple[bytes, Batch]], order: list[Any]) -> Iterator[Batch]:
        """The first pass of a loader with workers, which read the rows; they are recorded as they come.

        Args:
            passing: the pass, of `_logging_loader`.
            order: where it notes the indices of each batch.
        """
        is_batched = self._loader.batch_sampler is not None
        for packed, batch in passing:
            keys = order.pop(0)
            found: ReadRows = pickle.loads(packed)  # by the loader's worker
            if found.drawn is not None:
                raise self._refused(f"draws from {found.drawn}")
            if found.why_collated_there is not None:
                self._owner.stop_recording(f"collate_fn, in the loader's workers, {found.why_collated_there}")
            if not self._owner.is_live:
                keys = list(keys) if is_batched else [keys]
                self.num_read += len(keys)
                self._read_s += found.seconds
                self._note_files(found.files)
                self._read_again(keys, found.rows, is_pickled=True)
                self._keep(keys, found.rows)
                if self.store.has_all(keys) and is_batched:
                    self._compare(keys, batch)
            yield batch
        self.keep_on_disk()

    # Resident rows.

    def lacks_many(self) -> bool:
        """Whether so many rows are not recorded that the pass that begins had better record them."""
        if self.store.form is None:
            return not self.store.has_others
        is_full = self.store.nbytes >= self._limit
        numbers = self._universe()
        return not is_full and len(self.store.missing(numbers)) > max(CHECKED_ROWS, LACKED_SHARE * len(numbers))

    def complete(self) -> str:
        """Reads the rows that a sampler can ask for and that are not recorded; says why that cannot be."""
        store = self.store
        if store.form is None or store.has_others:
            return "the rows are not all of one form, or have keys that are no numbers"
        if store.nbytes >= self._limit:
            return self._too_much()
        why_not = self._read_missing()
        if not why_not:
            self.keep_on_disk()
        return why_not

    def _too_much(self) -> str:
        return f"the rows take more memory than {self._limit >> 20} MB; those beyond are read live"

    def _read_missing(self) -> str:
        store = self.store
        numbers = self._universe() if is_plain_batching(self._loader) else np.arange(store.num_rows)
        missing = store.missing(numbers)
        try:
            for begin in range(0, len(missing), 128):
                self.read(missing[begin : begin + 128].tolist())
            self.check()
        except DataError:
            raise
        except Exception as error:  # of a row that the loader may never ask for
            return f"not every row can be read: {type(error).__name__}: {error}"
        if store.nbytes >= self._limit and len(store.missing(numbers)):
            return self._too_much()
        return "" if self.store is store and not store.has_others else "the rows are not all of one form"

    def _universe(self) -> np.ndarray:
        """The row numbers that the loader's sampler can give."""
        sampler: Any = cast("Any", self._loader.batch_sampler).sampler
        if type(sampler) is SubsetRandomSampler:
            return np.unique(np.asarray([int(each) for each in sampler.indices], dtype=np.int64))
        if type(sampler) is WeightedRandomSampler:
            return np.flatnonzero(np.asarray(sampler.weights))
        return np.arange(self.store.num_rows)

    def resident(self, device: torch.device) -> _RecordedBatches | str:
        """The recorded rows as resident batches on a device."""
        numbers = self._universe()
        found = self._resident.get(device)
        if found is not None and np.array_equal(found.numbers, numbers) and found.is_current():
            return found
        if self._num_compared < 4 and not self._compare_some(numbers):
            return self.why_not_collated
        if not any(self.store.tensor_leaves):
            return "there is no tensor in a batch"
        found = self._resident[device] = _RecordedBatches(self._owner, self, numbers, device)
        return found

    def _compare_some(self, numbers: np.ndarray) -> bool:
        while self._num_compared < 4 and not self.why_not_collated:
            keys = numbers[: 1 + self._num_compared].tolist()
            self._compare(keys, self._loader.collate_fn(self.store.rows(keys)))
        return not self.why_not_collated


class _RecordedBatches(ReplayedBatches):
    """Recorded rows as resident batches.

    Attributes:
        numbers: of the rows, [n], int64.
    """

    def __init__(self, owner: RecordedLoader, recording: _Recording, numbers: np.ndarray, device: torch.device) -> None:
        store = recording.store
        super().__init__(owner.loader, store.columns(numbers, device), store.rebuild, device)
        self.numbers = numbers
        self._owner, self._recording, self._store = owner, recording, store
        self._place_of = np.full(store.num_rows, -1, dtype=np.int64)
        self._place_of[numbers] = np.arange(len(numbers))
        self._are_tensors = store.tensor_leaves
        self._watched_at = 0.0

    def __iter__(self) -> LoaderEpoch:
        """One pass of the loader."""
        is_first, self._owner.passes = self._owner.passes == 0, self._owner.passes + 1
        self._watched_at = time.perf_counter()
        return LoaderEpoch(self, is_first_pass=is_first)

    def rows_of(self, indices: np.ndarray) -> np.ndarray:
        """See `ReplayedBatches.rows_of`."""
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self._place_of):
            raise DataError("the sampler gives an index that is negative or out of range: use the loader itself")
        places = self._place_of[indices]
        if len(places) and places.min() < 0:
            raise DataError("the sampler gives an index of a row that it could not give before: record the loader anew")
        return places

    def is_current(self) -> bool:
        """See `ReplayedBatches.is_current`."""
        if self._recording.store is not self._store:
            return False
        now = time.perf_counter()
        if now - self._watched_at > WATCH_S or self._recording.has_moved():
            self._watched_at = now
            return self._recording.difference() is None
        return True

    def refresh(self) -> bool:
        """See `ReplayedBatches.refresh`."""
        return False

    def gather(self, rows: torch.Tensor, host_rows: np.ndarray) -> list[Batch]:
        """See `ResidentBatches.gather`."""
        if all(self._are_tensors):
            return super().gather(rows, host_rows)
        size = self.batch_size
        gathered = iter([column.gather(rows, host_rows, size) for column in self.columns])
        objects = iter(self._store.objects(self.numbers[host_rows]))
        parts = [next(gathered) if is_tensor else _split(next(objects), size) for is_tensor in self._are_tensors]
        return [self._store.rebuild(batch) for batch in zip(*parts, strict=True)]


def _split(values: list[Any], size: int) -> list[list[Any]]:
    return [values[begin : begin + size] for begin in range(0, len(values), size)]
