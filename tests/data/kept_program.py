"""A program that records loaders with `keep`; the tests of kept records run it in processes of their own.

`python -m tests.data.kept_program FOLDER [count]` writes, as JSON, what each run saw, as one digest, and how often it
read a row in the first epoch.
"""

from __future__ import annotations

import array
import collections
import datetime
import decimal
import enum
import functools
import hashlib
import io
import json
import random
import re
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader

import fasttrain
from fasttrain import FastLoop
from fasttrain.data.kept import key_of
from tests.data.record_loaders import Case, OneHot, reads_by_epoch, run, seed_all

CASES = [
    *[Case(name) for name in ("dict of numpy", "pairs", "strings", "payloads", "one-hot", "halves", "numpy scalars")],
    *[Case(name) for name in ("python numbers", "complex", "narrow ints", "zero or -0.0", "split", "getitems", "0-d")],
    Case("subset of getitems", "shuffle generator", options={"drop_last": True}),
    Case("tensors", "draws torch", "as list", own=False),
    Case("dict of numpy", "subset random"),
    Case("images", "weighted", options={"num_workers": 1}),
    Case("masks", recorded={"workers": 2}),
]
"""Datasets of each kind of column, container and order."""


def digest(events: Any) -> str:
    return hashlib.sha256(repr(events).encode()).hexdigest()


def program(folder: Path, *, counts: bool) -> list[dict[str, Any]]:
    """What each case comes to."""
    found: list[dict[str, Any]] = []
    for number, case in enumerate(CASES):
        record = functools.partial(fasttrain.record, keep=folder / str(number))
        trace = run(case, record, epochs=3)
        reads = reads_by_epoch(case, record, epochs=1) if counts and not case.options.get("num_workers") else []
        found.append({"case": case.name, "events": digest(trace.events), "reads": reads, "refused": trace.refused})
    return found


def trained(loader: Any) -> dict[str, Any]:
    """Epochs of a loop over a loader, eagerly: losses, and where batches came from."""
    torch.manual_seed(1)
    model = nn.Linear(40, 2)
    loop = FastLoop(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda model, batch: nn.functional.cross_entropy(model(batch["x"]), batch["y"]),
        engine="eager",
    )
    results = [loop.train(loader) for _ in range(3)]
    return {"losses": [each.loss.hex() for each in results], "sources": [each.source for each in results]}


def one_hot() -> DataLoader[Any]:
    seed_all()
    return DataLoader(Rows(), batch_size=4, shuffle=True)


class Rows(OneHot):
    def __getitem__(self, i: int) -> Any:
        row = torch.zeros(40)
        row[i], row[2 * i] = 1, 1
        return {"x": row, "y": i % 2}


class Color(enum.Enum):
    RED = 1
    BLUE = "b"


@dataclass(frozen=True, slots=True)
class Frozen:
    a: int = 1
    b: list[Any] = field(default_factory=lambda: [{"x", "y"}])


class Row(NamedTuple):
    a: int
    b: str = "x"


class Listed(list[Any]):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.more = {("a", 1): object}


@functools.lru_cache
def cached(x: int) -> int:
    return x + 1


def outer(n: int) -> Callable[[int], int]:
    @functools.wraps(cached)
    def inner(x: int) -> int:
        return cached(x) + n

    return inner


def held_values() -> list[Any]:
    """What the state of a dataset may hold, each made anew."""
    torch.manual_seed(0)
    counted = collections.Counter("abcab"), collections.deque([1, [2]], maxlen=3), collections.defaultdict(list, a=[1])
    times = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC), datetime.timedelta(1), np.datetime64("2020-01-01")
    tables = [
        pd.Series([1, None, 3], name="s", dtype="Int64"),
        pd.MultiIndex.from_tuples([("a", 1), ("b", 2)]),
        pd.DataFrame({"a": [1, 2], "o": [{"x": 1}, [2]], "t": pd.to_datetime(["2020", "2021"]), "s": ["x", None]}),
    ]
    arrays = [
        np.ma.masked_array([1, 2], mask=[False, True]),
        np.zeros(2, dtype=[("a", "i4"), ("b", "f8")]),
        np.array([{"a": 1}, None], dtype=object),
        array.array("d", [1, 2]),
    ]
    generators = [
        np.random.default_rng(3),
        np.random.RandomState(1),
        random.Random(1),
        torch.Generator().manual_seed(1),
    ]
    code = [cached, outer(3), lambda x: re.sub("a", "b", x), functools.partial(outer, n=1), np.add, torch.relu, len]
    return [
        *[*counted, *times, *tables, *arrays, *generators, *code, Color.BLUE, Frozen(), Row(1), Listed([1, [2]])],
        *[decimal.Decimal("1.5"), re.compile("a+b"), Path("x/y"), io.BytesIO(b"abc"), threading.RLock()],
        *[types.MappingProxyType({"a": {1}}), types.SimpleNamespace(a=1), ValueError("x"), {("a", 1), ("b", (2, "c"))}],
        *[nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.Parameter(torch.ones(2)), torch.ones(2).bfloat16()],
        *["abc".upper, frozenset([("a", 1), ("b", 2)]), list[int], int | None, slice(1, 2), Frozen, Color],
    ]


def main() -> None:
    torch.set_num_threads(1)  # as in the tests
    folder = Path(sys.argv[1])
    found = program(folder, counts="count" in sys.argv)
    loop = trained(fasttrain.record(one_hot(), keep=folder / "loop"))
    keys = [key_of({"value": each, "again": [each]}) for each in held_values()]
    sys.stdout.write(json.dumps({"cases": found, "loop": loop, "keys": keys}))


if __name__ == "__main__":
    main()
