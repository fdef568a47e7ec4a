"""Two revisions: which code runs where, and that the checkout is left alone."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain.cli import main
from fasttrain.commands.compare import Compare
from fasttrain.comparison import Comparison
from fasttrain.errors import ConfigError, EngineError
from fasttrain.measure.bench.messages import ArmTask, Started
from fasttrain.measure.verdict.compare import compare_record
from fasttrain.measure.verdict.revision_record import RevisionRecord
from fasttrain.measure.verdict.revisions import (
    Live,
    Revision,
    compare_revisions,
    extracted,
    find_revision,
    measure_revisions,
)
from tests.commands import strict_json
from tests.measure.bench.bench_fakes import DiesInRoundsError, FakeProcess, FakeRunner, Given, slice_of
from tests.measure.verdict.comparisons import ENVIRONMENT, SPREAD, WORKLOAD, arm, stored

LIVE = Live(workload="mlp", arm="eager", device=torch.device("cpu"), blocks=10, timed_s=0.1, threads=1)
REVISIONS = (
    Revision(name="main~1", commit="a" * 40, repository=Path("repository")),
    Revision(name="main", commit="b" * 40, repository=Path("repository")),
)


class QuietMachine:
    def before(self) -> int:
        return 0

    def flags(self, others: int | None) -> tuple[str, ...]:
        return ()


class FakeCode(FakeRunner):
    """A revision's: each step takes `step_us`, a little more or less by block, or what `others` say before that."""

    def __init__(
        self,
        step_us: float,
        spread: Sequence[float] = SPREAD,
        *,
        workload: Mapping[str, Any] = WORKLOAD,
        others: Sequence[Given] = (),
    ) -> None:
        given = [*others, *(step_us * 1e-6 * (1 + each) for each in spread)]
        super().__init__({"eager": given, "code:make_arm": given}, workload)


def measured(first: FakeCode, second: FakeCode, revisions: tuple[Revision, Revision] = REVISIONS) -> Comparison:
    about: dict[str, Any] = {"about": ENVIRONMENT, "command": "compare --rev", "log": lambda _: None}
    found, record = measure_revisions(revisions, LIVE, (first, second), QuietMachine(), **about)
    again = compare_record(through_json(record), (Path("repository"), Path("repository")), command="compare --rev")
    assert again == replace(found, is_interrupted=False), "what is stored gives the same comparison"
    return found


def through_json(record: RevisionRecord) -> RevisionRecord:
    return RevisionRecord.from_dict(json.loads(json.dumps(record.to_dict())))


def test_each_revision_runs_its_own_blocks_in_turn() -> None:
    first, second = FakeCode(500), FakeCode(400)
    found = measured(first, second)
    assert found.outcome == "FASTER"
    assert found.timing is not None
    assert found.timing.speedup == pytest.approx(1.25, rel=0.01)
    assert [task.source for task in first.tasks] == ["textbook", *["eager"] * 10]
    assert [task.source for task in second.tasks] == ["eager"] * 10
    assert first.tasks[1].reference == second.tasks[0].reference == (0.7, 0.6)
    assert [(each.name, each.a[:1], each.b[:1]) for each in found.differences] == [("commit", "a", "b")]
    assert found.a.label == "main~1 (aaaaaaaaaa)"


def test_a_revision_can_be_compared_with_itself() -> None:
    first, second = FakeCode(500), FakeCode(500)
    found = measured(first, second, (REVISIONS[0], REVISIONS[0]))
    assert found.outcome == "SAME"
    assert len(second.tasks) == 10


def test_an_open_question_is_measured_once_more() -> None:
    first, second = FakeCode(500), FakeCode(498, [9 * each for each in SPREAD])
    found = measured(first, second)
    assert len(second.tasks) == 20
    assert found.timing is not None
    assert len(found.timing.pairs) == 20


def test_other_work_is_not_comparable() -> None:
    found = measured(FakeCode(500), FakeCode(400, workload={**WORKLOAD, "batch_size": 64}))
    assert found.outcome == "NOT COMPARABLE"
    assert "work: batch_size: 128 against 64" in found.reasons


def interrupted_after(num_tasks: int) -> tuple[FakeCode, FakeCode]:
    """The code of two revisions; Ctrl-C comes after so many tasks of both together, the reference being one."""
    left = iter(range(num_tasks))

    class Interrupted(FakeCode):
        def __call__(self, task: ArmTask) -> AbstractContextManager[FakeProcess]:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return super().__call__(task)

    return Interrupted(500), Interrupted(400)


def test_an_interrupt_is_the_exit_code_whatever_the_verdict() -> None:
    found = measured(*interrupted_after(17))
    assert found.outcome == "FASTER"
    assert found.to_dict()["pairs"] == 8
    assert "interrupted: fewer blocks than planned" in found.reasons
    assert (found.exit_code, found.to_dict()["exit_code"]) == (130, 130)


def test_an_interrupt_before_the_first_pair_is_one() -> None:
    with pytest.raises(KeyboardInterrupt):
        measured(*interrupted_after(2))


def test_a_revision_that_cannot_run_is_named_with_the_reason() -> None:
    broken = FakeCode(400, others=[Started(refused="its losses leave the reference's")])
    with pytest.raises(EngineError, match=r"revision main \(b{10}\) was not timed: its losses leave"):
        measured(FakeCode(500), broken)


def test_a_revision_that_died_after_a_block_that_does_not_count_is_named_too() -> None:
    died = DiesInRoundsError("exit code 1: it ran out of memory")
    dying = FakeCode(400, others=[slice_of(4e-4, waited_s=0.1), *[died] * 99])
    with pytest.raises(EngineError, match=r"revision main \(b{10}\) was not timed: .*it ran out of memory"):
        measured(FakeCode(500), dying)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    git = git_in(folder)
    git("init", "--quiet", "--initial-branch=main")
    for content in ("one", "two"):
        (folder / "code.py").write_text(f"VERSION = {content!r}\n")
        git("add", "code.py")
        git("commit", "--quiet", "--message", content)
    (folder / "code.py").write_text("VERSION = 'not committed'\n")
    monkeypatch.chdir(folder)
    return folder


def git_in(folder: Path) -> Callable[..., str]:
    settings = {
        **os.environ,
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": os.devnull,
        **{f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    }
    return lambda *arguments: (
        subprocess.run(["git", *arguments], cwd=folder, env=settings, check=True, capture_output=True, text=True).stdout
    )


def test_a_revisions_files_are_taken_out_and_the_checkout_is_left_alone(repository: Path) -> None:
    git = git_in(repository)
    before = git("status", "--porcelain"), git("worktree", "list"), git("rev-parse", "HEAD")
    revision = find_revision("main~1", repository)
    with extracted(revision) as folder:
        assert (folder / "code.py").read_text() == "VERSION = 'one'\n"
        assert repository not in folder.parents
    assert not folder.exists()
    assert revision.commit == git("rev-parse", "main~1").strip()
    assert (repository / "code.py").read_text() == "VERSION = 'not committed'\n"
    assert (git("status", "--porcelain"), git("worktree", "list"), git("rev-parse", "HEAD")) == before


def test_revisions_that_cannot_be_measured(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--rev 'nowhere': there is no such revision"):
        find_revision("nowhere", repository)
    with pytest.raises(ConfigError, match="--rev '--help': there is no such revision"):
        find_revision("--help", repository)
    with pytest.raises(ConfigError, match="is in no git repository"):
        find_revision("main", tmp_path)

    def compare(arm: str) -> None:
        compare_revisions(("main~1", "main"), replace(LIVE, arm=arm), command="", log=lambda _: None)

    with pytest.raises(ConfigError, match=r"main~1 \(.*\) has no fasttrain: name code of its own"):
        compare("eager")
    (repository / "fasttrain").mkdir()
    (repository / "fasttrain" / "__init__.py").touch()
    git = git_in(repository)
    git("add", ".")
    git("commit", "--quiet", "--message", "three")
    with pytest.raises(ConfigError, match="is older than `bench`"):
        compare_revisions(("main", "main"), LIVE, command="", log=lambda _: None)


def test_each_revision_runs_in_a_folder_of_its_own_code(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[str]] = {}
    caches: set[str] = set()

    class Runner(FakeCode):
        def __init__(self, variables: Mapping[str, str], *, folder: Path) -> None:
            assert variables["PYTHONPATH"] == str(folder)
            caches.add(variables["XDG_CACHE_HOME"])
            self._code = (folder / "code.py").read_text()
            super().__init__(500 if "one" in self._code else 400)

        def __call__(self, task: ArmTask) -> AbstractContextManager[FakeProcess]:
            seen.setdefault(self._code, set()).add(task.source)
            return super().__call__(task)

    monkeypatch.setattr("fasttrain.measure.verdict.revisions.ArmRunner", Runner)
    monkeypatch.setattr("fasttrain.measure.verdict.revisions.Machine", lambda _: QuietMachine())
    live = replace(LIVE, arm="code:make_arm")
    found, _ = compare_revisions(("main~1", "main"), live, command="", log=lambda _: None)
    assert found.outcome == "FASTER"
    assert seen == {"VERSION = 'one'\n": {"textbook", "code:make_arm"}, "VERSION = 'two'\n": {"code:make_arm"}}
    assert len(caches) == 2, "no revision runs what the other one compiled"


@pytest.fixture
def measurable(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose second revision is slower; no process is run."""

    class Runner(FakeCode):
        def __init__(self, variables: Mapping[str, str], *, folder: Path) -> None:
            super().__init__(400 if "one" in (folder / "code.py").read_text() else 500)

    monkeypatch.setattr("fasttrain.measure.verdict.revisions.ArmRunner", Runner)
    monkeypatch.setattr("fasttrain.measure.verdict.revisions.Machine", lambda _: QuietMachine())
    return repository


LIVE_COMMAND = ["compare", "--rev", "main~1", "main", "--arm", "code:make_arm"]


def test_what_was_measured_is_kept_and_compares_the_same(
    measurable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "new" / "live.json", tmp_path / "page.html"
    assert main([*LIVE_COMMAND, "--out", str(out), "--json", "--html", str(page)]) == 1
    printed = capsys.readouterr()
    live = strict_json(printed.out)
    assert f"written: {out}" in printed.err
    assert "SLOWER" in page.read_text(encoding="utf-8")
    assert main(["compare", str(out), "--json"]) == 1
    stored = strict_json(capsys.readouterr().out)
    assert live["verdict"] == "SLOWER"
    assert live["timing"]["pairs"][0]["speedup"] == pytest.approx(0.8)
    differing = {name for name in live if live[name] != stored[name]}
    assert differing == {"a", "b", "command"}
    assert stored["a"] == {**live["a"], "source": str(out)}
    assert stored["command"] == f"python -m fasttrain compare {out} --json"
    assert main([*LIVE_COMMAND, "--out", str(out)]) == 1, "an older record makes room, as bench's does"


def test_a_record_that_cannot_be_kept_is_refused_before_anything_is_measured(
    measurable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: object, **__: object) -> None:
        raise AssertionError("nothing is to be measured")

    monkeypatch.setattr("fasttrain.measure.verdict.revisions.measure_revisions", measure)
    (tmp_path / "file").touch()
    both = str(tmp_path / "both")
    for options, said in (
        (["--out", str(tmp_path)], f"{tmp_path}: is a folder: name a file"),
        (["--out", str(tmp_path / "file" / "live.json")], "is no folder"),
        (["--out", both, "--html", both], "--out and --html are both"),
    ):
        assert main([*LIVE_COMMAND, *options]) == 2
        assert said in capsys.readouterr().err
    assert main(["compare", "a.json", "b.json", "--out", both]) == 2
    assert "--out keeps what --rev measures" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full, which is a disk without room")
def test_verdict_and_page_are_there_though_the_record_finds_no_room(
    measurable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert main([*LIVE_COMMAND, "--out", "/dev/full", "--html", str(page)]) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith("SLOWER")
    assert "the record cannot be written: No space left on device" in printed.err
    assert "SLOWER" in page.read_text(encoding="utf-8")


def test_an_interrupt_while_it_is_told_costs_no_record(
    measurable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fasttrain.commands.compare.print_line", interrupt)
    options = Compare(rev=("main~1", "main"), arm="code:make_arm", out=tmp_path / "live.json")
    with pytest.raises(KeyboardInterrupt):
        options.execute([])
    monkeypatch.undo()
    assert main(["compare", str(tmp_path / "live.json")]) == 1


def test_files_that_hold_no_two_revisions(measurable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = stored(tmp_path / "bench.json", {"eager": arm(500), "auto": arm(400)})
    live = tmp_path / "live.json"
    assert main([*LIVE_COMMAND, "--out", str(live)]) == 1
    content = json.loads(live.read_text())
    for name, changes in (
        ("newer", {"schema_version": 2}),
        ("twice", {"revisions": content["revisions"][:1] * 2}),
        ("strange", {"revisions": [{**each, "label": "x" + each["label"]} for each in content["revisions"]]}),
        ("empty", {"bench": None}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps({**content, **changes}))
    capsys.readouterr()
    for arguments, said in (
        (["bench.json"], "bench.json: is a record of kind 'bench', not of two revisions: give two files or arms"),
        (["newer.json"], "newer.json: is not a record of two revisions of schema version 1"),
        (["twice.json"], "twice.json: needs two revisions, each with an arm of its own"),
        (["strange.json"], "strange.json: needs two revisions, each with an arm of its own"),
        (["empty.json"], "empty.json: the record, 'bench' must be an object"),
        (["live.json", str(bench)], "live.json holds two revisions, which are A and B: give the file alone"),
        (["live.json", "--through", "textbook"], "a record of two revisions is compared alone"),
    ):
        assert main(["compare", str(tmp_path / arguments[0]), *arguments[1:]]) == 2
        assert said in capsys.readouterr().err
