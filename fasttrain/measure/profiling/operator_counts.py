"""FLOPs of what torch runs, by its own formulas, and the operators for which it has none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self
from unittest import mock

from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fasttrain.step import eager

__all__ = ["FlopCount"]


class FlopCount:
    """A context that counts floating-point operations.

    As in `count_host_reads`, operators are seen within calls of torch's Python API, so that compiled steps still run;
    what these compute is not seen.

    Attributes:
        flops: so far.
        not_counted: operators with tensors in and out, views left out, that have no formula.
    """

    def __init__(self) -> None:
        self.flops = 0
        self.not_counted: set[str] = set()
        self._calls = _Calls(self)
        self._entered = ExitStack()

    def __enter__(self) -> Self:
        """Begins to count."""
        self._entered.enter_context(mock.patch.object(eager, "run_backward", self._watched(eager.run_backward)))
        self._entered.enter_context(self._calls)
        return self

    def __exit__(self, *error: object) -> None:
        """Stops counting."""
        self._entered.close()

    def _watched(self, function: Callable[..., None]) -> Callable[..., None]:
        """A function in whose C++ operators are seen, though it is none of torch's Python API."""

        def watched(*args: Any) -> None:
            with _Operators(self):
                function(*args)

        return watched


class _Calls(TorchFunctionMode):
    def __init__(self, counts: FlopCount) -> None:
        super().__init__()
        self._counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, OpOverload):  # what `_Operators` runs in a backward pass comes by here again
            return func(*args, **(kwargs or {}))
        with _Operators(self._counts):
            return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, counts: FlopCount) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self._counts.flops += formula(*args, **kwargs, out_val=result)
        elif func.namespace == "aten" and not func.is_view and isinstance(result, Tensor):
            self._counts.not_counted.add(func._schema.name.removeprefix("aten::"))
        return result
