"""Captures on a stand-in for `torch.cuda` that fails as torch fails, and the private APIs that a capture needs."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttrain import TrainStep
from fasttrain.step import cudagraph
from fasttrain.step import torch_private as private
from fasttrain.step.cudagraph import CudaLane
from fasttrain.step.torch_private import cuda as private_cuda
from fasttrain.step.verify import agree
from tests.step import jobs
from tests.step.cuda_stand_in import Recording, with_graphs

CUDA = torch.device("cuda:1")
Pool = tuple[int, int]


class FakeCuda:
    """What a capture asks of torch: streams, allocator and random generator, with the state that torch keeps.

    As in torch, the end of a capture that CUDA invalidated raises before anything is put back.

    Attributes:
        log: what was called, in order.
        stream_name: of the current stream.
        capturing: the pools that the allocator allocates a capture to.
        shares: of each pool, by the graphs that use it.
        generator: of random numbers.
        is_invalid: whether CUDA has invalidated the capture under way.
        begin_error: raised where a capture begins, None for none.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.stream_name = "current"
        self.capturing: set[Pool] = set()
        self.shares: Counter[Pool] = Counter()
        self.generator = FakeGenerator()
        self.is_invalid = False
        self.begin_error: Exception | None = None
        self._pools = 0
        names = ("Stream", "current_stream", "set_stream", "graph_pool_handle", "stream", "device", "graph")
        for name in (*names, "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "default_generators", [None, self.generator])
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch._C, "_cuda_beginAllocateCurrentThreadToPool", self.begin_pool, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_pool, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release_pool, raising=False)

    def begin_pool(self, device: int, pool: Pool) -> None:
        self.shares[pool] += 1
        if pool in self.capturing:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.capturing.add(pool)

    def end_pool(self, device: int, pool: Pool) -> None:
        if pool not in self.capturing:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.capturing.remove(pool)

    def release_pool(self, device: int, pool: Pool) -> None:
        self.shares[pool] -= 1
        assert self.shares[pool] >= 0

    def Stream(self, device: torch.device) -> Any:
        return SimpleNamespace(name="own", wait_stream=lambda other: self.log.append(f"own waits for {other.name}"))

    def current_stream(self, device: torch.device) -> Any:
        wait = lambda other: self.log.append(f"{name} waits for {other.name}")  # noqa: E731
        name = self.stream_name
        return SimpleNamespace(name=name, wait_stream=wait)

    def set_stream(self, stream: Any) -> None:
        self.stream_name = stream.name

    def graph_pool_handle(self) -> Pool:
        self._pools += 1
        return 0, self._pools

    @contextmanager
    def device(self, device: torch.device) -> Generator[None]:
        self.log.append(str(device))
        yield

    @contextmanager
    def stream(self, stream: Any) -> Generator[None]:
        before, self.stream_name = self.stream_name, stream.name
        yield
        self.stream_name = before

    def graph(self, graph: Any, *, pool: Pool, stream: Any, capture_error_mode: str) -> FakeCapture:
        self.log.append(f"capture in {stream.name} to {pool}, {capture_error_mode}")
        return FakeCapture(self, pool, stream)

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: self.log.append("replay"))


class FakeCapture:
    """`torch.cuda.graph`: no part of it is undone where another one raises."""

    def __init__(self, cuda: FakeCuda, pool: Pool, stream: Any) -> None:
        self.cuda, self.pool, self.stream = cuda, pool, stream

    def __enter__(self) -> None:
        self.before, self.cuda.stream_name = self.cuda.stream_name, self.stream.name
        self.cuda.generator.state.is_capturing = True
        self.cuda.begin_pool(1, self.pool)
        if self.cuda.begin_error is not None:
            raise self.cuda.begin_error

    def __exit__(self, *_: object) -> None:
        if self.cuda.is_invalid:
            self.cuda.is_invalid = False
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.cuda.end_pool(1, self.pool)
        self.cuda.generator.state.is_capturing = False
        self.cuda.stream_name = self.before


class FakeGenerator:
    """The default generator, which refuses to draw while it believes that a capture is under way."""

    def __init__(self) -> None:
        self.state = SimpleNamespace(is_capturing=False)

    def clone_state(self) -> FakeGenerator:
        return FakeGenerator()

    def graphsafe_set_state(self, other: FakeGenerator) -> None:
        self.state = other.state


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda(monkeypatch)
    monkeypatch.setattr(private_cuda, "_UNENDED", [])
    monkeypatch.setattr(cudagraph, "reserve_workspace", lambda _: fake.log.append(f"workspace in {fake.stream_name}"))
    return fake


def test_cuda_warms_up_and_captures_in_a_stream_of_its_own(cuda: FakeCuda) -> None:
    lane = CudaLane(CUDA)
    with lane.aside():
        cuda.log.append(f"warm up in {cuda.stream_name}")
    aside, cuda.log = cuda.log, []
    assert aside == ["own waits for current", "workspace in own", "warm up in own", "current waits for own"]
    replay = lane.capture(lambda: torch.tensor(3.0))
    assert cuda.log == ["cuda:1", "capture in own to (0, 1), thread_local"]
    assert replay() is replay()
    assert cuda.log[-2:] == ["replay", "replay"]


def assert_usable(cuda: FakeCuda, lane: CudaLane) -> None:
    """Training goes on, and the next capture works."""
    assert cuda.stream_name == "current"
    assert not cuda.capturing
    assert not cuda.generator.state.is_capturing
    shares = cuda.shares.total()
    lane.capture(lambda: torch.tensor(3.0))()
    assert cuda.log[-1] == "replay"
    assert cuda.stream_name == "current"
    assert cuda.shares.total() == shares + 1


def refused() -> Tensor:
    raise RuntimeError("operation not permitted when stream is capturing")


def test_after_a_refused_capture_random_numbers_and_memory_are_usable(cuda: FakeCuda) -> None:
    lane = CudaLane(CUDA)
    with pytest.raises(RuntimeError, match="not permitted"):
        lane.capture(refused)
    assert lane.failures == 1
    # The real graph, which ended its capture, gives up its share itself when it is deleted.
    assert cuda.shares[0, 1] == 1
    assert_usable(cuda, lane)


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (RuntimeError("operation not permitted when stream is capturing"), "not permitted"),
        (KeyboardInterrupt("by the user"), "by the user"),
        (None, "previous error during capture"),  # a stream that was not joined: only the end tells
    ],
)
def test_after_an_invalidated_capture_training_goes_on_and_the_next_one_works(
    error: BaseException | None, shown: str, cuda: FakeCuda
) -> None:
    lane = CudaLane(CUDA)
    before = lane.capture(lambda: torch.tensor(3.0))

    def invalidate() -> Tensor:
        cuda.is_invalid = True
        if error is not None:
            raise error
        return torch.tensor(3.0)

    for failures in (1, 2):
        with pytest.raises(RuntimeError if error is None else type(error), match=shown):
            lane.capture(invalidate)
        assert lane.failures == failures
        assert cuda.shares.total() == 1, "the failed capture keeps no share of the pool, the graph before it does"
        assert len(private_cuda._UNENDED) == failures, "pinned memory's allocator keeps a pointer to each graph"
    assert_usable(cuda, lane)
    before()


def test_a_capture_that_cannot_begin_leaves_the_stream_as_it_was(cuda: FakeCuda) -> None:
    lane = CudaLane(CUDA)
    cuda.begin_error = RuntimeError("CUDA error: operation not permitted when stream is capturing")
    with pytest.raises(RuntimeError, match="not permitted"):
        lane.capture(lambda: torch.tensor(3.0))
    cuda.begin_error = None
    assert_usable(cuda, lane)


def test_the_workspace_of_cublas_lies_in_memory_that_is_never_released(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools: list[set[Pool]] = []
    private_cuda._workspace_pool.cache_clear()
    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, lambda *_, out: pools.append(set(cuda.capturing)))
    private.reserve_workspace(torch.device("cpu"))
    private.reserve_workspace(torch.device("cpu"))
    [own] = pools[0]
    assert pools == [{own}] * 4, "another workspace of the same stream gets the same memory"
    thread = threading.Thread(target=private.reserve_workspace, args=(torch.device("cpu"),))
    thread.start()
    thread.join()
    assert pools[-1] not in ({own}, set()), "each thread has its own workspaces"
    assert not cuda.capturing
    assert all(cuda.shares[pool] > 0 for each in pools for pool in each), "never released"
    private_cuda._workspace_pool.cache_clear()


@contextmanager
def tf32(is_allowed: bool) -> Generator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = is_allowed
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("is_allowed", [True, False])
def test_tf32_is_off_in_cudnn_and_then_as_before(is_allowed: bool) -> None:
    with tf32(is_allowed):
        before = private.cudnn_precision()
        assert ("tf32" in before) == is_allowed
        with private.without_cudnn_tf32():
            assert "tf32" not in private.cudnn_precision()
            assert not torch.backends.cudnn.allow_tf32
        with pytest.raises(ZeroDivisionError), private.without_cudnn_tf32():
            _ = 1 / 0
        assert private.cudnn_precision() == before
        assert torch.backends.cudnn.allow_tf32 == is_allowed


def test_tf32_that_was_set_for_one_operator_is_off_and_then_as_before() -> None:
    """With torch's newer functions; the older one raises then, when it is asked."""
    backend: Any = torch.backends.cudnn
    backend.conv.fp32_precision = "ieee"
    try:
        before = private.cudnn_precision()
        assert before == ("ieee", "tf32")
        with private.without_cudnn_tf32():
            assert private.cudnn_precision() == ("ieee", "ieee")
        assert private.cudnn_precision() == before
    finally:
        backend.conv.fp32_precision = "tf32"
    assert backend.allow_tf32


@pytest.mark.parametrize(("device", "expected"), [("cuda", [False, False]), ("cpu", [True, True])])
def test_steps_are_compared_without_tf32(device: str, expected: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda _: None)
    seen: list[bool] = []

    def step(_: Tensor) -> Tensor:
        seen.append(torch.backends.cudnn.allow_tf32)
        return torch.tensor(1.0)

    part = SimpleNamespace(graph=torch.fx.symbolic_trace(nn.Identity()))
    traced: Any = SimpleNamespace(spec=SimpleNamespace(device=torch.device(device)), tensors=[], kinds=[], parts=[part])
    with tf32(True):
        assert agree(traced, torch.ones(1), step, step).difference is None
        assert torch.backends.cudnn.allow_tf32
    assert seen == expected


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Unflatten(1, (1, -1)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.LazyLinear(3))


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize(("build", "captures"), [(convolutional, 2), (jobs.model, 1)])
def test_a_graph_is_captured_anew_where_it_holds_convolutions_and_tf32_changes(
    build: Callable[[], nn.Module], captures: int, lane: Recording
) -> None:
    model, data = build(), jobs.batches(8)
    model(data[0][0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    step = with_graphs(TrainStep(model, optimizer, loss=nn.functional.cross_entropy, engine="eager"), lane)
    with tf32(True):
        jobs.run(step, data[:4])
        assert lane.captures == 1
    with tf32(False):
        jobs.run(step, data[4:])
    assert lane.captures == captures


def test_the_names_that_captures_need_are_there() -> None:
    """Without CUDA they are stand-ins of torch's, and setting them on the module is what `FakeCuda` does."""
    import torch.cuda.memory as memory

    for name in ("_cuda_beginAllocateCurrentThreadToPool", "_cuda_endAllocateToPool", "_cuda_releasePool"):
        assert hasattr(memory, name)
