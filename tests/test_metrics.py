from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fasttrain.errors import ConfigError
from fasttrain.metrics import LossObserver, RunningMetrics, Scoring, count_correct, scoring_of

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


LOGITS = torch.tensor([0.5, -1.0, 2.0])
BINARY = torch.tensor([1.0, 0.0, 1.0])
SOFT = torch.tensor([0.9, 0.1, 0.5])
LABELS = torch.tensor([0, 3, 1])
SEQUENCES, WORDS = torch.randn(2, 4, 5), torch.randint(0, 4, (2, 5))
ARGMAX = Scoring("argmax", skips_negative=True)


def scorings(loss: Any, predictions: Tensor, targets: Tensor, scored: Any = None) -> tuple[Scoring | None, ...]:
    """As training finds it (by autograd's graph) and as evaluation does (by the calls)."""
    given = predictions.clone().requires_grad_() * 1.0
    value = loss(given if scored is None else scored(given), targets)
    with LossObserver() as observer, torch.no_grad():
        again = predictions * 1.0
        loss(again if scored is None else scored(again), targets)
    return scoring_of(value, given, targets), observer.scoring(again, targets)


def weighted(predictions: Tensor, targets: Tensor) -> Tensor:
    return 0.3 * F.cross_entropy(predictions, targets, label_smoothing=0.1, ignore_index=1) + predictions.mean() / 2


def focal(predictions: Tensor, targets: Tensor) -> Tensor:
    each = F.cross_entropy(predictions, targets, reduction="none")
    return ((1 - (-each).exp()) ** 2 * each).mean()


def gathered(predictions: Tensor, targets: Tensor) -> Tensor:
    return -predictions.log_softmax(1).gather(1, targets[:, None]).mean()


def of_two(predictions: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(predictions, targets, ignore_index=0) + F.cross_entropy(predictions, targets)


@pytest.mark.parametrize(
    ("loss", "predictions", "targets", "scoring"),
    [
        (nn.BCEWithLogitsLoss(), LOGITS, BINARY, Scoring("logit")),
        (F.binary_cross_entropy_with_logits, LOGITS[:, None], BINARY[:, None], Scoring("logit")),
        (nn.BCEWithLogitsLoss(), LOGITS, SOFT, Scoring("logit")),  # that they are soft shows on the device
        (nn.BCELoss(), LOGITS.sigmoid(), BINARY, Scoring("probability")),
        (lambda p, t: F.binary_cross_entropy_with_logits(p.double(), t.double()) * 2, LOGITS, BINARY, Scoring("logit")),
        (nn.CrossEntropyLoss(), torch.randn(3, 4), LABELS, ARGMAX),
        (nn.CrossEntropyLoss(), SEQUENCES, WORDS, ARGMAX),
        (lambda p, t: F.nll_loss(p.log_softmax(1), t), SEQUENCES, WORDS, ARGMAX),
        (lambda p, t: F.cross_entropy(p.transpose(1, 2).reshape(-1, 4), t.view(-1)), SEQUENCES, WORDS, ARGMAX),
        (nn.CrossEntropyLoss(), torch.randn(3, 4), torch.tensor([0, -100, 1]), ARGMAX),
        (nn.CrossEntropyLoss(ignore_index=0), torch.randn(3, 4), LABELS, ARGMAX._replace(ignored=0)),
        (weighted, torch.randn(3, 4), LABELS, ARGMAX._replace(ignored=1)),
        (focal, torch.randn(3, 4), LABELS, ARGMAX),
        (gathered, torch.randn(3, 4), LABELS, Scoring("argmax")),
        (of_two, torch.randn(3, 4), LABELS, None),
        (nn.MSELoss(), LOGITS, BINARY, None),
        (nn.CrossEntropyLoss(), torch.randn(3, 4), torch.rand(3, 4), None),
        (nn.MSELoss(), torch.randn(3, 1), torch.randn(3, 1), None),
        (lambda p, t: (p.squeeze(1) - t).square().mean(), torch.randn(3, 1), LABELS, None),
    ],
)
def test_how_a_batch_is_scored_follows_from_its_loss(
    loss: object, predictions: Tensor, targets: Tensor, scoring: Scoring | None
) -> None:
    assert scorings(loss, predictions, targets) == (scoring, scoring)


def test_predictions_that_the_loss_did_not_score_have_no_accuracy() -> None:
    """The forward pass hands probabilities out, the loss saw logits: a threshold would be a guess."""
    logits = LOGITS.clone().requires_grad_()
    loss = F.binary_cross_entropy_with_logits(logits, BINARY)
    assert scoring_of(loss, logits.sigmoid(), BINARY) is None
    assert scorings(nn.BCEWithLogitsLoss(), LOGITS.sigmoid(), BINARY, scored=torch.logit) == (None, None)


@pytest.mark.parametrize("is_detached", [False, True])
def test_a_view_of_the_scored_logits_counts_as_them(is_detached: bool) -> None:
    logits = torch.randn(3, 1, requires_grad=True) * 1.0
    loss = F.binary_cross_entropy_with_logits(logits.squeeze(1), BINARY)
    given = logits.squeeze()
    assert scoring_of(loss, given.detach() if is_detached else given, BINARY) == Scoring("logit")


def accuracy(batches: list[tuple[Tensor, Tensor]], scoring: Scoring | None, **options: Any) -> float | None:
    metrics = RunningMetrics("cpu", **options)
    for predictions, targets in batches:
        metrics.update(torch.tensor(1.0), predictions, targets, scoring=scoring, weight=max(1, len(targets)))
    return metrics.compute().accuracy


PADDED = [
    (torch.eye(4), torch.tensor([0, 1, 2, 0])),
    (torch.eye(4), torch.tensor([0, 0, 3, 1])),
    (torch.eye(4), torch.tensor([0, -100, 0, -100])),
]


def test_ignored_positions_count_neither_as_right_nor_as_wrong() -> None:
    assert accuracy(PADDED, ARGMAX, pools_accuracy=True) == pytest.approx(100 * 5 / 10)
    assert accuracy(PADDED, ARGMAX) == pytest.approx(100 * (3 / 4 + 1 / 4 + 1 / 2) / 3)
    without_zeros = ARGMAX._replace(ignored=0)
    assert accuracy(PADDED, without_zeros, pools_accuracy=True) == pytest.approx(100 * 2 / 4)
    assert accuracy(PADDED, without_zeros) == pytest.approx(100 * (2 / 2 + 0 / 2) / 2)  # the third has no position
    assert accuracy(PADDED[2:], without_zeros) is None


def test_one_batch_without_an_accuracy_leaves_the_epoch_without_one() -> None:
    hard, soft = (LOGITS, BINARY), (LOGITS, SOFT)
    assert accuracy([hard, hard], Scoring("logit")) == 100.0
    assert accuracy([hard, soft, hard], Scoring("logit")) is None
    assert accuracy([hard, (LOGITS, torch.tensor([1, -1, 1]))], Scoring("logit")) is None
    assert accuracy([(LOGITS, torch.tensor([1, 0, 1])), (LOGITS, BINARY > 0)], Scoring("logit")) == 100.0
    assert accuracy(PADDED[:2], Scoring("argmax")) == 50.0
    assert accuracy(PADDED, Scoring("argmax")) is None, "the loss is not known to ignore negative indices"
    metrics = RunningMetrics("cpu")
    metrics.update(torch.tensor(1.0), *hard, scoring=Scoring("logit"))
    metrics.update(torch.tensor(1.0), LOGITS, torch.randn(3))
    assert metrics.compute().accuracy is None


def test_an_empty_batch_has_no_say() -> None:
    empty = (torch.randn(0, 4), torch.zeros(0, dtype=torch.int64))
    assert accuracy([empty, *PADDED[:1], empty], ARGMAX) == 75.0
    metrics = RunningMetrics("cpu")
    metrics.update(torch.tensor(2.0), weight=3)
    metrics.update(torch.tensor(float("nan")), weight=0)
    assert metrics.compute().loss == 2.0


def test_metrics_of_a_users_own_loop_have_the_accuracy_that_is_asked_for() -> None:
    predictions, targets = torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1])
    metrics = RunningMetrics("cpu", accuracy="argmax")
    metrics.update(torch.tensor(0.5), predictions, targets)
    assert metrics.compute().accuracy == pytest.approx(50.0)
    assert RunningMetrics("cpu").compute().accuracy is None


@pytest.mark.parametrize("value", [torch.tensor([0.5]), torch.tensor([[0.5]]), np.float32(0.5), 0.5])
def test_a_metric_may_return_any_number(value: Any) -> None:
    metrics = RunningMetrics("cpu", metrics={"half": lambda *_: value})
    metrics.update(torch.tensor(1.0))
    assert metrics.compute().metrics == {"half": 0.5}


@pytest.mark.parametrize(("value", "found"), [(torch.ones(2, 3), r"shape \[2, 3\]"), ("high", "a str")])
def test_a_metric_that_returns_no_number_is_named(value: Any, found: str) -> None:
    metrics = RunningMetrics("cpu", metrics={"mine": lambda *_: value})
    with pytest.raises(ConfigError, match=rf"metrics\['mine'\] must return .* it returned .*{found}"):
        metrics.update(torch.tensor(1.0))
