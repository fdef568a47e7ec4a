"""Every job in both its forms: the fast one gives the textbook's numbers, from the same weights, rows and order."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fasttrain.errors import ConfigError, DataError
from fasttrain.loop import FastLoop
from fasttrain.metrics import RunningMetrics
from fasttrain.reference import train_epoch
from fasttrain.workloads.common import data_dir as folder_of_data
from fasttrain.workloads.generate import generate_reviews
from fasttrain.workloads.job import JOBS, Job, load_job
from fasttrain.workloads.review_job import review_job

CPU = torch.device("cpu")
NUM_BATCHES = 8

GOLDEN_LOSSES = {
    "reviews": (0.707470, 0.693860),
    "mlp": (2.308511, 2.309876),
    "cnn": (2.359237, 1.740839),
    "chars": (4.229340, 3.738917),
}
"""Of the textbook's loop: the first batch's loss, and the mean of the first eight."""


@pytest.fixture(scope="module", params=JOBS)
def job(request: pytest.FixtureRequest) -> Job:
    if request.param == "reviews":
        return review_job(CPU, generate_reviews(2_000).table)
    if request.param != "mlp":
        request.getfixturevalue("data_dir")
    return load_job(request.param, CPU)


def train_textbook(job: Job) -> tuple[list[float], float]:
    """The running losses of some batches by the textbook's loop, and the accuracy at their end."""
    model, optimizer, loss = job.textbook_model()
    losses: list[float] = []
    order = job.order(0)[: NUM_BATCHES * job.batch_size].tolist()
    loader = job.textbook_batches(order)
    figures = train_epoch(model, loader, loss, optimizer, job.device, lambda value, _: losses.append(value))
    return losses, figures.accuracy


def train_fast(job: Job) -> tuple[list[float], float | None]:
    """The same by `FastLoop`."""
    model = job.model()
    loop = FastLoop(model, job.optimizer(model), job.forward, engine="eager")
    losses: list[float] = []

    def watch(_batches: int, _samples: int, _seconds: float, metrics: RunningMetrics) -> None:
        loss = metrics.compute().loss
        assert loss is not None
        losses.append(loss)

    return losses, loop.train(islice(job.batches(), NUM_BATCHES), watch=watch).accuracy


def test_both_forms_give_the_same_numbers(job: Job) -> None:
    wanted, wanted_accuracy = train_textbook(job)
    assert len(wanted) == NUM_BATCHES
    assert (wanted[0], wanted[-1]) == pytest.approx(GOLDEN_LOSSES[job.name], rel=1e-4)
    losses, accuracy = train_fast(job)
    assert losses == pytest.approx(wanted, rel=job.tolerance)
    # A prediction at the border may fall to either side: less than half a percent of them.
    assert accuracy == pytest.approx(wanted_accuracy, abs=0.5)


def test_both_forms_start_from_the_same_weights_and_touch_no_generator(job: Job) -> None:
    before = torch.get_rng_state()
    textbook, _, _ = job.textbook_model()
    fast = [job.model(), job.model()]
    assert torch.equal(torch.get_rng_state(), before)
    for model in fast:
        torch.testing.assert_close(model.state_dict(), textbook.state_dict(), rtol=0, atol=0)
    assert fast[0] is not fast[1]


def test_the_order_of_an_epoch_is_a_pure_function(job: Job) -> None:
    order = job.order(3)
    assert order.dtype == np.int64
    assert len(order) == job.num_rows // job.batch_size * job.batch_size
    assert len(set(order.tolist())) == len(order)
    assert 0 <= order.min() <= order.max() < job.num_rows
    assert not np.array_equal(order, job.order(2))
    np.testing.assert_array_equal(order, job.order(3))
    np.testing.assert_array_equal(order, job.batches().order(3))


def test_the_optimizer_leaves_its_kernels_open(job: Job) -> None:
    [group] = job.optimizer(job.model()).param_groups
    assert group["fused"] is None
    assert group["foreach"] is None


def test_a_job_describes_itself_in_json(job: Job) -> None:
    facts = job.describe()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["train_rows"] == job.num_rows
    assert facts["batch_size"] == job.batch_size
    assert JOBS[job.name]


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'mnist': use one of reviews, mlp, cnn, chars"):
        load_job("mnist", CPU)


@pytest.mark.parametrize(("name", "file"), [("cnn", "mnist_t10k.npz"), ("chars", "tinyshakespeare.txt")])
def test_missing_data_is_named(name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTTRAIN_DATA", str(tmp_path))
    with pytest.raises(DataError) as caught:
        load_job(name, CPU)
    assert str(tmp_path / file) in str(caught.value)
    assert "FASTTRAIN_DATA" in str(caught.value)


def test_reviews_are_generated_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTTRAIN_DATA", str(tmp_path))
    assert load_job("reviews", CPU).describe()["data"] == "generated reviews"


def test_data_lies_beside_the_repository_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTTRAIN_DATA", raising=False)
    assert folder_of_data() == Path(__file__).parents[3] / "shared" / "data"


def test_the_review_job_takes_more_than_two_ratings() -> None:
    table = generate_reviews(2_000).table
    every_third = table.index % 3 == 0
    job = review_job(CPU, table.assign(rating=table["rating"].where(~every_third, "middling")))
    assert job.num_outputs == job.textbook.num_outputs == 3
    losses, _ = train_fast(job)
    assert losses == pytest.approx(train_textbook(job)[0], rel=job.tolerance)


def layout(model: nn.Module) -> set[torch.memory_format]:
    weights = [each.weight for each in model.modules() if isinstance(each, nn.Conv2d) and each.in_channels > 1]
    formats = (torch.contiguous_format, torch.channels_last)
    return {each for each in formats for weight in weights if weight.is_contiguous(memory_format=each)}


def test_the_fast_cnn_is_channels_last_and_the_textbooks_contiguous(data_dir: Path) -> None:
    job = load_job("cnn", CPU)
    assert layout(job.model()) == {torch.channels_last}
    assert layout(job.textbook_model()[0]) == {torch.contiguous_format}
