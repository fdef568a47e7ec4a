"""How the C++ of programs is compiled: what is the same for every program is compiled once and kept in a folder.

For each program anew, Inductor asks the C++ compiler which instructions it can use, expands all headers to see whether
those that it has precompiled are up to date, and compiles AOTInductor's C interface, which is the same in all of them.
Here the answers, the precompiled headers and the object file of the interface are kept. Headers and interface are made
after a program, not before: the first one is there sooner without them. The two files that are a program's own are
compiled side by side. tests/step/test_cpp.py has the canaries; where torch lacks one of the private names, it compiles
as it does itself.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext, suppress
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fasttrain.device import cpu_features

__all__ = ["Kept", "cpp_kept_in", "inputs_unchecked", "missing_names"]

NEEDED = {
    "torch._inductor.codecache": ("AotCodeCompiler", "CppBuilder", "_precompile_header"),
    "torch._inductor.cpp_builder": ("CppTorchDeviceOptions", "get_compiler_version_info", "get_cpp_compiler", "is_gcc"),
    "torch._inductor.cpu_vec_isa": ("VecISA", "supported_vec_isa_list", "valid_vec_isa_list", "x86_isa_checker"),
    "torch._inductor.utils": ("IndentedBuffer",),
}
"""The private names, by module."""

_INTERFACE = Path("codegen", "aoti_runtime", "interface.cpp")
"""Where in the package of Inductor the source of AOTInductor's C interface is."""

_DECLARED = """#include <torch/csrc/inductor/aoti_runtime/interface.h>
#include <torch/csrc/inductor/aoti_runtime/model_container.h>
"""
"""What a program's own code needs of the interface."""

_INTERFACE_HEAD = "#include <torch/csrc/inductor/aoti_include/cpu.h>\n"
"""What comes before the interface in a program's source."""

_BASE = Path("include", "torch", "csrc", "inductor", "aoti_runtime", "model_base.h")
"""Where in torch the base class of a program's class is."""

_CONSTRUCTOR = re.compile(r"\n  AOTInductorModelBase\(([^()]*)\)\s*:\s*inputs_info_\(")
"""The parameters of its constructor, which takes 2.2 s to compile: it looks at a device's name by a std::regex."""

_ELSEWHERE = """namespace torch::aot_inductor {{
template <> AOTInductorModelBase<AOTInductorModel>::AOTInductorModelBase({parameters});
}}
"""
"""In a program's source: its constructor is in the object file of the interface."""

_HERE = """namespace torch::aot_inductor {{
template AOTInductorModelBase<AOTInductorModel>::AOTInductorModelBase({parameters});
}}
"""
"""In that of the interface: the constructor is compiled here."""


@contextmanager
def cpp_kept_in(folder: Path) -> Generator[Kept]:
    """Has the C++ of the programs that are compiled meanwhile use what is kept in a folder, and add to it.

    Args:
        folder: a private one: what is there goes into programs.

    Yields:
        What can make what these programs could have used.
    """
    kept = Kept(folder)
    if missing_names():
        yield kept
        return
    from torch._inductor import codecache, cpu_vec_isa

    with (
        mock.patch.object(cpu_vec_isa.VecISA, "check_build", _check_build(kept)),
        mock.patch.object(cpu_vec_isa, "valid_vec_isa_list", _best_isa(cpu_vec_isa.valid_vec_isa_list)),
        mock.patch.object(codecache, "_precompile_header", _precompiled(kept)),
        mock.patch.object(codecache, "CppBuilder", _builder_class(kept)),
        mock.patch.object(codecache.AotCodeCompiler, "compile", _compile(kept)),
    ):
        yield kept


@contextmanager
def inputs_unchecked() -> Generator[None]:
    """Has the programs that are compiled meanwhile lack the checks of inputs that an environment variable asks for.

    They take a fifth of the time that a program's own code takes to compile. What a step's inputs are like is checked
    before they are handed over.
    """
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
    from torch._inductor.virtualized import V

    name = "generate_input_output_runtime_checks"
    write = getattr(CppWrapperCpu, name, None)

    def write_none(wrapper: Any) -> None:
        assert write is not None
        with mock.patch.object(V.graph, "graph_inputs", {}), mock.patch.object(V.graph, "graph_outputs", []):
            write(wrapper)

    with nullcontext() if write is None else mock.patch.object(CppWrapperCpu, name, write_none):
        yield


def missing_names() -> list[str]:
    """The private names that this torch lacks."""
    from importlib import import_module

    found = [(module, name) for module, names in NEEDED.items() for name in names]
    return [f"{module}.{name}" for module, name in found if not hasattr(import_module(module), name)]


class Kept:
    """What is kept in a folder, by keys that tell all that it depends on.

    Args:
        folder: where.

    Attributes:
        folder: see above.
        wanted: what programs could have used and is not there: how to make each, by where to.
        running: compilers that have been started, with their command and the folder that they run in.
        interface: what the program that is compiled now is to be linked with, as it is not in its source.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wanted: dict[Path, Callable[[Path], Any]] = {}
        self.running: list[tuple[subprocess.Popen[bytes], list[str], str]] = []
        self.interface: Path | None = None

    def make_wanted(self, must_stop: Callable[[], bool] = lambda: False) -> None:
        """Makes what is wanted: two precompiled headers and an object file, 5 s each; a program then takes 5 s less.

        Args:
            must_stop: asked ten times a second; what is not whole then is given up.
        """
        from torch._inductor.exc import CppCompileError

        for home, builder in list(self.wanted.items()):
            with suppress(OSError, CppCompileError, _GivenUpError):  # a program is compiled without it, too
                if not _is_up_to_date(home):
                    with _making(home) as partial:
                        self.start(builder(partial))
                        self._wait_unless(must_stop)
                self.wanted.pop(home)
            self.end()
            if must_stop():
                return

    def place(self, kind: str, *parts: str) -> Path:
        """Where to keep what depends on these, on torch, the C++ compiler and the processor."""
        from torch._inductor.cpp_builder import get_compiler_version_info, get_cpp_compiler

        compiler = get_cpp_compiler()
        versions = (str(torch.__version__), torch.__file__, compiler, get_compiler_version_info(compiler))
        told = repr((*versions, cpu_features(), *parts))
        return self.folder / kind / hashlib.sha256(told.encode()).hexdigest()[:40]

    def start(self, builder: Any, source: str | None = None) -> None:
        """Starts the compiler, where a source is given on that in place of the builder's file."""
        folder = tempfile.mkdtemp(dir=os.path.dirname(builder.get_target_file_path()))
        if source is not None:
            own = Path(folder, "own.cpp")
            own.write_text(source, encoding="utf-8")
            builder._sources_args = shlex.quote(str(own))
        command = shlex.split(builder.get_command_line())
        child = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.running.append((child, command, folder))

    def wait(self) -> None:
        """Waits for all compilers that were started.

        Raises:
            CppCompileError: one failed.
        """
        from torch._inductor.exc import CppCompileError

        while self.running:
            child, command, folder = self.running[0]
            said, _ = child.communicate()
            self.running.pop(0)
            shutil.rmtree(folder, ignore_errors=True)
            if child.returncode:
                raise CppCompileError(command, said.decode(errors="replace"))

    def end(self) -> None:
        """Ends what still runs."""
        self.interface = None
        while self.running:
            child, _, folder = self.running.pop()
            child.kill()
            child.communicate()
            shutil.rmtree(folder, ignore_errors=True)

    def _wait_unless(self, must_stop: Callable[[], bool]) -> None:
        child = self.running[-1][0]
        while not must_stop():
            try:
                child.communicate(timeout=0.1)
            except subprocess.TimeoutExpired:
                continue
            return self.wait()
        raise _GivenUpError


class _GivenUpError(Exception):
    """Something else has to be done first."""


def _check_build(kept: Kept) -> Any:
    """Whether the compiler can make code for some instructions, which is known once it could.

    A failure is asked for again: it may have been one of memory or disk.
    """
    from torch._inductor.cpu_vec_isa import VecISA

    ask = VecISA.check_build

    def check_build(isa: Any, code: str) -> bool:
        known = kept.place("probes", code, isa.build_arch_flags())
        if known.exists():
            return True
        if not ask(isa, code):
            return False
        with suppress(OSError):
            known.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            known.touch()
        return True

    return check_build


def _best_isa(torchs: Any) -> Any:
    """The instruction sets that can be used; where nobody chooses among them, the first alone: it is taken."""
    from torch._inductor import config, cpu_vec_isa

    @cache
    def valid_vec_isa_list() -> list[Any]:
        have = cpu_vec_isa.x86_isa_checker()
        if not have or config.cpp.simdlen is not None or "ATEN_CPU_CAPABILITY" in os.environ:
            return torchs()
        known = (isa for isa in cpu_vec_isa.supported_vec_isa_list if all(each in have for each in str(isa).split()))
        best = next((isa for isa in known if isa), None)
        return [] if best is None else [best]

    return valid_vec_isa_list


def _precompiled(kept: Kept) -> Any:
    """A precompiled header, if it is there and no file that went into it has changed; else none, and it is wanted.

    torch makes it at once, and has the compiler expand all headers for each program, to see whether one has changed.
    """
    from torch._inductor import codecache
    from torch._inductor.cpp_builder import CppBuilder, CppTorchDeviceOptions, is_gcc

    torchs = codecache._precompile_header

    def precompiled(header: str, hashable_cmd_line: str, **command: Any) -> str:
        if not is_gcc():  # others note in a header where it was made
            return torchs(header, hashable_cmd_line, **command)
        command.pop("extra_flags", None)

        def builder(name: str, *flags: str) -> Any:
            options = CppTorchDeviceOptions(**command, precompiling=True, extra_flags=flags)
            return CppBuilder(name=name, sources=name, BuildOption=options)

        def make(partial: Path) -> Any:
            (partial / "header.h").write_text(f"#include <{header}>\n", encoding="utf-8")
            return builder(str(partial / "header.h"), *_listed_in(partial))

        home = kept.place("headers", header, builder("header.h").get_command_line())
        if _is_up_to_date(home):
            return str(home / "header.h")
        kept.wanted[home] = make
        return ""

    return precompiled


def _compile(kept: Kept) -> Any:
    """AOTInductor's own, which leaves no compiler running."""
    from torch._inductor.codecache import AotCodeCompiler

    torchs = AotCodeCompiler.compile

    def compile_program(*arguments: Any, **options: Any) -> Any:
        try:
            return torchs(*arguments, **options)
        finally:
            kept.end()

    return compile_program


@cache
def _interface() -> str:
    """The source of the interface, as it is in a program's."""
    import torch._inductor
    from torch._inductor.utils import IndentedBuffer

    try:
        source = (Path(torch._inductor.__file__).parent / _INTERFACE).read_text(encoding="utf-8")
    except OSError:
        return ""
    written = IndentedBuffer()
    written.splice(source)
    return written.getvalue()


@cache
def _constructor(source: str) -> str:
    """A declaration of the constructor, empty where torch's is another one than is known."""
    try:
        found = _CONSTRUCTOR.search((Path(torch.__file__).parent / _BASE).read_text(encoding="utf-8"))
    except OSError:
        return ""
    return source.format(parameters=re.sub(r"\s*=[^,]*", "", found[1]).strip()) if found else ""


def _builder_class(kept: Kept) -> Any:
    """Inductor's, whose compilers for a program's own files run side by side, until the program is linked."""
    from torch._inductor.cpp_builder import CppBuilder

    class Builder(CppBuilder):
        def build(self) -> None:
            if self._compile_only and self._sources_args.endswith(".wrapper.cpp"):
                written = Path(self._sources_args).read_text(encoding="utf-8")
                kept.interface = _interface_object(kept, written, self._build_option)
                kept.start(self, None if kept.interface is None else _without_interface(written))
                return
            if self._compile_only and self._sources_args.endswith(".kernel.cpp"):
                kept.start(self)
                return
            if self._do_link:
                kept.wait()
                self._sources_args += "" if kept.interface is None else f" {shlex.quote(str(kept.interface))}"
            super().build()

    return Builder


def _without_interface(source: str) -> str:
    """Returns C++ source of a program in which AOTInductor's interface is declared, not defined."""
    return source.replace(_interface(), _DECLARED + _constructor(_ELSEWHERE))


def _interface_object(kept: Kept, source: str, options: Any) -> Path | None:
    """The object file of the interface; None, and it is wanted, where it is not there.

    Args:
        kept: where it is.
        source: of a program; where the interface is not in it, there is no object file for it.
        options: with which it is compiled.
    """
    from torch._inductor.cpp_builder import CppBuilder

    interface = _interface()
    if not interface or source.count(interface) != 1:
        return None

    def builder(folder: str, *flags: str) -> Any:
        own = copy(options)
        own.precompiled_header = None
        own._passthrough_args = [*options.get_passthrough_args(), *flags]
        return CppBuilder(
            name="interface", sources=os.path.join(folder, "interface.cpp"), output_dir=folder, BuildOption=own
        )

    def make(partial: Path) -> Any:
        (partial / "interface.cpp").write_text(compiled_here, encoding="utf-8")
        return builder(str(partial), *_listed_in(partial))

    compiled_here = _INTERFACE_HEAD + interface + _constructor(_HERE)
    home = kept.place("objects", compiled_here, builder("").get_command_line())
    if not _is_up_to_date(home):
        kept.wanted[home] = make
        return None
    return home / "interface.o"


def _listed_in(folder: Path) -> list[str]:
    """Flags that have the compiler write which files it has read."""
    return ["-MD", "-MF", shlex.quote(str(folder / "files"))]


@contextmanager
def _making(home: Path) -> Generator[Path]:
    """A folder to make something in from what the compiler lists; it is put in place when it is whole."""
    home.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=home.parent))
    try:
        yield partial
        read = (partial / "files").read_text(encoding="utf-8").replace("\\\n", " ").partition(":")[2]
        files = [each for each in shlex.split(read) if not each.startswith(str(partial))]
        made = {path.name: path.stat().st_size for path in partial.iterdir()}
        states = json.dumps({"made": made, "read": {each: _state_of(each) for each in files}})
        (partial / _STATES).write_text(states, encoding="utf-8")
        if not _is_up_to_date(home):  # else another process has made the same meanwhile, and may be using it
            shutil.rmtree(home, ignore_errors=True)
            partial.rename(home)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


_STATES = "states.json"


def _is_up_to_date(home: Path) -> bool:
    """Whether something is there, whole, and no file that the compiler read for it has changed since."""
    try:
        states = json.loads((home / _STATES).read_text(encoding="utf-8"))
        is_whole = all((home / name).stat().st_size == size for name, size in states["made"].items())
        return is_whole and all(_state_of(each) == state for each, state in states["read"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _state_of(path: str) -> list[int]:
    found = os.stat(path)
    return [found.st_mtime_ns, found.st_size]
