"""Two revisions of a repository, measured live: their processes take turns, each with its own revision's code.

A revision's files are taken out of git into a temporary folder; the user's checkout is only read.
"""

from __future__ import annotations

import io
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fasttrain.comparison import Comparison
from fasttrain.errors import ConfigError, EngineError
from fasttrain.measure.bench.machine import Machine
from fasttrain.measure.bench.messages import ArmTask
from fasttrain.measure.bench.noise import known_noise
from fasttrain.measure.bench.plan import ArmSpec, BenchPlan, StartArm, Watcher
from fasttrain.measure.bench.rounds import Process
from fasttrain.measure.bench.run import run_bench
from fasttrain.measure.bench.runner import ArmRunner, fresh_caches
from fasttrain.measure.environment import clock_mhz, environment, load_average, now
from fasttrain.measure.verdict.compare import compare_record
from fasttrain.measure.verdict.revision_record import RevisionArm, RevisionRecord
from fasttrain.workloads.common import data_dir

__all__ = ["Live", "Revision", "compare_revisions", "extracted", "find_revision", "measure_revisions"]

REFERENCE = "textbook"


@dataclass(frozen=True, kw_only=True)
class Live:
    """What is to be measured, besides the revisions.

    Attributes:
        workload: name of the job.
        arm: what makes the arm, as `bench --arms` and `--module` take it.
        device: where it trains.
        blocks: how many; twice as many if these decide nothing.
        timed_s: seconds of timed steps of an arm in a block, on average.
        threads: torch's.
    """

    workload: str
    arm: str
    device: torch.device
    blocks: int
    timed_s: float
    threads: int


@dataclass(frozen=True, kw_only=True)
class Revision:
    """A commit, under the name that it was asked for by.

    Attributes:
        name: such as "main~1".
        commit: its full hash.
        repository: where it is.
    """

    name: str
    commit: str
    repository: Path

    @property
    def label(self) -> str:
        """Its name, with the hash where that is another thing."""
        return f"{self.name} ({self.commit[:10]})"


def compare_revisions(
    names: tuple[str, str], live: Live, *, command: str, log: Callable[[str], None]
) -> tuple[Comparison, RevisionRecord]:
    """Measures two revisions of the repository around this folder, and compares them.

    Args:
        names: of A and B, as git takes them.
        live: what to measure.
        command: what repeats this comparison.
        log: told how far it is.

    Returns:
        What was found, and what it was found from: `compare_stored` finds the same in its file.

    Raises:
        ConfigError: there is no repository here, no such revision, or nothing to measure in it.
        EngineError: the arm cannot run in one of them.
    """
    first, second = (find_revision(name, Path.cwd()) for name in names)
    for revision in (first, second):
        _check_has_code(revision, live.arm)
    with ExitStack() as stack:
        runners: list[StartArm] = []
        for revision in (first, second):
            folder = stack.enter_context(extracted(revision))
            caches = stack.enter_context(fresh_caches())  # of its own: no revision runs what another one compiled
            code = {"PYTHONPATH": str(folder), "FASTTRAIN_DATA": str(data_dir().resolve())}
            runners.append(ArmRunner({**caches, **code}, folder=folder))
        return measure_revisions(
            (first, second),
            live,
            (runners[0], runners[1]),
            Machine(live.device),
            about=environment(live.device),
            command=command,
            log=log,
        )


def measure_revisions(
    revisions: tuple[Revision, Revision],
    live: Live,
    runners: tuple[StartArm, StartArm],
    watcher: Watcher,
    *,
    about: dict[str, Any],
    command: str,
    log: Callable[[str], None],
) -> tuple[Comparison, RevisionRecord]:
    """Runs the blocks of two revisions in turn; `runners` run a task with the code of each.

    Raises:
        EngineError: the arm cannot run in one of them.
        KeyboardInterrupt: it came before both were measured.
    """
    labels = _labels(revisions)
    works: dict[str, dict[str, Any]] = {}

    @contextmanager
    def start(task: ArmTask) -> Generator[Process]:
        """Gives a task to its revision, which is where its arm is said to be from."""
        if task.source == REFERENCE:
            with runners[0](task) as process:
                yield process
            return
        with runners[labels.index(task.source)](replace(task, source=live.arm)) as process:
            if process.started.workload is not None:
                works[task.source] = process.started.workload
            yield process

    plan = BenchPlan(
        workload=live.workload,
        device=str(live.device),
        arms=tuple(ArmSpec(label=label, source=label, threads=live.threads) for label in labels),
        blocks=live.blocks,
        against=labels[0],
        noise=known_noise(about, live.workload),
        timed_s=live.timed_s,
        threads=live.threads,
    )
    bench, is_interrupted = run_bench(plan, start, watcher, log, environment=about, command=command, created=now())
    if is_interrupted and not {*bench.arms, *bench.refused} >= {*labels}:
        raise KeyboardInterrupt
    for label in labels:
        if label not in bench.arms:
            raise EngineError(f"revision {label} was not timed: {bench.refused.get(label, '; '.join(bench.notes))}")
    first, second = (
        RevisionArm(label=label, commit=revision.commit, workload=works[label])
        for label, revision in zip(labels, revisions, strict=True)
    )
    after = {"load_average_after": load_average(), "clock_mhz_after": clock_mhz()}
    bench = replace(bench, environment={**about, **after})
    record = RevisionRecord(revisions=(first, second), bench=bench)
    found = compare_record(record, (revisions[0].repository, revisions[1].repository), command=command)
    return replace(found, is_interrupted=is_interrupted), record


def find_revision(name: str, folder: Path) -> Revision:
    """Looks a revision up in the repository around a folder.

    Raises:
        ConfigError: there is no repository, or no such revision in it.
    """
    root = _git(folder, "rev-parse", "--show-toplevel")
    if root is None:
        raise ConfigError(f"{folder} is in no git repository: run --rev inside of one")
    commit = _git(folder, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    if commit is None:
        raise ConfigError(f"--rev {name!r:.80}: there is no such revision in {root.decode().strip()}")
    return Revision(name=name, commit=commit.decode().strip(), repository=Path(root.decode().strip()))


@contextmanager
def extracted(revision: Revision) -> Generator[Path]:
    """A temporary folder with the revision's files."""
    archive = _git(revision.repository, "archive", "--format=tar", revision.commit)
    if archive is None:
        raise ConfigError(f"git cannot export revision {revision.label}: is this a partial clone?")
    with tempfile.TemporaryDirectory(prefix="fasttrain-revision-") as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            # Python before 3.11.4 has no filters; what git exports of the user's own repository needs none.
            options: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            files.extractall(folder, **options)
        yield Path(folder)


def _labels(revisions: tuple[Revision, Revision]) -> tuple[str, str]:
    """Two labels, apart even where a revision is compared with itself."""
    first, second = (revision.label for revision in revisions)
    return (first, second) if first != second else (f"{first} A", f"{second} B")


def _check_has_code(revision: Revision, arm: str) -> None:
    """Refuses a revision in which nothing could differ, or nothing can be measured.

    Raises:
        ConfigError: it is refused.
    """
    if not _has_file(revision, "fasttrain/__init__.py"):
        if ":" not in arm:
            raise ConfigError(f"{revision.label} has no fasttrain: name code of its own, as --arm my_code:make_arm")
    elif not _has_file(revision, "fasttrain/measure/bench/process.py"):
        raise ConfigError(f"{revision.label} is older than `bench` with arms that take turns: it cannot be measured")


def _has_file(revision: Revision, path: str) -> bool:
    return _git(revision.repository, "cat-file", "-e", f"{revision.commit}:{path}") is not None


def _git(folder: Path, *arguments: str) -> bytes | None:
    """What git says; None where it refuses.

    Raises:
        ConfigError: git is not installed.
    """
    try:
        ran = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=False)
    except FileNotFoundError:
        raise ConfigError("--rev needs git, which is not on the PATH") from None
    return ran.stdout if ran.returncode == 0 else None
