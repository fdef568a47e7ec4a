"""Counting host reads: whatever makes Python wait for a device value, with the place in the user's code.

On a machine without an accelerator nothing waits, so the methods that would wait are what is counted: a loop can be
checked on the CPU for what it will do on a GPU.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fasttrain.measure.places import is_host_work, user_place
from fasttrain.step import eager

__all__ = ["HostReads", "Read", "count_host_reads", "without_compiling"]


@dataclass(frozen=True)
class Read:
    """A place that reads.

    Attributes:
        file: of the innermost frame outside torch, fasttrain and the standard library.
        line: its line.
        what: "item", "tolist", "numpy", "cpu", "bool", "str or print", "nonzero", "boolean index", "synchronize" ...
        count: how often.
    """

    file: str
    line: int
    what: str
    count: int


_METHODS: dict[Any, str] = {getattr(Tensor, name): name for name in ("item", "tolist", "numpy", "cpu", "nonzero")} | {
    Tensor.__bool__: "bool",
    Tensor.__int__: "int",
    Tensor.__float__: "float",
    Tensor.__complex__: "complex",
    Tensor.__index__: "index",
    Tensor.__repr__: "str or print",
    Tensor.__format__: "format",
    Tensor.__array__: "numpy",
    Tensor.__contains__: "in",
}
"""Methods that wait, whatever they are made of."""

_OPERATORS = {
    "aten::_local_scalar_dense": "item",
    "aten::nonzero": "nonzero",
    "aten::masked_select": "masked_select",
    "aten::is_nonzero": "bool",
    "aten::equal": "equal",
    "aten::unique_dim": "unique",
    "aten::_unique2": "unique",
    "aten::unique_consecutive": "unique",
}
"""Operators that wait, wherever in C++ they are called."""

_SYNCHRONISERS: tuple[tuple[Any, str], ...] = (
    (torch.cuda, "synchronize"),
    (torch.cuda.Event, "synchronize"),
    (torch.cuda.Stream, "synchronize"),
    (torch.cpu, "synchronize"),
    (torch.accelerator, "synchronize"),
)


def count_host_reads() -> HostReads:
    """Counts the host reads that the calling thread, and the backward passes that it starts, make in a `with` block.

    ```
    with fasttrain.count_host_reads() as reads:
        train_one_epoch()
    assert reads.count == 0, reads.reads
    ```

    Seen are `.item()`, `.tolist()`, `.numpy()`, `.cpu()`, `bool`, `int`, `float`, `str`, `print` and `format` of a
    tensor, `in`, tensors as indices of lists, `nonzero`, boolean indexing, `masked_select`, `unique`, `torch.equal`,
    copies from a device to memory that they wait for, and explicit synchronisation. A tensor that is on the CPU
    already makes nothing wait: there, the method counts (`.cpu()`, but not `.to(device)`), as it will wait on a GPU.
    Not so in datasets and samplers while a `DataLoader` collects a batch, and for the steps that torch's optimizers
    count: these are on the CPU wherever the training runs.

    Functions compiled by `torch.compile` run uncompiled in such a block. The steps that fasttrain has compiled run as
    they do elsewhere.
    """
    return HostReads()


class HostReads:
    """See `count_host_reads`.

    Attributes:
        count: reads so far.
        reads: them by place, most frequent first.
    """

    def __init__(self) -> None:
        self._found: Counter[tuple[str, int, str]] = Counter()
        self._entered = ExitStack()

    @property
    def count(self) -> int:
        """Reads so far."""
        return self._found.total()

    @property
    def reads(self) -> list[Read]:
        """Reads so far by place, most frequent first."""
        return [Read(*place, count) for place, count in self._found.most_common()]

    def __enter__(self) -> Self:
        """Begins to count."""
        self._entered.enter_context(without_compiling())
        for owner, name in _SYNCHRONISERS:
            self._entered.enter_context(mock.patch.object(owner, name, self._counted(getattr(owner, name))))
        self._entered.enter_context(mock.patch.object(eager, "run_backward", self._watched(eager.run_backward)))
        self._entered.enter_context(_Calls(self._add))
        return self

    def __exit__(self, *error: object) -> None:
        """Stops counting."""
        self._entered.close()

    def _add(self, what: str, tensor: Tensor | None) -> None:
        frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
        if tensor is not None and tensor.device.type == "cpu" and is_host_work(frame):
            return
        self._found[*user_place(frame), what] += 1

    def _watched(self, function: Callable[..., None]) -> Callable[..., None]:
        """A function in whose C++ operators are seen, though it is none of torch's Python API."""

        def watched(*args: Any) -> None:
            with _Operators(self._add):
                function(*args)

        return watched

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def synchronize(*args: Any, **kwargs: Any) -> Any:
            self._add("synchronize", None)
            return function(*args, **kwargs)

        return synchronize


def without_compiling() -> AbstractContextManager[object]:
    """A context in which `torch.compile`d functions run uncompiled: modes would have each of them compiled anew."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled yet, and importing it takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


class _Calls(TorchFunctionMode):
    """Sees each call of torch's Python API, and through `_Operators` what it runs in C++.

    Operators are watched within such calls only: a dispatch mode that is there all the time changes the tensors'
    dispatch keys, for which a compiled step's guards would refuse to run it.
    """

    def __init__(self, add: Callable[[str, Tensor | None], None]) -> None:
        super().__init__()
        self._add = add

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts the methods that wait, and runs the call."""
        if isinstance(func, OpOverload):  # what `_Operators` runs in a backward pass comes by here again
            return func(*args, **(kwargs or {}))
        what = _METHODS.get(func)
        if what is not None:
            self._add(what, args[0])
            return func(*args, **(kwargs or {}))  # what it calls is part of it
        with _Operators(self._add):
            return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, add: Callable[[str, Tensor | None], None]) -> None:
        super().__init__()
        self._add = add

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in _OPERATORS:
            self._add(_OPERATORS[name], args[0])
        elif name in _INDEXERS and any(index is not None and index.dtype in _MASKS for index in args[1]):
            self._add("boolean index", args[0])
        elif name in _COPIES and _waits_for_copy(name, result, args, kwargs or {}):
            self._add("copy to the host", None)
        return result


_INDEXERS = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_MASKS = (torch.bool, torch.uint8)
_COPIES = ("aten::_to_copy", "aten::copy_")


def _waits_for_copy(name: str, result: Tensor, args: Any, kwargs: dict[str, Any]) -> bool:
    """True for a copy from a device to host memory that is not queued beside a pinned buffer."""
    source = args[0] if name == "aten::_to_copy" else args[1]
    if source.device.type == "cpu" or result.device.type != "cpu":
        return False
    non_blocking = kwargs.get("non_blocking", args[2] if name == "aten::copy_" and len(args) > 2 else False)
    return not (non_blocking and result.is_pinned())
