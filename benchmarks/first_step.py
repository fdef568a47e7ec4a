"""Runs `train` and writes the time at the end of its first step to a file: FILE, then the options of `train`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fasttrain.cli import main as run_fasttrain
from fasttrain.step.train_step import TrainStep


def main(arguments: Sequence[str]) -> int:
    """Trains; returns the exit code."""
    file, options = Path(arguments[0]), list(arguments[1:])
    plain_run = TrainStep.run

    def run(self: TrainStep, batches: Iterator[Any]) -> Iterator[Any]:
        TrainStep.run = plain_run
        for number, ran in enumerate(plain_run(self, batches)):
            if number == 0:
                file.write_text(str(time.time()))
            yield ran

    TrainStep.run = run
    return run_fasttrain(["train", *options])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
