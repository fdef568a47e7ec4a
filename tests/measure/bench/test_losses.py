"""Losses against the reference's."""

from __future__ import annotations

import pytest

from fasttrain import DataError
from fasttrain.measure.bench.losses import check_losses


def test_losses_that_leave_the_references_are_refused() -> None:
    wanted = [0.7, 0.6]
    assert check_losses([0.7, 0.6 * (1 + 5e-6), 9.0], wanted, 1e-5) == pytest.approx(5e-6)
    with pytest.raises(DataError, match="5e-05 relative at step 2, allowed is 1e-05"):
        check_losses([0.7, 0.6 * (1 + 5e-5)], wanted, 1e-5)
    for losses in ([float("nan"), 0.6], [0.7, float("nan")]):
        with pytest.raises(DataError, match="leave"):
            check_losses(losses, wanted, 1e-5)
    with pytest.raises(DataError, match="1 losses"):
        check_losses([0.7], wanted, 1e-5)
