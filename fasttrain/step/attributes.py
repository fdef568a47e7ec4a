"""Attributes of the user's objects, which the user's code may change while it is traced."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch

__all__ = ["Attributes"]


class Attributes:
    """The attributes of an object as they are now, with the entries of those that are lists, dicts and sets.

    Args:
        values: the attributes themselves (`vars(object)`), by name.
        ignored: names that are left alone.
    """

    def __init__(self, values: dict[str, Any], ignored: Collection[str] = ()) -> None:
        self._values = values
        self._before = {name: value for name, value in values.items() if name not in ignored}
        self._entries = {name: _entries(value) for name, value in self._before.items() if _is_container(value)}
        self._ignored = ignored

    def changed(self) -> list[str]:
        """The names of those that came or went, or are not the same, or have other entries.

        Equal plain values are the same, and tuples of them.
        """
        names = [name for name in dict.fromkeys([*self._before, *self._values]) if name not in self._ignored]
        return [name for name in names if not self._is_as_before(name)]

    def put_back(self) -> None:
        """Makes them what they were; objects that were not replaced stay the same objects."""
        for name in self.changed():
            if name not in self._before:
                del self._values[name]
                continue
            value: Any = self._before[name]
            self._values[name] = value
            if name not in self._entries or _is_same(_entries(value), self._entries[name]):
                continue
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(_as_given(value, self._entries[name]))

    def _is_as_before(self, name: str) -> bool:
        if name not in self._before or name not in self._values:
            return False
        value = self._values[name]
        return _is_same(value, self._before[name]) and (
            name not in self._entries or _is_same(_entries(value), self._entries[name])
        )


_PLAIN = (bool, int, float, complex, str, bytes, torch.device)


def _is_container(value: Any) -> bool:
    return isinstance(value, list | dict | set)


def _entries(value: Any) -> tuple[Any, ...]:
    """What a container holds, in order, so that it can be compared."""
    if isinstance(value, dict):
        return tuple(cast("dict[Any, Any]", value).items())
    return tuple(cast("list[Any]", value))


def _as_given(value: Any, entries: tuple[Any, ...]) -> Any:
    return dict(entries) if isinstance(value, dict) else entries


def _is_same(value: Any, old: Any) -> bool:
    """One object, or equal plain values, or tuples of such."""
    if value is old:
        return True
    if isinstance(value, tuple) and isinstance(old, tuple):
        these, those = cast("tuple[Any, ...]", value), cast("tuple[Any, ...]", old)
        return len(these) == len(those) and all(map(_is_same, these, those))
    return isinstance(value, _PLAIN) and type(value) is type(old) and value == old
