"""The folder that a run leaves: made at its start, filled as it goes, taken away if it fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fasttrain.errors import RunError
from fasttrain.history import History
from fasttrain.json_text import json_text
from fasttrain.run.checkpoint import load_tree, save_tree, write_atomically

__all__ = ["RunFolder"]


class RunFolder:
    """The files of one run.

    As a context it takes a folder that it made away again when an error passes through it.

    Attributes:
        path: where the files are.
    """

    def __init__(self, path: Path, *, made: Sequence[Path] = ()) -> None:
        self.path = path
        self._made = made

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
        if not (path / "config.json").is_file():
            raise RunError(f"{path} is not the folder of a run: it has no config.json")
        return cls(path)

    def __enter__(self) -> RunFolder:
        """Nothing to do: the folder is there."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Takes the folders that this run made away, if an error ended it; an impatient Ctrl-C leaves a checkpoint."""
        is_resumable = isinstance(error, KeyboardInterrupt) and (self.path / "checkpoint.safetensors").exists()
        if error is None or not self._made or is_resumable:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        self._remove_parents()

    def _remove_parents(self) -> None:
        for parent in self._made[1:]:
            with suppress(OSError):  # it was not made, or somebody else's files are in it: it stays
                parent.rmdir()

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a JSON file, readable and diffable. Non-finite numbers become null: JSON has none."""
        self.write_text(name, json_text(content) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """Reads a JSON file of the run.

        Raises:
            RunError: it is missing or damaged.
        """
        try:
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path / name} cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise RunError(f"{self.path / name} is damaged: it must hold one object")
        return content

    def write_text(self, name: str, content: str) -> None:
        """Writes a text file."""
        write_atomically(self.path / name, content.encode())

    def write_history(self, history: History) -> None:
        """Writes history.csv."""
        self.write_text("history.csv", history.to_frame().to_csv(index=False))

    def write_model(self, state: Mapping[str, Tensor]) -> None:
        """Writes model.safetensors: the state_dict of the model."""
        # Copies, since tied weights share memory, which safetensors refuses.
        contiguous = {
            name: value.detach().cpu().contiguous().clone() for name, value in state.items()
        }  # HOST READ: once, at the end
        write_atomically(self.path / "model.safetensors", save(contiguous))

    def read_model(self) -> dict[str, Tensor]:
        """The state_dict of the model, on the CPU.

        Raises:
            RunError: it is missing or damaged.
        """
        path = self.path / "model.safetensors"
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{path} cannot be read: {error}") from error

    def write_checkpoint(self, tree: Any) -> None:
        """Writes checkpoint.safetensors: what `--resume` goes on from."""
        save_tree(self.path / "checkpoint.safetensors", tree)

    def read_checkpoint(self) -> Any:
        """What `write_checkpoint` wrote.

        Raises:
            RunError: it is missing or damaged.
        """
        return load_tree(self.path / "checkpoint.safetensors")


def _free_name(path: Path) -> Path:
    """The path itself, or with a number behind it where two runs start in one second."""
    number, free = 2, path
    while free.exists():
        free, number = path.with_name(f"{path.name}-{number}"), number + 1
    return free
