"""JSON as fasttrain writes it for a reader."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["json_text"]


def json_text(content: Any) -> str:
    """Readable, diffable JSON. Non-finite numbers become null: JSON has none."""
    return json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(node: Any) -> Any:
    if isinstance(node, float):
        return node if node - node == 0 else None
    if isinstance(node, Mapping):
        return {key: _finite(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_finite(value) for value in node]
    return node
