"""A compiling child that tells what each part took; `compiling` runs it. It imports what the child itself imports."""

from __future__ import annotations

import builtins
import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

IMPORTS, EXPORT, LOWERING = "imports", "export", "lowering and code"
PROBES, HEADERS, WRAPPER, KERNELS = "probes", "headers", "wrapper C++", "kernels C++"
INTERFACE, LINKING, REST = "interface C++", "linking", "rest"
PARTS = (IMPORTS, EXPORT, LOWERING, PROBES, HEADERS, WRAPPER, KERNELS, INTERFACE, LINKING, REST)
"""In the order of a compilation; the rest is small commands."""


class Meter:
    """CPU seconds of this process and of what it starts, by part."""

    def __init__(self) -> None:
        self._own, self._started = Counter[str](), Counter[str]()
        self._commands: dict[int, str] = {}
        self._parts: list[str] = []
        self._told_at = 0.0

    def start(self) -> None:
        """Looks after imports and commands from now on."""
        builtins.__import__ = self.timed(IMPORTS, builtins.__import__)
        begin, wait_for = subprocess.Popen.__init__, os.wait4

        def note(popen: Any, command: Any, *arguments: Any, **options: Any) -> None:
            begin(popen, command, *arguments, **options)
            self._commands[popen.pid] = command if isinstance(command, str) else " ".join(map(str, command))

        def waitpid(pid: int, options: int) -> tuple[int, int]:
            ended, status, usage = wait_for(pid, options)
            if ended in self._commands:
                self._started[part_of(self._commands.pop(ended))] += usage.ru_utime + usage.ru_stime
            return ended, status

        popen: Any = subprocess.Popen
        popen.__init__ = note
        os.waitpid = waitpid

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose CPU seconds in this process are counted, but for what is counted of other parts."""

        def called(*arguments: Any, **options: Any) -> Any:
            if self._parts and self._parts[-1] == part:
                return function(*arguments, **options)
            begin, others = own_cpu_s(), sum(self._own.values())
            self._parts.append(part)
            try:
                return function(*arguments, **options)
            finally:
                self._parts.pop()
                self._own[part] += own_cpu_s() - begin - (sum(self._own.values()) - others)

        return called

    def tell(self, begin: float) -> None:
        """Prints what was spent since it was told last, as a line of JSON; the time began at `begin`."""
        spent, now = self._started + self._own, own_cpu_s()
        parts = {part: spent[part] for part in PARTS}
        parts[LOWERING] = now - self._told_at - sum(self._own.values())
        print(json.dumps({"parts": parts, "wall_s": time.perf_counter() - begin}), flush=True)
        self._started, self._own, self._told_at = Counter(), Counter(), now


def part_of(command: str) -> str:
    """Which part of a compilation a command is of."""
    if "-x c++-header" in command or " -E -P " in command:
        return HEADERS
    sources = {".wrapper.cpp": WRAPPER, "own.cpp": WRAPPER, ".kernel.cpp": KERNELS, "interface.cpp": INTERFACE}
    for ending, part in sources.items():
        if f"{ending} " in command:
            return part
    if ".wrapper.o " in command:
        return LINKING
    return PROBES if " -shared " in command or "LoadLibrary" in command else REST


def own_cpu_s() -> float:
    """Of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main(kept: Path, folders: list[Path]) -> int:
    """Does jobs as the compiling child does; prints what each took, and what followed it."""
    meter = Meter()
    meter.start()
    os.nice = lambda _: 19  # a machine with other work would let it wait for minutes; its CPU seconds are the same
    from fasttrain.step import build

    torch: Any = sys.modules["torch"]
    torch.export.export = meter.timed(EXPORT, torch.export.export)
    keeping = build.cpp_kept_in
    used: list[Any] = []

    @contextmanager
    def kept_in(folder: Path) -> Generator[Any]:
        with keeping(folder) as found:
            used.append(found)
            yield found

    build.cpp_kept_in = kept_in
    for folder in folders:
        begin = time.perf_counter()
        if build.main(folder, kept):
            return 1
        meter.tell(begin)
        begin = time.perf_counter()
        used[-1].make_wanted()
        meter.tell(begin)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), [Path(each) for each in sys.argv[2:]]))
