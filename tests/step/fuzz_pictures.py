"""Everything that is reachable from a job, as paths and plain values, and where two such pictures differ."""

from __future__ import annotations

import contextvars
import enum
import itertools
import math
import random
import re
import threading
import types
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["TOLERANCE", "Picture", "differences", "relative"]

TOLERANCE = 1e-9
"""Of numbers, in fp64: relative to the largest of a tensor."""


class Picture:
    """Everything reachable from some objects, as paths and plain values."""

    def __init__(self, module: types.ModuleType, roots: dict[str, Any]) -> None:
        self.leaves: dict[str, Any] = {}
        self._module = module.__name__
        self._seen: dict[int, str] = {}
        self._kept: list[Any] = []
        names = {name: value for name, value in vars(module).items() if not name.startswith("__")}
        for name, value in {**roots, **names}.items():
            self._add(name, value)

    def _add(self, path: str, value: Any) -> None:
        if isinstance(
            value, (bool, int, str, bytes, type(None), type(...), torch.dtype, torch.device, range, slice, complex)
        ) and not isinstance(value, enum.Enum):
            self.leaves[path] = (type(value).__name__, repr(value).replace(self._module, "job"))
            return
        if isinstance(value, float):
            self.leaves[path] = (type(value).__name__, value)
            return
        if id(value) in self._seen:
            self.leaves[path] = ("same as", self._seen[id(value)])
            return
        self._seen[id(value)] = path
        self._kept.append(value)
        self._open(path, value)

    def _open(self, path: str, value: Any) -> None:
        kind = type(value)
        is_ours = getattr(kind, "__module__", "") == self._module or str(kind.__module__).startswith("fuzz_home")
        self.leaves[path] = ("type", kind.__qualname__)
        if isinstance(value, Tensor):
            copied = value.detach().clone() if kind in (Tensor, nn.Parameter) else repr(value)
            # Fused kernels count steps in single precision.
            dtype = "any" if path.startswith("opt") and path.endswith("'step']") else str(value.dtype)
            self.leaves[path] = ("tensor", kind.__name__, tuple(value.shape), dtype, value.requires_grad, value.is_leaf)
            self.leaves[path + "#"] = copied
            for name, entry in vars(value).items():
                self._add(f"{path}.{name}", entry)
            hooks = value._backward_hooks
            self._add(path + ".hooks", None if not hooks else dict(hooks))
            return
        if isinstance(value, (np.ndarray, np.generic)):
            self.leaves[path] = ("numpy", str(value.dtype), repr(value))
        elif isinstance(value, types.FunctionType):
            own = (
                value.__module__ == self._module
                or value.__code__.co_filename.startswith("<")
                or self._module in value.__code__.co_filename
            )
            self.leaves[path] = ("function", value.__qualname__, value.__code__.co_code if own else None)
            if own:
                self._add(path + ".defaults", value.__defaults__)
                self._add(path + ".kwdefaults", value.__kwdefaults__)
                self._add(path + ".dict", dict(vars(value)))
                for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
                    try:
                        self._add(f"{path}.<{name}>", cell.cell_contents)
                    except ValueError:
                        self.leaves[f"{path}.<{name}>"] = "empty"
        elif isinstance(value, type):
            self.leaves[path] = ("class", value.__qualname__)
            if value.__module__ == self._module:
                for name, entry in vars(value).items():
                    if name not in ("__dict__", "__weakref__", "__module__", "_abc_impl", "__doc__", "__annotations__"):
                        self._add(f"{path}.{name}", entry)
        elif isinstance(value, (dict, types.MappingProxyType)):
            for number, (key, entry) in enumerate(list(value.items())):
                is_plain = isinstance(key, str) or (isinstance(key, (int, tuple)) and "hooks" not in path)
                name = f"{number}:{key!r}" if is_plain else f"{number}"
                self._add(f"{path}[{name}]", entry)
            if is_ours:
                self._attributes(path, value)
        elif isinstance(value, (list, tuple, set, frozenset)) or kind.__name__ == "deque":
            entries = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else list(value)
            self.leaves[path + ".len"] = len(entries)
            for number, entry in enumerate(entries):
                self._add(f"{path}[{number}]", entry)
        elif isinstance(value, random.Random):
            self.leaves[path] = ("random", hash(value.getstate()))
        elif isinstance(value, types.ModuleType):
            if value.__name__ == "fuzz_home" or re.search(r"_m\d$", value.__name__):
                self._attributes(path, value)
        elif isinstance(value, itertools.count):
            self.leaves[path] = ("count", repr(value))
        elif isinstance(value, torch.Generator):
            self.leaves[path] = ("generator", hash(value.get_state().numpy().tobytes()))
        elif kind.__name__ in ("list_iterator", "Queue"):
            self.leaves[path] = (
                kind.__name__,
                repr(value.__reduce__()[2]) if kind.__name__ == "list_iterator" else value.qsize(),
            )
        elif isinstance(value, contextvars.ContextVar):
            self._add(path + ".get", value.get(None))
        elif isinstance(value, threading.local):
            self._attributes(path, value)
        elif isinstance(value, weakref.ref):
            self._add(path + "()", value())
        elif isinstance(value, (classmethod, staticmethod, types.MethodType)):
            self._add(path + ".__func__", value.__func__)
            if isinstance(value, types.MethodType):
                self._add(path + ".__self__", value.__self__)
        elif isinstance(value, property):
            self._add(path + ".fget", value.fget)
        elif kind.__module__ == "functools" and hasattr(value, "func"):
            self._add(path + ".func", value.func)
            self._add(path + ".args", getattr(value, "args", None))
            self._add(path + ".keywords", getattr(value, "keywords", None))
        elif (
            isinstance(value, (nn.Module, torch.optim.Optimizer, types.SimpleNamespace))
            or is_ours
            or kind.__module__ == "collections"
        ):
            self._attributes(path, value)

    def _attributes(self, path: str, value: Any) -> None:
        own = getattr(value, "__dict__", None)  # anything, where a class answers for all names
        names = dict(own) if isinstance(own, (dict, types.MappingProxyType)) else {}
        for slot in getattr(type(value), "__slots__", ()):
            if slot not in ("__weakref__", "__dict__"):
                try:
                    names[slot] = object.__getattribute__(value, slot)
                except AttributeError:
                    pass
        if isinstance(value, types.ModuleType):
            names = {name: entry for name, entry in names.items() if not name.startswith("__")}
        for name in sorted(names):
            if isinstance(value, torch.optim.Optimizer) and name in (
                "_opt_called",
                "_need_device_dtype_check_for_fused",
                "_warned_capturable_if_run_uncaptured",
            ):
                continue
            self._add(f"{path}.{name}", names[name])


def differences(plain: Picture, ours: Picture, tolerance: float = TOLERANCE) -> tuple[list[str], float]:
    """Paths at which two pictures differ, and the largest relative difference of numbers."""
    found: list[str] = []
    worst = 0.0
    for path in [*plain.leaves, *(each for each in ours.leaves if each not in plain.leaves)]:
        one, two = plain.leaves.get(path, "nothing"), ours.leaves.get(path, "nothing")
        if isinstance(one, Tensor) and isinstance(two, Tensor):
            distance = relative(one, two)
            worst = max(worst, distance)
            if not distance <= tolerance:
                found.append(f"{path}: {distance:.3g} apart")
        elif isinstance(one, Tensor) or isinstance(two, Tensor):
            found.append(f"{path}: {one} and {two}")
        elif isinstance(one, tuple) and isinstance(two, tuple) and len(one) == 2 and one[0] == two[0] == "float":
            if not (
                one[1] == two[1]
                or (math.isnan(one[1]) and math.isnan(two[1]))
                or abs(one[1] - two[1]) <= tolerance * abs(one[1])
            ):
                found.append(f"{path}: {one[1]} and {two[1]}")
        elif one != two:
            found.append(f"{path}: {str(one)[:200]} and {str(two)[:200]}")
    return found, worst


def relative(one: Tensor, two: Tensor) -> float:
    """The largest difference over the largest entry; NaN equals NaN."""
    one, two = (each.detach().as_subclass(Tensor) for each in (one, two))  # each side has its own subclasses
    if one.shape != two.shape or one.layout != two.layout:
        return math.inf
    if one.layout != torch.strided:
        one, two = one.to_dense(), two.to_dense()
    if not one.is_floating_point():
        return 0.0 if torch.equal(one, two) else math.inf
    a, b = one.double().flatten(), two.double().flatten()
    if not torch.equal(a.isnan(), b.isnan()) or not torch.equal(a.isinf(), b.isinf()):
        return math.inf
    finite = a.isfinite()
    if not torch.equal(a[~finite & ~a.isnan()], b[~finite & ~b.isnan()]):
        return math.inf
    a, b = a[finite], b[finite]
    if not a.numel():
        return 0.0
    return float((a - b).abs().max() / max(float(a.abs().max()), 1e-3))
