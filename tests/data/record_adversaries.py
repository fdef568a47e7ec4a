"""Datasets on which a recorder of rows can go wrong, made from a table of kinds and homes.

A home is where a value lies that rows depend on: an attribute, a global, a closure, a file. A kind says how the value
moves: the user sets it between epochs, each read counts it up, it moves late. Beside them stand adversaries of one
kind: entropy, workers, aliases, readers of the order. No adversary needs a refusal: the plain loader's batches are
always a right answer, and a refusal before a wrong batch is another.
"""

from __future__ import annotations

import array
import builtins
import collections
import contextvars
import ctypes
import datetime
import decimal
import enum
import fractions
import functools
import io
import itertools
import logging
import mmap
import multiprocessing
import os
import random
import secrets
import sqlite3
import struct
import sys
import threading
import time
import types
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    Sampler,
    StackDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)

from tests.data.record_loaders import Record, Trace, identity, refusals, scribble, seed_all, states

NUM_ROWS = 12
EPOCHS = 4
SOME = 5
"""The row that differs where only some do."""


# Homes: where a value lies --------------------------------------------------------------------------------------------


class Home:
    """`get` is called by each read, `put` by the user (and by reads of the kinds that count)."""

    folder: Path

    def get(self) -> int:
        raise NotImplementedError

    def put(self, value: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Undoes what the process would keep."""


class Attribute(Home):
    level = 0

    def get(self) -> int:
        return self.level

    def put(self, value: int) -> None:
        self.level = value


class PrivateBehindProperty(Home):
    __level = 0

    @property
    def level(self) -> int:
        return self.__level

    def get(self) -> int:
        return self.level

    def put(self, value: int) -> None:
        self.__level = value


class BehindGetattr(Home):
    def __getattr__(self, name: str) -> Any:
        if name != "current":
            raise AttributeError(name)
        return self.__dict__.get("kept", 0)

    def get(self) -> int:
        return self.current

    def put(self, value: int) -> None:
        self.__dict__["kept"] = value


class ListEntry(Home):
    def put(self, value: int) -> None:
        self.__dict__.setdefault("levels", [0, 0])[1] = value

    def get(self) -> int:
        return self.levels[1]


class DictEntry(Home):
    def put(self, value: int) -> None:
        self.__dict__.setdefault("options", {"deep": {}})["deep"]["level"] = value

    def get(self) -> int:
        return self.options["deep"]["level"]


class SetSize(Home):
    def put(self, value: int) -> None:
        self.flags = set(range(value))

    def get(self) -> int:
        return len(self.flags)


class Deque(Home):
    def put(self, value: int) -> None:
        self.__dict__.setdefault("recent", collections.deque(maxlen=2)).append(value)

    def get(self) -> int:
        return self.recent[-1]


def once(self: Any, make: Callable[[], Any]) -> Any:
    if "held" not in self.__dict__:
        self.held = make()
    return self.held


class NumpyInPlace(Home):
    def put(self, value: int) -> None:
        once(self, lambda: np.zeros(4, np.int64))[2] = value

    def get(self) -> int:
        return int(self.held[2])


class NumpyView(Home):
    """The dataset holds a view; the user writes to what it is a view of."""

    def put(self, value: int) -> None:
        whole = WHOLES.setdefault(id(self), np.zeros(9, np.int64))
        once(self, lambda: whole[2:6])
        whole[3] = value

    def get(self) -> int:
        return int(self.held[1])

    def close(self) -> None:
        WHOLES.clear()


WHOLES: dict[int, Any] = {}


class NumpyObjects(Home):
    def put(self, value: int) -> None:
        once(self, lambda: np.array([[0], [0]], object))[1, 0] = value

    def get(self) -> int:
        return self.held[1, 0]


class TensorInPlace(Home):
    def put(self, value: int) -> None:
        once(self, lambda: torch.zeros(4))[1] = value

    def get(self) -> int:
        return int(self.held[1])


class TensorData(Home):
    """`.data` and `.numpy()` write without a new version."""

    def put(self, value: int) -> None:
        once(self, lambda: torch.zeros(4)).data[1] = value

    def get(self) -> int:
        return int(self.held[1])


class TensorThroughNumpy(Home):
    def put(self, value: int) -> None:
        once(self, lambda: torch.zeros(4)).numpy()[1] = value

    def get(self) -> int:
        return int(self.held[1])


class TensorReplaced(Home):
    def put(self, value: int) -> None:
        self.held = torch.tensor([value])

    def get(self) -> int:
        return int(self.held)


class ModuleWeight(Home):
    def put(self, value: int) -> None:
        with torch.no_grad():
            once(self, lambda: nn.Linear(1, 1)).weight.fill_(value)

    def get(self) -> int:
        return int(self.held.weight)


class FrameCell(Home):
    def put(self, value: int) -> None:
        once(self, lambda: pd.DataFrame({"a": [0, 0], "b": [0.5, 0.5]})).loc[1, "a"] = value

    def get(self) -> int:
        return int(self.held.iloc[1]["a"])


class ByteArray(Home):
    def put(self, value: int) -> None:
        once(self, lambda: bytearray(3))[1] = value

    def get(self) -> int:
        return self.held[1]


class TypedArray(Home):
    def put(self, value: int) -> None:
        once(self, lambda: array.array("q", [0, 0]))[1] = value

    def get(self) -> int:
        return self.held[1]


class AnonymousMap(Home):
    def put(self, value: int) -> None:
        once(self, lambda: mmap.mmap(-1, 16))[3] = value

    def get(self) -> int:
        return self.held[3]


class Ctypes(Home):
    def put(self, value: int) -> None:
        once(self, ctypes.c_long).value = value

    def get(self) -> int:
        return self.held.value


class SharedValue(Home):
    def put(self, value: int) -> None:
        once(self, lambda: multiprocessing.Value("q", 0)).value = value

    def get(self) -> int:
        return self.held.value


class Stream(Home):
    """The position of a stream is a state too."""

    def put(self, value: int) -> None:
        once(self, lambda: io.BytesIO(bytes(256))).seek(value)

    def get(self) -> int:
        return self.held.tell()


class Database(Home):
    def put(self, value: int) -> None:
        once(self, self._connect).execute("update t set level = ?", (value,))

    def _connect(self) -> Any:
        connection = sqlite3.connect(":memory:", isolation_level=None)
        connection.execute("create table t (level)")
        connection.execute("insert into t values (0)")
        return connection

    def get(self) -> int:
        return self.held.execute("select level from t").fetchone()[0]

    def close(self) -> None:
        self.held.close()


class Suspended(Home):
    """The state is in the frame of a generator."""

    def put(self, value: int) -> None:
        once(self, self._running).send(value)

    def _running(self) -> Any:
        def hold() -> Any:
            level = 0
            while True:
                given = yield level
                level = level if given is None else given

        running = hold()
        next(running)
        return running

    def get(self) -> int:
        return next(self.held)


class Client:
    """Stands for a connection: the server moves on by itself."""

    def __init__(self) -> None:
        self.level = 0

    def fetch(self) -> int:
        return self.level


class ClientState(Home):
    def put(self, value: int) -> None:
        once(self, Client).level = value

    def get(self) -> int:
        return self.held.fetch()


class Slotted:
    __slots__ = ("level",)


class SlotState(Home):
    def put(self, value: int) -> None:
        once(self, Slotted).level = value

    def get(self) -> int:
        return self.held.level


class ClassAttribute(Home):
    def put(self, value: int) -> None:
        type(self).shared_level = value

    def get(self) -> int:
        return type(self).shared_level


class BaseClassAttribute(Home):
    base_level = 0

    def put(self, value: int) -> None:
        BaseClassAttribute.base_level = value

    def get(self) -> int:
        return self.base_level

    def close(self) -> None:
        BaseClassAttribute.base_level = 0


class OtherClassAttribute(Home):
    def put(self, value: int) -> None:
        Settings.level = value

    def get(self) -> int:
        return Settings.level


class Settings:
    level = 0


LEVEL = 0
LEVELS = [0]
MODULE = types.ModuleType("settings_of_the_user")
CONTEXT = contextvars.ContextVar("level", default=0)
LOCAL = threading.local()


class Global(Home):
    def put(self, value: int) -> None:
        global LEVEL
        LEVEL = value

    def get(self) -> int:
        return LEVEL


class GlobalList(Home):
    def put(self, value: int) -> None:
        LEVELS[0] = value

    def get(self) -> int:
        return LEVELS[0]


class GlobalByName(Home):
    def put(self, value: int) -> None:
        globals()["LEVEL"] = value

    def get(self) -> int:
        return globals()["LEVEL"]


class GlobalThroughHelpers(Home):
    def put(self, value: int) -> None:
        LEVELS[0] = value

    def get(self) -> int:
        return _outer()


def _outer() -> int:
    return (lambda: [_inner() for _ in range(1)])()[0]


def _inner() -> int:
    return LEVELS[0]


class ModuleAttribute(Home):
    def put(self, value: int) -> None:
        MODULE.level = value

    def get(self) -> int:
        return MODULE.level


class ModuleAttributeByName(Home):
    def put(self, value: int) -> None:
        setattr(MODULE, "lev" + "el", value)

    def get(self) -> int:
        return getattr(MODULE, "".join(["le", "vel"]))


class ImportedInside(Home):
    def put(self, value: int) -> None:
        MODULE.level = value
        sys.modules["settings_of_the_user"] = MODULE

    def get(self) -> int:
        import settings_of_the_user

        return settings_of_the_user.level

    def close(self) -> None:
        sys.modules.pop("settings_of_the_user", None)


class Builtin(Home):
    def put(self, value: int) -> None:
        builtins.level_of_the_user = value

    def get(self) -> int:
        return level_of_the_user  # noqa: F821

    def close(self) -> None:
        del builtins.level_of_the_user


class Context(Home):
    def put(self, value: int) -> None:
        CONTEXT.set(value)

    def get(self) -> int:
        return CONTEXT.get()


class ThreadLocal(Home):
    def put(self, value: int) -> None:
        LOCAL.level = value

    def get(self) -> int:
        return LOCAL.level


class LogLevel(Home):
    """A registry of the process that a function looks up by name."""

    def put(self, value: int) -> None:
        logging.getLogger("of the user").setLevel(value + 10)

    def get(self) -> int:
        return logging.getLogger("of the user").level - 10


class Registered(Home):
    """Looked up in torch's or numpy's own settings: floats print with another precision."""

    def put(self, value: int) -> None:
        np.set_printoptions(precision=8 + value)

    def get(self) -> int:
        return np.get_printoptions()["precision"] - 8

    def close(self) -> None:
        np.set_printoptions(precision=8)


class Closure(Home):
    def _functions(self) -> Any:
        level = 0

        def get() -> int:
            return level

        def put(value: int) -> None:
            nonlocal level
            level = value

        return get, put

    def put(self, value: int) -> None:
        once(self, self._functions)[1](value)

    def get(self) -> int:
        return self.held[0]()


class ClosureOverList(Home):
    def _function(self) -> Any:
        levels = [0]
        return lambda value=None: levels.__setitem__(0, value) if value is not None else levels[0]

    def put(self, value: int) -> None:
        once(self, self._function)(value)

    def get(self) -> int:
        return self.held()


def keeps_in_default(value: int | None = None, kept: list[int] = [0]) -> int:  # noqa: B006
    if value is not None:
        kept[0] = value
    return kept[0]


class MutableDefault(Home):
    def put(self, value: int) -> None:
        keeps_in_default(value)

    def get(self) -> int:
        return keeps_in_default()


def shift(by: int = 0, *, more: int = 0) -> int:
    return by + more


class DefaultReplaced(Home):
    def put(self, value: int) -> None:
        shift.__defaults__ = (value,)

    def get(self) -> int:
        return shift()

    def close(self) -> None:
        shift.__defaults__ = (0,)


class KeywordDefaultReplaced(Home):
    def put(self, value: int) -> None:
        shift.__kwdefaults__["more"] = value

    def get(self) -> int:
        return shift()

    def close(self) -> None:
        shift.__kwdefaults__["more"] = 0


def recoded() -> int:
    return 0


class CodeReplaced(Home):
    def put(self, value: int) -> None:
        recoded.__code__ = eval(f"lambda: {value}").__code__

    def get(self) -> int:
        return recoded()


class FunctionAttribute(Home):
    def put(self, value: int) -> None:
        recoded.level = value

    def get(self) -> int:
        return recoded.level


class FunctionReplaced(Home):
    def put(self, value: int) -> None:
        globals()["replaced"] = lambda: value

    def get(self) -> int:
        return replaced()  # noqa: F821


class MethodReplaced(Home):
    def put(self, value: int) -> None:
        type(self).transform = lambda self: value

    def get(self) -> int:
        return self.transform()


class MethodOfInstance(Home):
    def put(self, value: int) -> None:
        self.transform = types.MethodType(lambda self: value, self)

    def get(self) -> int:
        return self.transform()


@dataclass
class Add:
    by: int

    def __call__(self) -> int:
        return self.by


class TransformReplaced(Home):
    def put(self, value: int) -> None:
        self.transform = Add(value)

    def get(self) -> int:
        return self.transform()


class TransformChanged(Home):
    def put(self, value: int) -> None:
        once(self, lambda: Add(0)).by = value

    def get(self) -> int:
        return self.held()


class PartialReplaced(Home):
    def put(self, value: int) -> None:
        self.transform = functools.partial(int, str(value))

    def get(self) -> int:
        return self.transform()


class LambdaReplaced(Home):
    """Same code, another constant."""

    def put(self, value: int) -> None:
        self.transform = eval(f"lambda: {value}")

    def get(self) -> int:
        return self.transform()


class OtherClass(Home):
    """The transform becomes an object of another class, with the same attributes."""

    def put(self, value: int) -> None:
        self.transform = type("Transform", (), {"__call__": lambda self: value})()

    def get(self) -> int:
        return self.transform()


class ClassChanged(Home):
    """`object.__class__` is assigned: nothing else changes."""

    def put(self, value: int) -> None:
        once(self, Client).__class__ = type("Client", (Client,), {"fetch": lambda self: value})

    def get(self) -> int:
        return self.held.fetch()


@functools.lru_cache
def remembered() -> int:
    return LEVELS[0]


class Cached(Home):
    def put(self, value: int) -> None:
        LEVELS[0] = value
        remembered.cache_clear()

    def get(self) -> int:
        return remembered()


class CachedAndStale(Home):
    """What is cached stays after the global has changed, until the user clears it: at the third change."""

    def put(self, value: int) -> None:
        LEVELS[0] = value
        if value != 1:
            remembered.cache_clear()

    def get(self) -> int:
        return remembered()


class Environment(Home):
    def put(self, value: int) -> None:
        os.environ["FASTTRAIN_TEST_LEVEL"] = str(value)

    def get(self) -> int:
        return int(os.environ["FASTTRAIN_TEST_LEVEL"])

    def close(self) -> None:
        os.environ.pop("FASTTRAIN_TEST_LEVEL", None)


class EnvironmentByGetenv(Environment):
    def get(self) -> int:
        return int(os.getenv("FASTTRAIN_TEST_LEVEL") or 0)


class File(Home):
    """Edited at the same size; a clock of whole seconds does not see it."""

    def put(self, value: int) -> None:
        path = self.folder / "level.txt"
        path.write_text(f"{value:04d}")
        os.utime(path, (10**9, 10**9))

    def get(self) -> int:
        with open(self.folder / "level.txt") as file:
            return int(file.read())


class FileKeptOpen(Home):
    def put(self, value: int) -> None:
        (self.folder / "level.txt").write_text(f"{value:04d}")
        once(self, lambda: open(self.folder / "level.txt", "rb", buffering=0))

    def get(self) -> int:
        self.held.seek(0)
        return int(self.held.read())

    def close(self) -> None:
        self.held.close()


class FileByDescriptor(Home):
    def put(self, value: int) -> None:
        path = self.folder / "level.bin"
        path.write_bytes(bytes([value]))

    def get(self) -> int:
        descriptor = os.open(self.folder / "level.bin", os.O_RDONLY)
        try:
            return os.read(descriptor, 1)[0]
        finally:
            os.close(descriptor)


class FileByNumpy(Home):
    def put(self, value: int) -> None:
        np.save(self.folder / "level.npy", np.full(3, value))

    def get(self) -> int:
        return int(np.load(self.folder / "level.npy")[1])


class FileByTorch(Home):
    def put(self, value: int) -> None:
        torch.save(torch.full((3,), value), self.folder / "level.pt")

    def get(self) -> int:
        return int(torch.load(self.folder / "level.pt")[1])


class FileMapped(Home):
    def put(self, value: int) -> None:
        path = self.folder / "levels.bin"
        if not path.exists():
            path.write_bytes(bytes(8))
        with path.open("r+b") as file:
            file.seek(3)
            file.write(bytes([value]))
        once(self, lambda: np.memmap(path, np.uint8, "r"))

    def get(self) -> int:
        return int(self.held[3])


class FileSize(Home):
    def put(self, value: int) -> None:
        (self.folder / "size").write_bytes(bytes(value))

    def get(self) -> int:
        return os.stat(self.folder / "size").st_size


class FileExists(Home):
    def put(self, value: int) -> None:
        for number in range(99):
            (self.folder / f"{number}.flag").unlink(missing_ok=True)
        for number in range(value):
            (self.folder / f"{number}.flag").touch()

    def get(self) -> int:
        return sum(os.path.exists(self.folder / f"{number}.flag") for number in range(99))


class FolderListed(FileExists):
    def get(self) -> int:
        return sum(name.endswith(".flag") for name in os.listdir(self.folder))


class LinkRetargeted(Home):
    def put(self, value: int) -> None:
        (self.folder / f"v{value}").write_text(str(value))
        (self.folder / "current").unlink(missing_ok=True)
        (self.folder / "current").symlink_to(self.folder / f"v{value}")

    def get(self) -> int:
        return int((self.folder / "current").read_text())


class WorkingFolder(Home):
    """A relative path."""

    def put(self, value: int) -> None:
        once(self, os.getcwd)
        (self.folder / f"d{value}").mkdir(exist_ok=True)
        (self.folder / f"d{value}" / "level").write_text(str(value))
        os.chdir(self.folder / f"d{value}")

    def get(self) -> int:
        return int(Path("level").read_text())

    def close(self) -> None:
        os.chdir(self.held)


class DefaultDtype(Home):
    """What `torch.zeros` makes is a setting of the process."""

    def put(self, value: int) -> None:
        torch.set_default_dtype([torch.float32, torch.float64, torch.float16, torch.bfloat16][value % 4])

    def get(self) -> Any:
        return torch.zeros(()).element_size() + torch.finfo(torch.zeros(()).dtype).bits

    def close(self) -> None:
        torch.set_default_dtype(torch.float32)


class Seeded(Home):
    """Seeded anew in each epoch, in the main process."""

    def put(self, value: int) -> None:
        torch.manual_seed(value)

    def get(self) -> int:
        return torch.initial_seed()


class GradMode(Home):
    def put(self, value: int) -> None:
        torch.set_grad_enabled(value % 2 == 0)

    def get(self) -> int:
        return int(torch.is_grad_enabled())

    def close(self) -> None:
        torch.set_grad_enabled(True)


HOMES: list[type[Home]] = [
    Attribute,
    PrivateBehindProperty,
    BehindGetattr,
    ListEntry,
    DictEntry,
    SetSize,
    Deque,
    NumpyInPlace,
    NumpyView,
    NumpyObjects,
    TensorInPlace,
    TensorData,
    TensorThroughNumpy,
    TensorReplaced,
    ModuleWeight,
    FrameCell,
    ByteArray,
    TypedArray,
    AnonymousMap,
    Ctypes,
    SharedValue,
    Stream,
    Database,
    Suspended,
    ClientState,
    SlotState,
    ClassAttribute,
    BaseClassAttribute,
    OtherClassAttribute,
    Global,
    GlobalList,
    GlobalByName,
    GlobalThroughHelpers,
    ModuleAttribute,
    ModuleAttributeByName,
    ImportedInside,
    Builtin,
    Context,
    ThreadLocal,
    LogLevel,
    Registered,
    Closure,
    ClosureOverList,
    MutableDefault,
    DefaultReplaced,
    KeywordDefaultReplaced,
    CodeReplaced,
    FunctionAttribute,
    FunctionReplaced,
    MethodReplaced,
    MethodOfInstance,
    TransformReplaced,
    TransformChanged,
    PartialReplaced,
    LambdaReplaced,
    OtherClass,
    ClassChanged,
    Cached,
    CachedAndStale,
    Environment,
    EnvironmentByGetenv,
    File,
    FileKeptOpen,
    FileByDescriptor,
    FileByNumpy,
    FileByTorch,
    FileMapped,
    FileSize,
    FileExists,
    FolderListed,
    LinkRetargeted,
    WorkingFolder,
    DefaultDtype,
    Seeded,
    GradMode,
]

COUNTED: list[type[Home]] = [
    Attribute,
    PrivateBehindProperty,
    ListEntry,
    DictEntry,
    Deque,
    NumpyInPlace,
    TensorInPlace,
    TensorThroughNumpy,
    ModuleWeight,
    ByteArray,
    TypedArray,
    AnonymousMap,
    Ctypes,
    SharedValue,
    Stream,
    Database,
    Suspended,
    ClientState,
    SlotState,
    ClassAttribute,
    OtherClassAttribute,
    Global,
    GlobalList,
    GlobalThroughHelpers,
    ModuleAttribute,
    Context,
    ThreadLocal,
    Closure,
    ClosureOverList,
    MutableDefault,
    DefaultReplaced,
    FunctionAttribute,
    TransformReplaced,
    TransformChanged,
    Environment,
    File,
    FileMapped,
    FileSize,
]
"""Homes to which a read writes as well."""

MIDWAY: list[type[Home]] = [Attribute, ListEntry, NumpyInPlace, TensorInPlace, Global, TransformReplaced, File]
"""Homes that the user changes between two batches and restores before the epoch ends."""


# Kinds: how the value moves -------------------------------------------------------------------------------------------


class Rows(Dataset[Any]):
    """Rows of a table, moved by what lies in the home."""

    def __init__(self) -> None:
        self.x = np.arange(NUM_ROWS * 2.0).reshape(NUM_ROWS, 2)

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, i: int) -> Any:
        return {"x": self.x[i] + self.level_of(i), "y": int(i)}


class Between:
    """The user sets it between epochs; the first two epochs agree."""

    def level_of(self, i: int) -> int:
        return self.get()


class BetweenForSome(Between):
    def level_of(self, i: int) -> int:
        return self.get() if i == SOME else 0


class Counted:
    """Each read moves it."""

    def level_of(self, i: int) -> int:
        self.put(self.get() + 1)
        return self.get()


class CountedLate:
    """Each read counts; rows move from the third epoch on."""

    def level_of(self, i: int) -> int:
        self.put(self.get() + 1)
        return 1 if self.get() > 2 * NUM_ROWS else 0


class CountedSilently:
    """Each read counts, no row of its own shows it, and one row gives the count of all reads."""

    def level_of(self, i: int) -> int:
        self.put(self.get() + 1)
        return self.get() if i == SOME else 0


def dataset_of(home: type[Home], kind: type, folder: Path) -> Any:
    made = type(f"{kind.__name__}{home.__name__}", (kind, home, Rows), {})()
    made.folder = folder
    made.put(0)
    return made


# Adversaries ----------------------------------------------------------------------------------------------------------


@dataclass
class World:
    """A loader, and what its user does to it.

    `before` is called before each epoch, `after_batch` after each batch, with the epoch and the batch's number.
    """

    loader: DataLoader[Any]
    before: Callable[[int], Any] = lambda epoch: None
    after_batch: Callable[[int, int], Any] = lambda epoch, number: None
    close: Callable[[], Any] = lambda: None
    writes: bool = False
    in_thread: Callable[[int], bool] = lambda epoch: False
    then: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Adversary:
    """`oracle` says how a batch is known to be right.

    "same": bitwise that of the plain loader, run from the same start. "fresh": no value other than 0 is ever given
    twice. "since": no value is older than its epoch's start.
    """

    name: str
    make: Callable[[Path], World]
    oracle: str = "same"
    noisy: Callable[[int, int], bool] | None = None
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    is_refusal_right: bool = True


def loader_of(dataset: Any, **options: Any) -> DataLoader[Any]:
    if not {"sampler", "batch_sampler", "shuffle"} & options.keys():
        options["shuffle"] = True
    if "batch_sampler" not in options:
        options.setdefault("batch_size", 4)
    return DataLoader(dataset, **options)


def _between(home: type[Home], kind: type, **options: Any) -> Callable[[Path], World]:
    def make(folder: Path) -> World:
        dataset = dataset_of(home, kind, folder)
        put = (
            (lambda epoch: dataset.put((0, 0, 1, 2)[epoch % 4])) if issubclass(kind, Between) else (lambda epoch: None)
        )
        return World(loader_of(dataset, **options), before=put, close=dataset.close)

    return make


def _midway(home: type[Home]) -> Callable[[Path], World]:
    def make(folder: Path) -> World:
        dataset = dataset_of(home, Between, folder)

        def change(epoch: int, number: int) -> None:
            if epoch > 0:
                dataset.put((3, 0, 0)[number])

        return World(loader_of(dataset), after_batch=change, close=dataset.close)

    return make


def by_homes() -> Iterator[Adversary]:
    for kind, homes in [
        (Between, HOMES),
        (BetweenForSome, HOMES[::3]),
        (Counted, COUNTED),
        (CountedLate, COUNTED[::2]),
        (CountedSilently, COUNTED[1::2]),
    ]:
        for home in homes:
            yield Adversary(f"{kind.__name__} {home.__name__}", _between(home, kind))
    for home in MIDWAY:
        yield Adversary(f"Midway {home.__name__}", _midway(home))
    for home in (Attribute, Global, Closure, ClientState):
        for persistent in (False, True):
            options = {"num_workers": 2, "persistent_workers": persistent}
            name = f"Counted {home.__name__}, workers, persistent={persistent}"
            yield Adversary(name, _between(home, Counted, **options))


# Random rows


@dataclass
class Noisy(Dataset[Any]):
    """`draw` gives the noise of a read; `when` says which reads have it."""

    draw: Callable[[], float]
    when: Callable[[Any, int], bool]
    reads: dict[int, int] = field(default_factory=dict[int, int])

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, i: int) -> Any:
        noise = self.draw() if self.when(self, i) else 0.0
        return {"x": np.array([noise], np.float64), "y": int(i)}


def always(rows: Noisy, i: int) -> bool:
    return True


def for_some(rows: Noisy, i: int) -> bool:
    return i == SOME


def second_read(rows: Noisy, i: int) -> bool:
    rows.reads[i] = rows.reads.get(i, 0) + 1
    return rows.reads[i] > 1


class Drawers:
    """Noise by the generators that a program can seed; made anew for each world, so that private ones start anew."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(5)
        self.old = np.random.RandomState(5)
        self.python = random.Random(5)
        self.own = torch.Generator().manual_seed(5)
        self.count = itertools.count(1)

    def torch_rand(self) -> float:
        return float(torch.rand(()))

    def torch_randperm(self) -> float:
        return float(torch.randperm(1000)[0])

    def torch_dropout(self) -> float:
        return float(nn.functional.dropout(torch.ones(8)).sum())

    def torch_bernoulli_rarely(self) -> float:
        return float(torch.rand(()) < 0.05)

    def numpy_rand(self) -> float:
        return float(np.random.rand())

    def numpy_rarely(self) -> float:
        return float(np.random.rand() < 0.05) * float(np.random.normal())

    def numpy_gauss(self) -> float:
        """Every second draw comes from what is kept of the one before."""
        return float(np.random.normal())

    def python_random(self) -> float:
        return random.random()

    def python_rarely(self) -> float:
        return 1.0 if random.random() < 0.05 else 0.0

    def python_shuffle(self) -> float:
        order = list(range(50))
        random.shuffle(order)
        return float(order[0])

    def drawn_and_not_used(self) -> float:
        torch.rand(()), np.random.rand(), random.random()
        return 2.0

    def private_numpy(self) -> float:
        return float(self.rng.random())

    def private_numpy_rarely(self) -> float:
        return float(self.rng.random() < 0.05)

    def private_random_state(self) -> float:
        return float(self.old.rand())

    def private_python(self) -> float:
        return self.python.random()

    def private_torch(self) -> float:
        return float(torch.rand((), generator=self.own))

    def counted(self) -> float:
        return float(next(self.count))

    def seeds_torch(self) -> float:
        """The rows are the same, and the generator is not what it was."""
        torch.manual_seed(11)
        return float(torch.rand(()))

    def seeds_numpy(self) -> float:
        np.random.seed(11)
        return float(np.random.rand())

    def seeds_python(self) -> float:
        random.seed(11)
        return random.random()

    def seeds_by_clock_of_torch(self) -> float:
        """A generator seeded from the state of torch's own, which is not moved."""
        return float(np.random.default_rng(torch.get_rng_state().numpy()[:24].tolist()).random())


SEEDABLE = [name for name in vars(Drawers) if not name.startswith("_")]


def _noisy(name: str, when: Callable[[Noisy, int], bool], **options: Any) -> Callable[[Path], World]:
    return lambda folder: World(loader_of(Noisy(getattr(Drawers(), name), when), **options))


def by_generators() -> Iterator[Adversary]:
    for name in SEEDABLE:
        yield Adversary(f"always {name}", _noisy(name, always))
    for name in ("torch_rand", "numpy_rand", "python_random", "private_numpy", "private_torch", "counted"):
        for when in (for_some, second_read):
            yield Adversary(f"{when.__name__} {name}", _noisy(name, when))
    for name in ("torch_rand", "numpy_rand", "python_random", "private_numpy"):
        yield Adversary(f"always {name}, workers", _noisy(name, always, num_workers=2))
    yield Adversary(
        "always torch_rand, workers, persistent", _noisy("torch_rand", always, num_workers=2, persistent_workers=True)
    )


KEPT: list[Any] = []


def kept_alive() -> float:
    KEPT.append(object())
    return float(id(KEPT[-1]) % 2**52)


def fresh_torch_generator() -> float:
    generator = torch.Generator()
    generator.seed()
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def read_random_device() -> float:
    with open("/dev/urandom", "rb") as file:
        return float(int.from_bytes(file.read(6), "little"))


def random_by_proc() -> float:
    return float(int(Path("/proc/sys/kernel/random/uuid").read_text()[:8], 16) + 0.5)


FRESH: dict[str, Callable[[], float]] = {
    "os.urandom": lambda: float(int.from_bytes(os.urandom(6), "little")),
    "secrets": lambda: float(secrets.randbits(50)),
    "uuid4": lambda: float(uuid.uuid4().int % 2**52),
    "SystemRandom": lambda: random.SystemRandom().random(),
    "default_rng": lambda: float(np.random.default_rng().random()),
    "RandomState": lambda: float(np.random.RandomState().random_sample()),
    "SeedSequence": lambda: float(np.random.SeedSequence().generate_state(1, np.uint64)[0] % 2**52),
    "random.Random": lambda: random.Random().random(),
    "torch.Generator": fresh_torch_generator,
    "/dev/urandom": read_random_device,
    "/proc uuid": random_by_proc,
    "id of a new object": kept_alive,
}
"""Noise that no seed repeats: a value that is given twice has been replayed."""

SINCE: dict[str, Callable[[], float]] = {
    "perf_counter": lambda: float(time.perf_counter_ns()),
    "time": lambda: time.time(),
    "time_ns": lambda: float(time.time_ns()),
    "monotonic": lambda: time.monotonic(),
    "datetime.now": lambda: datetime.datetime.now().timestamp(),
    "pandas now": lambda: float(pd.Timestamp.now().value),
    "clock by lambda": lambda: (lambda clock: clock())(time.perf_counter),
}
"""Clocks: a value from before the epoch has been replayed."""


def sometimes(rows: Noisy, i: int) -> bool:
    """So often that two reads of all rows differ with a chance of 1 - 4**-12, and a replay gives some value twice."""
    return secrets.randbelow(2) == 0


def by_entropy() -> Iterator[Adversary]:
    def world(draw: Callable[[], float], when: Callable[[Noisy, int], bool], **options: Any) -> Callable[[Path], World]:
        return lambda folder: World(loader_of(Noisy(draw, when), **options), close=KEPT.clear)

    every, two = (lambda epoch, row: True), {"workers": 2}
    for name, draw in FRESH.items():
        yield Adversary(f"fresh {name}", world(draw, always), "fresh", every)
    for name in ("os.urandom", "default_rng", "torch.Generator"):
        some = world(FRESH[name], for_some)
        yield Adversary(f"fresh {name} for some", some, "fresh", lambda epoch, row: row == SOME)
        yield Adversary(f"fresh {name} sometimes", world(FRESH[name], sometimes), "fresh")
        second = world(FRESH[name], second_read)
        yield Adversary(f"fresh {name} from the second read", second, "fresh", lambda epoch, row: epoch > 0)
    yield Adversary("fresh uuid4, workers", world(FRESH["uuid4"], always, num_workers=2), "fresh", every)
    yield Adversary("fresh uuid4, read ahead", world(FRESH["uuid4"], always), "fresh", every, two)
    for name, clock in SINCE.items():
        yield Adversary(f"since {name}", world(clock, always), "since")


# Rows that depend on who reads them, and in which order


class Base(Dataset[Any]):
    def __init__(self) -> None:
        self.x = torch.arange(NUM_ROWS * 2.0).reshape(NUM_ROWS, 2)
        self.a = np.arange(NUM_ROWS * 2.0).reshape(NUM_ROWS, 2)
        self.rows = [{"x": [float(i)], "y": i} for i in range(NUM_ROWS)]
        self.last = 0
        self.size = NUM_ROWS

    def __len__(self) -> int:
        return self.size


class ByWorker(Base):
    def __getitem__(self, i: int) -> Any:
        info = get_worker_info()
        return i, -1 if info is None else info.id


class BySeedOfWorker(Base):
    def __getitem__(self, i: int) -> Any:
        info = get_worker_info()
        return i, torch.initial_seed() % 1000 if info is None else info.seed % 1000


class ByProcess(Base):
    home = os.getpid()

    def __getitem__(self, i: int) -> Any:
        return i, os.getpid() == self.home


class ByThread(Base):
    def __getitem__(self, i: int) -> Any:
        return i, threading.current_thread() is threading.main_thread()


class ByParent(Base):
    def __getitem__(self, i: int) -> Any:
        return i, multiprocessing.parent_process() is None


class ByPrevious(Base):
    def __getitem__(self, i: int) -> Any:
        last, self.last = self.last, i
        return i, last


class ByBatch(Base):
    """`__getitems__` may do with a batch what it likes."""

    def __getitems__(self, indices: list[int]) -> Any:
        mean = self.x[indices].mean()
        return [(i, self.x[i] - mean) for i in indices]


class ByPlaceInBatch(Base):
    def __getitems__(self, indices: list[int]) -> Any:
        return [(i, number) for number, i in enumerate(sorted(indices))]


class FewerThanAsked(Base):
    def __getitems__(self, indices: list[int]) -> Any:
        return [self.x[i] for i in indices if i % 3] or [self.x[0]]


class GetitemsIsAnother(Base):
    """The loader calls `__getitems__`, which gives other rows than `__getitem__`."""

    def __getitem__(self, i: int) -> Any:
        return self.x[i]

    def __getitems__(self, indices: list[int]) -> Any:
        return [self.x[i] * 2 for i in indices]


class GivesGenerators(Base):
    def __getitem__(self, i: int) -> Any:
        return (i * number for number in range(3))


class GivesOneIterator(Base):
    """All rows are one iterator, which moves on as it is read."""

    def __getitem__(self, i: int) -> Any:
        self.running = getattr(self, "running", None) or itertools.count(1)
        return self.running


class GivesItself(Base):
    def __getitem__(self, i: int) -> Any:
        self.last = i
        return self


class GivesOneBuffer(Base):
    """Each row is written into the same array."""

    buffer = np.zeros(2)

    def __getitem__(self, i: int) -> Any:
        self.buffer[:] = self.a[i]
        return self.buffer


class GivesOneTensor(Base):
    buffer = torch.zeros(2)

    def __getitem__(self, i: int) -> Any:
        return self.buffer.copy_(self.x[i])


class Raises(Base):
    """One row can't be read in every second epoch."""

    def __getitem__(self, i: int) -> Any:
        if i == SOME and self.last % 2:
            raise ValueError(f"row {i} is broken in epoch {self.last}")
        return self.x[i]


class RaisesAlways(Base):
    def __getitem__(self, i: int) -> Any:
        if i == SOME:
            raise KeyError("no row 5")
        return self.x[i]


class Stops(Base):
    """A StopIteration ends the plain loader's epoch, without a word."""

    def __getitem__(self, i: int) -> Any:
        if i == SOME:
            raise StopIteration
        return self.x[i]


class Grows(Base):
    def __getitem__(self, i: int) -> Any:
        return i, self.size


class GrowsBehind(Base):
    """Rows are the same; there are more of them."""

    def __getitem__(self, i: int) -> Any:
        return float(i)


class OwnEpoch(Base):
    def __init__(self, epoch: int = 0) -> None:
        super().__init__()
        self.last = epoch

    def set_epoch(self, epoch: int) -> None:
        self.last = epoch

    def __getitem__(self, i: int) -> Any:
        return self.x[(i + self.last) % NUM_ROWS]


class Lazy(Base):
    """Opens its data at the first read, as datasets with workers do, and reads the same ever after."""

    def __getitem__(self, i: int) -> Any:
        if not hasattr(self, "opened"):
            self.opened = self.x * 3
        return self.opened[i] + 0


class Memo(Base):
    """A cache of its own, right and harmless."""

    def __getitem__(self, i: int) -> Any:
        cache = self.__dict__.setdefault("cache", {})
        if i not in cache:
            cache[i] = self.x[i] * 3
        return cache[i].clone()


class DynamicLength(Base):
    def __len__(self) -> int:
        self.last += 1
        return NUM_ROWS - self.last % 2

    def __getitem__(self, i: int) -> Any:
        return i


def as_list(rows: list[Any]) -> list[Any]:
    return rows


def sums(rows: list[Any]) -> Any:
    return [sum(itertools.islice(row, 3)) for row in rows]


def lasts(rows: list[Any]) -> Any:
    return [row.last for row in rows]


class InsertsInto:
    """A collate that gives out one buffer again and again."""

    def __init__(self) -> None:
        self.out = torch.zeros(4, 2)

    def __call__(self, rows: list[Any]) -> Any:
        return torch.stack(rows, out=self.out)


class DelaysByOne:
    """A collate that gives out the batch before."""

    def __init__(self) -> None:
        self.before: Any = None

    def __call__(self, rows: list[Any]) -> Any:
        before, self.before = self.before, torch.stack(rows)
        return before


def pops(rows: list[Any]) -> Any:
    """Takes from the dataset's own rows: the second time there is nothing."""
    return [row.pop("y", None) for row in rows]


def doubles(rows: list[Any]) -> Any:
    return torch.stack([row.mul_(2) for row in rows]).clone()


class ByIndexType(Base):
    def __getitem__(self, i: Any) -> Any:
        return type(i).__name__, float(i), str(i)


class MixedKeys(Sampler[Any]):
    """Keys that are equal and not the same."""

    def __iter__(self) -> Iterator[Any]:
        return iter([1, True, 1.0, np.int64(1), 0, False, -0.0, 0.0, torch.tensor(1), np.uint8(1), "1", 1])

    def __len__(self) -> int:
        return 12


def _of(rows: Callable[[], Any], **options: Any) -> Callable[[Path], World]:
    return lambda folder: World(loader_of(rows(), **options))


def _written(rows: Callable[[], Any], **options: Any) -> Callable[[Path], World]:
    return lambda folder: World(loader_of(rows(), **options), writes=True)


class Aliases(Base):
    """Rows that are views of the dataset's own memory."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def __getitem__(self, i: int) -> Any:
        source = {"tensor": self.x, "array": self.a, "dict": self.rows}[self.kind]
        return source[i]


class AliasInside(Base):
    def __getitem__(self, i: int) -> Any:
        return {"copy": self.x[i] + 1, "view": (self.a[i], [self.x[i][1:]])}


class AliasOfOne(Base):
    """All rows share one part."""

    def __getitem__(self, i: int) -> Any:
        return self.x[i] + 1, self.a[0]


def by_reader() -> Iterator[Adversary]:
    two = {"num_workers": 2}
    for rows in (ByWorker, BySeedOfWorker, ByProcess, ByParent, ByThread):
        yield Adversary(rows.__name__, _of(rows))
        yield Adversary(f"{rows.__name__}, read ahead", _of(rows), options={"workers": 2})
        yield Adversary(f"{rows.__name__}, workers", _of(rows, **two))
    yield Adversary("ByWorker, workers, persistent", _of(ByWorker, persistent_workers=True, **two))
    yield Adversary("ByWorker, one worker", _of(ByWorker, num_workers=1))

    def set_level(worker: int) -> None:
        info = get_worker_info()
        assert info is not None
        info.dataset.last = worker  # pyright: ignore[reportAttributeAccessIssue]

    yield Adversary("worker_init_fn", _of(OwnEpoch, worker_init_fn=set_level, **two))
    yield Adversary(
        "another thread",
        lambda folder: World(loader_of(ByThread()), in_thread=lambda epoch: epoch % 2 == 1),
    )
    yield Adversary(
        "another thread, same rows", lambda folder: World(loader_of(Memo()), in_thread=lambda epoch: epoch == 2)
    )
    yield Adversary("ByPrevious", _of(ByPrevious))
    yield Adversary("ByPrevious, in order", _of(ByPrevious, shuffle=False))
    yield Adversary("ByPrevious, workers", _of(ByPrevious, **two))
    yield Adversary("DynamicLength", _of(DynamicLength, shuffle=False))
    for rows in (ByBatch, ByPlaceInBatch, FewerThanAsked, GetitemsIsAnother):
        yield Adversary(rows.__name__, _of(rows))
        yield Adversary(f"{rows.__name__} in a Subset", _of(lambda rows=rows: Subset(rows(), [1, 3, 5, 7, 9, 10, 11])))
    yield Adversary("GivesGenerators", _of(GivesGenerators, collate_fn=sums))
    yield Adversary("GivesOneIterator", _of(GivesOneIterator, collate_fn=sums))
    yield Adversary("GivesItself", _of(GivesItself, collate_fn=lasts))
    for rows in (GivesOneBuffer, GivesOneTensor):
        yield Adversary(rows.__name__, _of(rows))
        yield Adversary(f"{rows.__name__}, as list", _of(rows, collate_fn=as_list))
    yield Adversary("RaisesAlways", _of(RaisesAlways))
    yield Adversary("Stops", _of(Stops))
    yield Adversary("Lazy", _of(Lazy))
    yield Adversary("Lazy, workers", _of(Lazy, **two))
    yield Adversary("Memo", _of(Memo))
    yield Adversary("ByIndexType", _of(ByIndexType, sampler=MixedKeys(), collate_fn=as_list))
    yield Adversary("InsertsInto", _of(lambda: Memo(), collate_fn=InsertsInto(), drop_last=True))
    yield Adversary("DelaysByOne", lambda folder: World(loader_of(Memo(), collate_fn=DelaysByOne())))
    yield Adversary("pops", _of(lambda: Aliases("dict"), collate_fn=pops))
    yield Adversary("doubles", _of(lambda: Aliases("tensor"), collate_fn=doubles))
    yield Adversary("default_collate over views", _written(lambda: Aliases("tensor")))
    for kind in ("tensor", "array", "dict"):
        yield Adversary(f"alias {kind}", _written(lambda kind=kind: Aliases(kind), collate_fn=as_list))
    for kind in ("tensor", "array"):
        yield Adversary(f"alias {kind}, no batches", _written(lambda kind=kind: Aliases(kind), batch_size=None))
        sampler = [3, 3, 1, 0, 3, 3]
        again = _written(lambda kind=kind: Aliases(kind), collate_fn=as_list, sampler=sampler)
        yield Adversary(f"alias {kind}, twice in a batch", again)
    yield Adversary("alias inside", _written(AliasInside, collate_fn=as_list))
    yield Adversary("alias inside, no batches", _written(AliasInside, batch_size=None))
    yield Adversary("alias of one", _written(AliasOfOne, collate_fn=as_list))
    yield Adversary("TensorDataset, no batches", _written(lambda: TensorDataset(Base().x), batch_size=None))
    yield Adversary("TensorDataset, as list", _written(lambda: TensorDataset(Base().x), collate_fn=as_list))
    yield Adversary("list of tensors", _written(lambda: list(Base().x), collate_fn=as_list))
    lists = BatchSampler(range(NUM_ROWS), 5, drop_last=False)
    yield Adversary("array by lists", _written(lambda: Base().a, batch_size=None, sampler=lists))
    slices = [slice(0, 4), slice(2, 8)]
    yield Adversary("array by slices", _written(lambda: Base().a, batch_size=None, sampler=slices))


# Rows that hold other things than tensors, arrays, numbers and strings


class Tagged(torch.Tensor):
    """A subclass of Tensor, as torchvision's are."""


class Kind(enum.IntEnum):
    A = 0
    B = 1


class Word(str):
    """A str with more than its text."""


class Pair(tuple[Any, ...]):
    """A tuple of another type."""


class Sized(list[Any]):
    pass


def _tagged(i: int) -> Any:
    return torch.full((2,), float(i)).as_subclass(Tagged)


def _with_attribute(i: int) -> Any:
    value = torch.full((2,), float(i))
    value.name_of_row = f"row {i}"  # pyright: ignore[reportAttributeAccessIssue]
    return value


def _cycle(i: int) -> Any:
    inside: list[Any] = [i]
    return types.SimpleNamespace(inside=inside, back=[inside, inside])


def _word(i: int) -> Any:
    word = Word(f"w{i}")
    word.language = "fr" if i % 2 else "en"  # pyright: ignore[reportAttributeAccessIssue]
    return word


def _sized(i: int) -> Any:
    rows = Sized([i, float(i)])
    rows.size = i  # pyright: ignore[reportAttributeAccessIssue]
    return rows


def _sparse(i: int) -> Any:
    return torch.sparse_coo_tensor(torch.tensor([[i % 3, 2]]), torch.tensor([1.0, i]), (4,), check_invariants=True)


def _deep(i: int) -> Any:
    value: Any = i
    for _ in range(60):
        value = [value]
    return value


ODD: dict[str, Callable[[int], Any]] = {
    "tensor subclass": _tagged,
    "tensor with an attribute": _with_attribute,
    "tensor that requires grad": lambda i: torch.full((2,), float(i), requires_grad=True),
    "parameter": lambda i: nn.Parameter(torch.full((2,), float(i))),
    "result of a function": lambda i: torch.full((2,), float(i), requires_grad=True) * 2,
    "meta tensor": lambda i: torch.empty(2 + i % 2, device="meta"),
    "sparse tensor": _sparse,
    "float8": lambda i: torch.full((2,), float(i)).to(torch.float8_e4m3fn),
    "module": lambda i: nn.Identity(),
    "masked array": lambda i: np.ma.masked_array([1.0, i], [i % 2 == 0, False]),
    "structured array": lambda i: np.array([(i, 0.5)], [("a", "i4"), ("b", "f8")]),
    "structured scalar": lambda i: np.array([(i, 0.5)], [("a", "i4"), ("b", "f8")])[0],
    "record array": lambda i: np.rec.array([(i, 0.5)], [("a", "i4"), ("b", "f8")]),
    "big-endian array": lambda i: np.full(2, i, ">i4"),
    "read-only array": lambda i: np.frombuffer(bytes([i, 1]), np.uint8),
    "array of objects": lambda i: np.array([i, f"row {i}", None], object),
    "array of strings": lambda i: np.array([f"row {i}", "b" * (i + 1)]),
    "array of bytes": lambda i: np.array([b"ab" * i, b"c\0"]),
    "array of dates": lambda i: np.array(["2020-01-01"], "M8[D]") + i,
    "date scalar": lambda i: np.datetime64("NaT") if i % 2 else np.timedelta64(i, "s"),
    "long double": lambda i: np.longdouble(1) / (i + 3),
    "memory map": lambda i: np.full(2, i).view(np.memmap),
    "numpy str": lambda i: np.str_(f"row {i}"),
    "numpy bytes": lambda i: np.bytes_(b"ab\0"),
    "datetime": lambda i: datetime.datetime(2020, 1, 1 + i),
    "timestamp": lambda i: pd.Timestamp(2020, 1, 1 + i),
    "series": lambda i: pd.Series([i, 2.5]),
    "path": lambda i: Path(f"row/{i}"),
    "decimal": lambda i: decimal.Decimal(i) / 3,
    "fraction": lambda i: fractions.Fraction(i, 7),
    "enum": lambda i: Kind(i % 2),
    "str with more": _word,
    "list with more": _sized,
    "tuple of another type": lambda i: Pair((i, f"row {i}")),
    "range": lambda i: range(i, 2 * i, 3),
    "slice": lambda i: slice(i, None),
    "ellipsis": lambda i: ...,
    "set": lambda i: {i % 2},
    "frozenset": lambda i: frozenset([i]),
    "deque": lambda i: collections.deque([i, 1], maxlen=2 + i),
    "counter": lambda i: collections.Counter({"a": i}),
    "proxy": lambda i: types.MappingProxyType({"a": i}),
    "default dict": lambda i: collections.defaultdict(lambda: i, a=i),
    "bytearray": lambda i: bytearray([i]),
    "memoryview": lambda i: memoryview(bytes([i])),
    "keys of any kind": lambda i: {i: 1, (i, 2): 2, None: 3, 1.5: 4, b"x": 5},
    "keys that are equal": lambda i: {True: i} if i % 2 else {1: i},
    "empty": lambda i: [(), [], {}, set(), "", b""][i % 6],
    "surrogates": lambda i: "\ud800" + "\0" * i,
    "long str": lambda i: "x" * (1 << (i % 4 * 4)),
    "large int": lambda i: (-1) ** i << (62 + i % 4),
    "complex with -0.0": lambda i: complex(-0.0, i),
    "nan with a sign": lambda i: struct.unpack("d", struct.pack("Q", (0xFFF8 << 48) + i))[0],
    "int or bool": lambda i: [True, 1, np.True_, np.int64(1), 1.0, np.float64(1)][i % 6],
    "shape by row": lambda i: np.zeros((i % 3, 2, i % 2)),
    "dims by row": lambda i: torch.zeros((1,) * (i % 4)),
    "dtype by row": lambda i: torch.ones(2, dtype=[torch.float32, torch.int8, torch.bool][i % 3]),
    "layout by row": lambda i: torch.arange(4.0).reshape(2, 2).t() if i % 2 else torch.arange(4.0).reshape(2, 2),
    "part missing": lambda i: [i, i + 1, i + 2][: i % 4],
    "function": lambda i: len if i % 2 else max,
    "lambda": lambda i: lambda: i,
    "class": lambda i: int if i % 2 else float,
    "lock": lambda i: threading.Lock(),
    "cycle": _cycle,
    "deep": _deep,
    "exception": lambda i: ValueError(i),
    "generator of torch": lambda i: torch.Generator().manual_seed(i),
    "dtype": lambda i: torch.float64 if i % 2 else torch.float32,
}


class Holding(Base):
    def __init__(self, make: Callable[[int], Any]) -> None:
        super().__init__()
        self.make = make

    def __getitem__(self, i: int) -> Any:
        return {"x": self.x[i] + 1, "odd": self.make(i)}


COLLATED = ["tensor subclass", "tensor with an attribute", "tensor that requires grad", "parameter", "enum", "float8"]
COLLATED += ["result of a function", "meta tensor", "big-endian array", "masked array", "str with more", "counter"]
COLLATED += ["list with more", "range", "keys of any kind", "dtype by row", "large int", "complex with -0.0"]


def by_leaf() -> Iterator[Adversary]:
    for name, make in ODD.items():
        yield Adversary(f"holds {name}", _of(lambda make=make: Holding(make), collate_fn=as_list))
    for name in COLLATED:  # where default_collate raises, the error is to be the same
        yield Adversary(f"holds {name}, collated", _of(lambda name=name: Holding(ODD[name])))


# What the user changes between epochs


def _changed(rows: Callable[[], Any], change: Callable[[DataLoader[Any], int], Any], **options: Any) -> Any:
    def make(folder: Path) -> World:
        given = {name: value() if callable(value) and name == "sampler" else value for name, value in options.items()}
        loader = loader_of(rows(), **given)
        return World(loader, before=lambda epoch: change(loader, epoch) if epoch else None)

    return make


def by_change() -> Iterator[Adversary]:
    def change(name: str, rows: Callable[[], Any], changes: Callable[[Any, int], Any], **options: Any) -> Adversary:
        return Adversary(f"changed {name}", _changed(rows, changes, **options))

    def put(path: str, value: Callable[[int], Any]) -> Callable[[Any, int], Any]:
        def changes(loader: Any, epoch: int) -> None:
            *parents, last = path.split(".")
            setattr(functools.reduce(getattr, parents, loader), last, value(epoch))

        return changes

    def tensors() -> TensorDataset:
        return TensorDataset(Base().x, torch.arange(NUM_ROWS))

    def fill(loader: Any, epoch: int) -> None:
        loader.dataset.tensors[0][SOME].fill_(epoch)

    def fill_silently(loader: Any, epoch: int) -> None:
        loader.dataset.tensors[0].numpy()[SOME] = epoch

    def weights(loader: Any, epoch: int) -> None:
        loader.sampler.weights[: 2 * epoch] = 0

    yield change("tensors in place", tensors, fill)
    yield change("tensors through numpy", tensors, fill_silently)
    yield change("tensors replaced", tensors, put("dataset.tensors", lambda epoch: (Base().x + epoch,)))
    yield change("fewer tensors", tensors, put("dataset.tensors", lambda epoch: (Base().x[:-epoch] + 0,)))
    yield change(
        "rows of a list", lambda: list(range(NUM_ROWS)), lambda loader, e: loader.dataset.__setitem__(3, 50 + e)
    )
    yield change("longer list", lambda: list(range(NUM_ROWS)), lambda loader, e: loader.dataset.append(50 + e))
    yield change("array", lambda: Base().a, lambda loader, epoch: loader.dataset.__setitem__(3, 50 + epoch))
    yield change("size", Grows, put("dataset.size", lambda epoch: NUM_ROWS - epoch))
    yield change("size behind", GrowsBehind, put("dataset.size", lambda epoch: NUM_ROWS + epoch))
    yield change("own epoch", OwnEpoch, lambda loader, epoch: loader.dataset.set_epoch(epoch))
    yield change("error by epoch", Raises, put("dataset.last", lambda epoch: epoch))
    indices = put("dataset.indices", lambda epoch: [epoch, 2, 3, 4])
    yield change("indices replaced", lambda: Subset(Memo(), [0, 1, 2, 3, 4]), indices)
    in_place = lambda loader, epoch: loader.dataset.indices.reverse()  # noqa: E731
    yield change("indices in place", lambda: Subset(Memo(), [0, 1, 2, 3, 4]), in_place, shuffle=False)
    inner = put("dataset.dataset.x", lambda epoch: Base().x + epoch)
    yield change("rows under a Subset", lambda: Subset(Lazyless(), [1, 2, 3, 4, 5]), inner)
    nested = put("dataset.dataset.dataset.x", lambda epoch: Base().x + epoch)
    yield change("rows under two", lambda: Subset(Subset(Lazyless(), [1, 2, 3, 4, 5]), [4, 3, 0]), nested)
    swap = put("dataset.datasets", lambda epoch: [OwnEpoch(epoch), Lazyless()])
    yield change("concatenated swapped", lambda: ConcatDataset([Lazyless(), OwnEpoch()]), swap)
    one = lambda loader, epoch: loader.dataset.datasets[1].set_epoch(epoch)  # noqa: E731
    yield change("concatenated one", lambda: ConcatDataset([Lazyless(), OwnEpoch()]), one)
    yield change("stacked one", lambda: StackDataset(Lazyless(), OwnEpoch()), one)
    yield change("collate_fn", Lazyless, put("collate_fn", lambda epoch: lambda rows: (epoch, default_collate(rows))))
    yield change("batch size", Lazyless, put("batch_sampler.batch_size", lambda epoch: 2 + epoch))
    yield change("drop_last", Lazyless, put("batch_sampler.drop_last", lambda epoch: epoch % 2 == 1), batch_size=5)
    sampler = lambda: WeightedRandomSampler(torch.ones(NUM_ROWS), 10)  # noqa: E731
    yield change("weights", Lazyless, weights, sampler=sampler)
    yield change("sampler's generator", Lazyless, put("sampler.generator", lambda e: torch.Generator().manual_seed(e)))
    yield change("loader's generator", Lazyless, put("generator", lambda e: torch.Generator().manual_seed(e)))

    def method(loader: Any, epoch: int) -> None:
        type(loader.dataset).__getitem__ = lambda self, i: self.x[i] + epoch

    def code(loader: Any, epoch: int) -> None:
        type(loader.dataset).__getitem__.__code__ = (lambda self, i: self.x[i] - 1).__code__

    yield change("__getitem__ of the class", lambda: type("Patched", (Lazyless,), {})(), method)
    yield change(
        "__getitem__'s code", lambda: type("Recoded", (Base,), {"__getitem__": lambda self, i: self.x[i]})(), code
    )

    def becomes(loader: Any, epoch: int) -> None:
        loader.dataset.__class__ = OwnEpoch
        loader.dataset.last = 1

    yield change("class of the dataset", Lazyless, becomes)

    def grows_getitems(loader: Any, epoch: int) -> None:
        type(loader.dataset).__getitems__ = lambda self, indices: [self.x[i] * 7 for i in indices]

    yield change("__getitems__ appears", lambda: type("Appearing", (Lazyless,), {})(), grows_getitems)


class Lazyless(Base):
    def __getitem__(self, i: int) -> Any:
        return self.x[i]


ADVERSARIES = [*by_homes(), *by_generators(), *by_entropy(), *by_reader(), *by_leaf(), *by_change()]


# `then`: what is to run live on recorded rows -------------------------------------------------------------------------


def noise_torch(row: Any) -> Any:
    return {**row, "x": row["x"] + torch.rand(2).numpy()}


def noise_numpy(row: Any) -> Any:
    return row["x"] + np.random.normal(size=2), row["y"]


def flips_rarely(row: Any) -> Any:
    return row["x"][::-1].copy() if random.random() < 0.05 else row["x"]


def in_place(row: Any) -> Any:
    row["x"] += np.random.normal()
    row["seen"] = row.get("seen", 0) + 1
    return row


def adds_then_level(row: Any) -> Any:
    return row["x"] + LEVELS[0]


class CountingThen:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, row: Any) -> Any:
        self.calls += 1
        return self.calls, row["x"]


class GeneratorThen:
    def __init__(self) -> None:
        self.rng = np.random.default_rng(3)

    def __call__(self, row: Any) -> Any:
        return row["x"] + self.rng.normal(), row["y"]


class Plain(Base):
    """What `then` is applied to; `then` may change the row in place, for it is new."""

    def __getitem__(self, i: int) -> Any:
        return {"x": self.a[i] * 2, "y": int(i)}


class PlainView(Base):
    """`then` that works in place changes the dataset."""

    def __getitem__(self, i: int) -> Any:
        return {"x": self.a[i], "y": int(i)}


class PlainTensor(Base):
    def __getitem__(self, i: int) -> Any:
        return self.x[i] + 1


THENS: dict[str, Callable[[], Callable[[Any], Any]]] = {
    "noise torch": lambda: noise_torch,
    "noise numpy": lambda: noise_numpy,
    "flips rarely": lambda: flips_rarely,
    "in place": lambda: in_place,
    "counting": CountingThen,
    "own generator": GeneratorThen,
}


def by_then() -> Iterator[Adversary]:
    def world(rows: Callable[[], Any], then: Callable[[], Any], **options: Any) -> Callable[[Path], World]:
        return lambda folder: World(loader_of(rows(), **options), then=then(), writes=True)

    for name, then in THENS.items():
        yield Adversary(f"then {name}", world(Plain, then), is_refusal_right=False)
        subset = lambda: Subset(Plain(), [3, 3, 1, 0, 7, 8])  # noqa: E731
        yield Adversary(f"then {name} over a Subset", world(subset, then), is_refusal_right=False)
        sampler = {"sampler": WeightedRandomSampler(torch.ones(NUM_ROWS), 15)}
        yield Adversary(f"then {name}, replacement", world(Plain, then, **sampler), is_refusal_right=False)
    dropout = lambda: nn.Dropout(0.5)  # noqa: E731
    yield Adversary("then dropout", world(PlainTensor, dropout), is_refusal_right=False)
    yield Adversary("then dropout in place", world(PlainTensor, lambda: nn.Dropout(0.5, inplace=True)))
    yield Adversary("then in place over views", world(PlainView, lambda: in_place))
    yield Adversary("then noise torch, as list", world(Plain, lambda: noise_torch, collate_fn=as_list))
    yield Adversary("then noise torch, no batches", world(Plain, lambda: noise_torch, batch_size=None))
    yield Adversary("then noise torch, workers", world(Plain, lambda: noise_torch, num_workers=2))
    yield Adversary("then noise numpy, workers", world(Plain, lambda: noise_numpy, num_workers=2))
    yield Adversary(
        "then with a level",
        lambda folder: World(
            loader_of(Plain()), before=lambda epoch: LEVELS.__setitem__(0, epoch), then=adds_then_level
        ),
    )


THEN = list(by_then())


# Runs -----------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """`wrong` says what was wrong; None: every batch was right, up to the refusal where there was one."""

    wrong: str | None
    refused: str | None
    error: str | None
    dataset: Any


def run(adversary: Adversary, record: Record, folder: Path) -> tuple[Trace, Any]:
    """Epochs over a new world; the trace has the noise for the oracles that need it."""
    seed_all()
    folder.mkdir(parents=True)
    world, trace = adversary.make(folder), Trace()
    try:
        with refusals(trace):
            given = dict(adversary.options) if world.then is None else {**adversary.options, "then": world.then}
            batches = record(world.loader, **given)
            for epoch in range(EPOCHS):
                world.before(epoch)
                trace.events.append((f"start of epoch {epoch}", None))
                if world.in_thread(epoch):
                    _in_thread(lambda epoch=epoch: _epoch(epoch, batches, world, trace))
                else:
                    _epoch(epoch, batches, world, trace)
                if adversary.oracle == "same":
                    trace.see(f"states after epoch {epoch}", states(world.loader.generator))
    finally:
        world.close()
    return trace, world.loader.dataset


def _epoch(epoch: int, batches: Any, world: World, trace: Trace) -> None:
    trace.events.append(("clocks", _clocks()))
    for number, batch in enumerate(batches):
        trace.see(f"epoch {epoch} batch {number}", batch)
        trace.see("drawn", (torch.rand(2), float(np.random.rand()), random.random()))
        if _has_noise(batch):
            rows = zip(batch["y"].tolist(), batch["x"].reshape(len(batch["y"]), -1)[:, 0].tolist(), strict=True)
            trace.events.extend(("noise", (epoch, row, value)) for row, value in rows)
        if world.writes:
            scribble(batch)
        world.after_batch(epoch, number)


def _has_noise(batch: Any) -> bool:
    return isinstance(batch, dict) and batch.keys() == {"x", "y"} and isinstance(batch["y"], torch.Tensor)


def _in_thread(action: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def catch() -> None:
        try:
            action()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=catch)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def _clocks() -> list[float]:
    return [clock() for clock in SINCE.values()]


def judge(adversary: Adversary, record: Record, folder: Path) -> Outcome:
    """Runs the world under the recorder and says whether any batch was wrong."""
    recorded, dataset = run(adversary, record, folder / "recorded")
    if adversary.oracle == "same":
        plain, _ = run(adversary, identity, folder / "plain")
        # The clocks are no part of what a batch is.
        for trace in (plain, recorded):
            trace.events = [event for event in trace.events if event[0] not in ("clocks", "noise")]
        return Outcome(recorded.difference(plain), recorded.refused, recorded.error, dataset)
    noise = [value for name, value in recorded.events if name == "noise"]
    wrong = recorded.error
    if adversary.oracle == "fresh":
        counts = collections.Counter(value for _, _, value in noise if value != 0)
        wrong = wrong or next((f"{value} was given {n} times" for value, n in counts.items() if n > 1), None)
        for epoch, row, value in noise:
            if adversary.noisy is not None and adversary.noisy(epoch, row) != (value != 0):
                wrong = wrong or f"epoch {epoch}, row {row}: {value}"
    else:
        clock, start = list(SINCE).index(adversary.name.removeprefix("since ")), 0.0
        for name, value in recorded.events:
            if name == "clocks":
                start = value[clock]
            elif name == "noise" and value[2] < start:
                wrong = wrong or f"{value[2]} is from before the epoch, which began at {start}"
    if recorded.refused is None and len(noise) != EPOCHS * NUM_ROWS:
        wrong = wrong or f"{len(noise)} rows in {EPOCHS} epochs"
    return Outcome(wrong, recorded.refused, recorded.error, dataset)
