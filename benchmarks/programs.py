"""Has all programs of a workload compiled, so that no benchmark of it waits for a compiler: WORKLOAD DEVICE."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from fasttrain.measure.bench.arms import LoopArm
from fasttrain.workloads.job import load_job

CALLS = 2
"""Of the arm: in the second it waits until it is decided what runs the steps."""


def main(arguments: Sequence[str]) -> int:
    """Compiles; returns the exit code."""
    workload, device = arguments
    engine = "graphed" if device == "cuda" else "compiled"
    arm = LoopArm(load_job(workload, torch.device(device)), engine=engine)
    for _ in range(CALLS):
        arm.step()
    print(arm.engine)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
