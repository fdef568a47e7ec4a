"""Counts host reads on any device: whatever makes Python wait for a device value, on the CPU for want of a GPU."""

from collections import Counter
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

METHODS = {
    getattr(torch.Tensor, name): name
    for name in (
        *("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__complex__"),
        *("__repr__", "__format__", "__array__", "__contains__"),
    )
}
OPERATORS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2"}


class _Methods(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METHODS:
            self.found[METHODS[func]] += 1
            with torch._C.DisableTorchFunction():  # what a method calls is part of it
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, found: Counter[str], methods: Counter[str]) -> None:
        super().__init__()
        self.found = found
        self.methods = methods

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        is_boolean_index = name == "index" and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in OPERATORS or is_boolean_index:
            self.found["boolean index" if is_boolean_index else name] += 1
        return func(*args, **(kwargs or {}))


class HostReads:
    """A context that counts; `found` has the reads by name, methods and operators apart (a method may be both)."""

    def __init__(self) -> None:
        self.methods: Counter[str] = Counter()
        self.operators: Counter[str] = Counter()
        self._modes = (_Operators(self.operators, self.methods), _Methods(self.methods))

    def __enter__(self) -> Self:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)  # pyright: ignore

    @property
    def count(self) -> int:
        return max(self.methods.total(), self.operators.total())
