"""fp16's loss scaling as part of the graph: scale, unscale, skip, back off and grow, without asking the host."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fasttrain.step.eager import EagerEngine
from fasttrain.step.function import LossScaling
from fasttrain.step.spec import StepSpec
from fasttrain.step.torch_private import scaler_tensors
from fasttrain.step.trace import Mismatch, trace_step
from tests.step.agreement import both, run_graph, steps_agree
from tests.step.models import ASKED, OPTIMIZERS, Case, batches, mlp, numbers, started

ADAM = OPTIMIZERS["adam"]


def sometimes_no_number(predictions: Tensor, targets: Tensor) -> Tensor:
    """A loss that is finite; where its target is 0, its gradient is no number."""
    return predictions.square().mean() + (targets.clamp(max=1) + predictions * 0).sqrt().mean()


def one_of_six(generator: torch.Generator) -> Tensor:
    return torch.randint(0, 6, (1,), generator=generator)


CASE = Case(mlp, numbers(5, 4), one_of_six, sometimes_no_number)


def scaler(**options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", growth_interval=2, **options)


def scales(spec: StepSpec) -> list[float]:
    assert spec.scaler is not None
    found = scaler_tensors(spec.scaler)
    assert found is not None
    return [tensor.item() for tensor in found]


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize("optimizer", ["adam", "sgd-momentum", "radam"])
@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.05}, {"accumulate": 2}, {"accumulate": 3, "clip_value": 0.1}])
def test_the_graph_gives_eagers_numbers(optimizer: str, options: dict[str, Any]) -> None:
    """Some steps are skipped, others let the scale grow: the scales are compared after each."""
    seen: dict[int, list[list[float]]] = {}

    def look(spec: StepSpec) -> None:
        seen.setdefault(id(spec), []).append(scales(spec))

    wanted, found = scaler(), scaler()
    scalers = iter((found, wanted))
    changes = dict.fromkeys(range(20), look)
    steps_agree(CASE, OPTIMIZERS[optimizer], changes, make_scaler=lambda: next(scalers), **options)
    of_graph, of_eager = seen.values()
    assert of_graph == of_eager
    factors = {after[0] / before[0] for before, after in itertools.pairwise(of_eager)}
    assert factors == {0.5, 1.0, 2.0}, "nothing was skipped, or nothing grew"
    assert found.state_dict() == wanted.state_dict()


@example(skips=[False] * 4, exponent=127)
@given(skips=st.lists(st.booleans(), max_size=20), exponent=st.integers(min_value=-140, max_value=127))
@settings(deadline=None)
def test_the_scale_follows_the_scalers_own_rule(skips: list[bool], exponent: int) -> None:
    """Up to the largest scale that is finite, and down to none."""
    wanted, found = [(torch.tensor(2.0**exponent), torch.tensor(0, dtype=torch.int32)) for _ in range(2)]
    scaling = LossScaling(scaler(), *found)
    for is_skipped in skips:
        torch._amp_update_scale_(*wanted, torch.tensor(float(is_skipped)), 2.0, 0.5, 2)  # pyright: ignore
        scaling.update(torch.tensor(is_skipped))
        assert [tensor.item() for tensor in found] == [tensor.item() for tensor in wanted]


def test_under_autocast_the_first_steps_overflow_and_are_skipped() -> None:
    """In half precision both ways: the same operators, so nearly the same numbers."""
    case = Case(mlp, numbers(5, 4), numbers(5, 3), torch.nn.functional.mse_loss)
    scalers = [scaler(init_scale=2.0**15) for _ in range(2)]
    rest = iter(scalers)
    spec, eager_spec = both(case, ADAM, precision="fp16", make_scaler=lambda: next(rest))
    traced, eager = trace_step(spec, batches(case, 1)[0]), EagerEngine(eager_spec, ASKED)
    for each in scalers:
        each.update(2.0**24)
    before = spec.model.state_dict()["0.weight"].clone()
    for number, batch in enumerate(batches(case)):
        torch.testing.assert_close(run_graph(traced, batch), eager.step(batch), rtol=1e-3, atol=1e-4)
        assert scales(spec) == scales(eager_spec)
        if number == 0:
            assert torch.equal(spec.model.state_dict()["0.weight"], before), "the first step has overflowed"
    assert not torch.equal(spec.model.state_dict()["0.weight"], before)
    torch.testing.assert_close(spec.model.state_dict(), eager_spec.model.state_dict(), rtol=1e-2, atol=1e-3)


def test_a_loaded_or_set_scale_is_taken_up_and_another_rule_is_noticed() -> None:
    spec, batch = started(CASE, ADAM, make_scaler=scaler)
    traced = trace_step(spec, batch)
    assert spec.scaler is not None
    saved = spec.scaler.state_dict()
    spec.scaler.load_state_dict({**saved, "scale": 64.0})
    assert isinstance(traced.inputs(batch), list)
    spec.scaler.set_backoff_factor(0.25)
    mismatch = traced.inputs(batch)
    assert isinstance(mismatch, Mismatch)
    assert "scaler" in mismatch.reason
