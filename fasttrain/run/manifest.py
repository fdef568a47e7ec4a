"""Files that survive a crash, and manifests that bind files of a run by their SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fasttrain.errors import RunError
from fasttrain.json_text import json_text

__all__ = ["MISSING", "Bound", "Manifest", "sha256_of", "sync", "write_atomically"]

VERSION = 1
"""Of a manifest's layout; another version is refused."""

MISSING = "is missing"
"""The problem of a file that is not there."""


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file such that a reader sees the old content or the new, never a part, also after a power failure.

    The content is on the disk before the file gets its name, and the name before this function returns.

    Raises:
        RunError: it cannot be written (disk full, read-only folder, no permission).
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        sync(partial)
        os.replace(partial, path)
        with suppress(OSError):  # some file systems cannot sync a folder
            sync(path.parent)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # a read-only folder refuses this too
            partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(content: bytes) -> str:
    """The SHA-256 of bytes, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What a manifest knows about a file.

    Attributes:
        sha256: the SHA-256 that its content may have. There are two while a file is replaced: the manifest is written
            first, so that it fits the file whenever the process is killed.
        first_bytes: how many bytes of the file are bound, for a file that grows; None for the whole.
    """

    sha256: tuple[str, ...]
    first_bytes: int | None = None

    def problem(self, path: Path) -> str | None:
        """What is wrong with a file, in words that follow its name; None if its content is as it was written."""
        try:
            with path.open("rb") as file:
                if self.first_bytes is None:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                else:
                    found = sha256_of(file.read(self.first_bytes))
        except FileNotFoundError:
            return MISSING
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"
        return None if found in self.sha256 else "is damaged or was changed: its SHA-256 is not the one in the manifest"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Files that belong together, bound by their SHA-256.

    Attributes:
        files: by name, in the manifest's folder.
    """

    files: Mapping[str, Bound]

    def to_bytes(self) -> bytes:
        """The manifest's file. It ends with its own SHA-256, so that `from_bytes` notices any changed byte."""
        files: dict[str, dict[str, Any]] = {}
        for name, bound in self.files.items():
            files[name] = {"sha256": bound.sha256}
            if bound.first_bytes is not None:
                files[name]["first_bytes"] = bound.first_bytes
        content = {"fasttrain_manifest": VERSION, "files": files}
        return json_text({**content, "sha256": sha256_of(json_text(content).encode())}).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Manifest:
        """Reads what `to_bytes` made.

        Raises:
            ValueError: it is something else, also by a single byte.
        """
        try:
            given = json.loads(content.decode())
            if given["fasttrain_manifest"] != VERSION:
                raise ValueError("is a manifest of another version of fasttrain")
            files = {
                name: Bound(sha256=tuple(bound["sha256"]), first_bytes=bound.get("first_bytes"))
                for name, bound in cast("dict[str, dict[str, Any]]", given["files"]).items()
            }
        except (KeyError, TypeError, AttributeError, RecursionError, UnicodeDecodeError, json.JSONDecodeError):
            raise ValueError("is damaged: it is no manifest") from None
        found = cls(files=files)
        if found.to_bytes() != content:
            raise ValueError("is damaged or was changed: its content is not what its own SHA-256 says")
        return found
