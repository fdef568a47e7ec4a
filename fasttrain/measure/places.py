"""Where in the user's code something happens: the innermost frame that is theirs."""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch

__all__ = [
    "Place",
    "innermost_of_user",
    "is_host_work",
    "is_of_torch",
    "is_of_user",
    "shown",
    "user_frame",
    "user_place",
]

Place = tuple[str, int]
"""(file, line)."""

_TORCH = str(Path(torch.__file__).parent) + os.sep
_OPTIMIZERS = os.path.join(_TORCH, "optim", "")
_LOADERS = os.path.join(_TORCH, "utils", "data", "")
_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_INSTRUMENT = str(Path(__file__).parent) + os.sep
_STANDARD = (sysconfig.get_path("stdlib") + os.sep, sysconfig.get_path("platstdlib") + os.sep)
_PACKAGES = ("site-packages", "dist-packages")


@functools.cache
def is_of_user(file: str) -> bool:
    """True for files outside torch, fasttrain and the standard library."""
    if file.startswith("<"):  # generated code; a notebook's cells have names of files
        return False
    is_standard = file.startswith(_STANDARD) and not any(name in file for name in _PACKAGES)
    return not is_standard and not file.startswith((_TORCH, _PACKAGE))


def is_of_torch(file: str) -> bool:
    """True for torch's own files."""
    return file.startswith(_TORCH)


def is_host_work(frame: FrameType | None) -> bool:
    """True where a `DataLoader` collects a batch, or torch's optimizer counts its steps."""
    innermost = next((each for each in _outwards(frame) if not each.f_code.co_filename.startswith(_INSTRUMENT)), None)
    if innermost is not None and innermost.f_code.co_filename.startswith(_OPTIMIZERS):
        return True
    return any(each.f_code.co_filename.startswith(_LOADERS) for each in _outwards(frame))


def user_frame(frame: FrameType | None) -> FrameType | None:
    """The innermost frame, from `frame` outwards, of the user's code; None if there is none."""
    return next((each for each in _outwards(frame) if is_of_user(each.f_code.co_filename)), None)


def user_place(frame: FrameType | None = None) -> Place:
    """The innermost place, from `frame` (or the caller) outwards, outside torch, fasttrain and the standard library.

    Where all of the stack is within those (a command of fasttrain's runs its own loop), the innermost place outside
    torch and the instrument.
    """
    frame = frame or sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    found = user_frame(frame)
    if found is None:
        found = next((each for each in _outwards(frame) if _is_of_fasttrain(each.f_code.co_filename)), frame)
    return found.f_code.co_filename, found.f_lineno


def innermost_of_user(frame: FrameType | None, *, is_installed_skipped: bool = False) -> Place | None:
    """The innermost place that is of the user, if what runs there was not called by torch or fasttrain.

    Args:
        frame: from here outwards.
        is_installed_skipped: pass over installed packages, such as a progress bar, to who calls them.
    """
    for each in _outwards(frame):
        file = each.f_code.co_filename
        if file.startswith((_TORCH, _PACKAGE)):
            return None
        if is_of_user(file) and not (is_installed_skipped and any(name in file for name in _PACKAGES)):
            return file, each.f_lineno
    return None


def shown(file: str) -> str:
    """A file as a record names it: relative to the working folder, or to fasttrain's parent, where it lies in one."""
    for root in (Path.cwd(), Path(_PACKAGE).parent):
        if Path(file).is_relative_to(root):
            return str(Path(file).relative_to(root))
    return file


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_of_fasttrain(file: str) -> bool:
    return file.startswith(_PACKAGE) and not file.startswith(_INSTRUMENT)
