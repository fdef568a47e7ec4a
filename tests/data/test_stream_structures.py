"""What a batch may be: `prefetch` brings every structure over as it was."""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict, defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from fasttrain.data.batch import num_samples
from fasttrain.data.stream import prefetch
from tests.data.late_copies import LateCopies, late


class Pair(NamedTuple):
    ids: Any
    target: Any


@dataclass(frozen=True, slots=True)
class Frozen:
    ids: Any
    target: Any


@dataclass
class Checked:
    ids: Any
    num_made: list[int] = field(default_factory=list)
    half: Any = field(init=False)

    def __post_init__(self) -> None:
        self.num_made.append(1)
        self.half = self.ids / 2


def leaves() -> st.SearchStrategy[Any]:
    tensors = st.builds(
        lambda shape, dtype: torch.arange(int(np.prod(shape))).reshape(shape).to(dtype),
        st.lists(st.integers(0, 4), max_size=3),
        st.sampled_from([torch.float32, torch.int64, torch.uint8, torch.bool, torch.float16]),
    )
    others = st.none() | st.integers() | st.text(max_size=3) | st.just(np.arange(3)) | st.just(torch.Size([2, 3]))
    return tensors | others


def nested() -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.tuples(inner, inner)
            | st.dictionaries(st.text(max_size=2), inner, max_size=3)
            | st.builds(Pair, inner, inner)
            | st.builds(Frozen, inner, inner)
            | st.dictionaries(st.text(max_size=2), inner, max_size=3).map(OrderedDict)
        ),
        max_leaves=12,
    )


def assert_same(got: Any, expected: Any) -> None:
    assert type(got) is type(expected)
    if isinstance(expected, Tensor):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
    elif isinstance(expected, dict):
        assert list(got) == list(expected)
        for key in expected:
            assert_same(got[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert_same(a, b)
    elif isinstance(expected, Frozen):
        assert_same((got.ids, got.target), (expected.ids, expected.target))
    else:
        assert got is expected


@settings(deadline=None, max_examples=60)
@given(batches=st.lists(nested(), max_size=6), depth=st.integers(1, 3))
def test_any_structure_arrives_as_it_left(batches: list[Any], depth: int) -> None:
    lane = LateCopies()
    held = list(late(batches, lane, depth))
    lane.finish()
    assert len(held) == len(batches)
    for got, expected in zip(held, batches, strict=True):
        assert_same(got, expected)


@settings(deadline=None, max_examples=40)
@given(batch=nested())
def test_on_the_cpu_a_batch_is_yielded_itself(batch: Any) -> None:
    [got] = prefetch([batch], "cpu")
    assert got is batch


def test_what_was_handed_in_is_not_changed(lane: LateCopies) -> None:
    ids = torch.arange(3)
    batch = {"ids": ids, "rest": [ids, Pair(ids, "x")]}
    before = copy.copy(batch)
    [moved] = late([batch], lane)
    assert batch["ids"] is ids
    assert batch["rest"] is before["rest"]
    assert moved["ids"] is not ids
    assert moved["rest"] is not batch["rest"]


def test_dataclasses_are_copied_without_their_constructor(lane: LateCopies) -> None:
    batch = Checked(torch.arange(4.0))
    [moved] = late([batch], lane)
    lane.finish()
    assert moved.num_made == [1]
    assert torch.equal(moved.half, torch.arange(4.0) / 2)
    assert moved.half is not batch.half


class Graph:
    def __init__(self, nodes: Tensor, dataset: Any) -> None:
        self.nodes = nodes
        self.edges = {"from": torch.tensor([0, 1]), "to": (torch.tensor([1, 2]),)}
        self.dataset = dataset
        self.itself = self


def test_tensors_among_the_attributes_of_an_object_are_moved(lane: LateCopies) -> None:
    dataset = Graph(torch.ones(2), None)
    batch = Graph(torch.arange(4.0), dataset)
    [moved] = late([batch], lane)
    lane.finish()
    assert type(moved) is Graph
    assert torch.equal(moved.nodes, batch.nodes)
    assert moved.nodes is not batch.nodes
    assert moved.edges["to"][0] is not batch.edges["to"][0]
    assert moved.dataset is dataset
    assert num_samples(batch) == 4


def test_kinds_of_mappings_lists_and_tuples_are_kept(lane: LateCopies) -> None:
    class Rows(list[Any]):
        name = "rows"

    grouped: defaultdict[str, Any] = defaultdict(list, ids=torch.ones(2))
    encoded = UserDict(ids=torch.ones(2))
    best = torch.arange(6.0).reshape(2, 3).max(dim=1)
    [moved] = late([(grouped, encoded, Rows([torch.ones(1)]), best)], lane)
    assert [type(part) for part in moved] == [defaultdict, UserDict, Rows, type(best)]
    assert moved[0]["absent"] == []
    assert encoded["ids"] is not moved[1]["ids"]


def test_a_packed_sequence_keeps_its_batch_sizes_on_the_host(lane: LateCopies) -> None:
    packed = pack_sequence([torch.arange(3), torch.arange(2)], enforce_sorted=False)
    [moved] = late([packed], lane)
    lane.finish()
    assert type(moved) is PackedSequence
    assert moved.batch_sizes is packed.batch_sizes
    assert moved.data is not packed.data
    assert torch.equal(moved.unsorted_indices, packed.unsorted_indices)
