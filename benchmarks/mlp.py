"""Samples/s of training a small network: the textbook's loop, a hand-tuned one, FastLoop and JAX, interleaved.

Arms, checks and timing are as in `benchmarks.reviews`; the textbook reads its rows through a DataLoader.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from benchmarks.arms import textbook_arms
from benchmarks.harness import RESULTS, environment
from benchmarks.interleave import Comparison, option_parser, peer
from benchmarks.mlp_arms import NUM_ROWS, MlpJob, mlp_arms
from fasttrain.device import resolve_device


def main(arguments: Sequence[str]) -> int:
    """Measures and writes the record; returns the exit code."""
    options = parse(arguments)
    device = resolve_device(options.device)
    started_at, default_threads = environment(device), torch.get_num_threads()
    job = MlpJob.draw(device, options.rows)
    comparison = Comparison(
        benchmark="mlp",
        title=f"Training a small network (MLP 64-32-10), {device.type}",
        workload=job.describe(),
        environment=started_at,
        textbooks=textbook_arms(job, options.threads, default_threads, None),
        makers={
            **mlp_arms(job, options.threads),
            "jax": peer("jax_mlp", job, options.threads),
            "jax, a step a call": peer("jax_mlp", job, options.threads, build="build_stepwise"),
        },
    )
    comparison.run(options, arguments, options.out or RESULTS / f"mlp-{device.type}.json")
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = option_parser("mlp", __doc__)
    parser.add_argument("--rows", type=int, default=NUM_ROWS, help=f"rows of the data (default: {NUM_ROWS})")
    options = parser.parse_args(arguments)
    if options.repeats < 1 or options.threads < 1 or options.rows < 1:
        parser.error("--repeats, --threads and --rows must be 1 or more")
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
