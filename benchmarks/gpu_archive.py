"""What `benchmarks.gpu` keeps of its work folder, in archives of bounded size."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

MOST_FILES, MOST_BYTES, MOST_TOTAL_BYTES = 8, 16 << 20, 60 << 20
"""Of the folder that is kept: files, bytes of an archive, bytes of all."""


class Archive:
    """What is kept of the work folder: `check.tar.gz` for all but programs, `programs-N.tar` for these.

    Args:
        out: where the archives go.
        work: what they are of.
        tell: is told what does not fit.
        most_bytes: of an archive.
    """

    def __init__(
        self, out: Path, work: Path, tell: Callable[[dict[str, Any]], None], most_bytes: int = MOST_BYTES
    ) -> None:
        self._out = out
        self._work = work
        self._tell = tell
        self._most_bytes = most_bytes
        self._bins: list[list[tuple[str, bytes]]] = []
        self._known: set[str] = set()
        self._left_out: set[str] = set()

    def write(self) -> None:
        """Writes anew the archives whose content has changed, each at once."""
        for number in self._take_programs():
            self._replace(f"programs-{number}.tar", lambda tar, held=self._bins[number]: _add_all(tar, held), "w")
        files = sorted((file for file in self._kept() if file.is_file()), key=lambda file: file.stat().st_size)
        while not self._replace("check.tar.gz", lambda tar: _add_files(tar, files, self._work), "w:gz"):
            self._leave_out(str(files.pop().relative_to(self._work)), "too large for an archive")

    def _kept(self) -> Iterable[Path]:
        return (file for name in ("logs", "records", "profiles") for file in (self._work / name).rglob("*"))

    def _take_programs(self) -> set[int]:
        """Puts new programs into the archives; returns the numbers of those that changed."""
        changed: set[int] = set()
        names = (*self._work.glob("cache/**/programs/*.pt2"), *self._work.glob("cache/**/programs/*.json"))
        for file in sorted((file for file in names if str(file) not in self._known), key=lambda f: f.stat().st_mtime):
            self._known.add(str(file))
            name = f"{file.relative_to(self._work)}.gz"
            try:
                packed = gzip.compress(file.read_bytes(), 6)
            except FileNotFoundError:
                continue
            number = self._bin_for(len(packed) + 2048)
            if number is None:
                self._leave_out(name, "no archive has room for it")
                continue
            self._bins[number].append((name, packed))
            changed.add(number)
        return changed

    def _bin_for(self, num_bytes: int) -> int | None:
        sizes = [sum(len(content) + 2048 for _, content in held) for held in self._bins]
        most = self._most_bytes - (64 << 10)
        if sum(sizes) + num_bytes > MOST_TOTAL_BYTES - self._most_bytes or num_bytes > most:
            return None
        for number, size in enumerate(sizes):
            if size + num_bytes <= most:
                return number
        if len(self._bins) >= MOST_FILES - 2:
            return None
        self._bins.append([])
        return len(self._bins) - 1

    def _replace(self, name: str, fill: Callable[[tarfile.TarFile], None], mode: Any) -> bool:
        """Writes an archive in place of an older one; False: it would be too large, and the older one stays."""
        with tempfile.TemporaryDirectory(dir=self._work) as scratch:
            made = Path(scratch, name)
            with tarfile.open(made, mode) as tar:
                fill(tar)
            if made.stat().st_size > self._most_bytes:
                return False
            shutil.copyfile(made, self._out / f".{name}")  # the folders may be of two file systems
            os.replace(self._out / f".{name}", self._out / name)
        return True

    def _leave_out(self, name: str, reason: str) -> None:
        if name not in self._left_out:
            self._left_out.add(name)
            self._tell({"kind": "left out", "file": name, "reason": reason})


def _add_all(tar: tarfile.TarFile, held: Iterable[tuple[str, bytes]]) -> None:
    for name, content in held:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))


def _add_files(tar: tarfile.TarFile, files: Iterable[Path], work: Path) -> None:
    for file in files:
        with suppress(FileNotFoundError):
            tar.add(file, str(file.relative_to(work)))


def restore_programs(archive: Path, work: Path) -> int:
    """Brings the programs of an earlier call back; returns how many there are."""
    count = 0
    for path in sorted(archive.glob("programs-*.tar")):
        with tarfile.open(path) as tar:
            for entry in tar.getmembers():
                target = work / entry.name.removesuffix(".gz")
                content = tar.extractfile(entry)
                if content is None or work.resolve() not in target.resolve().parents:
                    continue
                target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                target.write_bytes(gzip.decompress(content.read()))
                count += target.suffix == ".pt2"
    for folder in work.glob("cache/**/"):
        folder.chmod(0o700)  # code is loaded from there
    return count
