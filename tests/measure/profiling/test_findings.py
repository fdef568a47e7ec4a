"""What becomes a finding, and what does not: rare events, small waits, breaks that were compiled around."""

from collections import Counter
from typing import Any

import pytest
import torch

from fasttrain.measure.data_wait import record_advice
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
        "is_recordable": False,
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


SLOW_ROWS = {("/data.py", 5): 900.0}


@pytest.mark.parametrize("changes", [{}, {"item_us": SLOW_ROWS}], ids=["data wait", "slow __getitem__"])
def test_a_data_wait_over_a_third_of_a_step_is_told_of_record(changes: dict[str, Any]) -> None:
    loop = {"loops": [("/train.py", 9)], "is_recordable": True}
    [found] = find(observed(data_wait_us=800.0, **loop, **changes))
    assert found.advice.startswith("the data wait is 80% of a step: give the loop fasttrain.record(loader), ")
    assert "without the wait a step is 5 times as fast; or " in found.advice  # 1000 us / 200 us
    assert "DataLoader(num_workers=...)" in found.advice
    for quick in (observed(data_wait_us=330.0, **loop, **changes), observed(data_wait_us=800.0, **changes)):
        [found] = find(quick)
        assert "fasttrain.record" not in found.advice


def test_rows_of_tensors_need_no_record() -> None:
    place = (str(torch.utils.data.TensorDataset.__getitem__.__code__.co_filename), 5)
    [found] = find(observed(data_wait_us=900.0, item_us={place: 900.0}, loops=[("/train.py", 9)], is_recordable=True))
    assert found.kind == "loader over tensors"
    assert "FastLoop trains on a DataLoader over a TensorDataset as on resident data" in found.advice


@pytest.mark.parametrize(
    ("data_wait", "told"),
    [(1 / 3, None), (0.34, "1.52 times"), (0.95, "20 times"), (0.999, "more than 100 times"), (1.0, "more than 100")],
)
def test_the_gain_is_what_a_step_takes_without_its_wait(data_wait: float, told: str | None) -> None:
    advice = record_advice(1.0, data_wait)
    assert advice is None if told is None else advice is not None and told in advice


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
