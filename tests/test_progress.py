"""What is shown while a fit runs, and how often."""

from __future__ import annotations

import io
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tqdm.std import tqdm

from fasttrain import progress
from fasttrain.history import EpochRow
from fasttrain.metrics import RunningMetrics
from fasttrain.progress import Progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and counts what is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[str] = []

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if text.strip():
            self.drawn.append(text)
        return super().write(text)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def bars_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Closes what a test leaves open: tqdm moves the bars of others down."""
    made: list[Progress] = []
    init = Progress.__init__

    def remember(self: Progress, *args: Any, **options: Any) -> None:
        made.append(self)
        init(self, *args, **options)

    monkeypatch.setattr(Progress, "__init__", remember)
    yield
    for each in made:
        each.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=clock))
    return clock


@pytest.fixture
def metrics() -> RunningMetrics:
    metrics = RunningMetrics(torch.device("cpu"))
    metrics.rule = "logit"
    metrics.update(torch.tensor(0.25), torch.tensor([1.0, 1.0, -1.0, 1.0]), torch.tensor([1.0, 0.0, 0.0, 1.0]))
    return metrics


def epoch_row(split: str, *, accuracy: float | None = 75.0) -> EpochRow:
    return EpochRow(
        epoch=2,
        split=split,  # type: ignore[arg-type]
        loss=0.123456,
        accuracy=accuracy,
        lr=0.0005,
        samples=800,
        seconds=0.5,
        samples_per_s=1600.0,
    )


def run_epoch(shown: Progress, clock: Clock, metrics: RunningMetrics, *, batches: int, batch_s: float) -> None:
    shown.begin(2, batches)
    begin = clock.now
    for number in range(1, batches + 1):
        clock.now += batch_s
        shown.batch(number, 8 * number, clock.now - begin, metrics)


def test_elsewhere_than_on_a_terminal_an_epoch_is_one_line(clock: Clock, metrics: RunningMetrics) -> None:
    stream = io.StringIO()
    shown = Progress(3, stream)
    run_epoch(shown, clock, metrics, batches=50, batch_s=0.3)
    assert stream.getvalue() == ""
    shown.end([epoch_row("train"), epoch_row("val")], is_best=True)
    assert stream.getvalue() == (
        "epoch 2/3: train loss 0.1235 accuracy 75.00%, val loss 0.1235 accuracy 75.00%, lr 0.0005, 1,600 samples/s *\n"
    )


def test_no_accuracy_and_no_best_epoch_are_left_out() -> None:
    stream = io.StringIO()
    Progress(3, stream).end([epoch_row("train", accuracy=None)], is_best=False)
    assert stream.getvalue() == "epoch 2/3: train loss 0.1235, lr 0.0005, 1,600 samples/s\n"


def test_the_default_stream_is_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    Progress(3).say("a line")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "a line\n")


def test_a_bar_tells_epoch_batches_loss_accuracy_and_speed(clock: Clock, metrics: RunningMetrics) -> None:
    stream = Terminal()
    shown = Progress(3, stream)
    run_epoch(shown, clock, metrics, batches=20, batch_s=0.3)  # the readout comes one interval late
    last = stream.drawn[-1]
    for part in ("epoch 2/3", "/20", "loss 0.2500", "accuracy 75.00%", "27 samples/s", "<"):
        assert part in last, last
    shown.close()


@pytest.mark.parametrize("batch_s", [1e-5, 1e-3, 0.04, 0.099])
def test_a_bar_is_drawn_five_times_a_second_at_most(batch_s: float, clock: Clock, metrics: RunningMetrics) -> None:
    stream = Terminal()
    shown = Progress(3, stream)
    seconds = 2.0 if batch_s > 1e-4 else 0.7
    run_epoch(shown, clock, metrics, batches=int(seconds / batch_s), batch_s=batch_s)
    first, *updates = stream.drawn
    assert " 0/" in first
    assert seconds * 3 - 1 <= len(updates) <= seconds * 5
    shown.close()


def test_a_bar_counts_the_batches_between_two_updates(clock: Clock, metrics: RunningMetrics) -> None:
    stream = Terminal()
    shown = Progress(3, stream)
    run_epoch(shown, clock, metrics, batches=10, batch_s=0.12)
    assert "10/10" in stream.drawn[-1]
    shown.close()


def test_batches_of_unknown_number_are_counted(clock: Clock, metrics: RunningMetrics) -> None:
    stream = Terminal()
    shown = Progress(3, stream)
    shown.begin(1, None)
    clock.now += 0.2
    shown.batch(7, 56, 0.2, metrics)
    assert "7 batches" in stream.drawn[-1]
    shown.close()


def test_the_bar_is_gone_before_the_line_of_its_epoch(clock: Clock, metrics: RunningMetrics) -> None:
    stream = Terminal()
    shown = Progress(3, stream)
    run_epoch(shown, clock, metrics, batches=5, batch_s=0.2)
    shown.end([epoch_row("train")], is_best=False)
    after_bar = stream.getvalue().rsplit("\r", 1)[1]
    assert after_bar == "epoch 2/3: train loss 0.1235 accuracy 75.00%, lr 0.0005, 1,600 samples/s\n"
    shown.close()


def test_short_epochs_share_the_five_updates_of_a_second(clock: Clock, metrics: RunningMetrics) -> None:
    stream = Terminal()
    shown = Progress(40, stream)
    run_epoch(shown, clock, metrics, batches=5, batch_s=0.1)
    before = len(stream.drawn)
    for _ in range(20):
        run_epoch(shown, clock, metrics, batches=5, batch_s=0.01)
        shown.end([epoch_row("train")], is_best=False)
    lines = [text for text in stream.drawn[before:] if "train loss" in text]
    bars = [text for text in stream.drawn[before:] if "batches" in text]
    assert len(lines) == 20
    assert 0 < len(bars) <= 10  # a second: five updates, of which each may draw the bar anew and then fill it


def test_a_later_epoch_has_a_bar_of_its_own(clock: Clock, metrics: RunningMetrics) -> None:
    stream = Terminal()
    shown = Progress(3, stream)
    for _ in range(2):
        run_epoch(shown, clock, metrics, batches=10, batch_s=0.2)
        shown.end([epoch_row("train")], is_best=False)
        assert any("10/10" in text and "40 samples/s" in text for text in stream.drawn)
        stream.drawn.clear()
    shown.close()


def test_no_thread_watches_a_bar(clock: Clock, metrics: RunningMetrics) -> None:
    shown = Progress(3, Terminal())
    run_epoch(shown, clock, metrics, batches=5, batch_s=0.2)
    assert "monitor" not in vars(progress._TerminalBar)  # where tqdm keeps the thread of a class, once it has one
    shown.close()


def test_a_notebook_has_its_own_bar_though_it_is_no_terminal(
    clock: Clock, metrics: RunningMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NotebookBar(tqdm):  # type: ignore[type-arg]
        monitor_interval = 0

    NotebookBar.__module__ = "tqdm.auto"  # as tqdm.auto's own class is, in a notebook only
    monkeypatch.setattr(progress, "notebook_or_terminal_tqdm", NotebookBar)
    stream = io.StringIO()
    shown = Progress(3, stream)
    run_epoch(shown, clock, metrics, batches=5, batch_s=0.2)
    assert "epoch 2/3" in stream.getvalue()
    shown.close()
