"""Columns and their builder: rows come out with the bits that they went in with, whatever form they are kept in."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fasttrain.data import columns as module
from fasttrain.data.columns import Column, ColumnBuilder, DenseColumn, RowsDifferError, SparseColumn, restore_column
from fasttrain.data.ragged import Ragged
from fasttrain.data.resident import resident
from fasttrain.errors import DataError

CPU = torch.device("cpu")
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES = [*INTEGERS, *FLOATS, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn]


def bits(tensor: Tensor) -> list[Any]:
    """Shape, dtype and bytes."""
    flat = tensor.contiguous().view(-1)
    return [tensor.dtype, tensor.shape, flat.view(torch.uint8).tolist() if flat.numel() else []]


def built(rows: Tensor, order: list[int] | None = None, at_a_time: int = 3) -> ColumnBuilder:
    builder = ColumnBuilder(len(rows))
    order = list(range(len(rows))) if order is None else order
    for at in range(0, len(order), at_a_time):
        numbers = order[at : at + at_a_time]
        builder.put(numbers, torch.stack([rows[number] for number in numbers]))
    return builder


def gathered(column: Column, order: list[int], batch_size: int = 4) -> Tensor:
    numbers = np.array(order)
    batches: Any = column.gather(torch.from_numpy(numbers), numbers, batch_size)
    assert [len(each) for each in batches[:-1]] == [batch_size] * (len(batches) - 1)
    return torch.cat([each.view(torch.uint8) for each in batches]) if not order else cat(batches)


def cat(batches: list[Tensor]) -> Tensor:
    """torch.cat for any dtype."""
    raw = np.concatenate([each.contiguous().view(-1).view(torch.uint8).numpy() for each in batches])
    return torch.from_numpy(raw).view(batches[0].dtype).view(-1, *batches[0].shape[1:])


@st.composite
def tables(draw: st.DrawFn, dtypes: list[torch.dtype] = DTYPES) -> Tensor:
    """Rows of any dtype: zeros with some of a few values, which may be any bits."""
    dtype = draw(st.sampled_from(dtypes))
    num_rows = draw(st.integers(1, 12))
    shape = draw(st.sampled_from([(), (1,), (7,), (40,), (5, 9), (2, 3, 8)]))
    seed = draw(st.integers(0, 2**32 - 1))
    density = draw(st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]))
    pool = draw(st.sampled_from(["one", "small", "any bits", "special"]))
    generator = np.random.default_rng(seed)
    size = num_rows * int(np.prod(shape))
    made = torch.zeros(size, dtype=torch.uint8).repeat_interleave(dtype.itemsize).view(dtype)
    if pool == "any bits" and dtype != torch.bool:
        values = torch.from_numpy(generator.integers(0, 256, size * dtype.itemsize, dtype=np.uint8)).view(dtype)
    elif pool == "special" and dtype.is_floating_point and dtype.itemsize > 1:
        special = torch.tensor([-0.0, float("nan"), float("inf"), -float("inf"), 1.0, -1.0, 255.0]).to(dtype)
        values = special[torch.from_numpy(generator.integers(0, len(special), size))]
    else:
        numbers = np.ones(size) if pool == "one" else generator.integers(0, 5, size)
        values = torch.from_numpy(numbers.astype(np.float64)).to(dtype)
    is_there = torch.from_numpy(generator.random(size) < density).repeat_interleave(dtype.itemsize)
    raw = torch.where(is_there, values.view(torch.uint8), made.view(torch.uint8))
    return raw.view(dtype).view(num_rows, *shape)


@settings(deadline=None, max_examples=300)
@given(tables(), st.randoms(use_true_random=False), st.integers(1, 5))
def test_rows_come_back_bit_for_bit(rows: Tensor, random: Any, at_a_time: int) -> None:
    """From a builder that is filled in any order, partly or wholly, and from the column that it makes."""
    order = list(range(len(rows)))
    random.shuffle(order)
    some = order[: len(order) // 2 + 1]
    builder = built(rows, some, at_a_time)
    assert builder.has(range(len(rows))).tolist() == [number in some for number in range(len(rows))]
    assert len(builder) == len(some)
    random.shuffle(some)
    assert bits(builder.get(some)) == bits(rows[some] if rows.dtype in FLOATS else cat([rows[i : i + 1] for i in some]))
    for number in order:
        builder.put([number], rows[number : number + 1])
    assert builder.is_complete
    column = builder.column(CPU)
    random.shuffle(order)
    wanted = bits(cat([rows[number : number + 1] for number in order]))
    assert bits(gathered(column, order)) == wanted
    assert bits(builder.get(order)) == wanted
    assert (column.kind.dtype, column.kind.shape, len(column)) == (rows.dtype, rows.shape[1:], len(rows))
    assert bits(gathered(restore_column(column.kind, column.tables, CPU), order)) == wanted
    assert column.nbytes <= rows.nbytes


def forms(rows: Tensor) -> tuple[str, list[torch.dtype]]:
    column = built(rows).column(CPU)
    return column.kind.form, [table.dtype for table in column.tables]


def one_hot(num_rows: int = 20, num_values: int = 100, dtype: torch.dtype = torch.float32) -> Tensor:
    """Four ones a row."""
    rows = torch.zeros(num_rows, num_values, dtype=dtype)
    places = torch.rand(num_rows, num_values, generator=torch.Generator().manual_seed(0)).topk(4).indices
    return rows.scatter_(1, places, 1)


i8, u8, i16, i32, i64 = torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64
f16, f32, f64 = torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("rows", "form", "dtypes"),
    [
        (torch.arange(10), "dense", [u8]),
        (torch.arange(-1, 9), "dense", [i8]),
        (torch.arange(10) * 200, "dense", [i16]),
        (torch.arange(10) << 16, "dense", [i32]),
        (torch.arange(10) << 40, "dense", [i64]),
        (torch.arange(10.0), "dense", [u8]),
        (torch.arange(10.0).half(), "dense", [u8]),
        (torch.arange(10.0).half() * 100, "dense", [f16]),
        (torch.arange(10.0, dtype=f64) * 1e5, "dense", [i32]),
        (torch.arange(10.0) - 0.5, "dense", [f32]),
        (torch.tensor([1.0, -0.0]), "dense", [f32]),
        (torch.tensor([True, False]), "dense", [torch.bool]),
        (torch.ones(3, 5, dtype=torch.complex64), "dense", [torch.complex64]),
        (torch.zeros(3, 500, dtype=torch.complex64), "dense", [torch.complex64]),
        (one_hot(), "sparse", [i32, i64]),
        (one_hot(dtype=torch.bool), "sparse", [i32, i64]),
        (one_hot(dtype=i64), "sparse", [i32, i64]),
        (one_hot() * 0.5, "sparse", [i32, i64, f32]),
        (one_hot() * float("nan"), "dense", [f32]),
        (torch.where(one_hot() == 1, float("nan"), 0.0), "sparse", [i32, i64, f32]),
        (torch.where(one_hot() == 1, -0.0, 0.0), "sparse", [i32, i64, f32]),
        (torch.zeros(4, 100), "sparse", [i32, i64]),
        (one_hot(num_values=30), "dense", [u8]),
    ],
)
def test_the_form_is_the_smallest(rows: Tensor, form: str, dtypes: list[torch.dtype]) -> None:
    assert forms(rows) == (form, dtypes)


def test_one_batch_of_another_kind_does_not_change_the_form_of_all() -> None:
    rows = one_hot(200)
    rows[3:6] = torch.randn(3, 100)
    column = built(rows).column(CPU)
    assert column.kind.form == "sparse"
    assert torch.equal(gathered(column, list(range(200))), rows)
    rows[6:150] = 3.0
    column = built(rows).column(CPU)
    assert column.kind.form == "dense"
    assert torch.equal(gathered(column, list(range(200))), rows)


def test_rows_that_are_there_stay_and_the_first_of_equal_numbers_counts() -> None:
    builder = ColumnBuilder(4)
    builder.put([2, 2, 0], torch.tensor([5.0, 6.0, 7.0]))
    builder.put(np.array([0, 1, 2]), torch.tensor([8.0, 9.0, 1.0]))
    assert builder.get([0, 1, 2]).tolist() == [7.0, 9.0, 5.0]
    assert builder.has([3, 0]).tolist() == [False, True]
    for numbers in ([3], [0, 3]):
        with pytest.raises(KeyError, match=r"row \[3\] is not there"):
            builder.get(numbers)
    with pytest.raises(KeyError, match="1 of 4 rows are not there"):
        builder.column(CPU)
    with pytest.raises(KeyError):
        ColumnBuilder(2).get([0])


def test_what_is_given_out_shares_no_memory_with_the_rows() -> None:
    for rows in (torch.randn(6, 4), one_hot(6), torch.arange(6)):
        builder = built(rows)
        column = builder.column(CPU)
        for _ in range(2):
            for given_out in (builder.get([1, 0]), *column.gather(torch.tensor([0, 1]), np.array([0, 1]), 1)):
                assert isinstance(given_out, Tensor)
                given_out.fill_(17)
        assert torch.equal(gathered(column, list(range(6))), rows)
        rows.fill_(3)
        assert not torch.equal(gathered(column, list(range(6))), rows)


@pytest.mark.parametrize(
    "other",
    [torch.zeros(1, 5), torch.zeros(1, 4, dtype=torch.float64), torch.zeros(2, 4), torch.zeros(1, 4).to_sparse()],
)
def test_rows_of_another_shape_or_dtype_are_refused(other: Tensor) -> None:
    builder = built(torch.randn(3, 4))
    with pytest.raises(RowsDifferError):
        builder.put([0], other)
    assert builder.is_complete


@pytest.mark.parametrize(
    ("ids", "offsets", "values", "message"),
    [
        ([0, 9], [0, 1, 2], None, "from 0 to 8"),
        ([0, -1], [0, 1, 2], None, "from 0 to 8"),
        ([3, 2], [0, 2, 2], None, "do not rise"),
        ([3, 3], [0, 2, 2], None, "do not rise"),
        ([0, 1], [0, 1, 3], None, "number of values"),
        ([0, 1], [0, 3, 2], None, "Ragged offsets fall"),
        ([0, 1], [0, 1, 2], [1.0], "number of values"),
    ],
)
def test_entries_that_are_none_are_refused(ids: Any, offsets: Any, values: Any, message: str) -> None:
    given_values = None if values is None else torch.tensor(values)
    with pytest.raises(DataError, match=message):
        SparseColumn(
            torch.tensor(ids, dtype=i32),
            torch.tensor(offsets),
            given_values,
            dtype=f32,
            shape=(9,),
            device=CPU,
        )


def test_tables_of_another_kind_are_refused() -> None:
    sparse, dense = built(one_hot()).column(CPU), built(torch.randn(20, 100)).column(CPU)
    for kind, tables in ((sparse.kind, dense.tables), (dense.kind, [torch.zeros(3, 100, dtype=i64)])):
        with pytest.raises(DataError, match=r"of this kind|of another kind"):
            restore_column(kind, tables, CPU)
    ragged = resident(Ragged(torch.arange(3), torch.tensor([0, 2, 3])), batch_size=1, device="cpu").columns[0]
    assert torch.equal(restore_column(ragged.kind, ragged.tables, CPU).tables[0], torch.arange(3))


@pytest.mark.parametrize("shuffle", [False, True])
def test_resident_batches_of_columns_are_those_of_tensors(shuffle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, small, plain = one_hot(30, dtype=f64) * 0.25, torch.arange(30), torch.randn(30, 3)
    columns = [built(each).column(CPU) for each in (rows, small, plain)]
    options: dict[str, Any] = {"batch_size": 4, "device": "cpu", "shuffle": shuffle, "drop_last": False}
    for _ in range(2):
        for found, wanted in zip(resident(*columns, **options), resident(rows, small, plain, **options), strict=True):
            assert [bits(each) for each in found] == [bits(each) for each in wanted]


def test_unshuffled_batches_of_narrow_columns_are_not_all_kept() -> None:
    rows = one_hot(1_000, 500)
    source = resident(built(rows, at_a_time=100).column(CPU), batch_size=10, device="cpu", shuffle=False)
    first, second = [next(iter(source))[0] for _ in range(2)]
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()
    assert source.block_rows * 500 * 4 <= 8 << 20


def test_a_large_sparse_column_takes_little_memory_and_time() -> None:
    """A tenth of the reviews, [39,200, 5,317] float32, 834 MB. The bound on time is far above what it takes."""
    generator = torch.Generator().manual_seed(0)
    batch = torch.zeros(128, 5317)
    batch.scatter_(1, torch.randint(0, 5317, (128, 66), generator=generator), 1)
    num_rows = 4_000
    builder = ColumnBuilder(num_rows)
    order = np.random.default_rng(0).permutation(num_rows)
    put_s = []
    for at in range(0, num_rows, 128):
        numbers = order[at : at + 128]
        begin = time.perf_counter()
        builder.put(numbers, batch[: len(numbers)])
        put_s.append(time.perf_counter() - begin)
    assert builder.nbytes < num_rows * 66 * 4 * 2
    column = builder.column(CPU)
    assert column.nbytes < num_rows * (66 * 4 + 8) * 1.01
    assert torch.equal(gathered(column, order[128:256].tolist(), 128), batch)
    assert np.median(put_s) < 0.02


def test_blocks_of_any_size_give_the_same_column(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = one_hot(50)
    rows[10:20] = torch.randn(10, 100)
    order = list(np.random.default_rng(1).permutation(50))
    wanted = built(rows, order).column(CPU)
    for entries in (1, 7, 300):
        monkeypatch.setattr(module, "BLOCK_ENTRIES", entries)
        found = built(rows, order).column(CPU)
        assert found.kind == wanted.kind
        assert all(map(torch.equal, found.tables, wanted.tables))


def test_a_column_of_a_narrower_dtype_is_what_was_given() -> None:
    column = DenseColumn(torch.tensor([0, 255], dtype=torch.uint8), torch.float64)
    assert bits(gathered(column, [1, 0])) == bits(torch.tensor([255.0, 0.0], dtype=torch.float64))
    assert (column.nbytes, column.row_nbytes) == (2, 8)


@pytest.mark.parametrize(
    ("values", "dtypes"),
    [
        ([1, -1, 300, 70_000, 1 << 40, 2], [u8, i8, i16, i32, i64, i64]),
        ([1.0, 300.0, -1.0, 0.5, 2.0], [u8, i16, i16, f32, f32]),
        ([0.0, 200.0, -0.0], [u8, u8, f32]),
    ],
)
def test_rows_that_are_there_stay_as_they_are_where_others_need_more_bits(
    values: list[float], dtypes: list[torch.dtype]
) -> None:
    rows = torch.tensor(values)
    builder = ColumnBuilder(len(rows))
    for number, dtype in enumerate(dtypes):
        builder.put([number], rows[number : number + 1])
        assert bits(builder.get(range(number + 1))) == bits(rows[: number + 1])
        assert builder.nbytes == len(rows) + (number + 1) * dtype.itemsize
    assert bits(gathered(builder.column(CPU), [3, 2, 1, 0][-len(rows) :])) == bits(rows[[3, 2, 1, 0][-len(rows) :]])
