"""One suite for every engine: the same numbers, the same manners."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttrain import ConfigError, EngineError, TrainStep
from fasttrain.step import eager as module
from fasttrain.step import train_step
from fasttrain.step.eager import FusedWhereOpen
from fasttrain.step.train_step import explain_auto

ENGINES = ["eager", "torch-compile", "compiled"]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw, own choice": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batches(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 6, generator=generator).double(), torch.randint(0, 3, (8,), generator=generator))
        for _ in range(count)
    ]


def textbook(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    losses: list[float] = []
    for x, y in batches():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    return losses


# Programs of the other optimizers are in test_program.py: each takes half a minute to compile.
@pytest.mark.parametrize(
    ("engine", "name"), [*[("eager", name) for name in OPTIMIZERS], ("torch-compile", "adam"), ("compiled", "adam")]
)
def test_the_numbers_are_the_textbooks(engine: str, name: str) -> None:
    net = model()
    reference = copy.deepcopy(net)
    step = TrainStep(net, OPTIMIZERS[name](net.parameters()), loss=nn.CrossEntropyLoss(), engine=engine)
    losses = [step(batch).item() for batch in batches()]
    assert losses == pytest.approx(textbook(reference, OPTIMIZERS[name](reference.parameters())), rel=1e-10)
    for got, wanted in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_running_metrics_and_the_returned_loss(engine: str) -> None:
    net = model()
    step = TrainStep(net, OPTIMIZERS["adam"](net.parameters()), loss=nn.CrossEntropyLoss(), engine=engine)
    losses = [step(batch) for batch in batches()]
    assert not any(loss.requires_grad for loss in losses)
    readout = step.metrics.compute()
    assert readout.loss == pytest.approx(torch.stack(losses).mean().item())
    assert readout.accuracy is not None
    assert (step.compile_s is None) == (engine == "eager")


def test_forward_may_return_the_loss_alone() -> None:
    net = model()
    step = TrainStep(net, torch.optim.SGD(net.parameters(), lr=0.1), lambda m, batch: m(batch).sum())
    step(batches()[0][0])
    assert step.metrics.compute().accuracy is None


@pytest.mark.parametrize(
    ("forward", "loss", "message"),
    [
        (None, None, "neither was given"),
        (lambda m, b: m(b), nn.MSELoss(), "both was given"),
    ],
)
def test_forward_or_loss(forward: Any, loss: Any, message: str) -> None:
    net = model()
    with pytest.raises(ConfigError, match=message):
        TrainStep(net, torch.optim.SGD(net.parameters(), lr=0.1), forward, loss=loss)


@pytest.mark.parametrize(
    ("forward", "batch", "message"),
    [
        (lambda m, b: (m(b).sum(), 1), torch.zeros(2, 6).double(), "returned a tuple of 2"),
        (lambda m, b: None, torch.zeros(2, 6).double(), "it returned None"),
        (lambda m, b: m(b), torch.zeros(2, 6).double(), r"a tensor of shape \[2, 3\]"),
        (None, {"x": 1}, "batches of .inputs, targets."),
    ],
)
def test_what_a_forward_may_not_return(forward: Any, batch: Any, message: str) -> None:
    net = model()
    loss = nn.MSELoss() if forward is None else None
    step = TrainStep(net, torch.optim.SGD(net.parameters(), lr=0.1), forward, loss=loss)
    with pytest.raises(ConfigError, match=message):
        step(batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate 0"),
        ({"clip_norm": -1.0}, "clip_norm -1.0"),
        ({"clip_value": 0.0}, "clip_value 0.0"),
        ({"engine": "fast"}, "use one of auto, eager, compiled, torch-compile"),
        ({"precision": "fp8"}, "use one of auto, fp32"),
        ({"device": "meta"}, "not supported"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    net = model()
    with pytest.raises(Exception, match=message):
        TrainStep(net, torch.optim.SGD(net.parameters(), lr=0.1), loss=nn.MSELoss(), **options)


def test_a_model_on_two_devices_is_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ConfigError, match="spread over"):
        TrainStep(net, torch.optim.SGD(net.parameters(), lr=0.1), loss=nn.MSELoss())


def test_auto_says_why() -> None:
    net = model()
    step = TrainStep(net, torch.optim.SGD(net.parameters(), lr=0.1), loss=nn.CrossEntropyLoss(), engine="auto")
    step(batches()[0])
    assert step.engine.value == "eager"
    assert step.engine.reason
    assert explain_auto(torch.device("cpu")).value == "eager, then compiled"


@pytest.mark.parametrize("has_headers", [True, False])
def test_auto_says_what_a_gpu_lacks(has_headers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> None:
        if not has_headers:
            raise EngineError("no CUDA headers")

    monkeypatch.setattr(train_step, "cuda_home", home)
    found = explain_auto(torch.device("cuda"))
    assert found.value == ("eager, then graphed" if has_headers else "eager")
    assert has_headers or found.reason == "no CUDA headers"


def test_compiled_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cpp_compiler", lambda: None)
    net = model()
    with pytest.raises(EngineError, match="needs a C\\+\\+ compiler"):
        TrainStep(net, torch.optim.SGD(net.parameters(), lr=0.1), loss=nn.MSELoss(), engine="compiled")


def test_fused_is_used_where_left_open_and_nowhere_else() -> None:
    parameters = [nn.Parameter(torch.zeros(2))]
    seen: list[Any] = []

    class Spy(torch.optim.Adam):
        pass

    for optimizer, fused in (
        (torch.optim.Adam(parameters), True),
        (torch.optim.Adam(parameters, foreach=True), None),
        (torch.optim.Adam(parameters, fused=False), False),
        (torch.optim.Adam(parameters, lr=torch.tensor(0.1)), None),
        (torch.optim.RMSprop(parameters), None),
        (Spy(parameters), None),
    ):
        context = FusedWhereOpen(optimizer)
        before = dict(optimizer.param_groups[0])
        with context:
            optimizer.step()
            seen.append((optimizer.param_groups[0].get("fused"), fused))
        assert dict(optimizer.param_groups[0]) == before
    assert all(got is wanted for got, wanted in seen)


def test_fused_follows_a_loaded_state() -> None:
    """load_state_dict replaces the groups: what was looked at before must not be used."""
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(2))])
    context = FusedWhereOpen(optimizer)
    for _ in range(3):
        with context:
            optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    with context:
        optimizer.step()
        assert optimizer.param_groups[0]["fused"] is True
    assert optimizer.param_groups[0]["fused"] is None


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_on_the_cpu(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasttrain.device._cpu_has", lambda *_: True)
    net = model().float()
    step = TrainStep(net, torch.optim.SGD(net.parameters(), lr=0.1), loss=nn.CrossEntropyLoss(), precision=precision)
    dtypes: list[torch.dtype] = []
    net[0].register_forward_hook(lambda _m, _i, output: dtypes.append(output.dtype))  # pyright: ignore
    for x, y in batches(3):
        step((x.float(), y))
    assert set(dtypes) == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert (step.spec.scaler is None) == (precision == "bf16")
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())
    reference = model().float()
    wanted = TrainStep(reference, torch.optim.SGD(reference.parameters(), lr=0.1), loss=nn.CrossEntropyLoss())
    for x, y in batches(3):
        wanted((x.float(), y))
    assert step.metrics.compute().loss == pytest.approx(wanted.metrics.compute().loss, rel=2e-2)
