"""A program that records loaders with `keep`; the tests of kept records run it in processes of their own.

`python -m tests.data.kept_program FOLDER [count]` writes, as JSON, what each run saw, as one digest, and how often it
read a row in each epoch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import fasttrain
from fasttrain import FastLoop
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
        reads = reads_by_epoch(case, record, epochs=2) if counts and not case.options.get("num_workers") else []
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


def main() -> None:
    torch.set_num_threads(1)  # as in the tests
    folder = Path(sys.argv[1])
    found = program(folder, counts="count" in sys.argv)
    loop = trained(fasttrain.record(one_hot(), keep=folder / "loop"))
    sys.stdout.write(json.dumps({"cases": found, "loop": loop}))


if __name__ == "__main__":
    main()
