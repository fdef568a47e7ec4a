"""Ctrl-C: what was reached is saved, and nothing else is left."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pandas as pd
import pytest

from fasttrain.cli import main
from fasttrain.commands import train
from fasttrain.workloads.generate import generate_reviews
from tests.commands import FILES, command, files_of, small, strict_json


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.csv"
    generate_reviews(200, seed=1).table.to_csv(path, index=False)
    return path


def test_ctrl_c_in_training_saves_what_was_reached(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with command(*small(data, run, "--epochs", "1000000", "--patience", "1000000")) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("epoch 1/")
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert f"go on with --resume {run}" in stdout
    assert files_of(run) == FILES
    summary = strict_json((run / "summary.json").read_text())
    reached = summary["epochs"]
    assert summary["stopped"] == "interrupted"
    assert pd.read_csv(run / "history.csv")["epoch"].max() == reached
    assert main(["--resume", str(run), "--epochs", str(reached + 2)]) == 0
    assert list(pd.read_csv(run / "history.csv")["epoch"].unique()) == list(range(1, reached + 3))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_ctrl_c_while_loading_leaves_no_folder(tmp_path: Path) -> None:
    pipe = tmp_path / "reviews.csv"
    os.mkfifo(pipe)
    with command(*small(pipe, tmp_path / "new" / "run")) as process, pipe.open("wb"):  # opens when the command reads
        assert (tmp_path / "new" / "run").is_dir()
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (stdout, stderr) == ("", "fasttrain: interrupted\n")
    assert list(tmp_path.iterdir()) == [pipe]


class PressesCtrlC:
    """A stream that sends this process a SIGINT when a line of it says so."""

    def __init__(self, line: str, times: int = 1) -> None:
        self.line, self.times = line, times

    def write(self, text: str) -> int:
        if text.startswith(self.line):
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)
        return len(text)

    def flush(self) -> None:
        """Nothing is kept back."""

    def isatty(self) -> bool:
        return False


def test_ctrl_c_ends_after_the_current_step(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", PressesCtrlC("epoch 2/"))
    handler = signal.getsignal(signal.SIGINT)
    assert main(small(data, tmp_path / "run", "--epochs", "50")) == 130
    assert strict_json((tmp_path / "run" / "summary.json").read_text())["epochs"] == 2
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_before_the_first_epoch_is_over_leaves_a_run_that_can_be_resumed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_once(interrupt: train._Interrupt) -> None:
        interrupt.check = check  # type: ignore[method-assign]

    def check() -> None:
        raise train.Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(train._Interrupt, "__init__", at_once)
        assert main(small(data, tmp_path / "run", "--epochs", "2")) == 130
    summary = strict_json((tmp_path / "run" / "summary.json").read_text())
    assert (summary["epochs"], summary["best_epoch"], summary["samples_per_s"]) == (0, None, None)
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert main(small(data, tmp_path / "straight", "--epochs", "2")) == 0
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "straight")]
    assert models[0] == models[1]


def test_a_second_ctrl_c_keeps_an_earlier_run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    assert main(small(data, run, "--epochs", "2")) == 0
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.name != "config.json"}
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", PressesCtrlC("epoch 3/", times=2))
        assert main(["--resume", str(run), "--epochs", "9"]) == 130
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.name != "config.json"} == before
