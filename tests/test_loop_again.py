"""A loop that is used again: after an epoch that failed, for a second fit, with a generator that is used up."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from fasttrain import DataError, FastLoop, Interrupted
from tests.test_loop import classification, regression, sgd


@pytest.mark.parametrize("accumulate", [1, 4])
def test_an_epoch_that_fails_leaves_nothing_for_the_next(accumulate: int) -> None:
    _, data = regression()
    model: nn.Module = nn.Linear(data.tensors[0].shape[1], 1)  # without dropout, so that the epochs are equal
    fresh = copy.deepcopy(model)
    optimizer = sgd(model)
    loop = FastLoop(model, optimizer, loss=nn.MSELoss(), accumulate=accumulate)
    step, failing = optimizer.step, [True]

    def fail_once(*given: object) -> None:
        if failing:
            failing.pop()
            raise KeyboardInterrupt
        step(*given)  # pyright: ignore

    optimizer.step = fail_once  # pyright: ignore
    with pytest.raises(KeyboardInterrupt):
        loop.train(DataLoader(data, batch_size=5))

    def interrupt(batches: int, *_: object) -> None:
        if batches == 2:
            raise Interrupted

    if accumulate > 1:
        with pytest.raises(Interrupted):
            loop.train(DataLoader(data, batch_size=5), watch=interrupt)
    loop.train(DataLoader(data, batch_size=5))
    FastLoop(fresh, sgd(fresh), loss=nn.MSELoss(), accumulate=accumulate).train(DataLoader(data, batch_size=5))
    torch.testing.assert_close(model.state_dict(), fresh.state_dict())


def test_an_error_in_the_first_forward_does_not_cost_the_accuracy() -> None:
    model, data = classification()
    loop = FastLoop(model, sgd(model), loss=nn.CrossEntropyLoss())
    for run in (loop.train, loop.evaluate):
        with pytest.raises(RuntimeError):
            run([(torch.ones(5, 99), torch.zeros(5, dtype=torch.int64))])
        assert run(DataLoader(data, batch_size=5)).accuracy is not None


def test_fit_keeps_the_best_weights_of_a_model_with_extra_state() -> None:
    class Noted(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"notes": ["any"]}

        def set_extra_state(self, state: Any) -> None:
            assert state == {"notes": ["any"]}

    model, (_, data) = Noted(4, 1), regression()
    data = [(torch.ones(5, 4), torch.zeros(5, 1))]
    history = FastLoop(model, sgd(model), loss=nn.MSELoss()).fit(data, data, epochs=2, progress=False)
    assert history.best_epoch == 2


def test_a_second_fit_of_a_loop_expects_steps_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = regression()
    loop = FastLoop(model, sgd(model), loss=nn.MSELoss())
    expected: list[int] = []
    monkeypatch.setattr(loop.step, "expect", expected.append)
    batches = [(x, y) for x, y in DataLoader(data, batch_size=25)]
    loop.fit((each for each in batches), epochs=1, progress=False)  # pyright: ignore
    loop.fit(Endless(batches), epochs=3, progress=False)
    assert expected == [0, 3 * len(batches), 2 * len(batches), len(batches)]


class Endless:
    """Batches without a length, anew in each pass."""

    def __init__(self, batches: list[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


def test_a_generator_that_is_used_up_is_told() -> None:
    model, data = regression()
    loop = FastLoop(model, sgd(model), loss=nn.MSELoss())
    batches = (batch for batch in DataLoader(data, batch_size=25))
    loop.train(batches)
    with pytest.raises(DataError, match="A generator gives its batches once"):
        loop.train(batches)
