"""Recorded rows on disk: one folder that belongs to this user alone, bounded in size, safe for two processes.

A record is a folder, which is there as a whole or not at all: a manifest (JSON, behind its own checksum) and one file
of tables, which is mapped into memory. Its name is a digest of all that the rows can read, so that a record is found
where nothing has changed. Nothing is pickled.
"""

from __future__ import annotations

import builtins
import copyreg
import dis
import enum
import functools
import hashlib
import importlib.util
import io
import json
import marshal
import mmap
import os
import platform
import random
import shutil
import stat
import sys
import tempfile
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fasttrain.data import purity
from fasttrain.data.readers import OF_THE_SYSTEM, stamp_of
from fasttrain.data.rows import RowStore, StoredColumn, form_of_plain, plain_form
from fasttrain.device import versions
from fasttrain.errors import ConfigError, DataError

__all__ = ["Kept", "KeptFolder", "NotWrittenError", "default_folder", "describe_folder", "key_of"]

FORMAT = 1
"""Part of a key. Raise it when the format of a record, or what a key is made of, changes."""

MOST_BYTES, FREE_SHARE = 50_000_000_000, 0.1
"""Records take so much of the disk, and no more than so much of what is free there, unless `keep_bytes` says else."""

MOST_PATHS = 100_000
"""Texts of a dataset that are looked up, to see whether they name a file."""

MOST_COMPARED = 1_000
"""Files whose content is compared when a record is opened; the size and the time of every file are."""

SAMPLE_BYTES, NUM_SAMPLES = 1 << 13, 8
"""The content of a larger file is compared at so many places."""

PAGE = 4_096

_PART = ".part-"


class NotWrittenError(Exception):
    """Rows cannot be kept on disk; the message says why."""


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/fasttrain/records`, by default below `~/.cache`."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "fasttrain" / "records"


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A record that was opened.

    Attributes:
        store: its rows; their tables are mapped from the disk.
        read_s: seconds that reading them took.
        is_pickled: whether they came from another process.
        is_shared: whether the dataset's rows were memory of its own.
        files: that rows were read from.
    """

    store: RowStore
    read_s: float
    is_pickled: bool
    is_shared: bool
    files: tuple[str, ...]


class KeptFolder:
    """A folder of records.

    Args:
        path: made with mode 0700 where it is not there.
        most_bytes: that records may take; None: a tenth of what is free on the disk, and 50 GB at most.

    Raises:
        ConfigError: the folder belongs to somebody else, others may write to it, or it cannot be made.
    """

    def __init__(self, path: Path, most_bytes: int | None = None) -> None:
        self.path = Path(os.path.abspath(path))
        self._most_bytes = most_bytes
        _make_private(self.path)

    def find(self, key: str) -> Kept | str:
        """The record of a key; else why there is none, empty where there never was one.

        One that is damaged, or that was made of files that have changed, is removed.
        """
        home = self.path / key
        if not home.is_dir() or home.is_symlink():
            return ""
        try:
            known = _read_manifest(home / "manifest", key)
            found = _opened(home / "tables", known)
        except Exception as error:  # whatever the content of a file may lead to
            self._remove(home)
            return f"the record on disk was damaged ({str(error) or type(error).__name__:.120})"
        changed = _changed_file(known.files)
        if changed is not None:
            self._remove(home)
            return f"{changed} has changed since its record was made"
        with suppress(OSError):  # where it may only be read, it stays as old as it is
            os.utime(home / "manifest")
        return found

    def write(self, key: str, kept: Kept, stamps: Mapping[str, object]) -> None:
        """Keeps rows on disk, unless another process was first.

        Args:
            key: see `key_of`.
            kept: the rows, in memory.
            stamps: of the files that they were read from, when they were opened first (see `stamp_of`).

        Raises:
            NotWrittenError: they are of a kind that is not written, or larger than the bound.
            OSError: they cannot be written. Nothing is left of them.
        """
        why_not = kept.store.why_not_written()
        if why_not or kept.store.form is None:
            raise NotWrittenError(f"there are {why_not or 'no rows'}")
        folders = {os.path.abspath(each) for each in sys.path}
        names = [each for each in kept.files if each not in folders and not _is_left_out(each, self.path)]
        files = [_file_entry(each, stamps[each]) for each in names]
        columns = kept.store.tables()
        tables = [_bytes_of(torch.from_numpy(kept.store.is_there))]
        tables += [_bytes_of(table) for each in columns for table in each.tables.values()]
        size = sum(-(-len(table) // PAGE) * PAGE for table in tables)
        self._make_room(size)
        with self._part() as part:
            content: dict[str, Any] = {
                "format": FORMAT,
                "key": key,
                "num_rows": kept.store.num_rows,
                "form": plain_form(kept.store.form),
                "columns": [_plain_column(each) for each in columns],
                "files": files,
                "read_s": kept.read_s,
                "is_pickled": kept.is_pickled,
                "is_shared": kept.is_shared,
                "size": size,
                "sha256": _write_tables(part / "tables", tables),
            }
            text = json.dumps(content).encode()
            _write(part / "manifest", [hashlib.sha256(text).hexdigest().encode(), b"\n", text])
            _sync_folder(part)
            try:
                os.rename(part, self.path / key)
            except OSError:
                if not (self.path / key).is_dir():
                    raise
                return  # another process has kept the same rows
            _sync_folder(self.path)

    def records(self) -> list[tuple[float, int, Path]]:
        """When each record was last used, its bytes, and where it is; the last used first."""
        found: list[tuple[float, int, Path]] = []
        for path in self.path.iterdir():
            with suppress(OSError):  # another process has removed it meanwhile
                if len(path.name) == 64 and path.is_dir():
                    size = sum(each.stat().st_size for each in path.iterdir())
                    found.append(((path / "manifest").stat().st_mtime, size, path))
        return sorted(found, reverse=True)

    def _make_room(self, size: int) -> None:
        records = self.records()
        total = sum(each[1] for each in records)
        most = self._most_bytes
        if most is None:
            most = min(MOST_BYTES, int(FREE_SHARE * (shutil.disk_usage(self.path).free + total)))
        if size > most:
            raise NotWrittenError(f"they take {size:,} bytes and records may take {most:,} (keep_bytes)")
        while records and total + size > most:
            _, nbytes, path = records.pop()
            self._remove(path)
            total -= nbytes

    def _remove(self, home: Path) -> None:
        """Removes a record, of which nobody sees a part meanwhile."""
        with suppress(OSError):  # on a read-only file system it stays, and is found damaged again
            gone = Path(tempfile.mkdtemp(dir=self.path, prefix=_PART))
            os.rename(home, gone / "record")
            shutil.rmtree(gone, ignore_errors=True)

    @contextmanager
    def _part(self) -> Generator[Path]:
        """A folder for a record that is being written; what ended processes have left of theirs is removed."""
        descriptors: list[int] = []
        part: Path | None = None
        try:
            with _locked(self.path, descriptors):
                for other in self.path.glob(f"{_PART}*"):
                    _remove_if_left(other)
                part = Path(tempfile.mkdtemp(dir=self.path, prefix=_PART))
                descriptors.append(os.open(part, os.O_RDONLY))
                with suppress(OSError):
                    _lock(descriptors[-1], waits=False)
            yield part
        finally:
            if part is not None:
                shutil.rmtree(part, ignore_errors=True)
            for each in descriptors:
                os.close(each)


def describe_folder() -> str:
    """The records in the default folder, in words."""
    folder = default_folder()
    if not folder.is_dir():
        return f"none in {folder}"
    try:
        records = KeptFolder(folder).records()
    except ConfigError as error:
        return str(error)
    return f"{len(records)}, {sum(each[1] for each in records) / 2**20:.1f} MiB in {folder}"


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise ConfigError(f"the folder {folder} for records cannot be made: {error.strerror or error}") from error
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"keep={str(folder)!r} is not a folder (links are not followed)")
    if hasattr(os, "getuid") and found.st_uid != os.getuid():
        raise ConfigError(f"the folder {folder} belongs to another user: no rows are read from there; name another")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"others may write to the folder {folder}: no rows are read from there (chmod 700)")


@contextmanager
def _locked(folder: Path, descriptors: list[int]) -> Generator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    descriptors.append(descriptor)
    with suppress(OSError):  # a file system without locks
        _lock(descriptor, waits=True)
    yield
    with suppress(OSError):
        _unlock(descriptor)


def _lock(descriptor: int, *, waits: bool) -> None:
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))


def _unlock(descriptor: int) -> None:
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_UN)


def _remove_if_left(part: Path) -> None:
    """Removes what a process has left that does not write any more."""
    with suppress(OSError):
        descriptor = os.open(part, os.O_RDONLY)
        try:
            _lock(descriptor, waits=False)
            shutil.rmtree(part, ignore_errors=True)
        finally:
            os.close(descriptor)


# Files of a record.


def _bytes_of(table: Tensor) -> memoryview:
    flat = table.contiguous().reshape(-1)
    return _view(flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, dtype=np.uint8))


def _view(content: Any) -> memoryview:
    return memoryview(content)


def _plain_column(column: StoredColumn) -> dict[str, Any]:
    tables = [[name, _name(each.dtype), list(each.shape)] for name, each in column.tables.items()]
    return {"dtype": _name(column.dtype), "shape": list(column.shape), "tables": tables}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_tables(path: Path, tables: Sequence[memoryview]) -> str:
    """Writes tables, each at the beginning of a page; returns the checksum of what is meant to be there."""
    parts = [part for table in tables for part in (table, bytes(-len(table) % PAGE))]
    _write(path, parts)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _write(path: Path, parts: Sequence[memoryview | bytes]) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class _Manifest:
    num_rows: int
    form: Any
    columns: list[Any]
    files: list[dict[str, Any]]
    read_s: float
    is_pickled: bool
    is_shared: bool
    size: int
    sha256: str

    def __post_init__(self) -> None:
        kinds = (int, list, list, list, float, bool, bool, int, str)
        for (name, value), kind in zip(vars(self).items(), kinds, strict=True):
            if type(value) is not kind:
                raise DataError(f"{name} must be a {kind.__name__}, not {value!r:.60}")
        if self.num_rows < 1 or self.size < 1 or not self.read_s >= 0:
            raise DataError(f"{self.num_rows} rows in {self.size} bytes, read in {self.read_s} s")


def _read_manifest(path: Path, key: str) -> _Manifest:
    with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb") as file:
        checksum, _, text = file.read().partition(b"\n")
    if checksum != hashlib.sha256(text).hexdigest().encode():
        raise DataError("wrong checksum of its manifest")
    known = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    if not isinstance(known, dict) or (known.pop("format", None), known.pop("key", None)) != (FORMAT, key):
        raise DataError("its manifest is of another record")
    return _Manifest(**cast("dict[str, Any]", known))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise DataError("its manifest has a name twice")
    return found


def _no_number(name: str) -> Any:
    raise DataError(f"its manifest holds {name}")


def _opened(path: Path, known: _Manifest) -> Kept:
    """The record whose tables these are; they are read once, to compare their checksum."""
    with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb") as file:
        if os.fstat(file.fileno()).st_size != known.size:
            raise DataError("its tables are cut off")
        if hashlib.file_digest(file, "sha256").hexdigest() != known.sha256:
            raise DataError("wrong checksum of its tables")
        # A private mapping: what is changed in memory never comes to the disk.
        memory = torch.from_numpy(np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=np.uint8))
    place = 0

    def take(dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        nonlocal place
        if not all(type(each) is int and each >= 0 for each in shape):
            raise DataError(f"a table of shape {shape!r:.60}")
        begin, size = place, int(np.prod(shape, dtype=object)) * dtype.itemsize
        place += -(-size // PAGE) * PAGE
        if place > known.size:
            raise DataError("its tables do not fit into their file")
        return memory[begin : begin + size].view(dtype).view(*shape)

    is_there = take(torch.bool, [known.num_rows]).numpy()
    columns: list[StoredColumn] = []
    for each in known.columns:
        match each:
            case {"dtype": str(dtype), "shape": [*shape], "tables": [*tables]} if len(each) == 3:
                found = {str(name): take(_dtype(kind), size) for name, kind, size in tables}
                columns.append(StoredColumn(_dtype(dtype), tuple(shape), found))
            case _:
                raise DataError(f"{each!r:.60} is no column")
    return Kept(
        store=RowStore.restored(form_of_plain(known.form), is_there, columns),
        read_s=known.read_s,
        is_pickled=known.is_pickled,
        is_shared=known.is_shared,
        files=tuple(str(each["path"]) for each in known.files),
    )


def _dtype(name: Any) -> torch.dtype:
    found = getattr(torch, name) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise DataError(f"{name!r:.60} is no dtype")
    return found


# Files that rows were read from.


def _is_left_out(name: str, folder: Path) -> bool:
    """Whether what a file holds comes from the code, which is part of the key, or from the records themselves."""
    is_of_folder = os.path.join(name, "").startswith(os.path.join(folder, ""))
    return is_of_folder or name.endswith((".pyc", f"{os.sep}__pycache__")) or purity.is_library_file(f"{name}{os.sep}")


def _file_entry(name: str, stamp: object) -> dict[str, Any]:
    if stamp_of(name) != stamp:
        raise NotWrittenError(f"{name} was changed while rows were read")
    return _entry_of(name)


def _entry_of(name: str) -> dict[str, Any]:
    """A file as it is now: its size, its time, and its content at some places; a folder by its names."""
    try:
        found = os.stat(name)
        if stat.S_ISDIR(found.st_mode):
            names = "\0".join(sorted(os.listdir(name))).encode("utf-8", "surrogateescape")
            return {"path": name, "size": 0, "time": 0, "content": hashlib.sha256(names).hexdigest()}
        if not stat.S_ISREG(found.st_mode):
            raise NotWrittenError(f"rows are read from {name}, which is no regular file")
        return {"path": name, "size": found.st_size, "time": found.st_mtime_ns, "content": _sampled(name)}
    except (FileNotFoundError, NotADirectoryError):
        return {"path": name, "size": -1, "time": 0, "content": ""}


def _sampled(name: str) -> str:
    digest = hashlib.sha256()
    with open(name, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        last = size - SAMPLE_BYTES
        if last < SAMPLE_BYTES * (NUM_SAMPLES - 1):
            return hashlib.sha256(file.read()).hexdigest()
        for number in range(NUM_SAMPLES):
            file.seek(last * number // (NUM_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _changed_file(entries: Sequence[dict[str, Any]]) -> str | None:
    """The first of the files that is not as it was."""
    places = range(len(entries))
    compared = set(places if len(entries) <= MOST_COMPARED else random.Random().sample(places, MOST_COMPARED))
    for number, entry in enumerate(entries):
        name = entry["path"]
        try:
            if number in compared or entry["time"] == 0:
                is_same = _entry_of(name) == entry
            else:
                found = os.stat(name)
                is_same = (found.st_size, found.st_mtime_ns) == (entry["size"], entry["time"])
        except (OSError, ValueError, NotWrittenError):
            is_same = False
        if not is_same:
            return str(name)
    return None


# What rows can read, as one number that is the same in every process.


def key_of(dataset: Any, *more: Any, left_out: Path | None = None) -> str:
    """A digest of what the rows of a dataset can read in Python before the first is read; the same in every process.

    It is made of the dataset's state, of the code of its own that it reaches, with the globals and closures that this
    code reads, of the files that texts in its state name (by size and time), and of the versions of Python, torch,
    numpy, pandas, fasttrain and of the packages that the code reaches. Code of packages counts by their version and by
    the size and time of its files.

    Args:
        dataset: see above.
        more: other plain values that rows depend on.
        left_out: a folder whose files do not count.

    Raises:
        NotWrittenError: the content of an object cannot be read.
    """
    walk = _Walk(left_out)
    walk.put("format", repr((FORMAT, sys.version, platform.machine(), pd.__version__, sorted(versions().items()))))
    for module in ("columns", "kept", "purity", "readers", "record", "rows"):
        walk.put("code of fasttrain", (Path(__file__).with_name(f"{module}.py")).read_bytes())
    numpys = sorted(np.geterr().items())
    walk.put("settings", repr((os.getcwd(), str(torch.get_default_dtype()), torch.is_grad_enabled(), numpys, more)))
    try:
        walk.add(dataset, type(dataset).__name__)
    except RecursionError as error:
        raise NotWrittenError(f"{type(dataset).__name__} is nested too deeply") from error
    return walk.digest()


_PLAIN = frozenset((int, float, complex, bool, str, bytes, type(None), type(...)))

_COMPILED = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    type(functools.lru_cache(len)),
)

_LOCKS = (type(threading.Lock()), type(threading.RLock()))

_OF_CLASS = frozenset(
    "__dict__ __weakref__ __doc__ __module__ __annotations__ __annotate__ __annotate_func__ __annotations_cache__ "
    "__dataclass_fields__ __dataclass_params__ __abstractmethods__ _abc_impl __static_attributes__ __firstlineno__ "
    "__parameters__ __orig_bases__ __match_args__".split()
)
"""Attributes of classes that their methods do not read, or that hold the addresses of objects."""


class _Walk:
    """Puts all that can be reached from an object into a digest, in an order that the objects' content alone decides.

    It goes where `purity.Facts` goes; of what that only compares at some places, it takes all.
    """

    def __init__(self, left_out: Path | None, seen: dict[int, tuple[int, Any]] | None = None) -> None:
        self._hash = hashlib.sha256()
        self._left_out = left_out
        shared = (
            torch.default_generator,
            getattr(random.random, "__self__", None),
            getattr(np.random.seed, "__self__", None),
        )
        # Others draw from the global generators, too.
        self._seen = dict(seen or {id(each): (number, each) for number, each in enumerate(shared)})
        self._num_paths = 0
        self._packages: set[str] = set()

    def digest(self) -> str:
        """The digest of what was put."""
        for name in sorted(self._packages):
            self.put("package", f"{name} {_version_of(name)}")
        return self._hash.hexdigest()

    def put(self, tag: str, content: str | bytes | memoryview = b"") -> None:
        """Puts a piece of content."""
        data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        self._hash.update(f"{tag} {len(data)}\n".encode("utf-8", "surrogatepass"))
        self._hash.update(data)

    def add(self, value: Any, name: str) -> None:
        """Puts an object, and what can be reached from it."""
        if _is_plain(value):
            self.put("plain", marshal.dumps(value, 2))  # of version 2: without references, the same each time
            self._add_paths(value)
        elif isinstance(value, np.generic) and not value.dtype.hasobject:
            self.put(f"numpy {value.dtype.str}", value.tobytes())
        elif isinstance(value, torch.dtype | torch.device | torch.Size | range | slice | np.dtype):
            self.put(type(value).__name__, repr(value))
        elif id(value) in self._seen:
            self.put("again", str(self._seen[id(value)][0]))
        else:
            self._seen[id(value)] = len(self._seen), value  # kept, so that no other object gets its number
            kind: Any = type(value)
            self.put("object", f"{kind.__module__}.{kind.__qualname__}".replace("__main__.", "."))
            self._look_at(value, name)

    def _look_at(self, value: Any, name: str) -> None:
        if isinstance(value, Tensor):
            self._tensor(value, name)
        elif isinstance(value, np.ndarray):
            self._array(value, name)
        elif isinstance(value, torch.Generator):
            self.put("state", value.get_state().numpy().tobytes())
        elif isinstance(value, np.random.Generator | np.random.RandomState):
            bits: Any = value.bit_generator if isinstance(value, np.random.Generator) else value
            self.add(bits.state if hasattr(bits, "state") else bits.get_state(legacy=False), name)
        elif isinstance(value, random.Random) and type(value) is not random.SystemRandom:
            self.add(value.getstate(), name)
        elif isinstance(value, pd.DataFrame | pd.Series | pd.Index):
            self._frame(value, name)
        elif isinstance(value, types.ModuleType):
            self._module(value.__name__)
        elif isinstance(value, type):
            self._class(value, name)
        elif isinstance(value, types.FunctionType):
            self._function(value, name)
        else:
            self._object(value, name)

    def _object(self, value: Any, name: str) -> None:
        if isinstance(value, types.MethodType):
            self.add(value.__func__, value.__func__.__qualname__)
            self.add(value.__self__, name)
        elif isinstance(value, functools.partial):
            held = cast("functools.partial[Any]", value)
            self._all((held.func, held.args, held.keywords), name)
        elif isinstance(value, property):
            self._all((value.fget, value.fset, value.fdel), name)
        elif isinstance(value, staticmethod | classmethod):
            self.add(cast("Any", value).__func__, name)
        elif isinstance(value, functools.cached_property):
            self.add(cast("Any", value).func, name)
        elif isinstance(value, _COMPILED):
            self._compiled(value, name)
        elif isinstance(value, enum.Enum):
            self.put("enum", value.name)
            self._all((value.value, type(value)), name)
        elif isinstance(value, bytearray | memoryview | mmap.mmap):
            self.put("bytes", bytes(value))
        elif isinstance(value, io.StringIO | io.BytesIO):
            self._all(("closed",) if value.closed else (value.tell(), value.getvalue()), name)
        elif isinstance(value, io.IOBase):
            self._open_file(value, name)
        elif isinstance(value, Iterator):
            raise NotWrittenError(f"{name} is an iterator, whose state cannot be read")
        elif isinstance(value, _LOCKS):
            pass
        elif isinstance(value, types.MappingProxyType):
            self.add(dict(cast("Any", value)), name)
        elif isinstance(value, os.PathLike):
            self.add(os.fspath(cast("Any", value)), name)
        else:
            self._instance(value, name)

    def _instance(self, value: Any, name: str) -> None:
        kind: Any = type(value)
        is_library = purity.is_library_class(kind)
        if kind in (dict, OrderedDict) or (not is_library and isinstance(value, dict)):
            for key, each in value.items():
                self._all((key, each), f"{name}[{key!r:.40}]")
        elif kind in (set, frozenset) or (not is_library and isinstance(value, set | frozenset)):
            self._set(cast("Any", value), name)
        elif kind in (list, tuple, deque) or (not is_library and isinstance(value, list | tuple | deque)):
            for number, each in enumerate(cast("Any", value)):
                self.add(each, f"{name}[{number}]")
        elif is_library or not _is_python_class(kind):
            self._reduced(value, name)
            return
        self.put("end")
        if is_library:
            return
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict):
            self._attributes(cast("dict[str, Any]", own), name)
        for each in kind.__mro__:
            slots = vars(each).get("__slots__", ())
            for slot in (slots,) if isinstance(slots, str) else tuple(slots):
                if slot not in ("__dict__", "__weakref__"):
                    self._all((slot, getattr(value, slot, None)), f"{name}.{slot}")
        self.add(kind, kind.__qualname__)

    def _all(self, values: Sequence[Any], name: str) -> None:
        for each in values:
            self.add(each, name)

    def _attributes(self, table: dict[str, Any], name: str) -> None:
        for key in list(table):
            self._all((key, table[key]), f"{name}.{key}")

    def _set(self, values: Any, name: str) -> None:
        """The elements of a set, in the order of their digests."""
        digests: list[str] = []
        for each in values:
            inner = _Walk(self._left_out, None if _is_plain(each) else self._seen)
            inner.add(each, name)
            digests.append(inner.digest())
        self.put("set", "".join(sorted(digests)))

    def _reduced(self, value: Any, name: str) -> None:
        """An object of a package's class, by what copies of it are made of."""
        try:
            reducer = copyreg.dispatch_table.get(type(value))
            found: Any = value.__reduce_ex__(4) if reducer is None else reducer(value)
        except Exception as error:
            kind: Any = type(value)
            raise NotWrittenError(
                f"{name} is a {kind.__module__}.{kind.__qualname__}, whose content cannot be read"
            ) from error
        if isinstance(found, str):
            self.put("name", found)
            return
        made, arguments, *rest = cast("tuple[Any, ...]", found)
        self._all((made, arguments), name)
        for each in rest:  # its state, the elements and the items of a mapping
            self.add(list(cast("Any", each)) if isinstance(each, Iterator) else each, name)

    def _tensor(self, value: Tensor, name: str) -> None:
        kind = value.dtype, tuple(value.shape), value.layout, value.device.type, value.requires_grad
        self.put("tensor", repr(kind))
        if value.layout is not torch.strided or value.is_quantized or value.is_nested:
            raise NotWrittenError(f"{name} is a tensor of layout {value.layout}, whose content is not read")
        if value.device.type != "meta" and value.numel():
            self.put("strides", repr(value.stride()))
            flat = value.detach().cpu().as_subclass(Tensor).resolve_conj().resolve_neg().contiguous().view(-1)
            self.put("content", _view(flat.view(torch.uint8).numpy()))
        if cast("Any", value).__dict__:
            self._attributes(dict(cast("Any", value).__dict__), name)

    def _array(self, value: np.ndarray, name: str) -> None:
        self.put("array", repr((value.dtype, value.shape, value.strides)))
        held = getattr(value, "_mmap", None)
        if isinstance(value, np.memmap) and isinstance(held, mmap.mmap) and getattr(value, "mode", None) == "r":
            begin = np.frombuffer(held, dtype=np.uint8).__array_interface__["data"][0]
            self.put("mapped", str(value.__array_interface__["data"][0] - begin))
            self.put("file", repr(_entry_of(os.fspath(cast("Any", value).filename))))
            return
        if value.dtype.hasobject:
            self.add(value.tolist(), name)
        elif value.size:
            self.put("content", _view(np.ascontiguousarray(value).view(np.ndarray).reshape(-1).view(np.uint8)))
        if type(value) not in (np.ndarray, np.memmap):
            self._attributes({**vars(cast("Any", value))}, name)

    def _frame(self, value: Any, name: str) -> None:
        """A table of pandas, whose caches stay as they are."""
        if isinstance(value, pd.MultiIndex):
            self._all((list(value.names), list(value.levels), [np.asarray(each) for each in value.codes]), name)
        elif isinstance(value, pd.Index):
            self._all((list(value.names), cast("Any", value).array), name)
        else:
            self._all((value.attrs, getattr(value, "name", None), *value.axes), name)
            for block in value._mgr.blocks:
                self._all((block.mgr_locs.as_array, block.values), name)

    def _class(self, kind: Any, name: str) -> None:
        del name
        for each in kind.__mro__:
            if purity.is_library_class(each):
                self._module(each.__module__)
                self.put("class", each.__qualname__)
                continue
            self.put("class", each.__qualname__)
            for key, value in sorted(vars(each).items()):
                if key not in _OF_CLASS and not isinstance(
                    value, types.MemberDescriptorType | types.GetSetDescriptorType
                ):
                    self._all((key, value), f"{each.__qualname__}.{key}")

    def _function(self, function: types.FunctionType, name: str) -> None:
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is not None:
            self.add(wrapped, name)
        code = function.__code__
        cells = [_content(cell) for cell in function.__closure__ or ()]
        if purity.is_library_file(code.co_filename) or _is_own(function.__module__):
            self._module(function.__module__)
            self.put("function", function.__qualname__)
            self._all([each for each in cells if isinstance(each, types.FunctionType | functools.partial)], name)
            return
        self._code(code)
        self._all((function.__defaults__, function.__kwdefaults__), f"{name}'s defaults")
        for variable, value in zip(code.co_freevars, cells, strict=True):
            self.add(value, f"{name}'s {variable}")
        self._globals(function)
        own = vars(function)
        if own:
            self._attributes({key: each for key, each in own.items() if key != "__wrapped__"}, name)

    def _globals(self, function: types.FunctionType) -> None:
        names, attributes = _names_read(function.__code__)
        table = function.__globals__
        for name in sorted(names):
            if name in table:
                value = table[name]
                self._all((name, value), f"the global {name}")
                if isinstance(value, types.ModuleType) and not self._is_library_module(value):
                    for inner in sorted(attributes & vars(value).keys()):
                        self._all((inner, vars(value)[inner]), f"{name}.{inner}")
            elif isinstance(vars(builtins).get(name), types.FunctionType):  # one that was replaced
                self.add(vars(builtins)[name], f"the builtin {name}")
        for asked, setting, reader in purity.NAMED_SETTINGS:
            if asked & (attributes | names):
                found: Any = reader()()
                if isinstance(found, dict):
                    changing = ("_", "SHLVL", "OLDPWD", "PWD", "PYTEST_CURRENT_TEST")
                    found = sorted(each for each in cast("Any", found).items() if each[0] not in changing)
                self.put(setting, repr(found))
        if "argv" in attributes | names:
            self.put("arguments", repr(sys.argv))

    def _code(self, code: types.CodeType) -> None:
        counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
        names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
        self.put("code", code.co_code)
        self.put("code", repr((code.co_name, counts, names, code.co_exceptiontable)))
        for each in code.co_consts:
            if isinstance(each, types.CodeType):
                self._code(each)
            else:
                self.add(each, code.co_name)
        for instruction in dis.get_instructions(code):
            if instruction.opname == "IMPORT_NAME":
                self._module(str(instruction.argval))

    def _module(self, module: str) -> None:
        """A module, which may not be imported yet: a package by its version, other code by its text."""
        found = sys.modules.get(module)
        try:
            spec = getattr(found, "__spec__", None) or importlib.util.find_spec(module.partition(".")[0])
        except (ImportError, ValueError, AttributeError):
            spec = None
        file = getattr(found, "__file__", None) or getattr(spec, "origin", None)
        if module == "__main__" or not isinstance(file, str) or not os.path.isfile(file):
            self.put("module", "" if module == "__main__" else module)
        elif purity.is_library_file(file) or _is_own(module):
            self._packages.add(module.partition(".")[0])
            stamp = os.stat(file)
            self.put("module", f"{module} {stamp.st_size} {stamp.st_mtime_ns}")
        else:
            package = getattr(spec, "submodule_search_locations", None) or ()
            files = [file, *sorted(str(each) for folder in package for each in Path(folder).rglob("*.py"))[:1_000]]
            for each in files:
                self.put("text", Path(each).read_bytes())

    def _is_library_module(self, module: types.ModuleType) -> bool:
        return purity.is_library_module(module) or _is_own(module.__name__)

    def _compiled(self, value: Any, name: str) -> None:
        """A function of compiled code, or a descriptor, by its name."""
        self.put("compiled", f"{getattr(value, '__module__', '')} {getattr(value, '__qualname__', '')}")
        wrapped, owner = getattr(value, "__wrapped__", None), getattr(value, "__self__", None)
        if wrapped is not None:
            self.add(wrapped, name)
        if owner is not None and not isinstance(owner, types.ModuleType):
            self.add(owner, name)
        if isinstance(getattr(value, "__module__", None), str):
            self._module(value.__module__)

    def _open_file(self, value: Any, name: str) -> None:
        path = getattr(value, "name", None)
        if value.closed or not isinstance(path, str | bytes) or not value.readable() or value.writable():
            raise NotWrittenError(f"{name} is an open {type(value).__name__}, whose content cannot be read")
        self.put("file", repr((_entry_of(os.fsdecode(path)), value.tell())))

    def _add_paths(self, value: Any) -> None:
        """The size and time of the files that texts name."""
        if isinstance(value, str):
            if 0 < len(value) < 1_024 and (os.sep in value or "." in value) and self._num_paths < MOST_PATHS:
                if "\n" not in value and "\0" not in value:
                    self._num_paths += 1
                    self._add_path(value)
        elif isinstance(value, list | tuple):
            for each in cast("Sequence[Any]", value):
                self._add_paths(each)
        elif isinstance(value, dict):
            for each in cast("dict[Any, Any]", value).values():
                self._add_paths(each)

    def _add_path(self, name: str) -> None:
        try:
            found = os.stat(name)
        except (OSError, ValueError):
            return
        path = os.path.abspath(name)
        is_left_out = self._left_out is not None and path.startswith(os.path.join(self._left_out, ""))
        if stat.S_ISREG(found.st_mode) and not is_left_out and not path.startswith(OF_THE_SYSTEM):
            self.put("path", f"{found.st_size} {found.st_mtime_ns}")


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether a value is made of numbers, texts, and lists, tuples and dicts of these alone."""
    kind: Any = type(value)
    if kind in _PLAIN:
        return True
    if depth > 4:
        return False
    if kind in (list, tuple):
        kinds = set(map(type, value))
        return kinds <= _PLAIN or all(_is_plain(each, depth + 1) for each in value)
    if kind is dict:
        return set(map(type, value)) <= _PLAIN and all(_is_plain(each, depth + 1) for each in value.values())
    return False


def _is_python_class(kind: type) -> bool:
    """Whether all state of a class's objects is in attributes, slots and elements: no base is compiled code."""
    bases = [each for each in kind.__mro__ if each not in (object, dict, list, tuple, set, frozenset, deque)]
    own = ("__reduce__", "__reduce_ex__", "__getstate__")
    return all(
        not purity.is_library_class(each)
        or (each.__flags__ & _HEAP_TYPE and not any(name in vars(each) for name in own))
        for each in bases
    )


_HEAP_TYPE = 1 << 9
"""Of a class that a Python program has made; most of compiled code have not this flag."""


def _is_own(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] == "fasttrain"


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing in it yet
        return None


def _names_read(code: types.CodeType) -> tuple[set[str], set[str]]:
    """The names of globals that code reads, and all its names."""
    found, every = set[str](), set(code.co_names)
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            found.add(str(instruction.argval))
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            inner, names = _names_read(each)
            found |= inner
            every |= names
    return found, every


def _version_of(package: str) -> str:
    module = sys.modules.get(package)
    found = getattr(module, "__version__", None)
    if isinstance(found, str):
        return found
    with suppress(metadata.PackageNotFoundError, ValueError):
        return metadata.version(package)
    return ""
