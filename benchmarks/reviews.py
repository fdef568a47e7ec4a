"""Samples/s of training on the review job: the textbook's loop, a hand-tuned one, FastLoop and its peers, interleaved.

Every arm first trains the same 20 batches from the same weights; one whose running loss leaves the textbook's is not
timed. Then each repeat times every arm once, in random order, over whole passes: order of rows, gathering, steps and
the readout of loss and accuracy inside, evaluation and the first pass outside. The yardstick is the textbook at the
number of threads, one or torch's own, that is faster for it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.arms import textbook_arms
from benchmarks.harness import RESULTS, environment, log
from benchmarks.interleave import Comparison, Makers, option_parser, peer
from benchmarks.review_arms import DenseArm, ReviewJob, default_source, review_arms
from fasttrain.device import resolve_device


def main(arguments: Sequence[str]) -> int:
    """Measures and writes the record; returns the exit code."""
    options = parse(arguments)
    device = resolve_device(options.device)
    started_at, default_threads = environment(device), torch.get_num_threads()
    log("reading the table")
    job = ReviewJob.load(options.data or default_source(), device)
    comparison = Comparison(
        benchmark="reviews",
        title=f"Training on reviews, {device.type}",
        workload=job.describe(),
        environment=started_at,
        textbooks=textbook_arms(job, options.threads, default_threads, options.textbook_batches),
        makers={
            DenseArm.name: lambda: DenseArm(job, threads=options.threads),
            **review_arms(job, options.threads),
            **peers(job, options.threads),
        },
        notes=[
            f"a pass of the textbook is {options.textbook_batches} batches of an epoch, of the others a whole epoch"
        ],
    )
    comparison.run(options, arguments, options.out or RESULTS / f"reviews-{device.type}.json")
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = option_parser("reviews", __doc__)
    parser.add_argument("--textbook-batches", type=int, default=40, help="batches in the textbook's pass (default: 40)")
    parser.add_argument("--data", type=Path, help="a .csv or .csv.gz (default: reviews_lite, else generated reviews)")
    options = parser.parse_args(arguments)
    if options.repeats < 1 or options.textbook_batches < 1 or options.threads < 1:
        parser.error("--repeats, --textbook-batches and --threads must be 1 or more")
    return options


def peers(job: ReviewJob, threads: int) -> Makers:
    """What others make of the same job."""
    return {
        "jax": peer("jax_reviews", job, threads),
        "native": peer("native", job, threads),
        "scikit-learn": peer("sklearn_sgd", job, threads),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
