"""Ctrl-C, SIGTERM and SIGHUP: what was reached is saved, and nothing else is left."""

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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_training_saves_what_was_reached(number: int, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with command(*small(data, run, "--epochs", "1000000", "--patience", "1000000")) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("epoch 1/")
        process.send_signal(number)
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
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_loading_leaves_no_folder(number: int, tmp_path: Path) -> None:
    pipe = tmp_path / "reviews.csv"
    os.mkfifo(pipe)
    with command(*small(pipe, tmp_path / "new" / "run")) as process, pipe.open("wb"):  # opens when the command reads
        assert (tmp_path / "new" / "run").is_dir()
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (stdout, stderr) == ("", "fasttrain: interrupted\n")
    assert list(tmp_path.iterdir()) == [pipe]


class PressesCtrlC:
    """A stream that sends this process a SIGINT, or another signal, when a line of it says so."""

    def __init__(self, line: str, times: int = 1, number: int = signal.SIGINT) -> None:
        self.line, self.times, self.number = line, times, number

    def write(self, text: str) -> int:
        if text.startswith(self.line):
            for _ in range(self.times):
                signal.raise_signal(self.number)
        return len(text)

    def flush(self) -> None:
        """Nothing is kept back."""

    def isatty(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("number", "times"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 2), (signal.SIGHUP, 1)]
)
def test_a_signal_ends_training_after_the_current_step(
    number: int, times: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", PressesCtrlC("epoch 2/", times, number))
    handler = signal.getsignal(number)
    assert main(small(data, tmp_path / "run", "--epochs", "50")) == 130
    assert strict_json((tmp_path / "run" / "summary.json").read_text())["epochs"] == 2
    assert signal.getsignal(number) is handler


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_is_ignored_stays_ignored(
    number: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", PressesCtrlC("epoch 2/", number=number))
    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert main(small(data, tmp_path / "run", "--epochs", "3")) == 0
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("module", ["tyro", "torch"])
def test_ctrl_c_during_an_import_is_no_traceback(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # KeyboardInterrupt would vanish in this import, as it does in some of torch's.
    lines = ["import os, signal", "try:", "    os.kill(os.getpid(), signal.SIGINT)", "except BaseException: pass"]
    (tmp_path / f"{module}.py").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)  # `python -m` looks there first
    with command("train") as process:
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (130, "", "fasttrain: interrupted\n")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_run_that_is_killed_before_its_first_checkpoint_is_started_over(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe, run = tmp_path / "pipe.csv", tmp_path / "run"
    os.mkfifo(pipe)
    with command(*small(pipe, run, "--epochs", "2")) as process, pipe.open("wb"):  # opens when the command reads
        process.kill()
        process.communicate(timeout=30)
    assert {path.name for path in run.iterdir()} == {"config.json"}
    assert main(["predict", str(run), "a meal"]) == 2
    assert main(["--resume", str(run), "--data", str(data)]) == 0
    assert f"note: {run} has no checkpoint: the run starts over." in capsys.readouterr().out
    assert files_of(run) == FILES
    assert main(small(data, tmp_path / "straight", "--epochs", "2")) == 0
    models = [(folder / "model.safetensors").read_bytes() for folder in (run, tmp_path / "straight")]
    assert models[0] == models[1]


def test_two_processes_do_not_train_in_one_folder(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with command(*small(data, run, "--epochs", "1000000", "--patience", "1000000")) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("epoch 1/")
        assert main(["--resume", str(run), "--epochs", "2"]) == 2
        process.kill()
        process.communicate(timeout=30)
    assert capsys.readouterr().err == (
        f"fasttrain: {run} is in use: another process trains in it; wait until it ends\n"
    )
    assert main(["--resume", str(run), "--epochs", "2"]) == 0


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
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.suffix != ".json"}
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", PressesCtrlC("epoch 3/", times=2))
        assert main(["--resume", str(run), "--epochs", "9"]) == 130
    assert before.items() <= {path.name: path.read_bytes() for path in run.iterdir()}.items()
    assert main(["predict", str(run), "a meal"]) == 0
    assert main(["--resume", str(run)]) == 0
