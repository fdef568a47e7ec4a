"""Trees of tensors and plain values in one safetensors file: no pickle is written or read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fasttrain.errors import RunError
from fasttrain.run.manifest import write_atomically

__all__ = ["copy_tree", "load_tree", "pack_tree", "save_tree"]

VERSION = 1
"""Of the file's layout; another version is refused."""

_WRONG_SHAPE = (KeyError, ValueError, TypeError, AttributeError, StopIteration)
"""What a tree of another shape raises while it is put together."""


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
    except (OSError, SafetensorError, RecursionError, *_WRONG_SHAPE) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def copy_tree(tree: Any) -> Any:
    """A copy of a tree that later changes of its tensors do not reach. Tensors stay on their device; nothing waits."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {key: copy_tree(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [copy_tree(value) for value in tree]
    return tree


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
