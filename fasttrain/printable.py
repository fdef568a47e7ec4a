"""Text that anybody may have written: whether a file can hold it, and how a terminal is shown it without harm."""

from __future__ import annotations

__all__ = ["is_utf8", "printable"]


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can hold a text: not where it has lone surrogates.

    Python makes them of a file's name in other bytes, and of escapes in JSON.
    """
    return not any("\ud800" <= character <= "\udfff" for character in text)


def printable(line: str) -> str:
    """A line with everything as an escape that would move a terminal's cursor, change its colours or not be seen.

    That is control characters, line breaks, marks that turn the direction of writing, and lone surrogates, which UTF-8
    cannot hold.
    """
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in line)
