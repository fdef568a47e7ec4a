"""The examples of README.md run as they are printed; that of an arm is in `measure/bench/test_process.py`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fasttrain
from fasttrain.errors import DataError
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
    sources = [line.split()[3] for line in lines]
    assert sources == ["streamed", "resident", "resident"]
    assert all(line.endswith(" eager") for line in lines)  # too short to be compiled


def test_the_examples_of_a_forward_pass_and_of_resident_data_train() -> None:
    dataset = TextbookDataset.from_dataframe(generate_reviews(300).table)
    loader = dataset.batches(32, shuffle=True, drop_last=True)
    names: dict[str, Any] = {
        "fasttrain": fasttrain,
        "classifier": TextbookClassifier(dataset.num_features, 1),
        "loss_func": nn.BCEWithLogitsLoss(),
        "loader": loader,
        "val_loader": loader,
    }
    names["optimizer"] = torch.optim.Adam(names["classifier"].parameters())
    exec(examples()[1], names)
    assert names["val"].loss < names["train"].loss
    assert names["val"].accuracy is not None
    rows, model = torch.randn(256, 8), nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loop = fasttrain.FastLoop(model, optimizer, loss=nn.functional.mse_loss)
    names |= {"x": rows, "y": rows[:, :1], "loop": loop}
    exec(examples()[3], names)
    assert (names["result"].source, names["result"].batches) == ("resident", 2)


class RandomlyFlipped(Dataset[tuple[Tensor, int]]):
    """What the example of `then=` does, in a dataset."""

    def __init__(self, augment: Any) -> None:
        self._images, self._augment = torch.randn(256, 3, 8), augment

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Any:
        row = self._images[index], index
        return row if self._augment is None else self._augment(row)


def test_the_example_of_an_augmentation_gives_the_batches_of_a_dataset_that_augments() -> None:
    names: dict[str, Any] = {"fasttrain": fasttrain, "torch": torch, "DataLoader": DataLoader}
    torch.manual_seed(1)
    names["images"] = RandomlyFlipped(None)
    exec(examples()[2], names)
    torch.manual_seed(1)
    images = RandomlyFlipped(names["augment"])
    plain = DataLoader(images, batch_size=64, shuffle=True)
    found: list[list[list[Tensor]]] = []
    for loader in (names["loader"], plain):
        torch.manual_seed(2)
        found.append([batch for _ in range(3) for batch in loader])
    assert len(found[0]) == len(found[1]) == 12
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    with pytest.raises(DataError, match="draws from torch's default generator, so that recorded rows would not be the"):
        next(iter(fasttrain.record(plain)))
