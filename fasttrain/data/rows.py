"""Rows of a user's dataset, kept as columns and given back bit for bit, as rows or as collated batches."""

from __future__ import annotations

import copy
import ctypes
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fasttrain.data.columns import Column, ColumnBuilder
from fasttrain.data.purity import same_rows
from fasttrain.errors import DataError

__all__ = ["Form", "NotKeptError", "RowStore", "StoredColumn", "form_of_plain", "plain_form"]

Row = Any

_WIDE = range(-(1 << 63), 1 << 63)

_ARRAYS = frozenset(
    map(np.dtype, ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"))
) | frozenset(map(np.dtype, ("float16", "float32", "float64", "complex64", "complex128")))


@dataclass(frozen=True)
class _Leaf:
    """A kind of value in a row: what makes it from an element of its column."""

    form: str  # tensor, array, scalar (numpy's), int, float, bool, object
    dtype: Any = None
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Key:
    """A key of a dict: `1` and `True` are two."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and type(self.value) is type(other.value) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)


@dataclass(frozen=True)
class _Tree:
    """A container in a row: a dict, list, tuple or namedtuple of others."""

    kind: type
    keys: tuple[_Key, ...]
    parts: tuple[_Tree | _Leaf, ...]


Form = _Tree | _Leaf


@dataclass(frozen=True)
class StoredColumn:
    """One value of all rows, as tables.

    Attributes:
        dtype, shape: of the value; of text, uint8 and ().
        tables: see `ColumnBuilder.tables`; of text, "bytes" and "ends".
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    tables: dict[str, Tensor]


class NotKeptError(Exception):
    """A row holds an object that cannot be copied; the message is its type."""


class RowStore:
    """Stores the rows of a dataset by their index.

    Rows of one form (the form of the first row) are stored as columns. Rows of any other form, and rows whose key is
    not an index, are stored as Python objects.

    Args:
        num_rows: of the dataset: numbers are below it.

    Attributes:
        form: of the rows in columns; None before there is a row.
        has_others: whether there are rows of another form, or under keys that are no numbers.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.form: Form | None = None
        self._leaves: list[_Leaf] = []
        self._columns: list[ColumnBuilder | list[Any]] = []
        self._there = np.zeros(num_rows, dtype=bool)
        self._others: dict[object, Row] = {}
        self._object_bytes = 0
        self._is_mapped = False

    @property
    def has_others(self) -> bool:
        """See the class."""
        return bool(self._others)

    @property
    def count(self) -> int:
        """How many rows are kept."""
        return int(self._there.sum()) + len(self._others)

    @property
    def numbers(self) -> np.ndarray:
        """Of the rows that are in columns, [n], int64."""
        return np.flatnonzero(self._there)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the rows take; of objects, about."""
        return self._object_bytes + sum(
            each.nbytes for each in self._columns if isinstance(each, ColumnBuilder) and not self._is_mapped
        )

    def has(self, key: Any) -> bool:
        """Whether the row of a key is kept."""
        if self._is_number(key) and self._there[key]:
            return True
        name = _name_of(key)
        return name is not None and name in self._others

    def has_all(self, keys: Sequence[Any]) -> bool:
        """Returns True if the rows of all keys are stored in columns."""
        return all(map(self._is_number, keys)) and bool(self._there[keys].all()) if len(keys) else True

    def missing(self, numbers: np.ndarray) -> np.ndarray:
        """Those of the row numbers whose rows are not in columns."""
        return numbers[~self._there[numbers]]

    def put(self, keys: Sequence[Any], rows: Sequence[Row]) -> None:
        """Keeps rows; what is kept is no memory of the rows'.

        Raises:
            NotKeptError: an object in a row cannot be copied.
        """
        fitting: list[int] = []
        flat: list[list[Any]] = []
        for key, row in zip(keys, rows, strict=True):
            name = _name_of(key)
            if name is None or self.has(key):
                continue
            leaves: list[Any] = []
            form = _form_of(row, leaves)
            if self.form is None and self._is_number(key):
                self._begin(form)
            if form == self.form and self._is_number(key):
                fitting.append(key)
                flat.append(leaves)
                self._there[key] = True
            else:
                self._others[name] = _copied(row)
                self._object_bytes += 256 + sum(getattr(each, "nbytes", 64) for each in leaves)
        if fitting:
            self._is_mapped = False
            for column, leaf, values in zip(self._columns, self._leaves, zip(*flat, strict=True), strict=True):
                self._put_column(column, leaf, fitting, values)

    def rows(self, keys: Sequence[Any]) -> list[Row]:
        """Rows of keys that are kept, each as it was read, in memory of its own."""
        numbers = [key for key in keys if self._is_number(key) and self._there[key]]
        made = iter(self._rows_of(numbers)) if numbers else iter(())
        return [
            next(made)
            if self._is_number(key) and self._there[key]
            else _copied(self._others[_name_of(key)], is_kept=True)
            for key in keys
        ]

    def batch(self, numbers: Sequence[int]) -> Any:
        """A batch as the default `collate_fn` makes it of these rows, all of them in columns."""
        assert self.form is not None
        leaves = [
            self._collated(column, leaf, numbers) for column, leaf in zip(self._columns, self._leaves, strict=True)
        ]
        return _collate(self.form, iter(leaves))

    @property
    def tensor_leaves(self) -> list[bool]:
        """For each value of a row, whether the default `collate_fn` makes a tensor of it."""
        return [leaf.form != "object" for leaf in self._leaves]

    def is_collated(self) -> bool:
        """Whether the default `collate_fn` can make batches of such rows."""
        return self.form is not None and not any(
            (
                leaf.form == "object"
                and not all(isinstance(each, str | bytes) for each in cast("Any", column) if each is not _NONE)
            )
            for leaf, column in zip(self._leaves, self._columns, strict=True)
        )

    def columns(self, numbers: np.ndarray, device: torch.device) -> list[Column]:
        """The columns of the values that become tensors, with the rows of these numbers in that order, on a device."""
        found: list[Column] = []
        for column, leaf in zip(self._columns, self._leaves, strict=True):
            if not isinstance(column, ColumnBuilder):
                continue
            dtype = _scalar_dtype(leaf) if leaf.form == "scalar" else None
            if len(numbers) != self.num_rows or dtype is not None:
                column = _rebuilt(column, numbers, dtype)
            found.append(column.column(device))
        return found

    def rebuild(self, leaves: Sequence[Any]) -> Any:
        """A batch of what is gathered from each column, and lists of what becomes no tensor."""
        assert self.form is not None
        return _collate(self.form, iter(leaves))

    def objects(self, numbers: np.ndarray) -> list[list[Any]]:
        """For each value that becomes no tensor, those of these rows."""
        return [
            [column[number] for number in numbers] for column in self._columns if not isinstance(column, ColumnBuilder)
        ]

    # On disk.

    def why_not_written(self) -> str:
        """What `tables` cannot be of; empty where there is nothing."""
        if self._others:
            return "rows that are not all of one form, or have keys that are no numbers"
        if self.form is None:
            return ""
        of_leaves = [f"a {leaf.dtype.__name__}" for leaf in self._leaves if not _is_written(leaf)]
        return next(iter(of_leaves), _why_not_plain(self.form))

    def tables(self) -> list[StoredColumn]:
        """The rows as tables, one column for each value of a row; see `restored`."""
        found: list[StoredColumn] = []
        for column, leaf in zip(self._columns, self._leaves, strict=True):
            if isinstance(column, ColumnBuilder):
                assert column.row_dtype is not None
                found.append(StoredColumn(column.row_dtype, tuple(column.row_shape), column.tables()))
            elif leaf.dtype is type(None):
                found.append(StoredColumn(torch.uint8, (), {}))
            else:
                found.append(StoredColumn(torch.uint8, (), _text_tables(column)))
        return found

    @property
    def is_there(self) -> np.ndarray:
        """For each row number, whether its row is in columns, [num_rows], bool."""
        return self._there

    @classmethod
    def restored(cls, form: Form, is_there: np.ndarray, columns: Sequence[StoredColumn]) -> RowStore:
        """The store of these rows, whose tables are not copied.

        Raises:
            DataError: the tables are not those of rows of this form.
        """
        made = cls(len(is_there))
        made.form, made._leaves = form, list(_leaves_of(form))
        if len(columns) != len(made._leaves) or not all(map(_is_written, made._leaves)):
            raise DataError(f"{len(columns)} columns for rows of {len(made._leaves)} values")
        made._there, made._is_mapped = is_there.copy(), True
        for leaf, stored in zip(made._leaves, columns, strict=True):
            if leaf.form != "object":
                if (stored.dtype, stored.shape) != _stored_kind(leaf):
                    raise DataError(f"a column of {stored.dtype} {stored.shape} for {leaf}")
                made._columns.append(ColumnBuilder.restored(is_there, stored.dtype, stored.shape, stored.tables))
                continue
            values: list[Any] = [None] * made.num_rows if leaf.dtype is type(None) else _texts(leaf, stored.tables)
            if len(values) != made.num_rows:
                raise DataError(f"{len(values)} texts for {made.num_rows} rows")
            made._columns.append([each if there else _NONE for each, there in zip(values, is_there, strict=True)])
            made._object_bytes += sum(64 + len(each or "") for each in values)
        return made

    def _is_number(self, key: Any) -> bool:
        return type(key) is int and 0 <= key < self.num_rows

    def _begin(self, form: Form) -> None:
        self.form = form
        self._leaves = list(_leaves_of(form))
        self._columns = [
            [_NONE] * self.num_rows if leaf.form == "object" else ColumnBuilder(self.num_rows) for leaf in self._leaves
        ]

    def _put_column(self, column: Any, leaf: _Leaf, numbers: list[int], values: Sequence[Any]) -> None:
        if leaf.form == "object":
            for number, value in zip(numbers, values, strict=True):
                column[number] = _copied(value)
                self._object_bytes += 64 + (len(value) if isinstance(value, str | bytes) else 256)
            return
        if leaf.form == "tensor":
            block = torch.stack(list(values))
        elif leaf.form == "int":
            block = torch.tensor(values, dtype=torch.int64)
        elif leaf.form == "bool":
            block = torch.tensor(values, dtype=torch.bool)
        elif leaf.form == "float":
            block = torch.from_numpy(np.array(values, dtype=np.float64))
        else:
            block = torch.from_numpy(np.stack(values) if leaf.form == "array" else np.array(values, dtype=leaf.dtype))
        column.put(numbers, block)

    def _rows_of(self, numbers: list[int]) -> list[Row]:
        assert self.form is not None
        values = [_elements(column, leaf, numbers) for column, leaf in zip(self._columns, self._leaves, strict=True)]
        if not values:
            return [_built(self.form, iter(())) for _ in numbers]
        return [_built(self.form, iter(leaves)) for leaves in zip(*values, strict=True)]

    def _collated(self, column: Any, leaf: _Leaf, numbers: Sequence[int]) -> Any:
        if leaf.form == "object":
            return [column[number] for number in numbers]
        block = column.get(numbers)
        return block.to(_scalar_dtype(leaf)) if leaf.form == "scalar" else block


_NONE = object()
"""Stands for an object that is not there yet."""


def _name_of(key: Any) -> object | None:
    """What a key of a dataset is known by: equal for keys of one type and value; None where the key has no value."""
    kind: Any = type(key)
    if kind in (int, bool, str, bytes, type(None)):
        return kind, key
    if kind is float:
        return kind, key.hex()
    if issubclass(kind, np.generic):
        return kind, key.dtype, key.tobytes()
    if kind is tuple:
        names = [_name_of(each) for each in key]
        return None if None in names else (kind, tuple(names))
    return None


def _rebuilt(column: ColumnBuilder, numbers: np.ndarray, dtype: torch.dtype | None) -> ColumnBuilder:
    """The rows of these numbers alone, in that order."""
    found = ColumnBuilder(len(numbers))
    for begin in range(0, len(numbers), 256):
        block = column.get(numbers[begin : begin + 256])
        found.put(range(begin, begin + len(block)), block if dtype is None else block.to(dtype))
    return found


def _scalar_dtype(leaf: _Leaf) -> torch.dtype:
    """What the default `collate_fn` makes of numpy's scalars of a dtype."""
    return torch.as_tensor([leaf.dtype.type(0)]).dtype


def _form_of(value: Any, leaves: list[Any]) -> Form:
    """The form of a row; its values are put into `leaves`."""
    kind: Any = type(value)
    if kind is dict:
        return _Tree(dict, tuple(map(_Key, value)), tuple(_form_of(each, leaves) for each in value.values()))
    is_named = issubclass(kind, tuple) and len(getattr(kind, "_fields", ())) == len(value) > 0
    if kind in (list, tuple) or is_named:
        return _Tree(kind, (), tuple(_form_of(each, leaves) for each in value))
    leaves.append(value)
    return _leaf_of(value, kind)


def _leaf_of(value: Any, kind: type) -> _Leaf:
    if kind is Tensor:
        is_plain = value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
        is_plain = is_plain and not value.__dict__
        if is_plain and not value.requires_grad and not value.is_conj() and not value.is_neg() and not value.is_nested:
            if value.stride() == torch.empty(value.shape, device="meta").stride() and not hasattr(
                value, "__dict_own__"
            ):
                return _Leaf("tensor", value.dtype, tuple(value.shape))
    elif kind is np.ndarray:
        if value.dtype in _ARRAYS and value.dtype.isnative and value.flags.c_contiguous:
            return _Leaf("array", value.dtype, value.shape)
    elif issubclass(kind, np.generic):
        if value.dtype in _ARRAYS:
            return _Leaf("scalar", value.dtype)
    elif kind is bool:
        return _Leaf("bool")
    elif kind is int and value in _WIDE:
        return _Leaf("int")
    elif kind is float:
        return _Leaf("float")
    return _Leaf("object", kind)


def _leaves_of(form: Form) -> Iterator[_Leaf]:
    if isinstance(form, _Leaf):
        yield form
    else:
        for part in form.parts:
            yield from _leaves_of(part)


def _built(form: Form, leaves: Iterator[Any]) -> Any:
    """A row of its values."""
    if isinstance(form, _Leaf):
        return next(leaves)
    parts = [_built(part, leaves) for part in form.parts]
    if form.kind is dict:
        return dict(zip((each.value for each in form.keys), parts, strict=True))
    return form.kind(parts) if form.kind in (list, tuple) else form.kind(*parts)


def _collate(form: Form, leaves: Iterator[Any], *, in_sequence: bool = False) -> Any:
    """A batch of what its leaves are collated to, as the default `collate_fn` nests them."""
    if isinstance(form, _Leaf):
        leaf = next(leaves)
        return tuple(cast("Any", leaf)) if in_sequence and isinstance(leaf, list) else leaf
    parts = [_collate(part, leaves, in_sequence=form.kind is not dict) for part in form.parts]
    if form.kind is dict:
        return dict(zip((each.value for each in form.keys), parts, strict=True))
    return parts if form.kind in (list, tuple) else form.kind(*parts)


def _elements(column: Any, leaf: _Leaf, numbers: list[int]) -> list[Any]:
    """The values of rows, one by one, each in memory of its own."""
    if leaf.form == "object":
        return [_copied(column[number], is_kept=True) for number in numbers]
    block: Tensor = column.get(numbers)
    if leaf.form == "tensor":
        return [each.clone() for each in block.unbind()]
    if leaf.form in ("int", "bool", "float"):
        return block.tolist() if leaf.form != "float" else [float(each) for each in block.numpy()]
    if leaf.form == "scalar":
        return list(block.numpy())
    return [np.array(each) for each in block.numpy()]


def _copied(value: Any, *, is_kept: bool = False) -> Any:
    """A copy of an object of a row, in memory of its own."""
    kind: Any = type(value)
    if kind in (str, bytes, int, float, bool, complex, type(None)):
        return value
    if kind is Tensor and value.layout is torch.strided and not value.is_quantized and not value.__dict__:
        return _copied_tensor(value)
    if kind is np.ndarray and value.dtype != object and value.size:
        low, high = np.lib.array_utils.byte_bounds(value)
        memory = np.frombuffer(cast("Any", (ctypes.c_char * (high - low)).from_address(low)), dtype=np.uint8).copy()
        begin = value.__array_interface__["data"][0] - low
        return np.ndarray(value.shape, value.dtype, memory, begin, value.strides)
    if kind in (list, tuple):
        return kind(_copied(each, is_kept=is_kept) for each in value)
    if kind is dict:
        return {key: _copied(each, is_kept=is_kept) for key, each in value.items()}
    if is_kept:  # it was compared with what it is a copy of when it was kept
        return copy.deepcopy(value)
    if isinstance(value, pd.DataFrame | pd.Series | pd.Index):
        raise NotKeptError(kind.__name__)  # a look at one changes its caches
    try:
        found = copy.deepcopy(value)
        is_same = same_rows(found, value)
    except Exception as error:
        raise NotKeptError(kind.__name__) from error
    if not is_same:
        raise NotKeptError(kind.__name__)
    return found


def _copied_tensor(value: Tensor) -> Tensor:
    """A copy that has the strides of the tensor, also where it skips memory or reads it more than once."""
    is_conj, is_neg = value.is_conj(), value.is_neg()
    plain = value.detach()
    plain = plain.conj() if is_conj else plain
    plain = cast("Any", torch)._neg_view(plain) if is_neg else plain
    size = 1 + sum((length - 1) * stride for length, stride in zip(plain.shape, plain.stride(), strict=True))
    if not plain.numel():
        found = torch.empty_strided(plain.shape, plain.stride(), dtype=plain.dtype, device=plain.device)
    else:
        memory = plain.as_strided((size,), (1,)).clone()
        found = memory.as_strided(plain.shape, plain.stride())
    found = cast("Any", torch)._neg_view(found) if is_neg else found
    found = found.conj() if is_conj else found
    return found.requires_grad_(value.requires_grad)


# Forms and texts on disk.

_TEXTS = {"str": str, "bytes": bytes, "none": type(None)}


def _is_written(leaf: _Leaf) -> bool:
    return leaf.form != "object" or leaf.dtype in _TEXTS.values()


def _why_not_plain(form: Form) -> str:
    """Which container cannot be written as JSON."""
    if isinstance(form, _Leaf):
        return ""
    keys = [each.value for each in form.keys if type(each.value) not in (str, int, bool, type(None))]
    if keys:
        return f"a dict with a key that is a {type(keys[0]).__name__}"
    if form.kind not in (dict, list, tuple) and _found_class(form.kind.__module__, form.kind.__qualname__) != form.kind:
        return f"a {form.kind.__qualname__} (a class that its module does not have under this name)"
    return next(filter(None, map(_why_not_plain, form.parts)), "")


def _found_class(module: str, name: str) -> Any:
    """A class by its name, of a module that is imported; nothing is imported for it."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def plain_form(form: Form) -> Any:
    """A form as JSON has it; see `form_of_plain`."""
    if isinstance(form, _Leaf):
        if form.form == "object":
            return ["object", next(name for name, kind in _TEXTS.items() if kind is form.dtype)]
        return [form.form, "" if form.dtype is None else str(form.dtype).removeprefix("torch."), list(form.shape)]
    parts = [plain_form(each) for each in form.parts]
    if form.kind in (list, tuple):
        return [form.kind.__name__ + "s", parts]
    if form.kind is dict:
        return ["dicts", parts, [each.value for each in form.keys]]
    return ["named", parts, form.kind.__module__, form.kind.__qualname__]


def form_of_plain(plain: Any) -> Form:
    """The form that `plain_form` has written.

    Raises:
        DataError: it is another thing.
    """
    match plain:
        case ["object", "str" | "bytes" | "none" as name]:
            return _Leaf("object", _TEXTS[name])
        case ["int" | "float" | "bool" as name, "", []]:
            return _Leaf(name)
        case ["tensor", str(name), [*shape]] if isinstance(getattr(torch, name, None), torch.dtype):
            return _Leaf("tensor", getattr(torch, name), _shape(shape))
        case ["array" | "scalar" as form, str(name), [*shape]] if name in map(str, _ARRAYS):
            return _Leaf(form, np.dtype(name), _shape(shape))
        case ["lists" | "tuples" as name, [*parts]]:
            return _Tree(list if name == "lists" else tuple, (), tuple(map(form_of_plain, parts)))
        case ["dicts", [*parts], [*keys]] if len(keys) == len(parts):
            if all(type(key) in (str, int, bool, type(None)) for key in keys):
                return _Tree(dict, tuple(map(_Key, keys)), tuple(map(form_of_plain, parts)))
        case ["named", [*parts], str(module), str(name)]:
            kind = _found_class(module, name)
            if isinstance(kind, type) and issubclass(kind, tuple) and len(getattr(kind, "_fields", ())) == len(parts):
                return _Tree(kind, (), tuple(map(form_of_plain, parts)))
            raise DataError(f"the class {module}.{name} is not there any more")
        case _:
            pass
    raise DataError(f"{plain!r:.80} is no form of rows")


def _shape(given: Sequence[Any]) -> tuple[int, ...]:
    if not all(type(each) is int and each >= 0 for each in given):
        raise DataError(f"{given!r:.80} is no shape")
    return tuple(given)


def _stored_kind(leaf: _Leaf) -> tuple[torch.dtype, tuple[int, ...]]:
    """The dtype and shape of a value in its column."""
    if leaf.form == "tensor":
        return leaf.dtype, leaf.shape
    if leaf.form in ("array", "scalar"):
        return torch.from_numpy(np.empty(0, dtype=leaf.dtype)).dtype, leaf.shape
    return {"int": torch.int64, "bool": torch.bool}.get(leaf.form, torch.float64), ()


def _text_tables(values: Sequence[Any]) -> dict[str, Tensor]:
    encoded = [
        b"" if each is _NONE else each if isinstance(each, bytes) else each.encode("utf-8", "surrogatepass")
        for each in values
    ]
    ends = np.cumsum([len(each) for each in encoded], dtype=np.int64)
    content = np.frombuffer(bytearray(b"".join(encoded)), dtype=np.uint8)
    return {"bytes": torch.from_numpy(content), "ends": torch.from_numpy(ends)}


def _texts(leaf: _Leaf, tables: dict[str, Tensor]) -> list[Any]:
    if set(tables) != {"bytes", "ends"} or tables["bytes"].dtype != torch.uint8 or tables["ends"].dtype != torch.int64:
        raise DataError(f"the tables of a text are {sorted(tables)}")
    content, ends = tables["bytes"].numpy().tobytes(), tables["ends"].tolist()
    if any(begin > end for begin, end in zip([0, *ends], [*ends, len(content)], strict=True)):
        raise DataError("the ends of texts do not rise")
    found = [content[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    return found if leaf.dtype is bytes else [each.decode("utf-8", "surrogatepass") for each in found]
