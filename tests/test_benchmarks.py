"""The measurements measure what they say, their records hold together, and the committed tables follow from them."""

import contextlib
import importlib
import json
import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import arms, commands, first_step, harness, interleave, mlp, reviews
from benchmarks.arms import BATCH_SIZE, TextbookArm, textbook_arms
from benchmarks.mlp_arms import MlpJob, SliceArm, mlp_arms
from benchmarks.peers import native
from benchmarks.records import read_record, times_better
from benchmarks.review_arms import DenseArm, ReviewJob, review_arms
from fasttrain import DataError, EngineError, FasttrainError
from fasttrain.workloads.generate import generate_reviews

REPOSITORY = Path(__file__).parent.parent
RESULTS = sorted((REPOSITORY / "benchmarks" / "results").glob("*.json"))

figures = st.floats(1e-6, 1e12)


class FakeArm:
    """Takes exact seconds on a fake clock."""

    compile_s = None
    description = "fake"
    threads = 1

    def __init__(self, name: str, seconds: float, log: list[str], clock: list[float]) -> None:
        self.name, self.seconds, self.log, self.clock = name, seconds, log, clock

    def losses(self, num_batches: int) -> list[float]:
        return [1.0] * num_batches

    def run(self) -> int:
        self.log.append(self.name)
        self.clock[0] += self.seconds
        return 10


def test_every_arm_is_timed_once_a_repeat_over_whole_passes() -> None:
    log: list[str] = []
    clock = [0.0]
    arms = [FakeArm("short", 0.25, log, clock), FakeArm("long", 4.0, log, clock)]
    rates = harness.measure(arms, repeats=3, min_seconds=1.0, seed=0, clock=lambda: clock[0])
    assert rates == {"short": [40.0] * 3, "long": [2.5] * 3}
    assert log.count("short") == 3 * 4
    assert log.count("long") == 3


@given(repeats=st.integers(1, 20), seed=st.integers(0, 10**6))
@settings(deadline=None)
def test_interleaving_is_a_permutation_in_each_repeat(repeats: int, seed: int) -> None:
    names = ["a", "b", "c", "d"]
    orders = list(harness.interleaved(names, repeats, seed))
    assert len(orders) == repeats
    assert all(sorted(order) == names for order in orders)
    assert orders == list(harness.interleaved(names, repeats, seed))


def test_interleaving_varies_the_order() -> None:
    assert len({tuple(order) for order in harness.interleaved(["a", "b", "c"], 50, 0)}) == 6


def test_losses_that_leave_the_textbook_are_refused() -> None:
    wanted = [0.7, 0.6]
    assert harness.check_losses([0.7, 0.6 * (1 + 5e-6)], wanted, 1e-5) == pytest.approx(5e-6)
    with pytest.raises(DataError, match="batch 2"):
        harness.check_losses([0.7, 0.6 * (1 + 5e-5)], wanted, 1e-5)
    with pytest.raises(DataError, match="leave"):
        harness.check_losses([float("nan"), 0.6], wanted, 1e-5)
    with pytest.raises(DataError, match="1 losses"):
        harness.check_losses([0.7], wanted, 1e-5)


@pytest.fixture(scope="module")
def job() -> ReviewJob:
    return ReviewJob.load(generate_reviews(4_000).table, torch.device("cpu"))


def test_arms_train_the_same_numbers(job: ReviewJob) -> None:
    wanted = TextbookArm(job, name="textbook", threads=1, num_batches=2).losses(5)
    assert len(wanted) == 5
    makers = review_arms(job, 1)
    for arm in (DenseArm(job, threads=1), makers["eager"](), makers["eager, streamed"]()):
        assert_trains_alike(arm, wanted, 2_800)


def assert_trains_alike(arm: harness.Arm, wanted: list[float], num_rows: int) -> None:
    losses = arm.losses(len(wanted))
    assert losses is not None
    assert harness.check_losses(losses, wanted, interleave.TOLERANCE) < interleave.TOLERANCE, arm.name
    assert arm.run() == num_rows // BATCH_SIZE * BATCH_SIZE, arm.name


def build_peer(build: Any) -> harness.Arm:
    """The peer's arm; the test is skipped where the peer is missing."""
    try:
        return build()
    except EngineError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def imported_peers() -> None:
    """Imports what is there: it sets variables when it is imported, which would look like a leak of the first test."""
    before = set(os.environ)
    for name in ("jax", "sklearn"):
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    for name in set(os.environ) - before:
        del os.environ[name]


@pytest.mark.usefixtures("imported_peers")
def test_jax_trains_the_same_reviews(job: ReviewJob) -> None:
    arm = build_peer(reviews.peers(job, 1)["jax"])
    wanted = TextbookArm(job, name="textbook", threads=1, num_batches=2).losses(20)
    assert_trains_alike(arm, wanted, 2_800)


@pytest.mark.usefixtures("imported_peers")
def test_scikit_learn_is_not_compared(job: ReviewJob) -> None:
    arm = build_peer(reviews.peers(job, 1)["scikit-learn"])
    assert arm.losses(3) is None
    assert arm.run() == 2_800


def test_native_code_goes_on_where_it_stopped(job: ReviewJob) -> None:
    textbook = TextbookArm(job, name="textbook", threads=1, num_batches=None)
    arm = build_peer(reviews.peers(job, 1)["native"])
    assert isinstance(arm, native.NativeArm)
    assert torch.tensor([1e-40]) * 1 != 0  # loading it must not make the process flush denormal numbers
    for _ in range(2):
        wanted, found = textbook.losses(21), arm.losses(21)
        assert harness.check_losses(found, wanted, interleave.TOLERANCE) < interleave.TOLERANCE


def test_native_code_without_a_compiler_is_refused(job: ReviewJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(EngineError, match="no C compiler"):
        native.build(job, 1)
    with pytest.raises(EngineError, match="one thread"):
        native.build(job, 2)


def test_a_peer_that_is_not_installed_is_refused(job: ReviewJob, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("jax_adam", "jax_reviews"):
        monkeypatch.delitem(sys.modules, f"benchmarks.peers.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(EngineError, match=r"jax is not installed: pip install '\.\[peers\]'"):
        interleave.peer("jax_reviews", job, 1)()
    with pytest.raises(ModuleNotFoundError, match=r"benchmarks\.peers\.misspelt"):
        interleave.peer("misspelt", job, 1)()


def test_mlp_arms_train_the_same_numbers() -> None:
    job = MlpJob.draw(torch.device("cpu"), 1_000)
    wanted = TextbookArm(job, name="textbook", threads=1, num_batches=None).losses(7)
    makers = mlp_arms(job, 1)
    for arm in (makers[SliceArm.name](), makers["eager"]()):
        assert_trains_alike(arm, wanted, 1_000)


@pytest.mark.usefixtures("imported_peers")
@pytest.mark.parametrize("build", ["build", "build_stepwise"])
def test_jax_trains_the_same_mlp(build: str) -> None:
    job = MlpJob.draw(torch.device("cpu"), 1_000)
    arm = build_peer(interleave.peer("jax_mlp", job, 1, build))
    textbook = TextbookArm(job, name="textbook", threads=1, num_batches=None)
    wanted = textbook.losses(7)
    assert_trains_alike(arm, wanted, 1_000)
    textbook.run()
    assert arm.losses(7) == pytest.approx(textbook.losses(7), rel=interleave.TOLERANCE)


def test_auto_is_given_time_to_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "SETTLE_S", 0.0)
    arm = mlp_arms(MlpJob.draw(torch.device("cpu"), 1_000), 1)["auto"]()
    assert isinstance(arm, arms.AutoArm)
    assert [arm.run(), arm.run()] == [896, 896]
    assert arm.batches.epoch == 3  # pyright: ignore[reportAttributeAccessIssue]  # one more, cut short by the clock
    assert interleave.engines([arm])[0].startswith("auto: ended on eager: ")


def test_mlp_writes_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_arm(job: MlpJob, threads: int) -> dict[str, Any]:
        return {SliceArm.name: lambda: SliceArm(job, threads=threads)}

    monkeypatch.setattr(mlp, "mlp_arms", one_arm)
    monkeypatch.setattr(
        mlp, "peer", lambda *_, **__: one_arm(MlpJob.draw(torch.device("cpu"), 10_000), 1)[SliceArm.name]
    )
    out = tmp_path / "record.json"
    assert mlp.main(["--repeats", "1", "--seconds", "0.01", "--rows", "3000", "--out", str(out)]) == 0
    record = read_record(out)
    assert list(record.series) == ["textbook", "tuned by hand"]
    assert "leave the textbook's" in record.refused["jax"]
    assert record.workload["train_rows"] == 3_000


def test_text_size_is_that_of_the_uncompressed_file(tmp_path: Path) -> None:
    table = generate_reviews(300).table
    plain, packed = tmp_path / "table.csv", tmp_path / "table.csv.gz"
    table.to_csv(plain, index=False)
    table.to_csv(packed, index=False)
    sizes = [ReviewJob.load(path, torch.device("cpu")).text_bytes() for path in (plain, packed)]
    assert sizes == [plain.stat().st_size] * 2


def test_reviews_writes_a_record_and_times_no_arm_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "table.csv"
    generate_reviews(4_000).table.to_csv(table, index=False)

    def no_compiler() -> harness.Arm:
        raise EngineError("no compiler")

    def arms(job: ReviewJob, threads: int) -> dict[str, Any]:
        wrong = FakeArm("wrong", 0.0, [], [0.0])
        return {"eager": review_arms(job, threads)["eager"], "wrong": lambda: wrong, "compiled": no_compiler}

    monkeypatch.setattr(reviews, "review_arms", arms)
    monkeypatch.setattr(reviews, "peers", lambda *_: {})
    out = tmp_path / "results" / "record.json"
    options = ["--repeats", "2", "--seconds", "0.01", "--textbook-batches", "2"]
    assert reviews.main(["--data", str(table), "--out", str(out), *options]) == 0
    record = read_record(out)
    assert list(record.series) == list(record.ratios) == ["textbook", "tuned by hand", "eager"]
    assert all(len(series.values) == 2 for series in record.series.values())
    assert record.ratios["textbook"].values == (1.0, 1.0)
    assert record.refused["compiled"] == "no compiler"
    assert "leave the textbook's" in record.refused["wrong"]
    assert record.workload["train_rows"] == 2_800


def test_the_textbook_is_measured_at_both_numbers_of_threads(job: ReviewJob) -> None:
    assert [arm.threads for arm in textbook_arms(job, 1, 4, 2)] == [1, 4]
    assert [arm.threads for arm in textbook_arms(job, 4, 4, 2)] == [4]


class FakePlace(commands.Place):
    """Commands whose times are made up."""

    def train(self, *options: str, data: Path | None = None) -> commands.Ran:
        return commands.Ran(2.0, 600.0, json.dumps({"epochs": 3, "test_accuracy": 90.0}))

    def textbook(self, epochs: int, threads: int) -> commands.Ran:
        return commands.Ran(50.0, 500.0, json.dumps({"epochs": 3, "test_accuracy": 91.0}))


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


def test_a_failed_command_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FasttrainError, match=r"exited with 1.*(?s:.*)no table"):
        commands.run_child("-c", "raise SystemExit('no table')", cache=tmp_path)


def test_peak_memory_below_the_parents_is_not_believed() -> None:
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    usage: Any = SimpleNamespace(ru_maxrss=2 * own)
    unit = 1 if sys.platform == "darwin" else 1024
    assert commands.peak_mb(usage) == pytest.approx(2 * own * unit / 1e6)
    with pytest.raises(DataError, match="hides"):
        commands.peak_mb(SimpleNamespace(ru_maxrss=own))  # pyright: ignore[reportArgumentType]


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
    plain_step = first_step.TrainStep.__call__
    assert first_step.main([str(tmp_path / "stepped_at"), *options]) == 0
    assert first_step.TrainStep.__call__ is plain_step
    assert float((tmp_path / "stepped_at").read_text()) <= (tmp_path / "run" / "summary.json").stat().st_mtime
