"""Values as a page writes them: losses, rates, durations, options. Unknown is a dash, never 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import cast

__all__ = [
    "MISSING",
    "as_duration",
    "as_loss",
    "as_number",
    "as_percent",
    "as_rate",
    "as_text",
    "number_label",
    "ten_power",
    "written",
]

MISSING = "–"


def ten_power(value: float) -> int:
    """Return the power of ten of the first digit of `value`, exactly: log10 rounds 0.00099...9 up to -3."""
    return Decimal(value).adjusted()


def number_label(value: float, exponent: int) -> str:
    """Write `value` to the digit of 10**exponent: 0.25, 12, 1.5M, 2e-5."""
    if value == 0:
        return "0"
    magnitude = ten_power(value)
    if not -4 <= magnitude < 12:
        mantissa, power = f"{value:.{max(0, magnitude - exponent)}e}".split("e")
        return f"{mantissa}e{int(power)}"
    for power, suffix in ((9, "G"), (6, "M"), (3, "k")):
        if magnitude >= power:
            return f"{value / 10**power:.{max(0, power - exponent)}f}{suffix}"
    return f"{value:.{max(0, -exponent)}f}"


def as_number(value: object) -> float | None:
    """Return a value of a summary or a history, which is a number or None, as a float."""
    return None if value is None else float(cast(float, value))


def written(value: object, write: Callable[[float], str]) -> str:
    """Return what `write` makes of `value`; a dash for None, and a word where it is not finite."""
    number = as_number(value)
    if number is None:
        return MISSING
    return write(number) if math.isfinite(number) else {math.inf: "∞", -math.inf: "−∞"}.get(number, "NaN")


def as_loss(value: float) -> str:
    """Four digits after the point, or four digits in all where those would hide it: 0.1412, 3.2e-06."""
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"


def as_percent(value: float) -> str:
    """A value that is in percent already: 95.53%."""
    return f"{value:.2f}%"


def as_rate(value: float) -> str:
    """Three digits and a suffix: 987, 48.7k, 1.24M."""
    rounded = float(f"{value:.3g}")
    return number_label(rounded, ten_power(rounded) - 2) if rounded else "0"


def as_duration(seconds: float) -> str:
    """Seconds in the units that a reader would choose: 0.34 s, 1 min 12 s, 2 h 05 min."""
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def as_text(value: object) -> str:
    """An option or a condition of any type, on one line."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {as_text(one)}" for key, one in cast("Mapping[object, object]", value).items())
    if isinstance(value, (list, tuple)):
        return ", ".join(as_text(one) for one in cast("Sequence[object]", value))
    return str(value)
