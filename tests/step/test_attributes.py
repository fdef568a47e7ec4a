"""What the user's code changes of an object is seen, and put back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fasttrain.step.optimizer import Attributes

TENSOR = torch.ones(2)


class Thing:
    def __init__(self) -> None:
        self.tensor = TENSOR
        self.size = (2, 3)
        self.rate = 0.5
        self.list = [TENSOR, 1]
        self.table = OrderedDict(a=TENSOR, b=1)
        self.names = {"a"}


def everything(thing: Thing) -> list[Any]:
    return [thing.tensor, thing.size, thing.rate, list(thing.list), list(thing.table.items()), set(thing.names)]


CHANGES: dict[str, Callable[[Thing], Any]] = {
    "tensor": lambda thing: setattr(thing, "tensor", TENSOR.clone()),
    "size": lambda thing: setattr(thing, "size", (2, 4)),
    "rate": lambda thing: setattr(thing, "rate", 1.0),
    "list": lambda thing: thing.list.append(2),
    "table": lambda thing: thing.table.move_to_end("a"),
    "names": lambda thing: thing.names.add("b"),
    "new": lambda thing: setattr(thing, "new", None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen_and_put_back(name: str) -> None:
    thing = Thing()
    before, objects = everything(thing), (thing.list, thing.table, thing.names)
    attributes = Attributes(vars(thing))
    CHANGES[name](thing)
    assert attributes.changed() == [name]
    attributes.put_back()
    assert attributes.changed() == []
    assert list(vars(thing)) == list(vars(Thing()))
    assert all(a is b or a == b for a, b in zip(everything(thing), before, strict=True))
    assert all(a is b for a, b in zip((thing.list, thing.table, thing.names), objects, strict=True))


def test_what_was_changed_inside_and_replaced_is_put_back_whole() -> None:
    thing = Thing()
    attributes, table = Attributes(vars(thing)), thing.table
    table.clear()
    thing.table = OrderedDict()
    attributes.put_back()
    assert thing.table is table
    assert list(table) == ["a", "b"]


def test_what_was_removed_is_put_back() -> None:
    thing = Thing()
    attributes = Attributes(vars(thing))
    del thing.tensor
    assert attributes.changed() == ["tensor"]
    attributes.put_back()
    assert thing.tensor is TENSOR


def test_equal_plain_values_are_no_change() -> None:
    thing = Thing()
    attributes = Attributes(vars(thing))
    thing.size, thing.rate = torch.Size([2, 3]), float("0.5")
    assert attributes.changed() == []
    thing.rate = True
    assert attributes.changed() == ["rate"]


def test_ignored_names_are_left_alone() -> None:
    thing = Thing()
    attributes = Attributes(vars(thing), ignored=("rate", "new"))
    thing.rate, vars(thing)["new"] = 2.0, 1
    assert attributes.changed() == []
    attributes.put_back()
    assert thing.rate == 2.0
