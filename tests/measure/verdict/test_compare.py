"""Verdicts on stored measurements: what may be compared, through what, and what each outcome means."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.comparison import Comparison
from fasttrain.errors import ConfigError, DataError
from fasttrain.measure.bench.record import with_threads
from fasttrain.measure.profiling.record import HostRead, Recompilation
from fasttrain.measure.verdict.compare import compare_arms
from fasttrain.measure.verdict.sides import BenchArm
from fasttrain.measure.verdict.stats import MOST_PAIRS
from tests.measure.verdict.comparisons import (
    ENVIRONMENT,
    OPERATORS,
    SPREAD,
    WORKLOAD,
    arm,
    compared,
    profile,
    record,
    stored,
    stored_profile,
)

SHUFFLED = (*SPREAD[5:], *SPREAD[:5])


def arms_of_one(tmp_path: Path, a_us: float, b_us: float, spread: Sequence[float] = SHUFFLED) -> Comparison:
    file = stored(tmp_path / "r.json", {"eager": arm(a_us), "auto": arm(b_us, spread)})
    return compared(f"{file}:eager", f"{file}:auto")


@pytest.mark.parametrize(
    ("a_us", "b_us", "outcome", "exit_code"),
    [
        (500, 400, "FASTER", 0),
        (500, 500, "SAME", 0),
        (500, 515, "SLOWER", 1),
    ],
)
def test_the_arms_of_one_result(tmp_path: Path, a_us: float, b_us: float, outcome: str, exit_code: int) -> None:
    found = arms_of_one(tmp_path, a_us, b_us)
    assert (found.outcome, found.exit_code) == (outcome, exit_code)
    assert found.timing is not None
    assert found.timing.speedup == pytest.approx(a_us / b_us, rel=0.01)
    assert found.timing.low is not None
    assert found.timing.high is not None
    assert found.timing.low <= found.timing.speedup <= found.timing.high
    assert [pair.block for pair in found.timing.pairs] == list(range(10))
    assert found.timing.pairs[3].a == pytest.approx(a_us * 1e-6 * (1 + SPREAD[3]) / 128)
    assert found.a.label == "eager"
    assert found.b.step_s == pytest.approx(b_us * 1e-6, rel=0.01)


def test_an_open_question_says_how_many_blocks_would_settle_it(tmp_path: Path) -> None:
    found = arms_of_one(tmp_path, 500, 490, [5 * each for each in SHUFFLED])
    assert (found.outcome, found.exit_code) == ("INCONCLUSIVE", 3)
    assert found.timing is not None
    assert found.timing.blocks_needed is not None
    assert f"about {found.timing.blocks_needed} further blocks would decide it" in found.reasons


@settings(deadline=None, max_examples=60)
@given(
    b_us=st.floats(480, 520),
    width=st.floats(0.1, 40),
    times=st.integers(1, 4),
    is_extended=st.booleans(),
)
def test_no_advice_asks_for_more_pairs_than_are_judged(
    b_us: float, width: float, times: int, is_extended: bool
) -> None:
    spread = [width * each for each in SHUFFLED * times]
    arms = {"eager": arm(500, SPREAD * times), "auto": arm(b_us, spread)}
    design = replace(record(arms).design, extended=is_extended)
    sides = [BenchArm(path=Path("r.json"), label=label, record=record(arms, design=design)) for label in arms]
    found = compare_arms(*sides, command="")
    [advice] = [reason for reason in found.reasons if "further blocks" in reason or "--blocks" in reason] or [None]
    too_many = [
        reason for reason in found.reasons if reason.startswith(f"more than {MOST_PAIRS} pairs would be needed")
    ]
    assert (found.outcome == "INCONCLUSIVE") == (advice is not None) + len(too_many)
    if advice is not None:
        [number] = [int(word) for word in advice.split() if word.isdecimal()]
        assert (0 if is_extended else 10 * times) + number <= MOST_PAIRS


def test_a_question_that_too_many_blocks_would_decide_names_the_limit(tmp_path: Path) -> None:
    found = arms_of_one(tmp_path, 500, 494.9, [30 * each for each in SHUFFLED])
    assert found.timing is not None
    assert found.timing.blocks_needed is None
    assert found.reasons[0].startswith("more than 500 pairs would be needed, which is the most that are judged")


def test_a_benchmark_that_was_extended_is_to_be_measured_anew(tmp_path: Path) -> None:
    arms = {"eager": arm(500), "auto": arm(490, [5 * each for each in SHUFFLED])}
    design = replace(record(arms).design, blocks=5, extended=True)
    file = stored(tmp_path / "r.json", arms, design=design)
    found = compared(f"{file}:eager", f"{file}:auto")
    assert found.timing is not None
    assert found.timing.blocks_needed is not None
    assert f"measure anew with --blocks {10 + found.timing.blocks_needed} to decide it" in found.reasons
    assert not any("further blocks" in reason for reason in found.reasons)


def test_arms_without_a_common_block_are_not_judged(tmp_path: Path) -> None:
    late = arm(400, SPREAD[:8])
    late = replace(late, blocks=tuple(replace(block, block=block.block + 10) for block in late.blocks))
    file = stored(tmp_path / "r.json", {"eager": arm(500), "auto": late})
    found = compared(f"{file}:eager", f"{file}:auto")
    assert (found.outcome, found.exit_code) == ("TIME NOT JUDGED", 3)


def test_three_blocks_decide_nothing(tmp_path: Path) -> None:
    file = stored(tmp_path / "r.json", {"eager": arm(900, SPREAD[:3]), "auto": arm(400, SPREAD[:3])})
    found = compared(f"{file}:eager", f"{file}:auto")
    assert found.exit_code == 3
    assert found.to_dict()["interval"] is None
    assert "3 pairs are too few for an interval: it takes 7" in found.reasons


def test_blocks_that_only_one_arm_has_make_no_pair(tmp_path: Path) -> None:
    file = stored(tmp_path / "r.json", {"eager": arm(500), "auto": arm(400, SPREAD[:8])})
    found = compared(f"{file}:eager", f"{file}:auto")
    assert found.to_dict()["pairs"] == 8
    assert "left out, as they make no pair: 2 of A's 10 blocks" in found.reasons


def test_the_machines_noise_is_the_margin_where_it_is_above_one_percent(tmp_path: Path) -> None:
    arms = {"eager": arm(500), "auto": arm(515, SHUFFLED)}
    quiet = stored(tmp_path / "quiet.json", arms)
    loud = record(arms).noise
    assert loud is not None
    noisy = stored(tmp_path / "loud.json", arms, noise=type(loud)(floor=0.05, smallest_effect=0.08, pairs=10))
    unknown = stored(tmp_path / "unknown.json", arms, noise=None)
    outcomes = [compared(f"{file}:eager", f"{file}:auto") for file in (quiet, noisy, unknown)]
    assert [each.outcome for each in outcomes] == ["SLOWER", "SAME", "SLOWER"]
    assert [each.to_dict()["margin"] for each in outcomes] == [0.01, 0.05, 0.01]
    assert any("noise floor is not known" in reason for reason in outcomes[2].reasons)


def test_a_machine_that_ran_at_half_its_speed_is_seen_through_the_shared_arm(tmp_path: Path) -> None:
    before = stored(tmp_path / "a.json", {"textbook": arm(9000, SHUFFLED), "auto": arm(400)})
    after = stored(tmp_path / "b.json", {"textbook": arm(18000, SPREAD), "auto": arm(720, SHUFFLED)})
    found = compared(before, after)  # both stand for their arm auto
    assert found.outcome == "FASTER"
    assert found.timing is not None
    assert found.timing.through == "textbook"
    assert found.timing.speedup == pytest.approx(400 / 9000 / (720 / 18000), rel=0.02)
    assert "measured at different times, and are judged through textbook" in found.reasons[0]
    assert "not what changed between them" in found.reasons[0]
    assert not any("left out" in reason for reason in found.reasons)


def test_blocks_without_a_partner_in_the_other_result_are_told(tmp_path: Path) -> None:
    textbook = arm(9000, SPREAD)
    a = stored(tmp_path / "a.json", {"textbook": textbook, "auto": arm(400)})
    short = replace(textbook, blocks=textbook.blocks[1:])
    b = stored(tmp_path / "b.json", {"textbook": short, "auto": arm(300, SHUFFLED[:9])})
    found = compared(a, b)
    assert found.to_dict()["pairs"] == 8, "block 1 lacks the textbook, block 10 the arm"
    assert "left out, as they make no pair: 2 of A's 10 blocks and 1 of B's 9 blocks" in found.reasons


def test_repeats_are_told_by_their_reason(tmp_path: Path) -> None:
    quiet, loud = arm(500).blocks[:2], tuple(replace(block, flags=("load",)) for block in arm(500).blocks[:1])
    arms = {"eager": arm(500, repeated=(*loud, *quiet)), "auto": arm(400, SHUFFLED, repeated=loud)}
    file = stored(tmp_path / "r.json", arms)
    found = compared(f"{file}:eager", f"{file}:auto")
    assert "A: attempts that were repeated: 1 for a flag of their own, 2 for another arm of the block" in found.reasons
    assert "B: attempts that were flagged and repeated: 1" in found.reasons


def test_the_verdict_of_a_users_own_arm(tmp_path: Path) -> None:
    file = stored(tmp_path / "r.json", {"eager": arm(500), "my_code:make_arm": arm(400, SHUFFLED)})
    found = compared(f"{file}:eager", f"{file}:my_code:make_arm")
    assert (found.outcome, found.b.label) == ("FASTER", "my_code:make_arm")
    with pytest.raises(ConfigError, match=r"no arm 'my_code:other'; use .* one of eager, my_code:make_arm"):
        compared(f"{file}:my_code:other", file)
    with pytest.raises(DataError, match=r"nowhere\.json: cannot be read"):
        compared(f"{tmp_path / 'nowhere.json'}:my_code:make_arm", file)


def test_the_name_of_a_file_may_have_a_colon(tmp_path: Path) -> None:
    file = stored(tmp_path / "12:30.json", {"my_code:make_arm": arm(500), "auto": arm(400, SHUFFLED)})
    assert compared(f"{file}:my_code:make_arm", file).outcome == "FASTER"


def test_two_results_share_an_arm_or_time_is_not_judged(tmp_path: Path) -> None:
    a = stored(tmp_path / "a.json", {"textbook": arm(9000), "eager": arm(500), "auto": arm(400)})
    b = stored(tmp_path / "b.json", {"jax": arm(300), "eager": arm(500), "auto": arm(200)})
    found = compared(a, b)  # eager is in both, but may have changed itself
    assert (found.outcome, found.exit_code, found.timing) == ("TIME NOT JUDGED", 3, None)
    assert found.to_dict()["exit_code"] == 3
    assert any("share no arm" in reason for reason in found.reasons)
    assert compared(a, b, through="eager").outcome == "FASTER"
    with pytest.raises(ConfigError, match="both results must have it; they share eager, auto"):
        compared(a, b, through="jax")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"environment": {**ENVIRONMENT, "cpu": "Another CPU"}}, "cpu: A CPU against Another CPU"),
        ({"environment": {**ENVIRONMENT, "torch": "2.12.0"}}, "torch: 2.13.0 against 2.12.0"),
        ({"environment": {**ENVIRONMENT, "cuda": "12.9"}}, "cuda: not told against 12.9"),
        ({"workload": {**WORKLOAD, "batch_size": 256}}, "work: batch_size: 128 against 256"),
    ],
)
def test_other_hardware_versions_or_work_is_not_comparable(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    arms = {"textbook": arm(9000), "auto": arm(400)}
    a, b = stored(tmp_path / "a.json", arms), stored(tmp_path / "b.json", arms, **changes)
    found = compared(a, b)
    assert (found.outcome, found.exit_code, found.timing) == ("NOT COMPARABLE", 4, None)
    assert named in found.reasons


def test_what_may_differ_is_told_and_does_no_harm(tmp_path: Path) -> None:
    arms = {"textbook": arm(9000), "auto": arm(400)}
    other = {**ENVIRONMENT, "fasttrain": "0.2.0", "load_average": 3.0}
    found = compared(stored(tmp_path / "a.json", arms), stored(tmp_path / "b.json", arms, environment=other))
    assert found.outcome == "SAME"
    assert [(each.name, each.a, each.b, each.is_fatal) for each in found.differences] == [
        ("fasttrain", "0.1.0", "0.2.0", False)
    ]


def test_two_profiles_are_compared_but_for_time(tmp_path: Path) -> None:
    a = stored_profile(tmp_path / "a.json", profile(OPERATORS, name="eager"))
    b = stored_profile(tmp_path / "b.json", profile({**OPERATORS, ("aten::mm", "forward"): 10.0}, name="auto"))
    found = compared(a, b)
    assert (found.outcome, found.exit_code) == ("TIME NOT JUDGED", 0)
    assert found.why is not None
    assert found.why.step.us == pytest.approx(-90)
    assert found.memory is not None


RISES: dict[str, dict[str, Any]] = {
    "host reads a step": {"host_reads": [HostRead(file="train.py", line=7, what="item", per_step=1.0)]},
    "recompilations": {"recompilations": [Recompilation(reason="size mismatch", count=2)]},
    "graph breaks": {"graph_breaks": 1},
    "dispatched operators a step": {"dispatched_operators": 41.0},
}


@pytest.mark.parametrize("name", RISES)
def test_a_counter_that_rises_fails_by_itself(tmp_path: Path, name: str) -> None:
    good = stored_profile(tmp_path / "good.json", profile(OPERATORS))
    bad = stored_profile(tmp_path / "bad.json", profile(OPERATORS, **RISES[name]))
    found = compared(good, bad)
    assert [each.name for each in found.risen] == [name]
    assert found.exit_code == 1
    assert any(reason.startswith(f"{name} rose from") for reason in found.reasons)
    assert compared(bad, good).exit_code == 0
    file = stored(tmp_path / "r.json", {"eager": arm(500), "auto": arm(400)})
    faster = compared(f"{file}:eager", f"{file}:auto", profiles=(good, bad))
    assert (faster.outcome, faster.exit_code) == ("FASTER", 1)


def test_two_engines_do_the_same_work(tmp_path: Path) -> None:
    files = [
        stored_profile(
            tmp_path / f"{engine}.json",
            replace(profile(OPERATORS, name=engine), workload={**WORKLOAD, "arm": engine, "engine": f"{engine}: why"}),
        )
        for engine in ("eager", "auto")
    ]
    assert compared(*files).outcome == "TIME NOT JUDGED"
    assert not compared(*files).differences
    arms = stored(tmp_path / "r.json", {"eager": arm(500), "auto": arm(400)})
    sides = f"{arms}:eager", f"{arms}:auto"
    assert compared(*sides, profiles=(files[0], files[1])).why is not None
    with pytest.raises(ConfigError, match=r"auto\.json is a profile of auto, not of eager: give A's first"):
        compared(*sides, profiles=(files[1], files[0]))


def test_kernel_launches_are_the_gate_on_a_gpu(tmp_path: Path) -> None:
    a = stored_profile(tmp_path / "a.json", profile(OPERATORS, kernel_launches=20.0))
    b = stored_profile(tmp_path / "b.json", profile(OPERATORS, kernel_launches=21.0, dispatched_operators=99.0))
    assert [each.name for each in compared(a, b).risen] == ["kernel launches a step"]


def test_a_profile_of_something_else_explains_nothing(tmp_path: Path) -> None:
    file = stored(tmp_path / "r.json", {"eager": arm(500), "auto": arm(400)}, workload={**WORKLOAD, "name": "mlp"})
    a = stored_profile(tmp_path / "a.json", profile(OPERATORS))
    with pytest.raises(ConfigError, match="is no profile of eager: work: name reviews instead of mlp"):
        compared(f"{file}:eager", f"{file}:auto", profiles=(a, a))


def test_an_arm_with_threads_of_its_own_is_explained_by_a_profile_with_as_many(tmp_path: Path) -> None:
    label = with_threads("textbook", 4)
    file = stored(tmp_path / "r.json", {"textbook": arm(9000), label: arm(6000, SHUFFLED)})
    one, four = (
        stored_profile(
            tmp_path / f"{threads}.json",
            replace(
                profile(OPERATORS, name="textbook"),
                workload={**WORKLOAD, "arm": "textbook"},
                environment={**ENVIRONMENT, "threads": threads},
            ),
        )
        for threads in (1, 4)
    )
    sides = f"{file}:textbook", f"{file}:{label}"
    found = compared(*sides, profiles=(one, four))
    assert found.outcome == "FASTER"
    assert [(each.name, each.a, each.b, each.is_fatal) for each in found.differences] == [("threads", "1", "4", False)]
    with pytest.raises(ConfigError, match=r"1\.json is no profile of textbook, 4 threads: threads 1 instead of 4"):
        compared(*sides, profiles=(one, one))


def test_other_threads_in_all_arms_are_not_comparable(tmp_path: Path) -> None:
    arms = {"textbook": arm(9000), "auto": arm(400)}
    design = replace(record(arms).design, threads=4)
    a, b = stored(tmp_path / "a.json", arms), stored(tmp_path / "b.json", arms, design=design)
    assert compared(a, b).outcome == "NOT COMPARABLE"


def test_requests_that_cannot_be_met(tmp_path: Path) -> None:
    file = stored(tmp_path / "r.json", {"eager": arm(500)}, refused={"jax": "jax is not installed"})
    a_profile = stored_profile(tmp_path / "p.json", profile(OPERATORS))
    with pytest.raises(ConfigError, match=r"no arm 'auto'; use .*r\.json:ARM with one of eager"):
        compared(file, file)
    with pytest.raises(ConfigError, match="arm 'jax' was not timed: jax is not installed"):
        compared(f"{file}:jax", f"{file}:eager")
    with pytest.raises(ConfigError, match="not one of each"):
        compared(f"{file}:eager", a_profile)
    with pytest.raises(ConfigError, match="a profile has no arms"):
        compared(f"{a_profile}:eager", a_profile)
    with pytest.raises(ConfigError, match="not with two profiles"):
        compared(a_profile, a_profile, through="textbook")
    with pytest.raises(DataError, match=r"nowhere\.json"):
        compared(tmp_path / "nowhere.json", file)


@pytest.mark.parametrize(("a_us", "b_us"), [(1e20, 1e-300), (500, 5e-318)])
def test_times_beyond_all_sense_are_refused(tmp_path: Path, a_us: float, b_us: float) -> None:
    file = stored(tmp_path / "r.json", {"eager": arm(a_us), "auto": arm(b_us)})
    with pytest.raises(DataError, match="cannot be times of one job"):
        compared(f"{file}:eager", f"{file}:auto")


def test_the_json_document(tmp_path: Path) -> None:
    document = arms_of_one(tmp_path, 500, 400).to_dict()
    assert {"verdict", "speedup", "interval", "pairs", "margin", "reasons", "exit_code", "why"} <= document.keys()
    assert document["verdict"] == "FASTER"
    low, high = document["interval"]
    assert 1 < low < document["speedup"] < high
    assert math.isclose(document["speedup"], 1.25, rel_tol=0.01)
    json.dumps(document, allow_nan=False)
