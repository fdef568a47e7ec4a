"""Small products and places of largest values in a program: the same numbers as ATen's, by loops of our own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._inductor.cpu_vec_isa import pick_vec_isa

from tests.step.programs import compiled

needs_vectors = pytest.mark.skipif(
    pick_vec_isa().bit_width() < 256, reason="this processor has no vectors of eight values: all products are ATen's"
)

SHAPES = [
    (128, 64, 32),
    (9, 130, 33),
    (128, 32, 10),
    (10, 128, 2),
    (17, 3, 100),
    (64, 64, 64),
    (8, 1, 16),
    (30, 40, 70),
]
"""[rows, summed, columns]: whole vectors and not, one block of columns and several."""

FLIPS = [(False, False), (True, False), (False, True), (True, True)]


def factors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """For each shape the factors and a bias, each as it lies in memory for each of `FLIPS`."""
    generator = torch.Generator().manual_seed(5)
    made: list[Tensor] = []
    for m, k, n in SHAPES:
        for is_first, is_second in FLIPS:
            first = torch.randn((k, m) if is_first else (m, k), generator=generator)
            second = torch.randn((n, k) if is_second else (k, n), generator=generator)
            made += [first, second, torch.randn(n, generator=generator)]
    return [each.to(dtype) for each in made]


def products(*given: Tensor) -> Tensor:
    """All products, with a bias of the columns, with one of each value and without, one after the other."""
    found: list[Tensor] = []
    for number, (is_first, is_second) in enumerate(FLIPS * len(SHAPES)):
        first, second, bias = given[3 * number : 3 * number + 3]
        first, second = first.t() if is_first else first, second.t() if is_second else second
        plain = first @ second
        found += [plain, torch.addmm(bias, first, second), torch.addmm(plain + bias, first, second)]
    return torch.cat([each.flatten() for each in found])


@needs_vectors
def test_small_products_are_as_exact_as_atens(tmp_path: Path) -> None:
    program = compiled(products, factors(), tmp_path)
    assert program.source.count("fasttrain_product_") > 3 * len(SHAPES)
    assert "aoti_torch_cpu_mm_out" not in program.source
    assert "aoti_torch_cpu_addmm_out" not in program.source
    exact = products(*factors(torch.float64))
    ours, theirs = (float((found - exact).norm()) for found in (program.run(factors()), products(*factors())))
    assert ours <= 1.5 * theirs
    torch.testing.assert_close(program.run(factors()), products(*factors()), rtol=1e-5, atol=1e-4)


@needs_vectors
def test_parts_of_a_tensor_are_multiplied_where_they_lie(tmp_path: Path) -> None:
    def halves(both: Tensor, second: Tensor) -> Tensor:
        return both[:, 16:] @ second[5:] + both[:, :16] @ second[:16]

    inputs = [torch.randn(20, 32), torch.randn(21, 12)]
    program = compiled(halves, inputs, tmp_path)
    assert "fasttrain_product_" in program.source
    torch.testing.assert_close(program.run(inputs), halves(*inputs))


def test_other_products_are_atens(tmp_path: Path) -> None:
    """Large ones, those of a few rows or of a vector, and those in double precision."""

    def others(large: Tensor, small: Tensor, flat: Tensor, narrow: Tensor, exact: Tensor) -> Tensor:
        return (large @ large).sum() + (flat @ small).sum() + (small @ narrow).sum() + (exact @ exact).sum()

    shapes = [(256, 256), (32, 32), (4, 32), (32, 1)]
    inputs = [*map(torch.ones, shapes), torch.ones(32, 32, dtype=torch.float64)]
    program = compiled(others, inputs, tmp_path)
    assert "fasttrain_product_" not in program.source
    assert program.run(inputs) == others(*inputs)


def scores() -> list[Tensor]:
    """Rows with equals, infinities and NaNs; as many classes as columns, or as rows of a transposed tensor."""
    generator = torch.Generator().manual_seed(7)
    infinite, unknown = float("inf"), float("nan")
    rows = torch.randint(0, 4, (37, 10), generator=generator).float()
    rows[1], rows[2], rows[3, 4], rows[4, 5:7], rows[5, 2] = -infinite, unknown, unknown, unknown, infinite
    rows[6], rows[6, 3] = infinite, unknown
    return [rows, torch.randn(64, 16, generator=generator), torch.randn(5, 1, generator=generator)]


def places(rows: Tensor, transposed: Tensor, narrow: Tensor) -> Tensor:
    return torch.cat([rows.argmax(1), transposed.t().argmax(-1), narrow.argmax(1), rows[:, 3:].argmax(1)])


@needs_vectors
def test_places_of_largest_values_are_torchs(tmp_path: Path) -> None:
    program = compiled(places, scores(), tmp_path)
    assert program.source.count("fasttrain_places_") >= 4
    assert torch.equal(program.run(scores()), places(*scores()))
