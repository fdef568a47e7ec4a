"""The state at one moment, and whether there is memory for it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fasttrain.step import state as module
from fasttrain.step.state import Snapshot, fits_in_memory
from tests.step.models import CPU


@given(st.lists(st.lists(st.floats(width=32), max_size=4).map(torch.tensor), max_size=3))
@settings(deadline=None)
def test_a_snapshot_brings_everything_back(tensors: list[Tensor]) -> None:
    wanted = [tensor.clone() for tensor in tensors]
    snapshot = Snapshot.of(tensors, CPU)
    random_state = torch.get_rng_state()
    for tensor in tensors:
        tensor.uniform_()
    torch.rand(3)
    snapshot.restore(tensors, CPU)
    torch.testing.assert_close(tensors, wanted, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(("free", "fits"), [(None, True), (1600, True), (1599, False)])
def test_two_copies_must_fit_in_half_of_what_is_free(
    free: int | None, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "free_bytes", lambda _: free)
    assert fits_in_memory([torch.zeros(100)], CPU) is fits
