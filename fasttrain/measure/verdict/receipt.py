"""The receipt of a run: how many times faster than the textbook's loop it was, on the very data that it was trained on.

Everything is measured in this process, in rounds that alternate: enough for a receipt. `bench` gives every block a
process of its own, and says more.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import exp, inf, log
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from fasttrain.data.cache import load_reviews
from fasttrain.data.table import format_of
from fasttrain.data.text import ReviewVectorizer
from fasttrain.device import free_bytes, resolve_device
from fasttrain.errors import DataError, EngineError, FasttrainError
from fasttrain.measure.bench.arm import CHECKED_STEPS, Arm
from fasttrain.measure.bench.arms import LoopArm, TextbookArm, TunedArm
from fasttrain.measure.bench.losses import check_losses, running_means
from fasttrain.measure.verdict.stats import hodges_lehmann, signed_rank_interval
from fasttrain.receipt import TEXTBOOK, TUNED, Ratio, Receipt, ReceiptArm
from fasttrain.reference import TextbookDataset
from fasttrain.run.config import TrainConfig
from fasttrain.workloads.generate import generate_reviews
from fasttrain.workloads.review_job import ReviewJob

__all__ = ["make_receipt", "measure_rounds", "receipt_of"]

ROUNDS = 10
ROUND_S = 0.4
"""Least seconds of an arm in a round."""

DENSE_SHARE = 0.25
"""Most of the free memory that the one-hot rows of the tuned loop may take."""

MakeArm = Callable[[], Arm]


def receipt_of(config: TrainConfig, *, engine: str, precision: str, round_s: float = ROUND_S) -> Receipt:
    """Measures the loops of a run that is done, on its data. Takes some seconds of each; waits for the device.

    Args:
        config: of the run.
        engine: that ran it in the end.
        precision: that it was trained in.
        round_s: least seconds of a loop in a round.

    Raises:
        FasttrainError: the data is not there any more.
    """
    job = _run_job(config)
    loops: dict[str, MakeArm] = {TEXTBOOK: partial(TextbookArm, job), TUNED: partial(_tuned, job)}
    for each in dict.fromkeys(("fp32", precision)):
        loops[f"{engine}, {each}"] = partial(LoopArm, job, engine=engine, precision=each)
    return make_receipt(loops, batch_size=job.batch_size, tolerance=job.tolerance, round_s=round_s)


def make_receipt(
    loops: Mapping[str, MakeArm],
    *,
    batch_size: int,
    tolerance: float,
    rounds: int = ROUNDS,
    round_s: float = ROUND_S,
    clock: Callable[[], float] = time.perf_counter,
) -> Receipt:
    """Checks the losses of every loop against the first one's, and times them in alternating rounds.

    Args:
        loops: what makes them, by name; the textbook first. A name that ends in a precision other than fp32 may leave
            the tolerance: its difference is told all the same. Where the first one is refused, nothing is timed.
        batch_size: rows in a step.
        tolerance: of the losses, relative.
        rounds: how many.
        round_s: least seconds of a loop in a round.
        clock: tells seconds.
    """
    arms, differences, refused = _checked(loops, tolerance)
    rounds = rounds if arms else 0
    seconds = measure_rounds(arms, rounds=rounds, round_s=round_s, clock=clock)
    return Receipt(
        arms={
            name: ReceiptArm(
                samples_per_s=batch_size / statistics.median(seconds[name]),
                loss_difference=differences[name],
                is_at_equal_precision=_is_fp32(name),
            )
            for name in arms
        },
        ratios=_ratios(seconds),
        refused=refused,
        rounds=rounds,
        threads=torch.get_num_threads(),
    )


def _checked(loops: Mapping[str, MakeArm], tolerance: float) -> tuple[dict[str, Arm], dict[str, float], dict[str, str]]:
    """The arms that may be timed, how far their losses are from the first one's, and why others may not.

    Without the first one there is nothing to check the others against, and there are none.
    """
    arms: dict[str, Arm] = {}
    differences: dict[str, float] = {}
    refused: dict[str, str] = {}
    wanted: list[float] = []
    for name, make in loops.items():
        try:
            arm = make()
            found = _first_losses(arm)
            wanted = found if not arms else wanted
            differences[name] = check_losses(found, wanted, tolerance if _is_fp32(name) else inf)
            arms[name] = arm
        except FasttrainError as error:
            refused[name] = str(error)
            if not arms:
                break
    return arms, differences, refused


def measure_rounds(
    arms: Mapping[str, Arm], *, rounds: int, round_s: float, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds a step of each arm in each round, after one that does not count; each round in an order of its own."""
    draw = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name in draw.sample(list(arms), len(arms)):
            found = _seconds_a_step(arms[name], round_s, clock)
            if number > 0:
                seconds[name].append(found)
    return seconds


def _seconds_a_step(arm: Arm, seconds: float, clock: Callable[[], float]) -> float:
    steps, begin = 0, clock()
    while steps == 0 or clock() - begin < seconds:
        steps += arm.step() or 1
    arm.sync()
    return (clock() - begin) / steps


def _ratios(seconds: Mapping[str, Sequence[float]]) -> list[Ratio]:
    names = list(seconds)
    pairs = [(arm, to) for to in (TEXTBOOK, TUNED) if to in names for arm in names if arm not in (TEXTBOOK, to)]
    return [_ratio(arm, to, seconds) for arm, to in pairs]


def _ratio(arm: str, to: str, seconds: Mapping[str, Sequence[float]]) -> Ratio:
    logs = [log(theirs / ours) for ours, theirs in zip(seconds[arm], seconds[to], strict=True)]
    interval = signed_rank_interval(logs)
    low, high = (None, None) if interval is None else (exp(interval.low), exp(interval.high))
    return Ratio(arm=arm, to=to, speedup=exp(hodges_lehmann(logs)), low=low, high=high)


def _first_losses(arm: Arm) -> list[float]:
    """Running means of the losses of the first steps, which also compile what there is to compile."""
    steps = 0
    while steps < CHECKED_STEPS:
        steps += arm.step() or 1
    return running_means(arm.losses() or [])[:CHECKED_STEPS]


def _is_fp32(name: str) -> bool:
    return name in (TEXTBOOK, TUNED) or name.endswith(", fp32")


def _tuned(job: ReviewJob) -> TunedArm:
    needed, free = job.num_rows * job.num_features, free_bytes(job.device)
    if free is not None and needed > DENSE_SHARE * free:
        raise EngineError(
            f"its one-hot rows would take {needed / 2**30:.1f} GiB of {free / 2**30:.1f} GiB that are free"
        )
    return TunedArm(job)


@dataclass(frozen=True, kw_only=True, eq=False)
class _RunJob(ReviewJob):
    """The job of a run, as `train` makes it from its options."""

    config: TrainConfig

    @cached_property
    def textbook(self) -> TextbookDataset:
        """See `ReviewJob.textbook`."""
        return _textbook_of(self.source, self.config.cutoff, self.data.vectorizer)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The run's own: only then is its compiled program found again."""
        return torch.optim.Adam(model.parameters(), lr=self.config.learning_rate, fused=True)

    def textbook_model(self) -> tuple[nn.Module, torch.optim.Optimizer, nn.Module]:
        """See `Job.textbook_model`."""
        model, _, loss = super().textbook_model()
        return model, torch.optim.Adam(model.parameters(), lr=self.config.learning_rate), loss


def _run_job(config: TrainConfig) -> _RunJob:
    source = config.data or generate_reviews(seed=config.seed).table
    cache_dir = "default" if config.cache and config.data is not None else None
    data = load_reviews(source, cutoff=config.cutoff, clean=config.clean, cache_dir=cache_dir)
    return _RunJob(
        device=resolve_device(config.device), source=source, data=data, batch_size=config.batch_size, config=config
    )


def _textbook_of(source: Path | pd.DataFrame, cutoff: int, vectorizer: ReviewVectorizer) -> TextbookDataset:
    """The run's table as the textbook takes it: cleaned beforehand, and read by pandas.

    Raises:
        DataError: pandas or the textbook cannot take a table that `read_reviews` takes.
    """
    if isinstance(source, pd.DataFrame):
        return TextbookDataset.from_dataframe(_cleaned(source, vectorizer), cutoff=cutoff)
    path = source
    try:
        if format_of(path) == ".parquet":
            table = pd.read_parquet(path)
        else:
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
        return TextbookDataset.from_dataframe(_cleaned(table, vectorizer), cutoff=cutoff)
    except (ValueError, TypeError, LookupError, NotImplementedError, OSError) as error:
        # What pandas and pyarrow raise on a table that is not for them has no common parent below Exception.
        raise DataError(f"the textbook cannot take it: {error}", file=str(path)) from error


def _cleaned(table: pd.DataFrame, vectorizer: ReviewVectorizer) -> pd.DataFrame:
    if vectorizer.clean == "none":
        return table
    return table.assign(review=vectorizer.cleaned(table["review"].fillna("").tolist()))
