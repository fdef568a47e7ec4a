"""The sum of columns equals the linear layer on the one-hot vector, in value and gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fasttrain.data.ragged import Ragged
from fasttrain.reference import TextbookClassifier
from fasttrain.workloads.onehot import ReviewClassifier, one_hot_linear, review_forward

NUM_FEATURES = 11
batches = st.lists(st.sets(st.integers(0, NUM_FEATURES - 1)), min_size=1, max_size=8)


def ragged(rows: list[set[int]]) -> Ragged:
    values = torch.tensor([value for row in rows for value in sorted(row)], dtype=torch.int32)
    return Ragged.of_lengths(values, torch.tensor([len(row) for row in rows]))


def one_hot(rows: list[set[int]]) -> Tensor:
    dense = torch.zeros(len(rows), NUM_FEATURES, dtype=torch.float64)
    for row, ids in zip(dense, rows, strict=True):
        row[sorted(ids)] = 1
    return dense


@given(batches, st.integers(1, 4), st.integers(0, 100))
def test_value_and_gradient_equal_the_linear_layer(rows: list[set[int]], num_outputs: int, seed: int) -> None:
    torch.manual_seed(seed)
    sparse = nn.Linear(NUM_FEATURES, num_outputs, dtype=torch.float64)
    dense = nn.Linear(NUM_FEATURES, num_outputs, dtype=torch.float64)
    dense.load_state_dict(sparse.state_dict())
    got, wanted = one_hot_linear(ragged(rows), sparse.weight, sparse.bias), dense(one_hot(rows))
    got = got.unsqueeze(1) if num_outputs == 1 else got
    torch.testing.assert_close(got, wanted)
    upstream = torch.randn_like(wanted)
    got.backward(upstream)
    wanted.backward(upstream)
    torch.testing.assert_close(sparse.weight.grad, dense.weight.grad)
    torch.testing.assert_close(sparse.bias.grad, dense.bias.grad)


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_weights_exchange_with_the_textbook(num_outputs: int) -> None:
    ours, textbook = ReviewClassifier(NUM_FEATURES, num_outputs), TextbookClassifier(NUM_FEATURES, num_outputs)
    assert list(ours.state_dict()) == ["fc1.weight", "fc1.bias"]
    ours.load_state_dict(textbook.state_dict())
    rows = [{1, 3}, set(), {0, 10}]
    torch.testing.assert_close(ours(ragged(rows)), textbook(one_hot(rows).float()))
    torch.testing.assert_close(ours(one_hot(rows).float()), textbook(one_hot(rows).float()))


@pytest.mark.parametrize(("num_outputs", "targets"), [(1, torch.tensor([1.0, 0.0])), (3, torch.tensor([2, 0]))])
def test_forward_gives_loss_logits_and_targets(num_outputs: int, targets: Tensor) -> None:
    model = ReviewClassifier(NUM_FEATURES, num_outputs)
    loss, logits, same = review_forward(model, {"x_data": ragged([{1}, {2, 3}]), "y_target": targets})
    assert loss.dim() == 0
    assert logits.shape == ((2,) if num_outputs == 1 else (2, 3))
    assert same is targets


def test_bf16_autocast_keeps_the_sum_in_the_weights_precision() -> None:
    model = ReviewClassifier(NUM_FEATURES, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(ragged([{1, 2}])).dtype == torch.float32
