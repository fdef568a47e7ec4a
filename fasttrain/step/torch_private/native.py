"""A loop in C that calls a compiled program many times: for the CPU, by AOTInductor's C functions.

A call from Python takes 1.5 us more than one from C, and holds Python's lock between two steps. The library is built
without torch's headers, so that the build takes 0.05 s; tests/step/test_native.py has the canaries.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import _ctypes
import ctypes
import hashlib
import subprocess
import tempfile
import weakref
import zipfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain.device import cpp_compiler
from fasttrain.errors import EngineError
from fasttrain.step.cache import ProgramCache, default_folder

__all__ = ["NativeLoop", "native_loop"]

SOURCE = """
#include <stddef.h>
#include <stdint.h>

typedef void *Handle;
typedef int32_t (*Run)(Handle, Handle *, size_t, Handle *, size_t, Handle, Handle);
typedef int32_t (*New)(Handle, Handle *);
typedef int32_t (*Delete)(Handle);

/* Runs a program's container on the same inputs, again and again. A run takes the handles that it is given, so each is
   given new ones. Returns 0, 1 where a handle cannot be made, 2 where a run fails. */
#ifdef __cplusplus
extern "C"
#endif
int32_t fasttrain_loop(Run run, New make, Delete drop, Handle container, Handle *inputs, Handle *given,
                       size_t num_inputs, Handle *outputs, size_t num_outputs, int64_t times) {
    int64_t time;
    size_t at;
    for (time = 0; time < times; time++) {
        for (at = 0; at < num_inputs; at++) {
            if (make(inputs[at], &given[at])) {
                while (at > 0) drop(given[--at]);
                return 1;
            }
        }
        if (run(container, given, num_inputs, outputs, num_outputs, (Handle)0, (Handle)0)) return 2;
        for (at = 0; at < num_outputs; at++) drop(outputs[at]);
    }
    return 0;
}
"""

OPTIONS = ("-O2", "-shared", "-fPIC")

BUILD_S = 60.0
"""What a compiler may take for it."""

_PROXY = b"aoti_torch_proxy_executor_call_function"
"""What a program calls for an operator that has no C function (`linalg_*`, `ctc_loss`, custom ones). Torch's own loader
gives it what that needs."""

_Handle = ctypes.c_void_p


def native_loop(package: Path) -> NativeLoop | None:
    """A loop over the program in an AOTInductor package for the CPU.

    Returns:
        None where there can be none, and torch's own loader is to be used: this machine has no C compiler or no private
        cache folder, the program calls operators that have no C function, or this release of torch does not have the C
        functions that are needed.
    """
    library = _library(default_folder())
    if library is None:
        return None
    try:
        return NativeLoop(library, package)
    except (OSError, AttributeError, ValueError, RuntimeError, zipfile.BadZipFile):
        return None


class NativeLoop:
    """A program's shared library, loaded for this loop alone, with one container.

    Other loops over the same package share nothing with it, not even the buffers that programs keep (see `scratch`).

    Args:
        library: what `SOURCE` is compiled to.
        package: path of the .pt2 file; not needed afterwards.

    Raises:
        AttributeError, OSError, RuntimeError, ValueError: the program cannot be called so.
    """

    def __init__(self, library: Any, package: Path) -> None:
        self._library = library
        program = _load(package)
        create, delete, self._run, num_inputs, num_outputs = [
            getattr(program, f"AOTInductorModelContainer{name}")
            for name in ("CreateWithDevice", "Delete", "RunSingleThreaded", "GetNumInputs", "GetNumOutputs")
        ]
        self._last_error: Any = getattr(program, "AOTInductorGetLastError", None)  # added between 2.11 and 2.13
        # Through the program, which is linked with torch: wherever torch's libraries lie, these are the right ones.
        self._make, self._drop = program.aoti_torch_new_tensor_handle, program.aoti_torch_delete_tensor_object
        self._container = _Handle()
        if create(ctypes.byref(self._container), ctypes.c_size_t(1), b"cpu", None):
            raise RuntimeError(f"the program cannot be set up{self._message()}")
        self._end = weakref.finalize(self, _unload, program, delete, self._container)
        self._end.atexit = False  # the process ends anyway
        self.num_inputs, self.num_outputs = [self._count(function) for function in (num_inputs, num_outputs)]
        self._given = (_Handle * max(1, self.num_inputs))()
        self._outputs = (_Handle * max(1, self.num_outputs))()

    def __call__(self, inputs: Sequence[Tensor], times: int) -> None:
        """Runs the program so many times on the same inputs; Python's other threads run meanwhile.

        Raises:
            RuntimeError: a run failed; it was the last one.
        """
        if len(inputs) != self.num_inputs:
            raise ValueError(f"the program takes {self.num_inputs} inputs, and there are {len(inputs)}")
        with _handles(inputs, self._drop) as handles:
            status = self._library.fasttrain_loop(
                self._run,
                self._make,
                self._drop,
                self._container,
                handles,
                self._given,
                ctypes.c_size_t(self.num_inputs),
                self._outputs,
                ctypes.c_size_t(self.num_outputs),
                ctypes.c_int64(times),
            )
        if status:
            raise RuntimeError(f"a run of the compiled program failed{self._message()}")

    def _count(self, function: Any) -> int:
        number = ctypes.c_size_t()
        if function(self._container, ctypes.byref(number)):
            raise RuntimeError("the program does not say how many inputs and outputs it has")
        return number.value

    def _message(self) -> str:
        """What the program said last; it has also printed that to stderr."""
        text = ctypes.c_char_p()
        if self._last_error is None or self._last_error(ctypes.byref(text)) or not text.value:
            return " (stderr has its message)"
        return f": {text.value.decode(errors='replace')}"


def _load(package: Path) -> Any:
    """The shared library of a package.

    Raises:
        ValueError: there is not one such, or it needs more than C functions.
    """
    with zipfile.ZipFile(package) as files:
        [name] = [name for name in files.namelist() if name.endswith(".so")]
        code = files.read(name)
    if _PROXY in code:
        raise ValueError("the program calls operators that have no C function")
    with tempfile.TemporaryDirectory(prefix="fasttrain-program-") as folder:  # mode 0700
        path = Path(folder) / "program.so"
        path.write_bytes(code)
        return ctypes.CDLL(str(path))  # which stays loaded once the file is gone


def _unload(program: Any, delete: Any, container: Any) -> None:
    delete(container)
    _ctypes.dlclose(program._handle)


@contextmanager
def _handles(tensors: Sequence[Tensor], drop: Any) -> Generator[Any]:
    """AOTInductor's handles of tensors, as an array; they are made for each call, since tensors may be swapped."""
    extension: Any = torch._C  # its stubs leave this part out
    made: list[int] = []
    try:
        for capsule in extension._aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors)):
            made.append(_pointer(capsule, None))
        yield (_Handle * max(1, len(made)))(*made)
    finally:
        for handle in made:
            drop(_Handle(handle))


def _pointer_of_capsule() -> Callable[[Any, bytes | None], int]:
    function = ctypes.pythonapi.PyCapsule_GetPointer
    function.restype, function.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return function


_pointer = _pointer_of_capsule()


@cache
def _library(folder: Path) -> Any:
    """The loop itself, from the cache folder or compiled into it; None where that cannot be."""
    compiler = cpp_compiler()
    if compiler is None:
        return None
    key = hashlib.sha256(repr((SOURCE, OPTIONS)).encode()).hexdigest()[:40]
    with suppress(EngineError, OSError, subprocess.SubprocessError):
        path = ProgramCache(folder).library(f"loop-{key}", lambda target: _compile(compiler, target))
        return ctypes.CDLL(str(path))
    return None


def _compile(compiler: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="fasttrain-loop-") as folder:
        source = Path(folder) / "loop.cpp"
        source.write_text(SOURCE, encoding="utf-8")
        command = [compiler, *OPTIONS, str(source), "-o", str(target)]
        subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=BUILD_S)
