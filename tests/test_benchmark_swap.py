"""What `benchmarks.swap` tells of trainings that it has watched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.swap import COLD, EAGER, SHORT_AUTO, SHORT_EAGER, WARM, Watched, figures, figures_of_jobs
from fasttrain.errors import DataError

STEPS_S = (0.02, 0.001, 0.001, 0.5, 0.001, 0.004, 0.0002, 0.0002, 0.0002, 0.0002, 0.0002, 0.9)
AUTO = Watched(
    process_s=5.0,
    fit_s=2.0,
    first_step_s=0.022,
    steps_s=STEPS_S,
    traced_at=3,
    swapped_at=6,
    trace_s=0.5,
    engine="compiled: measured",
)
PLAIN = replace(AUTO, first_step_s=0.02, traced_at=None, swapped_at=None, trace_s=0.0, engine="eager: asked for")


def watched(**changed: Watched) -> dict[str, list[Watched]]:
    ran = {
        EAGER: PLAIN,
        COLD: AUTO,
        WARM: replace(AUTO, fit_s=1.0),
        SHORT_EAGER: PLAIN,
        SHORT_AUTO: replace(PLAIN, first_step_s=0.022),
    }
    return {name: [changed.get(name.replace(" ", "_").replace(",", ""), each)] for name, each in ran.items()}


def values(found: dict[str, Any], name: str) -> tuple[float, ...]:
    return found["series"][name].values


def test_the_stalls_are_those_of_trace_and_swap() -> None:
    found: dict[str, Any] = figures(watched())
    assert values(found, "trace") == (0.5,)
    assert values(found, "swap") == (0.004, 0.004)  # not the slow step long after it
    assert values(found, "longest stall after the swap") == (0.9, 0.9)
    assert values(found, "swap after the trace, once more") == (pytest.approx(0.0052),)
    assert values(found, "first step, times as fast") == (pytest.approx(1 / 1.1),)
    assert found["ratios"]["long job, auto once more"].values == (2.0,)


def test_jobs_are_compared_pair_by_pair() -> None:
    pairs = [(replace(PLAIN, fit_s=5.0), replace(PLAIN, fit_s=4.0)), (replace(PLAIN, fit_s=6.0), PLAIN)]
    found: dict[str, Any] = figures_of_jobs({(5.0, COLD): pairs})
    assert values(found, f"job of 5 s, {COLD}, times as fast") == (1.25, 3.0)
    assert found["yardstick"] == f"job of 5 s, {COLD}: eager"
    assert found["notes"][-1] == f"job of 5 s, {COLD}: {PLAIN.engine}"


def test_what_tells_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="more --epochs"):
        figures(watched(auto_once_more=PLAIN))
    with pytest.raises(DataError, match="fewer --short-epochs"):
        figures(watched(short_job_auto=AUTO))
