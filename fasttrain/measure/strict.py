"""Reading of plain data that anybody may have written: each value is what it must be, or a `DataError` says where."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from fasttrain.errors import DataError
from fasttrain.printable import is_utf8

__all__ = ["Node", "read_json"]

MAX_FILE_BYTES = 32 << 20
MAX_TEXT = 4_000
MAX_DEPTH = 6
MAX_INTEGER = 1 << 62
MAX_NUMBER = 1e18


def read_json(path: Path) -> Any:
    """A JSON file's content, unchecked.

    Raises:
        DataError: it cannot be read, is no regular file, is larger than 32 MiB or is not JSON; the file is named.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe may never end, or never begin
            raise DataError("is no regular file: name a JSON file", file=str(path))
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)  # a file of /proc has more than the size that it tells
        if len(content) > MAX_FILE_BYTES:
            raise DataError(f"is larger than {MAX_FILE_BYTES >> 20} MiB: it is no record", file=str(path))
        return json.loads(content.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot be read as JSON: {error}", file=str(path)) from error


class Node:
    """A mapping out of a file, whose values are asked for by name and kind.

    Args:
        given: what stands there.
        where: how to name it in an error.

    Raises:
        DataError: it is no mapping; from the methods: a value is missing, or is not of the kind.
    """

    def __init__(self, given: Any, where: str) -> None:
        if not isinstance(given, Mapping):
            raise DataError(f"{where} must be an object, not {_shown(given)}")
        self._given = cast("Mapping[str, Any]", given)
        self._where = where

    def text(self, name: str) -> str:
        """Text of at most 4,000 characters that UTF-8 can hold."""
        return _text(self._get(name), self._at(name))

    def text_or_none(self, name: str) -> str | None:
        """Text, or null."""
        return None if self._get(name) is None else self.text(name)

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self._get(name)
        if not isinstance(value, bool):
            raise DataError(f"{self._at(name)} must be true or false, not {_shown(value)}")
        return value

    def integer(self, name: str, least: int = 0) -> int:
        """A whole number, not below `least`."""
        value = self._get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MAX_INTEGER:
            raise DataError(f"{self._at(name)} must be a whole number, {least} or more, not {_shown(value)}")
        return value

    def integer_or_none(self, name: str, least: int = 0) -> int | None:
        """A whole number, or null."""
        return None if self._get(name) is None else self.integer(name, least)

    def number(self, name: str, *, is_positive: bool = False) -> float:
        """A finite number that is not negative."""
        return _number(self._get(name), self._at(name), is_positive)

    def number_or_none(self, name: str) -> float | None:
        """A finite number that is not negative, or null."""
        return None if self._get(name) is None else self.number(name)

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of finite numbers that are not negative."""
        return tuple(_number(value, self._at(name), is_positive=False) for value in self._list(name))

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts."""
        return tuple(_text(value, f"{self._at(name)}, entry {i}") for i, value in enumerate(self._list(name)))

    def nodes(self, name: str) -> list[Node]:
        """A list of mappings."""
        return [Node(value, f"{self._at(name)}, entry {i}") for i, value in enumerate(self._list(name))]

    def pairs(self, name: str) -> list[tuple[int, int]]:
        """A list of pairs of whole numbers, 0 or more."""
        found: list[tuple[int, int]] = []
        for i, value in enumerate(self._list(name)):
            where = f"{self._at(name)}, entry {i}"
            if not isinstance(value, list) or len(cast("list[Any]", value)) != 2:
                raise DataError(f"{where} must be a pair of numbers, not {_shown(value)}")
            pair = Node({"first": value[0], "second": value[1]}, where)
            found.append((pair.integer("first"), pair.integer("second")))
        return found

    def node(self, name: str) -> Node:
        """A mapping."""
        return Node(self._get(name), self._at(name))

    def named(self, name: str) -> dict[str, Node]:
        """A mapping of names to mappings."""
        return {key: inner.node(key) for inner in [self.node(name)] for key in inner.names()}

    def names(self) -> list[str]:
        """The names of the values."""
        return [_text(key, f"a name in {self._where}") for key in self._given]

    def plain(self, name: str) -> dict[str, Any]:
        """A mapping of any plain data: texts, finite numbers, true, false, null, lists and mappings of these."""
        value = self._get(name)
        Node(value, self._at(name))
        _check_plain(value, self._at(name), 0)
        return dict(value)

    def has(self, name: str) -> bool:
        """Whether there is a value of that name, and it is not null."""
        return self._given.get(name) is not None

    def _get(self, name: str) -> Any:
        if name not in self._given:
            raise DataError(f"{self._where} has no {name!r}")
        return self._given[name]

    def _list(self, name: str) -> list[Any]:
        value = self._get(name)
        if not isinstance(value, list):
            raise DataError(f"{self._at(name)} must be a list, not {_shown(value)}")
        return cast("list[Any]", value)

    def _at(self, name: str) -> str:
        return f"{self._where}, {name!r:.80}"


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise DataError(f"{where} must be text of at most {MAX_TEXT} characters, not {_shown(value)}")
    if not is_utf8(value):
        raise DataError(f"{where} must be text without lone surrogates, not {_shown(value)}")
    return value


def _number(value: Any, where: str, is_positive: bool) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= MAX_NUMBER or (is_positive and value == 0):
        kind = "a positive number" if is_positive else "a number, 0 or more"
        raise DataError(f"{where} must be {kind}, not {_shown(value)}")
    return float(value)


def _check_plain(value: Any, where: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise DataError(f"{where} is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        for key, inner in cast("Mapping[Any, Any]", value).items():
            _check_plain(inner, f"{where}, {_text(key, where)!r:.80}", depth + 1)
    elif isinstance(value, list):
        for inner in cast("list[Any]", value):
            _check_plain(inner, where, depth + 1)
    elif isinstance(value, str):
        _text(value, where)
    elif isinstance(value, int | float) and not (abs(value) <= MAX_NUMBER and math.isfinite(value)):
        raise DataError(f"{where} must be a finite number of at most {MAX_NUMBER:g}, not {_shown(value)}")


def _shown(value: Any) -> str:
    return f"{value!r:.60}" if not isinstance(value, int) or abs(value) <= MAX_INTEGER else "a huge number"
