"""Tables of a benchmark say what its record says, and nothing in them does any harm."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.measure.bench.summary import (
    command,
    conditions,
    fastest,
    markdown,
    notes,
    num_blocks,
    number,
    summarise,
    terminal,
    text,
)
from fasttrain.measure.verdict.stats import Noise
from tests.measure.bench.bench_fakes import arm, figures, record

TEXTBOOK = arm(4e-3, 2e-3)
COMPILED = arm(
    blocks=(
        figures(0, 1e-3, compile_s=30.0, repeats=1, engine="compiled: asked for"),
        figures(1, 1e-3, compile_s=0.5, flags=("load",), engine="compiled: asked for"),
    ),
    repeated=(figures(0, 9.0, compile_s=30.0, flags=("load",)),),
)


def test_ratios_are_formed_within_blocks() -> None:
    textbook, compiled = summarise(record({"textbook": TEXTBOOK, "compiled": COMPILED}))
    ratio = compiled.ratios["textbook"]
    assert (ratio.low, ratio.median, ratio.high, ratio.count) == pytest.approx((2.0, 3.0, 4.0, 2))
    assert textbook.ratios["textbook"].median == pytest.approx(1.0)
    assert compiled.rate.median == pytest.approx(128 / 1e-3)
    assert (compiled.first_compile_s, compiled.warm_compile_s) == (30.0, 0.5)
    assert (textbook.first_compile_s, textbook.warm_compile_s) == (None, None)


def test_costs_that_most_turns_do_not_meet_are_told() -> None:
    dear = arm(blocks=(figures(0, 1e-3, seconds=0.121), figures(1, 1e-3, seconds=0.125)))
    found = record({"textbook": TEXTBOOK, "eager": arm(1e-3, 1e-3), "dear": dear})
    told = [note for note in notes(found) if "longer in all" in note]
    assert len(told) == 1
    assert told[0].startswith("dear: its steps took 23% longer in all than this tells (median of the other arms: 0%)")
    of_two = notes(record({"eager": arm(1e-3, 1e-3), "dear": arm(blocks=(figures(0, 1e-3, seconds=0.112),))}))
    assert len([note for note in of_two if note.startswith("dear: its steps took 12% longer")]) == 1


def test_the_yardstick_is_the_fastest_of_its_kind() -> None:
    found = record(
        {
            "textbook": TEXTBOOK,
            "textbook, 4 threads": arm(1e-3, 1e-3),
            "jax-scan": arm(9.0, 9.0),
            "jax-step": arm(1.0, 1.0),
            "textbooks": arm(1e-6),
        }
    )
    assert fastest(found, "textbook") == "textbook, 4 threads"
    assert fastest(found, "jax") == "jax-step"
    assert fastest(found, "tuned") is None


def test_a_table_tells_all_that_is_known() -> None:
    noise = Noise(floor=0.02, smallest_effect=0.05, pairs=10)
    found = record({"textbook": TEXTBOOK, "compiled": COMPILED}, refused={"jax": "not installed"}, noise=noise)
    for shown in (terminal(found), markdown(found, "A title")):
        assert "3.00x (2.00 to 4.00)" in shown
        assert "30.0, 0.500" in shown
        assert "not timed: jax: not installed" in shown
        assert "compiled: ran compiled: asked for" in shown
        assert "of 4 timings, flagged all the same after repeats: 1 under 'load'; blocks with repeats: 1 of 2" in shown
        assert "on this machine: noise floor 2.0%, smallest detectable effect 5.0% (10 pairs)" in shown
        assert "A CPU, 4 cores; torch 2.13.0" in shown
        assert "2 blocks, arms in turn, 50 ms each, 1 s a block, threads 1." in shown
    assert markdown(found, "A title").startswith("## A title\n\n| arm | samples/s |")


def test_blocks_are_counted_whatever_the_number_of_arms() -> None:
    blocks = (figures(0, 1e-3, repeats=2), figures(1, 1e-3, repeats=1), figures(2, 1e-3))
    repeated = tuple(figures(0, 9.0, repeats=repeats) for repeats in range(2))
    arms = {f"arm {number}": arm(blocks=blocks, repeated=repeated) for number in range(13)}
    assert [note for note in notes(record(arms)) if "repeats" in note] == [
        "of 39 timings, flagged all the same after repeats: none; blocks with repeats: 2 of 3"
    ]


@pytest.mark.parametrize(
    ("planned", "is_extended", "measured", "told"),
    [
        (3, False, 3, "; 3 blocks, arms"),
        (3, False, 2, "; 2 of 3 blocks, arms"),
        (15, True, 20, "; 20 blocks, extended once from 15, arms"),
    ],
)
def test_the_blocks_that_were_measured_are_told(planned: int, is_extended: bool, measured: int, told: str) -> None:
    found = record({"short": arm(1e-3), "eager": arm(*[1e-3] * measured)})
    found = replace(found, design=replace(found.design, blocks=planned, extended=is_extended))
    assert num_blocks(found) == measured
    assert told in conditions(found)


def test_all_that_ran_the_steps_is_told() -> None:
    said = ["compiled: 9 us", "eager: not faster: 8 us", "compiled: 10 us", "compiled: 11 us"]
    auto = arm(blocks=tuple(figures(block, 1e-3, engine=engine) for block, engine in enumerate(said)))
    (summary,) = summarise(record({"auto": auto}))
    assert summary.engines == (("compiled: 11 us", 3), ("eager: not faster: 8 us", 1))
    shown = terminal(record({"auto": auto}))
    assert "auto: ran in 3 of 4 blocks compiled: 11 us; in 1 of 4 blocks eager: not faster: 8 us" in shown


def test_nothing_is_said_to_be_known_that_is_not() -> None:
    shown = terminal(record({"mine": arm(1e-3, agreement=None)}))
    assert "another algorithm" in shown
    assert "noise is not known" in shown
    assert "none of 1 timings was flagged" in shown
    assert "times" not in shown.splitlines()[0]


@given(given_text=st.text() | st.text(alphabet="\\|[]()<`!a\n\x1b\ud800"))
@settings(deadline=None)
def test_no_text_breaks_out_of_its_cell(given_text: str) -> None:
    shown = text(given_text)
    assert "\n" not in shown
    assert "<" not in shown
    assert not set(re.sub(r"\\.", "", shown)) & set("|[\\")  # each is one of a pair with a backslash before it
    assert shown.isprintable()
    assert command(given_text).count("`") == 2


def test_hostile_names_are_shown_harmlessly() -> None:
    evil = "a \\| \\[x](http://x) | <script>alert(1)</script> ![x](http://x) \x1b[2J\nb"
    found = record({evil: arm(1e-3, description=evil)}, refused={evil: evil}, command=f"`{evil}`")
    assert "\x1b" not in terminal(found)
    shown = markdown(found, evil)
    assert "<script>" not in shown.replace(command(found.command), "")
    assert "![x]" not in shown.replace(command(found.command), "")
    (row,) = [line for line in shown.splitlines() if line.startswith("| a ")]
    assert re.sub(r"\\.", "", row).count("|") == 9


@given(value=st.floats(1e-6, 1e9))
@settings(deadline=None)
def test_figures_are_shown_to_three_digits(value: float) -> None:
    shown = number(value)
    assert float(shown.replace(",", "")) == pytest.approx(value, rel=0.006)
    assert "e" not in shown
