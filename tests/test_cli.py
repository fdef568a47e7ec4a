"""The commands as a user types them: exit codes, what goes where, and the files of a run."""

from __future__ import annotations

import dataclasses
import io
import json
import mmap
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from fasttrain import DataError
from fasttrain.cli import main
from fasttrain.commands.info import Info
from fasttrain.commands.predict import Predict
from fasttrain.commands.train import Train
from fasttrain.history import rows_from_csv
from fasttrain.run.checkpoint import load_tree, save_tree
from fasttrain.run.config import TrainConfig
from fasttrain.workloads.generate import generate_reviews
from tests.commands import FILES, command, files_of, small, strict_json

SUMMARY = {
    *("test_loss", "test_accuracy", "best_epoch", "epochs", "engine", "engine_reason", "device", "precision"),
    *("samples_per_s", "compile_s", "total_s", "vocabulary_size", "data_sha256", "versions", "workload", "stopped"),
    *("receipt", "threads", "threads_reason", "clean", "clean_reason"),
}
HISTORY = ["epoch", "split", "loss", "accuracy", "lr", "samples", "seconds", "samples_per_s"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.csv"
    generate_reviews(200, seed=1).table.to_csv(path, index=False)
    return path


# --- train ---


@pytest.mark.parametrize("arguments", [[], ["train"], ["--epochs", "2"]])
def test_without_a_table_reviews_are_generated_and_said_to_be(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = generate_reviews(400, seed=1337)
    monkeypatch.setattr("fasttrain.workloads.reviews.generate_reviews", lambda *, seed: few)
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 0
    stdout = capsys.readouterr().out
    assert f"These reviews are generated. The best possible accuracy on these very test rows is " \
        f"{few.best_accuracy('test'):.2f}%." in stdout  # fmt: skip
    [run] = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-reviews", run.name)
    assert f"open runs/{run.name}/report.html" in stdout


def test_train_tells_its_result_on_stdout_and_its_progress_on_stderr(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(small(data, tmp_path / "run", "--epochs", "2")) == 0
    captured = capsys.readouterr()
    assert re.search(r"^test loss \d\.\d{4}, test accuracy \d+\.\d\d%$", captured.out, re.MULTILINE)
    assert re.search(r"^positive: \w+( [\w.,!<>]+){19}$", captured.out, re.MULTILINE)
    assert f"run: {tmp_path / 'run'}" in captured.out
    lines = captured.err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]


def test_json_is_the_whole_of_stdout(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(small(data, tmp_path / "run", "--epochs", "2", "--json")) == 0
    document = strict_json(capsys.readouterr().out)
    assert document.keys() == SUMMARY | {"run", "notes"}
    assert document["run"] == str(tmp_path / "run")
    stored = strict_json((tmp_path / "run" / "summary.json").read_text())
    assert {name: document[name] for name in stored} == stored


def test_json_stays_json_when_the_loss_is_not_a_number(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = small(data, tmp_path / "run", "--epochs", "1", "--learning-rate", "1e38", "--json")
    assert main(arguments) == 0
    assert strict_json(capsys.readouterr().out)["test_loss"] is None


def test_a_run_leaves_its_files(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(small(data, run, "--epochs", "3")) == 0
    assert files_of(run) == FILES

    config = strict_json((run / "config.json").read_text())
    assert TrainConfig.from_dict(config) == TrainConfig(
        data=data, out=run, epochs=3, cutoff=5, batch_size=16, device="cpu"
    )

    history = pd.read_csv(run / "history.csv")
    assert list(history.columns) == HISTORY
    assert list(history["epoch"]) == [1, 1, 2, 2, 3, 3]
    assert list(history["split"]) == ["train", "val"] * 3
    assert set(history["samples"]) == {128, 30}  # 140 train rows make 8 whole batches of 16
    assert history["accuracy"].between(0, 100).all()

    summary = strict_json((run / "summary.json").read_text())
    assert summary.keys() == SUMMARY
    assert (summary["epochs"], summary["engine"], summary["precision"]) == (3, "eager", "fp32")
    assert summary["best_epoch"] in (1, 2, 3)
    assert summary["compile_s"] is None
    assert summary["versions"]["torch"] == str(torch.__version__)

    vectorizer = strict_json((run / "vectorizer.json").read_text())
    assert vectorizer.pop("clean") == summary["clean"] == "unicode"
    assert vectorizer.keys() == {"review_vocab", "rating_vocab"}
    assert all(each.keys() == {"token_to_idx", "add_unk", "unk_token"} for each in vectorizer.values())
    assert vectorizer["review_vocab"]["token_to_idx"]["<UNK>"] == 0
    assert vectorizer["rating_vocab"]["token_to_idx"] == {"negative": 0, "positive": 1}

    model = load_file(run / "model.safetensors")
    assert {name: tuple(value.shape) for name, value in model.items()} == {
        "fc1.weight": (1, summary["vocabulary_size"]),
        "fc1.bias": (1,),
    }
    assert "<svg" in (run / "report.html").read_text()


# --- resume ---


@pytest.mark.parametrize("reached", [1, 3, 4, 5, 6])
def test_a_resumed_run_equals_a_straight_one(reached: int, data: Path, tmp_path: Path) -> None:
    # At this learning rate the validation loss soon rises: the schedule has to be resumed as well, wherever it stands.
    options = ("--learning-rate", "0.5", "--patience", "20")
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert main(small(data, straight, *options, "--epochs", "12")) == 0
    assert main(small(data, resumed, *options, "--epochs", str(reached))) == 0
    assert main(["--resume", str(resumed), "--epochs", "12"]) == 0
    expected, found = (pd.read_csv(run / "history.csv")[HISTORY[:6]] for run in (straight, resumed))
    assert expected["lr"].nunique() > 2
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    assert (resumed / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    summaries = [strict_json((run / "summary.json").read_text()) for run in (straight, resumed)]
    for name in ("best_epoch", "epochs", "test_loss", "test_accuracy", "stopped"):
        assert summaries[0][name] == summaries[1][name]


def test_a_run_can_be_resumed_to_the_default_number_of_epochs(data: Path, tmp_path: Path) -> None:
    default = TrainConfig().epochs
    assert main(small(data, tmp_path / "run", "--epochs", "1", "--patience", "1000")) == 0
    assert main(["--resume", str(tmp_path / "run"), "--epochs", str(default)]) == 0
    assert strict_json((tmp_path / "run" / "summary.json").read_text())["epochs"] == default


def test_a_finished_run_that_is_resumed_stays_as_it_is(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(small(data, run, "--epochs", "3")) == 0
    before = {name: (run / name).read_bytes() for name in ("history.csv", "model.safetensors", "config.json")}
    assert main(["--resume", str(run)]) == 0
    assert {name: (run / name).read_bytes() for name in before} == before


# --- predict ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    generate_reviews(1000, seed=1).table.to_csv(folder / "reviews.csv", index=False)
    threads = torch.get_num_threads()
    assert main(small(folder / "reviews.csv", folder / "run", "--epochs", "20", "--learning-rate", "0.01")) == 0
    torch.set_num_threads(threads)
    return folder / "run"


def predicted(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> Any:
    assert main(["predict", *arguments, "--json"]) == 0
    return strict_json(capsys.readouterr().out)


def test_predict_rates_arguments(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["Great, delicious and friendly!", "Horrible. Rude and bland."]
    assert main(["predict", str(trained), *texts]) == 0
    stdout = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"positive  \d\d\.\d%  Great, delicious and friendly!", stdout[0])
    assert re.fullmatch(r"    known words: .*\bgreat\b.*", stdout[1])
    assert stdout[2].startswith("negative")
    assert len(stdout) == 4


def test_predict_rates_lines_of_stdin(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("great food\n\nbad food\r\nlast line"))
    found = predicted([str(trained)], capsys)
    assert [each["text"] for each in found] == ["great food", "", "bad food", "last line"]
    assert found[0].keys() == {"text", "rating", "probability", "known_words"}
    assert found[0] == predicted([str(trained), "great food"], capsys)[0]
    assert (found[1]["known_words"], found[0]["rating"], found[2]["rating"]) == ([], "positive", "negative")


def test_predict_takes_tokens_as_they_are(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predicted([str(trained), "GREAT!"], capsys)[0]["known_words"] == ["great"]
    for options in (["--raw"], ["--clean", "none"], ["--raw", "--clean", "none"]):
        assert predicted([str(trained), "GREAT!", *options], capsys)[0]["known_words"] == []
    assert main(["predict", str(trained), "GREAT!", "--raw", "--clean", "book"]) == 2
    assert "--raw is the same as --clean none" in capsys.readouterr().err


def test_predict_says_where_text_in_tokens_is_wanted(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(small(data, run, "--epochs", "1", "--clean", "none")) == 0
    assert "\nclean none: asked for: tokens are what stands between spaces\n" in capsys.readouterr().out
    assert main(["predict", str(run), "GREAT food!", "--json"]) == 0
    captured = capsys.readouterr()
    assert strict_json(captured.out)[0]["known_words"] == []
    assert re.fullmatch(r"note: .* 1 of 1 texts have words .* --clean unicode does that\n", captured.err)
    assert main(["predict", str(run), "great food", "--json"]) == 0
    assert capsys.readouterr().err == ""


def make_old(run: Path) -> None:
    """Gives a run the files of a version without manifests."""
    [checkpoint] = run.glob("checkpoint-*.safetensors")
    tree = load_tree(checkpoint)
    rows = [dataclasses.asdict(row) for row in rows_from_csv((run / "history.csv").read_text())]
    tree["history"] = {"rows": rows, **tree["history"], "stopped": "epochs"}
    save_tree(run / "checkpoint.safetensors", tree)
    for path in (checkpoint, checkpoint.with_suffix(".json"), run / "manifest.json"):
        path.unlink()


def test_a_run_of_a_version_without_manifests_is_resumed_with_a_note(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, straight = tmp_path / "old", tmp_path / "straight"
    assert main(small(data, old, "--epochs", "1")) == 0
    make_old(old)
    assert main(["predict", str(old), "great food"]) == 0
    assert "has no manifest.json: damaged files cannot be recognized" in capsys.readouterr().err
    assert main(["--resume", str(old), "--epochs", "3"]) == 0
    assert "has no manifest: damaged files cannot be recognized" in capsys.readouterr().out
    assert files_of(old) == FILES
    assert main(small(data, straight, "--epochs", "3")) == 0
    assert (old / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


def test_a_run_of_a_version_that_did_not_clean_is_resumed_without_cleaning(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, run = tmp_path / "raw.csv", tmp_path / "run"
    table = pd.read_csv(data)
    table.assign(review=table["review"].str.upper()).to_csv(raw, index=False)
    assert main(small(raw, run, "--epochs", "1", "--clean", "none")) == 0
    config = strict_json((run / "config.json").read_text())
    del config["clean"]
    (run / "config.json").write_text(json.dumps(config))
    words = strict_json((run / "vectorizer.json").read_text())
    make_old(run)
    assert main(["--resume", str(run), "--epochs", "2"]) == 0
    assert strict_json((run / "vectorizer.json").read_text()) == words
    assert "GREAT" in words["review_vocab"]["token_to_idx"]


def test_predict_says_when_it_knows_no_word(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(trained), "qwertz"]) == 0
    assert "known words: none: the rating is the model's bias alone" in capsys.readouterr().out


def test_predict_refuses_stdin_that_is_not_utf_8(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"great food\ntr\xe8s bon\n"), encoding="utf-8"))
    assert main(["predict", str(trained)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"fasttrain: .*UTF-8.*\n", captured.err)


# --- info, help, usage ---


def test_info_is_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert main(["info", "--device", "cpu", "--json"]) == 0
    document = strict_json(capsys.readouterr().out)
    assert [re.split(" {2,}", line)[0] for line in lines] == list(document)


def help_of(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_command_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of([], capsys)
    assert all(name in text for name in ("train", "predict", "info", "reviews are generated"))
    commands = {"train": (TrainConfig, Train), "predict": (Predict,), "info": (Info,)}
    for name, options in commands.items():
        text = help_of([name], capsys)
        fields = {field.name for each in options for field in dataclasses.fields(each)} - {"config", "run", "text"}
        missing = [field for field in fields if f"--{field.replace('_', '-')}" not in text]
        assert not missing, missing
        assert "--config" not in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["retrain"], "retrain"),
        (["train", "--engine", "warp"], "eager"),
        (["train", "--precision", "int8"], "bf16"),
        (["train", "--epochs", "many"], "--epochs"),
        (["train", "--epochs", "1.5"], "--epochs"),
        (["train", "--learning-rate"], "--learning-rate"),
        (["train", "--momentum", "0.9"], "--momentum"),
        (["--engine", "warp"], "eager"),
        (["predict"], "predict"),
        (["info", "now"], "now"),
    ],
)
def test_wrong_usage_is_explained(
    arguments: list[str],
    named: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert named in captured.err
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


# --- what goes wrong, whatever the command ---


def run_as(monkeypatch: pytest.MonkeyPatch, execute: Callable[[], int]) -> int:
    monkeypatch.setattr("fasttrain.cli._parse", lambda _: SimpleNamespace(execute=lambda _: execute()))
    return main(["info"])


def test_an_error_that_quotes_a_file_moves_no_cursor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise DataError("no arm '\x1b[2J\r\ud800', but:\n  - é")

    assert run_as(monkeypatch, fail) == 2
    assert capsys.readouterr().err == "fasttrain: no arm '\\x1b[2J\\r\\ud800', but:\n  - é\n"


def test_output_that_cannot_be_encoded_is_no_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tell() -> int:
        "\ud800".encode()
        return 0

    assert run_as(monkeypatch, tell) == 2
    assert "surrogates not allowed" in capsys.readouterr().err


CLOSED_EARLY = """
import sys
from types import SimpleNamespace
from fasttrain import cli
from fasttrain.commands.shared import print_line

def execute(_):
    for _ in range(int(sys.argv[1])):
        print_line("a line")
    print("went on", file=sys.stderr)
    return 3

cli._parse = lambda _: SimpleNamespace(execute=execute)
input()
sys.exit(cli.main([]))
"""


@pytest.mark.parametrize("num_lines", [1, 10_000])
def test_a_command_goes_on_to_its_verdict_when_its_reader_has_left(num_lines: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CLOSED_EARLY, str(num_lines)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.stderr.read() == b"went on\n"
        assert process.wait(60) == 3


STREAMS = [
    ("predict", "<&-", 2, "there is no text: stdin is closed; give the text as arguments"),
    ("predict", ">&-", 0, None),
    ("predict", ">/dev/full", 2, "stdout cannot be written: No space left on device"),
    ("train", ">/dev/full", 2, "stdout cannot be written: No space left on device"),
    ("train", "<&- 2>&-", 0, None),
    ("train", "2>/dev/full", 0, None),
]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(("name", "redirection", "code", "message"), STREAMS)
def test_a_stream_that_is_closed_or_full_is_no_traceback(
    name: str, redirection: str, code: int, message: str | None, trained: Path, tmp_path: Path
) -> None:
    texts = [] if "<" in redirection else ["great food"]
    run = tmp_path / "run"
    arguments = {
        "predict": ["predict", str(trained), *texts],
        "train": small(trained.parent / "reviews.csv", run, "--epochs", "1", "--engine", "eager"),
    }[name]
    done = subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", sys.executable, "-m", "fasttrain", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code
    errors = [line for line in done.stderr.splitlines() if not line.startswith("epoch ")]
    assert errors == ([] if message is None else [f"fasttrain: {message}"])
    if name == "train":
        assert files_of(run) == FILES


def can_mount() -> bool:
    if shutil.which("unshare") is None or mmap.PAGESIZE != 4096:  # the sizes below are in pages of 4 KiB
        return False
    arguments = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=16k", "none", "/tmp"]
    return subprocess.run(arguments, capture_output=True, check=False, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("kib", "code", "told", "missing"),
    [
        (40, 2, "what the run has reached is kept; go on with --resume", {"model.safetensors", "summary.json"}),
        (64, 0, "The run is complete, but it has no report", set[str]()),
    ],
)
def test_a_full_disk_takes_nothing_away(
    kib: int, code: int, told: str, missing: set[str], data: Path, tmp_path: Path
) -> None:
    if not can_mount():
        pytest.skip("needs unshare and the right to mount a tmpfs")
    disk = tmp_path / "disk"
    disk.mkdir()
    # In a mount namespace of its own: the disk goes away with the command.
    script = f'mount -t tmpfs -o size={kib}k none "$0" && "$@"; code=$?; ls "$0/run"; exit $code'
    arguments = small(data, disk / "run", "--epochs", "3", "--engine", "eager")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, str(disk), sys.executable, "-m", "fasttrain", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code
    assert told in done.stdout + done.stderr
    files = {re.sub(r"^checkpoint-\d+", "checkpoint", line) for line in done.stdout.splitlines()}
    assert FILES - missing - {"report.html"} <= files


def test_a_run_is_resumed_with_its_table_under_another_path(data: Path, tmp_path: Path) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved.csv"
    assert main(small(data, run, "--epochs", "1")) == 0
    data.rename(moved)
    assert main(["--resume", str(run), "--epochs", "2"]) == 2
    assert main(["--resume", str(run), "--epochs", "2", "--data", str(moved)]) == 0
    assert main(["--resume", str(run), "--epochs", "3"]) == 0


def test_the_module_runs_as_a_command(trained: Path) -> None:
    with command("predict", str(trained), "--json") as process:
        stdout, stderr = process.communicate("great food\n", timeout=60)
    assert (process.returncode, stderr) == (0, "")
    assert [each["rating"] for each in strict_json(stdout)] == ["positive"]
