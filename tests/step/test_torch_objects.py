"""Canaries of `torch_private.objects`: the user's optimizer, scaler, modules and gradients, looked at and stepped."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fasttrain.step import torch_private as private


def test_optimizer_hooks_see_every_kind() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    tables = private.optimizer_hooks(optimizer)
    assert not any(tables)
    for register in (
        optimizer.register_step_pre_hook,
        optimizer.register_step_post_hook,
        register_optimizer_step_pre_hook,
        register_optimizer_step_post_hook,
    ):
        handle = register(lambda *_: None)
        assert any(tables)
        handle.remove()
        assert not any(tables)


def test_run_backward_is_backward() -> None:
    weight, frozen = torch.ones(3, requires_grad=True), torch.ones(3)
    for times in (1, 2):
        loss = (weight * frozen).square().sum()
        private.run_backward(loss, torch.ones(()))
        assert torch.equal(weight.grad, torch.full((3,), 2.0 * times))  # accumulates
        assert frozen.grad is None
    with pytest.raises(RuntimeError, match="second time"):
        private.run_backward(loss, torch.ones(()))
    with pytest.raises(RuntimeError, match="does not require grad"):
        private.run_backward(frozen.sum(), torch.ones(()))


def ranges_of(optimizer: torch.optim.Optimizer) -> list[str]:
    """The profiler's ranges that a step opens, whether or not anybody profiles."""
    opened: list[str] = []
    record_function = torch.autograd.profiler.record_function

    def noted(name: str) -> Any:
        opened.append(name)
        return record_function(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd.profiler, "record_function", noted)
        private.step_optimizer(optimizer)
    return opened


def one_weight(kind: type[torch.optim.Optimizer] = torch.optim.SGD) -> torch.optim.Optimizer:
    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    return kind([weight], lr=0.25)  # type: ignore[call-arg]


def stepped(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.param_groups[0]["params"][0] == 0.75)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, type("Sub", (torch.optim.AdamW,), {})])
def test_a_plain_step_opens_no_range(kind: type[torch.optim.Optimizer]) -> None:
    optimizer = one_weight(kind)
    before = optimizer.param_groups[0]["params"][0].item()
    assert ranges_of(optimizer) == []
    assert optimizer.param_groups[0]["params"][0].item() < before


def test_a_profiled_step_opens_its_range() -> None:
    optimizer = one_weight()
    with torch.profiler.profile(acc_events=True):  # torch 2.11 warns of the default
        assert ranges_of(optimizer) == ["Optimizer.step#SGD.step"]
    assert stepped(optimizer)


def test_hooks_of_a_step_are_called() -> None:
    optimizer = one_weight()
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    private.step_optimizer(optimizer)
    assert called == ["before", "after"]
    assert stepped(optimizer)


def test_a_scheduler_knows_of_the_step() -> None:
    optimizer = one_weight()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert ranges_of(optimizer) == []
    scheduler.step()  # warns, which is an error here, if it believes that there was no step
    assert stepped(optimizer)


def test_a_step_that_the_user_replaced_is_called() -> None:
    called: list[str] = []

    def watched(step: Any) -> Any:
        @functools.wraps(step)
        def wrapper(*arguments: Any) -> Any:
            called.append("wrapper")
            return step(*arguments)

        return wrapper

    by_class = one_weight(type("Watched", (torch.optim.SGD,), {"step": watched(torch.optim.SGD.step)}))
    on_instance = one_weight()
    on_instance.step = watched(on_instance.step)  # type: ignore[method-assign]
    unbound = one_weight()
    unbound.step = functools.partial(watched(torch.optim.SGD.step), unbound)  # type: ignore[method-assign]
    for optimizer in (by_class, on_instance, unbound):
        called.clear()
        private.step_optimizer(optimizer)
        assert called == ["wrapper"]
        assert stepped(optimizer)


def test_gradient_hooks_are_seen() -> None:
    for name in ("register_hook", "register_post_accumulate_grad_hook"):
        parameter = nn.Parameter(torch.ones(1))
        assert not private.has_gradient_hooks(parameter)
        assert eval(private.NO_GRADIENT_HOOKS.format("parameter"))
        handle = getattr(parameter, name)(lambda _: None)
        assert private.has_gradient_hooks(parameter)
        assert not eval(private.NO_GRADIENT_HOOKS.format("parameter"))
        handle.remove()
        assert not private.has_gradient_hooks(parameter)
        assert eval(private.NO_GRADIENT_HOOKS.format("parameter"))


def test_the_tensors_of_a_scaler_and_whether_it_has_skipped() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    assert private.scaler_tensors(scaler) is None
    for factor, is_taken in ((1.0, True), (math.inf, False), (1.0, True)):
        scaler.scale(parameter.sum() * factor).backward()
        before = parameter.item()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert private.was_step_taken(scaler) == is_taken == (parameter.item() != before)
    found = private.scaler_tensors(scaler)
    assert found is not None
    assert [tensor.item() for tensor in found] == [4.0, 1]
    scaler.update(32.0)
    scaler.load_state_dict({**scaler.state_dict(), "_growth_tracker": 5})
    assert [tensor.item() for tensor in found] == [32.0, 5], "they stay the same tensors"


def test_a_scheduler_that_is_made_after_a_step_does_not_miss_it() -> None:
    """Warnings are errors here."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    private.note_step(optimizer)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_module_tables_see_members_and_hooks() -> None:
    module = nn.BatchNorm1d(2)
    child = nn.Linear(1, 1)
    module.add_module("child", child)
    held = [value for table in private.module_tables(module) for value in table.values()]
    assert {id(module.weight), id(module.running_mean), id(child)} <= set(map(id, held))
    for name in (
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ):
        count = sum(map(len, private.module_tables(module)))
        handle = getattr(module, name)(lambda *_: None)
        assert sum(map(len, private.module_tables(module))) == count + 1
        handle.remove()


def test_global_module_hooks_see_every_kind() -> None:
    for register in (
        module.register_module_forward_pre_hook,
        module.register_module_forward_hook,
        module.register_module_full_backward_pre_hook,
        module.register_module_full_backward_hook,
    ):
        count = sum(map(len, private.global_module_hooks()))
        handle = register(lambda *_: None)
        assert sum(map(len, private.global_module_hooks())) == count + 1
        handle.remove()
