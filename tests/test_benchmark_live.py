"""What `benchmarks.live` tells of comparisons of a revision with itself, and how it asks for them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import live
from benchmarks.records import read_record
from fasttrain.measure.verdict.revisions import Revision
from tests.measure.bench.bench_fakes import ENVIRONMENT

FOUND: dict[str, Any] = {
    "verdict": "SAME",
    "speedup": 1.01,
    "interval": [0.99, 1.02],
    "pairs": 7,
    "margin": 0.03,
    "reasons": [],
}


COMMIT = "a" * 40


def answers(monkeypatch: pytest.MonkeyPatch, *given: Any) -> list[list[str]]:
    """Has `compare` print these, one after the other; returns the commands that will have been run."""
    left = iter(given)
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        found = next(left)
        text = found if isinstance(found, str) else json.dumps(found)
        return subprocess.CompletedProcess(command, 3, stdout=text, stderr="it broke")

    monkeypatch.setattr(live.subprocess, "run", run)
    # Both run git.
    monkeypatch.setattr(live, "environment", lambda _: ENVIRONMENT)
    monkeypatch.setattr(live, "find_revision", lambda *_: Revision(name="HEAD", commit=COMMIT, repository=Path()))
    return asked


def test_the_verdicts_are_counted_and_every_estimate_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_one = {**FOUND, "verdict": "INCONCLUSIVE", "speedup": 0.98, "interval": [0.9, 1.05], "pairs": 14}
    asked = answers(monkeypatch, FOUND, open_one, {**FOUND, "verdict": "FASTER"})
    out = tmp_path / "live.json"
    assert live.main(["--comparisons", "3", "--blocks", "7", "--out", str(out)]) == 0
    record = read_record(out)
    assert record.series["speedup"].values == (1.01, 0.98, 1.01)
    assert record.series["interval, upper end"].values == (1.02, 1.05, 1.02)
    assert record.notes == [
        "of 3 comparisons: 1 FASTER, 0 SLOWER, 1 SAME, 1 INCONCLUSIVE",
        "margin 3.0%; 1 looked a second time, at twice the blocks",
    ]
    assert len(asked) == 3
    assert all(each[3:7] == ["compare", "--rev", COMMIT, COMMIT] for each in asked)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("", "ended with exit code 3: it broke"),
        ({**FOUND, "verdict": "NOT COMPARABLE", "reasons": ["other work"]}, "gave NOT COMPARABLE: other work"),
    ],
)
def test_a_comparison_without_a_verdict_ends_it_and_the_others_are_kept(
    given: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "live.json"
    answers(monkeypatch, given)
    assert live.main(["--out", str(out)]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()
    answers(monkeypatch, {**FOUND, "pairs": 14}, given)
    assert live.main(["--out", str(out)]) == 2
    record = read_record(out)
    assert record.series["speedup"].values == (1.01,)
    assert "1 looked a second time" in record.notes[1]
    assert said in record.notes[2]
