"""The four charts of a training run: loss, accuracy, learning rate and throughput, by epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

from fasttrain.pages import charts
from fasttrain.pages.values import as_loss, as_number, as_percent, as_rate, written

__all__ = ["History", "Key", "Panel", "training_panels"]

# A loss that falls or explodes by more than this is drawn on a logarithmic axis.
LOG_LOSS_RATIO = 100
SPLITS = ("train", "val")


class Key(NamedTuple):
    """An entry of a legend, with the value that it stands for."""

    role: str
    label: str
    value: str


class Panel(NamedTuple):
    """A chart with what stands around it; the chart is None where there is nothing to draw."""

    title: str
    unit: str = ""
    when: str = ""
    keys: Sequence[Key] = ()
    chart: charts.Chart | None = None
    remarks: Sequence[str] = ()


class History:
    """The rows of history.csv by split, and the best epoch if it is among them.

    Args:
        rows: epoch, split ("train" or "val"), and numbers or None under loss, accuracy, lr and samples_per_s.
        best_epoch: the summary's value, counted from 1, or None.
    """

    def __init__(self, rows: Sequence[Mapping[str, object]], best_epoch: object) -> None:
        self.rows = {split: [row for row in rows if row["split"] == split] for split in SPLITS}
        self.epochs = sorted({cast(int, row["epoch"]) for row in rows})
        self.best_epoch = next((epoch for epoch in self.epochs if epoch == best_epoch), None)

    def points(self, split: str, key: str) -> list[tuple[int, float | None]]:
        """Return (epoch, value) of each row of `split`."""
        return [(cast(int, row["epoch"]), as_number(row[key])) for row in self.rows[split]]

    def drawable(self, key: str, splits: Sequence[str] = SPLITS) -> list[float]:
        """Return the values under `key` that a chart can show."""
        values = [value for split in splits for _, value in self.points(split, key)]
        return [value for value in values if value is not None and charts.is_drawable(value)]


def training_panels(history: History) -> list[Panel]:
    """Return the four charts, or none where no epoch was finished."""
    if not history.epochs:
        return []
    return [_loss_panel(history), _accuracy_panel(history), _lr_panel(history), _throughput_panel(history)]


def _loss_panel(history: History) -> Panel:
    remarks = [] if history.rows["val"] else ["No val split was evaluated: the curve is that of training."]
    remarks += [text for split in SPLITS if (text := _gap_remark(history, split))]
    axis = _axis(history.drawable("loss"), log_ratio=LOG_LOSS_RATIO)
    return _split_panel("Loss", "log scale" if axis and axis.is_log else "", history, as_loss, axis, remarks)


def _gap_remark(history: History, split: str) -> str:
    missing = [epoch for epoch, value in history.points(split, "loss") if not charts.is_drawable(value)]
    if not missing:
        return ""
    runs = [str(first) if first == last else f"{first}–{last}" for first, last in charts.runs_of(missing)]
    epochs = f"epoch {missing[0]}" if len(missing) == 1 else f"epochs {', '.join(runs)}"
    return f"The {split} loss was not a finite number in {epochs}: shown as a gap."


def _accuracy_panel(history: History) -> Panel:
    axis = _axis(history.drawable("accuracy"), ceiling=100)
    if axis is None:
        return Panel("Accuracy", remarks=["No accuracy was measured for this task."])
    return _split_panel("Accuracy", "%", history, as_percent, axis, [])


def _split_panel(
    title: str,
    unit: str,
    history: History,
    write: Callable[[float], str],
    axis: charts.Axis | None,
    remarks: Sequence[str],
) -> Panel:
    """Return the panel of a value that train and val both have, read off at the best or the last epoch."""
    points = {split: history.points(split, title.lower()) for split in SPLITS if history.rows[split]}
    epoch = history.best_epoch or history.epochs[-1]
    keys = [Key(split, split, written(dict(values).get(epoch), write)) for split, values in points.items()]
    series = [charts.Series(split, values) for split, values in points.items()]
    chart = charts.draw(series, axis, best_epoch=history.best_epoch) if axis else None
    return Panel(title, unit, f"epoch {epoch}", keys, chart, remarks)


def _lr_panel(history: History) -> Panel:
    values = history.drawable("lr", ["train"])
    axis = _axis(values, log_ratio=1, from_zero=True)
    if axis is None:
        return Panel("Learning rate", remarks=["It was not recorded."])
    chart = charts.draw([charts.Series("single", history.points("train", "lr"), "step")], axis)
    keys = [Key("single", "last", f"{values[-1]:.4g}")]
    return Panel("Learning rate", "log scale" if axis.is_log else "", "", keys, chart)


def _throughput_panel(history: History) -> Panel:
    values = history.drawable("samples_per_s", ["train"])
    axis = _axis(values, from_zero=True)
    if axis is None:
        return Panel("Throughput", remarks=["It was not recorded."])
    series = charts.Series("single", history.points("train", "samples_per_s"), "step", is_filled=True)
    keys = [Key("single", "median", as_rate(sorted(values)[len(values) // 2]))]
    return Panel("Throughput", "training samples/s", "", keys, charts.draw([series], axis))


def _axis(
    values: Sequence[float],
    *,
    log_ratio: float = math.inf,
    from_zero: bool = False,
    ceiling: float | None = None,
) -> charts.Axis | None:
    """Return an axis around `values`, logarithmic if they spread beyond `log_ratio`; None without any."""
    if not values:
        return None
    if min(values) >= charts.SMALLEST and max(values) > log_ratio * min(values):
        return charts.log_axis(values)
    return charts.linear_axis(values, from_zero=from_zero, ceiling=ceiling)
