"""The page of a comparison: every part is there, every text is escaped, and a browser opens it."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fasttrain.comparison import (
    Change,
    Comparison,
    CounterChange,
    Difference,
    MemoryUse,
    Pair,
    Side,
    Timing,
    Why,
)
from fasttrain.pages.comparison import render_comparison
from tests.pages.browser import HOSTILE, Page, check_loads_nothing, opened_in_chromium


def side(label: str, **changes: Any) -> Side:
    made = Side(
        label=label,
        source="results/reviews-cpu.json",
        created="2026-01-02T03:04:05+00:00",
        command=f"python -m fasttrain bench --arms {label}",
        step_s=5e-4,
        workload={"name": "reviews", "batch_size": 128},
        environment={"cpu": "A CPU", "torch": "2.13.0"},
    )
    return replace(made, **changes)


def timing(speedups: list[float], **changes: Any) -> Timing:
    pairs = tuple(Pair(block=i, a=each, b=1.0, speedup=each) for i, each in enumerate(speedups))
    made = Timing(
        speedup=1.31,
        low=1.25,
        high=1.375,
        margin=0.01,
        noise_floor=0.008,
        blocks_needed=None,
        through=None,
        pairs=pairs,
    )
    return replace(made, **changes)


WHY = Why(
    step=Change(name="step", a_us=534.0, b_us=382.0),
    phases=(
        Change(name="forward", a_us=195.0, b_us=0.0),
        Change(name="program", a_us=0.0, b_us=350.0),
        Change(name="optimizer", a_us=310.0, b_us=0.0),
        Change(name="metrics", a_us=0.0, b_us=0.0),
    ),
    operators=(
        Change(name="generated code", phase="program", a_us=None, b_us=350.0),
        Change(name="aten::mm", phase="forward", a_us=195.0, b_us=None),
        *(Change(name=f"aten::small{i}", phase="forward", a_us=1.0, b_us=2.0) for i in range(30)),
    ),
    is_complete=True,
)
MEMORY = MemoryUse(peak_bytes=3_000_000, by_kind={"parameters": 40_000}, timeline=((0, 100), (1, 200), (7, 150)))


def comparison(**changes: Any) -> Comparison:
    made = Comparison(
        a=side("eager"),
        b=side("auto"),
        outcome="FASTER",
        is_time_asked=True,
        timing=timing([1.25, 1.28, 1.31, 1.3, 1.32, 1.29, 1.4, 0.98, 1.33, 1.34]),
        reasons=("host reads a step rose from 0 to 1",),
        differences=(Difference(name="fasttrain", a="0.1.0", b="0.2.0", is_fatal=False),),
        why=WHY,
        counters=(
            CounterChange(name="host reads a step", a=0, b=1, is_gate=True, details=("train.py:12 item, 1 a step",)),
            CounterChange(name="kernel launches a step", a=None, b=None, is_gate=True),
        ),
        memory=(MEMORY, replace(MEMORY, peak_bytes=5)),
        command="python -m fasttrain compare A B",
    )
    return replace(made, **changes)


def page(**changes: Any) -> Page:
    return Page(render_comparison(comparison(**changes)))


def classes(shown: Page, name: str) -> list[dict[str, str | None]]:
    return [attributes for _, attributes in shown.tags if name in (attributes.get("class") or "").split()]


def test_the_verdict_leads() -> None:
    texts = page().texts
    for expected in ("1.31", "FASTER", "1.250–1.375", "10", "± 1.0%", "500 µs", "eager", "auto"):
        assert expected in texts
    assert "host reads a step rose from 0 to 1" in texts


def test_every_pair_is_a_dot_at_its_place() -> None:
    shown = page()
    labels = [attributes["title"] for tag, attributes in shown.tags if tag == "b" and "title" in attributes]
    assert len(labels) == 10
    assert labels[0] == "block 1: 1.250"
    assert labels[7] == "block 8: 0.980"
    dots = [attributes for tag, attributes in shown.tags if tag == "b" and "title" in attributes]
    places = [float(re.findall(r"left:([\d.]+)%", dot["style"] or "")[0]) for dot in dots]
    assert places[7] == min(places)
    assert places[6] == max(places)
    assert [dot["class"] for dot in dots].count("bad") == 1


def test_the_waterfall_ends_where_b_is() -> None:
    html = render_comparison(comparison())
    bars = re.findall(r'<li class="(\w+)"><span>([^<]+)</span>.*?left:([\d.]+)%;width:([\d.]+)%', html)
    named = {name: (tone, float(left), float(width)) for tone, name, left, width in bars}
    assert list(named) == ["A", "forward", "program", "optimizer", "not explained", "B"]
    scale = 100 / max(534, 534 - 195 + 350)
    assert named["A"][2] == pytest.approx(534 * scale, abs=0.01)
    assert named["forward"] == (
        "good",
        pytest.approx((534 - 195) * scale, abs=0.01),
        pytest.approx(195 * scale, abs=0.01),
    )
    assert named["program"][0] == "bad"
    left_over = named["not explained"]
    assert left_over[1:] == (
        pytest.approx((534 - 195 + 350 - 310) * scale, abs=0.01),
        pytest.approx(3 * scale, abs=0.01),
    )
    assert named["B"][2] == pytest.approx(382 * scale, abs=0.01)


def test_operators_gained_and_lost_are_marked() -> None:
    texts = page().texts
    assert (texts.count("gained"), texts.count("lost")) == (1, 1)
    assert "12 more" in texts
    cut = page(why=replace(WHY, is_complete=False)).texts
    assert (cut.count("not listed in A"), cut.count("not listed in B")) == (1, 1)
    assert "gained" not in cut


def test_counters_memory_conditions_and_commands() -> None:
    shown = page()
    for expected in ("rose", "train.py:12 item, 1 a step", "3.00 MB", "40.0 kB", "5 B", "fasttrain", "0.2.0", "2.13.0"):
        assert expected in shown.texts
    assert shown.count("svg") == 1
    assert set(shown.curves()) == {"train", "val"}
    ours, of_a, of_b = (
        f"python -m fasttrain {each}" for each in ("compare A B", "bench --arms eager", "bench --arms auto")
    )
    said = "results/reviews-cpu.json says that it was measured by"
    place = shown.texts.index("Run it again")
    assert shown.texts[place + 1 : place + 6] == [ours, said, of_a, said, of_b]


def test_a_command_of_a_file_is_shown_as_what_it_is() -> None:
    hidden = "true \u202e# txt\x1b[2J\nrm -rf ~"
    html = render_comparison(comparison(a=side("eager", command=hidden), b=side("auto", command=hidden)))
    assert not {"\u202e", "\x1b"} & set(html)
    assert Page(html).texts.count("true \\u202e# txt\\x1b[2J\\nrm -rf ~") == 1, "both are of one file"
    own = comparison().command
    live = render_comparison(comparison(a=side("A", command=own), b=side("B", command=own)))
    assert "says that it was measured by" not in live


def test_a_comparison_without_time_or_profiles() -> None:
    shown = page(outcome="NOT COMPARABLE", timing=None, why=None, counters=(), memory=None, differences=())
    assert "not comparable" in shown.texts
    for missing in ("Every pair", "Operators", "Exact counts", "Memory"):
        assert missing not in shown.texts
    assert "Work, hardware and versions are the same." in shown.texts


def test_no_interval() -> None:
    shown = page(outcome="INCONCLUSIVE", timing=timing([1.3, 1.2], low=None, high=None, blocks_needed=5))
    assert "INCONCLUSIVE" in shown.texts
    assert len(classes(shown, "interval")) == 1, "the legend's"


def hostile_comparison() -> Comparison:
    return comparison(
        a=side(HOSTILE, workload={"name": HOSTILE, HOSTILE: HOSTILE}, environment={HOSTILE: HOSTILE}),
        b=side(HOSTILE, command=HOSTILE, created=HOSTILE, workload={"name": HOSTILE}),
        reasons=(HOSTILE,),
        differences=(Difference(name=HOSTILE, a=HOSTILE, b=HOSTILE, is_fatal=True),),
        why=replace(WHY, operators=(Change(name=HOSTILE, phase=HOSTILE, a_us=1.0, b_us=None),)),
        counters=(CounterChange(name=HOSTILE, a=0, b=1, is_gate=True, details=(HOSTILE,)),),
        memory=(replace(MEMORY, by_kind={HOSTILE: 1}), MEMORY),
        command=HOSTILE,
    )


def test_every_text_is_escaped() -> None:
    html = render_comparison(hostile_comparison())
    check_loads_nothing(html)
    shown = Page(html)
    assert shown.count("img") == shown.count("script") == 0
    assert sum(HOSTILE in text for text in shown.texts) >= 18


def test_the_page_loads_nothing() -> None:
    check_loads_nothing(render_comparison(comparison()))


def test_the_same_comparison_gives_the_same_page() -> None:
    assert render_comparison(comparison()) == render_comparison(comparison())


positive = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(positive, min_size=1, max_size=5), positive, positive, st.lists(st.floats(0, 1e18), min_size=6, max_size=6)
)
@example([1.0], 1.0, 1.0, [0.0, 0.0, 0.0, 0.0, 0.0, 5e-324])
def test_any_numbers_make_a_page_within_its_charts(
    speedups: list[float], low: float, high: float, times: list[float]
) -> None:
    phases = tuple(Change(name=f"phase {i}", a_us=times[i], b_us=times[i + 1]) for i in range(5))
    why = Why(
        step=Change(name="step", a_us=math.fsum(times[:5]), b_us=math.fsum(times[1:])),
        phases=phases,
        operators=phases,
        is_complete=False,
    )
    ends = sorted([low, high])
    html = render_comparison(
        comparison(timing=timing(speedups, speedup=speedups[0], low=ends[0], high=ends[1]), why=why)
    )
    Page(html)
    for place in re.findall(r"(?:left|width|top):(-?[\w.]+)%", html):
        assert -0.1 <= float(place) <= 100.1


def test_a_browser_opens_it(tmp_path: Path) -> None:
    shown = opened_in_chromium(render_comparison(hostile_comparison()), tmp_path)
    assert shown.count("img") == 0
    assert HOSTILE in shown.texts
    shown = opened_in_chromium(render_comparison(comparison()), tmp_path)
    assert {"1.31", "FASTER", "not explained"} <= set(shown.texts)
