"""What a person sees while a fit runs: a bar on a terminal or in a notebook, a line an epoch elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Any, TextIO

from tqdm.auto import tqdm as notebook_or_terminal_tqdm
from tqdm.std import tqdm

from fasttrain.history import EpochRow
from fasttrain.metrics import RunningMetrics

__all__ = ["Progress"]

UPDATE_S = 0.2
"""Least time between two updates of a bar: five a second at most. Ten took over 1% of the fastest epochs."""


class Progress:
    """Shows a fit on stderr. Reads the running metrics late, so that showing them makes nothing wait.

    Args:
        epochs: how many the fit will run at most.
        stream: where to write.
    """

    def __init__(self, epochs: int, stream: TextIO | None = None) -> None:
        self._epochs = epochs
        self._stream: Any = _Lenient(stream or sys.stderr)
        self._bar_class = _bar_class(self._stream)
        self._bar: tqdm[Any] | None = None
        self._is_drawn = False  # in this epoch: short ones go by without, drawing would take 1% of them
        self._epoch = 0
        self._batches: int | None = None
        self._due = 0.0

    def begin(self, epoch: int, batches: int | None) -> None:
        """A training epoch (from 1) of so many batches (None: unknown) begins."""
        self._epoch, self._batches = epoch, batches
        self._is_drawn = False
        if self._bar is None:
            self._due = time.perf_counter() + UPDATE_S

    def batch(self, batches: int, samples: int, seconds: float, metrics: RunningMetrics) -> None:
        """So many batches and samples of the epoch are done, in so many seconds."""
        if self._bar_class is None or time.perf_counter() < self._due:
            return
        bar = self._bar_of_epoch(self._bar_class, seconds)
        readout = metrics.read_late()
        if readout is not None and readout.loss is not None:
            accuracy = "" if readout.accuracy is None else f", accuracy {readout.accuracy:.2f}%"
            bar.set_postfix_str(f"loss {readout.loss:.4f}{accuracy}, {samples / seconds:,.0f} samples/s", refresh=False)
        bar.update(batches - bar.n)
        self._due = time.perf_counter() + UPDATE_S

    def end(self, rows: list[EpochRow], *, is_best: bool) -> None:
        """The epoch is over; these are its lines of the history."""
        if self._bar is not None and self._is_drawn:
            self._bar.clear()
        parts = [f"{row.split} loss {row.loss:.4f}{_percent(row.accuracy)}" for row in rows]
        rate = f"lr {rows[0].lr:.3g}, {rows[0].samples_per_s:,.0f} samples/s"
        mark = " *" if is_best else ""
        self.say(f"epoch {rows[0].epoch}/{self._epochs}: {', '.join([*parts, rate])}{mark}")

    def say(self, line: str) -> None:
        """One plain line."""
        print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Takes the bar away, if there is one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _bar_of_epoch(self, bar_class: Any, seconds: float) -> tqdm[Any]:
        """The one bar for all epochs (making one takes as long as ten steps), this epoch being so many seconds old."""
        bar = self._bar
        if bar is None:
            bar = self._bar = bar_class(
                total=self._batches,
                desc=self._description,
                unit=" batches",
                file=self._stream,
                leave=False,
                dynamic_ncols=True,
                mininterval=0,
            )
        elif not self._is_drawn:
            bar.set_description(self._description, refresh=False)
            bar.reset(self._batches)
            bar.start_t -= seconds
        self._is_drawn = True
        return bar

    @property
    def _description(self) -> str:
        return f"epoch {self._epoch}/{self._epochs}"


def _percent(accuracy: float | None) -> str:
    return "" if accuracy is None else f" accuracy {accuracy:.2f}%"


class _Lenient:
    """A stream whose failed writes end nothing: a fit goes on when its log's disk is full or its terminal is gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, AttributeError):  # the latter: without a stderr at all, sys.stderr is None
            return len(text)

    def flush(self) -> None:
        with suppress(OSError, AttributeError):
            self._stream.flush()

    def isatty(self) -> bool:
        return getattr(self._stream, "isatty", bool)()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _TerminalBar(tqdm):  # pyright: ignore[reportMissingTypeArgument]
    monitor_interval = 0  # tqdm would otherwise leave a thread running


def _bar_class(stream: Any) -> Any:
    """The kind of bar that suits the stream, None for plain lines."""
    if notebook_or_terminal_tqdm.__module__ == "tqdm.auto":
        return notebook_or_terminal_tqdm
    return _TerminalBar if stream.isatty() else None
