"""Fused kernels where the user left the choice to torch: only where they give the plain loop's numbers."""

from __future__ import annotations

import functools
import random
import types
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttrain import TrainStep
from fasttrain.step.eager import KERNEL_FAULTS, FusedWhereOpen, Update
from tests.step.fused_combinations import DENSE, LAYOUTS, combinations, difference

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, dampening=0.2),
    "nesterov": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.05, lr_decay=0.1),
}


class Weights(nn.Module):
    """Two parameters, the second of which gets gradients only from batch `late` on."""

    def __init__(self, layout: str, dtype: torch.dtype, late: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.whole = torch.randn(6, 4, 3, 3, generator=generator).to(dtype)
        self.first = nn.Parameter(LAYOUTS[layout](self.whole))
        self.second = nn.Parameter(torch.randn(40, generator=generator).to(dtype))
        self.late = late


def forward(model: Weights, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    factors = torch.randn(model.first.shape, generator=generator).to(model.first.dtype)
    loss = (model.first * factors).square().sum()
    return loss + (model.second * (batch + 1)).sin().sum() if batch >= model.late else loss


def trained(
    kind: str, layout: str, dtype: torch.dtype, late: int, change: Callable[[Weights, Any], object], *, is_fast: bool
) -> tuple[Weights, list[bool]]:
    model = Weights(layout, dtype, late)
    optimizer = OPTIMIZERS[kind](model.parameters())
    fused: list[bool] = []
    optimizer.register_step_post_hook(lambda own, *_: fused.append(bool(own.param_groups[0]["fused"])))
    step = TrainStep(model, optimizer, forward, engine="eager")  # type: ignore[arg-type]
    for batch in range(6):
        if batch == 3:
            change(model, optimizer)
        if is_fast:
            step(batch)
            continue
        optimizer.zero_grad()
        forward(model, batch).backward()
        optimizer.step()
    assert all(group["fused"] is None and group["foreach"] is None for group in optimizer.param_groups)
    return model, fused


def check(kind: str, layout: str, dtype: torch.dtype, late: int = 0, change: Any = lambda _model, _own: None) -> Any:
    fast, fused = trained(kind, layout, dtype, late, change, is_fast=True)
    plain, _ = trained(kind, layout, dtype, late, change, is_fast=False)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.0)
    for own, wanted in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(fast.whole, plain.whole, rtol=tolerance, atol=tolerance)  # and what lies between
    return fused


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_layouts(kind: str, layout: str) -> None:
    for dtype in (torch.float32, torch.float64):
        if layout == "expanded":  # torch's own loop writes to the one element many times, in any order
            model = Weights(layout, dtype, 0)
            forward(model, 0).backward()
            assert not is_fused(OPTIMIZERS[kind](model.parameters()))
        else:
            assert check(kind, layout, dtype) == [layout in DENSE] * 6


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    with FusedWhereOpen(optimizer):
        with suppress(RuntimeError):  # what torch cannot step over
            optimizer.step()
        return bool(optimizer.param_groups[0].get("fused"))


ITEMS, DRAWN = 5, 400
"""Test items, and combinations in each: 15 seconds on one core. `python -m tests.step.fused_combinations` runs all."""


@pytest.mark.parametrize("item", range(ITEMS))
def test_combinations_of_options_train_as_plain_pytorch_does(item: int) -> None:
    drawn = random.Random(0).sample(combinations(1), ITEMS * DRAWN)[item * DRAWN : (item + 1) * DRAWN]
    num_fused = 0
    for combination in drawn:
        differs, num_steps = difference(combination)
        assert not differs, combination
        num_fused += num_steps > 0
    assert num_fused > DRAWN / 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_half_precision_is_plain_pytorchs_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    assert check(kind, "contiguous", dtype) == [False] * 6


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_gradients_that_come_late(kind: str) -> None:
    fused = check(kind, "contiguous", torch.float64, late=2)
    assert fused == [True, True, kind not in ("momentum", "nesterov"), True, True, True]


def state_into_channels_last(model: Weights, optimizer: torch.optim.Optimizer) -> None:
    for name, value in optimizer.state[model.first].items():
        if value is not None and value.dim() == 4:
            optimizer.state[model.first][name] = value.to(memory_format=torch.channels_last)


def model_into_channels_last(model: Weights, _optimizer: torch.optim.Optimizer) -> None:
    model.first.data = model.first.data.to(memory_format=torch.channels_last)


def state_data_into_channels_last(model: Weights, optimizer: torch.optim.Optimizer) -> None:
    for value in optimizer.state[model.first].values():
        if value is not None and value.dim() == 4:
            value.data = value.data.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("change", [state_into_channels_last, model_into_channels_last, state_data_into_channels_last])
@pytest.mark.parametrize("kind", [kind for kind in OPTIMIZERS if kind != "sgd"])
def test_state_in_another_layout_than_its_parameter(kind: str, change: Any) -> None:
    assert check(kind, "contiguous", torch.float64, change=change) == [True] * 3 + [False] * 3


def stepped(kind: str, change: Callable[[torch.optim.Optimizer, list[nn.Parameter]], object], *, is_fast: bool) -> Any:
    """Parameters after six steps with plain gradients, `change` before the fifth, and whether steps were fused."""
    parameters = [nn.Parameter(torch.arange(60.0).view(6, 10) / 60), nn.Parameter(torch.ones(7))]
    optimizer = OPTIMIZERS[kind](parameters)
    context, fused = FusedWhereOpen(optimizer), []
    for step in range(6):
        if step == 4:
            change(optimizer, parameters)
        for parameter in parameters:
            parameter.grad = (parameter.detach() + step).sin()
        with context if is_fast else nullcontext():
            optimizer.step()
            fused.append(optimizer.param_groups[0]["fused"])
    assert "_init_group" not in vars(optimizer)
    return parameters, fused


def turn(parameter: nn.Parameter) -> None:
    assert parameter.grad is not None
    parameter.grad = (2 * parameter.grad.t()).contiguous().t()


def hook_turns_a_gradient(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    optimizer.register_step_pre_hook(lambda *_: turn(parameters[0]))


def hook_replaces_a_gradient(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    optimizer.register_step_pre_hook(lambda *_: setattr(parameters[0], "grad", torch.ones(6, 10)))


def state_has_other_names_first(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    for parameter, entries in optimizer.state.items():
        optimizer.state[parameter] = dict(reversed(entries.items()))


def state_is_replaced(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def state_is_lost(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    optimizer.state.pop(parameters[1], None)  # plain SGD has none


def option_changes(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    for name, value in (("lr", 0.3), ("weight_decay", 0.1), ("maximize", True)):
        optimizer.param_groups[0][name] = value
    for name, value in (("amsgrad", False), ("momentum", 0)):
        if name in optimizer.param_groups[0]:
            optimizer.param_groups[0][name] = value


def parameters_change_places(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["params"].reverse()


def one_is_dropped(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    del optimizer.param_groups[0]["params"][0]


def step_is_taken_twice(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    def again(own: Any, *_: object) -> None:
        turn(parameters[0])
        type(own).step.__wrapped__(own)

    optimizer.register_step_post_hook(again)


@pytest.mark.parametrize(
    ("change", "stays_fused"),
    [
        (hook_turns_a_gradient, False),
        (hook_replaces_a_gradient, True),
        (state_has_other_names_first, True),
        (state_is_replaced, True),
        (state_is_lost, None),
        (option_changes, None),
        (parameters_change_places, True),
        (one_is_dropped, True),
        (step_is_taken_twice, False),
    ],
)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_changes_between_steps_is_seen(kind: str, change: Any, stays_fused: bool | None) -> None:
    plain, _ = stepped(kind, change, is_fast=False)
    fast, fused = stepped(kind, change, is_fast=True)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-6)
    assert fused[:4] == [True] * 4
    if stays_fused is not None:
        assert fused[4:] == [True if stays_fused else None] * 2


def test_a_step_of_somebody_elses_is_left_alone() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)
    optimizer.step = types.MethodType(torch.optim.SGD.step, optimizer)  # type: ignore[method-assign]
    assert not is_fused(optimizer)
    del vars(optimizer)["step"]
    assert is_fused(optimizer)
    own: Any = optimizer
    own._init_group = listing = functools.partial(torch.optim.SGD._init_group, optimizer)
    assert not is_fused(optimizer)
    assert own._init_group is listing


def test_an_optimizer_that_is_not_torchs_is_left_alone() -> None:
    class Own(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> None:
            """Does nothing."""

    assert not is_fused(Own([nn.Parameter(torch.ones(3))], {}))


def test_dynamos_wrapper_is_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.eval_frame import TorchPatcher

    TorchPatcher.patch()  # as Dynamo does when it first compiles
    for kind in OPTIMIZERS:
        optimizer = OPTIMIZERS[kind]([nn.Parameter(torch.ones(3))])
        assert hasattr(type(optimizer)._init_group, "_torchdynamo_orig_callable")  # type: ignore[attr-defined]
        assert is_fused(optimizer)
    listing: Any = torch.optim.SGD._init_group  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.optim.SGD, "_init_group", functools.wraps(listing)(lambda *each: listing(*each)))
    assert not is_fused(torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1))


def test_what_the_user_has_chosen_stays() -> None:
    model = Weights("contiguous", torch.float32, 0)
    forward(model, 0).backward()
    for options in ({"foreach": True}, {"fused": False}, {"foreach": False}, {"differentiable": True}):
        assert not is_fused(torch.optim.Adam(model.parameters(), **options))
    assert not is_fused(torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1)))
    assert is_fused(torch.optim.Adam(model.parameters()))
    assert not is_fused(torch.optim.RMSprop(model.parameters()))


def updates(parameter: Tensor, gradient: Tensor, **entries: Any) -> list[Update]:
    other = Update(torch.zeros(20), torch.ones(20), {"momentum_buffer": torch.zeros(20)} if entries else {})
    return [other, Update(parameter, gradient, entries)]


MET = [
    updates(torch.zeros(20, 2)[:, 0], torch.ones(20)),
    updates(torch.zeros(4, 5), torch.ones(4, 5), momentum_buffer=torch.arange(20.0).view(5, 4).t()),
    updates(torch.zeros(64, dtype=torch.bfloat16), torch.ones(64, dtype=torch.bfloat16)),
    updates(torch.zeros(20), torch.ones(20), momentum_buffer=None),
    [Update(torch.zeros(21), torch.full((21,), torch.nan), {}, True), Update(torch.zeros(3), torch.ones(3), {}, True)],
]


@pytest.mark.parametrize(("fault", "met"), list(zip(KERNEL_FAULTS, MET, strict=False)), ids=lambda each: None)
def test_torch_still_has_the_faults_of_the_table(fault: Any, met: list[Update]) -> None:
    """Fails where torch has mended one: its row can go once the oldest torch that is supported has the mend."""
    assert [each.is_met(met) for each in KERNEL_FAULTS] == [each is fault for each in KERNEL_FAULTS]
    outcomes: list[Any] = []
    for is_fused in (False, True):
        parameters = [each.parameter.clone(memory_format=torch.preserve_format) for each in met]
        if fault is KERNEL_FAULTS[0]:
            parameters[1] = torch.zeros(20, 2)[:, 0]
        optimizer: torch.optim.Optimizer
        if met[0].is_amsgrad:
            optimizer = torch.optim.Adam(parameters, lr=0.5, amsgrad=True, fused=is_fused)
        else:
            optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.9 if met[0].entries else 0.0, fused=is_fused)
        for own, (_, gradient, entries, _) in zip(parameters, met, strict=True):
            own.grad = gradient.clone()
            if not entries:
                continue
            optimizer.state[own] = {
                name: None if value is None else value.clone(memory_format=torch.preserve_format)
                for name, value in entries.items()
            }
        try:
            optimizer.step()
        except (TypeError, RuntimeError) as error:
            outcomes.append(type(error))
        else:
            kept = [each["max_exp_avg_sq"].isnan().tolist() for each in optimizer.state.values() if met[0].is_amsgrad]
            outcomes.append((parameters[1].tolist(), kept))
    assert outcomes[0] != outcomes[1]
