"""`fasttrain.record`: batches, and the generators' states, are bitwise those of the plain loader."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

import fasttrain
from fasttrain import ConfigError, FasttrainError
from tests.data.record_loaders import (
    AHEAD_CASES,
    CASES,
    COLLATES,
    DATASETS,
    ORDERS,
    WORKER_CASES,
    Case,
    DictOfNumpy,
    DrawsOnceMore,
    Record,
    ReplaysFirstEpoch,
    Trace,
    freezes_rows,
    gives_out_its_store,
    identity,
    reads_by_epoch,
    refusals,
    run,
    scribble,
    seed_all,
    states,
)


@pytest.fixture
def record() -> Record:
    return fasttrain.record


def check(case: Case, record: Record) -> None:
    plain, recorded = run(case, identity), run(case, record)
    assert plain.error is None
    assert recorded.refused is None
    assert (difference := recorded.difference(plain)) is None, difference


def names(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("case", CASES, ids=names)
def test_a_combination_is_bitwise_the_plain_loader(case: Case, record: Record) -> None:
    check(case, record)


@pytest.mark.parametrize("case", WORKER_CASES, ids=names)
def test_a_loader_with_workers_is_bitwise_the_plain_loader(case: Case, record: Record) -> None:
    check(case, record)


@pytest.mark.parametrize("case", AHEAD_CASES, ids=names)
def test_reading_ahead_is_bitwise_the_plain_loader(case: Case, record: Record) -> None:
    check(case, record)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dataset = draw(st.sampled_from(sorted(DATASETS)))
    collate = draw(st.sampled_from(sorted(COLLATES)))
    order = draw(st.sampled_from(sorted(ORDERS)))
    options: dict[str, Any] = {}
    if order not in ("varying batches", "batches of a sampler"):
        options = {"batch_size": draw(st.integers(1, 7)), "drop_last": draw(st.booleans())}
    return Case(dataset, order, collate, options, own=collate not in ("as list", "as tuple"))


@settings(max_examples=60, derandomize=True)
@given(case=cases())
def test_any_combination_is_bitwise_the_plain_loader(case: Case) -> None:
    plain, recorded = run(case, identity), run(case, fasttrain.record)  # errors too, such as of an index below zero
    assert recorded.refused is None
    assert (difference := recorded.difference(plain)) is None, difference


REPLAYED = [
    *[Case(dataset) for dataset in ("dict of numpy", "tuples", "nested", "numpy rows", "numpy scalars", "images")],
    *[Case(dataset) for dataset in ("python numbers", "strings", "one-hot", "sparse", "masks", "halves", "payloads")],
    *[Case(dataset) for dataset in ("subset", "nested subset", "concatenated", "split", "stacked", "getitems")],
    *[Case("dict of numpy", order) for order in ("shuffle generator", "draws torch", "varying batches")],
    Case("one-hot", "shuffle", "row by row"),
    Case("one-hot", "shuffle", "normalised"),
    Case("unequal", "shuffle", "padded"),
    Case("nested", "sequential", "draws torch"),
]
"""Loaders that are there to be recorded: a plain pass in their place would be right, and of no use."""


@pytest.mark.parametrize("case", REPLAYED, ids=names)
def test_rows_are_read_once(case: Case, record: Record) -> None:
    plain, recorded = reads_by_epoch(case, identity), reads_by_epoch(case, record)
    assert min(plain) > 0
    assert sum(recorded[1:]) <= sum(plain[1:]) / 4, "later epochs read some rows again to compare them, not most"


# Several passes over the same loaders, in any order of calls ----------------------------------------------------------

Act = tuple[str, int]
"""What a program does: start a pass over loader 0 or 1, take a batch of the nth pass, draw, drop the nth pass."""


def act(case: Case, acts: list[Act], record: Record) -> Trace:
    seed_all()
    sources = [case.build() for _ in range(2)]
    trace = Trace()
    with refusals(trace):
        loaders = [record(loader) for loader, _ in sources]
        passes: list[Any] = []
        for verb, number in acts:
            if verb == "start":
                passes.append(iter(loaders[number % 2]))
            elif verb == "draw":
                trace.see("drawn", (torch.rand(1), float(np.random.rand()), random.random()))
            elif passes and verb == "take":
                batch = next(passes[number % len(passes)], "the end")
                trace.see(f"pass {number % len(passes)}", batch)
                scribble(batch)
            elif passes and verb == "drop":
                passes.pop(number % len(passes))
            trace.see(verb, [states(order.generator) for _, order in sources])
    return trace


def check_acts(case: Case, acts: list[Act], record: Record) -> None:
    plain, recorded = act(case, acts, identity), act(case, acts, record)
    assert recorded.refused is None
    assert (difference := recorded.difference(plain)) is None, difference


ACTED = ["sequential", "shuffle", "shuffle generator", "replacement generator", "weighted", "draws torch"]


@settings(max_examples=40, derandomize=True)
@given(
    order=st.sampled_from(ACTED),
    acts=st.lists(st.tuples(st.sampled_from(["start", "take", "take", "take", "draw", "drop"]), st.integers(0, 5))),
)
def test_passes_in_any_order_of_calls(order: str, acts: list[Act]) -> None:
    check_acts(Case("dict of numpy", order, options={"batch_size": 7}), [("start", 0), *acts], fasttrain.record)


TAKE_ALL = [("take", 0)] * 4


@pytest.mark.parametrize("order", ACTED)
@pytest.mark.parametrize(
    "acts",
    [
        [("start", 0), ("start", 1), *[("take", number) for number in range(8)], ("start", 0), *[("take", 2)] * 4],
        [("start", 0), ("start", 0), *[("take", number) for number in range(8)], ("start", 0), *[("take", 2)] * 4],
        [("start", 0), ("take", 0), *[act for n in (1, 2, 3) for act in [("start", 0), *[("take", n)] * 4]], *TAKE_ALL],
        [("start", 0), ("start", 0), ("draw", 0), ("take", 1), ("take", 0), ("drop", 0), *TAKE_ALL],
        [("start", 0), *TAKE_ALL, ("take", 0), ("take", 0), ("start", 0), ("drop", 0), ("start", 0), *TAKE_ALL],
    ],
    ids=["two loaders in turn", "one loader twice at once", "nested", "started and dropped", "past its end"],
)
def test_passes(order: str, acts: list[Act], record: Record) -> None:
    check_acts(Case("dict of numpy", order, options={"batch_size": 7}), acts, record)


def test_two_loaders_share_a_dataset_and_a_generator(record: Record) -> None:
    def both(record: Record) -> Trace:
        seed_all()
        dataset, generator, trace = DictOfNumpy(), torch.Generator().manual_seed(1), Trace()
        options: dict[str, Any] = {"shuffle": True, "generator": generator}
        first, second = record(DataLoader(dataset, 4, **options)), record(DataLoader(dataset, 6, **options))
        for _ in range(4):
            for pair in itertools.zip_longest(first, second):
                trace.see("pair", pair)
                scribble(pair)
            trace.see("states", states(generator))
        return trace

    assert both(record).difference(both(identity)) is None


def test_the_plain_loader_is_still_the_users(record: Record) -> None:
    def mixed(record: Record) -> Trace:
        seed_all()
        loader, trace = DataLoader(DictOfNumpy(), 4, shuffle=True), Trace()
        recorded = record(loader)
        for source in (recorded, loader, recorded, loader, recorded):
            for batch in source:
                trace.see("batch", batch)
                scribble(batch)
            trace.see("states", states())
        return trace

    assert mixed(record).difference(mixed(identity)) is None


def test_seeds_set_between_epochs(record: Record) -> None:
    def seeds(record: Record) -> Trace:
        loader, trace = record(DataLoader(DictOfNumpy(), 4, shuffle=True)), Trace()
        for seed in (1, 1, 2, 1):
            seed_all(seed)
            trace.see("epoch", list(loader))
            trace.see("states", states())
        return trace

    assert seeds(record).difference(seeds(identity)) is None


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_batches_made_without_gradients(guard: Callable[[], Any], record: Record) -> None:
    def guarded(record: Record) -> Trace:
        seed_all()
        loader, trace = record(DataLoader(DictOfNumpy(), 4, shuffle=True)), Trace()
        for is_guarded in (False, True, False, True):
            with guard() if is_guarded else torch.enable_grad():
                for batch in loader:
                    trace.see("batch", batch)
        return trace

    assert guarded(record).difference(guarded(identity)) is None


@pytest.mark.parametrize("memory", [1, 500, 4_000])
def test_a_bound_on_memory_changes_no_batch(memory: int, record: Record) -> None:
    for case in (
        Case("one-hot"),
        Case("nested"),
        Case("dict of numpy", "replacement"),
        Case("unequal", "shuffle", "padded"),
    ):
        check(replace(case, recorded={"memory_bytes": memory}), record)


def test_a_program_finds_the_loaders_attributes(record: Record) -> None:
    """`len(loader.dataset)` and `loader.sampler.set_epoch(epoch)` stand in many a loop around the line that changes."""
    loader = DataLoader(DictOfNumpy(), 4, shuffle=True, drop_last=True, generator=torch.Generator())
    recorded = record(loader)
    for name in (
        "dataset",
        "sampler",
        "batch_sampler",
        "batch_size",
        "drop_last",
        "generator",
        "num_workers",
        "collate_fn",
    ):
        assert getattr(recorded, name) is getattr(loader, name)


# Refused at once ------------------------------------------------------------------------------------------------------


class Endless(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(5))


def test_an_iterable_dataset_is_refused_by_name(record: Record) -> None:
    with pytest.raises(ConfigError, match="Endless"):
        record(DataLoader(Endless(), batch_size=2))


@pytest.mark.parametrize("given", [DictOfNumpy(), [1, 2], iter([1]), None, 5])
def test_what_is_no_loader_is_refused(given: Any, record: Record) -> None:
    with pytest.raises(FasttrainError):
        record(given)


# The harness itself ---------------------------------------------------------------------------------------------------


def caught(broken: Record, *, among: list[Case]) -> list[str]:
    """The combinations in which a recorder that is broken on purpose gives what the plain loader does not."""
    return [case.name for case in among if run(case, broken).difference(run(case, identity)) is not None]


def test_harness_the_plain_loader_agrees_with_itself() -> None:
    assert caught(identity, among=CASES) == []


def test_harness_a_recorder_of_rows_passes() -> None:
    """`freezes_rows` is right where no row changes: these combinations ask for nothing that cannot be had."""
    strides = {"strided", "conjugates"}  # copy.deepcopy does not keep them
    assert set(caught(freezes_rows, among=CASES)) <= {case.name for case in CASES if case.dataset in strides}


def test_harness_catches_a_replay_of_the_first_epoch() -> None:
    shuffled = [case for case in CASES if case.order in ("shuffle", "draws torch", "weighted") and case.own]
    assert len(caught(ReplaysFirstEpoch, among=shuffled)) == len(shuffled)


def test_harness_catches_a_store_that_is_given_out() -> None:
    assert len(caught(gives_out_its_store, among=[Case("dict of numpy", "shuffle", "changes its rows")])) == 1


def test_harness_catches_a_draw_too_many() -> None:
    assert len(caught(DrawsOnceMore, among=CASES[:20])) == 20


def test_harness_counts_reads() -> None:
    assert reads_by_epoch(Case("dict of numpy"), identity) == [20] * 4
    assert reads_by_epoch(Case("dict of numpy"), freezes_rows) == [20, 0, 0, 0]
    assert reads_by_epoch(Case("getitems"), identity) == [20] * 4
