"""Refusals of forward passes that users often write: each names the line and what to write instead."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from fasttrain import TrainStep
from fasttrain.errors import EngineError
from tests.step.test_capture import Batch, Job, captured_graphs, mean_square, pairs, sgd

pytestmark = pytest.mark.usefixtures("in_double", captured_graphs.__name__)


def test_a_checkpointed_part_that_draws_random_numbers_is_refused_with_its_line() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 1))
    inner = Job(model, lambda model, batch: checkpoint(model, batch[0], use_reentrant=False).mean(), lambda: None)
    step = TrainStep(model, sgd(model), inner.forward, engine="compiled")
    first, second = pairs(2)
    step(first)
    message = r"checkpoint recomputes .* cannot be recorded: 'inner = Job.*checkpoint\(.* in test_capture_advice"
    with pytest.raises(EngineError, match=message):
        step(second)


def test_a_hook_of_torchs_own_that_changes_the_model_is_named() -> None:
    model = prune.l1_unstructured(nn.Linear(4, 1), "weight", amount=0.5)
    step = TrainStep(model, sgd(model), mean_square, engine="compiled")
    first, second = pairs(2)
    step(first)
    with pytest.raises(EngineError, match=r"changes Python objects.* by torch/nn/utils/prune\.py:\d+"):
        step(second)


class Doubling(float):
    def __rmul__(self, other: Any) -> Any:
        return 2 * float(self) * other


def test_a_number_whose_class_has_operators_of_its_own_is_refused() -> None:
    scale = Doubling(1.0)
    model = nn.Linear(4, 1)
    step = TrainStep(model, sgd(model), lambda model, batch: mean_square(model, batch)[0] * scale, engine="compiled")
    first, second = pairs(2)
    step(first)
    with pytest.raises(EngineError, match=r"a Doubling, a subclass of float .*'.*\* scale.* in test_capture_advice"):
        step(second)


def negative_log_likelihood(model: nn.Module, batch: Batch, **options: Any) -> Tensor:
    inputs, targets = batch
    return -torch.distributions.Normal(model(inputs), 1.0, **options).log_prob(targets).mean()


def test_a_distribution_that_checks_its_arguments_is_refused_with_what_to_write() -> None:
    model = nn.Linear(4, 1)
    first, second = pairs(2)
    checked, unchecked = [functools.partial(negative_log_likelihood, validate_args=is_on) for is_on in (True, False)]
    step = TrainStep(model, sgd(model), checked, engine="compiled")
    step(first)
    with pytest.raises(EngineError, match="validate_args=False"):
        step(second)
    step = TrainStep(model, sgd(model), unchecked, engine="compiled")
    step(first)
    step(second)
    assert step.engine.value == "compiled"
