"""What the captured graph cannot repeat is refused with the user's line, and a capture changes nothing."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import random
import re
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.testing import CompileCounter

from fasttrain import TrainStep
from fasttrain.data.ragged import Ragged
from fasttrain.errors import EngineError
from fasttrain.step.spec import StepSpec
from fasttrain.step.torch_private import global_module_hooks
from fasttrain.step.torch_private.dynamo import _OPTIONS
from fasttrain.step.trace import Mismatch, trace_step
from tests.step.agreement import run_graph
from tests.step.models import CASES, OPTIMIZERS, started, with_forward
from tests.step.test_capture import (
    Batch,
    Forward,
    Holding,
    Job,
    Net,
    assert_same_on_all_sides,
    captured_graphs,
    mean_square,
    pairs,
    plain_steps,
    sgd,
    using_helpers,
)

pytestmark = pytest.mark.usefixtures("in_double", captured_graphs.__name__)

WEIGHT = 1.0


# What a graph cannot repeat is refused; the object stays as it was, and `auto` trains on as the plain loop does.


class Counter:
    """A trainer object that keeps things from step to step."""

    count = 0

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.kept: dict[str, Any] = {}
        self.recent: deque[float] = deque([1.0], maxlen=2)
        self.scales = itertools.cycle([1.0, 2.0, 3.0])
        self.array = np.ones(2)
        self.scalar = np.float64(2.0)
        self.average = torch.zeros(())


@dataclass
class Refusal:
    """A forward that no graph can hold.

    Attributes:
        forward: takes the object, the model and the batch.
        reason: what the error says, as a regular expression.
        kept: what the object holds after training; it must be as after the plain loop.
    """

    forward: Callable[[Counter, nn.Module, Batch], Any]
    reason: str
    kept: Callable[[Counter], Any] = lambda counter: counter.count


def warmed_up(counter: Counter, model: nn.Module, batch: Batch) -> Any:
    counter.count += 1
    return mean_square(model, batch)[0] * min(1.0, counter.count / 5)


def warmed_up_on_the_class(_: Counter, model: nn.Module, batch: Batch) -> Any:
    Counter.count += 1
    return mean_square(model, batch)[0] * min(1.0, Counter.count / 5)


def kept_in_a_list(counter: Counter, model: nn.Module, batch: Batch) -> Any:
    loss = mean_square(model, batch)[0]
    counter.values.append(loss.detach())
    return loss


def kept_in_a_dict(counter: Counter, model: nn.Module, batch: Batch) -> Any:
    loss = mean_square(model, batch)[0]
    counter.kept["last"] = loss.detach()
    return loss


def averaged(counter: Counter, model: nn.Module, batch: Batch) -> Any:
    loss = mean_square(model, batch)[0]
    counter.average = 0.9 * counter.average + 0.1 * loss.detach()
    return loss + counter.average


def changed_in_place(counter: Counter, model: nn.Module, batch: Batch) -> Any:
    loss = mean_square(model, batch)[0]
    counter.average.mul_(0.9).add_(loss.detach(), alpha=0.1)
    return loss + counter.average


def from_a_deque(counter: Counter, model: nn.Module, batch: Batch) -> Any:
    counter.recent.append(counter.recent[-1] * 0.9)
    return mean_square(model, batch)[0] * counter.recent[0]


def from_an_iterator(counter: Counter, model: nn.Module, batch: Batch) -> Any:
    return mean_square(model, batch)[0] * next(counter.scales)


def counted_in_numpy(counter: Counter, model: nn.Module, batch: Batch) -> Any:
    counter.array[0] += 1
    return mean_square(model, batch)[0] * float(counter.array[0])


def read_from_numpy(counter: Counter, model: nn.Module, batch: Batch) -> Any:
    return mean_square(model, batch)[0] * counter.array[0]


def kept_on_the_model(_: Counter, model: Any, batch: Batch) -> Any:
    loss = mean_square(model, batch)[0]
    model.last = loss.detach()
    return loss


def kept_on_a_part_of_the_model(_: Counter, model: Any, batch: Batch) -> Any:
    def keep(module: Any, _inputs: Any, output: Tensor) -> None:
        module.last = output.detach()

    hook = model.register_forward_hook(keep)
    try:
        return mean_square(model, batch)[0]
    finally:
        hook.remove()


STATE = torch.zeros(1)


def kept_in_a_global(_: Counter, model: nn.Module, batch: Batch) -> Any:
    global STATE
    predictions = model(batch[0]) + STATE.detach()
    STATE = predictions.mean(0)
    return F.mse_loss(predictions, batch[1])


def read_from_a_numpy_scalar(counter: Counter, model: nn.Module, batch: Batch) -> Any:
    return mean_square(model, batch)[0] * counter.scalar


@functools.lru_cache(None)
def cached(scale: float) -> float:
    return scale * WEIGHT


def read_through_a_cache(_: Counter, model: nn.Module, batch: Batch) -> Any:
    return mean_square(model, batch)[0] * cached(1.0)


def branched(_: Counter, model: nn.Module, batch: Batch) -> Any:
    loss = mean_square(model, batch)[0]
    return loss * 2 if loss.item() > 1 else loss


def through_numpy(_: Counter, model: nn.Module, batch: Batch) -> Any:
    return mean_square(model, batch)[0] * float(batch[0].numpy().max())


CHANGES_OBJECTS = "forward changes Python objects.*"

REFUSALS: dict[str, Refusal] = {
    "counter": Refusal(warmed_up, CHANGES_OBJECTS + "'counter.count [+]= 1' in test_capture_ref"),
    "counter of the class": Refusal(warmed_up_on_the_class, CHANGES_OBJECTS, lambda _: Counter.count),
    "list": Refusal(kept_in_a_list, CHANGES_OBJECTS + "'counter.values.append", lambda counter: counter.values),
    "dict": Refusal(kept_in_a_dict, CHANGES_OBJECTS + "'counter.kept", lambda counter: counter.kept),
    "average": Refusal(averaged, CHANGES_OBJECTS + "'counter.average =", lambda counter: counter.average),
    "tensor changed in place": Refusal(
        changed_in_place, "forward changes counter.average, which is no buffer", lambda counter: counter.average
    ),
    "deque": Refusal(from_a_deque, CHANGES_OBJECTS + "'counter.recent", lambda counter: list(counter.recent)),
    "iterator": Refusal(
        from_an_iterator, "'return .*next.*' in test_capture_ref", lambda counter: next(counter.scales)
    ),
    "numpy array": Refusal(counted_in_numpy, "'counter.array.*' in test_capture_ref", lambda counter: counter.array[0]),
    "numpy value": Refusal(
        read_from_numpy,
        "numpy.*'return .* counter.array.0.' in test_capture_ref",
        lambda counter: counter.array[0],
    ),
    "numpy scalar": Refusal(
        read_from_a_numpy_scalar,
        r"forward reads a numpy value, .*scalar: 'return .* in test_capture_ref",
        lambda counter: counter.scalar,
    ),
    "model": Refusal(kept_on_the_model, CHANGES_OBJECTS + "'model.last =", lambda _: 0),
    "hook": Refusal(kept_on_a_part_of_the_model, "forward ", lambda _: 0),
    "global": Refusal(kept_in_a_global, CHANGES_OBJECTS + "'STATE =", lambda _: STATE.detach()),
    "cache": Refusal(read_through_a_cache, "functools caches the results", lambda _: cached.cache_info().misses),
    "branch": Refusal(branched, "reads the value of a tensor.*'return loss .*if loss.item.* in test_capture_ref"),
    "numpy of a tensor": Refusal(through_numpy, "calls numpy.*float.batch.0..numpy.*' in test_capture_ref"),
}


def bound(refusal: Refusal) -> tuple[Counter, Forward]:
    counter = Counter()
    Counter.count = 0
    globals().update(STATE=torch.zeros(1), WEIGHT=1.0)
    cached.cache_clear()
    return counter, lambda model, batch: refusal.forward(counter, model, batch)


@pytest.mark.parametrize("name", REFUSALS)
def test_what_a_graph_cannot_repeat_is_refused_and_leaves_no_trace(name: str) -> None:
    refusal = REFUSALS[name]
    counter, forward = bound(refusal)
    model = nn.Linear(4, 1)
    step = TrainStep(model, sgd(model), forward, engine="compiled")
    first, second = pairs(2)
    step(first)
    before = copy.deepcopy((vars(model), {**vars(counter), "scales": None}, Counter.count, STATE.detach()))
    with pytest.raises(EngineError, match=refusal.reason):
        step(second)
    after = (vars(model), {**vars(counter), "scales": None}, Counter.count, STATE.detach())
    assert repr(after) == repr(before)
    assert not any(map(is_fake, [*counter.values, *counter.kept.values(), counter.average, STATE]))


@pytest.mark.parametrize("name", REFUSALS)
def test_where_a_step_is_refused_auto_goes_on_as_the_plain_loop(name: str, hasty: None) -> None:
    refusal, count = REFUSALS[name], 30
    sides: list[Any] = []
    for is_auto in (False, True):
        counter, forward = bound(refusal)
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        job = Job(model, forward, lambda: None, (pairs(count), []))
        if is_auto:
            step = TrainStep(model, sgd(model), forward, engine="auto")
            step.expect(1_000_000)
            losses = [step(batch).item() for batch in job.batches[0]]
            assert re.search(refusal.reason, step.engine.reason), step.engine
            step.close()
        else:
            losses = plain_steps(job)
        sides.append((losses, list(model.parameters()), refusal.kept(counter)))
    torch.testing.assert_close(sides[1], sides[0], rtol=1e-12, atol=1e-12)


def is_fake(value: Any) -> bool:
    return type(value) not in (Tensor, nn.Parameter)


def test_what_a_closure_or_a_hook_keeps_is_refused() -> None:
    count, found = 0, {}
    hooked, [batch] = nn.Linear(4, 1), pairs(1)
    hooked.register_forward_hook(lambda _m, _i, output: found.update(fc=output.detach()))

    def counting(model: nn.Module, batch: Batch) -> Any:
        nonlocal count
        count += 1
        return mean_square(model, batch)

    for model, forward, line in ((nn.Linear(4, 1), counting, "count .= 1"), (hooked, mean_square, ".*found.update")):
        spec = spec_of(model, forward)
        before = dict(found)
        with pytest.raises(EngineError, match=f"{CHANGES_OBJECTS}{line}"):
            trace_step(spec, batch)
        assert count == 0
        assert list(map(id, found.values())) == list(map(id, before.values()))


def test_hidden_state_in_a_buffer_compiles() -> None:
    class Language(nn.Module):
        hidden: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.GRU(4, 4), nn.Linear(4, 1)
            self.register_buffer("hidden", torch.zeros(1, 4))

        def forward(self, x: Tensor) -> Tensor:
            output, hidden = self.cell(x, self.hidden)
            self.hidden = hidden.detach()
            return self.head(output)

    def make() -> Job:
        model: Any = Language()
        return Job(model, mean_square, lambda: model.hidden.zero_())

    assert_same_on_all_sides(make)


def test_buffers_that_change_places_compile() -> None:
    class Delayed(nn.Module):
        newer: Tensor
        older: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 1)
            for name in ("newer", "older"):
                self.register_buffer(name, torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            output = self.fc(x + self.older - 0.5 * self.newer)
            self.newer, self.older = x.mean(0), self.newer
            return output

    def make() -> Job:
        model: Any = Delayed()
        return Job(model, mean_square, lambda: model.older.zero_())

    assert_same_on_all_sides(make)


def test_a_buffer_that_forward_replaces_and_never_reads_holds_each_steps_value() -> None:
    class Watched(nn.Linear):
        seen: Tensor

        def forward(self, input: Tensor) -> Tensor:
            self.seen = input.mean(0)
            return super().forward(input)

    def seen_by(engine: str) -> tuple[list[Tensor], str]:
        torch.manual_seed(0)
        model = Watched(4, 1)
        model.register_buffer("seen", torch.zeros(4))
        step = TrainStep(model, sgd(model), mean_square, engine=engine)
        found: list[Tensor] = []
        for number, batch in enumerate(pairs(8)):
            if number == 5:
                model.seen = torch.zeros(4)
            step(batch)
            found.append(model.seen.clone())
        return found, step.engine.value

    (found, engine), (wanted, _) = seen_by("compiled"), seen_by("eager")
    torch.testing.assert_close(found, wanted)
    assert engine == "compiled"


def test_a_warning_of_forward_is_left_to_eager() -> None:
    def forward(model: nn.Module, batch: Batch) -> Any:
        warnings.warn("few rows", stacklevel=1)
        return mean_square(model, batch)

    spec, batch = spec_of(nn.Linear(4, 1), forward), pairs(1)[0]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        traced = trace_step(spec, batch)
        run_graph(traced, batch)
    assert not found


def test_a_buffer_that_is_replaced_by_one_of_another_shape_is_refused() -> None:
    class Growing(nn.Linear):
        seen: Tensor

        def forward(self, input: Tensor) -> Tensor:
            self.seen = input.mean(0)[:1]
            return super().forward(input)

    model = Growing(4, 1)
    model.register_buffer("seen", torch.zeros(4))
    spec = TrainStep(model, sgd(model), mean_square, engine="eager").spec
    with pytest.raises(EngineError, match=r"buffer 'seen', a tensor of shape \[4\] .* by one of shape \[1\]"):
        trace_step(spec, pairs(1)[0])


# Random numbers.

OWN = [random.Random(3), np.random.RandomState(3), np.random.default_rng(3)]
DRAWS: list[Any] = [random.random, np.random.rand, *(own.random for own in OWN)]


@pytest.mark.parametrize("draw", DRAWS)
def test_random_numbers_that_are_not_torchs_are_refused_and_none_is_lost(draw: Any) -> None:
    model = nn.Linear(4, 1)
    spec = spec_of(model, lambda model, batch: mean_square(model, batch)[0] * draw())
    twin = copy.deepcopy(draw.__self__)
    with pytest.raises(EngineError, match="random numbers"):
        trace_step(spec, pairs(1)[0])
    assert draw() == getattr(twin, draw.__name__)()


def test_a_trace_leaves_the_random_numbers_of_other_threads_alone() -> None:
    random.seed(3)
    drawn: list[float] = []
    is_over = threading.Event()

    def draw() -> None:
        while not is_over.is_set():
            drawn.append(random.random())
            time.sleep(0)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        trace_step(spec_of(nn.Linear(4, 1), mean_square), pairs(1)[0])
    finally:
        is_over.set()
        thread.join()
    random.seed(3)
    assert drawn == [random.random() for _ in drawn]


def spec_of(model: nn.Module, forward: Forward) -> StepSpec:
    """A step whose optimizer has made its state."""
    step = TrainStep(model, sgd(model), mean_square, engine="eager")
    step(pairs(1)[0])
    return with_forward(step.spec, forward)


# What forward does not read.


def test_what_forward_does_not_read_may_change() -> None:
    def make() -> Job:
        net = Net()
        net.unused = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))

        def change() -> None:
            net.register_buffer("more", torch.ones(1))
            net.unused.eval()
            net.unused[0].register_forward_hook(lambda *_: None)
            net.note = "new"

        return Job(net, using_helpers, change)

    assert_same_on_all_sides(make)
    job = make()
    spec = spec_of(job.model, job.forward)
    traced = trace_step(spec, pairs(1)[0])
    job.change()
    assert not isinstance(traced.inputs(pairs(1)[0]), Mismatch)


def tensor_of_the_model() -> tuple[nn.Module, Forward, Callable[[Tensor], Any], str]:
    model = Holding(torch.tensor(1.0), lambda x, value: x * value)
    return model, mean_square, lambda value: setattr(model, "value", value), "the tensor model.value"


def tensor_in_a_global() -> tuple[nn.Module, Forward, Callable[[Tensor], Any], str]:
    globals()["STATE"] = torch.zeros(1)
    forward = lambda model, batch: mean_square(model, batch)[0] * (STATE + 1).sum()  # noqa: E731
    return nn.Linear(4, 1), forward, lambda value: globals().update(STATE=value), "STATE"


def tensor_in_a_closure() -> tuple[nn.Module, Forward, Callable[[Tensor], Any], str]:
    scale = torch.tensor(1.0)

    def change(value: Tensor) -> None:
        nonlocal scale
        scale = value

    return nn.Linear(4, 1), lambda model, batch: mean_square(model, batch)[0] * scale, change, "the tensor "


def weight_of_the_loss() -> tuple[nn.Module, Forward, Callable[[Tensor], Any], str]:
    loss = nn.BCEWithLogitsLoss(weight=torch.tensor(1.0))
    forward = lambda model, batch: loss(model(batch[0]), batch[1].sigmoid())  # noqa: E731
    return nn.Linear(4, 1), forward, lambda value: setattr(loss, "weight", value), ".weight"


def weight_of_a_teacher() -> tuple[nn.Module, Forward, Callable[[Tensor], Any], str]:
    teacher = nn.Linear(4, 1).requires_grad_(False)
    forward = lambda model, batch: F.mse_loss(model(batch[0]), teacher(batch[0]))  # noqa: E731

    def change(value: Tensor) -> None:
        teacher.bias = nn.Parameter(value.reshape(1), requires_grad=False)

    return nn.Linear(4, 1), forward, change, ".bias"


@pytest.mark.parametrize(
    "make",
    [tensor_of_the_model, tensor_in_a_global, tensor_in_a_closure, weight_of_the_loss, weight_of_a_teacher],
)
def test_a_replaced_tensor_is_told_by_name_and_taken_up(
    make: Callable[[], tuple[nn.Module, Forward, Callable[[Tensor], Any], str]],
) -> None:
    model, forward, change, name = make()
    [batch] = pairs(1)
    spec = spec_of(model, forward)
    traced = trace_step(spec, batch)
    shape = (1,) if make is tensor_in_a_global else ()
    for value in (0.5, 3.0):
        change(torch.full(shape, value))
        mismatch = traced.inputs(batch)
        assert isinstance(mismatch, Mismatch)
        assert name in mismatch.reason
        assert traced.rebind(batch)
        wanted = spec.forward(model, batch).loss.detach()
        torch.testing.assert_close(run_graph(traced, batch), wanted, rtol=1e-12, atol=1e-12)


def test_a_tensor_that_is_changed_in_place_is_read_anew() -> None:
    model, forward, _, _ = tensor_of_the_model()
    [batch] = pairs(1)
    traced = trace_step(spec_of(model, forward), batch)
    for value in (0.5, 3.0):
        vars(model)["value"].fill_(value)
        wanted = mean_square(model, batch)[0].detach()
        torch.testing.assert_close(run_graph(traced, batch), wanted, rtol=1e-12, atol=1e-12)


def test_a_module_that_forward_holds_is_guarded_as_the_model_is() -> None:
    def change_mode(teacher: Any) -> None:
        teacher.eval()

    def change_rate(teacher: Any) -> None:
        teacher[1].p = 0.5

    def add_hook(teacher: Any) -> None:
        teacher[0].register_forward_hook(lambda _m, _i, output: 2 * output)

    for change in (change_mode, change_rate, add_hook):
        teacher = nn.Sequential(nn.Linear(4, 1), nn.Dropout(0.9)).requires_grad_(False)

        def forward(model: nn.Module, batch: Batch, teacher: nn.Module = teacher) -> Any:
            return F.mse_loss(model(batch[0]), teacher(batch[0]))

        [batch] = pairs(1)
        traced = trace_step(spec_of(nn.Linear(4, 1), forward), batch)
        assert not isinstance(traced.inputs(batch), Mismatch)
        change(teacher)
        assert isinstance(traced.inputs(batch), Mismatch)
        assert not traced.rebind(batch)


def test_a_parameter_that_only_the_optimizer_has_is_trained() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros(()))

        def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
            return F.mse_loss(predictions, targets) * (-self.log_scale).exp() + self.log_scale

    found: list[Tensor] = []
    for engine in ("eager", "compiled"):
        torch.manual_seed(0)
        model, loss = nn.Linear(4, 1), Weighted()
        optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1, foreach=False)
        step = TrainStep(model, optimizer, loss=loss, engine=engine)
        for batch in pairs(5):
            step(batch)
        assert step.engine.value == engine
        found.append(loss.log_scale.detach())
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
    assert found[0] != 0


# Sizes that are left open.


def rows_of(count: int) -> tuple[Ragged, Tensor]:
    offsets = torch.linspace(0, count, 6).long()
    return Ragged(torch.arange(count, dtype=torch.int32) % 9, offsets), torch.ones(5, dtype=torch.int64)


SIZED: dict[str, Callable[[Tensor, int], Tensor]] = {
    "a division": lambda loss, count: loss / count,
    "a float": lambda loss, count: loss / float(count),
    "a root": lambda loss, count: loss / math.sqrt(count),
    "a branch": lambda loss, count: loss if count > 9 else loss.sqrt(),
}


def by_count(decide: Callable[[Tensor, int], Tensor]) -> StepSpec:
    spec, _ = started(CASES["sparse"], OPTIMIZERS["sgd"])
    return with_forward(spec, lambda model, batch: decide(model(batch[0]).square().sum(), batch[0].values.shape[0]))


@pytest.mark.parametrize("how", SIZED)
def test_what_is_computed_of_the_number_of_values_holds_for_any_or_is_noticed(how: str) -> None:
    spec = by_count(SIZED[how])
    traced = trace_step(spec, rows_of(20))
    for count in (20, 2, 33):
        batch = rows_of(count)
        wanted = spec.forward(spec.model, batch).loss.detach()
        if how == "a branch" and count < 9:
            assert isinstance(traced.inputs(batch), Mismatch)
        else:
            torch.testing.assert_close(run_graph(traced, batch), wanted)


def test_what_python_decides_by_the_number_of_values_is_refused() -> None:
    spec = by_count(lambda loss, count: loss + sum(range(count)))
    with pytest.raises(EngineError, match="decided by the number of values"):
        trace_step(spec, rows_of(20))


def test_fewer_than_two_values_are_for_eager() -> None:
    spec, batch = started(CASES["sparse"], OPTIMIZERS["sgd"])
    traced = trace_step(spec, batch)
    for count in (0, 1):
        assert isinstance(traced.inputs(rows_of(count)), Mismatch)
        with pytest.raises(EngineError, match="fewer than two"):
            trace_step(spec, rows_of(count))
    assert not isinstance(traced.inputs(rows_of(2)), Mismatch)


# A capture changes nothing.


def test_a_trace_leaves_the_weights_that_a_recurrent_layer_lists() -> None:
    spec, batch = started(CASES["lstm"], OPTIMIZERS["sgd"])
    cell: Any = spec.model.get_submodule("cell")
    before = list(cell._flat_weights)
    trace_step(spec, batch)
    assert all(a is b for a, b in zip(cell._flat_weights, before, strict=True))


def process_state(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """What a capture could change, besides the user's own objects; compared by ==."""
    tensors = [*model.parameters(), *(batch[0].values, batch[0].offsets, batch[1])]
    return {
        "module class": dict(vars(nn.Module)),
        "module hooks": [dict(table) for table in global_module_hooks()],
        "globals": {name: id(value) for name, value in globals().items()},
        "attributes of tensors": [dict(vars(tensor)) for tensor in tensors],
        "gradients": [tensor.grad for tensor in tensors],
        "modules": [list(vars(module)) for module in model.modules()],
        "torch's generator": torch.get_rng_state().tolist(),
        "random": random.getstate(),
        "numpy": repr(np.random.get_state()),
        "dynamo's config": {name: repr(getattr(dynamo_config, name)) for name in _OPTIONS},
        "warnings": list(warnings.filters),
    }


@pytest.mark.parametrize("is_refused", [False, True])
def test_a_capture_changes_nothing(is_refused: bool) -> None:
    def forward(model: nn.Module, batch: Batch) -> Any:
        loss = model(batch[0]).square().sum() * WEIGHT + torch.rand(())
        return loss * (2 if is_refused and loss > 0 else 1)

    spec, batch = started(CASES["sparse"], OPTIMIZERS["sgd"])
    trace_step(spec, batch)  # what torch imports and makes once in a process
    before = process_state(spec.model, batch)
    with pytest.raises(EngineError) if is_refused else nullcontext():
        trace_step(with_forward(spec, forward), batch)
    after = process_state(spec.model, batch)
    assert {name for name in before if before[name] != after[name]} == set()


def test_the_users_own_compiled_functions_and_ours_do_not_meet() -> None:
    counter = CompileCounter()
    model = nn.Linear(4, 1)

    @torch.compile(backend=counter)
    def users(batch: Batch) -> Tensor:
        return mean_square(model, batch)[0]

    [batch] = pairs(1)
    spec = spec_of(model, mean_square)
    wanted = users(batch)
    traced = trace_step(spec, batch)
    assert torch.equal(users(batch), wanted)
    assert counter.frame_count == 1, "the user's function was compiled anew"
    assert not isinstance(traced.inputs(batch), Mismatch)
    torch._dynamo.reset()
    assert not isinstance(traced.inputs(batch), Mismatch)
    torch.testing.assert_close(run_graph(traced, batch), wanted.detach(), rtol=1e-12, atol=1e-12)
    assert not isinstance(trace_step(spec, batch).inputs(batch), Mismatch)
    users(batch)
    assert counter.frame_count == 2


def test_a_capture_holds_in_another_thread() -> None:
    [batch] = pairs(1)
    traced = trace_step(spec_of(Net(), mean_square), batch)
    with ThreadPoolExecutor(1) as pool:
        assert not isinstance(pool.submit(traced.inputs, batch).result(), Mismatch)
        assert pool.submit(trace_step, traced.spec, batch).result().parts
