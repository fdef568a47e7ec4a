"""The examples of README.md run as they are printed; that of an arm is in `measure/bench/test_process.py`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fasttrain.reference import TextbookClassifier, TextbookDataset
from fasttrain.workloads.generate import generate_reviews

README = Path(__file__).parents[1] / "README.md"


def examples() -> list[str]:
    """Python, in order."""
    return re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def test_the_first_example_is_a_whole_program(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    exec(examples()[0], {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    losses = [float(line.split()[0]) for line in lines]
    assert losses[2] < losses[0] == pytest.approx(2.3, abs=0.1)  # the logarithm of ten classes
    assert all(line.endswith(" eager") for line in lines)  # too short to be compiled


def test_the_second_example_trains_the_books_classifier() -> None:
    dataset = TextbookDataset.from_dataframe(generate_reviews(300).table)
    loader = dataset.batches(32, shuffle=True, drop_last=True)
    names: dict[str, Any] = {
        "classifier": TextbookClassifier(dataset.num_features, 1),
        "loss_func": nn.BCEWithLogitsLoss(),
        "loader": loader,
        "val_loader": loader,
    }
    names["optimizer"] = torch.optim.Adam(names["classifier"].parameters())
    exec(examples()[0].splitlines()[3], names)
    exec(examples()[1], names)
    assert names["val"].loss < names["train"].loss
    assert names["val"].accuracy is not None
