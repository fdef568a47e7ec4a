"""torch's own test losses as captured graphs against plain steps."""

from __future__ import annotations

from typing import Any

import pytest

from tests.step.conformance import check_inputs, module_db


@pytest.mark.parametrize("info", [each for each in module_db if each.name.endswith("Loss")], ids=lambda each: each.name)
def test_losses(info: Any) -> None:
    check_inputs(info)
