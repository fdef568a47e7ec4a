"""Changes taken apart: what is explained, and that what is not is said."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.measure.profiling.record import HostRead, Recompilation
from fasttrain.measure.verdict.explain import compare_counters, explain
from tests.measure.verdict.comparisons import profile

OPERATORS = {("aten::mm", "forward"): 100.0, ("aten::mm", "backward"): 200.0, ("aten::add_", "optimizer"): 50.0}


def test_a_planted_change_is_explained_by_its_phase_and_its_operator() -> None:
    slowed = {**OPERATORS, ("aten::mm", "backward"): 270.0}
    why = explain(profile(OPERATORS), profile(slowed))
    assert why.step.us == pytest.approx(70)
    assert {phase.name: phase.us for phase in why.phases if phase.us} == {"backward": pytest.approx(70)}
    assert (why.operators[0].name, why.operators[0].phase, why.operators[0].us) == ("aten::mm", "backward", 70.0)
    assert why.unexplained_by_phases_us == why.unexplained_by_operators_us == 0


def test_other_explains_nothing() -> None:
    why = explain(profile(OPERATORS, other_us=3.0), profile(OPERATORS, other_us=43.0))
    assert why.step.us == pytest.approx(40)
    assert why.unexplained_by_phases_us == why.unexplained_by_operators_us == pytest.approx(40)
    assert "other" not in {each.name for each in (*why.phases, *why.operators)}


def test_an_operator_of_the_phase_other_is_listed_and_explains_nothing() -> None:
    why = explain(profile(OPERATORS), profile({**OPERATORS, ("aten::save", "other"): 30.0}))
    assert (why.operators[0].name, why.operators[0].us) == ("aten::save", 30.0)
    assert why.unexplained_by_phases_us == why.unexplained_by_operators_us == pytest.approx(30)


def test_operators_gained_and_lost() -> None:
    fused = {("generated code", "program"): 90.0}
    why = explain(profile(OPERATORS, other_us=0.0), profile(fused, other_us=0.0))
    gained = [each.name for each in why.operators if each.a_us is None]
    lost = [(each.name, each.phase) for each in why.operators if each.b_us is None]
    assert gained == ["generated code"]
    assert sorted(lost) == sorted(OPERATORS)
    assert why.is_complete
    assert not explain(profile(OPERATORS), profile(fused)).is_complete


def test_programs_are_compared_by_where_their_time_comes_from() -> None:
    a = profile({("generated code", "program"): 90.0}, program={"forward": 30.0, "not attributed": 60.0})
    b = profile(
        {("generated code", "program"): 70.0}, program={"metrics": 5.0, "forward": 30.0, "not attributed": 35.0}
    )
    why = explain(a, b)
    changes = [(phase.name, phase.us) for phase in why.phases if phase.name.startswith("program")]
    assert changes == [("program: forward", 0.0), ("program: metrics", 5.0), ("program: not attributed", -25.0)]
    assert why.unexplained_by_phases_us == 0


def test_a_program_beside_none_is_split_and_one_of_unknown_parts_is_not() -> None:
    split = profile({("generated code", "program"): 90.0}, program={"forward": 30.0, "not attributed": 60.0})
    eager, whole = profile(OPERATORS), profile({("generated code", "program"): 80.0})
    names = [phase.name for phase in explain(eager, split).phases if phase.b_us]
    assert names == ["program: forward", "program: not attributed"]
    assert [(each.name, each.us) for each in explain(whole, split).phases if each.us] == [("program", 10.0)]


amounts = st.floats(0, 1e4).map(lambda us: round(us, 2))
operators = st.dictionaries(
    st.tuples(st.sampled_from(["a", "b", "c"]), st.sampled_from(["forward", "backward", "program"])),
    amounts,
    min_size=1,
)


@settings(deadline=None, max_examples=60)
@given(operators, operators, amounts, amounts)
def test_parts_and_what_is_left_make_the_whole(
    a: dict[tuple[str, str], float], b: dict[tuple[str, str], float], rest_a: float, rest_b: float
) -> None:
    why = explain(profile(a, other_us=rest_a), profile(b, other_us=rest_b))
    phases = sum(phase.us for phase in why.phases) + why.unexplained_by_phases_us
    listed = sum(operator.us for operator in why.operators) + why.unexplained_by_operators_us
    assert phases == pytest.approx(why.step.us, abs=1e-5)
    assert listed == pytest.approx(why.step.us, abs=1e-5)
    assert why.unexplained_by_phases_us == pytest.approx(rest_b - rest_a, abs=1e-5)
    changes = [abs(operator.us) for operator in why.operators]
    assert changes == sorted(changes, reverse=True)


def test_counters_name_the_places_that_are_new() -> None:
    known = HostRead(file="train.py", line=3, what="item", per_step=1.0)
    new = HostRead(file="train.py", line=9, what="cpu", per_step=0.5)
    a = profile(OPERATORS, host_reads=[known], recompilations=[Recompilation(reason="shape", count=1)])
    b = profile(
        OPERATORS,
        host_reads=[known, new],
        recompilations=[Recompilation(reason="shape", count=1), Recompilation(reason="dtype", count=4)],
    )
    counters = {each.name: each for each in compare_counters(a, b)}
    assert (counters["host reads a step"].a, counters["host reads a step"].b) == (1.0, 1.5)
    assert counters["host reads a step"].details == ("train.py:9 cpu, 0.5 a step",)
    assert counters["recompilations"].details == ("4 times: dtype",)
    assert [each.name for each in counters.values() if each.is_failure] == ["host reads a step", "recompilations"]


def test_what_was_not_counted_is_no_failure() -> None:
    counters = {each.name: each for each in compare_counters(profile(OPERATORS), profile(OPERATORS, flops=None))}
    assert counters["kernel launches a step"].a is None
    assert not any(each.is_failure for each in counters.values())
