from dataclasses import dataclass

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from fasttrain.data.batch import num_samples
from fasttrain.data.ragged import Ragged
from fasttrain.errors import DataError


@dataclass
class Pair:
    name: str
    x: torch.Tensor


ROWS = torch.zeros(5, 2)


@pytest.mark.parametrize(
    "batch",
    [
        ROWS,
        (ROWS, torch.zeros(7)),
        [ROWS],
        {"x": ROWS},
        Pair("a", ROWS),
        {"id": "text", "nested": (None, {"x": ROWS})},
        {"x": Ragged(torch.zeros(99), torch.arange(6))},
        (pack_sequence([torch.zeros(length, 2) for length in (4, 3, 3, 2, 1)]), torch.zeros(7)),
    ],
)
def test_samples_are_rows_of_the_first_tensor(batch: object) -> None:
    assert num_samples(batch) == 5


def test_a_scalar_is_one_sample() -> None:
    assert num_samples(torch.tensor(1.0)) == 1


def test_a_batch_without_tensors_is_an_error() -> None:
    with pytest.raises(DataError, match="dict without any"):
        num_samples({"x": [1, 2]})
