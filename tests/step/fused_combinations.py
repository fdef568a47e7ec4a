"""Combinations of optimizer options, layouts, dtypes, gradients and checkpoints: eager steps against plain PyTorch.

`python -m tests.step.fused_combinations` runs them all, with a number of drawn jobs for each of them.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from fasttrain import FastLoop
from fasttrain.step import eager

STEPS, CHANGED_AT = 6, 3

OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "Adam": {
        "lr": (0.01, 0.1),
        "betas": ((0.9, 0.999), (0.5, 0.9)),
        "eps": (1e-8, 1e-3),
        "weight_decay": (0, 0.1),
        "amsgrad": (False, True),
        "maximize": (False, True),
        "decoupled_weight_decay": (False, True),
    },
    "AdamW": {
        "lr": (0.01, 0.1),
        "betas": ((0.9, 0.999), (0.5, 0.9)),
        "eps": (1e-8, 1e-3),
        "weight_decay": (0, 0.1),
        "amsgrad": (False, True),
        "maximize": (False, True),
    },
    "SGD": {
        "lr": (0.05, 0.3),
        "momentum": (0, 0.9),
        "dampening": (0, 0.2),
        "weight_decay": (0, 0.1),
        "nesterov": (False, True),
        "maximize": (False, True),
    },
    "Adagrad": {
        "lr": (0.05, 0.2),
        "lr_decay": (0, 0.1),
        "eps": (1e-10, 1e-3),
        "weight_decay": (0, 0.1),
        "initial_accumulator_value": (0, 0.5),
        "maximize": (False, True),
    },
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
DENSE = {"contiguous", "channels_last", "transposed", "empty", "one column"}

DTYPES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.0, torch.float16: 0.0}
"""Tolerances, relative and absolute: of half precision none, since fused kernels round otherwise and are not used."""

GRADIENTS: dict[str, Callable[[int], bool]] = {
    "always": lambda _batch: True,
    "late": lambda batch: batch >= 2,
    "gone": lambda batch: batch < CHANGED_AT,
    "every second": lambda batch: batch % 2 == 0,
    "in another layout": lambda _batch: True,
}
"""In which steps the second parameter has a gradient."""


@dataclass(frozen=True)
class Combination:
    """An optimizer and the tensors that it steps over."""

    kind: str
    options: tuple[tuple[str, Any], ...]
    dtype: torch.dtype
    layout: str
    gradients: str = "always"
    change: str = "nothing"
    has_two_groups: bool = False

    def must_be_fused(self) -> bool:
        """Whether nothing speaks against fused kernels in any step."""
        is_plain = self.gradients == "always" and self.change == "nothing"
        is_known = self.dtype in (torch.float32, torch.float64) and not dict(self.options).get("amsgrad")
        return is_plain and is_known and self.layout in DENSE


class Weights(nn.Module):
    """Two parameters, the second of which has gradients in some steps only."""

    def __init__(self, combination: Combination) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.whole = torch.randn(6, 4, 3, 3, generator=generator).to(combination.dtype)
        self.first = nn.Parameter(LAYOUTS[combination.layout](self.whole))
        self.second = nn.Parameter(torch.randn(40, generator=generator).to(combination.dtype))
        self.has_second = GRADIENTS[combination.gradients]
        if combination.gradients == "in another layout":
            self.first.register_post_accumulate_grad_hook(lie_otherwise)


def batches_of(model: Weights, numbers: range) -> list[dict[str, Any]]:
    batches: list[dict[str, Any]] = []
    for number in numbers:
        factors = torch.randn(model.first.shape, generator=torch.Generator().manual_seed(number))
        batches.append({"number": number, "factors": factors.to(model.first.dtype)})
    return batches


def lie_otherwise(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad = otherwise(parameter.grad)


def otherwise(tensor: Tensor) -> Tensor:
    """The same values in another memory format."""
    is_contiguous = tensor.is_contiguous()
    return tensor.contiguous(memory_format=torch.channels_last if is_contiguous else torch.contiguous_format)


def forward(model: Weights, batch: dict[str, Any]) -> Tensor:
    loss = (model.first * batch["factors"]).square().sum()
    number = batch["number"]
    return loss + (model.second * (number + 1) / 4).sin().sum() if model.has_second(number) else loss


def nothing(_model: Weights, _optimizer: torch.optim.Optimizer) -> None:
    pass


def load_checkpoint(model: Weights, optimizer: torch.optim.Optimizer) -> None:
    """State of a model in another memory format."""
    saved = optimizer.state_dict()
    for entries in saved["state"].values():
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.dim() == 4:
                entries[name] = otherwise(value)
    optimizer.load_state_dict(saved)


def swap_state(model: Weights, optimizer: torch.optim.Optimizer) -> None:
    for value in optimizer.state[model.first].values():
        if isinstance(value, Tensor) and value.dim() == 4:
            value.data = otherwise(value.data)


def swap_parameter(model: Weights, _optimizer: torch.optim.Optimizer) -> None:
    model.first.data = otherwise(model.first.data)


CHANGES = {change.__name__: change for change in (nothing, load_checkpoint, swap_state, swap_parameter)}


def option_sets() -> Iterator[tuple[str, tuple[tuple[str, Any], ...]]]:
    """All that torch accepts."""
    for kind, choices in OPTIONS.items():
        for values in itertools.product(*choices.values()):
            options = dict(zip(choices, values, strict=True))
            if not options.get("nesterov") or (options["momentum"] and not options["dampening"]):
                yield kind, tuple(options.items())


def combinations(num_jobs: int) -> list[Combination]:
    """Every set of options with every dtype and layout, first as it is, then in jobs drawn for each."""
    draw = random.Random(0)
    found: list[Combination] = []
    for (kind, options), dtype, layout in itertools.product(option_sets(), DTYPES, LAYOUTS):
        found.append(Combination(kind, options, dtype, layout))
        for _ in range(num_jobs):
            gradients, change = draw.choice([*GRADIENTS]), draw.choice([*CHANGES])
            found.append(Combination(kind, options, dtype, layout, gradients, change, draw.random() < 0.5))
    return found


def trained(combination: Combination, *, is_fast: bool) -> tuple[Weights, torch.optim.Optimizer, str]:
    """The model after its steps, its optimizer, and the name of an error that ended them."""
    model = Weights(combination)
    groups: list[Any] = [*model.parameters()]
    if combination.has_two_groups:
        groups = [{"params": [parameter]} for parameter in groups]
    optimizer = getattr(torch.optim, combination.kind)(groups, **dict(combination.options))
    loop = FastLoop(model, optimizer, forward, engine="eager") if is_fast else None
    try:
        for numbers in (range(CHANGED_AT), range(CHANGED_AT, STEPS)):
            batches = batches_of(model, numbers)
            if loop is not None:
                loop.train(batches)
            else:
                for batch in batches:
                    optimizer.zero_grad()
                    forward(model, batch).backward()
                    optimizer.step()
            if numbers.start == 0:
                CHANGES[combination.change](model, optimizer)
    except RuntimeError as error:
        return model, optimizer, type(error).__name__
    return model, optimizer, ""


def difference(combination: Combination) -> tuple[str, int]:
    """How FastLoop's result differs from plain PyTorch's, "" for not, and the number of steps with fused kernels."""
    fused: list[bool] = []

    def step_optimizer(optimizer: torch.optim.Optimizer) -> None:
        run(optimizer)
        fused.append(all(group["fused"] for group in optimizer.param_groups))

    run = eager.step_optimizer
    with mock.patch.object(eager, "step_optimizer", step_optimizer):
        fast, fast_optimizer, fast_error = trained(combination, is_fast=True)
    plain, plain_optimizer, plain_error = trained(combination, is_fast=False)
    num_fused = sum(fused)
    if fast_error != plain_error:
        return f"{fast_error or 'no error'} instead of {plain_error or 'none'}", num_fused
    if any(group["fused"] is not None for group in fast_optimizer.param_groups):
        return "fused is no longer open", num_fused
    if combination.must_be_fused() and num_fused != STEPS:
        return f"{num_fused} steps were fused instead of {STEPS}", num_fused
    tolerance = DTYPES[combination.dtype]
    pairs = [(fast.whole, plain.whole), *zip(fast.parameters(), plain.parameters(), strict=True)]  # and between them
    for own, other in zip(fast.parameters(), plain.parameters(), strict=True):
        entries = plain_optimizer.state.get(other, {})
        pairs += [(fast_optimizer.state[own][name], entries[name]) for name in entries]
    for own, other in pairs:
        if isinstance(other, Tensor) and not torch.allclose(own, other, rtol=tolerance, atol=tolerance, equal_nan=True):
            return f"by {(own.double() - other.double()).abs().max():.3g}", num_fused
    return "", num_fused


def main() -> None:
    """Prints what differs, and the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1, help="drawn jobs for each combination of options, dtype, layout")
    num_jobs: int = parser.parse_args().jobs
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    for combination in combinations(num_jobs):
        differs, num_fused = difference(combination)
        counts["combinations"] += 1
        counts["with fused steps"] += num_fused > 0
        counts["fused steps"] += num_fused
        counts["different"] += bool(differs)
        if differs:
            print(f"{combination}: {differs}", flush=True)  # noqa: T201
    print(dict(counts))  # noqa: T201


if __name__ == "__main__":
    main()
