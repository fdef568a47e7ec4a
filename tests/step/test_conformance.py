"""torch's own test modules and optimizers as captured graphs against plain steps; losses are in a file of their own."""

from __future__ import annotations

from typing import Any

import pytest

from tests.step.conformance import (
    NOT_WHOLE,
    check,
    check_inputs,
    module_db,
    optim_db,
    optimizer_jobs,
)


@pytest.mark.parametrize(
    "info", [each for each in module_db if not each.name.endswith("Loss")], ids=lambda each: each.name
)
def test_modules(info: Any) -> None:
    check_inputs(info)


@pytest.mark.usefixtures("in_double")  # NAdam keeps a product in the default type
@pytest.mark.parametrize("info", optim_db, ids=lambda info: info.optim_cls.__name__)
def test_optimizers(info: Any) -> None:
    for number, job in enumerate(optimizer_jobs(info)):
        check(job, NOT_WHOLE.get(info.optim_cls.__name__), f"{info.optim_cls.__name__}, setting {number}")
