"""The parts of a training, each by itself: step, gather, metrics, text."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.conftest import median_s
from benchmarks.review_arms import BATCH_SIZE, ReviewJob
from fasttrain import RunningMetrics, TrainStep
from fasttrain.data.table import read_reviews
from fasttrain.data.text import encode_reviews
from fasttrain.workloads.onehot import review_forward


@pytest.mark.benchmark(group="step")
def test_step(job: ReviewJob, benchmark: BenchmarkFixture) -> None:
    model, optimizer = job.classifier()
    step = TrainStep(model, optimizer, review_forward, engine="eager")
    batch = next(iter(job.resident_batches()))
    step(batch)  # the first one is observed, to learn the rule of accuracy
    benchmark(step, batch)


@pytest.mark.benchmark(group="metrics")
def test_metrics_update(benchmark: BenchmarkFixture) -> None:
    metrics = RunningMetrics(torch.device("cpu"))
    metrics.rule = "logit"
    benchmark(metrics.update, torch.tensor(0.5), torch.randn(BATCH_SIZE), torch.ones(BATCH_SIZE))


@pytest.mark.benchmark(group="an epoch's batches")
def test_gather(job: ReviewJob, benchmark: BenchmarkFixture) -> None:
    batches = job.resident_batches()
    benchmark.pedantic(lambda: deque(batches, maxlen=0), rounds=20, warmup_rounds=1)


@pytest.mark.benchmark(group="an epoch's batches")
def test_stream(job: ReviewJob, benchmark: BenchmarkFixture) -> None:
    batches = job.streamed_batches()
    benchmark.pedantic(lambda: deque(batches, maxlen=0), rounds=5, warmup_rounds=1)


@pytest.mark.benchmark(group="text")
def test_text_to_csr(job: ReviewJob, benchmark: BenchmarkFixture) -> None:
    benchmark.pedantic(lambda: encode_reviews(read_reviews(job.source)), rounds=3, warmup_rounds=1)
    seconds = median_s(benchmark)
    if seconds is not None:
        benchmark.extra_info["mb_per_s"] = job.text_bytes() / 1e6 / seconds
