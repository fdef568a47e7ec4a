"""The user's optimizer, scaler, modules and gradients where torch has no public way to look or to be quick."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from types import CodeType
from typing import Any, cast

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled as _is_profiling
from torch.autograd.graph import _engine_run_backward
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

__all__ = [
    "NO_GRADIENT_HOOKS",
    "has_gradient_hooks",
    "has_own_step",
    "module_tables",
    "note_step",
    "optimizer_hooks",
    "replace_listing",
    "restore_listing",
    "run_backward",
    "scaler_tensors",
    "step_optimizer",
    "was_compiled_by_user",
    "was_step_taken",
]


def optimizer_hooks(optimizer: torch.optim.Optimizer) -> list[dict[int, Any]]:
    """The dicts that hold the hooks of this optimizer's step and those of all optimizers."""
    own: Any = optimizer
    return [
        own._optimizer_step_pre_hooks,
        own._optimizer_step_post_hooks,
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
    ]


def run_backward(loss: Tensor, one: Tensor) -> None:
    """`loss.backward()`, without the 10 of 40 us that its own checks of arguments take (a BCE of 128 rows).

    Args:
        loss: a plain scalar.
        one: of its dtype and shape, on its device: the gradient of the loss by itself.

    Raises:
        RuntimeError: as `backward` does.
    """
    _engine_run_backward((loss,), (one,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def has_own_step(optimizer: torch.optim.Optimizer) -> bool:
    """True where `step` was replaced on the object, by more than a scheduler's wrapper, which notes the call."""
    own: Any = vars(optimizer).get("step")
    is_scheduler = hasattr(own, "_wrapped_by_lr_sched") and own.__wrapped__ is type(optimizer).step
    return own is not None and not is_scheduler


def step_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """`optimizer.step()`, without the profiler's range around it where nobody profiles and nothing is hooked.

    The range alone takes 26 of the 136 us of a linear model's fused Adam (Xeon with AMX, one thread).
    """
    whole: Any = type(optimizer).step
    is_ranged = getattr(whole, "__code__", None) is _ranged_code()
    if not is_ranged or has_own_step(optimizer) or any(optimizer_hooks(optimizer)) or _is_profiling():
        optimizer.step()
        return
    if "step" in vars(optimizer):  # a scheduler's wrapper, which would note the call
        note_step(optimizer)
    whole.__wrapped__(optimizer)


def _listing_of(kind: type[torch.optim.Optimizer]) -> Any:
    """The optimizer class's `_init_group`, without the wrapper that Dynamo installs when it first compiles."""
    listing: Any = getattr(kind, "_init_group", None)
    while hasattr(listing, "_torchdynamo_orig_callable"):
        if getattr(listing, "_torchdynamo_wrapper_id", id(listing)) != id(listing):
            break  # somebody else's wrapper, to which functools.wraps has copied the attributes of Dynamo's
        listing = listing._torchdynamo_orig_callable
    return listing


_LISTING: dict[type[torch.optim.Optimizer], Any] = {
    kind: _listing_of(kind) for kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
}


def replace_listing(optimizer: torch.optim.Optimizer, function: Callable[..., Any]) -> None:
    """Has `optimizer.step()` call `function` where it lists what a group's kernels take, until `restore_listing`.

    Args:
        optimizer: left as it is where its step, or that part of it, is somebody else's.
        function: called with torch's own function and that one's arguments: the group, and the lists to be filled, of
            parameters, gradients, and each kind of state. It returns what torch's function returns. It may set `fused`
            in the group: torch reads it afterwards.
    """
    own: Any = optimizer
    kind = type(optimizer)
    is_torchs = kind in _LISTING and _listing_of(kind) is _LISTING[kind]
    if is_torchs and "_init_group" not in vars(optimizer) and not has_own_step(optimizer):
        own._init_group = partial(function, own._init_group)


def restore_listing(optimizer: torch.optim.Optimizer, function: Callable[..., Any]) -> None:
    """Undoes `replace_listing`."""
    listing = vars(optimizer).get("_init_group")
    if isinstance(listing, partial) and listing.func == function:
        del vars(optimizer)["_init_group"]


def note_step(optimizer: torch.optim.Optimizer) -> None:
    """Notes that the optimizer has stepped, for schedulers that are made later: they warn where they see no step.

    They only see calls of `step`, and a compiled step makes none.
    """
    vars(optimizer)["_opt_called"] = True


@cache
def _ranged_code() -> CodeType:
    """The code of the wrapper that torch puts around every optimizer's step."""
    return cast("Any", torch.optim.Optimizer.profile_hook_step)(lambda: None).__code__


def scaler_tensors(scaler: torch.amp.GradScaler) -> tuple[Tensor, Tensor] | None:
    """A scaler's factor and its count of good steps, scalars; None before it has scaled a loss."""
    if scaler._scale is None or scaler._growth_tracker is None:
        return None
    return scaler._scale, scaler._growth_tracker


def was_step_taken(scaler: torch.amp.GradScaler) -> bool:
    """False where the scaler has skipped the last step, or where the last step has made it grow."""
    return bool(scaler._get_growth_tracker())  # HOST READ: eager scaling has read whether to skip already


def was_compiled_by_user(module: torch.nn.Module) -> bool:
    """True of the result of `torch.compile(module)`, and of a module that was compiled by its own `compile()`."""
    own: Any = module
    return own._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"


def has_gradient_hooks(parameter: Tensor) -> bool:
    """True where Python code runs when this tensor's gradient is made or accumulated."""
    own: Any = parameter
    return bool(own._backward_hooks) or bool(own._post_accumulate_grad_hooks)


NO_GRADIENT_HOOKS = "not {0}._backward_hooks and not {0}._post_accumulate_grad_hooks"
"""`not has_gradient_hooks` as an expression."""


def module_tables(module: torch.nn.Module) -> list[dict[str, Any]]:
    """The dicts that hold a module's parameters, buffers, children and hooks; they live as long as the module."""
    own: Any = module
    return [
        own._parameters,
        own._buffers,
        own._modules,
        own._forward_hooks,
        own._forward_pre_hooks,
        own._backward_hooks,
        own._backward_pre_hooks,
    ]
