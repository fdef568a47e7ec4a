"""`bench`: arms of a workload against each other, in blocks of fresh processes."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from fasttrain.commands.shared import EXIT_INTERRUPTED, print_line, recorded_command
from fasttrain.device import resolve_device
from fasttrain.errors import ConfigError
from fasttrain.json_text import json_text
from fasttrain.measure.bench.machine import Machine
from fasttrain.measure.bench.noise import noise_with, remember_noise
from fasttrain.measure.bench.plan import ArmSpec, BenchPlan
from fasttrain.measure.bench.record import BenchRecord, check_target, with_threads, write_record
from fasttrain.measure.bench.run import measured_noise, run_bench
from fasttrain.measure.bench.runner import ArmRunner, check_users_arm, fresh_caches
from fasttrain.measure.bench.sources import DEFAULT_ARMS, check_source, peers
from fasttrain.measure.bench.summary import markdown, terminal
from fasttrain.measure.environment import clock_mhz, environment, load_average, now
from fasttrain.measure.files import write_text
from fasttrain.measure.verdict.stats import Noise

__all__ = ["Bench"]

KEPT_CACHE = "compiled programs were shared with the user's cache (--keep-cache): compile times are not of a cold start"
"""The note of a record that was measured with `--keep-cache`."""

MOST_FLAGGED = 0.25
"""What an arm against itself tells is kept, if no more than this share of the processes was flagged."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure arms of a workload against each other: in each block a fresh process for every arm, which take turns.

    An arm whose losses leave those of the textbook's loop is not timed.
    """

    workload: Literal["reviews", "mlp", "cnn", "chars"] = "reviews"
    """What is trained."""

    arms: tuple[str, ...] = DEFAULT_ARMS
    """Core arms (textbook, record, drop-in, tuned, eager, torch-compile, compiled, auto, graphed) and peers by name."""

    peers: bool = False
    """All peers too: what others make of the same job. They are in the root of fasttrain's repository."""

    module: tuple[str, ...] = ()
    """Arms of your own, each as my_code:make_arm, where make_arm(workload) gives an object with step(), sync() and
    losses()."""

    blocks: int = 10
    """How many blocks; with fewer than 7, no verdict can be reached."""

    extend: bool = False
    """Measure as many blocks again."""

    against: str | None = None
    """Compare all other arms with this one: where that is inconclusive after the blocks, as many more are measured,
    once."""

    aa: str | None = None
    """Measure this arm against itself, and keep what that tells of this machine's noise. Other arms are left out."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    cpu_threads: int = 1
    """Torch's threads in every process. With the arms of the default, the textbook is measured with torch's own number
    too."""

    warmup_s: float = 0.5
    """Least seconds of steps in a process before any is timed."""

    timed_s: float = 2.0
    """Seconds of timed steps of an arm in a block, on average over the arms; there are 20 rounds at least."""

    seed: int = 0
    """Of the order of the arms in each block."""

    keep_cache: bool = False
    """Use the user's cache of compiled programs, and add to it. Without this option the arms share a cache that is
    empty at first and is removed at the end: each benchmark compiles everything again."""

    out: Path | None = None
    """File of the record, JSON; by default bench-WORKLOAD-DEVICE.json in this folder."""

    markdown: Path | None = None
    """File for the table in Markdown."""

    json: bool = False
    """Print the record on stdout instead of a table."""

    debug: bool = False
    """Show the traceback of an error."""

    def execute(self, arguments: list[str]) -> int:
        """Measures; returns the exit code."""
        command = recorded_command(arguments)
        device = resolve_device(self.device)
        before = environment(device)
        plan = self.plan(torch.get_num_threads(), device)
        known = noise_with(before, self.workload)
        plan = replace(plan, noise=None if known is None else known[1])
        self._check(plan, device)
        with nullcontext({}) if self.keep_cache else fresh_caches() as variables:
            record, is_interrupted = run_bench(
                plan,
                ArmRunner(variables),
                Machine(device),
                _log,
                environment=before,
                command=command,
                created=now(),
            )
        noise = measured_noise(plan, record.arms)
        told = () if noise is not None or known is None else (f"the noise was measured before, with {known[0]}",)
        told += (KEPT_CACHE,) if self.keep_cache else ()
        after = {"load_average_after": load_average(), "clock_mhz_after": clock_mhz()}
        record = replace(record, environment={**before, **after}, notes=(*record.notes, *told))
        try:
            self._keep(record, device)
        finally:  # what was measured is shown even where it cannot be kept
            print_line(json_text(record.to_dict()) if self.json else terminal(record))
        if noise is not None and not is_interrupted:
            _keep_noise(record, self.workload, noise)
        return EXIT_INTERRUPTED if is_interrupted else 0

    def plan(self, default_threads: int, device: torch.device) -> BenchPlan:
        """What the options ask for.

        Args:
            default_threads: torch's own choice.
            device: where every arm trains.

        Raises:
            ConfigError: an option cannot work.
        """
        if self.aa is not None:
            if self.against is not None or self.module or self.peers:
                raise ConfigError("--aa measures one arm against itself: leave --against, --module and --peers out")
            check_source(self.aa)
            labels = f"{self.aa} A", f"{self.aa} B"
            specs = [ArmSpec(label=label, source=self.aa, threads=self.cpu_threads) for label in labels]
        else:
            labels = None
            specs = self._specs(default_threads)
        return BenchPlan(
            workload=self.workload,
            device=str(device),
            arms=tuple(specs),
            blocks=self.blocks,
            extend=self.extend,
            against=self.against,
            aa=labels,
            warmup_s=self.warmup_s,
            timed_s=self.timed_s,
            threads=self.cpu_threads,
            seed=self.seed,
        )

    def _specs(self, default_threads: int) -> list[ArmSpec]:
        sources = list(dict.fromkeys([*self.arms, *(peers() if self.peers else ()), *self.module]))
        specs: list[ArmSpec] = []
        for source in sources:
            check_source(source)
            specs.append(ArmSpec(label=source, source=source, threads=self.cpu_threads))
            if source == "textbook" and self.arms == DEFAULT_ARMS and default_threads != self.cpu_threads:
                label = with_threads(source, default_threads)
                specs.append(ArmSpec(label=label, source=source, threads=default_threads))
        return specs

    def _check(self, plan: BenchPlan, device: torch.device) -> None:
        """Refuses, before anything is measured, what could only fail afterwards."""
        out = self._out(device)
        check_target(out)
        if self.markdown is not None:
            check_target(self.markdown)
            if os.path.realpath(out) == os.path.realpath(self.markdown):
                raise ConfigError(f"the record and the table are both to be {self.markdown}: name two files")
        for source in dict.fromkeys(spec.source for spec in plan.arms if ":" in spec.source):
            check_users_arm(source)

    def _out(self, device: torch.device) -> Path:
        return self.out or Path(f"bench-{self.workload}-{device.type}.json")

    def _keep(self, record: BenchRecord, device: torch.device) -> None:
        path = self._out(device)
        write_record(record, path)
        _log(f"written: {path}")
        if self.markdown is not None:
            write_text(self.markdown, markdown(record, f"Training: {self.workload}, {device.type}"), "the table")


def _keep_noise(record: BenchRecord, workload: str, noise: Noise) -> None:
    """For later runs, unless the machine was too busy to learn from."""
    blocks = [block for arm in record.arms.values() for block in arm.blocks]
    flagged = sum(bool(block.flags) for block in blocks)
    if flagged > MOST_FLAGGED * len(blocks):
        _log(f"the noise is not kept for later runs: {flagged} of {len(blocks)} processes were flagged")
        return
    remember_noise(record.environment, workload, noise)


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)  # noqa: T201
