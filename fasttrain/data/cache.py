"""Encoded reviews kept on disk by content, so that a second run starts at once.

An entry is one safetensors file: the arrays, and as metadata the vocabularies, the notes and a checksum.
Its name holds the sha256 of the table's file, the cutoff, the cleaning and the version of the format. An entry that
cannot be read is built again; a cache that cannot be used costs its advantage and nothing else. Both are
noted.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fasttrain.data.table import SPLITS, format_of, read_bytes, read_reviews
from fasttrain.data.text import (
    EncodedReviews,
    EncodedSplit,
    ReviewVectorizer,
    TokenRows,
    check_clean,
    check_cutoff,
    encode_reviews,
)
from fasttrain.data.tokens import CleanOrAuto
from fasttrain.errors import DataError

__all__ = ["default_cache_dir", "load_reviews"]

FORMAT_VERSION = 2
"""Part of an entry's name. Raise it when the format, or any rule of tokens and labels, changes."""

MAX_CACHE_BYTES = 2 << 30
"""Beyond this, the entries that were not used for longest are removed."""

_ENTRY_PATTERN = "[0-9a-f]" * 64 + "-*-v*.safetensors"
_PART_PREFIX = "fasttrain-part-"


def load_reviews(
    source: str | Path | pd.DataFrame,
    *,
    cutoff: int = 25,
    clean: CleanOrAuto = "none",
    cache_dir: Path | Literal["default"] | None = "default",
) -> EncodedReviews:
    """Read and encode a table of reviews, or take the result from the cache.

    Args:
        source: a `.csv`, `.csv.gz` or `.parquet` file, or a DataFrame, for which no cache is used.
        cutoff: as in `encode_reviews`.
        clean: as in `encode_reviews`.
        cache_dir: where the cache is; "default" for `default_cache_dir()`, None for no cache.

    Returns:
        What `encode_reviews(read_reviews(source), cutoff=cutoff, clean=clean)` returns; notes about the cache may be
        added.

    Raises:
        DataError: as in `read_reviews`.
        ConfigError: `cutoff` is no integer, or negative; `clean` is unknown.
    """
    check_cutoff(cutoff)
    check_clean(clean)
    folder = default_cache_dir() if cache_dir == "default" else cache_dir
    if isinstance(source, pd.DataFrame) or folder is None:
        return encode_reviews(read_reviews(source), cutoff=cutoff, clean=clean)
    path = Path(source)
    format_of(path)
    sha256 = hashlib.sha256(read_bytes(path)).hexdigest()
    notes: tuple[str, ...] = ()
    try:
        return replace(_load(_entry(folder, path, sha256, cutoff, clean)), sha256=sha256, source=str(source))
    except FileNotFoundError:
        pass
    except OSError as error:
        notes = (f"the cache in {folder} cannot be read: {error}",)
    except (SafetensorError, DataError, KeyError, TypeError, ValueError) as error:
        notes = (f"the cached copy of this table was damaged, and is built again: {error}",)
    reviews = encode_reviews(read_reviews(source), cutoff=cutoff, clean=clean)
    try:
        _store(reviews, _entry(folder, path, reviews.sha256, cutoff, clean))
    except (OSError, SafetensorError) as error:
        notes += (f"the encoded reviews could not be kept in {folder}: {error}",)
    return replace(reviews, notes=reviews.notes + notes)


def default_cache_dir() -> Path | None:
    """Return `$XDG_CACHE_HOME/fasttrain/text`, by default in `~/.cache`; None for a user without a home."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # the XDG specification has relative paths ignored
        try:
            base = Path.home() / ".cache"
        except RuntimeError:
            return None
    return base / "fasttrain" / "text"


def _entry(folder: Path, path: Path, sha256: str, cutoff: int, clean: str) -> Path:
    # With the format: the same bytes under another name may be no table at all.
    return folder / f"{sha256}-{cutoff}-{clean}-v{FORMAT_VERSION}{format_of(path)}.safetensors"


def _load(entry: Path) -> EncodedReviews:
    """Read an entry, without its `sha256` and `source`, and mark it as used now."""
    with safe_open(entry, framework="numpy") as file:
        metadata: dict[str, str] = file.metadata()
        arrays: dict[str, np.ndarray] = {name: file.get_tensor(name) for name in _array_names()}
    if int(metadata["checksum"]) != _checksum(arrays, metadata["contents"]):
        raise ValueError("wrong checksum")
    with suppress(OSError):  # a cache that may only be read still serves: the time steers nothing but removal
        os.utime(entry)
    contents = json.loads(metadata["contents"])
    return EncodedReviews(
        splits={name: _split_of(arrays, name) for name in SPLITS},
        vectorizer=ReviewVectorizer.from_dict(contents["vectorizer"]),
        clean_reason=contents["clean_reason"],
        sha256="",
        source="",
        notes=tuple(contents["notes"]),
    )


def _store(reviews: EncodedReviews, entry: Path) -> None:
    """Write an entry so that no other process ever sees a part of it."""
    arrays = {name: array for split in SPLITS for name, array in _arrays_of(reviews, split).items()}
    contents = json.dumps(
        {
            "vectorizer": reviews.vectorizer.to_dict(),
            "clean_reason": reviews.clean_reason,
            "notes": reviews.notes,
        }
    )
    metadata = {"contents": contents, "checksum": str(_checksum(arrays, contents))}
    _make_private(entry.parent)
    handle, name = tempfile.mkstemp(dir=entry.parent, prefix=_PART_PREFIX)
    os.close(handle)
    try:
        save_file(arrays, name, metadata=metadata)
        os.replace(name, entry)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _remove_oldest(entry.parent)


def _arrays_of(reviews: EncodedReviews, name: str) -> dict[str, np.ndarray]:
    split = reviews.splits[name]
    arrays = {"ids": split.tokens.ids, "offsets": split.tokens.offsets, "labels": split.labels}
    return {f"{name}.{key}": array for key, array in arrays.items()}


def _split_of(arrays: dict[str, np.ndarray], name: str) -> EncodedSplit:
    rows = TokenRows(ids=arrays[f"{name}.ids"], offsets=arrays[f"{name}.offsets"])
    return EncodedSplit(tokens=rows, labels=arrays[f"{name}.labels"])


def _array_names() -> list[str]:
    return [f"{name}.{key}" for name in SPLITS for key in ("ids", "offsets", "labels")]


def _checksum(arrays: dict[str, np.ndarray], contents: str) -> int:
    checksum = zlib.crc32(contents.encode())
    for name in _array_names():
        array: Any = np.ascontiguousarray(arrays[name])
        checksum = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), checksum)
        checksum = zlib.crc32(array.view(np.uint8), checksum)
    return checksum


def _make_private(folder: Path) -> None:
    """Make a folder and those above it that are missing, for this user alone."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)


def _remove_oldest(folder: Path) -> None:
    """Remove the least recently used entries until the rest fits into `MAX_CACHE_BYTES`.

    Parts that an interrupted process left go the same way. Files with other names are not ours, and stay.
    """
    ours = [*folder.glob(_ENTRY_PATTERN), *folder.glob(f"{_PART_PREFIX}*")]
    newest_first = sorted(((path.stat(), path) for path in ours), key=lambda file: -file[0].st_mtime)
    total = 0
    for status, path in newest_first:
        total += status.st_size
        if total > MAX_CACHE_BYTES:
            path.unlink(missing_ok=True)
