"""Compiled steps on CUDA, by the program itself and by graphs: eager's numbers, no wait in steady state, refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain import EngineError, FastLoop, TrainStep, resident
from fasttrain.data.ragged import Ragged
from fasttrain.step import ladder, timing
from fasttrain.step.cudagraph import MANY, CudaLane
from fasttrain.step.ladder import ENOUGH_MISSED
from fasttrain.step.torch_private import without_cudnn_tf32
from tests.host_waits import host_waits_are_errors

pytestmark = pytest.mark.gpu

Batch = tuple[Tensor, Tensor]
ROWS = 32

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam, its counts on the host": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


@pytest.fixture(autouse=True)
def exact_convolutions() -> Iterator[None]:
    """Both engines may call other kernels of cuDNN, of which some use TF32."""
    with without_cudnn_tf32():
        yield


def mlp(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3)).cuda()


def cnn() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 3)]
    return nn.Sequential(*layers).cuda()


def table(rows: int, *shape: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, *shape, generator=generator), torch.randint(0, 3, (rows,), generator=generator)


def batches(count: int, *shape: int, rows: int = ROWS) -> list[Batch]:
    x, y = (each.cuda() for each in table(rows * count, *shape or (20,)))
    return list(zip(x.split(rows), y.split(rows), strict=True))


def trained(
    engine: str,
    model: nn.Module,
    make: Callable[..., torch.optim.Optimizer],
    data: list[Batch],
    each_step: Callable[[TrainStep], object] = lambda _: None,
    **options: Any,
) -> tuple[TrainStep, list[float]]:
    step = TrainStep(model, make(model.parameters()), loss=F.cross_entropy, engine=engine, **options)
    torch.manual_seed(5)
    losses: list[Tensor] = []
    for batch in data:
        losses.append(step(batch))
        each_step(step)
    return step, torch.stack(losses).tolist()


def assert_as_eager(
    build: Callable[[], nn.Module],
    make: Callable[..., torch.optim.Optimizer],
    data: list[Batch],
    *,
    rtol: float,
    engine: str = "graphed",
    **options: Any,
) -> None:
    eager, wanted = trained("eager", build(), make, data, **options)
    step, losses = trained(engine, build(), make, data, **options)
    assert step.engine.value == engine, step.engine.reason
    assert "ran eagerly" not in step.engine.reason
    assert losses == pytest.approx(wanted, rel=rtol)
    assert step.metrics.compute().loss == pytest.approx(eager.metrics.compute().loss, rel=rtol)
    assert step.metrics.compute().accuracy == pytest.approx(eager.metrics.compute().accuracy, abs=1.0)


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.1}, {"clip_value": 0.01}])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_numbers_are_eagers(name: str, options: dict[str, Any]) -> None:
    assert_as_eager(mlp, OPTIMIZERS[name], batches(30), rtol=1e-4, **options)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_the_program_itself_gives_eagers_numbers(name: str) -> None:
    assert_as_eager(mlp, OPTIMIZERS[name], batches(30), rtol=1e-4, engine="compiled")


def test_batch_norm_keeps_its_buffers() -> None:
    data = batches(30, 1, 8, 8)
    assert_as_eager(cnn, OPTIMIZERS["adam"], data, rtol=1e-3)
    models = [cnn(), cnn()]
    for engine, model in zip(("eager", "graphed"), models, strict=True):
        trained(engine, model, OPTIMIZERS["sgd"], data)
    torch.testing.assert_close(dict(models[1].named_buffers()), dict(models[0].named_buffers()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("precision", "rtol"), [("bf16", 3e-2), ("fp16", 1e-2)])
def test_low_precision(precision: str, rtol: float) -> None:
    assert_as_eager(mlp, OPTIMIZERS["adamw"], batches(30), rtol=rtol, precision=precision, clip_norm=1.0)


def test_dropout_draws_eagers_masks_and_another_in_each_replay() -> None:
    """The policy: a replay takes its random numbers where eager would, and moves the generator on as eager does."""
    assert_as_eager(lambda: mlp(0.5), OPTIMIZERS["sgd"], batches(30), rtol=1e-4)
    same = batches(1) * 12
    still = lambda p: torch.optim.SGD(p, lr=0.0)  # noqa: E731
    _, losses = trained("graphed", mlp(0.5), still, same)
    assert len(set(losses)) == len(losses)


def test_accumulated_gradients() -> None:
    assert_as_eager(mlp, OPTIMIZERS["adam"], batches(30), rtol=1e-4, accumulate=3)


def test_rates_and_betas_that_a_scheduler_moves() -> None:
    losses: list[list[float]] = []
    for engine in ("eager", "graphed"):
        schedulers: dict[int, Any] = {}

        def schedule(step: TrainStep, made: dict[int, Any] = schedulers) -> None:
            one_cycle = torch.optim.lr_scheduler.OneCycleLR
            made.setdefault(0, one_cycle(step.spec.optimizer, 0.05, total_steps=60) if not made else None).step()

        step, found = trained(engine, mlp(), OPTIMIZERS["adam"], batches(40), schedule)
        losses.append(found)
        assert step.engine.value == engine
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_loaded_state_is_taken_up() -> None:
    losses: list[list[float]] = []
    for engine in ("eager", "graphed"):
        model, data = mlp(), batches(30)
        step, first = trained(engine, model, OPTIMIZERS["adam"], data[:10])
        step.spec.optimizer.load_state_dict(step.spec.optimizer.state_dict())
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        losses.append([*first, *torch.stack([step(batch) for batch in data[10:]]).tolist()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_another_size_gets_its_own_graph() -> None:
    data = [*batches(10), *batches(ENOUGH_MISSED + 10, rows=20), *batches(5)]
    _, wanted = trained("eager", mlp(), OPTIMIZERS["adam"], data)
    step, losses = trained("graphed", mlp(), OPTIMIZERS["adam"], data)
    assert losses == pytest.approx(wanted, rel=1e-4)
    assert f"{ENOUGH_MISSED} steps ran eagerly" in step.engine.reason


@pytest.mark.parametrize("options", [{}, {"precision": "fp16"}, {"clip_norm": 1.0}, {"accumulate": 2}])
def test_a_step_never_waits(options: dict[str, Any]) -> None:
    data = batches(30)
    step, _ = trained("graphed", mlp(), OPTIMIZERS["adam"], data, **options)
    with host_waits_are_errors():
        for batch in data:
            step(batch)
            step.metrics.read_late()


def dense_loop(engine: str) -> FastLoop:
    model = mlp()
    return FastLoop(model, OPTIMIZERS["adam"](model.parameters()), loss=F.cross_entropy, engine=engine)


def dense_source() -> Any:
    return resident(*table(ROWS * 70 + 5, 20), batch_size=ROWS, device="cuda", seed=2)


class Bags(nn.Module):
    """A linear model of one-hot words, as the review classifier is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(50, 1)

    def forward(self, rows: Ragged) -> Tensor:
        values = self.linear.weight.reshape(-1).index_select(0, rows.values)
        return torch.segment_reduce(values, "sum", offsets=rows.offsets, unsafe=True) + self.linear.bias


def sparse_loop(engine: str) -> FastLoop:
    model = Bags().cuda()

    def forward(model: nn.Module, batch: tuple[Ragged, Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(batch[0]), batch[1])

    return FastLoop(model, OPTIMIZERS["adam"](model.parameters()), forward, engine=engine)


def sparse_source() -> Any:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, 9, (ROWS * 70 + 5,), generator=generator)
    ids = torch.randint(0, 50, (int(lengths.sum()),), generator=generator)
    targets = torch.randint(0, 2, (len(lengths),), generator=generator).float()
    return resident(Ragged.of_lengths(ids, lengths), targets, batch_size=ROWS, device="cuda", seed=2)


JOBS: dict[str, tuple[Callable[[str], FastLoop], Callable[[], Any]]] = {
    "dense": (dense_loop, dense_source),
    "rows of unequal length": (sparse_loop, sparse_source),
}


@pytest.mark.parametrize("name", JOBS)
def test_several_steps_a_call_give_eagers_numbers_and_never_wait(name: str) -> None:
    make, source = JOBS[name]
    sources = [source() for _ in range(2)]
    losses: list[list[float]] = []
    for engine, given in zip(("eager", "graphed"), sources, strict=True):
        loop = make(engine)
        losses.append([loop.train(given).loss for _ in range(16)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    step = loop.step
    assert step.engine.value == "graphed", step.engine.reason
    assert step.span > MANY, "an epoch takes graphs of several steps"
    with host_waits_are_errors():
        for _ in step.run(iter(sources[1])):
            step.metrics.read_late()


@pytest.mark.parametrize("name", JOBS)
def test_auto_ends_on_graphs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "shortfall", lambda *_: None)
    monkeypatch.setattr(timing, "MARGIN", 1e9)  # whether the program is faster or not
    make, source = JOBS[name]
    loop = make("auto")
    given = source()
    loop.step.settle(given)
    assert loop.step.engine.value == "graphed", loop.step.engine.reason
    assert loop.step.compile_s is not None
    for _ in range(4):  # the first calls are timed, and the larger graph is captured in one of them
        loop.train(given)
    assert loop.step.span > MANY
    with host_waits_are_errors():
        for _ in loop.step.run(iter(given)):
            loop.step.metrics.read_late()
    loop.step.close()


def test_auto_leaves_step_counts_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MARGIN", 1e9)  # whether the program is faster or not
    net = mlp()
    optimizer = torch.optim.Adam(net.parameters(), foreach=True)
    step = TrainStep(net, optimizer, loss=F.cross_entropy)
    step.settle(batches(60))
    assert step.engine.value == "compiled"
    assert "make it with capturable=True" in step.engine.reason
    assert {state["step"].device.type for state in optimizer.state.values()} == {"cpu"}


def test_a_forward_that_reads_the_device_is_refused() -> None:
    net = mlp()

    def forward(model: nn.Module, batch: Batch) -> Tensor:
        loss = F.cross_entropy(model(batch[0]), batch[1])
        return loss * 2 if loss.item() > 100 else loss

    step = TrainStep(net, torch.optim.Adam(net.parameters()), forward, engine="graphed")
    [batch] = batches(1)
    step(batch)
    with pytest.raises(EngineError, match="cannot be traced"):
        step(batch)
    net.zero_grad()
    assert torch.isfinite(net(batch[0])).all(), "the device works on"


def test_after_a_capture_that_cuda_invalidates_training_goes_on_and_the_next_one_works() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    lane, stream = CudaLane(device), torch.cuda.current_stream()
    weight = torch.ones(64, 64, device=device)
    before = lane.capture(lambda: weight @ weight)
    for failures in (1, 2):
        with pytest.raises(RuntimeError, match="captur"):
            lane.capture(lambda: weight * weight.sum().item())
        assert lane.failures == failures
        assert torch.cuda.current_stream() == stream
        assert torch.rand(3, device=device).sum().item() > 0
    torch.testing.assert_close(before(), weight @ weight)
    dropped = lane.capture(lambda: F.dropout(weight))
    assert not torch.equal(dropped().clone(), dropped().clone())
    _, losses = trained("graphed", mlp(0.5), OPTIMIZERS["adam"], batches(20))
    _, wanted = trained("eager", mlp(0.5), OPTIMIZERS["adam"], batches(20))
    assert losses == pytest.approx(wanted, rel=1e-4)


def test_graphs_stay_right_where_the_workspaces_of_cublas_are_cleared() -> None:
    """As CUDA graphs of `torch.compile` clear them; a graph would write to whatever lies there next."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4096, 64), nn.ReLU(), nn.Linear(64, 3)).cuda()

    data = batches(20, 4096)
    _, wanted = trained("eager", build(), OPTIMIZERS["sgd"], data)
    step, losses = trained("graphed", build(), OPTIMIZERS["sgd"], data[:10])
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    others = [torch.full((1 << 20,), 7.0, device="cuda") for _ in range(64)]
    losses += torch.stack([step(batch) for batch in data[10:]]).tolist()
    assert losses == pytest.approx(wanted, rel=1e-3)
    assert all(bool((other == 7.0).all()) for other in others)


def test_a_convolution_is_proven_without_tf32_and_then_runs_with_it() -> None:
    torch.backends.cudnn.allow_tf32 = True  # torch's default; the fixture puts it back
    step, _ = trained("graphed", cnn(), OPTIMIZERS["adam"], batches(30, 1, 8, 8))
    assert step.engine.value == "graphed", step.engine.reason
    assert torch.backends.cudnn.allow_tf32
