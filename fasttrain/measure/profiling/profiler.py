"""`fasttrain.profile`: where the time of a user's own loop goes."""

from __future__ import annotations

import shlex
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fasttrain.errors import ConfigError
from fasttrain.measure.profiling.assemble import Timed, Watched, assemble
from fasttrain.measure.profiling.file import make_folder, profile_path, write_profile
from fasttrain.measure.profiling.passes import (
    AllocationPass,
    CleanPass,
    CountPass,
    Pass,
    PhasePass,
    SuspectPass,
    TracePass,
    WarmUpPass,
    device_type,
)
from fasttrain.measure.profiling.phases import Phases
from fasttrain.measure.profiling.record import Profile
from fasttrain.measure.profiling.steady import SteadyPass
from fasttrain.measure.profiling.suspects import Loaders

__all__ = ["Profiler", "Schedule", "Session", "Span", "profile"]

MIN_STEPS = 6
"""The passes that look for what changes from step to step need some."""


def profile(name: str, *, steps: int = 10, out: str | Path = "profiles", workload: str = "loop") -> Profiler:
    """Profiles a loop of the user's own; leaves <out>/<workload>-<device>/<name>.json and a trace beside it.

    ```
    with fasttrain.profile("before") as prof:
        for batch in loader:
            train_on(batch)
            prof.step()
    print(prof.result.findings)
    ```

    The block needs 7 x `steps` calls of `prof.step()`: 70 batches by default, 42 with `steps=6`; where the loader has
    fewer, loop over several epochs in it. Make the model before: the folder's name says whether it is on a GPU. The
    first steps warm up; then come passes that time, then those that trace, count and look for faults, and slow the loop
    down. Steps after the last pass (`prof.is_done`) run as ever. A step that fasttrain has compiled is compiled once
    more before it is traced, so that its kernels are seen: the loop waits for that (20 s or more) where the program
    cache does not have it.

    Args:
        name: of the profile: letters, digits, dots, dashes and underscores.
        steps: in each of the seven passes, 6 or more. The clean pass times that many: give it more if they are short.
        out: folder of profiles.
        workload: what is trained, as the folder's name has it.

    Raises:
        ConfigError: a name is none, there are too few steps, or (at the end of the block) the loop ended before the
            last pass.
        EngineError: (at the end of the block) `engine="auto"` changed over to a compiled program while it was measured:
            the figures would be of two engines.
    """
    if steps < MIN_STEPS:
        raise ConfigError(f"steps {steps}: use {MIN_STEPS} or more")
    return Profiler(name=name, out=Path(out), workload=workload, steps=steps)


@dataclass(frozen=True, kw_only=True)
class Span:
    """How long a pass is: so many calls of `step` at least, and so many seconds."""

    calls: int
    seconds: float = 0.0


class Schedule:
    """Runs passes one after the other over the steps of a loop.

    Args:
        passes: in order, each with its length.
        clock: seconds.
    """

    def __init__(self, passes: Sequence[tuple[Pass, Span]], clock: Callable[[], float] = time.perf_counter) -> None:
        self._left = list(passes)
        self._clock = clock
        self._calls = 0
        self._begin = 0.0
        self.calls_left = sum(span.calls for _, span in passes)

    @property
    def is_done(self) -> bool:
        """True after the last pass."""
        return not self._left

    def start(self) -> None:
        """Starts the pass that is next, if there is one."""
        if self._left:
            self._left[0][0].start()
            self._calls, self._begin = 0, self._clock()

    def step(self, count: int = 1) -> None:
        """After so many more steps."""
        if not self._left:
            return
        current, span = self._left[0]
        current.step(count)
        self._calls += 1
        self.calls_left -= self._calls <= span.calls
        if self._calls >= span.calls and self._clock() - self._begin >= span.seconds:
            self.stop()
            self.start()

    def stop(self) -> None:
        """Ends the pass that is under way, if there is one."""
        if self._left:
            self._left.pop(0)[0].stop()

    def abort(self) -> None:
        """Ends the pass that is under way, and leaves out the others."""
        del self._left[1:]
        self.stop()


class Session:
    """The passes of a profile over the steps of a loop: those that time, those that watch, or both in this order.

    Everything is as it was after the block, whatever ends it.

    Args:
        trace: where the raw trace goes; None: only time.
        warm_up: before the first pass.
        span: of each pass.
        is_timing: whether there are passes that time.
        short: of the passes that trace and count, where every call is of many steps; None: as the others.
        clean: of the clean pass; None: as the others.
    """

    def __init__(
        self,
        *,
        trace: Path | None,
        warm_up: Span,
        span: Span,
        is_timing: bool = True,
        short: Span | None = None,
        clean: Span | None = None,
    ) -> None:
        self.phases = Phases()
        self.loaders = Loaders()
        self.clean = CleanPass(span.calls)
        self.phased = PhasePass(self.phases)
        self._steady: list[SteadyPass] = []
        passes: list[tuple[Pass, Span]] = []
        if is_timing:
            passes += [(self._watching(self.clean), clean or span), (self._watching(self.phased), span)]
        self.watched: Watched | None = None
        if trace is not None:
            allocations = AllocationPass()
            self.watched = watched = Watched(
                trace=TracePass(self.phases, trace),
                allocations=allocations,
                counts=CountPass(begin_s=time.time()),
                suspects=SuspectPass(self.loaders, allocations, span.calls),
            )
            passes += [(self._watching(watched.trace), short or span), (watched.allocations, span)]
            passes += [(watched.counts, short or span), (watched.suspects, span)]
        self.schedule = Schedule([(WarmUpPass(), warm_up), *passes])
        self._entered = ExitStack()

    def __enter__(self) -> Self:
        """Begins to warm up."""
        self._entered.enter_context(self.phases)
        self._entered.enter_context(self.loaders)
        self.schedule.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Ends the pass that is under way."""
        try:
            self.schedule.abort()
        finally:
            self._entered.close()

    def _watching(self, measuring: Pass) -> SteadyPass:
        self._steady.append(SteadyPass(measuring, self.phases))
        return self._steady[-1]

    def timed(self, samples_per_step: int | None = None) -> Timed:
        """What was timed, once the schedule is done.

        Raises:
            EngineError: the loop took up a compiled program meanwhile.
        """
        self._check()
        samples = None if samples_per_step is None else self.clean.steps * samples_per_step
        return Timed(
            step_us=self.clean.step_us,
            shares=self.phased.shares,
            read_us=[(file, line, us) for (file, line), us in self.phased.read_us.items()],
            gpu=self.clean.gpu_result(samples),
        )

    def profile(self, timed: Timed, *, name: str, workload: dict[str, Any], command: str) -> Profile:
        """All that was seen, once the schedule is done.

        Raises:
            EngineError: the loop took up a compiled program meanwhile, or what was timed had another engine.
        """
        self._check()
        assert self.watched is not None
        return assemble(
            timed,
            self.watched,
            loaders=self.loaders,
            programs_loaded=self.phases.programs_loaded,
            name=name,
            workload=workload,
            command=command,
        )

    def _check(self) -> None:
        for each in self._steady:
            each.check()


class Profiler:
    """See `profile`.

    Attributes:
        path: of the profile's file.
    """

    def __init__(self, *, name: str, out: Path, workload: str, steps: int) -> None:
        self._name = name
        self._workload = workload
        self.path = profile_path(out, workload, device_type(), name)
        self._result: Profile | None = None
        self._thread = threading.get_ident()
        span = Span(calls=steps)
        self._session = Session(trace=self.path.with_suffix(".trace.json.gz"), warm_up=span, span=span)

    @property
    def is_done(self) -> bool:
        """True once all passes are done: the loop may go on or end."""
        return self._session.schedule.is_done

    @property
    def result(self) -> Profile:
        """The profile, after the block.

        Raises:
            ConfigError: the block has not ended.
        """
        if self._result is None:
            raise ConfigError("the profile is there after the block that it is taken in")
        return self._result

    def step(self) -> None:
        """Call it at the end of the loop's body.

        Raises:
            ConfigError: it is called in another thread than the loop's: the passes watch one thread.
        """
        if threading.get_ident() != self._thread:
            raise ConfigError(
                "prof.step() was called in another thread, as a generator of batches is by fasttrain.prefetch and "
                "FastLoop: call it where the steps run, such as in FastLoop's watch="
            )
        self._session.schedule.step()

    def __enter__(self) -> Self:
        """Begins to warm up.

        Raises:
            DataError: the profile's folder cannot be made.
        """
        make_folder(self.path.parent)
        self._session.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Writes the profile, unless an error ended the block.

        Raises:
            ConfigError: the loop ended before the last pass.
            EngineError: the loop changed its engine while it was measured.
        """
        missing = self._session.schedule.calls_left
        self._session.__exit__(kind, error, traceback)
        if error is not None:
            return
        if missing:
            raise ConfigError(
                f"the loop ended {missing} steps before the profile was complete: give it more batches, or profile "
                "with fewer steps="
            )
        self._result = self._session.profile(
            self._session.timed(), name=self._name, workload={"name": self._workload}, command=_command_line()
        )
        write_profile(self._result, self.path)


def _command_line() -> str:
    return shlex.join(["python", *sys.argv])
