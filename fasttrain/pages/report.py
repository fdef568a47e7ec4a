"""report.html: one run on one page, to be looked at and kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from fasttrain.pages.panels import History, training_panels
from fasttrain.pages.templates import template
from fasttrain.pages.values import (
    MISSING,
    as_duration,
    as_loss,
    as_percent,
    as_rate,
    as_text,
    written,
)
from fasttrain.receipt import TEXTBOOK, TUNED, Ratio, Receipt

__all__ = ["RunReport", "render_report"]

MOST_TABLE_ROWS = 100
# Heading, split, key and format of each column of the table of epochs.
COLUMNS: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
    ("train loss", "train", "loss", as_loss),
    ("val loss", "val", "loss", as_loss),
    ("train accuracy", "train", "accuracy", as_percent),
    ("val accuracy", "val", "accuracy", as_percent),
    ("lr", "train", "lr", "{:.4g}".format),
    ("seconds", "train", "seconds", "{:.3g}".format),
    ("samples/s", "train", "samples_per_s", as_rate),
)
# What the headline shows, and what has rows of its own: the environment table lists the rest.
SHOWN_ELSEWHERE = frozenset(
    "test_loss test_accuracy best_epoch epochs engine_reason samples_per_s total_s receipt versions".split()
)


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """What a run leaves behind, as plain data."""

    name: str
    """The run's name, which is also its folder's."""
    workload: str
    """What was trained, such as "reviews"."""
    summary: Mapping[str, object]
    """The content of summary.json; None, or an absent key, where there is no value."""
    config: Mapping[str, object]
    """The content of config.json."""
    history: Sequence[Mapping[str, object]]
    """The rows of history.csv: epoch, split ("train" or "val"), loss, accuracy, lr, samples, seconds,
    samples_per_s; numbers, or None where there is none, in order of epoch."""
    influential_words: Mapping[str, Sequence[tuple[str, float]]]
    """A heading, such as "positive", to its (word, weight) pairs, the strongest first; may be empty."""
    notes: Sequence[str]
    """What a reader must know before the numbers: generated data, an interruption, a skipped split."""
    command: str
    """The command line that repeats the run."""
    receipt: Receipt | None = None
    """What the run's loop was measured against; None where it was not measured."""


class _Fact(NamedTuple):
    label: str
    value: str
    unit: str = ""


class _Headline(NamedTuple):
    label: str
    value: str
    unit: str = ""
    is_number: bool = True


class _Row(NamedTuple):
    epoch: int
    cells: Sequence[str]
    is_best: bool


class _EpochTable(NamedTuple):
    title: str
    headings: Sequence[str]
    rows: Sequence[_Row]


class _PairTable(NamedTuple):
    title: str
    rows: Sequence[tuple[str, str]]


class _ReceiptRow(NamedTuple):
    name: str
    cells: Sequence[str]


class _Word(NamedTuple):
    text: str
    weight: str
    percent: float


class _WordGroup(NamedTuple):
    heading: str
    words: Sequence[_Word]


def render_report(report: RunReport) -> str:
    """Return the page of `report`: one HTML document that loads nothing; every text of the run is escaped."""
    history = History(report.history, report.summary.get("best_epoch"))
    return template("report.html").render(
        name=report.name,
        workload=report.workload,
        headline=_headline(report.summary),
        facts=_facts(report.summary),
        setup=_setup(report.summary),
        engine_reason=report.summary.get("engine_reason"),
        notes=report.notes,
        panels=training_panels(history),
        epochs=_epoch_table(history),
        words=_word_groups(report.influential_words),
        tables=_tables(report),
        receipt=report.receipt,
        receipt_rows=[] if report.receipt is None else _receipt_rows(report.receipt),
        command=report.command,
    )


def _headline(summary: Mapping[str, object]) -> _Headline:
    accuracy, loss = summary.get("test_accuracy"), summary.get("test_loss")
    if accuracy is not None:
        return _Headline("test accuracy", written(accuracy, "{:.2f}".format), "%")
    if loss is not None:
        return _Headline("test loss", written(loss, as_loss))
    return _Headline("test accuracy", "not tested", is_number=False)


def _facts(summary: Mapping[str, object]) -> list[_Fact]:
    epochs, samples_per_s = summary.get("epochs"), summary.get("samples_per_s")
    facts = [
        _Fact("best epoch", as_text(summary.get("best_epoch")), f"of {epochs}" if epochs else ""),
        _Fact("throughput", written(samples_per_s, as_rate), "" if samples_per_s is None else "samples/s"),
        _Fact("total time", written(summary.get("total_s"), as_duration)),
    ]
    if summary.get("test_accuracy") is None:  # then the headline is the loss, or there is neither
        return facts
    return [_Fact("test loss", written(summary.get("test_loss"), as_loss)), *facts]


def _setup(summary: Mapping[str, object]) -> str:
    engine, device, precision = (summary.get(key) for key in ("engine", "device", "precision"))
    parts = (engine and f"{engine} engine", device, precision)
    return " · ".join(str(part) for part in parts if part)


def _epoch_table(history: History) -> _EpochTable:
    shown = _thinned(history.epochs, history.best_epoch)
    title = "Every epoch in numbers"
    if len(shown) < len(history.epochs):
        title = f"{len(shown)} of {len(history.epochs)} epochs in numbers (history.csv holds them all)"
    columns = [
        {epoch: written(value, write) for epoch, value in history.points(split, key)}
        for _, split, key, write in COLUMNS
    ]
    rows = [
        _Row(epoch, [cells.get(epoch, MISSING) for cells in columns], epoch == history.best_epoch) for epoch in shown
    ]
    return _EpochTable(title, ["epoch", *(heading for heading, *_ in COLUMNS)], rows)


def _thinned(epochs: Sequence[int], best_epoch: int | None) -> list[int]:
    """Return at most MOST_TABLE_ROWS epochs, evenly spread, with the first, the last and the best."""
    if len(epochs) <= MOST_TABLE_ROWS:
        return list(epochs)
    places = MOST_TABLE_ROWS - 1
    chosen = {epochs[i * (len(epochs) - 1) // (places - 1)] for i in range(places)}
    return sorted(chosen | {best_epoch or epochs[0]})


def _tables(report: RunReport) -> list[_PairTable]:
    config = [(key, as_text(value)) for key, value in report.config.items()]
    environment = [(key, as_text(value)) for key, value in report.summary.items() if key not in SHOWN_ELSEWHERE]
    versions = cast("Mapping[str, object]", report.summary.get("versions") or {})
    environment += [(key, as_text(value)) for key, value in versions.items()]
    return [_PairTable("Configuration", config), _PairTable("Environment", environment)]


def _receipt_rows(receipt: Receipt) -> list[_ReceiptRow]:
    rows = [
        _ReceiptRow(
            name,
            (
                as_rate(arm.samples_per_s),
                *(_ratio_text(receipt.ratio(name, to)) for to in (TEXTBOOK, TUNED)),
                f"{arm.loss_difference:.1g}",
            ),
        )
        for name, arm in receipt.arms.items()
    ]
    return rows + [_ReceiptRow(f"{name}: {reason}", [MISSING] * 4) for name, reason in receipt.refused.items()]


def _ratio_text(ratio: Ratio | None) -> str:
    if ratio is None:
        return MISSING
    interval = "" if ratio.low is None else f" ({ratio.low:.3g}–{ratio.high:.3g})"
    return f"{ratio.speedup:.3g}×{interval}"


def _word_groups(words: Mapping[str, Sequence[tuple[str, float]]]) -> list[_WordGroup]:
    weights = [abs(weight) for pairs in words.values() for _, weight in pairs if math.isfinite(weight)]
    largest = max(weights, default=0.0) or 1.0
    return [
        _WordGroup(heading, [_word(text, weight, largest) for text, weight in pairs])
        for heading, pairs in words.items()
        if pairs
    ]


def _word(text: str, weight: float, largest: float) -> _Word:
    percent = 100 * abs(weight) / largest if math.isfinite(weight) else 0.0
    return _Word(text, written(weight, "{:+.2f}".format).replace("-", "−"), percent)
