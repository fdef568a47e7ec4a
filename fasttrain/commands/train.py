"""`train`: the review classifier, from a table to a run folder."""

from __future__ import annotations

import signal
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import FrameType

import tyro

from fasttrain.commands.process import set_up_process
from fasttrain.commands.shared import EXIT_INTERRUPTED, print_json, print_line, recorded_command
from fasttrain.errors import ConfigError, FasttrainError, RunError
from fasttrain.loop import Interrupted
from fasttrain.measure.verdict.receipt import receipt_of
from fasttrain.pages.report import render_report
from fasttrain.receipt import TEXTBOOK, TUNED, Receipt
from fasttrain.run.config import TrainConfig
from fasttrain.run.folder import RunFolder
from fasttrain.workloads.reviews import ReviewsOutcome, train_reviews

__all__ = ["Train"]

END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, what service managers and job schedulers send, and the end of the terminal."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train the review classifier; leaves a run folder with model, history and report.

    Reviews come from a table with the columns rating, review and split (train, val, test), or are generated.
    """

    config: tyro.conf.OmitArgPrefixes[TrainConfig]

    resume: Path | None = None
    """Go on with an earlier run, in its folder, from its last checkpoint; a run without one starts over. Options are
    the run's; --epochs may raise its limit, and --data may give the same table under another path."""

    receipt: bool = False
    """Measure afterwards, for some seconds each, the textbook's loop, a tuned one and this run's own on the same data,
    and tell how many times faster it was."""

    json: bool = False
    """Print one JSON document on stdout."""

    debug: bool = False
    """Show the traceback of an error."""

    def execute(self, arguments: list[str]) -> int:
        """Trains; returns the exit code."""
        config = self.config if self.resume is None else _resumed(self.resume, arguments)
        set_up_process(config)
        with _first_signal_ends_cleanly() as interrupt:
            outcome = train_reviews(
                config,
                resume=self.resume,
                check_interrupt=interrupt.check,
                command=recorded_command(arguments),
            )
        receipt = None
        if self.receipt and outcome.summary["stopped"] != "interrupted":
            receipt, notes = _receipt(config, outcome)
            outcome = replace(outcome, notes=(*outcome.notes, *notes))
        if self.json:
            told = {} if receipt is None else {"receipt": receipt.to_dict()}
            print_json({"run": str(outcome.path), "notes": outcome.notes, **outcome.summary, **told})
        else:
            _print_outcome(outcome)
            for line in [] if receipt is None else _receipt_lines(receipt):
                print_line(line)
        return EXIT_INTERRUPTED if outcome.summary["stopped"] == "interrupted" else 0


def _resumed(run: Path, arguments: list[str]) -> TrainConfig:
    """The run's own options, with what may change: the limit of epochs, and where the same table is.

    The arguments are read again with the run's options as defaults: what differs then was given.

    Raises:
        ConfigError: another option was given that differs from the run's.
        RunError: the folder is not a run's.
    """
    # A run of a version without the option was trained on reviews as they are.
    stored = TrainConfig.from_dict({"clean": "none", **RunFolder.open(run).read_config()})
    options = arguments[1:] if arguments[0] == "train" else arguments
    given = tyro.cli(Train, args=options, default=Train(config=stored)).config
    for option in fields(TrainConfig):
        value, kept = getattr(given, option.name), getattr(stored, option.name)
        if option.name not in ("epochs", "data") and value != kept:
            raise ConfigError(
                f"--{option.name.replace('_', '-')} {value}: {run} was trained with {kept}; "
                "a resumed run keeps its options, only --epochs and the path of --data may change"
            )
    return given


class _Interrupt:
    """Turns the first signal during training into a clean end after the current step."""

    def __init__(self) -> None:
        self._is_training = False
        self._is_wanted = False

    def check(self) -> None:
        """Called after every step."""
        self._is_training = True
        if self._is_wanted:
            raise Interrupted

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """The handler of `END_SIGNALS`. A second Ctrl-C ends the run without saving; the others often come twice."""
        if not self._is_training or (self._is_wanted and number == signal.SIGINT):
            raise KeyboardInterrupt
        self._is_wanted = True


@contextmanager
def _first_signal_ends_cleanly() -> Generator[_Interrupt]:
    """Handles `END_SIGNALS`, except those that are ignored, as SIGHUP is under nohup."""
    interrupt = _Interrupt()
    handled = [number for number in END_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt.handle) for number in handled}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _receipt(config: TrainConfig, outcome: ReviewsOutcome) -> tuple[Receipt | None, tuple[str, ...]]:
    """Measures, and adds the receipt to summary.json and to the report. The run is complete without it.

    What prevents it, such as a table that is gone or a full disk, becomes a note.
    """
    try:
        receipt = receipt_of(config, engine=outcome.summary["engine"], precision=outcome.summary["precision"])
    except FasttrainError as error:
        return None, (f"The run is complete, but it has no receipt: {error}.",)
    try:
        folder = RunFolder.open(outcome.path)
        folder.write_json("summary.json", {**outcome.summary, "receipt": receipt.to_dict()})
        folder.write_text("report.html", render_report(replace(outcome.report, receipt=receipt)))
    except RunError as error:
        return receipt, (f"The run is complete, but the receipt is not in all of its files: {error}.",)
    return receipt, ()


def _receipt_lines(receipt: Receipt) -> list[str]:
    lines = [f"receipt: {receipt.rounds} alternating rounds in this process, {receipt.threads} thread(s)"]
    for name, arm in receipt.arms.items():
        parts = [f"{arm.samples_per_s:,.0f} samples/s"]
        for to in (TEXTBOOK, TUNED):
            ratio = receipt.ratio(name, to)
            if ratio is not None:
                interval = "" if ratio.low is None else f" ({ratio.low:.3g} to {ratio.high:.3g})"
                parts.append(f"{ratio.speedup:.3g} times {to}{interval}")
        if name != TEXTBOOK:
            parts.append(f"losses within {arm.loss_difference:.1g} of the textbook's")
        lines.append(f"  {name}: {', '.join(parts)}")
    return lines + [f"  {name}: not timed: {reason}" for name, reason in receipt.refused.items()]


def _print_outcome(outcome: ReviewsOutcome) -> None:
    summary = outcome.summary
    if summary["test_loss"] is not None:
        print_line(f"test loss {summary['test_loss']:.4f}, test accuracy {summary['test_accuracy']:.2f}%")
    if summary["best_epoch"] is not None:
        rate = f"{summary['samples_per_s']:,.0f} samples/s"
        print_line(f"best epoch {summary['best_epoch']} of {summary['epochs']}, {rate}")
    for rating, words in outcome.influential_words.items():
        print_line(f"{rating}: {' '.join(word for word, _ in words)}")
    for note in outcome.notes:
        print_line(f"note: {note}")
    print_line(f"clean {summary['clean']}: {summary['clean_reason']}")
    print_line(f"threads {summary['threads']}: {summary['threads_reason']}")
    print_line(f"engine {summary['engine']}: {summary['engine_reason']}")
    print_line(f"run: {outcome.path} (open {outcome.path / 'report.html'})")
