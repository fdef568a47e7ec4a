"""Fixtures for every test: real data where there is some, and a guard against what a test leaves behind."""

import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

REPOSITORY = Path(__file__).parent.parent

# A shell ignores SIGINT in what it starts in the background, and nohup ignores SIGHUP. The tests send these signals to
# themselves and to their children, which inherit what is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
for _number in (signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, signal.SIG_DFL)

# The models of the tests are tiny: more threads only wait for each other, and figures vary less with one.
torch.set_num_threads(1)

# How long an example takes depends on what else the machine does.
settings.register_profile("fasttrain", deadline=None)
settings.load_profile("fasttrain")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data; the test is skipped where it is missing."""
    folder = Path(os.environ.get("FASTTRAIN_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist; set FASTTRAIN_DATA")
    return folder


@pytest.fixture(autouse=True)
def own_cache(
    leaves_nothing_behind: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keeps the user's cache out of the tests, and the tests out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def threads_restored(leaves_nothing_behind: None) -> Iterator[None]:
    """A command owns its process and sets the number of threads there; a test that calls one does not."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def global_torch_state() -> dict[str, object]:
    return {
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "grad mode": torch.is_grad_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
    }


def environment_now() -> dict[str, str]:
    """The environment, but for what pytest and torch's compiler set for themselves."""
    theirs = ("PYTEST_CURRENT_TEST", "_TORCHINDUCTOR", "TORCHINDUCTOR")
    return {name: value for name, value in os.environ.items() if not name.startswith(theirs)}


def children() -> set[str]:
    tasks = Path(f"/proc/{os.getpid()}/task")
    if not tasks.is_dir():
        return set()
    found: set[str] = set()
    for task in tasks.iterdir():
        try:
            found |= set((task / "children").read_text().split())
        except OSError:  # the task ended meanwhile
            continue
    return found


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Fails a test that leaks threads, processes, environment variables or global torch settings.

    `own_cache` asks for it, so that it looks after every monkeypatch is undone.
    """
    threads, processes, environment = set(threading.enumerate()), children(), environment_now()
    settings = global_torch_state()
    yield
    if "fasttrain.step.build" in sys.modules:  # the child that waits for the next program is there on purpose
        sys.modules["fasttrain.step.build"].end_idle_child()
    if left_running(threads):
        gc.collect()  # what only a reference cycle keeps is not left behind; not always, for it takes 0.3 s
    assert not left_running(threads)
    assert global_torch_state() == settings
    assert environment_now() == environment
    assert children() <= processes | compile_workers(), "processes left running"


def left_running(before: set[threading.Thread]) -> list[threading.Thread]:
    return [thread for thread in set(threading.enumerate()) - before if not thread.name.startswith(KEPT_BY_LIBRARIES)]


KEPT_BY_LIBRARIES = ("ThreadPoolExecutor", "SubprocPool", "InductorSubproc", "tqdm_monitor")
"""Pools that torch's compiler keeps for the process."""


def compile_workers() -> set[str]:
    """Processes that torch's compiler keeps for the life of this one."""
    found = set()
    for pid in children():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"compile_worker" in command or b"resource_tracker" in command or not command:
            found.add(pid)
    return found
