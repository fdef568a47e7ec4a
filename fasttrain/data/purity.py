"""Whether the rows of a dataset depend on their index alone, so that a recorded row may stand for one that is read.

Three checks work together:

- What rows can read in Python (the dataset's attributes, its code, and the globals and closures of that code) is
  compared before and after rows are read, and at every pass.
- The states of the global random generators are compared around every read.
- A forked child reads rows again, where a clock, a counter or a generator of the row's own shows itself without a
  change to anything in this process.
"""

from __future__ import annotations

import array
import builtins
import ctypes
import datetime
import dis
import functools
import inspect
import io
import logging
import mmap
import os
import pickle
import random
import select
import signal
import sys
import sysconfig
import time
import types
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import is_
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

__all__ = [
    "NAMED_SETTINGS",
    "Facts",
    "GlobalGenerators",
    "in_child",
    "is_library_class",
    "is_library_file",
    "is_library_module",
    "length_of",
    "read_again",
    "same_rows",
    "shares_memory",
    "where",
]

MOST_FACTS = 3_000
"""Objects that are looked at. Those that are met first, nearest to the dataset, are the ones that count."""

MOST_ELEMENTS = 50_000
"""Elements of a container that are compared one by one; of a longer one, as many at equal distances."""

MOST_BYTES = 4 << 20
"""Bytes of arrays that are compared whole; of what is beyond, SAMPLED_BYTES of each at equal distances."""

SAMPLED_BYTES = 1 << 14

CHILD_S = 60.0
"""How long a child may take to read rows again."""

_IMMUTABLE = (int, float, complex, str, bytes, type(None), np.generic, torch.dtype, torch.device, torch.Size, range)

_LIBRARIES = tuple(
    os.path.join(path, "")
    for path in {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
)

_INSTALLED = tuple(os.path.join(os.sep, each, "") for each in ("site-packages", "dist-packages"))
"""Folders of packages wherever they are: a user's own, or those of the interpreter that a virtual one is made from."""


class GlobalGenerators:
    """The states of the generators that everybody draws from: torch's, numpy's and Python's."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._numpy = np.random.get_state(legacy=False)
        self._python = random.getstate()

    def moved(self) -> str | None:
        """Which of them has been drawn from since; None where none has."""
        if not torch.equal(self._torch, torch.get_rng_state()):
            return "torch's default generator"
        found = np.random.get_state(legacy=False)
        known = self._numpy
        if found["state"]["pos"] != known["state"]["pos"] or not np.array_equal(
            found["state"]["key"], known["state"]["key"]
        ):
            return "numpy's global generator"
        return None if random.getstate() == self._python else "Python's random"


def where(dataset: Any) -> str:
    """The class of a dataset, and where the code that reads its rows stands."""
    from torch.utils.data import Subset

    while type(dataset) is Subset:
        dataset = cast("Subset[Any]", dataset).dataset
    kind = type(dataset)
    for name in ("__getitems__", "__getitem__"):
        function = getattr(kind, name, None)
        code = None if function is None else getattr(inspect.unwrap(function), "__code__", None)
        if code is not None and not is_library_file(code.co_filename):
            return f"{kind.__name__}.{name} ({code.co_filename}:{code.co_firstlineno})"
    return kind.__name__


def is_library_file(name: str) -> bool:
    """Whether a file is one of Python's own or of an installed package."""
    return name.startswith(_LIBRARIES) or name.startswith("<frozen") or any(each in name for each in _INSTALLED)


# What rows can read in Python.


@dataclass(frozen=True, eq=False)
class _Fact:
    """One thing that was found, and what says whether it is still so."""

    name: str
    is_same: Callable[[], bool]
    has_grown: Callable[[], bool] | None = None

    @property
    def is_harmless(self) -> bool:
        """Whether what has changed is no more than what a cache or a file that is opened late changes."""
        return self.has_grown is not None and self.has_grown()


class Facts:
    """What the rows of a dataset can read in Python, as it is now.

    Args:
        root: the dataset, with what else makes rows.
        ignored: names of facts that are left out.

    Attributes:
        is_partial: whether there is more than was looked at.
        unknown: what its state cannot be read of; empty where there is nothing.
    """

    def __init__(self, *root: Any, ignored: frozenset[str] = frozenset()) -> None:
        self._ignored = ignored
        self._facts: list[_Fact] = []
        # Others draw from the global generators, too (see `GlobalGenerators`).
        shared = (
            torch.default_generator,
            getattr(random.random, "__self__", None),
            getattr(np.random.seed, "__self__", None),
        )
        self._seen: dict[int, Any] = {id(each): each for each in shared}
        self._named: set[tuple[int, str]] = set()
        self._bytes = 0
        self._queue: deque[tuple[Any, str]] = deque()
        self.is_partial = False
        self.unknown = ""
        self._add("a setting of the process", _same_result(_settings))
        for value in root:
            self._queue.append((value, type(value).__name__))
        while self._queue:
            if len(self._seen) >= MOST_FACTS:
                self.is_partial = True
                break
            value, name = self._queue.popleft()
            if id(value) not in self._seen and not isinstance(value, _IMMUTABLE):
                self._seen[id(value)] = value  # kept, so that no other object gets its number
                self._look_at(value, name)
        self._queue.clear()

    def changed(self) -> list[_Fact]:
        """The facts that do not hold any more."""
        return [fact for fact in self._facts if not fact.is_same()]

    def difference(self) -> str | None:
        """The first name that differs; None where nothing does."""
        return next((fact.name for fact in self._facts if not fact.is_same()), None)

    def _add(self, name: str, is_same: Callable[[], bool], has_grown: Callable[[], bool] | None = None) -> None:
        if name not in self._ignored:
            self._facts.append(_Fact(name, is_same, has_grown))

    def _is_new(self, holder: Any, name: str) -> bool:
        """Whether a name in a table is met for the first time."""
        key = id(holder), name
        is_new = key not in self._named
        self._named.add(key)
        return is_new

    def _look_at(self, value: Any, name: str) -> None:
        if isinstance(value, Tensor):
            self._tensor(value, name)
        elif isinstance(value, np.ndarray):
            self._array(value, name)
        elif isinstance(value, torch.Generator):
            state = value.get_state()
            self._add(name, lambda: torch.equal(value.get_state(), state))
        elif isinstance(value, np.random.Generator | np.random.RandomState):
            bits: Any = value.bit_generator if isinstance(value, np.random.Generator) else value
            self._add(name, _same_result(lambda: pickle.dumps(_state_of(bits))))
        elif isinstance(value, random.Random) and type(value) is not random.SystemRandom:
            self._add(name, _same_result(value.getstate))
        elif isinstance(value, pd.DataFrame | pd.Series | pd.Index):
            self._frame(value, name)
        elif isinstance(value, type):
            self._class(value, name)
        elif isinstance(value, types.FunctionType):
            self._function(value, name)
        elif isinstance(value, types.MethodType):
            self._queue.extend([(value.__func__, value.__func__.__qualname__), (value.__self__, name)])
        elif isinstance(value, functools.partial):
            held = cast("functools.partial[Any]", value)
            self._queue.extend([(held.func, f"{name}.func"), (held.args, name), (held.keywords, name)])
        elif isinstance(value, types.ModuleType):
            pass  # what functions read of it is looked at with them
        elif isinstance(value, bytearray | memoryview | array.array | ctypes.Array | ctypes._SimpleCData | mmap.mmap):  # pyright: ignore[reportPrivateUsage]
            self._add(name, _same_result(functools.partial(_content, value)))
        elif isinstance(value, io.StringIO | io.BytesIO):
            self._add(name, _same_result(lambda: None if value.closed else (value.tell(), value.getvalue())))
        elif isinstance(value, Iterator) and not isinstance(value, io.IOBase):
            self.unknown = self.unknown or f"{name} is an iterator"
        else:
            self._object(value, name)

    def _object(self, value: Any, name: str) -> None:
        if isinstance(value, Mapping):
            self._mapping(cast("Mapping[Any, Any]", value), name)
        elif isinstance(value, list | tuple | deque | set | frozenset):
            self._elements(cast("Sequence[Any]", value), name)
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict):
            self._attributes(cast("dict[str, Any]", own), name)
        kind: Any = type(value)
        for each in kind.__mro__:
            slots = vars(each).get("__slots__", ())
            for slot in (slots,) if isinstance(slots, str) else tuple(slots):
                if slot not in ("__dict__", "__weakref__"):
                    self._read(f"{name}.{slot}", functools.partial(getattr, value, slot, None))
        if not is_library_class(kind):
            self._queue.append((kind, kind.__qualname__))

    def _read(self, name: str, get: Callable[[], Any]) -> None:
        """One value under a name."""
        value = get()
        is_plain = isinstance(value, _IMMUTABLE)

        def is_same() -> bool:
            found = get()
            return found is value or (is_plain and type(found) is type(value) and _equal(found, value))

        self._add(name, is_same, lambda: value is None)
        self._queue.append((value, name))

    def _attributes(self, table: dict[str, Any], name: str) -> None:
        keys = frozenset(table)
        self._add(f"{name}'s attributes", lambda: table.keys() == keys, lambda: table.keys() >= keys)
        for key in list(table):
            self._read(f"{name}.{key}", functools.partial(table.get, key))

    def _mapping(self, table: Mapping[Any, Any], name: str) -> None:
        known = dict(table)

        def is_same() -> bool:
            if len(table) != len(known):
                return False
            if len(known) > MOST_ELEMENTS:
                return True
            values = known.values()
            return all(map(is_, table, known)) and (
                all(map(is_, table.values(), values)) or _all_equal(table.values(), values)
            )

        def has_grown() -> bool:
            missing = object()
            return len(table) > len(known) and all(table.get(key, missing) is known[key] for key in known)

        self._add(name, is_same, has_grown)
        for key, value in list(known.items())[:MOST_FACTS]:
            self._queue.append((value, f"{name}[{key!r}]"))

    def _elements(self, values: Any, name: str) -> None:
        def sample(count: int) -> list[Any]:
            found = list(values)[:count]
            return found if len(found) <= MOST_ELEMENTS else found[:: len(found) // MOST_ELEMENTS]

        length = len(values)
        known = sample(length)

        def is_same() -> bool:
            if len(values) != length:
                return False
            found = sample(length)
            return all(map(is_, found, known)) or _all_equal(found, known)

        def has_grown() -> bool:
            found = sample(length)
            return len(values) > length and (isinstance(values, set) or all(map(is_, found, known)))

        if not isinstance(values, tuple | frozenset):
            self._add(name, is_same, has_grown)
        for number, value in enumerate(known[:MOST_FACTS]):
            if not isinstance(value, _IMMUTABLE):
                self._queue.append((value, f"{name}[{number}]"))

    def _tensor(self, value: Tensor, name: str) -> None:
        def stamp() -> object:
            return value._version, value.shape, value.dtype, value.device  # pyright: ignore[reportPrivateUsage]

        self._add(name, _same_result(stamp))
        if value.layout is torch.strided and value.device.type == "cpu" and not value.untyped_storage().resizable():
            with suppress(TypeError, RuntimeError):  # a numpy array's memory, written without a new version
                self._array(value.detach().resolve_conj().resolve_neg().numpy(), name)

    def _array(self, value: np.ndarray, name: str) -> None:
        if value.dtype == object:
            kept = value.copy()  # so that no other object gets the address of one of these
            self._add(name, lambda: value.shape == kept.shape and value.tobytes() == kept.tobytes())
            for number, each in enumerate(kept.reshape(-1)[:MOST_FACTS]):
                self._queue.append((each, f"{name}[{number}]"))
            return
        is_whole = self._bytes + value.nbytes <= MOST_BYTES
        self._bytes += value.nbytes if is_whole else SAMPLED_BYTES

        def content() -> object:
            flat = value.reshape(-1) if value.flags.c_contiguous else value
            if not is_whole:
                flat = flat[:: max(1, flat.nbytes // SAMPLED_BYTES)]
            return value.shape, value.dtype, flat.tobytes()

        self._add(name, _same_result(content))

    def _frame(self, value: Any, name: str) -> None:
        """A table of pandas, by the arrays that hold its cells."""

        def arrays() -> list[Any]:
            manager = getattr(value, "_mgr", None)
            return [value.array] if manager is None else [each.values for each in manager.blocks]

        known, axes = arrays(), [value] if isinstance(value, pd.Index) else [*value.axes]
        self._add(name, lambda: len(arrays()) == len(known) and all(map(is_, arrays(), known)))
        if not isinstance(value, pd.Index):
            self._add(name, lambda: all(map(is_, value.axes, axes)))
        for number, each in enumerate(known):
            held = getattr(each, "_ndarray", each)  # of those that keep their cells in one
            if isinstance(held, np.ndarray):
                self._queue.append((held, f"{name}'s block {number}"))
            elif hasattr(held, "_pa_array"):  # pyarrow's arrays do not change; a new one takes their place
                self._add(name, _is_still(functools.partial(getattr, held, "_pa_array")))

    def _class(self, kind: type, name: str) -> None:
        for each in kind.__mro__:
            if is_library_class(each) or not self._is_new(each, ""):
                continue
            table = {key: value for key, value in vars(each).items() if key not in ("__dict__", "__weakref__")}
            self._add(f"{each.__qualname__}'s attributes", _same_result(functools.partial(_keys_of, each)))
            for key, value in table.items():
                self._read(f"{each.__qualname__}.{key}", lambda each=each, key=key: vars(each).get(key))
                for inner in ("fget", "__func__", "func", "__wrapped__"):
                    found = getattr(value, inner, None)
                    if isinstance(found, types.FunctionType):
                        self._queue.append((found, found.__qualname__))
        del name

    def _function(self, function: types.FunctionType, name: str) -> None:
        if is_library_file(function.__code__.co_filename):
            return
        for attribute in ("__code__", "__defaults__", "__kwdefaults__"):
            self._read(f"{name}'s {attribute}", functools.partial(getattr, function, attribute))
        for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._read(f"{name}'s {variable}", functools.partial(_cell, cell))
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is not None:
            self._queue.append((wrapped, name))
        names = set(_names_in(function.__code__))
        table = function.__globals__
        for each in sorted(names & table.keys()):
            if not self._is_new(table, each):
                continue
            value = table[each]
            self._read(f"the global {each}", functools.partial(table.get, each))
            if isinstance(value, types.ModuleType) and not is_library_module(value):
                for inner in sorted(names & vars(value).keys()):
                    if not self._is_new(value, inner):
                        continue
                    self._read(f"{each}.{inner}", functools.partial(vars(value).get, inner))
        for each in names & (vars(builtins).keys() - table.keys()):
            if self._is_new(builtins, each):
                self._read(f"the builtin {each}", functools.partial(vars(builtins).get, each))
        for asked, setting, reader in NAMED_SETTINGS:
            if names & asked and self._is_new(NAMED_SETTINGS, setting):
                self._add(setting, _same_result(reader()))
        own = vars(function)
        if own:
            self._attributes(own, name)


def _settings() -> object:
    """Settings of the process that rows depend on without naming them."""
    try:
        folder = os.getcwd()
    except OSError:
        folder = None
    return torch.get_default_dtype(), folder


def _levels() -> Callable[[], object]:
    """The levels of the loggers that there are now."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    known = [each for each in loggers if isinstance(each, logging.Logger)]
    return lambda: (logging.root.manager.disable, [each.level for each in known])


NAMED_SETTINGS: list[tuple[frozenset[str], str, Callable[[], Callable[[], object]]]] = [
    (frozenset({"environ", "environb", "getenv", "expandvars"}), "os.environ", lambda: lambda: dict(os.environ)),
    (frozenset({"is_grad_enabled", "requires_grad"}), "the grad mode", lambda: torch.is_grad_enabled),
    (frozenset({"is_inference_mode_enabled"}), "the inference mode", lambda: torch.is_inference_mode_enabled),
    (frozenset({"isEnabledFor", "getEffectiveLevel", "getLogger", "level"}), "the level of a logger", _levels),
    (frozenset({"geterr"}), "numpy's handling of errors", lambda: np.geterr),
]
"""Settings of the process by the names in code that ask for them."""


def _content(value: Any) -> bytes | None:
    """The bytes of a piece of memory, or some of many; None where it is closed."""
    try:
        view = memoryview(value).cast("B")
    except (TypeError, ValueError, BufferError):
        return None
    return bytes(view if len(view) <= MOST_BYTES else view[:: len(view) // SAMPLED_BYTES])


def is_library_module(module: types.ModuleType) -> bool:
    """Whether a module is one of Python's own or of an installed package."""
    file = getattr(module, "__file__", None)
    if file is None:
        return module.__name__.partition(".")[0] in sys.stdlib_module_names
    return is_library_file(file)


def _state_of(bits: Any) -> object:
    return bits.state if hasattr(bits, "state") else bits.get_state(legacy=False)


def _same_result(get: Callable[[], Any]) -> Callable[[], bool]:
    known = get()
    return lambda: get() == known


def _keys_of(kind: type) -> frozenset[str]:
    return frozenset(vars(kind))


def _is_still(get: Callable[[], Any]) -> Callable[[], bool]:
    known = get()
    return lambda: get() is known


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing in it yet
        return None


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            yield from _names_in(value)


def is_library_class(kind: type) -> bool:
    """Whether a class is one of Python's own, of an installed package or of fasttrain."""
    module = sys.modules.get(kind.__module__)
    if kind.__module__ == "__main__":
        return False
    file = getattr(module, "__file__", None)
    return kind.__module__ == "builtins" or file is None or is_library_file(file) or file.startswith(_OWN)


_OWN = os.path.dirname(os.path.dirname(__file__))


def _equal(one: Any, other: Any) -> bool:
    if one == other:
        return repr(one) == repr(other) if isinstance(one, float | complex | np.generic) else True  # 0.0 and -0.0
    return one != one and other != other  # NaN


def _all_equal(found: Any, known: Any) -> bool:
    """Whether what is not the same object is an equal value that cannot change."""
    return all(
        one is other or (type(one) is type(other) and isinstance(one, _IMMUTABLE) and _equal(one, other))
        for one, other in zip(found, known, strict=False)
    )


# Rows that are read twice.


def same_rows(one: Any, other: Any) -> bool:
    """Whether two rows or batches are the same bit for bit: containers, types, dtypes, shapes, strides, values."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return _same_tensors(one, other)
    if isinstance(one, np.ndarray):
        array = cast("np.ndarray", one)
        is_alike = array.dtype == other.dtype and array.shape == other.shape and array.strides == other.strides
        if not is_alike or array.dtype != object:
            return is_alike and array.tobytes() == other.tobytes()
        return same_rows(array.tolist(), other.tolist())
    if isinstance(one, Mapping):
        mapping = cast("Mapping[Any, Any]", one)
        is_same = list(mapping) == list(other) and all(same_rows(mapping[key], other[key]) for key in mapping)
        return is_same and _same_attributes(mapping, other)
    if isinstance(one, list | tuple):
        items = cast("Sequence[Any]", one)
        is_same = len(items) == len(other) and all(map(same_rows, items, other))
        return is_same and _same_attributes(items, other)
    if isinstance(one, float | complex | np.generic):
        return pickle.dumps(one) == pickle.dumps(other)
    if isinstance(one, _IMMUTABLE):
        return bool(one == other)
    try:
        if one is other or pickle.dumps(one) == pickle.dumps(other):
            return True
        # Equal tensors, for one, are pickled otherwise.
        return _is_all_python(type(one)) and bool(vars(one)) and _same_attributes(one, other)
    except Exception:  # an object that cannot be compared so
        return vars(one) == vars(other) if hasattr(one, "__dict__") else bool(one == other)


def _same_attributes(one: Any, other: Any) -> bool:
    found, known = getattr(one, "__dict__", {}), getattr(other, "__dict__", {})
    return found.keys() == known.keys() and all(same_rows(found[name], known[name]) for name in found)


def _is_all_python(kind: type) -> bool:
    """Whether instances keep all that they are in their attributes."""
    return all(
        each is object or (bool(each.__flags__ & 1 << 9) and "__slots__" not in vars(each)) for each in kind.__mro__
    )


def _same_tensors(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape, one.device, one.layout, one.requires_grad) != (
        other.dtype,
        other.shape,
        other.device,
        other.layout,
        other.requires_grad,
    ):
        return False
    if one.device.type == "meta":
        return one.stride() == other.stride()
    if one.layout is not torch.strided or one.is_quantized:
        return bool(torch.equal(one.to_dense(), other.to_dense()))
    if (one.stride(), one.is_conj(), one.is_neg()) != (other.stride(), other.is_conj(), other.is_neg()):
        return False
    plain = [each.detach().resolve_conj().resolve_neg().contiguous().reshape(-1) for each in (one, other)]
    bits = [each.view(torch.uint8) for each in plain] if one.numel() else []
    return not bits or torch.equal(bits[0], bits[1])


def read_again(read: Callable[[Any], Any], indices: Sequence[Any], rows: Sequence[Any]) -> tuple[str | None, bool]:
    """Reads rows a second and a third time in a forked child, last first, and says what differs or why it would.

    Args:
        read: gives the row of an index.
        indices: of the rows.
        rows: as they were read the first time, those very objects.

    Returns:
        What differs, None where nothing does or no child can be forked; and whether rows are memory of the dataset's
        own, which a change of a row changes.
    """
    return in_child(functools.partial(_read_in_child, read, indices, rows)) or (None, False)


_STORES = {"STORE_ATTR", "STORE_GLOBAL", "STORE_SUBSCR", "STORE_DEREF", "DELETE_ATTR", "IMPORT_NAME"}


def _plain_names(dataset: Any) -> set[str]:
    """Names that a `__len__` may use without being asked for in a child: `len` and the dataset's own plain values."""
    plain = (int, list, tuple, dict, str, np.ndarray, Tensor, pd.DataFrame, pd.Series)
    own = getattr(dataset, "__dict__", {})
    table = getattr(getattr(type(dataset), "__len__", None), "__globals__", {})
    return {"len", "shape", "size", *(name for each in (own, table) for name in each if type(each[name]) in plain)}


def length_of(dataset: Any) -> int:
    """`len(dataset)`, asked for in a child, where that changes nothing; 0 where there is none, or another each time."""

    def ask() -> int:
        found = {len(dataset) for _ in range(3)}
        return found.pop() if len(found) == 1 else 0

    function = getattr(type(dataset), "__len__", None)
    code = getattr(function, "__code__", None)
    is_plain = code is None or not _STORES.intersection(each.opname for each in dis.get_instructions(code))
    if hasattr(os, "fork") and not (is_plain and {*getattr(code, "co_names", ())} <= _plain_names(dataset)):
        return in_child(ask) or 0
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return 0


def in_child(action: Callable[[], Any]) -> Any:
    """What a function returns in a forked child, where nothing that it does changes this process.

    Returns:
        None where it raises or takes too long, or no child can be forked.
    """
    if not hasattr(os, "fork"):
        return None
    receiving, sending = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads: the child only reads rows
        child = os.fork()
    if child == 0:
        try:
            os.close(receiving)
            torch.set_num_threads(1)  # the threads of the parent are not there
            sys.stdout = sys.stderr = open(os.devnull, "w")
            with open(sending, "wb") as stream:
                pickle.dump(action(), stream)
        finally:
            os._exit(0)  # nothing of the parent's (buffers, atexit) is run twice
    os.close(sending)
    return _answer(child, receiving)


def _answer(child: int, receiving: int) -> Any:
    """What a child found; one that takes too long is killed and says nothing."""
    written, end = b"", time.monotonic() + CHILD_S
    try:
        while True:
            ready, _, _ = select.select([receiving], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                os.kill(child, signal.SIGKILL)
                written = b""
                break
            part = os.read(receiving, 1 << 16)
            if not part:
                break
            written += part
    finally:
        os.close(receiving)
        with suppress(ChildProcessError):
            os.waitpid(child, 0)
    return pickle.loads(written) if written else None  # by the child just forked


def _read_in_child(read: Callable[[Any], Any], indices: Sequence[Any], rows: Sequence[Any]) -> tuple[str | None, bool]:
    seen: list[str] = []
    is_shared = False
    for each in range(2):
        if each == 0:
            sys.setprofile(functools.partial(_profile, seen))
        try:
            for index, row in zip(reversed(indices), reversed(rows), strict=True):
                try:
                    found = read(index)
                except Exception:  # such as of a device that a forked process cannot use
                    return None, is_shared
                if not same_rows(found, row):
                    return f"row {index!r} is another one when it is read again", is_shared
                is_shared = is_shared or shares_memory(found, row)
        finally:
            sys.setprofile(None)
        if seen:
            return f"it calls {seen[0]}", is_shared
    return None, is_shared


def shares_memory(one: Any, other: Any) -> bool:
    """Whether a change of one row, in place, changes the other."""
    known = set(_memory_of(one))
    return any(each in known for each in _memory_of(other))


def _memory_of(row: Any) -> Iterator[object]:
    """What stands for each piece of memory that can be changed in a row."""
    if isinstance(row, Tensor):
        if row.layout is torch.strided and row.numel():
            yield row.untyped_storage().data_ptr()
    elif isinstance(row, np.ndarray):
        array = row
        while isinstance(array.base, np.ndarray):
            array = array.base
        if array.size:
            yield array.__array_interface__["data"][0]
    elif isinstance(row, Mapping):
        yield "object", id(row)
        for value in cast("Mapping[Any, Any]", row).values():
            yield from _memory_of(value)
    elif isinstance(row, list | tuple):
        if isinstance(row, list):
            yield "object", id(cast("Any", row))
        for value in cast("Sequence[Any]", row):
            yield from _memory_of(value)
    elif not isinstance(row, _IMMUTABLE):
        yield "object", id(row)


def _profile(seen: list[str], frame: types.FrameType, event: str, argument: Any) -> None:
    """Notes calls whose result is another one each time."""
    if event == "call" and frame.f_code is random.Random.seed.__code__ and frame.f_locals.get("a") is None:
        if type(frame.f_locals.get("self")) is not random.SystemRandom:
            seen.append("random.Random() without a seed")
    elif event == "c_call" and not seen:
        module, name = getattr(argument, "__module__", None), getattr(argument, "__name__", "")
        owner = getattr(argument, "__self__", None)
        file = frame.f_code.co_filename
        if (module, name) in _CHANGING and f"{os.sep}logging{os.sep}" not in file:
            seen.append(f"{'os' if module in ('posix', 'nt') else module}.{name}")
        elif isinstance(owner, type) and issubclass(owner, datetime.date) and name in ("now", "utcnow", "today"):
            seen.append(f"{owner.__name__}.{name}")
        elif isinstance(owner, torch.Generator) and name == "seed":
            seen.append("torch.Generator.seed")


_CHANGING = {
    ("posix", "urandom"),
    ("nt", "urandom"),
    ("time", "time"),
    ("time", "time_ns"),
    ("time", "localtime"),
    ("time", "gmtime"),
}
