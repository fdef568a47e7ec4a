"""Trees of tensors and plain values in one safetensors file: no pickle is written or read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fasttrain.errors import RunError

__all__ = ["load_tree", "pack_tree", "save_tree", "write_atomically"]

VERSION = 1
"""Of the file's layout; another version is refused."""


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file such that a reader sees the old content or the new, never a part.

    Raises:
        RunError: it cannot be written (disk full, no permission).
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def save_tree(path: Path, tree: Any) -> None:
    """Writes a tree of dicts, lists, tuples, tensors, numbers, strings, bools and None.

    Tuples come back as lists. Waits for the device where tensors are there.

    Raises:
        RunError: the file cannot be written.
        TypeError: the tree holds something else.
    """
    write_atomically(path, pack_tree(tree))


def pack_tree(tree: Any) -> bytes:
    """The bytes of the file that `save_tree` writes."""
    tensors: dict[str, Tensor] = {}
    skeleton = _skeleton(tree, tensors)
    return save(tensors, metadata={"fasttrain_version": str(VERSION), "tree": json.dumps(skeleton)})


def load_tree(path: Path) -> Any:
    """The tree that `save_tree` wrote, its tensors on the CPU.

    Raises:
        RunError: the file is missing, damaged or of another version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("fasttrain_version") != str(VERSION):
                raise RunError(f"{path} is not a checkpoint of this version of fasttrain")
            return _tree(json.loads(metadata["tree"]), file)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def _skeleton(node: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree as JSON, each tensor replaced by its number; dicts as pairs, since their keys may be integers."""
    if isinstance(node, Tensor):
        name = str(len(tensors))
        tensors[name] = node.detach().cpu().contiguous().clone()  # HOST READ: checkpoints are written between epochs
        return {"tensor": name}
    if isinstance(node, dict):
        return {"pairs": [[key, _skeleton(value, tensors)] for key, value in node.items()]}
    if isinstance(node, list | tuple):
        return {"items": [_skeleton(value, tensors) for value in node]}
    if node is None or isinstance(node, bool | int | float | str):
        return {"value": node}
    raise TypeError(f"a checkpoint cannot hold a {type(node).__name__}")


def _tree(node: Any, file: Any) -> Any:
    kind, content = next(iter(node.items()))
    if kind == "tensor":
        return file.get_tensor(content)
    if kind == "pairs":
        return {key: _tree(value, file) for key, value in content}
    if kind == "items":
        return [_tree(value, file) for value in content]
    return content
