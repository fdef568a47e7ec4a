import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fasttrain.data.ragged import Ragged, RaggedTable, gather_by_index

tables = st.lists(st.lists(st.integers(0, 60_000), max_size=7), min_size=1, max_size=30)


def as_table(rows: list[list[int]]) -> RaggedTable:
    offsets = np.cumsum([0, *map(len, rows)])
    return RaggedTable(
        np.array([value for row in rows for value in row], dtype=np.uint16), offsets, torch.device("cpu")
    )


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
