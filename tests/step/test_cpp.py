"""What is kept for the C++ of further programs: used only whole and up to date, and the programs stay the same."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import codecache, cpu_vec_isa
from torch._inductor.exc import CppCompileError

from fasttrain.step.torch_private import cpp
from fasttrain.step.torch_private.cpp import Kept, cpp_kept_in, missing_names
from tests.step.programs import compiled


def test_torch_has_every_name() -> None:
    assert missing_names() == []
    assert "AOTInductorModelContainerRun" in cpp._interface()
    assert "size_t num_inputs" in cpp._constructor(cpp._HERE)
    assert "bool include_weights)" in cpp._constructor(cpp._ELSEWHERE)


def test_a_torch_without_one_of_the_names_compiles_as_it_does_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cpp.NEEDED, "torch._inductor.codecache", ("CppBuilder", "no_such_name"))
    assert missing_names() == ["torch._inductor.codecache.no_such_name"]
    theirs = codecache.CppBuilder
    with cpp_kept_in(tmp_path) as kept:
        assert codecache.CppBuilder is theirs
        kept.make_wanted()


def function(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y).tanh().sum(1)


def test_programs_with_and_without_what_is_kept_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[str] = []
    start = Kept.start

    def noted(kept: Kept, builder: Any, source: str | None = None) -> None:
        start(kept, builder, source)
        commands.append(" ".join(kept.running[-1][1]))

    monkeypatch.setattr(Kept, "start", noted)
    monkeypatch.setattr(codecache, "cache_dir", lambda: str(tmp_path / "inductor"))  # no source of another test
    x, y = torch.randn(40, 30), torch.randn(30, 20)
    results: list[Tensor] = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        with cpp_kept_in(tmp_path / "kept") as kept:
            results.append(compiled(function, [x, y], tmp_path / str(number)).run([x, y]))
            wanted = sorted(home.parent.name for home in kept.wanted)
            assert wanted == (["headers", "headers", "objects"] if number == 0 else [])
            made = len(commands)
            kept.make_wanted()
            assert len(commands) - made == len(wanted)
    wrapper, kernel = commands[-2:]
    assert "own.cpp" in wrapper
    assert wrapper.count(f"-include {tmp_path}/kept/headers/") == kernel.count("-include") == 1
    assert torch.equal(*results)
    torch.testing.assert_close(results[0], function(x, y))
    assert not list((tmp_path / "kept").glob("*/tmp*")), "nothing half made"

    [interface] = (tmp_path / "kept" / "objects").iterdir()
    (interface / "interface.o").write_bytes(b"cut")
    (tmp_path / "2").mkdir()
    with cpp_kept_in(tmp_path / "kept") as kept:
        compiled(function, [x, y], tmp_path / "2")
        assert list(kept.wanted) == [interface]
    assert "own.cpp" not in commands[-2]


def test_the_compiler_is_asked_once_for_what_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, asked = [False, True], list[str]()

    def check_build(isa: Any, code: str) -> bool:
        asked.append(code)
        return answers[len(asked) - 1]

    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", check_build)
    isa = cpu_vec_isa.VecAVX2()
    for wanted in (False, True, True):
        with cpp_kept_in(tmp_path):
            assert isa.check_build("code") is wanted
    assert len(asked) == 2, "a failure may have been one of memory: it is asked for again"


def test_the_first_instruction_set_that_works_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = cpu_vec_isa.valid_vec_isa_list()
    with cpp_kept_in(tmp_path):
        assert cpu_vec_isa.valid_vec_isa_list() == theirs[:1]
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    with cpp_kept_in(tmp_path):
        assert cpu_vec_isa.valid_vec_isa_list() == theirs


class Compiler:
    """In place of Inductor's builder: a shell that writes what a compiler would."""

    def __init__(self, folder: Path, script: str) -> None:
        self._folder = folder
        self._script = script

    def get_command_line(self) -> str:
        return f"sh -c '{self._script}'"

    def get_target_file_path(self) -> str:
        return str(self._folder / "made")


def want(kept: Kept, home: Path, header: Path, script: str = "") -> None:
    def make(partial: Path) -> Any:
        return Compiler(partial, f'echo "made: {header}" > "{partial}/files"; echo 1 > "{partial}/made"; {script}')

    kept.wanted[home] = make


def test_what_is_kept_is_used_until_a_file_changes_that_it_was_made_from(tmp_path: Path) -> None:
    header, home, kept = tmp_path / "header.h", tmp_path / "kept" / "key", Kept(tmp_path)
    header.write_text("1")
    want(kept, home, header)
    assert not cpp._is_up_to_date(home)
    kept.make_wanted()
    assert cpp._is_up_to_date(home)
    assert home.stat().st_mode & 0o777 == 0o700
    for spoil in (lambda: header.write_text("22"), (home / "made").unlink, header.unlink):
        spoil()
        assert not cpp._is_up_to_date(home)
        header.write_text("22")
        want(kept, home, header)
        kept.make_wanted()
        assert cpp._is_up_to_date(home)
    (home / "states.json").write_text("[]")
    assert not cpp._is_up_to_date(home)


@pytest.mark.parametrize(("script", "must_stop"), [("exit 1", False), ("exec sleep 1000", True)])
def test_what_cannot_be_made_or_must_wait_leaves_nothing(script: str, must_stop: bool, tmp_path: Path) -> None:
    kept, home = Kept(tmp_path), tmp_path / "kept" / "key"
    want(kept, home, Path(__file__), script)
    kept.make_wanted(lambda: must_stop)
    assert list((tmp_path / "kept").iterdir()) == []
    assert kept.running == []
    assert list(kept.wanted) == [home]


def test_a_compiler_that_fails_ends_the_other(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.start(Compiler(tmp_path, "echo no such type; exit 1"))
    kept.start(Compiler(tmp_path, "exec sleep 1000"))
    other: subprocess.Popen[bytes] = kept.running[1][0]
    with pytest.raises(CppCompileError, match="no such type"):
        kept.wait()
    kept.end()
    assert other.returncode is not None
    assert list(tmp_path.iterdir()) == []
