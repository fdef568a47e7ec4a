"""The loop in C over a compiled program: the C functions of AOTInductor that it calls, and where there is none."""

from __future__ import annotations

import gc
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fasttrain.step.cache import default_folder
from fasttrain.step.torch_private import flat_runner, native
from fasttrain.step.torch_private.native import NativeLoop, native_loop
from tests.step.programs import compiled


def count_up(total: Tensor, steps: Tensor, places: Tensor, table: Tensor) -> Tensor:
    """Adds what a table holds at this step's place, of three; counts."""
    total.copy_(total + table.index_select(0, places.index_select(0, steps.remainder(3))))
    steps.copy_(steps + 1)
    return total * 2.0


def inputs(places: list[int]) -> list[Tensor]:
    zero = torch.zeros(1, dtype=torch.int64)
    return [torch.zeros(1), zero, torch.tensor(places), torch.arange(10, dtype=torch.float32)]


def solve(matrix: Tensor, given: Tensor) -> Tensor:
    return torch.linalg.solve(matrix, given)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    compiled(count_up, inputs([1, 2, 3]), folder)
    return folder / "function.pt2"


@pytest.fixture(autouse=True)
def own_library(own_programs: Path) -> Iterator[None]:
    native._library.cache_clear()
    yield
    native._library.cache_clear()


def loop_over(package: Path) -> NativeLoop:
    loop = native_loop(package)
    assert loop is not None, "this release of torch is not called from C"
    return loop


def test_it_runs_the_program_as_torchs_own_loader_does(package: Path) -> None:
    loop, run = loop_over(package), flat_runner(str(package), torch.device("cpu"))
    assert (loop.num_inputs, loop.num_outputs) == (4, 1)
    found, wanted = inputs([1, 2, 3]), inputs([1, 2, 3])
    loop(found, 3)
    for _ in range(3):
        run([*wanted])
    assert found[0].tolist() == wanted[0].tolist() == [6.0]
    assert found[1].tolist() == [3]
    loop(found, 0)
    assert found[1].tolist() == [3]


def test_it_keeps_none_of_its_inputs(package: Path) -> None:
    loop = loop_over(package)
    given = inputs([1, 2, 3])
    uses = [tensor._use_count() for tensor in given]  # pyright: ignore
    loop(given, 3)
    given[2][1] = 99
    given[1].zero_()
    with pytest.raises(RuntimeError):
        loop(given, 3)
    assert [tensor._use_count() for tensor in given] == uses  # pyright: ignore


def test_an_error_ends_the_loop_and_says_what_the_program_says(
    package: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loop, given = loop_over(package), inputs([1, 99, 3])
    with pytest.raises(RuntimeError, match="index out of bounds"):
        loop(given, 3)
    assert (given[0].tolist(), given[1].tolist()) == ([1.0], [1])
    assert "index out of bounds" in capfd.readouterr().err
    given[2][1] = 2
    loop(given, 2)
    assert given[0].tolist() == [6.0], "it goes on"


def test_another_number_of_inputs_is_refused(package: Path) -> None:
    with pytest.raises(ValueError, match="takes 4 inputs, and there are 3"):
        loop_over(package)(inputs([1, 2, 3])[:3], 1)


def test_other_threads_run_meanwhile(package: Path) -> None:
    """And run the same package, by loops of their own."""
    times = 200_000
    given = [inputs([1, 1, 1]) for _ in range(2)]
    threads = [threading.Thread(target=loop_over(package), args=(each, times)) for each in given]
    for thread in threads:
        thread.start()
    turns = 0
    while any(thread.is_alive() for thread in threads):
        turns += 1
        threads[0].join(0.001)
    assert turns > 1
    assert [each[0].item() for each in given] == [float(times)] * 2


def test_it_is_unloaded_once_nobody_has_it(package: Path) -> None:
    loop = loop_over(package)
    end = loop._end
    loop(inputs([1, 2, 3]), 1)
    del loop
    gc.collect()
    assert not end.alive
    loop_over(package)(inputs([1, 2, 3]), 1)


def test_operators_without_a_c_function_are_left_to_torchs_loader(tmp_path: Path) -> None:
    matrix, given = torch.eye(3) * 2.0, torch.ones(3, 1)
    program = compiled(solve, [matrix, given], tmp_path)
    assert native_loop(tmp_path / "function.pt2") is None
    assert program.run([matrix, given]).tolist() == [[0.5]] * 3


def test_the_library_is_compiled_once_into_the_private_folder(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop_over(package)
    [library] = default_folder().glob("*.so")
    [record] = default_folder().glob("*.sha256")
    native._library.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(native, "_compile", lambda *_: pytest.fail("it is compiled"))
        loop_over(package)
    native._library.cache_clear()
    sound = library.read_bytes()
    library.write_bytes(sound[:-1] + b"x")  # somebody has changed it
    loop_over(package)
    assert library.read_bytes() == sound
    record.write_text("{")
    native._library.cache_clear()
    loop_over(package)
    assert record.read_text() != "{"


def no_compiler(monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
    monkeypatch.setattr(native, "cpp_compiler", lambda: None)


def failing_compiler(monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
    monkeypatch.setattr(native, "cpp_compiler", lambda: "false")


def slow_compiler(monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
    def run(command: list[str], **_: object) -> None:
        raise subprocess.TimeoutExpired(command, native.BUILD_S)

    monkeypatch.setattr(subprocess, "run", run)


def open_folder(_: pytest.MonkeyPatch, folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)


def other_release(monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
    """The C functions have other names."""
    load = native._load

    class Renamed:
        def __init__(self, program: object) -> None:
            self._program = program

        def __getattr__(self, name: str) -> object:
            return getattr(self._program, name.replace("RunSingleThreaded", "RunOnce"))

    monkeypatch.setattr(native, "_load", lambda package: Renamed(load(package)))


LACKS = [no_compiler, failing_compiler, slow_compiler, open_folder, other_release]


@pytest.mark.parametrize("lack", LACKS)
def test_where_there_can_be_none_there_is_none(
    lack: object, package: Path, own_programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(lack)
    lack(monkeypatch, own_programs)
    assert native_loop(package) is None


def test_a_damaged_package_has_none(tmp_path: Path) -> None:
    package = tmp_path / "program.pt2"
    package.write_bytes(b"no archive")
    assert native_loop(package) is None
    with zipfile.ZipFile(package, "w") as files:
        files.writestr("data/aotinductor/model/program.so", b"no library")
    assert native_loop(package) is None
