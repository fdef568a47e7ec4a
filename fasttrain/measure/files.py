"""Writing of files that take long to measure: whole, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from fasttrain.errors import DataError

__all__ = ["write_text"]


def write_text(path: Path, content: str, what: str) -> None:
    """Writes text as UTF-8, in place of an older file at once. Folders above it are made.

    A link stays one: what it leads to is replaced. What is no regular file, such as /dev/null, is written to as it is.

    Args:
        path: of the file.
        content: the whole of it.
        what: how an error names it: "the record".

    Raises:
        DataError: it cannot be written there, or UTF-8 cannot hold it. An older file is as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            path.write_text(content, encoding="utf-8")
        else:
            _replace(Path(os.path.realpath(path)), content)
    except OSError as error:
        raise DataError(f"{what} cannot be written: {error.strerror or error}", file=str(path)) from error
    except UnicodeError as error:
        raise DataError(f"{what} cannot be written: {error}", file=str(path)) from error


def _replace(path: Path, content: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
