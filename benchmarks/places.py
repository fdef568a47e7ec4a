"""Where the benchmarks keep what, and how they tell how far they are."""

from __future__ import annotations

import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"


def log(message: str) -> None:
    """Tells on stderr."""
    print(message, file=sys.stderr, flush=True)
