# ruff: noqa: T201
"""Runs a drawn job by a plain loop and by FastLoop, step for step, and says what differs."""

from __future__ import annotations

import dataclasses
import gc
import io
import math
import os
import random
import shlex
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from benchmarks.fuzz import Draws, FuzzRecord, Outcome
from fasttrain import FastLoop, resident
from fasttrain.errors import FasttrainError
from fasttrain.measure.bench.record import write_record
from fasttrain.measure.environment import environment, load_average, now
from fasttrain.step import compiler, ladder
from tests.step import graph_backend
from tests.step.fakes import hasten
from tests.step.fuzz_jobs import Job, draw_job
from tests.step.fuzz_pictures import TOLERANCE, Picture, differences, relative
from tests.step.fuzz_sides import Side


def _arguments(side: Side) -> dict[str, Any]:
    """Those of FastLoop."""
    given: dict[str, Any] = dict(side.job.options)
    if "metrics" in given:
        given["metrics"] = {"metric": side.module.metric}
    if "loss" in given:
        given["loss"] = side.module.CRITERION
    else:
        given["forward"] = side.env["forward"]
    return given


def _data(job: Job) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(job.seed)
    count = job.steps * (8 if job.is_resident else int(str(job.options.get("accumulate", 1))))
    return [
        (
            torch.randn(5, 4, generator=generator, dtype=torch.float64),
            torch.randn(5, 3, generator=generator, dtype=torch.float64),
        )
        for _ in range(count)
    ]


def _plain_epoch(side: Side, batches: _Batches) -> tuple[float, float | None]:
    env, job = side.env, side.job
    model, opt, forward = env["model"], env["opt"], env["forward"]
    found = [(module, module.training) for module in model.modules()]
    model.train()
    accumulate = int(str(job.options.get("accumulate", 1)))
    losses: list[Tensor] = []
    metrics: list[Tensor] = []
    metric, criterion = side.module.metric, side.module.CRITERION
    if "loss" in job.options:

        def forward(model: Any, batch: Any) -> Any:
            out = model(batch[0])
            return criterion(out, batch[1]), out, batch[1]

    if not hasattr(side, "metric"):
        side.metric = metric
    try:
        _zero_gradients(model, opt)
        for number, batch in enumerate(batches, 1):
            loss, out, y = forward(model, batch)
            if "metrics" in job.options:
                with torch.no_grad():
                    metrics.append(side.metric(loss.detach(), out, y).detach())
            (loss / accumulate if accumulate > 1 else loss).backward()
            losses.append(loss.detach())
            if number % accumulate == 0 or number == len(batches):
                parameters = list(model.parameters())
                if "clip_value" in job.options:
                    torch.nn.utils.clip_grad_value_(parameters, job.options["clip_value"])
                if "clip_norm" in job.options:
                    torch.nn.utils.clip_grad_norm_(parameters, job.options["clip_norm"])
                opt.step()
                _zero_gradients(model, opt)
    finally:
        for module, mode in found:
            module.training = mode
    return float(torch.stack(losses).mean()), float(torch.stack(metrics).mean()) if metrics else None


def _zero_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """As documented: each optimizer step starts without gradients, those of the model's other parameters included."""
    model.zero_grad()
    optimizer.zero_grad()


def _pair(batch: Any) -> list[Tensor]:
    return [batch["x"], batch["y"]] if isinstance(batch, dict) else list(batch)


class _Busy:
    """Another thread that evaluates the model and draws random numbers while a step runs."""

    def __init__(self, side: Side, is_on: bool) -> None:
        self.errors: list[str] = []
        self._side = side
        self._is_on = is_on

    def __enter__(self) -> _Busy:
        if self._is_on:
            self._stop = threading.Event()
            self._own = random.Random(3)
            self._thread = threading.Thread(target=self._work)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._is_on:
            self._stop.set()
            self._thread.join()

    def _work(self) -> None:
        layer = nn.utils.skip_init(nn.Linear, 3, 3, dtype=torch.float64).requires_grad_(False)
        layer.weight.fill_(1.0)
        layer.bias.fill_(1.0)
        while not self._stop.is_set():
            self._own.random()
            try:
                with torch.no_grad():
                    # Not `head.weight`: of a parametrization that steps its buffers, each read is a step.
                    weight = vars(self._side.env["model"].head)["_parameters"].get("weight")
                    out = torch.ones(()) if weight is None else weight.sum()
                    again = layer(torch.ones(1, 3, dtype=torch.float64))
                if type(out) not in (Tensor,) or type(again) is not Tensor or not torch.is_tensor(out):
                    self.errors.append(f"another thread was given a {type(out).__name__}")
            except Exception as error:
                self.errors.append(f"another thread: {type(error).__name__}: {error}")


COUNTS: Counter[str] = Counter()


class _CountingPending(graph_backend.GraphPending):
    def load(self) -> Any:
        return _counting(super().load())


class _CountingBuild(compiler.Pending):
    def load(self) -> Any:
        return _counting(super().load())


def _counting(program: Any) -> Any:
    """The program, which counts its steps, and of its calls those of several steps."""
    COUNTS["trace"] += 1
    run = program.run

    def counted(given: Any) -> Any:
        found = run(given)
        if isinstance(found, Tensor):
            COUNTS["program"] += found.numel()
            COUNTS["span"] += found.numel() > 1
        return found

    program.run = counted
    return program


def run_job(job: Job, folder: Path, monkeypatch: pytest.MonkeyPatch, *, is_compiled: bool = False) -> Outcome:
    """Both ways, step by step.

    Args:
        job: what to run.
        folder: where its modules are written.
        monkeypatch: undoes what is set here.
        is_compiled: whether programs are compiled; else they run the captured graphs. A job has two programs at most
            then, and waits for each.
    """
    monkeypatch.setattr("fasttrain.step.compiler.Pending", _CountingBuild if is_compiled else _CountingPending)
    if is_compiled:
        job = dataclasses.replace(job, options={**job.options, "engine": "compiled"})
        monkeypatch.setattr(ladder, "MAX_CANDIDATES", 2)
    monkeypatch.setattr(ladder, "ENOUGH_MISSED", 1)
    hasten(monkeypatch)
    COUNTS.clear()
    plain, ours = Side(job, folder, f"fuzz_{job.seed}_p"), Side(job, folder, f"fuzz_{job.seed}_o")
    match = _Match(job, plain, ours)
    try:
        outcome = match.run()
    finally:
        plain.close()
        ours.close()
    outcome.by_program, outcome.traces, outcome.spans = COUNTS["program"], COUNTS["trace"], COUNTS["span"]
    outcome.worst = match.worst
    return outcome


FUSED_AMSGRAD = "NaN under fused=True and amsgrad, where torch's kernel keeps numbers (see KERNEL_FAULTS)"
"""Programs have NaN there, as torch has without `fused=True`."""


REFUSED_BY_COMPARISON = {
    "is_compiling()": "forward asks whether it is compiled: the program is refused by comparison with eager",
    "weight.grad is None": "forward reads a gradient: the program is refused by comparison with eager",
}
"""What drawn forwards do, and how it ends."""


class _Found(NamedTuple):
    """What an epoch gave: its loss and metric, or an error with its traceback; and what it printed."""

    loss: float = math.nan
    metric: float | None = None
    error: Exception | None = None
    text: str = ""
    printed: str = ""


class _Match:
    """A plain loop and FastLoop on two copies of one job.

    Attributes:
        worst: the largest relative difference so far.
    """

    def __init__(self, job: Job, plain: Side, ours: Side) -> None:
        self.worst = 0.0
        self._job = job
        self._sides = plain, ours
        self._data = _data(job)
        self._told: dict[str, list[str | None]] = {plain.name: [], ours.name: []}
        self._sources: dict[str, Any] = {}
        self._loop: FastLoop | None = None

    def run(self) -> Outcome:
        """All epochs, until one is a finding or a refusal."""
        ours = self._sides[1]
        for side in self._sides:
            with side.active():
                try:
                    side.load()
                except Exception as error:
                    return Outcome("job", f"{type(error).__name__}: {error}")
        with ours.active():
            self._loop = FastLoop(ours.env["model"], ours.env["opt"], **_arguments(ours))
        for epoch in range(1 if self._job.is_one_epoch else self._job.steps):
            outcome = self._epoch(epoch)
            if outcome is not None:
                return dataclasses.replace(outcome, detail=f"epoch {epoch}: {outcome.detail}")
        with ours.active():
            self._loop.step.close()
            return Outcome("same", str(self._loop.step.engine.reason))

    def _epoch(self, epoch: int) -> Outcome | None:
        plain, ours = self._sides
        steps = range(self._job.steps) if self._job.is_one_epoch else [epoch]
        given = [_Batches(self, side, steps) for side in self._sides]
        for batches in given:
            batches.begin()
        expected = self._trained(plain, lambda: _plain_epoch(plain, given[0]))
        before = ours.picture()
        with _Busy(ours, self._job.has_thread) as busy:
            found = self._trained(ours, lambda: self._our_epoch(given[1]))
        if busy.errors:
            return Outcome("thread", busy.errors[0])
        if expected.error is not None or found.error is not None:
            return self._of_errors(expected, found, before, len(given[1]))
        said, ours_said = (self._told[side.name] for side in self._sides)
        if [str(each).replace("_p", "") for each in said] != [str(each).replace("_o", "") for each in ours_said]:
            return Outcome("other error of a change", f"{said} and {ours_said}")
        return self._of_numbers(expected, found) or self._of_objects(given)

    def _trained(self, side: Side, train: Callable[[], tuple[float, float | None]]) -> _Found:
        error, text, result = None, "", (math.nan, None)
        with side.active(), warnings.catch_warnings(), redirect_stdout(io.StringIO()) as out:
            warnings.simplefilter("ignore")
            try:
                result = train()
            except Exception as raised:
                error, text = raised, "".join(traceback.format_exception(raised))
        return _Found(*result, error, text, out.getvalue())

    def _our_epoch(self, batches: _Batches) -> tuple[float, float | None]:
        assert self._loop is not None
        result = self._loop.train(batches.for_loop())
        metric: Any = (result.metrics or {}).get("metric")
        return result.loss, metric

    def _of_errors(self, expected: _Found, found: _Found, before: Picture, num_batches: int) -> Outcome:
        plain, ours = expected.error, found.error
        if plain is not None:
            kind = "no error" if ours is None else "job"
            return Outcome(kind, f"plain raises {type(plain).__name__}: {plain}"[:300])
        if not isinstance(ours, FasttrainError) or self._job.options["engine"] == "auto":
            return Outcome("crash", found.text)
        if "max_exp_avg_sq" in str(ours) and self._has_fused_amsgrad():
            return Outcome("excused", FUSED_AMSGRAD)
        known = next((why for text, why in REFUSED_BY_COMPARISON.items() if text in self._job.source), None)
        if "differ from eager" in str(ours) and known is not None:
            return Outcome("excused", known)
        if "differ from eager" in str(ours) or "cannot run:" in str(ours):
            return Outcome("verify", str(ours))
        changed, _ = differences(before, self._sides[1].picture(), 0.0)
        changed = [each for each in changed if ".grad" not in each]
        if changed and num_batches == 1:
            return Outcome("changed by a refusal", f"{ours}: {changed[:6]}")
        return Outcome("refused", str(ours))

    def _of_numbers(self, expected: _Found, found: _Found) -> Outcome | None:
        if expected.printed != found.printed:
            return self._finding("output", f"{expected.printed!r} and {found.printed!r}")
        pairs = {"loss": (expected.loss, found.loss), "metric": (expected.metric, found.metric)}
        for kind, (one, two) in pairs.items():
            if one is not None and two is not None:
                apart = relative(torch.tensor(one, dtype=torch.float64), torch.tensor(two, dtype=torch.float64))
                self.worst = max(self.worst, apart)
                if not apart <= TOLERANCE:
                    return self._finding(kind, f"plain {one}, ours {two}")
            elif one is not two:
                return self._finding(kind, f"plain {one}, ours {two}")
        return None

    def _of_objects(self, given: list[_Batches]) -> Outcome | None:
        plain, ours = self._sides
        found, apart = differences(plain.picture(), ours.picture())
        self.worst = max(self.worst, apart)
        if found and all("max_exp_avg_sq" in each for each in found) and self._has_fused_amsgrad():
            return Outcome("excused", FUSED_AMSGRAD)
        if found:
            return self._finding("objects", str(found[:8]))
        changed = [
            number
            for number, (one, two) in enumerate(zip(given[0].made, given[1].made, strict=True))
            for a, b in zip(_pair(one), _pair(two), strict=True)
            if not relative(a.detach(), b.detach()) <= TOLERANCE or a.requires_grad != b.requires_grad
        ]
        if changed:
            return self._finding("batch", f"batches {changed}")
        one, two = plain.global_state(), ours.global_state()
        if one != two:
            return self._finding("process", str([(key, one[key], two[key]) for key in one if one[key] != two[key]]))
        return None

    def _has_fused_amsgrad(self) -> bool:
        groups = self._sides[0].env["opt"].param_groups
        return any(group.get("amsgrad") and group.get("fused") for group in groups)

    def _finding(self, kind: str, detail: str) -> Outcome:
        assert self._loop is not None
        return Outcome(kind, f"{detail}; {self._loop.step.engine}")


class _Batches:
    """The batches of some steps for one side. What is to change before a step changes when its batch is asked for.

    Attributes:
        made: the batches so far.
    """

    def __init__(self, match: _Match, side: Side, steps: Sequence[int]) -> None:
        self.made: list[Any] = []
        self._match = match
        self._side = side
        self._steps = steps

    def begin(self) -> None:
        """Changes what changes before the first step."""
        with self._side.active():
            self._change(self._steps[0])

    def __len__(self) -> int:
        return len(self._match._data) // self._match._job.steps * len(self._steps)

    def for_loop(self) -> Any:
        """What a loop iterates over."""
        match, job = self._match, self._match._job
        if not job.is_resident:
            return iter(self)
        if self._side.name not in match._sources:
            columns = [torch.cat([each[at] for each in match._data[:8]]) for at in (0, 1)]
            match._sources[self._side.name] = resident(*columns, batch_size=5, device="cpu", seed=4)
        return match._sources[self._side.name]

    def __iter__(self) -> Iterator[Any]:
        if self._match._job.is_resident:
            yield from self.for_loop()
            return
        for step in self._steps:
            if step != self._steps[0]:
                self._change(step)
            per_step = len(self._match._data) // self._match._job.steps
            for x, y in self._match._data[step * per_step : (step + 1) * per_step]:
                self.made.append(self._side.module.make_batch(x.clone(), y.clone(), step))
                yield self.made[-1]

    def _change(self, step: int) -> None:
        for change in self._match._job.changes:
            if change.step == step:
                self._match._told[self._side.name].append(self._side.change(change.statement))


def main(arguments: list[str]) -> None:
    """`SEED`: prints the recipe and what comes of it. `FIRST LAST`: runs these seeds, prints each finding.

    `record GRAPHS COMPILED FILE` writes the record of so many draws of either kind (see `benchmarks.fuzz`).
    """
    torch.set_num_threads(1)
    if len(arguments) == 1:
        job = draw_job(int(arguments[0]))
        print(job.recipe())
        print(run_once(job))
    elif arguments[0] == "record":
        record(int(arguments[1]), int(arguments[2]), Path(arguments[3]))
    else:
        found = Draws()
        for seed in range(int(arguments[0]), int(arguments[1])):
            one = draws(seed, seed + 1)
            found.merge(one)
            if one.findings:
                print(one.findings[0], flush=True)
        print({name: value for name, value in dataclasses.asdict(found).items() if name != "findings"})


def draws(first: int, last: int, programs: str | None = None) -> Draws:
    """Runs these seeds.

    Args:
        first, last: the seeds, without the last.
        programs: the folder of compiled programs, where they are to be compiled: of the seeds, those whose captured
            graph runs. None: the captured graphs run.
    """
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what was imported: a capture looks through all objects of the process, which is a fifth of a draw
    found = Draws()
    begin = time.process_time(), os.times().children_user
    for seed in range(first, last):
        job = draw_job(seed)
        try:
            with redirect_stderr(io.StringIO()):
                outcome = run_once(job)
                if programs is not None:
                    if not outcome.by_program:
                        continue
                    outcome = run_once(job, programs)
        except Exception:  # of this test, which goes on to the next job
            outcome = Outcome("not compared", traceback.format_exc())
        found.draws += 1
        found.add(seed, outcome, [*job.traits, *[each.statement for each in job.changes]])
    found.cpu_s = time.process_time() - begin[0] + os.times().children_user - begin[1]
    return found


def record(num_graphs: int, num_compiled: int, path: Path) -> None:
    """Writes a record, anew after each part of it."""
    about = {
        "command": shlex.join(["python", "-m", "tests.step.fuzzing", *sys.argv[1:]]),
        "created": now(),
        "environment": environment(torch.device("cpu")),
    }
    found = {"graphs": Draws(), "compiled": Draws()}
    with tempfile.TemporaryDirectory() as programs, ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for _ in range(2)]
        begun, running = {"graphs": 0, "compiled": 0}, {}

        def begin(pool: ProcessPoolExecutor) -> None:
            kind = "compiled" if pool is pools[1] and found["compiled"].draws < num_compiled else "graphs"
            first = begun[kind]
            size = 2 if kind == "compiled" else min(CHUNK, num_graphs - first)
            if size > 0:
                begun[kind] += size
                folder = programs if kind == "compiled" else None
                running[pool.submit(draws, first, first + size, folder)] = kind, pool

        for pool in pools:
            begin(pool)
        while running:
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                kind, pool = running.pop(done)
                found[kind].merge(done.result())
                begin(pool)
                written = FuzzRecord(**about, tolerance=TOLERANCE, **found)
                written.environment["load_average_after"] = load_average()
                write_record(written, path)


CHUNK = 25


def run_once(job: Job, programs: str | None = None) -> Outcome:
    """One job in a folder of its own; compiled programs stay in `programs`."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_CACHE_HOME", programs or folder)
        return run_job(job, Path(folder), monkeypatch, is_compiled=programs is not None)


if __name__ == "__main__":
    main(sys.argv[1:])
