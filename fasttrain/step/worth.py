"""Whether the steps to come repay a compiled program, by what was measured before or else by what is usual."""

from __future__ import annotations

import os

from fasttrain.step.cache import Verdict

__all__ = ["shortfall"]

EXPECTED_COMPILE_S = 25.0
EXPECTED_TRACE_S, TRACE_S_A_MODULE = 0.7, 0.03
"""A trace: of a model, and of each module in it (100 modules: 3 s, 500 modules: 16 s of CPU; Xeon, torch 2.13)."""

SMALL_STEP_S = 2e-3
GAIN_OF_SMALL_STEPS, GAIN_OF_LARGE_STEPS = 0.5, 0.05
"""What to expect before anything is measured: the time of small steps is overhead, which compiling removes; that of
large ones is in matrix products, which it does not touch."""


def shortfall(steps: int, eager_s: float, known: Verdict | None, num_modules: int) -> str | None:
    """Why so many steps cannot repay a program, None if they can.

    Args:
        steps: that are to come.
        eager_s: what one takes eagerly.
        known: what was measured of the program in an earlier run, if it was.
        num_modules: of the model.
    """
    if steps <= 0:
        return (
            "no more steps are expected: where batches have no length and in a loop of your own, say how many are to "
            "come (TrainStep.expect)"
        )
    trace_s = known.trace_s if known is not None else EXPECTED_TRACE_S + TRACE_S_A_MODULE * num_modules
    compile_s = EXPECTED_COMPILE_S
    gain = GAIN_OF_SMALL_STEPS if eager_s < SMALL_STEP_S else GAIN_OF_LARGE_STEPS
    if known is not None and known.program_us is not None:
        compile_s, gain = 0.0, 1.0 - known.program_us / known.eager_us
    alone = len(os.sched_getaffinity(0)) < 2 if hasattr(os, "sched_getaffinity") else False
    cost_s = 2.0 * trace_s + (compile_s if alone else 0.0)
    saved_s = max(0.0, steps * eager_s - compile_s) * gain
    if saved_s >= cost_s:
        return None
    return (
        f"the {steps:,} steps that are left take about {steps * eager_s:.1f} s: too little to repay a compiled program "
        f"(ready in {compile_s:.0f} s, then {gain:.0%} faster)"
    )
