"""The compiling child: whatever becomes of it, the parent learns why, and nothing of it is left."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain.errors import EngineError
from fasttrain.step import build as build_module
from fasttrain.step import cache as cache_module
from fasttrain.step.build import REFUSED, Build, ChildEndedError, GraphJob, end_idle_child
from fasttrain.step.cache import empty_if_free

StandIn = Callable[[str], None]

pytestmark = pytest.mark.usefixtures("temporary")


def job(graph: torch.fx.GraphModule | None = None) -> GraphJob:
    if graph is None:
        graph = torch.fx.symbolic_trace(torch.nn.Identity())
    kind = (torch.Size([3, 2]), (1, 3), torch.float32, torch.device("cpu"))
    return GraphJob(graph=graph, inputs=[kind], open_dims=[frozenset()], num_threads=torch.get_num_threads())


def on_a_gpu() -> GraphJob:
    kind = (torch.Size([3, 2]), (1, 3), torch.float32, torch.device("cuda:0"))
    return dataclasses.replace(job(), inputs=[kind])


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Runs a shell script in place of Python as the child; its folder is "$3"."""

    def use(script: str) -> None:
        path = tmp_path / "child"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o700)
        monkeypatch.setattr(build_module.sys, "executable", str(path))

    return use


def child_of(build: Build) -> subprocess.Popen[bytes]:
    return build._child  # pyright: ignore[reportPrivateUsage]


def wait_for_end(pid: int) -> None:
    """Waits until a process that may be no child of this one has ended."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended, _, _ = select.select([process], [], [], 60)
    os.close(process)
    assert ended, f"process {pid} still runs"


def test_a_package_is_handed_over_and_removed_with_the_rest(stand_in: StandIn, temporary: Path) -> None:
    stand_in('cat "$3/job" > "$3/step.pt2"')
    build = Build(job())
    package = build.wait()
    assert pickle.loads(package.read_bytes()).inputs == job().inputs
    assert build.poll() == package
    assert package.parent.stat().st_mode & 0o777 == 0o700
    assert build.seconds > 0
    build.close()
    build.close()
    assert not any(temporary.iterdir())


def test_while_it_runs_there_is_no_package_and_close_ends_it(stand_in: StandIn, temporary: Path) -> None:
    stand_in('touch "$3/step.pt2"; exec sleep 1000')
    build = Build(job())
    assert build.poll() is None
    build.close()
    assert child_of(build).returncode == -signal.SIGKILL
    assert not any(temporary.iterdir())


@pytest.mark.parametrize(
    ("script", "reason", "is_refused"),
    [
        ("echo begun; echo no such operator >&2; exit 65", "failed with exit code 65: no such operator$", True),
        ("echo begun; echo no compiler here >&2; exit 3", "failed with exit code 3: no compiler here$", False),
        ("exit 1", "failed with exit code 1$", False),
        ("exit 0", "failed with exit code 0$", False),
        ("kill -9 $$", "was ended by SIGKILL$", False),
        ('printf "\\377\\n" >&2; exit 1', "failed with exit code 1: \ufffd$", False),
    ],
)
def test_a_child_that_fails_says_why(
    script: str, reason: str, is_refused: bool, stand_in: StandIn, temporary: Path
) -> None:
    """Only what torch refuses is told of the step: all else is of the surroundings, and may be tried again."""
    stand_in(script)
    build = Build(job())
    with pytest.raises(EngineError, match=reason) as caught:
        build.wait()
    assert isinstance(caught.value, ChildEndedError) != is_refused
    assert not any(temporary.iterdir())


def test_what_children_keep_stays_while_one_is_at_work(stand_in: StandIn, tmp_path: Path) -> None:
    kept = tmp_path / "inductor"
    stand_in("exec sleep 1000")
    build = Build(job(), kept)
    assert not empty_if_free(kept)
    assert (kept / "tmp").exists()
    build.close()
    assert empty_if_free(kept)
    assert not any(kept.iterdir())
    assert empty_if_free(tmp_path / "none")


def test_a_child_that_hangs_is_ended(stand_in: StandIn, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in("exec sleep 1000")
    build = Build(job())
    monkeypatch.setattr(build_module, "TIMEOUT_S", 0.0)
    with pytest.raises(EngineError, match="took longer than 0 s and was ended"):
        build.poll()
    assert child_of(build).returncode == -signal.SIGKILL
    assert not any(temporary.iterdir())


@pytest.mark.parametrize("is_killed", [False, True])
def test_what_the_child_has_started_ends_with_it(
    is_killed: bool, stand_in: StandIn, temporary: Path, tmp_path: Path
) -> None:
    ready = tmp_path / "ready"
    os.mkfifo(ready)
    stand_in(f'sleep 1000 & echo $! > "{ready}"; wait')
    build = Build(job())
    compiler = int(ready.read_text())
    if is_killed:
        os.kill(child_of(build).pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="ended by SIGKILL"):
            build.wait()
    else:
        build.close()
    wait_for_end(compiler)
    assert not any(temporary.iterdir())


def test_a_build_that_nobody_holds_ends_its_child(stand_in: StandIn, temporary: Path) -> None:
    stand_in("exec sleep 1000")
    build = Build(job())
    pid = child_of(build).pid
    del build
    gc.collect()
    wait_for_end(pid)
    assert not any(temporary.iterdir())


class Unpicklable(torch.nn.Module):
    def __reduce__(self) -> Any:
        raise TypeError("cannot be pickled")


def test_a_fork_that_drops_the_build_leaves_the_child_alone(
    stand_in: StandIn, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the workers of a loader do when they end: the child is the training's."""
    stand_in("exec sleep 1000")
    build = Build(job())
    child, [folder] = child_of(build), temporary.iterdir()
    with monkeypatch.context() as fork:
        fork.setattr(build_module.os, "getpid", lambda: -1)
        del build
        gc.collect()
    assert child.poll() is None
    assert folder.is_dir()
    build_module._end_child(child, folder, os.getpid())  # pyright: ignore[reportPrivateUsage]
    assert child.returncode == -signal.SIGKILL


def test_a_job_that_cannot_be_pickled_is_an_engine_error(temporary: Path) -> None:
    graph: Any = Unpicklable()
    with pytest.raises(EngineError, match="cannot be started: cannot be pickled"):
        Build(job(graph))
    assert not any(temporary.iterdir())


def test_a_child_that_cannot_be_started_is_an_engine_error(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module.sys, "executable", str(temporary / "missing"))
    with pytest.raises(EngineError, match=r"cannot be started: .*No such file"):
        Build(job())
    assert not any(temporary.iterdir())


def test_without_a_place_for_temporary_files_there_is_no_child(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "missing"))
    with pytest.raises(EngineError, match="cannot be started"):
        Build(job())


@pytest.mark.parametrize(("free", "has_room"), [(build_module.GPU_BYTES + 100, True), (build_module.GPU_BYTES, False)])
def test_a_child_needs_room_on_the_gpu(
    free: int, has_room: bool, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 80 << 30))
    monkeypatch.setattr(build_module, "cuda_environment", lambda _: {})
    stand_in("sleep 600")
    if has_room:
        Build(on_a_gpu()).close()
    else:
        with pytest.raises(ChildEndedError, match=r"needs 2.1 GB on cuda:0, and 2.1 GB are free"):
            Build(on_a_gpu())


def test_the_child_is_told_its_bounds(stand_in: StandIn, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    stand_in('env > "$3/step.pt2"')
    build = Build(job())
    told = build.wait().read_text().splitlines()
    build.close()
    assert "OMP_NUM_THREADS=3" in told
    assert "TORCHINDUCTOR_COMPILE_THREADS=1" in told
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TMPDIR"):
        [folder] = [line.partition("=")[2] for line in told if line.startswith(f"{name}=")]
        assert folder.startswith(f"{temporary}/"), "a folder of its own"


def test_what_is_kept_for_the_next_child_is_private(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in('touch "$TMPDIR/header"; env > "$3/step.pt2"')
    build = Build(job(), tmp_path / "kept")
    assert f"TMPDIR={tmp_path / 'kept' / 'tmp'}" in build.wait().read_text().splitlines()
    build.close()
    assert (tmp_path / "kept" / "tmp" / "header").exists()
    assert (tmp_path / "kept" / "tmp").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("has_headers", [True, False])
def test_a_child_for_a_gpu_is_told_where_the_toolkit_is(
    has_headers: bool, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def environment(folder: Path) -> dict[str, str]:
        if not has_headers:
            raise EngineError("no headers")
        return {"CUDA_HOME": str(folder)}

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (80 << 30, 80 << 30))
    monkeypatch.setattr(build_module, "cuda_environment", environment)
    stand_in('env > "$3/step.pt2"')
    if has_headers:
        build = Build(on_a_gpu())
        package = build.wait()
        told = package.read_text().splitlines()
        assert f"CUDA_HOME={package.parent}" in told
        assert "TORCHINDUCTOR_COMPILE_THREADS=4" in told
        build.close()
    else:
        with pytest.raises(EngineError, match="no headers"):
            Build(on_a_gpu())


CHILD = """
import json, os, resource, sys, threading
from pathlib import Path
import torch
from fasttrain.errors import EngineError
from fasttrain.step import build

FAILURES = {"refuse": NotImplementedError("no such operator"), "lack": MemoryError()}

def compile_graph(graph, inputs, open_dims, package, origins, anywhere):
    if sys.argv[2] in FAILURES:
        raise EngineError("this step cannot be compiled") from FAILURES[sys.argv[2]]
    if sys.argv[2] == "second" and package.parent != Path(sys.argv[1]):
        print("of the second job", file=sys.stderr)
        raise EngineError("this step cannot be compiled") from FAILURES["refuse"]
    if sys.argv[2] == "hang":
        print("ready", flush=True)
        threading.Event().wait()
    found = {
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "memory": resource.getrlimit(resource.RLIMIT_DATA)[0],
        "threads": torch.get_num_threads(),
        "inputs": [(list(size), stride, str(dtype)) for size, stride, dtype, _ in inputs],
        "open_dims": [sorted(dims) for dims in open_dims],
    }
    package.write_text(json.dumps(found))

build.compile_graph = compile_graph
build.PAUSE_S, build.IDLE_S = 0.0, 0.0 if sys.argv[2] == "short" else 100.0
sys.exit(build.main(Path(sys.argv[1]), may_stay=build.STAY in sys.argv))
"""


def real_child(folder: Path, *manner: str) -> subprocess.Popen[bytes]:
    """The child's own code, up to where it would compile."""
    (folder / "job").write_bytes(pickle.dumps(job()))
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), *manner],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        start_new_session=True,
    )


def test_the_child_compiles_within_its_bounds(tmp_path: Path) -> None:
    with real_child(tmp_path, "compile") as child:
        child.wait()  # before its input is closed, at which it would end
    assert child.returncode == 0
    found = json.loads((tmp_path / "step.pt2").read_text())
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert found == {
        "nice": 19,
        "memory": int(total * build_module.MEMORY_SHARE),
        "threads": torch.get_num_threads(),
        "inputs": [[[3, 2], [1, 3], "torch.float32"]],
        "open_dims": [[]],
    }
    assert not (tmp_path / "partial.pt2").exists()


@pytest.mark.parametrize(
    ("device", "total", "bound"),
    [("cpu", 4 << 30, 2 << 30), ("cuda:0", 4 << 30, 16 << 30), ("cuda:0", 128 << 30, 64 << 30)],
)
def test_a_child_for_a_gpu_may_take_more_than_a_small_machine_reports(
    device: str, total: int, bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda which, bounds: found.append(bounds))
    monkeypatch.setattr(build_module, "total_bytes", lambda _: total)
    build_module._bound_memory(torch.device(device))
    assert found == [(bound, bound)]


@pytest.mark.parametrize(("manner", "status"), [("refuse", REFUSED), ("lack", 1)])
def test_the_child_tells_a_step_that_cannot_be_compiled_from_a_lack_of_memory(
    manner: str, status: int, tmp_path: Path
) -> None:
    with real_child(tmp_path, manner) as child:
        child.wait()
    assert child.returncode == status
    assert not (tmp_path / "step.pt2").exists()


def test_the_child_ends_with_its_parent(tmp_path: Path) -> None:
    with real_child(tmp_path, "hang") as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        child.stdin.close()  # as it does when the parent ends, however that comes
        assert child.wait(timeout=60) == -signal.SIGKILL


LIGHT = """
import os, sys, time
from pathlib import Path

folder, manner = Path(sys.argv[1]), sys.argv[2]
while True:
    (folder / "step.pt2").touch()
    (folder / "done").touch()
    told = b""
    while not told.endswith(b"\\0"):
        read = os.read(0, 1)
        if not read:
            sys.exit()
        told += read
    folder = Path(os.fsdecode(told[:-1]))
    if manner != "stay":
        time.sleep(1000) if manner == "hang" else sys.exit()
"""
"""What a child that stays does, without torch."""


@pytest.fixture
def python_child(stand_in: StandIn, tmp_path: Path) -> Callable[[str, str], None]:
    """Has children run Python code, in one manner."""
    python = sys.executable

    def use(code: str, manner: str) -> None:
        (tmp_path / "child.py").write_text(code)
        stand_in(f'exec "{python}" "{tmp_path}/child.py" "$3" {manner} "$5"')

    return use


PythonChild = Callable[[str, str], None]


def test_a_child_that_has_done_a_job_takes_the_next(python_child: PythonChild, temporary: Path, tmp_path: Path) -> None:
    python_child(CHILD, "compile")
    pids: list[int] = []
    for _ in range(3):
        build = Build(job(), tmp_path / "kept")
        assert json.loads(build.wait().read_text())["nice"] == 19
        assert build.poll() is not None, "it does not ask the child again"
        pids.append(child_of(build).pid)
        build.close()
        assert not any(temporary.iterdir())
    assert len(set(pids)) == 1
    assert not empty_if_free(tmp_path / "kept")
    end_idle_child()
    assert not Path(f"/proc/{pids[0]}").exists()
    end_idle_child()


@pytest.mark.parametrize("change", ["kept", "environment", "fork", "killed"])
def test_a_child_is_not_asked_for_what_it_cannot_do(
    change: str, python_child: PythonChild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python_child(LIGHT, "stay")
    first = Build(job(), tmp_path / "kept")
    first.wait()
    child = child_of(first)
    if change == "environment":
        monkeypatch.setenv("TORCHINDUCTOR_CPP_SIMDLEN", "256")
    elif change == "killed":
        child.kill()
        wait_for_end(child.pid)
    with monkeypatch.context() as forked:
        if change == "fork":  # such as a loader's worker: the child is the training's
            forked.setattr(build_module, "_idle", [(0, build_module._idle.pop()[1])])  # pyright: ignore[reportPrivateUsage]
        second = Build(job(), tmp_path / ("other" if change == "kept" else "kept"))
    second.wait()
    assert child_of(second).pid != child.pid
    if change == "fork":
        assert child.poll() is None
        build_module._end_child(child, None, os.getpid())  # pyright: ignore[reportPrivateUsage]
    assert child.poll() is not None


def test_a_job_of_a_child_that_stayed_fails_as_any_other(
    python_child: PythonChild, temporary: Path, tmp_path: Path
) -> None:
    python_child(CHILD, "second")
    Build(job(), tmp_path / "kept").wait()
    build = Build(job(), tmp_path / "kept")
    with pytest.raises(EngineError, match="failed with exit code 65: this step cannot be compiled") as caught:
        build.wait()
    assert not isinstance(caught.value, ChildEndedError)
    assert not any(temporary.iterdir())


def test_a_job_that_is_given_up_ends_the_child_that_stayed(
    python_child: PythonChild, temporary: Path, tmp_path: Path
) -> None:
    python_child(LIGHT, "hang")
    Build(job(), tmp_path / "kept").wait()
    build = Build(job(), tmp_path / "kept")
    build.close()
    assert child_of(build).returncode == -signal.SIGKILL
    assert not any(temporary.iterdir())


def test_a_child_that_ends_as_a_job_is_given_to_it_is_replaced(python_child: PythonChild, tmp_path: Path) -> None:
    python_child(LIGHT, "leave")
    first = Build(job(), tmp_path / "kept")
    first.wait()
    build = Build(job(), tmp_path / "kept")
    assert child_of(build) is child_of(first)
    assert build.wait().is_file()
    assert child_of(build) is not child_of(first)


def test_a_child_does_not_wait_for_long(python_child: PythonChild, tmp_path: Path) -> None:
    python_child(CHILD, "short")
    build = Build(job(), tmp_path / "kept")
    build.wait()
    wait_for_end(child_of(build).pid)
    assert Build(job(), tmp_path / "kept").wait().is_file()


def test_a_child_that_waits_ends_with_its_parent(tmp_path: Path) -> None:
    with real_child(tmp_path, "compile", build_module.STAY) as child:
        assert child.stdin is not None
        while not (tmp_path / build_module.DONE).exists():
            assert child.poll() is None
            time.sleep(0.01)
        child.stdin.close()
        assert child.wait(timeout=60) == -signal.SIGKILL


def test_no_child_stays_where_too_much_is_kept(
    python_child: PythonChild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would hold the folder, so that nothing is removed."""
    python_child(LIGHT, "stay")
    monkeypatch.setattr(cache_module, "SCRATCH_BYTES", 0)
    build = Build(job(), tmp_path / "kept")
    build.wait()
    assert child_of(build).poll() is not None
    assert empty_if_free(tmp_path / "kept")


def test_what_is_kept_with_a_job_has_its_own_child(python_child: PythonChild, temporary: Path) -> None:
    python_child(LIGHT, "stay")
    build = Build(job())
    build.wait()
    assert child_of(build).poll() is not None
