"""What forward did not find comes later, or is in a place that Dynamo does not guard: the trace does not hold."""

from __future__ import annotations

import abc
import gc
import math
import os
import re
from collections import OrderedDict
from collections.abc import Callable
from decimal import Decimal
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fasttrain.errors import EngineError
from fasttrain.step.spec import StepSpec
from fasttrain.step.trace import Mismatch, trace_step
from tests.step.agreement import run_graph
from tests.step.models import CASES, OPTIMIZERS, Case, started, with_forward

pytestmark = pytest.mark.usefixtures("in_double")

MLP, SGD = CASES["mlp"], OPTIMIZERS["sgd-momentum"]

Home = tuple[Callable[[], Any], Callable[[], None]]


def shadowed_in_a_class() -> Home:
    class Base:
        weight = 1.0

    class Derived(Base):
        pass

    kept = Derived()
    return lambda: kept.weight, lambda: setattr(Derived, "weight", 2.0)


def other_bases() -> Home:
    class Base:
        def weight(self) -> float:
            return 1.0

    class Other(Base):
        def weight(self) -> float:
            return 2.0

    class Derived(Base):
        pass

    kept = Derived()
    return lambda: kept.weight(), lambda: setattr(Derived, "__bases__", (Other,))


def of_a_metaclass() -> Home:
    class Meta(type):
        weight = 1.0

    class Made(metaclass=Meta):
        pass

    return lambda: Made.weight, lambda: setattr(Meta, "weight", 2.0)


def method_of_a_metaclass() -> Home:
    class Meta(type):
        def weight(cls) -> float:
            return 1.0

    class Made(metaclass=Meta):
        pass

    return lambda: Made.weight(), lambda: setattr(Meta, "weight", lambda _: 2.0)


def answered_by_getattr() -> Home:
    class Answering:
        def __getattr__(self, name: str) -> float:
            return 1.0

    kept = Answering()
    return lambda: kept.weight, lambda: setattr(kept, "weight", 2.0)


def caught_key() -> Home:
    table: dict[str, float] = {}

    def read() -> float:
        try:
            return table["weight"]
        except KeyError:
            return 1.0

    return read, lambda: table.update(weight=2.0)


def caught_attribute() -> Home:
    class Empty:
        pass

    kept: Any = Empty()

    def read() -> float:
        try:
            return kept.weight
        except AttributeError:
            return 1.0

    return read, lambda: setattr(kept, "weight", 2.0)


def entry_of_an_object() -> Home:
    class Empty:
        pass

    kept: Any = Empty()
    return lambda: kept.__dict__.get("weight", 1.0), lambda: setattr(kept, "weight", 2.0)


def variable_of_an_object() -> Home:
    class Empty:
        pass

    kept: Any = Empty()
    return lambda: vars(kept).get("weight", 1.0), lambda: setattr(kept, "weight", 2.0)


def one_tensor() -> Home:
    class Two:
        first, second = torch.ones(2), torch.ones(2)

    kept: Any = Two()
    return lambda: 2.0 if kept.first is kept.second else 1.0, lambda: setattr(kept, "second", kept.first)


def order_of_a_dict() -> Home:
    kept = OrderedDict(first=1.0, second=2.0)
    return lambda: next(iter(kept.values())), lambda: kept.move_to_end("first")


def tensor_that_needs_gradients() -> Home:
    kept = torch.ones(2)
    return lambda: 2.0 if kept.requires_grad else 1.0, lambda: setattr(kept, "requires_grad", True)


def shape_of_a_tensor() -> Home:
    kept = torch.ones(1, 2)
    return lambda: float(kept.shape[0]), lambda: setattr(kept, "data", torch.ones(2, 1))


def environment() -> Home:
    return lambda: float(os.environ.get("FASTTRAIN_TEST_WEIGHT", "1")), lambda: os.environ.update(
        FASTTRAIN_TEST_WEIGHT="2"
    )


def registered() -> Home:
    class Abstract(abc.ABC):  # noqa: B024
        pass

    class Plain:
        pass

    kept = Plain()
    return lambda: 2.0 if isinstance(kept, Abstract) else 1.0, lambda: Abstract.register(Plain) and None


def hidden_builtin() -> Home:
    return lambda: float(abs(-1)), lambda: globals().update(abs=lambda _: 2.0)


HOMES = [shadowed_in_a_class, other_bases, of_a_metaclass, method_of_a_metaclass, answered_by_getattr, caught_key,
         caught_attribute, entry_of_an_object, variable_of_an_object, one_tensor, order_of_a_dict,
         tensor_that_needs_gradients, shape_of_a_tensor, environment, registered,
         hidden_builtin]  # fmt: skip


def weighted(read: Callable[[], Any]) -> tuple[StepSpec, Any]:
    spec, batch = started(MLP, SGD)
    return with_forward(spec, lambda model, batch: MLP.loss(model(batch[0]), batch[1]) * read()), batch


@pytest.mark.parametrize("home", HOMES)
def test_what_comes_later_is_noticed(home: Callable[[], Home], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTTRAIN_TEST_WEIGHT", raising=False)
    monkeypatch.setitem(globals(), "abs", None)
    del globals()["abs"]
    read, change = home()
    spec, batch = weighted(read)
    traced = trace_step(spec, batch)
    assert not isinstance(traced.inputs(batch), Mismatch)
    assert read() == 1.0
    try:
        change()
        assert read() == 2.0
        assert isinstance(traced.inputs(batch), Mismatch)
    finally:
        os.environ.pop("FASTTRAIN_TEST_WEIGHT", None)
        globals().pop("abs", None)


def scale(loss: Tensor, by: float = 1.0) -> Tensor:
    return loss * abs(by)


def test_a_function_that_the_collector_was_told_to_ignore(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, batch = started(MLP, SGD)
    spec = with_forward(spec, lambda model, batch: scale(MLP.loss(model(batch[0]), batch[1])))
    gc.freeze()
    try:
        traced = trace_step(spec, batch)
    finally:
        gc.unfreeze()
    assert not isinstance(traced.inputs(batch), Mismatch)
    monkeypatch.setitem(globals(), "abs", lambda value: 2 * value)
    assert isinstance(traced.inputs(batch), Mismatch)


def test_a_class_that_answers_isinstance_itself_is_refused() -> None:
    class Meta(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return True

    class Checked(metaclass=Meta):
        pass

    spec, batch = weighted(lambda: 2.0 if isinstance(1.0, Checked) else 1.0)
    with pytest.raises(EngineError, match="answers by code that is not followed"):
        trace_step(spec, batch)


class Saving(nn.Module):
    """Replaces a buffer that is not saved, and answers for attributes that it does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.fc(x)


def test_a_trace_leaves_no_note_on_parameters_and_a_buffer_that_is_not_saved_may_be_replaced() -> None:
    spec, batch = started(Case(Saving, MLP.inputs, MLP.targets, MLP.loss), SGD)
    trace_step(spec, batch)
    assert all(not vars(tensor) for tensor in (*spec.model.parameters(), *spec.model.buffers()))
    assert spec.model._non_persistent_buffers_set == {"count"}


def test_memory_that_two_parameters_come_to_share_is_noticed() -> None:
    build: Any = lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))  # noqa: E731
    spec, batch = started(Case(build, MLP.inputs, MLP.targets, MLP.loss), SGD)
    traced = trace_step(spec, batch)
    first, second, _ = spec.model.children()
    kept = first.weight.detach()  # so that no later tensor gets this memory
    first.weight.data = second.weight.data
    assert isinstance(traced.inputs(batch), Mismatch)
    assert not traced.rebind(batch)
    first.weight.data = second.weight.data.clone()
    assert first.weight.data_ptr() != kept.data_ptr()
    assert traced.rebind(batch)


def test_a_replaced_call_of_all_modules_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, batch = weighted(lambda: 1.0)
    monkeypatch.setattr(nn.Module, "__call__", lambda self, *given: 2 * self.forward(*given))
    with pytest.raises(EngineError, match=r"Module\.__call__ was replaced"):
        trace_step(spec, batch)


def test_a_class_that_answers_bool_later_is_looked_up_anew() -> None:
    class Switch:
        pass

    switch = Switch()
    spec, batch = weighted(lambda: 2.0 if switch else 1.0)
    on = trace_step(spec, batch)
    Switch.__bool__ = lambda _: False  # type: ignore[attr-defined]
    assert isinstance(on.inputs(batch), Mismatch)
    expected = MLP.loss(spec.model(batch[0]), batch[1])
    torch.testing.assert_close(run_graph(trace_step(spec, batch), batch), expected.detach())


def test_the_dtype_of_autocast_is_noticed() -> None:
    spec, batch = weighted(lambda: 1.0 if torch.get_autocast_dtype("cpu") == torch.bfloat16 else 2.0)
    traced = trace_step(spec, batch)
    torch.set_autocast_dtype("cpu", torch.float16)
    try:
        found = traced.inputs(batch)
    finally:
        torch.set_autocast_dtype("cpu", torch.bfloat16)
    assert found == Mismatch("the dtype of autocast")
    assert not isinstance(traced.inputs(batch), Mismatch)


def test_the_sign_of_a_zero_is_noticed() -> None:
    values = [0.0]
    spec, batch = weighted(lambda: math.copysign(1.0, values[0]))
    traced = trace_step(spec, batch)
    assert not isinstance(traced.inputs(batch), Mismatch)
    values[0] = -0.0
    found = traced.inputs(batch)
    assert isinstance(found, Mismatch)
    assert re.search(r"the sign of the zero .*\[0\]", found.reason)


def test_an_array_of_which_only_the_shape_is_read_is_noticed() -> None:
    arrays = [np.zeros(2)]
    spec, batch = weighted(lambda: float(arrays[0].shape[0]))
    traced = trace_step(spec, batch)
    assert not isinstance(traced.inputs(batch), Mismatch)
    arrays[0] = np.zeros(3)
    assert isinstance(traced.inputs(batch), Mismatch)


def test_an_array_of_the_batch_of_which_only_the_shape_is_read_is_refused() -> None:
    spec, (x, y) = started(MLP, SGD)
    spec = with_forward(spec, lambda model, batch: MLP.loss(model(batch[0]), batch[1]) * batch[2].shape[0])
    with pytest.raises(EngineError, match=r"numpy array of the batch; make it a tensor: batch\[2\]"):
        trace_step(spec, (x, y, np.zeros(2)))


class Indexed:
    weight = 1.0

    def __class_getitem__(cls, key: object) -> float:
        return cls.weight


class NamedBytes(bytes):
    pass


LIMIT, NAME, TEXT, VIEW = Decimal(2), NamedBytes(b"a"), bytearray(b"a"), memoryview(b"a")


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: Indexed[0], r"Indexed\.__class_getitem__ is not followed"),
        (lambda: 1.0 if LIMIT > 1 else 2.0, "a Decimal, and a compiled step would not notice .* LIMIT"),
        (lambda: 1.0 if NAME == b"a" else 2.0, "a NamedBytes, .* NAME"),
        (lambda: 1.0 if TEXT == b"a" else 2.0, "a bytearray, .* TEXT"),
        (lambda: 1.0 if VIEW == b"a" else 2.0, "a memoryview, .* VIEW"),
    ],
)
def test_what_dynamo_reads_without_a_guard_is_refused(read: Callable[[], float], message: str) -> None:
    spec, batch = weighted(read)
    with pytest.raises(EngineError, match=message):
        trace_step(spec, batch)


WEIGHT = 1.0


def test_a_function_whose_globals_are_not_its_modules_is_refused() -> None:
    def read() -> float:
        return WEIGHT

    def constant() -> float:
        return 1.0

    for function in (read, constant):
        own = FunctionType(function.__code__, {**globals()})
        spec, batch = weighted(own)
        if function is read:
            with pytest.raises(EngineError, match="has globals of its own, which are not those of the module"):
                trace_step(spec, batch)
        else:
            trace_step(spec, batch)
