"""What a loop that waits for its data is told of `fasttrain.record`."""

from __future__ import annotations

__all__ = ["record_advice"]

RECORDED_SHARE = 1 / 3
"""Where the data wait is more than this share of a step, the advice is `fasttrain.record`."""

MOST_GAIN = 100.0
"""A step without its data wait is a difference of two measured times: larger gains are not told."""


def record_advice(step: float, data_wait: float) -> str | None:
    """What `fasttrain.record` would gain a loop over a `DataLoader`; None where the data wait is short.

    Args:
        step: the time of a step.
        data_wait: how much of it waits for data, in the same unit.
    """
    if data_wait <= RECORDED_SHARE * step:
        return None
    gain = step / max(step - data_wait, step / MOST_GAIN)
    more = "more than " if gain >= MOST_GAIN else ""
    return (
        f"the data wait is {data_wait / step:.0%} of a step: give the loop fasttrain.record(loader), which reads each "
        f"row once and gives the loader's own batches; without the wait a step is {more}{gain:.3g} times as fast"
    )
