"""Watchers of what clean training loops do not do: write every step, copy needlessly, keep every tensor, load slowly.

Each names the place in the user's code. They slow the loop down many times over, so nothing is timed beside them but
what they watch.
"""

from __future__ import annotations

import csv
import gc
import io
import logging
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, IterableDataset

from fasttrain.data.record import record
from fasttrain.measure.places import Place, innermost_of_user, is_of_user, user_place
from fasttrain.measure.profiling.growth import GraphWatch, StayWatch

__all__ = ["CallWatch", "CopyWatch", "GrowthWatch", "Loaders", "Seen", "TorchCalls"]

MIN_COPY_BYTES = 4096
"""Copies of less cost what any operator costs; scalars are cloned for good reasons."""


@dataclass
class Seen:
    """What was seen at a place: how often, and the seconds it took."""

    count: int = 0
    seconds: float = 0.0


class Loaders:
    """A context that notes which datasets are loaded from, and where the loop over them is.

    Attributes:
        items: by the code of a dataset's `__getitem__` (or `__getitems__`), the place of the loop.
        loops: places of the loops.
        is_recordable: whether the last loop is over a loader that `fasttrain.record` takes and that is not recorded.
    """

    def __init__(self) -> None:
        self.items: dict[CodeType, Place] = {}
        self.loops: list[Place] = []
        self.is_recordable = False
        self._entered = ExitStack()

    def __enter__(self) -> Loaders:
        """Begins to note."""
        self._entered.enter_context(mock.patch.object(DataLoader, "__iter__", self._noted(DataLoader.__iter__)))
        return self

    def __exit__(self, *error: object) -> None:
        """Stops noting."""
        self._entered.close()

    def _noted(self, make: Callable[[Any], Iterator[Any]]) -> Callable[[Any], Iterator[Any]]:
        def iterate(loader: Any) -> Iterator[Any]:
            place = user_place()
            self.loops.append(place)
            caller = sys._getframe(1).f_code.co_filename  # pyright: ignore[reportPrivateUsage]
            is_recorded = caller == record.__code__.co_filename
            self.is_recordable = not is_recorded and not isinstance(loader.dataset, IterableDataset)
            for name in ("__getitem__", "__getitems__"):
                code = getattr(getattr(type(loader.dataset), name, None), "__code__", None)
                if code is not None:
                    self.items[code] = place
            return make(loader)

        return iterate


class CallWatch:
    """Sees, through Python's profiling hook, what writes text and how long items of datasets take.

    Attributes:
        outputs: `print`, loggers and writes to files, by place.
        items: time in the datasets' `__getitem__`, by code.
    """

    def __init__(self, item_codes: set[CodeType], clock: Callable[[], float] = time.perf_counter) -> None:
        self.outputs: defaultdict[Place, Seen] = defaultdict(Seen)
        self.items: defaultdict[CodeType, Seen] = defaultdict(Seen)
        self._item_codes = item_codes
        self._clock = clock
        self._open: tuple[FrameType, object, Seen, float] | None = None
        self._previous: Any = None

    def start(self) -> None:
        """Begins to watch this thread."""
        self._previous = sys.getprofile()
        sys.setprofile(self._event)

    def stop(self) -> None:
        """Stops watching."""
        sys.setprofile(self._previous)

    def _event(self, frame: FrameType, event: str, arg: Any) -> None:
        if self._open is not None:  # only the outermost call counts
            opened, token, seen, begin = self._open
            is_end = event in ("return", "c_return", "c_exception")
            if is_end and frame is opened and (event == "return") == isinstance(token, CodeType):
                seen.count += 1
                seen.seconds += self._clock() - begin
                self._open = None
        elif event == "c_call" and _is_output(arg):
            self._begin_output(frame, arg)
        elif event == "call" and frame.f_code is _LOGGER:
            self._begin_output(frame, frame.f_code)
        elif event == "call" and frame.f_code in self._item_codes:
            self._open = (frame, frame.f_code, self.items[frame.f_code], self._clock())

    def _begin_output(self, frame: FrameType, token: object) -> None:
        place = innermost_of_user(frame, is_installed_skipped=True)
        if place is not None:
            self._open = (frame, token, self.outputs[place], self._clock())


_LOGGER = logging.Logger.handle.__code__
_OUTPUTS = (io.IOBase, type(csv.writer(io.StringIO())))
_WRITES = ("write", "writelines", "writerow", "writerows")


def _is_output(function: Any) -> bool:
    if function is print:
        return True
    return getattr(function, "__name__", "") in _WRITES and isinstance(getattr(function, "__self__", None), _OUTPUTS)


class TorchCalls(TorchFunctionMode):
    """Shows each call of torch's Python API to those who watch.

    Args:
        copies: is shown how long it took.
        graphs: is shown what came out.
        staying: is there while it runs; None: nothing grows, so that nobody need look what stays.
        clock: seconds.
    """

    def __init__(
        self,
        copies: CopyWatch,
        graphs: GraphWatch,
        staying: StayWatch | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__()
        self._copies = copies
        self._graphs = graphs
        self._staying = staying
        self._clock = clock

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the call, and shows it."""
        if isinstance(func, OpOverload):  # what `StayWatch` runs in a backward pass comes by here again
            return func(*args, **(kwargs or {}))
        begin = self._clock()
        with self._staying or nullcontext():
            result = func(*args, **(kwargs or {}))
        seconds = self._clock() - begin
        frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
        self._copies.seen(func, args, result, seconds, frame)
        self._graphs.seen(args, result, frame)
        return result


class CopyWatch:
    """Sees copies that change nothing: clones, conversions to what a tensor is already, and there and back again.

    Attributes:
        copies: by place.
    """

    def __init__(self) -> None:
        self.copies: defaultdict[Place, Seen] = defaultdict(Seen)
        self._origins: dict[int, tuple[Tensor, Tensor]] = {}

    def step(self) -> None:
        """After a step: what was converted in it is of no more interest."""
        self._origins.clear()

    def seen(self, func: Any, args: tuple[Any, ...], result: Any, seconds: float, frame: FrameType) -> None:
        """After a call of torch, which is looked at if it can be a copy."""
        if func in _COPIERS and args and isinstance(args[0], Tensor) and result is not args[0]:
            if is_of_user(frame.f_code.co_filename) and self._is_needless(args[0], result):
                seen = self.copies[frame.f_code.co_filename, frame.f_lineno]
                seen.count += 1
                seen.seconds += seconds

    def _is_needless(self, source: Tensor, result: Tensor) -> bool:
        if result.nbytes < MIN_COPY_BYTES:
            return False
        if _is_alike(source, result):
            return True
        self._origins[id(result)] = (result, source)
        origin = self._origins.get(id(source))
        return origin is not None and origin[0] is source and _is_alike(origin[1], result)


_COPIERS: set[Any] = {
    *(Tensor.clone, torch.clone, torch.tensor, Tensor.to, Tensor.type, Tensor.cpu, Tensor.cuda),
    *(Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.long, Tensor.int),
}


def _is_alike(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and first.device == second.device


class GrowthWatch:
    """Finds containers that take up tensors step by step, and the line that puts them there.

    First `look` at all containers, then steps, then `follow` those that have grown, then steps, then `lines`.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}
        self._followed: list[tuple[Any, list[int]]] = []
        self._lines: Counter[Place] = Counter()
        self._last: Place | None = None
        self._previous: Any = None

    def look(self) -> None:
        """Notes the size of every container there is."""
        self._sizes = {id(each): len(each) for each in gc.get_objects() if _takes_up(each)}

    def follow(self, calls: int) -> None:
        """Begins to follow, line by line, the containers of tensors that have grown in each of so many calls."""
        grown = [each for each in gc.get_objects() if _takes_up(each) and self._has_grown(each, calls)]
        self._followed = [(each, [len(each)]) for each in grown if _holds_tensors(each)]
        self._sizes.clear()
        if not self._followed:
            return
        self._previous = sys.gettrace()
        frame: FrameType | None = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
        while frame is not None:
            if is_of_user(frame.f_code.co_filename):
                frame.f_trace = self._event
            frame = frame.f_back
        sys.settrace(self._event)

    def lines(self) -> dict[Place, int]:
        """Ends; how many entries each line has added."""
        if self._followed:
            self._note_growth()
            sys.settrace(self._previous)
            frame: FrameType | None = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
            while frame is not None:
                if frame.f_trace == self._event:
                    frame.f_trace = None
                frame = frame.f_back
        self._followed = []
        return dict(self._lines)

    def _has_grown(self, container: Any, calls: int) -> bool:
        before = self._sizes.get(id(container))
        return before is not None and len(container) >= before + calls

    def _event(self, frame: FrameType, event: str, _arg: Any) -> Any:
        if not is_of_user(frame.f_code.co_filename):
            return None
        self._note_growth()
        if event == "line":
            self._last = (frame.f_code.co_filename, frame.f_lineno)
        return self._event

    def _note_growth(self) -> None:
        for container, size in self._followed:
            if len(container) > size[0]:
                if self._last is not None:
                    self._lines[self._last] += len(container) - size[0]
                size[0] = len(container)


_CONTAINERS = (list, dict, deque)


def _takes_up(thing: Any) -> bool:
    """Whether it is a container that can grow for ever: a `deque` of limited length, full or not, cannot."""
    return type(thing) in _CONTAINERS and (type(thing) is not deque or thing.maxlen is None)


def _holds_tensors(container: Any) -> bool:
    last = next(reversed(container.values() if isinstance(container, dict) else container))
    inner = last.values() if isinstance(last, dict) else last if isinstance(last, list | tuple) else [last]
    return any(isinstance(each, Tensor) for each in inner)
