"""Bad input ends in one clear line, exit code 2, and no file touched.

Every message is kept in bad_input.md, as a user sees it; `python -m tests.test_bad_input` writes that table anew.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from fasttrain.cli import main
from fasttrain.errors import DataError
from tests.bad_input_cases import ACCEPTED, GOOD, REFUSED, Case, train

GOLDEN = Path(__file__).with_name("bad_input.md")


@dataclass(frozen=True)
class Outcome:
    exit_code: int
    stdout: str
    stderr: str


def run_case(case: Case, folder: Path, run: Path) -> Outcome:
    """Runs the command and checks that a refusal touches no file."""
    arguments = case.make(folder, run)
    before = contents(folder)
    stdout, stderr = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch:
        case.patch(monkeypatch)
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            exit_code = main(arguments)
    if exit_code != 0:
        assert contents(folder) == before
    shown = stderr.getvalue().encode("utf-8", "backslashreplace").decode()  # as Python's own stderr shows it
    return Outcome(exit_code, stdout.getvalue(), shown.replace(f"{folder}/", "").replace(str(folder), "."))


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Every file below a folder, with its bytes where they may be read."""
    readable = os.geteuid() == 0
    return {
        path: path.read_bytes() if path.is_file() and (readable or os.access(path, os.R_OK)) else None
        for path in folder.rglob("*")
    }


def refusal(case: Case, outcome: Outcome) -> str:
    """The message without what a library adds, after a check of its form."""
    assert outcome.exit_code == 2, outcome
    assert outcome.stdout == ""
    assert outcome.stderr.startswith("fasttrain: ")
    assert outcome.stderr.count("\n") == 1, outcome.stderr
    return re.sub(case.library, "…", outcome.stderr.strip().replace("x" * 300, "xxx…"))


def notes(outcome: Outcome) -> str:
    """What the user of an accepted table is told."""
    assert outcome.exit_code == 0, outcome
    found = [line for line in outcome.stdout.splitlines() if line.startswith("note: ")]
    return "; ".join(found)


def golden_text(messages: Mapping[str, str]) -> str:
    lines = [
        "# What a user sees",
        "",
        "Made by `python -m tests.test_bad_input`. A … stands for a library's own words.",
    ]
    for title, cases in (("Refused, with exit code 2", REFUSED), ("Accepted, with a note", ACCEPTED)):
        lines += ["", f"## {title}", "", "| case | what the user did | message |", "|---|---|---|"]
        lines += [row(name, case.did, messages[name]) for name, case in cases.items()]
    return "\n".join(lines) + "\n"


def row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("trained"))


def trained(folder: Path) -> Path:
    # Its options are not the defaults, so that a resumed run can differ from both.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(train(folder)) == 0
    return folder / "runs" / "mine"


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path, run: Path) -> None:
    case = REFUSED[name]
    message = refusal(case, run_case(case, tmp_path, run))
    assert row(name, case.did, message) in GOLDEN.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_with_a_note(name: str, tmp_path: Path, run: Path) -> None:
    case = ACCEPTED[name]
    message = notes(run_case(case, tmp_path, run))
    assert row(name, case.did, message) in GOLDEN.read_text(encoding="utf-8").splitlines()
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()


def test_a_misnamed_table_is_refused_though_its_content_was_read_before(tmp_path: Path) -> None:
    well_named, misnamed = tmp_path / "mine.csv", tmp_path / "mine.csv.gz"
    for path in (well_named, misnamed):
        path.write_text(GOOD)
    assert main(train(tmp_path, data=well_named)) == 0
    assert main(train(tmp_path, "--out", str(tmp_path / "again"), data=misnamed)) == 2


def test_golden_table_has_these_cases_and_no_others() -> None:
    lines = GOLDEN.read_text(encoding="utf-8").splitlines()
    found = [
        line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ") and "| message |" not in line
    ]
    assert found == [*REFUSED, *ACCEPTED]


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        main(train(tmp_path, "--debug", data=tmp_path / "no.csv"))
    assert list(tmp_path.iterdir()) == []


AFTER_A_CHECKPOINT = ("manifest.json", "model.safetensors", "summary.json")


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "vectorizer.json", "history.csv", "checkpoint-1.safetensors", "checkpoint-1.json"),
        *AFTER_A_CHECKPOINT,
    ],
)
def test_a_disk_that_fills_up_leaves_a_folder_only_once_a_checkpoint_is_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = train(tmp_path)
    before = contents(tmp_path)
    for method in ("write_bytes", "write_text"):
        monkeypatch.setattr(Path, method, full_at(name, getattr(Path, method)))
    assert main(arguments) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("fasttrain: ")]
    assert errors[0].endswith(f"{name} cannot be written: No space left on device")
    assert captured.out == ""
    if name not in AFTER_A_CHECKPOINT:
        assert contents(tmp_path) == before
        return
    run = tmp_path / "runs" / "mine"
    assert errors[1] == f"fasttrain: what the run has reached is kept; go on with --resume {run}"
    monkeypatch.undo()
    assert main(["--resume", str(run)]) == 0
    assert main(["predict", str(run), "a meal"]) == 0


def test_a_report_that_cannot_be_written_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = train(tmp_path)
    monkeypatch.setattr(Path, "write_bytes", full_at("report.html", Path.write_bytes))
    assert main(arguments) == 0
    note = "note: The run is complete, but it has no report: .*report.html cannot be written: No space left on device."
    assert re.search(note, capsys.readouterr().out)
    assert main(["predict", str(tmp_path / "runs" / "mine"), "a meal"]) == 0


def full_at(name: str, write: Callable[..., int]) -> Callable[..., int]:
    """A method of `Path` that writes half of that file, and then finds the disk full."""

    def replacement(path: Path, content: str | bytes, **options: str) -> int:
        if name not in path.name:
            return write(path, content, **options)
        write(path, content[: len(content) // 2], **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return replacement


def rewrite_golden() -> None:
    messages: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["XDG_CACHE_HOME"] = f"{temporary}/cache"
        (Path(temporary) / "trained").mkdir()
        run = trained(Path(temporary) / "trained")
        for number, (name, case) in enumerate({**REFUSED, **ACCEPTED}.items()):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            outcome = run_case(case, folder, run)
            messages[name] = refusal(case, outcome) if name in REFUSED else notes(outcome)
    GOLDEN.write_text(golden_text(messages), encoding="utf-8")
    print(f"{len(messages)} messages written to {GOLDEN}", file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    rewrite_golden()
