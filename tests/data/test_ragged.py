from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fasttrain.data.columns import RaggedColumn
from fasttrain.data.ragged import Ragged, gather_by_index
from fasttrain.data.resident import resident
from fasttrain.errors import DataError

tables = st.lists(st.lists(st.integers(0, 60_000), max_size=7), min_size=1, max_size=30)


def as_table(rows: list[list[int]]) -> RaggedColumn:
    offsets = np.cumsum([0, *map(len, rows)])
    values = torch.tensor([value for row in rows for value in row], dtype=torch.int32)
    return RaggedColumn(Ragged(values, torch.from_numpy(offsets)), torch.device("cpu"))


@given(tables, st.integers(1, 9), st.data())
def test_gathers_rows_in_any_order(rows: list[list[int]], batch_size: int, data: st.DataObject) -> None:
    order = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=40)), dtype=np.int64)
    batches = as_table(rows).gather(torch.from_numpy(order), order, batch_size)
    wanted = [rows[i] for i in order]
    got = [row.tolist() for batch in batches for row in batch.values.split(batch.offsets.diff().tolist())]
    assert got == wanted
    assert all(batch.offsets[0] == 0 for batch in batches)
    assert [batch.num_rows for batch in batches[:-1]] == [batch_size] * max(0, len(batches) - 1)


def test_rows_of_given_lengths() -> None:
    batch = Ragged.of_lengths(torch.arange(3), torch.tensor([1, 0, 2]))
    assert (batch.offsets.tolist(), batch.num_rows) == ([0, 1, 1, 3], 3)


@given(tables, st.data())
def test_index_arithmetic_gathers_the_same(rows: list[list[int]], data: st.DataObject) -> None:
    """The way that other devices go, run on the CPU."""
    order = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=40))
    ids = torch.tensor([value for row in rows for value in row], dtype=torch.int32)
    offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
    wanted = [value for i in order for value in rows[i]]
    assert gather_by_index(ids, offsets, torch.tensor(order), len(wanted)).tolist() == wanted


def test_size_in_bytes_counts_ids_and_offsets() -> None:
    assert as_table([[1, 2], [3]]).nbytes == 3 * 4 + 3 * 8


VALUES = {
    "floats": torch.tensor([0.5, 1.5, -2.5, 3.0, 4.25]),
    "doubles": torch.tensor([0.1, 0.2, 0.3, 1e300, -0.0], dtype=torch.float64),
    "bfloat16": torch.tensor([0.5, 1.5, 2.5, 3.0, 4.0], dtype=torch.bfloat16),
    "complex": torch.tensor([1j, 2, 3 + 1j, 4, 5]).conj(),
    "booleans": torch.tensor([True, False, True, True, False]),
    "ids beyond int32": torch.tensor([2**31 + 7, 5, 2**33 + 1, -(2**40), 0]),
    "two dimensions": torch.arange(10).reshape(5, 2),
    "three dimensions, transposed": torch.arange(60.0).reshape(3, 4, 5).permute(2, 0, 1),
    "every other": torch.arange(10)[::2],
    "bytes": torch.tensor([0, 127, 255, 3, 4], dtype=torch.uint8),
    "16 bits": torch.tensor([-(2**15), 1, 2, 3, 2**15 - 1], dtype=torch.int16),
    "unsigned 16 bits": torch.tensor([2**16 - 1, 1, 2, 3, 4], dtype=torch.uint16),
    "unsigned 32 bits": torch.tensor([2**32 - 1, 1, 2, 3, 4], dtype=torch.uint32),
    "expanded": torch.tensor([7.5]).expand(5),
}
WIDENED = {
    torch.uint8: torch.int32,
    torch.int16: torch.int32,
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("shuffle", [False, True])
def test_values_come_out_as_they_went_in(values: torch.Tensor, shuffle: bool) -> None:
    offsets = torch.tensor([0, 2, 2, 5])
    source = resident(
        Ragged(values, offsets), torch.arange(3), batch_size=2, device="cpu", shuffle=shuffle, drop_last=False
    )
    for rows, numbers in source:
        for got, number in zip(rows.values.split(rows.offsets.diff().tolist()), numbers.tolist(), strict=True):
            wanted = values[offsets[number] : offsets[number + 1]]
            assert got.dtype == WIDENED.get(values.dtype, values.dtype)
            assert got.shape == wanted.shape
            assert got.tolist() == wanted.tolist()


@given(
    st.sampled_from([torch.int32, torch.int64, torch.float32, torch.float64, torch.float16, torch.bool]),
    st.lists(st.integers(0, 4), min_size=1, max_size=12),
    st.lists(st.integers(1, 3), max_size=2),
    st.integers(1, 5),
)
def test_any_dtype_and_shape(dtype: torch.dtype, lengths: list[int], entry: list[int], batch_size: int) -> None:
    values = torch.randint(0, 2**10, (sum(lengths), *entry)).to(dtype)
    rows = Ragged.of_lengths(values, torch.tensor(lengths))
    source = resident(rows, batch_size=batch_size, device="cpu", shuffle=False, drop_last=False)
    assert torch.equal(torch.cat([batch.values for (batch,) in source]), values)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        (torch.tensor([1, 2, 5]), "from 1 to 5: they must begin at 0 and end at 5"),
        (torch.tensor([0, 2, 4]), "from 0 to 4"),
        (torch.tensor([0, 4, 50]), "from 0 to 50"),
        (torch.tensor([0, 4, 2, 5]), "fall from 4 to 2 at row 1"),
        (torch.tensor([0, -3, 5]), "fall from 0 to -3 at row 0"),
        (torch.tensor([0, 9, 5]), "fall from 9 to 5 at row 1"),
        (torch.tensor([0.0, 2.0, 5.0]), r"torch.float32 of shape \[3\]"),
        (torch.tensor([[0, 5]]), r"of shape \[1, 2\]"),
        (torch.tensor(5), r"of shape \[\]"),
        (torch.tensor([True, False]), "torch.bool"),
        (torch.empty(0, dtype=torch.int64), "are empty"),
        ([0, 2, 5], "are a list"),
    ],
)
def test_offsets_that_are_none(offsets: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        resident(Ragged(torch.arange(5), offsets), batch_size=1, device="cpu")


@given(st.lists(st.integers(-3, 9), min_size=1, max_size=6), st.integers(0, 6))
def test_no_offsets_crash(offsets: list[int], num_values: int) -> None:
    """Either each row is what slicing gives, or they are refused."""
    values = torch.arange(num_values)
    is_right = offsets[0] == 0 and offsets[-1] == num_values and offsets == sorted(offsets) and len(offsets) > 1
    try:
        source = resident(Ragged(values, torch.tensor(offsets)), batch_size=1, device="cpu", shuffle=False)
    except DataError:
        assert not is_right
        return
    assert is_right
    assert [batch.values.tolist() for (batch,) in source] == [values[a:b].tolist() for a, b in pairwise(offsets)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_offsets_that_change_later_change_nothing(dtype: torch.dtype) -> None:
    offsets, values = torch.tensor([0, 2, 5], dtype=dtype), torch.arange(5)
    source = resident(Ragged(values, offsets), batch_size=1, device="cpu", shuffle=False)
    offsets.fill_(10**6)
    assert [batch.values.tolist() for (batch,) in source] == [[0, 1], [2, 3, 4]]
    assert source.columns[0].tables[1].tolist() == [0, 2, 5]


@pytest.mark.parametrize("values", [torch.empty(0, 3), torch.from_numpy(np.zeros(9)[:0]), torch.zeros(1).expand(0)])
def test_rows_without_values(values: torch.Tensor) -> None:
    source = resident(Ragged(values, torch.tensor([0, 0, 0])), batch_size=1, device="cpu", drop_last=False)
    assert [batch.values.shape for (batch,) in source] == [values.shape] * 2


def test_a_single_value_of_any_stride() -> None:
    rows = Ragged(torch.tensor(7).expand(1), torch.tensor([0, 1]))
    ((batch,),) = resident(rows, batch_size=1, device="cpu")
    assert batch.values.tolist() == [7]


def test_values_cannot_be_freed_below_the_rows() -> None:
    values = torch.arange(5)
    resident(Ragged(values, torch.tensor([0, 2, 5])), batch_size=1, device="cpu")
    with pytest.raises(RuntimeError, match="not resizable"):
        values.resize_(10_000)
