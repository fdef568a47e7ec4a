"""The receipt: what is timed, against what, and what is not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from fasttrain.cli import main
from fasttrain.commands import train
from fasttrain.errors import EngineError
from fasttrain.measure.bench.arm import CHECKED_STEPS
from fasttrain.measure.verdict.receipt import make_receipt, measure_rounds, receipt_of
from fasttrain.receipt import Receipt
from fasttrain.run.config import TrainConfig
from fasttrain.workloads.generate import generate_reviews
from tests.commands import small, strict_json
from tests.pages.browser import Page


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeArm:
    """Each step takes `step_s` of the clock, and loses `loss`."""

    def __init__(self, clock: Clock, step_s: float, loss: float = 0.5) -> None:
        self._clock = clock
        self._step_s = step_s
        self._losses: list[float] = []
        self._loss = loss
        self.num_syncs = 0

    def step(self) -> None:
        self._clock.now += self._step_s
        self._losses.append(self._loss)

    def sync(self) -> None:
        self.num_syncs += 1

    def losses(self) -> list[float]:
        return self._losses[:CHECKED_STEPS]


def refuse() -> FakeArm:
    raise EngineError("it would take 80 GiB")


def receipt(clock: Clock, **makers: Callable[[], FakeArm]) -> Receipt:
    names = {"tuned_eager": "tuned eager", "auto_fp32": "auto, fp32", "auto_bf16": "auto, bf16"}
    loops = {names.get(name, name): make for name, make in makers.items()}
    return make_receipt(loops, batch_size=100, tolerance=1e-5, round_s=0.01, clock=clock)


def test_a_receipt_tells_how_many_times_faster() -> None:
    clock = Clock()
    made = receipt(
        clock,
        textbook=lambda: FakeArm(clock, 1e-2),
        tuned_eager=lambda: FakeArm(clock, 1e-3),
        auto_fp32=lambda: FakeArm(clock, 1e-4, loss=0.5 * (1 + 1e-6)),
        auto_bf16=lambda: FakeArm(clock, 5e-5, loss=0.51),
    )
    ratios = {(each.arm, each.to): round(each.speedup, 3) for each in made.ratios}
    assert ratios == {
        ("tuned eager", "textbook"): 10,
        ("auto, fp32", "textbook"): 100,
        ("auto, bf16", "textbook"): 200,
        ("auto, fp32", "tuned eager"): 10,
        ("auto, bf16", "tuned eager"): 20,
    }
    ends = [end / each.speedup for each in made.ratios for end in (each.low, each.high) if end is not None]
    assert ends == pytest.approx([1.0] * 2 * len(made.ratios)), "every round is alike"
    assert made.arms["textbook"].samples_per_s == pytest.approx(1e4)
    assert made.arms["auto, fp32"].loss_difference == pytest.approx(1e-6)
    assert made.arms["auto, bf16"].loss_difference == pytest.approx(0.02)
    assert [arm.is_at_equal_precision for arm in made.arms.values()] == [True, True, True, False]
    assert not made.refused
    assert made.rounds == 10


def test_losses_that_leave_the_textbooks_are_not_timed() -> None:
    clock = Clock()
    made = receipt(
        clock,
        textbook=lambda: FakeArm(clock, 1e-2),
        tuned_eager=refuse,
        auto_fp32=lambda: FakeArm(clock, 1e-4, loss=0.51),
    )
    assert list(made.arms) == ["textbook"]
    assert made.ratios == []
    assert made.refused["tuned eager"] == "it would take 80 GiB"
    assert "its losses leave the reference's" in made.refused["auto, fp32"]


def test_without_the_textbook_there_is_no_receipt() -> None:
    clock = Clock()

    def never() -> FakeArm:
        raise AssertionError("there is nothing to compare it with")

    made = receipt(clock, textbook=refuse, tuned_eager=never, auto_fp32=never)
    assert made.refused == {"textbook": "it would take 80 GiB"}
    assert (made.arms, made.ratios, made.rounds) == ({}, [], 0)


def test_rounds_alternate_and_the_first_does_not_count() -> None:
    clock = Clock()
    arms = {"a": FakeArm(clock, 0.25), "b": FakeArm(clock, 0.5)}
    seconds = measure_rounds(arms, rounds=3, round_s=1.0, clock=clock)
    assert seconds == {"a": [0.25] * 3, "b": [0.5] * 3}
    assert arms["a"].num_syncs == arms["b"].num_syncs == 4
    assert clock.now == pytest.approx(8.0)


@pytest.fixture
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasttrain.measure.bench.arms.PASS_S", 0.01)
    monkeypatch.setattr("fasttrain.measure.bench.arms.EPOCH_S", 0.01)
    monkeypatch.setattr("fasttrain.commands.train.receipt_of", partial(receipt_of, round_s=0.01))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.csv"
    generate_reviews(400, seed=1).table.to_csv(path, index=False)
    return path


@pytest.mark.usefixtures("short_rounds")
@pytest.mark.parametrize("suffix", [".csv", ".CSV.GZ", ".PARQUET"])
def test_the_loops_of_a_run_agree_on_its_own_data(data: Path, suffix: str) -> None:
    table, data = pd.read_csv(data), data.with_suffix(suffix)
    if suffix == ".PARQUET":
        table.to_parquet(data)
    else:
        table.to_csv(data, index=False)
    config = TrainConfig(data=data, cutoff=3, batch_size=16, learning_rate=0.01, device="cpu", cache=False)
    made = receipt_of(config, engine="eager", precision="bf16", round_s=0.01)
    assert {"textbook", "tuned eager", "eager, fp32"} <= set(made.arms), made.refused
    assert made.arms["eager, fp32"].loss_difference < 1e-5
    if "eager, bf16" not in made.arms:  # a processor without units for it
        assert "no bf16 units" in made.refused["eager, bf16"]
    else:
        assert made.arms["eager, bf16"].loss_difference < 0.1
        assert not made.arms["eager, bf16"].is_at_equal_precision
    assert made.threads == torch.get_num_threads()


@pytest.mark.usefixtures("short_rounds")
def test_the_textbooks_loop_trains_on_the_reviews_as_the_run_cleaned_them(data: Path) -> None:
    table = pd.read_csv(data)
    table["review"] = table["review"].str.upper().str.replace(" .", ".") + "好吃"
    table.to_csv(data, index=False)
    config = TrainConfig(data=data, cutoff=3, batch_size=16, learning_rate=0.01, device="cpu", cache=False)
    made = receipt_of(config, engine="eager", precision="fp32", round_s=0.01)
    assert made.refused == {}
    assert made.arms["eager, fp32"].loss_difference < 1e-5


@pytest.mark.usefixtures("short_rounds")
def test_train_leaves_its_receipt(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(small(data, run, "--epochs", "1", "--receipt", "--json")) == 0
    document = strict_json(capsys.readouterr().out)
    stored = strict_json((run / "summary.json").read_text())
    assert stored["receipt"] == document["receipt"]
    assert list(stored["receipt"]["arms"]) == ["textbook", "tuned eager", "eager, fp32"]
    assert {(each["arm"], each["to"]) for each in stored["receipt"]["ratios"]} >= {("eager, fp32", "textbook")}
    texts = Page((run / "report.html").read_text(encoding="utf-8")).texts
    assert {"Receipt", "tuned eager", "eager, fp32"} <= set(texts)


@pytest.mark.usefixtures("short_rounds")
def test_a_table_that_the_textbook_cannot_take_costs_the_receipt_alone(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run = data.with_suffix(".parquet"), tmp_path / "run"
    table = pd.read_csv(data)
    table.loc[0, "review"] = None  # pandas fills no gap in a column of categories
    table.astype({"review": "category"}).to_parquet(path)
    assert main(small(path, run, "--epochs", "1", "--receipt")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"  textbook: not timed: {path}: the textbook cannot take it: ") for line in lines)
    stored = strict_json((run / "summary.json").read_text())
    assert list(stored["receipt"]["refused"]) == ["textbook"]
    assert stored["receipt"]["arms"] == {}


@pytest.mark.usefixtures("short_rounds")
@pytest.mark.parametrize("name", ["summary.json", "report.html"])
def test_a_receipt_that_cannot_be_written_is_a_note(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, measure = tmp_path / "run", train.receipt_of

    def then_blocked(*given: Any, **options: Any) -> Receipt:
        (run / name).unlink()
        (run / name).mkdir()  # no file can take its place
        return measure(*given, **options)

    monkeypatch.setattr(train, "receipt_of", then_blocked)
    assert main(small(data, run, "--epochs", "1", "--receipt")) == 0
    out = capsys.readouterr().out
    assert (
        f"note: The run is complete, but the receipt is not in all of its files: {run / name} cannot be written" in out
    )
    assert "receipt: 10 alternating rounds" in out


def test_a_receipt_that_cannot_be_measured_is_a_note(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def of_a_lost_table(config: TrainConfig, **options: Any) -> Receipt:
        data.unlink()
        return receipt_of(config, **options)

    monkeypatch.setattr(train, "receipt_of", of_a_lost_table)
    assert main(small(data, tmp_path / "run", "--epochs", "1", "--receipt", "--json", "--no-cache")) == 0
    document = strict_json(capsys.readouterr().out)
    assert document["notes"][-1].startswith("The run is complete, but it has no receipt: ")
    assert str(data) in document["notes"][-1]
    assert document["receipt"] is None
