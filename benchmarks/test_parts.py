"""The parts of a training, each by itself: step, gather, prefetch, metrics, text."""

from __future__ import annotations

import gzip
from collections import deque
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.conftest import median_s
from fasttrain import RunningMetrics, TrainStep, prefetch
from fasttrain.data.table import read_reviews
from fasttrain.data.text import encode_reviews
from fasttrain.workloads.job import Job
from fasttrain.workloads.review_job import ReviewJob

BATCH_SIZE = 128


@pytest.mark.benchmark(group="step")
def test_step(job: ReviewJob, benchmark: BenchmarkFixture) -> None:
    model = job.model()
    step = TrainStep(model, job.optimizer(model), job.forward, engine="eager")
    batch = next(iter(job.batches()))
    step(batch)  # the first one is observed, to learn the rule of accuracy
    benchmark(step, batch)


@pytest.mark.benchmark(group="metrics")
def test_metrics_update(benchmark: BenchmarkFixture) -> None:
    metrics = RunningMetrics(torch.device("cpu"), accuracy="logit")
    benchmark(metrics.update, torch.tensor(0.5), torch.randn(BATCH_SIZE), torch.ones(BATCH_SIZE))


@pytest.mark.benchmark(group="an epoch's batches")
def test_gather(job: ReviewJob, benchmark: BenchmarkFixture) -> None:
    batches = job.batches()
    benchmark.pedantic(lambda: deque(batches, maxlen=0), rounds=20, warmup_rounds=1)


@pytest.mark.benchmark(group="an epoch's batches")
def test_prefetch(small_job: Job, benchmark: BenchmarkFixture) -> None:
    batches = prefetch(small_job.textbook_batches(small_job.order(0).tolist()), small_job.device)
    benchmark.pedantic(lambda: deque(batches, maxlen=0), rounds=5, warmup_rounds=1)


@pytest.mark.benchmark(group="text")
def test_text_to_csr(job: ReviewJob, benchmark: BenchmarkFixture) -> None:
    benchmark.pedantic(lambda: encode_reviews(read_reviews(job.source)), rounds=3, warmup_rounds=1)
    seconds = median_s(benchmark)
    if seconds is not None:
        benchmark.extra_info["mb_per_s"] = text_bytes(job) / 1e6 / seconds


def text_bytes(job: ReviewJob) -> int:
    """Uncompressed size of the table: its file's, or its reviews' where it has none."""
    if isinstance(job.source, Path):
        raw = job.source.read_bytes()
        return len(gzip.decompress(raw)) if job.source.suffix == ".gz" else len(raw)
    return int(job.source["review"].str.encode("utf-8").str.len().sum())
