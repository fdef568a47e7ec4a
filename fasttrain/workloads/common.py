"""What the jobs share: real data, a seed, the order of an epoch."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from fasttrain.data.resident import epoch_order
from fasttrain.errors import DataError

__all__ = ["SEED", "data_dir", "data_file", "seeded", "whole_batches"]

SEED = 1337
"""Of every job's weights, made-up rows and order of rows."""


def data_dir() -> Path:
    """The folder of real data: `$FASTTRAIN_DATA`, by default `shared/data` beside the repository."""
    return Path(os.environ.get("FASTTRAIN_DATA") or Path(__file__).parents[3] / "shared" / "data")


def data_file(name: str) -> Path:
    """A file of real data.

    Raises:
        DataError: it is not there.
    """
    path = data_dir() / name
    if not path.is_file():
        raise DataError(f"no such file; set $FASTTRAIN_DATA to a folder that holds {name}", file=str(path))
    return path


@contextmanager
def seeded(seed: int) -> Generator[None]:
    """Draws from a seeded generator, and leaves the process's own as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def whole_batches(num_rows: int, batch_size: int, epoch: int) -> np.ndarray:
    """Row numbers in a job's order of an epoch, the short last batch left out: [rows used], int64."""
    return epoch_order(num_rows, SEED, epoch)[: num_rows - num_rows % batch_size]
