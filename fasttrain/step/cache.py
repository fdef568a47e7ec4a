"""Compiled programs on disk: one folder that belongs to this user alone, bounded in size, safe for two processes.

A program is machine code that is loaded into the process, so nothing is taken from a folder that anyone else could
have written to.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fasttrain.errors import EngineError

__all__ = ["CacheEntry", "ProgramCache", "Verdict", "default_folder", "empty_if_free", "has_too_much", "held"]

MAX_BYTES = 2 << 30
"""Beyond this, the programs that were not used for longest are removed."""

SCRATCH_BYTES = 1 << 30
"""Beyond this, what compiling children keep for the next one is removed, once none is at work: one precompiled header
takes 0.1 GB."""

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was measured of a step's program on this machine.

    Attributes:
        eager_us: median of a step, run eagerly.
        program_us: median of a step, replayed; None if it was never timed.
        trace_s: how long the trace stopped the training.
        compile_s: how long export and compiler took, in the child.
        refused: why the program is not to be used; None where it was measured faster.
    """

    eager_us: float
    program_us: float | None
    trace_s: float
    compile_s: float | None
    refused: str | None


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """A program in the cache, as `cache` shows it."""

    key: str
    num_bytes: int
    used: float
    what: str


def default_folder(variables: Mapping[str, str] = os.environ) -> Path:
    """`$XDG_CACHE_HOME/fasttrain/programs`, by default below `~/.cache`; of a process with these variables."""
    base = Path(variables.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "fasttrain" / "programs"


class ProgramCache:
    """Programs by key (of graph, shapes, versions, hardware, threads) and verdicts by signature (of the job).

    Args:
        folder: where they are; made with mode 0700 if it is not there.

    Raises:
        EngineError: the folder belongs to somebody else, others may write to it, or it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _make_private(folder)

    @property
    def inductor_folder(self) -> Path:
        """Where compiling children keep what serves the next one: what the C++ compiler can do, precompiled headers."""
        return self.folder / "inductor"

    def find(self, key: str) -> Path | None:
        """The program of that key, None if there is none or it is damaged (it is then removed)."""
        package, record = self._paths(key)
        try:
            known = json.loads(record.read_text(encoding="utf-8"))
            is_whole = known["format"] == FORMAT and known["sha256"] == _sha256(package)
            if is_whole:
                _touch(record)
                return package
        except (OSError, ValueError, KeyError, TypeError):
            pass  # it is damaged, or another process has removed it meanwhile
        with suppress(OSError):  # on a read-only file system it stays, and is found damaged again
            self._remove(key)
        return None

    def add(self, key: str, package: Path, what: str) -> Path:
        """Takes a copy of a package in and returns where it is; removes the oldest beyond the bound.

        Raises:
            OSError: it cannot be written.
        """
        home, record = self._paths(key)
        partial = _partial(home)
        try:
            shutil.copyfile(package, partial)  # the folder for temporary files may be another file system
            digest = _sha256(partial)  # not of what is there afterwards: another process may be at work on it
            os.replace(partial, home)
        finally:
            partial.unlink(missing_ok=True)
        _write(record, {"format": FORMAT, "sha256": digest, "what": what})
        self._keep_to_size(key)
        if has_too_much(self.inductor_folder):
            empty_if_free(self.inductor_folder)
        return home

    def library(self, key: str, make: Callable[[Path], None]) -> Path:
        """A shared library of fasttrain's own (not of a step), made where the folder does not have it as it was made.

        Args:
            key: of everything that it depends on.
            make: writes it to a path that does not exist yet.

        Raises:
            OSError: it cannot be written; errors of `make` pass through.
        """
        home, record = self.folder / f"{key}.so", self.folder / f"{key}.sha256"
        try:
            if json.loads(record.read_text(encoding="utf-8")) == {"format": FORMAT, "sha256": _sha256(home)}:
                return home
        except (OSError, ValueError):
            pass  # it was never made, or is damaged
        partial = _partial(home)
        try:
            make(partial)
            digest = _sha256(partial)
            os.replace(partial, home)
        finally:
            partial.unlink(missing_ok=True)
        _write(record, {"format": FORMAT, "sha256": digest})
        return home

    def verdict(self, signature: str) -> Verdict | None:
        """What was measured for a job of that signature, None if nothing (readable) was."""
        try:
            return Verdict(**json.loads(self._verdict_path(signature).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def remember(self, signature: str, verdict: Verdict) -> None:
        """Keeps what was measured.

        Raises:
            OSError: it cannot be written.
        """
        _write(self._verdict_path(signature), asdict(verdict))

    def forget(self) -> None:
        """Removes every verdict; the programs stay."""
        for path in [*self.folder.glob("*.verdict"), *self.folder.glob("*.seen")]:
            path.unlink(missing_ok=True)

    def note_short(self, signature: str) -> int:
        """Counts a run of a job that ended before its program was ready; returns how many there were.

        Raises:
            OSError: it cannot be written.
        """
        seen = self._seen(signature)
        count = int(seen.get("count", 0)) + 1
        _write(self._seen_path(signature), {**seen, "count": count})
        return count

    def note_ready(self, signature: str) -> None:
        """Notes that the program of such a job was compiled after it had ended.

        Raises:
            OSError: it cannot be written.
        """
        _write(self._seen_path(signature), {**self._seen(signature), "is_ready": True})

    def is_ready(self, signature: str) -> bool:
        """Whether the program of a job that was too short to compile for was compiled after an earlier run."""
        return self._seen(signature).get("is_ready") is True

    def _seen(self, signature: str) -> dict[str, Any]:
        try:
            found = json.loads(self._seen_path(signature).read_text(encoding="utf-8"))
            return found if isinstance(found, dict) and isinstance(found.get("count", 0), int) else {}
        except (OSError, ValueError):
            return {}

    def _seen_path(self, signature: str) -> Path:
        return self.folder / f"{signature}.seen"

    @property
    def ahead_path(self) -> Path:
        """The file that names the child which compiles for later runs."""
        return self.folder / "ahead"

    def entries(self) -> list[CacheEntry]:
        """All programs, the last used first."""
        found = [entry for record in self.folder.glob("*.json") if (entry := self._entry(record)) is not None]
        return sorted(found, key=lambda entry: entry.used, reverse=True)

    def clear(self) -> int:
        """Removes every program and verdict; returns how many programs there were."""
        count = 0
        for path in list(self._own_files()):
            count += path.suffix == ".pt2"
            path.unlink(missing_ok=True)
        empty_if_free(self.inductor_folder)
        return count

    def _paths(self, key: str) -> tuple[Path, Path]:
        return self.folder / f"{key}.pt2", self.folder / f"{key}.json"

    def _verdict_path(self, signature: str) -> Path:
        return self.folder / f"{signature}.verdict"

    def _own_files(self) -> Iterator[Path]:
        for suffix in ("pt2", "json", "verdict", "seen", "so", "sha256", "partial"):
            yield from self.folder.glob(f"*.{suffix}")

    def _entry(self, record: Path) -> CacheEntry | None:
        package, _ = self._paths(record.stem)
        try:
            known: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
            return CacheEntry(
                key=record.stem,
                num_bytes=package.stat().st_size,
                used=record.stat().st_mtime,
                what=str(known["what"]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _keep_to_size(self, newest: str) -> None:
        total = 0
        for entry in self.entries():
            total += entry.num_bytes
            if total > MAX_BYTES and entry.key != newest:
                self._remove(entry.key)

    def _remove(self, key: str) -> None:
        for path in self._paths(key):
            path.unlink(missing_ok=True)


def has_too_much(folder: Path) -> bool:
    """Whether what compiling children keep in a folder is to be removed."""
    return sum(_size_of(path) for path in folder.rglob("*")) > SCRATCH_BYTES


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise EngineError(f"the program cache {folder} cannot be made: {error.strerror or error}") from error
    if stat.S_ISLNK(found.st_mode) or not stat.S_ISDIR(found.st_mode):
        raise EngineError(f"the program cache {folder} is not a folder (links are not followed)")
    if hasattr(os, "getuid") and found.st_uid != os.getuid():
        raise EngineError(f"the program cache {folder} belongs to another user: no code is loaded from there")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise EngineError(f"others may write to the program cache {folder}: no code is loaded from there (chmod 700)")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, content: dict[str, Any]) -> None:
    partial = _partial(path)
    try:
        partial.write_text(json.dumps(content), encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _size_of(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:  # another process has removed it meanwhile
        return 0


def _partial(path: Path) -> Path:
    """A name beside `path` that no other process or thread uses."""
    return path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.{time.monotonic_ns()}.partial")


def _touch(record: Path) -> None:
    """Notes that it was used; on a read-only file system it stays as old as it is."""
    try:
        os.utime(record)
    except FileNotFoundError:  # another process has removed it
        raise
    except OSError:
        pass


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
