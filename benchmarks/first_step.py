"""Runs `train` and writes the time at the end of its first step to a file: FILE, then the options of `train`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fasttrain.cli import main as run_fasttrain
from fasttrain.step.train_step import TrainStep


def main(arguments: Sequence[str]) -> int:
    """Trains; returns the exit code."""
    file, options = Path(arguments[0]), list(arguments[1:])
    plain_step = TrainStep.__call__

    def first_step(self: TrainStep, batch: Any) -> Tensor:
        loss = plain_step(self, batch)
        file.write_text(str(time.time()))
        TrainStep.__call__ = plain_step
        return loss

    TrainStep.__call__ = first_step
    return run_fasttrain(["train", *options])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
