"""The folder of a run: made at its start, filled as it goes, kept once anything is reached."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fasttrain.errors import RunError
from fasttrain.history import EpochRow, History, rows_from_csv, rows_to_csv
from fasttrain.json_text import json_text
from fasttrain.run.checkpoint import load_tree, pack_tree
from fasttrain.run.manifest import MISSING, Bound, Manifest, sha256_of, sync, write_atomically

__all__ = ["RunFolder", "StoredCheckpoint"]

KEPT_CHECKPOINTS = 2
"""The older one is used where the newest is damaged."""

MANIFEST = "manifest.json"
"""Binds the files of the run's end: the model, the summary, the report and what they came from."""

MODEL = "model.safetensors"
HISTORY = "history.csv"
VECTORIZER = "vectorizer.json"
CONFIG = "config.json"

OLD_CHECKPOINT = "checkpoint.safetensors"
"""The checkpoint of a run that was made before there were manifests."""


@dataclass(frozen=True, kw_only=True)
class StoredCheckpoint:
    """A checkpoint that was read.

    Attributes:
        path: of its file.
        tree: what `write_checkpoint` was given.
        rows: of the history, up to the checkpoint.
        is_old: a version without manifests wrote it; `write_checkpoint` replaces it.
    """

    path: Path
    tree: dict[str, Any]
    rows: list[EpochRow]
    is_old: bool = False


class RunFolder:
    """The files of one run.

    As a context it locks the folder for this process. If an error ends the context, a folder that it made goes away
    unless it holds a checkpoint or a model.

    A checkpoint is `checkpoint-EPOCH.safetensors` and its manifest `checkpoint-EPOCH.json`, which is written last; the
    newest two are kept. `manifest.json` binds the model and what is written after it.

    Attributes:
        path: where the files are.
        notes: what the user should be told about the files.
    """

    def __init__(self, path: Path, *, made: Sequence[Path] = ()) -> None:
        self.path = path
        self.notes: list[str] = []
        self._made = made
        self._lock: int | None = None
        self._good: list[int] = []  # epochs of checkpoints that this process wrote or checked
        self._shared: dict[str, Bound] = {}  # files that belong to every checkpoint and to the model
        self._history_hash = hashlib.sha256()
        self._history_bytes = 0

    @classmethod
    def create(cls, out: Path | None, workload: str) -> RunFolder:
        """A new folder: `out`, or runs/<date>-<time>-<workload>.

        Raises:
            RunError: it exists already, or cannot be made.
        """
        path = out or _free_name(Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{workload}")
        made = [path, *(parent for parent in path.parents if not parent.exists())]
        folder = cls(path, made=made)
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            raise RunError(f"{path} exists already: give --out a new name, or go on with --resume {path}") from None
        except OSError as error:
            folder._remove_parents()
            raise RunError(f"{path} cannot be made: {error.strerror or error}; give --out another name") from error
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An earlier run's folder.

        Raises:
            RunError: it is not one.
        """
        if not path.is_dir():
            raise RunError(f"{path} is not a folder: give the folder of an earlier run")
        if not (path / CONFIG).is_file():
            raise RunError(f"{path} is not the folder of a run: it has no {CONFIG}")
        return cls(path)

    def __enter__(self) -> RunFolder:
        """Locks the folder.

        Raises:
            RunError: another process has locked it.
        """
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                self.notes.append(f"{self.path} cannot be locked ({error.strerror}): let no other process train in it.")
                return self
            self._unlock()
            raise RunError(f"{self.path} is in use: another process trains in it; wait until it ends") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Unlocks the folder. After an error, one that this run made stays only if anything was reached."""
        if error is not None and self._made:
            if self._holds_something():
                error.add_note(f"what the run has reached is kept; go on with --resume {self.path}")
            else:
                shutil.rmtree(self.path, ignore_errors=True)
                self._remove_parents()
        self._unlock()

    def _holds_something(self) -> bool:
        return bool(self._epochs()) or any((self.path / name).exists() for name in (OLD_CHECKPOINT, MODEL))

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _remove_parents(self) -> None:
        for parent in self._made[1:]:
            with suppress(OSError):  # it was not made, or somebody else's files are in it: it stays
                parent.rmdir()

    # --- files ---

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a JSON file, readable and diffable. Non-finite numbers become null: JSON has none."""
        self.write_text(name, json_text(content) + "\n")

    def write_text(self, name: str, content: str) -> None:
        """Writes a text file."""
        self._write_bound(name, content.encode(), [MANIFEST])

    def read_json(self, name: str) -> dict[str, Any]:
        """Reads a JSON file of the run.

        Raises:
            RunError: it is missing or damaged.
        """
        try:
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(f"{self.path / name} cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise RunError(f"{self.path / name} is damaged: it must hold one object")
        return content

    def read_config(self) -> dict[str, Any]:
        """Reads config.json.

        Raises:
            RunError: it is damaged, or it is not the one that the run's checkpoints were written with.
        """
        content = self.read_json(CONFIG)
        for epoch in self._epochs():
            problem = self._damaged(_manifest_name(epoch)).get(CONFIG)
            if problem is not None:
                raise RunError(f"{self.path / CONFIG} {problem}; restore it from a copy")
        return content

    def write_config(self, options: Mapping[str, Any]) -> None:
        """Writes config.json, which belongs to every checkpoint and to the model."""
        self._write_shared(CONFIG, (json_text(options) + "\n").encode())

    def write_vectorizer(self, content: str) -> None:
        """Writes vectorizer.json, as it follows from the table; one that the run has already is checked instead.

        Raises:
            RunError: it cannot be written, or it is damaged and the table gives another one.
        """
        name, bound = VECTORIZER, self._shared.get(VECTORIZER)
        if bound is not None:
            problem = bound.problem(self.path / name)
            if problem is None:
                return
            if sha256_of(content.encode()) not in bound.sha256:
                raise RunError(f"{self.path / name} {problem}; restore it from a copy")
            self.notes.append(f"{name} {problem}; it is written anew from the table.")
        self._write_shared(name, content.encode())

    def write_model(self, state: Mapping[str, Tensor]) -> None:
        """Writes model.safetensors: the state_dict of the model."""
        # Copies, since tied weights share memory, which safetensors refuses.
        contiguous = {
            name: value.detach().cpu().contiguous().clone() for name, value in state.items()
        }  # HOST READ: once, at the end
        self._write_bound(MODEL, save(contiguous), [MANIFEST])

    def read_model(self) -> dict[str, Tensor]:
        """The state_dict of the model, on the CPU.

        Raises:
            RunError: it is missing or damaged.
        """
        path = self.path / MODEL
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{path} cannot be read: {error}") from error

    def check_model(self) -> None:
        """Compares the files with their manifests; what does not concern the model becomes a note.

        Raises:
            RunError: the model or the vectorizer is missing, or is not as the run wrote it.
        """
        damaged = self._damaged(MANIFEST)
        if damaged.get(MANIFEST) == MISSING:
            self.notes.append(f"{self.path} has no {MANIFEST}: damaged files cannot be recognized.")
        elif MANIFEST in damaged:
            raise RunError(
                f"{self.path / MANIFEST} {damaged[MANIFEST]}, so the model cannot be checked: "
                f"--resume {self.path} writes it anew"
            )
        for name in (MODEL, VECTORIZER):
            if name in damaged:
                raise RunError(
                    f"{self.path / name} {damaged[name]}; restore it from a copy, or use --resume {self.path}"
                )
        for epoch in self._epochs():
            damaged |= self._damaged(_manifest_name(epoch))
        self._note_damaged(damaged)

    # --- history ---

    def write_history(self, history: History) -> None:
        """Writes history.csv anew; `append_history` goes on from there."""
        content = rows_to_csv(history.rows).encode()
        write_atomically(self.path / HISTORY, content)
        self._history_hash, self._history_bytes = hashlib.sha256(content), len(content)

    def append_history(self, rows: Sequence[EpochRow]) -> None:
        """Adds rows at the end of history.csv. They are not safe from a power failure before the next checkpoint.

        Raises:
            RunError: the file cannot be written.
        """
        content = rows_to_csv(rows, header=False).encode()
        path = self.path / HISTORY
        try:
            with path.open("ab") as file:
                file.write(content)
        except OSError as error:
            raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
        self._history_hash.update(content)
        self._history_bytes += len(content)

    # --- checkpoints ---

    def write_checkpoint(self, tree: Any, epoch: int) -> None:
        """Writes what `--resume` goes on from, and removes all checkpoints but this one and the last good one.

        Raises:
            RunError: it cannot be written; earlier checkpoints are as they were.
        """
        name, content = _checkpoint_name(epoch), pack_tree(tree)
        try:
            sync(self.path / HISTORY)
        except OSError as error:
            raise RunError(f"{self.path / HISTORY} cannot be written: {error.strerror or error}") from error
        write_atomically(self.path / name, content)
        manifest = Manifest(files={**self._bound_now(), name: Bound(sha256=(sha256_of(content),))})
        write_atomically(self.path / _manifest_name(epoch), manifest.to_bytes())
        self._good = [*(each for each in self._good if each != epoch), epoch][-KEPT_CHECKPOINTS:]
        kept = {path for each in self._good for path in (_checkpoint_name(each), _manifest_name(each))}
        for path in self.path.iterdir():
            if path.name not in kept and _OWN_CHECKPOINT.fullmatch(path.name):
                with suppress(OSError):  # it takes room and does no harm
                    path.unlink()

    def read_checkpoint(self) -> StoredCheckpoint | None:
        """The newest checkpoint whose files are all as they were written; None for a run that has reached none.

        Every other file that was changed becomes a note.

        Raises:
            RunError: there are checkpoints, and none of them can be used.
        """
        damaged: dict[str, str] = {}
        chosen: int | None = None
        for epoch in self._epochs():
            found = self._damaged(_manifest_name(epoch))
            if chosen is None and not found.keys() - {VECTORIZER}:  # the vectorizer can be made anew
                chosen = epoch
            damaged |= found
        if chosen is None:
            if damaged:
                problems = "; ".join(f"{name} {problem}" for name, problem in damaged.items())
                raise RunError(f"{self.path} has no checkpoint that can be used: {problems}. Restore it from a copy")
            return self._read_old_checkpoint()
        self._note_damaged(damaged | self._damaged(MANIFEST))
        if chosen != self._epochs()[0]:
            self.notes.append(f"The run goes on from an earlier checkpoint, of epoch {chosen}.")
        return self._read_good_checkpoint(chosen)

    def _read_good_checkpoint(self, epoch: int) -> StoredCheckpoint:
        path = self.path / _checkpoint_name(epoch)
        manifest, _ = self._read_manifest(_manifest_name(epoch))
        assert manifest is not None
        history = manifest.files[HISTORY]
        self._shared = {name: manifest.files[name] for name in manifest.files if name not in (HISTORY, path.name)}
        self._good = [epoch]
        try:
            content = (self.path / HISTORY).read_bytes()[: history.first_bytes]
            return StoredCheckpoint(path=path, tree=load_tree(path), rows=rows_from_csv(content.decode()))
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path / HISTORY} cannot be read: {error}") from error

    def _read_old_checkpoint(self) -> StoredCheckpoint | None:
        path = self.path / OLD_CHECKPOINT
        if path.exists():
            self.notes.append(f"{self.path} has no manifest: damaged files cannot be recognized.")
            tree = load_tree(path)
            try:
                return StoredCheckpoint(path=path, tree=tree, rows=History.from_dict(tree["history"]).rows, is_old=True)
            except (KeyError, TypeError) as error:
                raise RunError(f"{path} cannot be used: it lacks {error}") from error
        without_manifest = sorted(path.name for path in self.path.glob("checkpoint-*.safetensors"))
        if len(without_manifest) > 1:  # one alone: the run was killed before it wrote its first manifest
            names = " and ".join(without_manifest)
            raise RunError(f"{self.path}: the manifests of {names} are missing; restore them from a copy")
        if (self.path / MODEL).exists():
            raise RunError(f"{self.path} has a model, but no checkpoint to go on from: train anew, with a new --out")
        self.notes.append(f"{self.path} has no checkpoint: the run starts over.")
        return None

    def _epochs(self) -> list[int]:
        """Epochs of the checkpoints that have a manifest, the newest first."""
        numbers = [path.stem.removeprefix("checkpoint-") for path in self.path.glob("checkpoint-*.json")]
        return sorted((int(number) for number in numbers if number.isdecimal()), reverse=True)

    # --- manifests ---

    def _bound_now(self) -> dict[str, Bound]:
        """What belongs to a checkpoint, and to the model, as it is now."""
        history = Bound(sha256=(self._history_hash.hexdigest(),), first_bytes=self._history_bytes)
        return {**self._shared, **({HISTORY: history} if self._history_bytes else {})}

    def _write_shared(self, name: str, content: bytes) -> None:
        self._shared[name] = Bound(sha256=(sha256_of(content),))
        self._write_bound(name, content, [MANIFEST, *map(_manifest_name, self._epochs())])

    def _write_bound(self, name: str, content: bytes, manifests: Sequence[str]) -> None:
        """Writes a file such that it always fits the manifests that list it, wherever the process is killed."""
        new = sha256_of(content)
        for each in manifests:
            self._bind(each, name, new, keeps_old=True)
        write_atomically(self.path / name, content)
        for each in manifests:
            self._bind(each, name, new, keeps_old=False)

    def _bind(self, manifest_name: str, name: str, sha256: str, *, keeps_old: bool) -> None:
        """Has a manifest list a file. The model's manifest is made with the model; the others are there already."""
        manifest, _ = self._read_manifest(manifest_name)
        if manifest is None and name != MODEL:
            return
        files = {} if manifest is None else dict(manifest.files)
        if manifest_name == MANIFEST:
            files |= self._bound_now()
        old = manifest.files[name].sha256 if manifest is not None and keeps_old and name in manifest.files else ()
        files[name] = Bound(sha256=tuple(dict.fromkeys((sha256, *old))))
        if manifest is None or files != manifest.files:
            write_atomically(self.path / manifest_name, Manifest(files=files).to_bytes())

    def _read_manifest(self, name: str) -> tuple[Manifest | None, str]:
        """A manifest, or None and what is wrong with it."""
        try:
            return Manifest.from_bytes((self.path / name).read_bytes()), ""
        except FileNotFoundError:
            return None, MISSING
        except OSError as error:
            return None, f"cannot be read: {error.strerror or error}"
        except ValueError as error:
            return None, str(error)

    def _damaged(self, manifest_name: str) -> dict[str, str]:
        """What is wrong with the files of a manifest, or with the manifest itself, by name."""
        manifest, problem = self._read_manifest(manifest_name)
        if manifest is None:
            return {manifest_name: problem}
        found = {name: bound.problem(self.path / name) for name, bound in manifest.files.items()}
        return {name: problem for name, problem in found.items() if problem is not None}

    def _note_damaged(self, damaged: Mapping[str, str]) -> None:
        """Notes what is wrong with files; one that somebody has taken away is not worth a note."""
        self.notes += [f"{name} {problem}." for name, problem in damaged.items() if problem != MISSING]


_OWN_CHECKPOINT = re.compile(r"\.?checkpoint-\d+\.(safetensors|json)(\.partial)?|checkpoint\.safetensors")


def _checkpoint_name(epoch: int) -> str:
    return f"checkpoint-{epoch}.safetensors"


def _manifest_name(epoch: int) -> str:
    return f"checkpoint-{epoch}.json"


def _free_name(path: Path) -> Path:
    """The path itself, or with a number behind it where two runs start in one second."""
    number, free = 2, path
    while free.exists():
        free, number = path.with_name(f"{path.name}-{number}"), number + 1
    return free
