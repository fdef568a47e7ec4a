"""Compiled programs against the eager loop. Each takes 10 to 30 s to compile, so they are few and cover much."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.fx_passes import post_grad

from fasttrain.data.ragged import Ragged
from fasttrain.device import Choice
from fasttrain.errors import EngineError
from fasttrain.metrics import RunningMetrics
from fasttrain.step.eager import EagerEngine
from fasttrain.step.program import StepProgram, compile_graph
from fasttrain.step.spec import StepSpec, normalise_forward
from fasttrain.step.trace import Mismatch, TracedStep, trace_step
from tests.step import programs

ASKED = Choice("eager", "asked for")

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Any]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict[str, Any])


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(50, 1)

    def forward(self, rows: Ragged) -> Tensor:
        values = self.fc1.weight.view(-1).index_select(0, rows.values)
        return torch.segment_reduce(values, "sum", offsets=rows.offsets, unsafe=True) + self.fc1.bias


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24, bias=False)  # a bias of keys has no gradient but noise
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        query, key, value = self.qkv(self.norm(hidden)).unflatten(-1, (2, 12)).transpose(1, 2).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.head(hidden + mixed.transpose(1, 2).flatten(-2)).transpose(1, 2)


def bags(generator: torch.Generator) -> Any:
    lengths = torch.randint(1, 9, (8,), generator=generator)
    values = torch.randint(0, 50, (int(lengths.sum()),), generator=generator).int()
    return Ragged.of_lengths(values, lengths), torch.randint(0, 2, (8,), generator=generator).float()


def vectors(generator: torch.Generator) -> Any:
    return torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def images(generator: torch.Generator) -> Any:
    return torch.randn(8, 1, 6, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def texts(generator: torch.Generator) -> Any:
    ids = torch.randint(0, 11, (4, 7), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def two_groups(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam([{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.03}], lr=0.01)


CASES = {
    "sparse, adam": Case(Bags, bags, F.binary_cross_entropy_with_logits, lambda p: torch.optim.Adam(p, lr=0.01)),
    "dropout, adam in two groups, accumulated, clipped": Case(
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.4), nn.ReLU(), nn.Linear(5, 3)),
        vectors,
        F.cross_entropy,
        two_groups,
        {"accumulate": 3, "clip_norm": 0.5},
    ),
    "batch norm, sgd, scaled": Case(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        ),
        images,
        lambda predictions, targets: 8 * F.cross_entropy(predictions, targets),
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.01),
        {"is_scaled": True},
    ),
    "attention, tied weights, radam": Case(Attention, texts, F.cross_entropy, lambda p: torch.optim.RAdam(p, lr=0.01)),
}


def make(case: Case) -> StepSpec:
    torch.manual_seed(5)
    model = case.build()
    options = {"accumulate": 1, "clip_norm": None, "clip_value": None, **case.options}
    is_scaled = options.pop("is_scaled", False)
    return StepSpec(
        model=model,
        optimizer=case.optimizer(list(model.parameters())),
        forward=normalise_forward(None, case.loss),
        device=CPU,
        precision="fp32",
        metrics=RunningMetrics(CPU),
        scaler=torch.amp.GradScaler("cpu", growth_interval=3) if is_scaled else None,
        **options,
    )


def everything(spec: StepSpec) -> dict[str, Any]:
    return {
        "model": spec.model.state_dict(),
        "optimizer": spec.optimizer.state_dict(),
        "metrics": spec.metrics.totals,
        "scaler": {} if spec.scaler is None else spec.scaler.state_dict(),
        "gradients": [torch.zeros(1) if each.grad is None else each.grad for each in spec.trained()],
    }


def move_options(spec: StepSpec) -> None:
    """What schedulers do; takes effect with the next inputs."""
    for group in spec.optimizer.param_groups:
        group["lr"] *= 0.9
        if "betas" in group:
            group["betas"] = (group["betas"][0] * 0.97, group["betas"][1] * 0.999)
        if group.get("momentum"):
            group["momentum"] *= 0.97


def compiled(traced: TracedStep, folder: Path) -> StepProgram:
    packages = [folder / f"{number}.pt2" for number in range(len(traced.parts))]
    for part, package in zip(traced.parts, packages, strict=True):
        compile_graph(part.graph, part.kinds, part.open_dims, package)
    return StepProgram(packages, traced)


@pytest.mark.parametrize("name", CASES)
def test_a_program_gives_eagers_numbers(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    generator = torch.Generator().manual_seed(1)
    data = [case.batch(generator) for _ in range(11)]
    spec, eager_spec = make(case), make(case)
    eager = EagerEngine(eager_spec, ASKED)
    for engine in (EagerEngine(spec, ASKED), eager):
        torch.manual_seed(3)
        while not engine.has_stepped:
            engine.step(data[0])
    before = copy.deepcopy(everything(spec))
    traced = trace_step(spec, data[0])
    program = compiled(traced, tmp_path)
    torch.testing.assert_close(everything(spec), before, rtol=0, atol=0)
    for each in (spec, eager_spec):
        if each.scaler is not None:
            each.scaler.update(2.0**127)  # the first steps overflow
    scales: set[float] = set()
    for seed, batch in enumerate(data[1:]):
        move_options(spec)
        move_options(eager_spec)
        inputs = traced.inputs(batch)
        assert not isinstance(inputs, Mismatch), inputs.reason
        torch.manual_seed(seed)
        wanted, after = eager.step(batch), torch.get_rng_state()
        torch.manual_seed(seed)
        torch.testing.assert_close(program.run(inputs), wanted, rtol=1e-5, atol=1e-6)
        traced.finish()
        scales.add(spec.scaler.get_scale() if spec.scaler is not None else 1.0)
        assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(everything(spec), everything(eager_spec), rtol=1e-4, atol=1e-5)
    assert spec.scaler is None or len(scales) > 2, "nothing was skipped"


@pytest.mark.skipif(
    not hasattr(post_grad, "_chain_random_ops_for_ordering"),
    reason="this torch may draw independent random numbers in another order, and such programs are refused",
)
def test_random_numbers_are_drawn_in_the_order_of_eagers_memory(tmp_path: Path) -> None:
    def drawn(rows: Tensor) -> Tensor:
        turned = rows.transpose(0, 1)
        noise = torch.rand_like(turned) + torch.randn_like(turned)
        return F.dropout(turned, 0.4) + F.dropout(noise.exp(), 0.3).cumsum(0)

    rows = torch.randn(3, 5, 7)
    program = programs.compiled(drawn, [rows], tmp_path)
    torch.manual_seed(2)
    wanted = drawn(rows)
    torch.manual_seed(2)
    torch.testing.assert_close(program.run([rows]), wanted)


def test_a_compiler_that_fails_is_an_engine_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = CASES["sparse, adam"]
    spec, batch = make(case), bags(torch.Generator().manual_seed(1))
    EagerEngine(spec, ASKED).step(batch)
    monkeypatch.setenv("CXX", str(tmp_path / "missing-compiler"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(EngineError, match="cannot be compiled"):
        compiled(trace_step(spec, batch), tmp_path)
