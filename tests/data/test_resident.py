from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fasttrain.data import resident as module
from fasttrain.data.ragged import Ragged
from fasttrain.data.resident import epoch_order, resident
from fasttrain.errors import ConfigError, DataError, DeviceError


def rows_of(batches: object) -> list[list[int]]:
    return [batch[0].tolist() for batch in batches]  # pyright: ignore


@given(
    num_rows=st.integers(1, 50),
    batch_size=st.integers(1, 60),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    block_bytes=st.integers(1, 400),
)
def test_each_epoch_visits_each_row_once(
    num_rows: int, batch_size: int, shuffle: bool, drop_last: bool, block_bytes: int
) -> None:
    rows = torch.arange(num_rows)
    if drop_last and batch_size > num_rows:
        with pytest.raises(ConfigError, match=f"batch_size {batch_size} is larger than the {num_rows} rows"):
            resident(rows, batch_size=batch_size, device="cpu", shuffle=shuffle, drop_last=drop_last)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_BYTES", block_bytes)
        batches = resident(rows, rows * 2, batch_size=batch_size, device="cpu", shuffle=shuffle, drop_last=drop_last)
    for epoch in range(2):
        seen = list(batches)
        flat = [row for batch in seen for row in batch[0].tolist()]
        used = num_rows - num_rows % batch_size if drop_last else num_rows
        assert len(seen) == len(batches)
        assert len(flat) == used
        assert len(set(flat)) == used
        assert flat == batches.order(epoch).tolist()
        assert all(torch.equal(double, 2 * single) for single, double in seen)
        assert all(len(batch[0]) == batch_size for batch in seen[:-1])


def test_the_order_is_a_pure_function_of_seed_and_epoch() -> None:
    def batches(seed: int) -> object:
        return resident(torch.arange(100), batch_size=10, device="cpu", seed=seed)

    first, second = batches(3), batches(3)
    epochs = [rows_of(first) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    second.set_epoch(2)  # pyright: ignore
    assert rows_of(second) == epochs[2]
    assert rows_of(batches(4)) != epochs[0]


def test_the_order_of_epochs_is_pinned() -> None:
    """A run that is resumed later, by another version, must find the same order."""
    assert epoch_order(10, 1337, 0).tolist() == PINNED[0]
    assert epoch_order(10, 1337, 1).tolist() == PINNED[1]


PINNED = [[7, 6, 3, 5, 2, 8, 4, 9, 0, 1], [8, 5, 0, 7, 4, 3, 2, 6, 1, 9]]


def test_neighbouring_seeds_and_epochs_share_no_order() -> None:
    orders = {tuple(epoch_order(20, seed, epoch).tolist()) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def test_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    list(resident(torch.arange(10), batch_size=2, device="cpu"))
    assert torch.equal(torch.get_rng_state(), before)


def test_dicts_ragged_columns_and_dtypes() -> None:
    columns = {
        "x": Ragged.of_lengths(torch.arange(6), torch.tensor([1, 2, 3])),
        "y": np.array([0.0, 1.0, 2.0], dtype=np.float32),
    }
    batch = next(iter(resident(columns, batch_size=2, device="cpu", shuffle=False)))
    assert batch["x"].values.tolist() == [0, 1, 2]
    assert batch["x"].offsets.tolist() == [0, 1, 3]
    assert batch["y"].tolist() == [0.0, 1.0]
    assert batch["y"].dtype == torch.float32


def test_a_frame_of_numbers() -> None:
    frame = pd.DataFrame({"a": [1, 2], "b": [0.5, 1.5]})
    (batch,) = resident(frame, batch_size=2, device="cpu", shuffle=False)
    assert batch["a"].tolist() == [1, 2]
    assert batch["b"].tolist() == [0.5, 1.5]


def test_unshuffled_ragged_batches_are_gathered_once() -> None:
    batches = resident(
        {"x": Ragged.of_lengths(torch.arange(6), torch.tensor([1, 2, 3]))}, batch_size=3, device="cpu", shuffle=False
    )
    (first,), (second,) = list(batches), list(batches)
    assert first["x"].values.data_ptr() == second["x"].values.data_ptr()


@pytest.mark.parametrize(
    ("columns", "options", "error", "message"),
    [
        ((torch.zeros(3), torch.zeros(4)), {}, DataError, r"lengths differ: \[3, 4\]"),
        ((), {}, DataError, "at least one column"),
        ((torch.zeros(0),), {}, DataError, "at least one row"),
        ((torch.zeros(3),), {"batch_size": 0}, ConfigError, "batch_size 0"),
        ((torch.zeros(3),), {"seed": -1}, ConfigError, "seed -1"),
        ((torch.zeros(3),), {"device": "gpu"}, DeviceError, "unknown device 'gpu'"),
        ((pd.DataFrame({"a": ["x"]}),), {}, DataError, "column 'a'"),
        ((pd.DataFrame({"a": [1.0, None]}),), {}, DataError, "1 missing"),
    ],
)
def test_bad_input(
    columns: tuple[object, ...], options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        resident(*columns, **{"batch_size": 1, "device": "cpu", **options})  # pyright: ignore


def sources(num_rows: int) -> dict[str, tuple[object, ...]]:
    """One of each kind that `resident` takes, all of so many rows."""
    numbers = torch.arange(num_rows)
    lengths = numbers % 3
    bags = Ragged.of_lengths(torch.arange(int(lengths.sum())), lengths)
    return {
        "tensors": (numbers, numbers.double() / 2),
        "ragged": (bags, numbers),
        "dict": ({"bags": bags, "number": numbers},),
        "frame": (pd.DataFrame({"number": np.arange(num_rows), "half": np.arange(num_rows) / 2}),),
    }


@settings(deadline=None)
@given(
    kind=st.sampled_from(sorted(sources(1))),
    num_rows=st.integers(1, 40),
    batch_size=st.integers(1, 7),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    block_bytes=st.integers(1, 400),
    sizes=st.lists(st.integers(0, 4), max_size=30),
)
def test_spans_and_single_batches_are_what_iteration_gives(
    kind: str, num_rows: int, batch_size: int, shuffle: bool, drop_last: bool, block_bytes: int, sizes: list[int]
) -> None:
    """Whichever are taken at a time (0: one by `next`), over two epochs."""
    assume(num_rows >= batch_size or not drop_last)
    options = {"batch_size": batch_size, "device": "cpu", "shuffle": shuffle, "drop_last": drop_last}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_BYTES", block_bytes)
        plain, mixed = (resident(*sources(num_rows)[kind], **options) for _ in range(2))  # pyright: ignore
    for _ in range(2):
        wanted = list(plain)
        found: list[Any] = []
        epoch, num_whole = iter(mixed), mixed.order(0).size // batch_size
        for size in sizes:
            span = epoch.take(size) if size else None
            steps = max(0, min(size, num_whole - len(found)))
            assert (span is not None) == (steps > 0)
            if span is None:
                found += [batch for _, batch in zip(range(1), epoch, strict=False)]
                continue
            assert (span.source, span.steps) == (mixed, steps)
            assert span.rows.tolist() == span.host_rows.tolist()
            assert len(span.host_rows) == steps * batch_size
            taken = span.batches()
            found += taken
            torch.testing.assert_close([span.batch(at) for at in range(steps)], taken, rtol=0, atol=0)
            pieces = [span.piece(begin, min(begin + 2, steps)) for begin in range(0, steps, 2)]
            assert sum(piece.steps for piece in pieces) == steps
            torch.testing.assert_close([each for piece in pieces for each in piece.batches()], taken, rtol=0, atol=0)
        found += epoch
        assert epoch.take(1) is None
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_no_span_is_taken_of_the_short_batch_that_ends_an_epoch() -> None:
    epoch = iter(resident(torch.arange(7), batch_size=3, device="cpu", shuffle=False, drop_last=False))
    span = epoch.take(3)
    assert span is not None
    assert span.steps == 2
    assert span.rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert epoch.take(1) is None
    assert [batch.tolist() for (batch,) in epoch] == [[6]]


def test_an_unshuffled_epoch_begins_again_whatever_was_taken_of_the_last() -> None:
    batches = resident(torch.arange(6), batch_size=2, device="cpu", shuffle=False)
    first = iter(batches)
    first.take(2)
    second = iter(batches)
    assert rows_of(second) == [[0, 1], [2, 3], [4, 5]]
    assert rows_of(first) == [[4, 5]]
    third = iter(batches)
    assert next(third)[0].data_ptr() == next(first.again())[0].data_ptr()


def test_an_array_of_text_is_refused() -> None:
    with pytest.raises(DataError, match="dtype object: a resident table holds numbers only"):
        resident(np.array(["a", "b"], dtype=object), batch_size=1, device="cpu")


def test_unshuffled_batches_are_views_of_the_data() -> None:
    data = torch.arange(10.0)
    batches = [batch for (batch,) in resident(data, batch_size=4, device="cpu", shuffle=False, drop_last=False)]
    assert [batch.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [batch.data_ptr() - data.data_ptr() for batch in batches] == [0, 16, 32]


ARRAYS = {
    "float64": np.array([0.1, 1e300, -0.0]),
    "int64": np.array([2**53 + 1, 2**62, -1]),
    "bool": np.array([True, False, True]),
    "uint8": np.array([0, 255, 7], np.uint8),
    "complex128": np.array([1j, 2.5, 3]),
    "float16": np.array([0.5, 65504, 1], np.float16),
    "reversed": np.arange(6.0)[::-2],
    "transposed": np.arange(6).reshape(2, 3).T,
    "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "big-endian floats": np.array([0.1, 2.5, -3], ">f8"),
    "big-endian integers": np.array([1, 256, -2], ">i4"),
    "uint16": np.array([1, 2**16 - 1, 3], np.uint16),
    "uint32": np.array([1, 2**32 - 1, 3], np.uint32),
    "not writable": np.frombuffer(np.arange(3.0).tobytes()),
    "a mask of nothing": np.ma.array([1.5, 2.5, 3.5], mask=[False] * 3),
}


@pytest.mark.parametrize("given_array", ARRAYS.values(), ids=ARRAYS)
@pytest.mark.parametrize("shuffle", [False, True])
def test_arrays_keep_their_values(given_array: np.ndarray, shuffle: bool) -> None:
    batches = resident(given_array, torch.arange(3), batch_size=2, device="cpu", shuffle=shuffle, drop_last=False)
    for values, numbers in batches:
        assert values.tolist() == given_array[numbers.numpy()].tolist()
        if given_array.dtype.isnative and given_array.dtype.str not in ("<u2", "<u4"):
            assert values.numpy().dtype == given_array.dtype


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([2**53 + 1, -1, 0]),
        torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64),
        torch.tensor([1 + 1j, 2, 3]).conj(),
        torch.tensor([0.5, 1.5, 2.5], dtype=torch.bfloat16),
        torch.arange(6.0)[::2],
        torch.ones(1).expand(3),
        torch.arange(12).view(3, 2, 2).transpose(1, 2),
        torch.tensor([1, 2**16 - 1, 3], dtype=torch.uint16),
    ],
    ids=lambda tensor: str(tensor.dtype),
)
def test_tensors_keep_their_values(tensor: torch.Tensor) -> None:
    for values, numbers in resident(tensor, torch.arange(3), batch_size=2, device="cpu", drop_last=False):
        assert values.tolist() == [tensor[number].tolist() for number in numbers.tolist()]
        assert values.dtype in (tensor.dtype, torch.int32)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (torch.tensor(3.0), "a single number"),
        (np.array(3), "a single number"),
        (3.5, "a column is a float"),
        ([1.0, 2.0], "a column is a list"),
        ((torch.zeros(2), torch.zeros(2)), "a column is a tuple"),
        ("text", "a column is a str"),
        (None, "a column is a NoneType"),
        (pd.Series([1, 2]), "a column is a Series"),
        (torch.zeros(2, requires_grad=True), r"give tensor.detach\(\)"),
        (torch.eye(2).to_sparse(), "a sparse, nested or quantized tensor"),
        (torch.zeros(2, device="meta"), "meta device"),
        (torch.zeros(2, dtype=torch.uint64), "uint64"),
        (np.zeros(2, np.uint64), "uint64"),
        (np.ma.array([1, 2], mask=[True, False]), "masked values"),
        (np.array(["2020-01-01"], "M8[D]"), r"dtype datetime64\[D\]"),
        (np.array(["a"]), "dtype <U1"),
        (np.zeros(2, [("a", "f4")]), "holds numbers only"),
        (np.zeros(2, np.longdouble), "holds numbers only"),
        (np.empty((0, 3)), "at least one row"),
    ],
)
def test_columns_that_are_no_data(column: Any, message: str) -> None:
    for given_columns in ((column,), (torch.zeros(2), column), ({"x": torch.zeros(2), "y": column},)):
        with pytest.raises(DataError, match=message if "row" not in message else "row"):
            resident(*given_columns, batch_size=1, device="cpu")


def test_a_mapping_beside_other_columns_is_refused() -> None:
    with pytest.raises(DataError, match="a column is a dict"):
        resident({"x": torch.zeros(2)}, torch.zeros(2), batch_size=1, device="cpu")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (pd.array([2**53 + 1, 2], dtype="Int64"), torch.int64),
        (pd.array([0.5, 2], dtype="Float32"), torch.float32),
        (pd.array([True, False], dtype="boolean"), torch.bool),
        (np.array([1, 2], ">i8"), torch.int64),
        (np.array([1, 200], np.uint8), torch.uint8),
        (pd.arrays.SparseArray([0.0, 1.5]), torch.float64),
    ],
)
def test_frames_keep_their_values(values: Any, dtype: torch.dtype) -> None:
    frame = pd.DataFrame({"a": values})
    (batch,) = resident(frame, batch_size=2, device="cpu", shuffle=False)
    assert batch["a"].dtype == dtype
    assert batch["a"].tolist() == frame["a"].tolist()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pd.array([1, None], dtype="Int64"), "1 missing"),
        (pd.array([True, None], dtype="boolean"), "1 missing"),
        (np.array([1.0, np.nan]), "1 missing"),
        (np.array(["2020", "2021"], "M8[s]"), "dtype datetime64"),
        (np.array([1, 2], "m8[s]"), "dtype timedelta64"),
        (pd.Categorical([1, 2]), "dtype category"),
        (["a", "b"], "column 'a'"),
        ([1, "b"], "dtype object"),
    ],
)
def test_frames_of_what_is_no_number(values: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        resident(pd.DataFrame({"a": values, "b": [1, 2]}), batch_size=1, device="cpu")


def test_two_columns_of_a_frame_with_one_name_are_refused() -> None:
    for names in (["a", "a"], [1, "1"]):
        with pytest.raises(DataError, match="columns have the same name"):
            resident(pd.DataFrame([[1, 2]], columns=pd.Index(names)), batch_size=1, device="cpu")


def test_what_is_done_to_a_tensor_later_does_not_reach_its_shape_or_gradients() -> None:
    tensor = torch.arange(6.0)
    batches = resident(tensor, batch_size=3, device="cpu", shuffle=False)
    tensor.requires_grad_()
    tensor.data = torch.zeros(1)
    assert [(batch.tolist(), batch.requires_grad) for (batch,) in batches] == [([0, 1, 2], False), ([3, 4, 5], False)]


def test_after_a_short_last_batch_there_is_nothing_to_take() -> None:
    epoch = iter(resident(torch.arange(11.0), batch_size=4, device="cpu", drop_last=False))
    assert len(list(epoch)) == 3
    for most in (1, 4):
        assert epoch.take(most) is None
    assert list(epoch) == []
