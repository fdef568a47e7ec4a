from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.pages.values import (
    MISSING,
    as_duration,
    as_loss,
    as_rate,
    as_text,
    number_label,
    ten_power,
    written,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.034, "0.034 s"), (59.9, "59.9 s"), (59.97, "1 min 00 s"), (83.2, "1 min 23 s"), (7500, "2 h 05 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert as_duration(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0, "0"), (0.5, "0.500"), (987.4, "987"), (48_712, "48.7k"), (999_999, "1.00M"), (2.5e9, "2.50G")],
)
def test_rate(rate: float, text: str) -> None:
    assert as_rate(rate) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, MISSING), (math.nan, "NaN"), (math.inf, "∞"), (-math.inf, "−∞"), (0.25, "0.2500")],
)
def test_written_has_a_word_for_what_is_no_number(value: object, text: str) -> None:
    assert written(value, as_loss) == text


def test_small_losses_keep_their_digits() -> None:
    assert as_loss(3.21456e-6) == "3.215e-06"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, MISSING),
        (True, "yes"),
        (1337, "1337"),
        (0.001, "0.001"),
        ({"torch": "2.13.0", "cuda": None}, f"torch 2.13.0, cuda {MISSING}"),
        ((1, False), "1, no"),
    ],
)
def test_text_of_any_option(value: object, text: str) -> None:
    assert as_text(value) == text


@pytest.mark.parametrize(
    ("value", "exponent", "label"),
    [
        (0.25, -2, "0.25"),
        (12, 0, "12"),
        (1.5e6, 5, "1.5M"),
        (2e-5, -5, "2e-5"),
        (-800_000, 5, "-800k"),
        (0, 3, "0"),
    ],
)
def test_number_label(value: float, exponent: int, label: str) -> None:
    assert number_label(value, exponent) == label


@settings(deadline=None)
@given(st.floats(min_value=1e-150, max_value=1e150))
def test_ten_power_is_exact(value: float) -> None:
    power = ten_power(value)
    assert float(f"1e{power}") <= value <= float(f"1e{power + 1}")
    assert ten_power(math.nextafter(1e-3, 0)) == -4
