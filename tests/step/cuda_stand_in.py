"""A stand-in for CUDA graphs, on the CPU, and steps that run by it: for the tests of the graphed engine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fasttrain import TrainStep
from fasttrain.device import Choice
from fasttrain.step.cudagraph import GraphBackend
from fasttrain.step.ladder import Ladder
from fasttrain.step.spec import StepSpec
from fasttrain.step.timing import Waits
from tests.step import jobs
from tests.step.fakes import Graphs

EXACT = 1e-10
"""The operators are those of the trace, one by one: in double precision nothing but rounding differs."""

ASKED = Choice("graphed", "asked for")


class Recording:
    """A stand-in for CUDA: what is captured does not run; what is replayed runs with the tensors of then.

    Args:
        programs: run the traced graph in place of machine code.

    Attributes:
        programs: see above.
        captures: how many there were.
        failures: captures that failed.
        launches: of graphs.
        on_capture: called before each capture.
        price: what a call takes, in seconds, by the number of launches.
    """

    def __init__(self, programs: Graphs) -> None:
        self.programs = programs
        self.captures = self.failures = 0
        self.launches = 0
        self.on_capture: Callable[[], None] = lambda: None
        self.price: Callable[[int], float] = lambda launches: launches * 1e-5
        self.is_aside = False

    @contextmanager
    def aside(self) -> Generator[None]:
        assert not self.is_aside
        self.is_aside = True
        yield
        self.is_aside = False

    def capture(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        assert not self.is_aside
        self.on_capture()
        rng = torch.get_rng_state()
        try:
            with Memory(is_capturing=True) as captured:
                run()
        except RuntimeError:
            self.failures += 1
            raise
        finally:
            captured.put_back()
            torch.set_rng_state(rng)
        self.captures += 1
        kept: list[Tensor] = []
        replays = itertools.count()

        def replay() -> Tensor:
            self.launches += 1
            if next(replays) > 2:  # it takes long
                result = run()
            else:
                with Memory() as memory:
                    result = run()
                assert memory.met.keys() == captured.met.keys(), "it reads memory that was not captured"
            if not kept:
                kept.append(torch.empty_like(result))
            return kept[0].copy_(result)

        return replay

    def timed(self, run: Callable[[], Tensor]) -> tuple[Tensor, float]:
        before = self.launches
        return run(), self.price(self.launches - before)


class Memory(TorchDispatchMode):
    """Keeps what was in the memory that is met and was not made inside, by address."""

    def __init__(self, *, is_capturing: bool = False) -> None:
        super().__init__()
        self.met: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._made: set[int] = set()
        self._is_capturing = is_capturing

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._is_capturing and func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        for storage in _memory((args, kwargs)):
            if storage.data_ptr() not in self._made and storage.data_ptr() not in self.met:
                self.met[storage.data_ptr()] = storage, storage.clone()
        result = func(*args, **(kwargs or {}))
        self._made |= {storage.data_ptr() for storage in _memory(result)} - self.met.keys()
        return result

    def put_back(self) -> None:
        """A capture runs nothing."""
        for storage, before in self.met.values():
            storage.copy_(before)


def _memory(values: Any) -> list[torch.UntypedStorage]:
    return [each.untyped_storage() for each in tree_leaves(values) if isinstance(each, Tensor)]


class OnDevice(Tensor):
    """A tensor on a stand-in for a GPU: operators refuse other tensors beside it as CUDA's do.

    Only a scalar may be on the host, except in `torch.equal`, which refuses that too.

    Args:
        inner: holds the values.
    """

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportPrivateUsage]

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        # "cpu" is what autograd can handle without a GPU; the class tells the device.
        made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device="cpu"
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        on_host = [each for each in tensors if not isinstance(each, OnDevice)]
        if any(each.dim() or func is torch.ops.aten.equal.default for each in on_host):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two ({func})")
        made = {id(each.inner): each for each in tensors if isinstance(each, OnDevice)}
        inside = lambda value: value.inner if isinstance(value, OnDevice) else value  # noqa: E731
        result = func(*tree_map(inside, args), **tree_map(inside, kwargs or {}))
        put = lambda value: made[id(value)] if id(value) in made else OnDevice(value)  # noqa: E731
        return tree_map(lambda value: put(value) if isinstance(value, Tensor) else value, result)


def graphed_step(lane: Recording, **options: Any) -> TrainStep:
    return with_graphs(jobs.train_step("eager", **options), lane)


def with_graphs(step: TrainStep, lane: Recording) -> TrainStep:
    step._engine = graphed_engine(step.spec, lane)  # pyright: ignore[reportPrivateUsage]
    return step


def graphed_engine(spec: StepSpec, lane: Recording) -> Ladder:
    backend, waits = graph_backend(spec, lane, is_required=True)
    return Ladder(spec, ASKED, backend, waits, waits_for_compiler=True)


def graph_backend(spec: StepSpec, lane: Recording, *, is_required: bool) -> tuple[GraphBackend, Waits]:
    waits = Waits()
    return GraphBackend(spec, waits, is_required=is_required, lane=lane, clock=lane), waits
