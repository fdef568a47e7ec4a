"""Public training loops by every engine against plain PyTorch; captured graphs run in place of compiled programs."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain import EngineError
from tests.public_loops import LOOPS, TOLERANCE, Expected, Side, trained
from tests.step.fakes import hasten
from tests.step.graph_backend import use_graphs


@pytest.fixture(autouse=True)
def graphs_in_double(own_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Captured graphs run in place of programs, `auto` takes one up at once, and numbers are in double precision."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    use_graphs(monkeypatch)
    hasten(monkeypatch)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def name_of(expected: Expected) -> str:
    return expected.loop.__name__


@pytest.fixture(scope="module")
def plain() -> Callable[[Expected], list[Any]]:
    """What plain PyTorch gives, once for each loop; asked for while double precision is the default."""

    @functools.cache
    def of(expected: Expected) -> list[Any]:
        return trained(expected, Side(None))

    return of


@pytest.mark.parametrize("engine", ["eager", "auto"])
@pytest.mark.parametrize("expected", LOOPS, ids=name_of)
def test_a_public_loop_trains_as_in_plain_pytorch(expected: Expected, engine: str, plain: Any) -> None:
    side = Side(engine)
    torch.testing.assert_close(trained(expected, side), plain(expected), rtol=TOLERANCE, atol=TOLERANCE)
    runs_eagerly = engine == "eager" or expected.eagerly is not None
    for step in side.steps:
        assert step.engine.value == ("eager" if runs_eagerly else "compiled"), step.engine
        if engine == "auto":
            assert re.search(expected.eagerly or "^measured", step.engine.reason), step.engine
        step.close()


@pytest.mark.parametrize("expected", [each for each in LOOPS if each.eagerly is None], ids=name_of)
def test_a_public_loop_that_compiles_trains_as_in_plain_pytorch(expected: Expected, plain: Any) -> None:
    side = Side("compiled")
    torch.testing.assert_close(trained(expected, side), plain(expected), rtol=TOLERANCE, atol=TOLERANCE)
    for step in side.steps:
        missed = re.search(r"(\d+) steps ran eagerly", step.engine.reason)
        assert step.engine.value == "compiled", step.engine
        assert int(missed[1] if missed else 0) == expected.missed, step.engine
        step.close()


@pytest.mark.parametrize("expected", [each for each in LOOPS if each.eagerly is not None], ids=name_of)
def test_a_public_loop_that_does_not_compile_is_refused_with_the_reason(expected: Expected) -> None:
    assert expected.eagerly is not None
    with pytest.raises(EngineError, match=expected.eagerly):
        trained(expected, Side("compiled"))


def test_at_least_nine_public_loops_compile() -> None:
    assert sum(expected.eagerly is None for expected in LOOPS) >= 9
