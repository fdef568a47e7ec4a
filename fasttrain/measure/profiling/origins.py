"""Where the time of the phase `program` comes from: the parts of a step that its kernels compute, and the rest."""

from __future__ import annotations

from collections.abc import Mapping

from fasttrain.measure.profiling.record import PHASES

__all__ = ["NOT_ATTRIBUTED", "UNKNOWN", "in_order", "split_program"]

UNKNOWN = "kernels of unknown origin"

NOT_ATTRIBUTED = "not attributed"
"""Of a program's time, what no kernel covers."""

_ALONGSIDE = ("guards and inputs", "python")
"""What the phase holds beside the program."""


def split_program(times: Mapping[str, float]) -> dict[str, float]:
    """The time of the phase by where it comes from; adds up to the same.

    Args:
        times: by operator and kernel; kernels are named "ORIGIN: NAME".
    """
    found: dict[str, float] = {}
    for name, us in times.items():
        origin = _origin(name)
        found[origin] = found.get(origin, 0.0) + us
    return in_order(found)


def in_order(split: Mapping[str, float]) -> dict[str, float]:
    """Sorted by the parts of a step; where a kernel computes several of them, by the last; then the rest."""
    return {origin: split[origin] for origin in sorted(split, key=_place)}


def _origin(name: str) -> str:
    origin, is_kernel, _ = name.partition(": ")
    if name in _ALONGSIDE:
        return name
    return origin if is_kernel and (origin == UNKNOWN or _are_phases(origin)) else NOT_ATTRIBUTED


def _place(origin: str) -> tuple[int, ...]:
    if _are_phases(origin):
        places = [PHASES.index(part) for part in origin.split(" + ")]
        return (max(places), len(places), *places)
    rest = (UNKNOWN, *_ALONGSIDE, NOT_ATTRIBUTED)
    return (len(PHASES), rest.index(origin) if origin in rest else len(rest))


def _are_phases(origin: str) -> bool:
    return all(part in PHASES for part in origin.split(" + "))
