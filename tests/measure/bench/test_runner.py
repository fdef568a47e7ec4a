"""Fresh processes: what they leave, how they die, and the command that starts them all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fasttrain import cli
from fasttrain.measure.bench.record import read_record
from fasttrain.measure.bench.runner import BlockRunner, fresh_caches
from fasttrain.measure.bench.task import BlockTask
from tests.measure.bench.bench_fakes import FakeMachine

REPOSITORY = Path(__file__).parents[3]


def task(source: str) -> BlockTask:
    return BlockTask(source=source, workload="mlp", device="cpu", threads=1, reference=None)


def test_a_process_that_dies_leaves_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    died = BlockRunner({}, folder=REPOSITORY)(task("tests.measure.bench.user_arms:make_no_arm"))
    assert died.died == "exit code 1: ValueError: a bug of the user's own"
    assert "make_no_arm" in died.last_words


def test_a_process_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    assert BlockRunner({}, timeout_s=0.05)(task("textbook")).died == "it was ended after 0.05 s"


def test_compilers_find_an_empty_cache() -> None:
    with fresh_caches() as variables:
        folders = [Path(variables[name]) for name in ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR")]
        assert list(folders[0].iterdir()) == []
        assert folders[1].parent == folders[0]
    assert not folders[0].exists()


def test_bench_leaves_a_record_and_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fasttrain.commands.bench.Machine", lambda _: FakeMachine())
    design = ["--blocks", "1", "--timed-s", "0.05", "--warmup-s", "0", "--device", "cpu"]
    arms = ["--arms", "tuned", "--module", "tests.measure.bench.user_arms:make_wrong_arm"]
    assert cli.main(["bench", "--workload", "mlp", *arms, *design, "--json", "--markdown", "table.md"]) == 0
    record = read_record(tmp_path / "bench-mlp-cpu.json")
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "bench-mlp-cpu.json").read_text())
    assert list(record.arms) == ["tuned"]
    assert record.arms["tuned"].agreement is not None
    assert "leave the reference's" in record.refused["tests.measure.bench.user_arms:make_wrong_arm"]
    assert record.command.startswith("python -m fasttrain bench --workload mlp --arms tuned --module")
    assert "| tuned |" in (tmp_path / "table.md").read_text()
