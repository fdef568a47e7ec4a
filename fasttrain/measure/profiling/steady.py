"""Refusing what was measured while `auto` changed over from one engine to another."""

from __future__ import annotations

from fasttrain.errors import EngineError
from fasttrain.measure.profiling.passes import Pass
from fasttrain.measure.profiling.phases import Phases

__all__ = ["SETTLE", "SteadyPass"]

SETTLE = (
    "profile once the engine has settled, such as in a later epoch, or name an engine (eager, compiled) instead of auto"
)
"""What to do where a profile would be of several engines."""


class SteadyPass:
    """Another pass, in which no compiled program may be loaded: `auto` changes over to it, or tries it out, then.

    Args:
        of: the pass.
        phases: count the programs that are loaded.
    """

    def __init__(self, of: Pass, phases: Phases) -> None:
        self._of = of
        self._phases = phases
        self._loaded_before = self._loaded_after = 0

    def start(self) -> None:
        """See `Pass.start`."""
        self._loaded_before = self._phases.programs_loaded
        self._of.start()

    def step(self, count: int) -> None:
        """See `Pass.step`."""
        self._of.step(count)

    def stop(self) -> None:
        """See `Pass.stop`."""
        self._of.stop()
        self._loaded_after = self._phases.programs_loaded

    def check(self) -> None:
        """Refuses what the pass has seen, once it is done, if it is of several engines.

        Raises:
            EngineError: a program was loaded.
        """
        if self._loaded_after > self._loaded_before:
            raise EngineError(f"a compiled program was taken up while the steps were measured: {SETTLE}")
