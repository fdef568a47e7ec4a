"""A folder that compiling children share: each holds it while it is at work, and it is emptied where none does.

The hold is a lock of the operating system's, which ends with the process that has it, however that ends.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["empty_if_free", "held"]


@contextmanager
def held(folder: Path) -> Generator[int]:
    """Holds a folder; made with mode 0700 if it is not there.

    Yields:
        The hold's file descriptor: a child that inherits it goes on holding the folder.

    Raises:
        OSError: the folder cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            _lock(descriptor, is_shared=True)
        yield descriptor
    finally:
        os.close(descriptor)


def empty_if_free(folder: Path) -> bool:
    """Removes what is in a folder, unless somebody holds it; returns whether it is empty or not there."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        with suppress(OSError):  # a file system without locks
            if not _lock(descriptor, is_shared=False):
                return False
        for path in folder.iterdir():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        return True
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, is_shared: bool) -> bool:
    """Locks an open file: for others that share it (and waits for that), or, where nobody has it, alone."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
