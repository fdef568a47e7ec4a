"""Compiled programs are as exact as eager. Four here, made at one time; the table of all is in benchmarks/README.md."""

from __future__ import annotations

from contextlib import ExitStack, closing
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.errors import BOUND
from fasttrain.errors import EngineError
from fasttrain.step.trace import TracedStep, trace_step
from tests.step import errors
from tests.step.errors import begin, compare, described, measure, started
from tests.step.models import CASES, batches

COVERING = [
    ("adamw", "transformer"),
    ("rmsprop-centered", "lstm"),
    ("sgd-momentum", "channels-last"),
    ("nadam", "sparse"),
]


def test_a_programs_error_is_at_most_twice_eagers() -> None:
    with ExitStack() as running:
        pending = {names: running.enter_context(closing(begin(*names))) for names in COVERING}
        for each in pending.values():
            each.wait()
        ratios = {names: compare(*names, each).ratio for names, each in pending.items()}
    assert all(ratio is not None and max(ratio) <= BOUND for ratio in ratios.values()), ratios


class Recorded:
    """A program that runs the recorded graph, and puts the parameters off by a factor."""

    def __init__(self, traced: TracedStep, factor: float) -> None:
        self._traced = traced
        self._factor = factor

    @torch.no_grad()
    def run(self, inputs: list[Tensor]) -> Tensor:
        loss = self._traced.run(inputs)
        for parameter in self._traced.spec.model.parameters():
            parameter.mul_(self._factor)
        return loss


def recorded(optimizer: str, model: str, factor: float) -> Any:
    [batch] = batches(CASES[model], 1)
    traced = trace_step(started(CASES[model], optimizer, 0, batch), batch)
    return SimpleNamespace(traced=traced, load=lambda: Recorded(traced, factor))


def test_what_runs_as_eager_does_is_as_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "NUM_SEEDS", 2)
    pair = compare("adam", "dropout", recorded("adam", "dropout", 1.0))
    assert pair.eager is not None
    assert pair.compiled is not None
    assert pair.compiled == pair.eager
    assert len(pair.eager.parameters) == 2
    assert max(pair.eager.parameters + pair.eager.losses) < 1e-5
    assert set(pair.eager.farthest) <= {"0.weight", "0.bias", "3.weight", "3.bias"}


def test_what_is_off_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "NUM_SEEDS", 2)
    pair = compare("sgd", "mlp", recorded("sgd", "mlp", 1 - 1e-6))
    assert pair.ratio is not None
    assert min(pair.ratio) > BOUND
    assert pair.compiled is not None
    assert max(pair.compiled.parameters) == pytest.approx(2e-5, rel=0.5)  # twenty times a millionth


def test_what_cannot_be_traced_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise EngineError("no such luck")

    monkeypatch.setattr(errors, "begin", fails)
    pair = measure("sgd", "mlp")
    assert (pair.refused, pair.ratio) == ("no such luck", None)


def test_an_optimizer_is_described_as_one_writes_it() -> None:
    assert described("adamw") == "AdamW(lr=0.01, maximize=True)"
