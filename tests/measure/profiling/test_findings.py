"""What becomes a finding, and what does not: rare events, small waits, breaks that were compiled around."""

from collections import Counter
from typing import Any

import pytest

from fasttrain.measure.host_reads import Read
from fasttrain.measure.profiling.compile_events import CompileEvents
from fasttrain.measure.profiling.findings import Observations, find
from fasttrain.measure.profiling.suspects import Seen
from fasttrain.step.torch_private import Compilation


def observed(**changes: Any) -> Observations:
    fields: dict[str, Any] = {
        "step_us": 1000.0,
        "data_wait_us": 10.0,
        "reads": [],
        "read_steps": 100,
        "read_us": {},
        "outputs": {},
        "copies": {},
        "watched_steps": 100,
        "grown": {},
        "grown_steps": 100,
        "growing_bytes": None,
        "staying": {},
        "joining": [],
        "item_us": {},
        "loops": [],
        "compiled": CompileEvents(breaks=[], recompiled=Counter()),
    }
    return Observations(**fields | changes)


def kinds(**changes: Any) -> list[str]:
    return [each.kind for each in find(observed(**changes))]


def test_nothing_seen_is_nothing_found() -> None:
    assert kinds() == []


@pytest.mark.parametrize(("count", "found"), [(49, []), (50, ["host read"]), (500, ["host read"])])
def test_reads_are_found_from_every_other_step_on(count: int, found: list[str]) -> None:
    assert kinds(reads=[Read("/train.py", 3, "item", count)]) == found


@pytest.mark.parametrize("what", ["outputs", "copies", "grown"])
def test_rare_events_are_no_findings(what: str) -> None:
    place = ("/train.py", 3)
    rare, frequent = (10, 100) if what == "grown" else (Seen(10, 1.0), Seen(100, 1.0))
    assert kinds(**{what: {place: rare}}) == []
    assert len(kinds(**{what: {place: frequent}})) == 1


@pytest.mark.parametrize(
    ("step_us", "wait_us", "is_found"), [(1000, 190, 0), (1000, 210, 1), (100, 49, 0), (100, 51, 1)]
)
def test_waiting_for_data_is_found_where_it_is_much(step_us: float, wait_us: float, is_found: int) -> None:
    assert len(kinds(step_us=step_us, data_wait_us=wait_us, loops=[("/train.py", 9)])) == is_found


def test_a_printed_tensor_is_one_finding_with_the_larger_cost() -> None:
    place = ("/train.py", 3)
    [found] = find(
        observed(
            reads=[Read(*place, "item", 100)],
            read_us={place: 5.0},
            outputs={place: Seen(count=100, seconds=100 * 20e-6)},
        )
    )
    assert (found.kind, found.line) == ("logging every step", 3)
    assert found.cost_us == pytest.approx(20.0)
    assert found.advice.startswith("item: ")


def test_the_costliest_comes_first_and_the_unknown_last() -> None:
    reads = [Read("/a.py", line, "item", 100) for line in (1, 2, 3)]
    found = find(observed(reads=reads, read_us={("/a.py", 2): 9.0, ("/a.py", 3): 90.0}))
    assert [each.line for each in found] == [3, 2, 1]


def compilation(line: int, **changes: Any) -> Compilation:
    fields: dict[str, Any] = {"is_after_break": False, "breaks": (), "recompile_reason": None}
    return Compilation(file="/net.py", line=line, **fields | changes)


def test_a_break_is_where_the_function_goes_on() -> None:
    events = CompileEvents.of(
        [compilation(10, breaks=("print",)), compilation(14, is_after_break=True), compilation(14, is_after_break=True)]
    )
    assert events.breaks == [("/net.py", 14)]


def test_a_break_after_which_nothing_is_compiled_is_in_its_function() -> None:
    assert CompileEvents.of([compilation(10, breaks=("print",))]).breaks == [("/net.py", 10)]


def test_recompilations_are_counted_by_reason() -> None:
    again = [compilation(10, recompile_reason=f"0/{number}: size of\n x") for number in range(3)]
    events = CompileEvents.of([compilation(10), *again])
    [found] = events.recompilations()
    assert (found.reason, found.count) == ("size of x", 3)
    assert [each.kind for each in find(observed(compiled=events))] == ["recompilation"]


def test_recompilations_that_the_list_has_no_room_for_are_counted_too() -> None:
    again = [compilation(10, recompile_reason=f"0/{number}: size of x{number % 12}") for number in range(60)]
    found = CompileEvents.of(again).recompilations()
    assert len(found) == 10
    assert (found[-1].reason, found[-1].count) == ("other reasons", 15)
    assert sum(each.count for each in found) == 60
    assert len(CompileEvents.of(again[:10]).recompilations()) == 10


@pytest.mark.parametrize("changes", [{}, {"item_us": {("/data.py", 5): 900.0}}], ids=["data wait", "slow __getitem__"])
def test_waiting_for_data_is_not_mended_by_what_passes_batches_through(changes: dict[str, Any]) -> None:
    """`prefetch` loads nothing ahead on the CPU, workers do."""
    [found] = find(observed(data_wait_us=900.0, **changes))
    assert "DataLoader(num_workers=...) loads beside the steps" in found.advice
    assert "fasttrain.prefetch copies to a GPU" in found.advice


def test_what_grows_names_what_holds_it_before_what_made_it() -> None:
    holder, joiner, maker, lesser = (("/train.py", line) for line in (3, 4, 5, 6))
    growing = {"growing_bytes": 5120.4, "staying": {lesser: 100, maker: 40_000}}
    for changes, expected in (
        (growing, ("memory grows", 5)),
        ({**growing, "joining": [joiner]}, ("memory grows", 4)),
        ({**growing, "grown": {holder: 100}}, ("growing container", 3)),
    ):
        [found] = find(observed(**changes))
        assert (found.kind, found.line) == expected
        assert found.advice.startswith("5,120 bytes of tensors a step stay in use: ")
        assert found.cost_us is None


def test_a_chain_of_graphs_is_found_though_no_tensor_of_it_stays() -> None:
    [found] = find(observed(joining=[("/train.py", 4)]))
    assert (found.kind, found.line) == ("memory grows", 4)
    assert found.advice.startswith("here, each step's graph is joined to all those before it: let go")


@pytest.mark.parametrize("changes", [{"growing_bytes": 8.0}, {"staying": {("/train.py", 5): 100}}])
def test_growth_that_only_one_pass_has_seen_is_none(changes: dict[str, Any]) -> None:
    assert kinds(**changes) == []
