"""What grows from step to step though no container takes it up: memory that stays, and graphs that are never let go."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fasttrain.measure.places import Place, user_place

__all__ = ["GraphWatch", "StayWatch", "inner_calls"]

EDGE = 5
"""What crosses into a pass or out of it, such as a batch that is loaded ahead, is in this part (1 in 5) of its calls at
its begin and at its end; all the others have to show that something stays."""

MAX_WALK = 1000
"""Nodes of a graph that were made where nothing is seen, such as before the pass, are followed no further than this."""

_TAG = "fasttrain.measure"


def inner_calls(num_calls: int) -> range:
    """The calls of a pass in which growth has to be seen for it to be growth."""
    edge = max(1, num_calls // EDGE)
    return range(edge, num_calls - edge)


@dataclass(frozen=True, kw_only=True)
class _Made:
    memory: weakref.ref[torch.UntypedStorage]
    num_bytes: int
    place: Place
    call: int


class StayWatch(TorchDispatchMode):
    """Finds the lines whose tensors stay: notes all tensor memory that is allocated while it is entered.

    Enter it around single calls of torch only: under a dispatch mode, compiled steps do not run.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: list[_Made] = []
        self._call = 0
        self._thread = threading.get_ident()

    def step(self) -> None:
        """After a call of the loop's body: forgets what is let go already."""
        self._call += 1
        self._made = [each for each in self._made if each.memory() is not None]

    def staying(self) -> dict[Place, int]:
        """Bytes of what is left, by line, of the lines that have left something in every call, but at the edges.

        What a `deque` of limited length holds does not count: it stops growing.
        """
        gc.collect()
        bounded = _held_by_bounded()
        by_place: defaultdict[Place, dict[int, int]] = defaultdict(dict)
        for each in self._made:
            memory = each.memory()
            if memory is not None and memory.data_ptr() not in bounded:
                calls = by_place[each.place]
                calls[each.call] = calls.get(each.call, 0) + each.num_bytes
        inner = inner_calls(self._call)
        return {
            place: sum(calls[call] for call in inner)
            for place, calls in by_place.items()
            if all(call in calls for call in inner)
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator, and notes what it has allocated."""
        result = func(*args, **(kwargs or {}))
        given = {memory.data_ptr() for memory in _memories((*args, *(kwargs or {}).values()))}
        is_making = func is torch.ops.aten.lift_fresh.default  # of torch.tensor: makes its tensor out of sight
        for memory in _memories((result,)):
            if memory.nbytes() and (is_making or memory.data_ptr() not in given):
                made = weakref.ref(memory)
                self._made.append(
                    _Made(memory=made, num_bytes=memory.nbytes(), place=user_place(self._frame()), call=self._call)
                )
        return result

    def _frame(self) -> FrameType | None:
        """Of the loop, which is what waits while a thread of torch's own goes backwards."""
        if threading.get_ident() == self._thread:
            return sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
        return sys._current_frames().get(self._thread)  # pyright: ignore[reportPrivateUsage]


def _memories(values: Iterable[Any]) -> Iterator[torch.UntypedStorage]:
    """Of tensors, and of tensors in lists; subclasses (fake tensors and the like) have no memory of their own."""
    for value in values:
        if type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided:
            yield value.untyped_storage()
        elif isinstance(value, list | tuple):
            yield from _memories(value)


def _held_by_bounded() -> set[int]:
    deques = [each for each in gc.get_objects() if type(each) is deque and each.maxlen is not None]
    return {memory.data_ptr() for each in deques for memory in _memories(each)}


@dataclass(frozen=True, kw_only=True)
class _Tag:
    """What is kept at a node of a graph.

    Attributes:
        call: that made it.
        joins: so many calls, one after the other, have joined what they made to what was there before.
        place: of the last one.
    """

    call: int
    joins: int
    place: Place | None


class GraphWatch:
    """Finds the lines that join the graph of every step to that of the step before, so that none is ever let go.

    It is shown each call of torch's Python API, and leaves a note in the metadata of the graph's nodes.
    """

    def __init__(self) -> None:
        self._call = 0
        self._joins: dict[Place, int] = {}

    def step(self) -> None:
        """After a call of the loop's body."""
        self._call += 1

    def seen(self, args: tuple[Any, ...], result: Any, frame: FrameType) -> None:
        """After a call of torch.

        Args:
            args: of it; the first one is what an assignment changes.
            result: of it.
            frame: the caller's.
        """
        changed = args[:1] if result is None else result if isinstance(result, list | tuple) else (result,)
        for tensor in changed:
            node: Any = tensor.grad_fn if isinstance(tensor, Tensor) else None
            if node is not None and _TAG not in node.metadata:
                node.metadata[_TAG] = self._tag(node, frame)

    def joining(self) -> list[Place]:
        """The lines that did so in every call: the first one has nothing before it, the last one nothing after it."""
        return [place for place, joins in self._joins.items() if joins >= max(1, self._call - 2)]

    def _tag(self, node: Any, frame: FrameType) -> _Tag:
        longest = max(_tagged_parents(node), key=lambda tag: tag.joins, default=None)
        if longest is None:
            return _Tag(call=self._call, joins=0, place=None)
        if longest.call == self._call:
            return longest
        if longest.place is not None:  # credit to the line that is built upon, not to whatever reads it
            self._joins[longest.place] = max(longest.joins, self._joins.get(longest.place, 0))
        return _Tag(call=self._call, joins=longest.joins + 1, place=user_place(frame))


def _tagged_parents(node: Any) -> Iterator[_Tag]:
    """The tags next to a node, through nodes that have none."""
    to_visit, num_visited = [node], 0
    while to_visit and num_visited < MAX_WALK:
        num_visited += 1
        for parent, _ in to_visit.pop().next_functions:
            if parent is None:
                continue
            tag = parent.metadata.get(_TAG)
            if tag is not None:
                yield tag
            else:
                to_visit.append(parent)
