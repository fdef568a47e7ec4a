import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fasttrain.metrics import LossObserver, RunningMetrics, count_correct

CPU = torch.device("cpu")
losses = st.lists(st.tuples(st.floats(-1e3, 1e3, width=32), st.integers(1, 9)), min_size=1, max_size=50)


@given(losses)
def test_means_of_batches_and_of_samples(batches: list[tuple[float, int]]) -> None:
    of_batches, of_samples = RunningMetrics(CPU), RunningMetrics(CPU)
    for loss, samples in batches:
        of_batches.update(torch.tensor(loss))
        of_samples.update(torch.tensor(loss), weight=samples)
    total = sum(samples for _, samples in batches)
    assert of_batches.compute().loss == pytest.approx(sum(loss for loss, _ in batches) / len(batches), abs=1e-9)
    assert of_samples.compute().loss == pytest.approx(sum(loss * n for loss, n in batches) / total, abs=1e-9)


def test_reset_starts_anew() -> None:
    metrics = RunningMetrics(CPU)
    metrics.update(torch.tensor(3.0))
    metrics.read_late()
    metrics.reset()
    assert metrics.compute().loss is None
    assert metrics.read_late() is None


def test_the_late_readout_is_one_interval_old() -> None:
    metrics = RunningMetrics(CPU)
    metrics.update(torch.tensor(1.0))
    assert metrics.read_late() is None
    metrics.update(torch.tensor(2.0))
    first = metrics.read_late()
    assert first is not None
    assert first.loss == 1.0
    second = metrics.read_late()
    assert second is not None
    assert second.loss == 1.5


def test_a_million_small_batches_keep_their_digits() -> None:
    metrics = RunningMetrics(CPU)
    loss = torch.tensor(0.1)
    for _ in range(20_000):
        metrics.update(loss)
    assert metrics.compute().loss == pytest.approx(loss.item(), rel=1e-12)


@given(st.integers(2, 5), st.lists(st.integers(0, 4), min_size=1, max_size=20), st.integers(0, 1_000))
def test_argmax_accuracy(classes: int, labels: list[int], seed: int) -> None:
    targets = torch.tensor(labels) % classes
    predictions = torch.randn(len(labels), classes, generator=torch.Generator().manual_seed(seed))
    wanted = sum(int(row.argmax()) == int(label) for row, label in zip(predictions, targets, strict=True))
    assert count_correct("argmax", predictions, targets).item() == wanted


def test_argmax_over_the_second_dimension() -> None:
    predictions = torch.tensor([[[0.1, 0.9], [0.8, 0.2]]])  # [batch 1, classes 2, positions 2]
    assert count_correct("argmax", predictions, torch.tensor([[1, 0]])).item() == 2


def rule_of(loss: object, predictions: Tensor, targets: Tensor, scored: Tensor | None = None) -> str | None:
    with LossObserver() as observer:
        loss(predictions if scored is None else scored, targets)  # pyright: ignore
    return observer.rule(predictions, targets)


LOGITS = torch.tensor([0.5, -1.0, 2.0])
BINARY = torch.tensor([1.0, 0.0, 1.0])


@pytest.mark.parametrize(
    ("loss", "predictions", "targets", "rule"),
    [
        (nn.BCEWithLogitsLoss(), LOGITS, BINARY, "logit"),
        (F.binary_cross_entropy_with_logits, LOGITS[:, None], BINARY[:, None], "logit"),
        (nn.BCELoss(), LOGITS.sigmoid(), BINARY, "probability"),
        (nn.CrossEntropyLoss(), torch.randn(3, 4), torch.tensor([0, 3, 1]), "argmax"),
        (nn.CrossEntropyLoss(), torch.randn(2, 4, 5), torch.randint(0, 4, (2, 5)), "argmax"),
        (nn.CrossEntropyLoss(), torch.randn(3, 4), torch.tensor([0, -100, 1]), None),
        (nn.MSELoss(), LOGITS, BINARY, None),
        (nn.BCEWithLogitsLoss(), LOGITS, torch.tensor([0.9, 0.1, 0.5]), None),
        (nn.CrossEntropyLoss(), torch.randn(3, 4), torch.rand(3, 4), None),
        (nn.MSELoss(), torch.randn(3, 1), torch.randn(3, 1), None),
    ],
)
def test_the_rule_of_accuracy_follows_from_the_loss(
    loss: object, predictions: Tensor, targets: Tensor, rule: str | None
) -> None:
    assert rule_of(loss, predictions, targets) == rule


def test_predictions_that_the_loss_did_not_score_have_no_accuracy() -> None:
    """The forward pass hands probabilities out, the loss saw logits: a threshold would be a guess."""
    assert rule_of(nn.BCEWithLogitsLoss(), LOGITS.sigmoid(), BINARY, scored=LOGITS) is None


def test_one_output_with_class_indices_is_no_argmax() -> None:
    assert LossObserver().rule(torch.randn(3, 1), torch.tensor([0, 1, 1])) is None


def test_a_view_of_the_scored_logits_counts_as_them() -> None:
    logits = torch.randn(3, 1)
    with LossObserver() as observer:
        F.binary_cross_entropy_with_logits(logits.squeeze(1), BINARY)
    assert observer.rule(logits.squeeze(), BINARY) == "logit"


def test_metrics_of_a_users_own_loop_have_the_accuracy_that_is_asked_for() -> None:
    predictions, targets = torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1])
    metrics = RunningMetrics("cpu", accuracy="argmax")
    metrics.update(torch.tensor(0.5), predictions, targets)
    assert metrics.compute().accuracy == pytest.approx(50.0)
    assert RunningMetrics("cpu").compute().accuracy is None
