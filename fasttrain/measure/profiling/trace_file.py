"""Reading a Chrome trace of any size: its events one by one, in memory that does not grow with the file."""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from fasttrain.errors import DataError

__all__ = ["trace_events"]

CHUNK = 1 << 20
MAX_EVENT = 16 << 20
"""Characters; no event of a profiler comes near it."""

_BEGIN = re.compile(r'"traceEvents"\s*:\s*\[')
_BETWEEN = re.compile(r"[\s,]*")


def trace_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a trace, in the file's order.

    Args:
        path: .json or .json.gz, as torch's profiler exports it.

    Raises:
        DataError: it cannot be read, is no trace or ends in the middle.
    """
    try:
        with ExitStack() as files:
            raw: Any = files.enter_context(path.open("rb"))
            if path.suffix == ".gz":
                raw = files.enter_context(gzip.GzipFile(fileobj=raw))
            yield from _events(files.enter_context(io.TextIOWrapper(raw, encoding="utf-8", errors="replace")))
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"cannot be read as a trace: {error}", file=str(path)) from error


def _events(text: IO[str]) -> Iterator[dict[str, Any]]:
    buffer, at = _first_event(text)
    decode = json.JSONDecoder().raw_decode
    while True:
        between = _BETWEEN.match(buffer, at)
        at = between.end() if between is not None else at
        if buffer.startswith("]", at):
            return
        try:
            event, at = decode(buffer, at)
        except (json.JSONDecodeError, RecursionError):
            more = text.read(CHUNK)
            if not more or len(buffer) - at > MAX_EVENT:
                raise ValueError("it ends in the middle of an event, or holds what is none") from None
            buffer, at = buffer[at:] + more, 0
            continue
        if not isinstance(event, dict):
            raise ValueError(f"an event must be an object, not {event!r:.40}")
        yield event


def _first_event(text: IO[str]) -> tuple[str, int]:
    """The first part of the list of events, and where in it the first one is."""
    buffer = ""
    while more := text.read(CHUNK):
        buffer += more
        found = _BEGIN.search(buffer)
        if found is not None:
            return buffer, found.end()
        if len(buffer) > MAX_EVENT:
            break
    raise ValueError('it has no "traceEvents"')
