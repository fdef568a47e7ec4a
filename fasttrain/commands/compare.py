"""`compare`: a verdict on two trainings, and the reasons for it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from fasttrain.commands.shared import print_json, print_line, recorded_command
from fasttrain.comparison import Comparison
from fasttrain.errors import ConfigError
from fasttrain.measure.bench.record import check_target, write_record
from fasttrain.measure.files import write_text
from fasttrain.measure.verdict.compare import compare, compare_stored
from fasttrain.measure.verdict.revision_record import RevisionRecord
from fasttrain.measure.verdict.sides import file_of
from fasttrain.measure.verdict.text import comparison_lines
from fasttrain.pages.comparison import render_comparison

__all__ = ["Compare"]


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Tell of two trainings which is faster, how sure that is, and why.

    A and B are two arms of benchmarks (`results.json:eager results.json:auto`), two profiles, or with --rev two
    revisions of this repository. Exit code: 0 B is faster or the same, 1 slower or a counter rose, 3 inconclusive or
    time not judged, 4 not comparable, 130 interrupted. Two profiles are compared but for time: 0 if no counter rose.
    """

    sides: tyro.conf.Positional[tuple[str, ...]] = ()
    """A and B, each a file or FILE:ARM. A benchmark's file without an arm stands for its arm `auto`. Or one file that
    --rev has left with --out."""

    rev: tuple[str, str] | None = None
    """Measure two git revisions instead, which take turns. Your checkout is not touched."""

    workload: Literal["reviews", "mlp", "cnn", "chars"] = "reviews"
    """With --rev: what is trained."""

    arm: str = "auto"
    """With --rev: how: textbook, record, drop-in, tuned, eager, torch-compile, compiled, auto, graphed, or
    my_code:make_arm of the revision's own."""

    blocks: int = 10
    """With --rev: how many blocks. If they decide nothing, as many again are measured, once: with fewer than 4, no
    verdict can be reached."""

    timed_s: float = 2.0
    """With --rev: seconds of timed steps of each revision in a block; they take turns."""

    device: str = "auto"
    """With --rev: auto, cpu, cuda or cuda:N."""

    cpu_threads: int = 1
    """With --rev: torch's threads in every process."""

    out: Path | None = None
    """With --rev: file for the record of both, JSON, from which `compare FILE` reaches the same verdict."""

    profiles: tuple[Path, Path] | None = None
    """A profile of A and one of B, to explain the difference of two arms."""

    through: str | None = None
    """Judge arms of two files through this arm, which both have. By default the textbook, or a peer."""

    html: Path | None = None
    """Write a page with everything that was found."""

    json: bool = False
    """Print one JSON document on stdout."""

    debug: bool = False
    """Show the traceback of an error."""

    def execute(self, arguments: list[str]) -> int:
        """Compares; returns the exit code."""
        self._check_targets()
        found, record = self._found(recorded_command(arguments))
        try:  # before it is told: a reader of the output that has seen enough costs no record
            self._keep(found, record)
        finally:  # what was measured is told even where a file finds no room
            self._tell(found)
        return found.exit_code

    def _check_targets(self) -> None:
        """Refuses, before minutes of measuring, files that could not, or must not, be written after them."""
        if self.out is not None and self.rev is None:
            raise ConfigError("--out keeps what --rev measures: files are kept already")
        if self.html is not None and self.out is not None and self.out.resolve() == self.html.resolve():
            raise ConfigError(f"--out and --html are both {self.out}: name two files")
        for path in (self.out, self.html):
            if path is not None:
                check_target(path)
        if self.html is not None and any(_is_one_file(self.html, path) for path in self._inputs()):
            raise ConfigError(f"--html {self.html} is a file that is compared: name another one for the page")

    def _inputs(self) -> list[Path]:
        return [*(file_of(side) for side in self.sides), *(self.profiles or ())]

    def _keep(self, found: Comparison, record: RevisionRecord | None) -> None:
        try:
            if self.out is not None and record is not None:
                write_record(record, self.out)
                _log(f"written: {self.out}")
        finally:  # one file that finds no room does not cost the other
            if self.html is not None:
                write_text(self.html, render_comparison(found), "the page")

    def _tell(self, found: Comparison) -> None:
        if self.json:
            print_json(found.to_dict())
            return
        for line in comparison_lines(found):
            print_line(line)

    def _found(self, command: str) -> tuple[Comparison, RevisionRecord | None]:
        """What is found, and what was measured for it, if anything was."""
        if self.rev is not None:
            return self._measured(self.rev, command)
        if len(self.sides) == 1:
            if self.profiles is not None or self.through is not None:
                raise ConfigError("a record of two revisions is compared alone: leave --profiles and --through out")
            return compare_stored(Path(self.sides[0]), command=command), None
        if len(self.sides) != 2:
            raise ConfigError(f"{len(self.sides)} files or arms were given: give two, A and B")
        a, b = self.sides
        return compare(a, b, command=command, profiles=self.profiles, through=self.through), None

    def _measured(self, revisions: tuple[str, str], command: str) -> tuple[Comparison, RevisionRecord]:
        # Imports torch, which a comparison of files does without.
        from fasttrain.device import resolve_device
        from fasttrain.measure.verdict.revisions import Live, compare_revisions

        if self.sides or self.profiles is not None or self.through is not None:
            raise ConfigError("--rev measures two revisions: leave files, --profiles and --through out")
        live = Live(
            workload=self.workload,
            arm=self.arm,
            device=resolve_device(self.device),
            blocks=self.blocks,
            timed_s=self.timed_s,
            threads=self.cpu_threads,
        )
        return compare_revisions(revisions, live, command=command, log=_log)


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)  # noqa: T201


def _is_one_file(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.samefile(b)
