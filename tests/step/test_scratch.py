"""Buffers that a program keeps: there, not too large, and never what a run returns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.step.programs import compiled


def in_place(x: Tensor, y: Tensor) -> Tensor:
    """The result takes the place of the product, which nothing reads afterwards."""
    return (x @ y).relu()


def part(x: Tensor, y: Tensor) -> Tensor:
    """The result is a part of what the program computes."""
    return ((x @ y).relu() @ y)[1:, ::2]


def made_anew(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([(x @ y).sum(), ((x + y) @ y).sum()])


@pytest.mark.parametrize("function", [in_place, part, made_anew])
def test_a_result_outlives_the_next_run(function: Callable[[Tensor, Tensor], Tensor], tmp_path: Path) -> None:
    x, y = torch.randn(16, 16, dtype=torch.float64), torch.randn(16, 16, dtype=torch.float64)
    program = compiled(function, [x, y], tmp_path)
    assert "_kept" in program.source
    first, second = program.run([x, y]), program.run([2 * x, y])
    torch.testing.assert_close(first, function(x, y))
    torch.testing.assert_close(second, function(2 * x, y))


def test_a_large_buffer_is_made_anew(tmp_path: Path) -> None:
    def large(x: Tensor) -> Tensor:
        return (x @ x).sum()

    x = torch.randn(300, 300, dtype=torch.float64)
    program = compiled(large, [x], tmp_path)
    assert "aoti_torch_empty_strided" in program.source
    assert "_kept" not in program.source
    torch.testing.assert_close(program.run([x]), large(x))
