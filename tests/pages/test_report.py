from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.pages.report import RunReport, render_report
from fasttrain.receipt import Ratio, Receipt, ReceiptArm
from tests.pages.browser import HOSTILE, Page, check_loads_nothing, opened_in_chromium

SUMMARY: dict[str, object] = {
    "test_loss": 0.14123,
    "test_accuracy": 95.5268,
    "best_epoch": 2,
    "epochs": 3,
    "engine": "compiled",
    "engine_reason": "measured 1.31x faster than eager",
    "device": "cpu",
    "precision": "fp32",
    "samples_per_s": 1_243_876.4,
    "compile_s": 5.81,
    "total_s": 83.2,
    "vocabulary_size": 5317,
    "data_sha256": "9f2c41e7",
    "versions": {"torch": "2.13.0", "python": "3.11.7"},
}


def row(epoch: int, split: str, **values: float | None) -> dict[str, object]:
    defaults = {"loss": 1 / epoch, "accuracy": 90.0 + epoch / 100, "lr": 1e-3, "samples": 128}
    return {"epoch": epoch, "split": split, **defaults, "seconds": 0.1, "samples_per_s": 1280.0, **values}


def history(num_epochs: int, splits: tuple[str, ...] = ("train", "val")) -> list[dict[str, object]]:
    return [row(epoch, split) for epoch in range(1, num_epochs + 1) for split in splits]


def report(**changes: Any) -> RunReport:
    fields: dict[str, Any] = {
        "name": "2025-11-22-reviews",
        "workload": "reviews",
        "summary": SUMMARY,
        "config": {"batch_size": 128, "learning_rate": 0.001},
        "history": history(3),
        "influential_words": {"positive": [("delicious", 2.0), ("gem", 1.0)], "negative": [("bland", -1.5)]},
        "notes": [],
        "command": "python -m fasttrain train --seed 1337",
    }
    return RunReport(**{**fields, **changes})


def page(**changes: Any) -> Page:
    return Page(render_report(report(**changes)))


def test_the_headline_says_what_was_reached() -> None:
    texts = page().texts
    for expected in ("2025-11-22-reviews", "95.53", "0.1412", "of 3", "1.24M", "1 min 23 s"):
        assert expected in texts
    assert "compiled engine · cpu · fp32" in texts
    assert "· measured 1.31x faster than eager" in texts


def test_every_part_is_there() -> None:
    shown = page(notes=["The reviews are generated."])
    for expected in (
        "The reviews are generated.",
        "Loss",
        "Accuracy",
        "Learning rate",
        "Throughput",
        "best: 2",
    ):
        assert expected in shown.texts
    for expected in ("delicious", "+2.00", "bland", "−1.50", "batch_size", "128", "torch", "2.13.0", "5317"):
        assert expected in shown.texts
    assert "python -m fasttrain train --seed 1337" in shown.texts
    assert shown.count("svg") == 4
    assert sum(attributes.get("class") == "ring" for _, attributes in shown.tags) == 2
    assert {role: len(paths) for role, paths in shown.curves().items()} == {"train": 2, "val": 2, "single": 2}


def test_word_bars_share_one_scale() -> None:
    bars = [attributes["style"] for tag, attributes in page().tags if attributes.get("class") == "bar"]
    assert bars == ["width:100.0%", "width:50.0%", "width:75.0%"]


def test_the_page_loads_nothing() -> None:
    html = render_report(report(notes=["see https://example.org"], history=history(30)))
    check_loads_nothing(html)
    assert html.count("://") == 1, "the note's"


def test_every_text_is_escaped() -> None:
    shown = page(
        name=HOSTILE,
        workload=HOSTILE,
        summary={**SUMMARY, "engine": HOSTILE, "engine_reason": HOSTILE, "versions": {HOSTILE: HOSTILE}},
        config={HOSTILE: HOSTILE},
        influential_words={HOSTILE: [(HOSTILE, 1.0)]},
        notes=[HOSTILE],
        command=HOSTILE,
    )
    assert shown.count("img") == shown.count("script") == 0
    # title, workload, name, engine (twice), reason, versions (2), config (2), heading, word, note, command
    assert sum(HOSTILE in text for text in shown.texts) == 14
    assert [a["title"] for _, a in shown.tags if "title" in a] == [HOSTILE]


def test_words_of_any_script() -> None:
    words = ["美味しい", "ممتاز", "नमस्ते", "очень", "x" * 500]
    shown = page(influential_words={"5 星": [(word, 1.0) for word in words]})
    assert {*words, "5 星"} <= set(shown.texts)


def test_without_words_there_is_no_such_section() -> None:
    assert "Most influential words" in page().texts
    for words in ({}, {"positive": []}):
        assert "Most influential words" not in page(influential_words=words).texts


def test_one_epoch_is_a_dot() -> None:
    shown = page(history=history(1), summary={**SUMMARY, "best_epoch": 1})
    for path in shown.curves()["val"]:
        assert re.fullmatch(r"M500\.0 [\d.]+h0", path)


def test_no_epoch() -> None:
    shown = page(history=[], summary=dict.fromkeys(SUMMARY), influential_words={})
    assert "No epoch was finished, so there is nothing to draw." in shown.texts
    assert "not tested" in shown.texts
    assert "samples/s" not in shown.texts
    assert shown.count("svg") == 0


def test_an_empty_summary_reads_as_unknown() -> None:
    assert page(summary={}).texts.count("–") >= 3


def test_no_val_split() -> None:
    shown = page(history=history(3, ("train",)), summary={**SUMMARY, "best_epoch": None})
    assert "No val split was evaluated: the curve is that of training." in shown.texts
    assert "val" not in shown.curves()
    assert not [text for text in shown.texts if text.startswith("best:")]


def test_no_accuracy_leads_with_the_loss() -> None:
    rows = [row(epoch, split, accuracy=None) for epoch in (1, 2) for split in ("train", "val")]
    shown = page(history=rows, summary={**SUMMARY, "test_accuracy": None})
    assert "No accuracy was measured for this task." in shown.texts
    assert shown.texts.count("0.1412") == 1
    assert shown.count("svg") == 3


def test_losses_that_are_not_finite_are_gaps_and_are_said() -> None:
    losses = [1.0, math.nan, math.inf, 2.0, -math.inf, 3.0]
    rows = [row(epoch, "train", loss=loss) for epoch, loss in enumerate(losses, 1)] + [row(2, "val", loss=math.nan)]
    shown = page(history=rows, summary={**SUMMARY, "test_accuracy": None, "test_loss": math.nan})
    assert shown.curves()["train"][0].count("M") == 3
    assert "The train loss was not a finite number in epochs 2–3, 5: shown as a gap." in shown.texts
    assert "The val loss was not a finite number in epoch 2: shown as a gap." in shown.texts
    assert {"NaN", "∞", "−∞"} <= set(shown.texts)


def test_no_finite_loss_at_all() -> None:
    shown = page(history=[row(1, "train", loss=math.nan)], summary={**SUMMARY, "best_epoch": None})
    assert "The train loss was not a finite number in epoch 1: shown as a gap." in shown.texts
    assert shown.count("svg") == 3


def test_axes_turn_logarithmic_where_values_ask_for_it() -> None:
    assert "log scale" not in page().texts
    assert page(history=[row(1, "train", lr=1e-3), row(2, "train", lr=5e-4)]).texts.count("log scale") == 1
    assert page(history=[row(1, "train", loss=0.5), row(2, "train", loss=5e8)]).texts.count("log scale") == 1


def test_every_epoch_is_in_the_table_and_the_best_is_marked() -> None:
    shown = page(history=history(100))
    assert "Every epoch in numbers" in shown.texts
    assert {"train loss", "val accuracy", "samples/s", "90.50%", "0.0200", "1.28k"} <= set(shown.texts)
    assert sum(a.get("scope") == "row" and "class" not in a for _, a in shown.tags) == 100
    assert sum(a.get("class") == "is-best" for _, a in shown.tags) == 1


def test_hundreds_of_epochs_stay_small_and_keep_first_last_and_best() -> None:
    html = render_report(report(history=history(999), summary={**SUMMARY, "best_epoch": 777}))
    assert len(html.encode()) < 300_000
    epochs = [int(epoch) for epoch in re.findall(r'<tr[^>]*><th scope="row">(\d+)</th>', html)]
    assert len(epochs) <= 100
    assert {1, 777, 999} <= set(epochs)
    assert f"{len(epochs)} of 999 epochs in numbers (history.csv holds them all)" in Page(html).texts


def test_the_same_run_gives_the_same_page() -> None:
    assert render_report(report()) == render_report(report())


anything = st.none() | st.floats()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from(["train", "val"]), anything, anything, anything, anything), max_size=8),
    st.none() | st.integers(-1, 9),
    anything,
    st.text(max_size=20),
)
def test_any_numbers_make_a_page_within_its_charts(
    rows: list[tuple[str, Any, Any, Any, Any]], best_epoch: int | None, test_loss: float | None, text: str
) -> None:
    made = [
        row(i // 2 + 1, split, loss=loss, accuracy=accuracy, lr=lr, samples_per_s=rate)
        for i, (split, loss, accuracy, lr, rate) in enumerate(rows)
    ]
    summary = {**SUMMARY, "best_epoch": best_epoch, "test_loss": test_loss}
    shown = page(history=made, summary=summary, notes=[text], influential_words={"a": [(text, test_loss or 0.0)]})
    for path in (path for paths in shown.curves().values() for path in paths):
        numbers = [float(number) for number in re.findall(r"-?[\w.]+", re.sub(r"[ML]", " ", path.replace("h0", "")))]
        assert all(-0.1 <= number <= 1000.1 for number in numbers)


def test_a_browser_opens_it(tmp_path: Path) -> None:
    shown = opened_in_chromium(render_report(report(notes=[HOSTILE])), tmp_path)
    assert {"95.53", "delicious", HOSTILE} <= set(shown.texts)
    assert shown.count("svg") == 4
    assert shown.count("img") == 0


def test_the_receipt() -> None:
    arms = {
        "textbook": ReceiptArm(samples_per_s=5000.0, loss_difference=0.0, is_at_equal_precision=True),
        "compiled, fp32": ReceiptArm(samples_per_s=1e6, loss_difference=3e-7, is_at_equal_precision=True),
    }
    ratio = Ratio(arm="compiled, fp32", to="textbook", speedup=200.0, low=190.0, high=211.5)
    receipt = Receipt(arms=arms, ratios=[ratio], refused={HOSTILE: "no memory"}, rounds=10, threads=1)
    assert "Receipt" not in page().texts
    shown = page(receipt=receipt)
    for expected in ("Receipt", "compiled, fp32", "1.00M", "200× (190–212)", "3e-07", f"{HOSTILE}: no memory"):
        assert expected in shown.texts
