"""Peers train the same numbers, and whole commands are measured as said."""

import contextlib
import importlib
import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import commands, first_step
from benchmarks.children import Ran
from benchmarks.peers import NAMES, native
from benchmarks.records import times_better
from fasttrain import DataError, EngineError
from fasttrain.measure.bench.arm import CHECKED_STEPS, Arm
from fasttrain.measure.bench.arms import TextbookArm
from fasttrain.measure.bench.losses import check_losses, running_means
from fasttrain.measure.bench.messages import ArmTask
from fasttrain.measure.bench.runner import ArmRunner
from fasttrain.measure.bench.sources import find_factory, peers
from fasttrain.workloads.generate import generate_reviews
from fasttrain.workloads.job import Job, load_job
from fasttrain.workloads.mlp import mlp_job
from fasttrain.workloads.review_job import ReviewJob, review_job

REPOSITORY = Path(__file__).parent.parent
CPU = torch.device("cpu")


XLA_VARIABLES = ("NPROC", "XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE")
"""What the peers in JAX set for the life of their process."""


@pytest.fixture(scope="module")
def job() -> ReviewJob:
    return review_job(CPU, generate_reviews(4_000).table)


@pytest.fixture(scope="module")
def imported_peers() -> None:
    """Imports what is there: it sets variables when it is imported, which would look like a leak of the first test."""
    before = set(os.environ)
    for name in ("jax", "sklearn"):
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    for name in set(os.environ) - before:
        del os.environ[name]


def peer(name: str, job: Job) -> Arm:
    """The peer's arm; the test is skipped where the peer is missing."""
    try:
        return find_factory(name)(job)
    except EngineError as error:
        pytest.skip(str(error))


def run(arm: Arm, num_steps: int) -> list[float]:
    steps = 0
    while steps < num_steps:
        steps += arm.step() or 1
    arm.sync()
    losses = arm.losses()
    assert losses is not None
    return losses


def assert_trains_alike(arm: Arm, job: Job) -> None:
    wanted = running_means(run(TextbookArm(job), CHECKED_STEPS))
    assert check_losses(running_means(run(arm, CHECKED_STEPS)), wanted, job.tolerance) < job.tolerance


def test_every_peer_has_a_module() -> None:
    assert peers() == NAMES
    for name in NAMES:
        assert importlib.util.find_spec(f"benchmarks.peers.{name.replace('-', '_')}") is not None


@pytest.mark.usefixtures("imported_peers")
@pytest.mark.parametrize("name", ["jax-scan", "jax-step"])
def test_jax_trains_the_same_numbers(name: str, job: ReviewJob, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in XLA_VARIABLES:
        monkeypatch.setenv(variable, os.environ.get(variable, ""))
    assert_trains_alike(peer(name, job), job)
    small = mlp_job(CPU, 1_000)  # 20 steps are three epochs of it
    assert_trains_alike(peer(name, small), small)


@pytest.mark.usefixtures("imported_peers", "data_dir")
@pytest.mark.parametrize("workload", ["cnn", "chars"])
def test_networks_in_jax_are_the_same_networks(workload: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in XLA_VARIABLES:
        monkeypatch.setenv(variable, os.environ.get(variable, ""))
    jax = pytest.importorskip("jax")
    jax_jobs = importlib.import_module("benchmarks.peers.jax_jobs")
    job = load_job(workload, CPU)
    of_jax = jax_jobs.problem(job)
    rows = job.order(0)[: job.batch_size]
    state, (loss, _) = jax.jit(of_jax.step)(of_jax.state, of_jax.data, rows)
    model = job.model()
    optimizer = job.optimizer(model)
    wanted, _, _ = job.forward(model, next(iter(job.batches())))
    wanted.backward()
    optimizer.step()
    assert float(loss) == pytest.approx(wanted.item(), rel=job.tolerance)
    found = {**state.parameters, **state.buffers}
    for name, value in model.state_dict().items():
        if "num_batches" not in name:  # a gradient of nearly 0 makes Adam's first step one of either sign
            differs = np.abs(np.asarray(found[name]) - value.numpy()) > 1e-4
            assert differs.mean() < 0.01, name


@pytest.mark.usefixtures("imported_peers")
def test_jax_refuses_what_it_is_bad_at() -> None:
    pytest.importorskip("jax")
    with pytest.raises(EngineError, match="slower in a loop"):
        find_factory("jax-scan")(SimpleNamespace(name="cnn", device=CPU))  # pyright: ignore[reportArgumentType]


@pytest.mark.usefixtures("imported_peers")
def test_scikit_learn_is_not_compared(job: ReviewJob) -> None:
    arm = peer("scikit-learn", job)
    assert arm.losses() is None
    assert arm.step() == 2_800 // 128


def test_native_code_goes_on_where_it_stopped(job: ReviewJob) -> None:
    textbook, arm = TextbookArm(job), peer("native", job)
    assert torch.tensor([1e-40]) * 1 != 0  # loading it must not make the process flush denormal numbers
    assert check_losses(run(arm, CHECKED_STEPS), run(textbook, CHECKED_STEPS), job.tolerance) < job.tolerance
    assert isinstance(arm, native.NativeArm)
    assert arm.step() == 2_800 // 128
    losses, _ = arm._pass(None)
    model, optimizer, loss = job.textbook_model()
    wanted: list[float] = []
    for epoch, steps in enumerate([CHECKED_STEPS, 21, 21]):
        order = job.order(epoch)[: steps * job.batch_size].tolist()
        for batch in job.textbook_batches(order):
            optimizer.zero_grad()
            found = loss(model(batch["x_data"].float()), batch["y_target"].float())
            found.backward()
            optimizer.step()
            wanted.append(found.item())
    assert losses.tolist() == pytest.approx(wanted[-21:], rel=job.tolerance)


def test_native_code_without_a_compiler_is_refused(job: ReviewJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(EngineError, match="no C compiler"):
        native.make_arm(job)
    with pytest.raises(EngineError, match="two ratings"):
        native.make_arm(mlp_job(CPU, 1_000))


@pytest.mark.parametrize("name", ["lightning", "lightning-barebones", "accelerate"])
def test_frameworks_train_the_same_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of their own: they start threads and set variables that stay."""
    if importlib.util.find_spec(name.split("-")[0]) is None:
        pytest.skip(f"{name} is not installed")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    wanted = tuple(running_means(run(TextbookArm(load_job("mlp", CPU)), CHECKED_STEPS)))
    task = ArmTask(source=name, workload="mlp", device="cpu", threads=1, reference=wanted)
    with ArmRunner({}, folder=REPOSITORY)(task) as process:
        assert process.started.refused is None, process.started.refused
        assert process.started.agreement is not None
        assert process.started.agreement < 1e-5
        assert process.slice(0.05, 0).steps >= 1


class FakePlace(commands.Place):
    """Commands whose times are made up."""

    def train(self, *options: str, data: Path | None = None, is_cold: bool = False) -> Ran:
        assert is_cold
        return Ran(2.0, 600.0, json.dumps({"epochs": 3, "test_accuracy": 90.0}))

    def textbook(self, epochs: int, threads: int) -> Ran:
        return Ran(50.0, 500.0, json.dumps({"epochs": 3, "test_accuracy": 91.0}))


def test_whole_commands_are_compared_over_the_same_epochs(tmp_path: Path) -> None:
    place = FakePlace(data=tmp_path / "table.csv", scratch=tmp_path)
    options = SimpleNamespace(epochs=3, textbook_threads=1, repeats=2)
    series, notes = commands.against_textbook(place, options)  # pyright: ignore[reportArgumentType]
    assert times_better(series[commands.WHOLE], series[commands.TEXTBOOK]).values == (25.0, 25.0)
    assert "90.00%" in notes[0]
    assert "91.00%" in notes[0]
    options.epochs = 4
    with pytest.raises(DataError, match="ran 3 epochs where 4"):
        commands.against_textbook(place, options)  # pyright: ignore[reportArgumentType]


def test_each_cold_command_has_an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[Path] = []

    def run_child(*_: str, cache: Path) -> Ran:
        caches.append(cache)
        return Ran(2.0, 600.0, "")

    monkeypatch.setattr(commands, "run_child", run_child)
    place = commands.Place(data=tmp_path / "table.csv", scratch=tmp_path)
    for is_cold in (True, True, False, False):
        place.train(is_cold=is_cold)
    assert len(set(caches)) == 3
    assert caches[2] == caches[3]
    assert not any(cache.exists() for cache in caches)


def test_copies_hold_every_row_in_several_orders(tmp_path: Path) -> None:
    source, target = tmp_path / "one.csv.gz", tmp_path / "three.csv"
    table = generate_reviews(50).table
    table.loc[0, "review"] = 'a "quoted", one'
    table.to_csv(source, index=False)
    assert commands.write_copies(source, target, 3) == 150
    copies = pd.read_csv(target, dtype=str, keep_default_na=False)
    parts = [copies[begin : begin + 50] for begin in (0, 50, 100)]
    rows = [sorted(map(tuple, part.to_numpy())) for part in parts]
    assert rows == [sorted(map(tuple, table.to_numpy()))] * 3
    assert parts[0]["review"].tolist() != parts[1]["review"].tolist()


def test_the_first_step_is_timed_once(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    generate_reviews(400).table.to_csv(table, index=False)
    options = ["--data", str(table), "--out", str(tmp_path / "run"), "--epochs", "1", "--device", "cpu"]
    plain_run = first_step.TrainStep.run
    assert first_step.main([str(tmp_path / "stepped_at"), *options]) == 0
    assert first_step.TrainStep.run is plain_run
    assert float((tmp_path / "stepped_at").read_text()) <= (tmp_path / "run" / "summary.json").stat().st_mtime
