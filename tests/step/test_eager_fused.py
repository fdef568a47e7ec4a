"""Fused kernels where the user left the choice to torch: only where they give the plain loop's numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttrain import TrainStep
from fasttrain.step.eager import KERNEL_FAULTS, FusedWhereOpen, Update

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, dampening=0.2),
    "nesterov": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.05, lr_decay=0.1),
}

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda whole: whole.clone(),
    "channels_last": lambda whole: whole.to(memory_format=torch.channels_last),
    "transposed": lambda whole: whole.transpose(0, 1),
    "strided": lambda whole: whole[:, ::2],
    "sliced": lambda whole: whole[:, :1],
    "expanded": lambda whole: whole[:1, :1, :1, :1].expand(6, 4, 3, 3),
    "empty": lambda whole: whole[:0],
    "one column": lambda whole: whole[:, :1].clone().as_strided((6, 1, 3, 3), (9, 1, 3, 1)),
}
FUSED = {"contiguous", "channels_last", "transposed", "empty", "one column"}


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
    optimizer.register_step_pre_hook(lambda own, *_: fused.append(bool(own.param_groups[0]["fused"])))
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
            assert check(kind, layout, dtype) == [layout in FUSED] * 6


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    with FusedWhereOpen(optimizer):
        return bool(optimizer.param_groups[0].get("fused"))


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
