"""The folder of a run: made, filled, read again, and taken away when the run fails."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.errors import RunError
from fasttrain.history import EpochRow, History
from fasttrain.run.folder import RunFolder

ROWS = [
    EpochRow(epoch=1, split=split, loss=0.1, accuracy=None, lr=1e-3, samples=8, seconds=0.5, samples_per_s=16.0)
    for split in ("train", "val")
]

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", "reviews")


@pytest.fixture(scope="module")
def kept_folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return RunFolder.create(tmp_path_factory.mktemp("kept") / "run", "reviews")


def test_default_names_tell_date_time_and_workload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = [RunFolder.create(None, "reviews").path for _ in range(3)]  # at least two of them within one second
    assert len(set(found)) == 3
    for path in found:
        assert path.parent == Path("runs")
        assert re.fullmatch(r"\d{8}-\d{6}-reviews(-\d+)?", path.name)


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_what_exists_is_neither_used_nor_removed(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "run")
    with pytest.raises(RunError, match="run exists already"):
        RunFolder.create(tmp_path / "run", "reviews")
    assert (tmp_path / "run").exists()


def test_a_folder_under_a_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="run cannot be made: Not a directory"):
        RunFolder.create(tmp_path / "file" / "run", "reviews")


def test_parents_are_taken_away_when_the_folder_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be made: File name too long"):
        RunFolder.create(tmp_path / "new" / "newer" / ("x" * 300), "reviews")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_run_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with RunFolder.create(tmp_path / "new" / "newer" / "run", "reviews") as folder:
            folder.write_text("report.html", "half a report")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_leaves_what_others_put_beside_it(tmp_path: Path) -> None:
    def fail() -> None:
        with RunFolder.create(tmp_path / "runs" / "mine", "reviews"):
            (tmp_path / "runs" / "theirs").mkdir()
            raise ValueError("failed")

    with pytest.raises(ValueError, match="failed"):
        fail()
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == [Path("runs"), Path("runs/theirs")]


def test_a_failure_keeps_the_folder_of_an_earlier_run(folder: RunFolder) -> None:
    folder.write_json("config.json", {})
    with pytest.raises(ValueError, match="failed"), RunFolder.open(folder.path):
        raise ValueError("failed")
    assert (folder.path / "config.json").exists()


def test_a_run_that_ends_well_keeps_its_folder(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", "reviews") as folder:
        folder.write_text("report.html", "<p>a report")
    assert (tmp_path / "run" / "report.html").read_text() == "<p>a report"


def test_only_the_folder_of_a_run_opens(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="none is not a folder"):
        RunFolder.open(tmp_path / "none")
    with pytest.raises(RunError, match=r"it has no config\.json"):
        RunFolder.open(tmp_path)


@given(content=st.dictionaries(st.text(max_size=3), plain, max_size=4))
@settings(deadline=None, max_examples=50)
def test_json_comes_back_and_is_strict(kept_folder: RunFolder, content: dict[str, Any]) -> None:
    kept_folder.write_json("some.json", content)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    strict = json.loads((kept_folder.path / "some.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert strict == kept_folder.read_json("some.json") == without_infinities(content)


def without_infinities(node: Any) -> Any:
    if isinstance(node, float):
        return node if math.isfinite(node) else None
    if isinstance(node, dict):
        return {key: without_infinities(value) for key, value in node.items()}
    return [without_infinities(value) for value in node] if isinstance(node, list) else node


@pytest.mark.parametrize("content", [b"", b'{"epochs": 1', b"[1]", b'"text"', b"\xff{}"])
def test_damaged_json_is_refused(folder: RunFolder, content: bytes) -> None:
    (folder.path / "config.json").write_bytes(content)
    with pytest.raises(RunError, match=r"config\.json"):
        folder.read_json("config.json")


def test_a_model_comes_back_bit_by_bit(folder: RunFolder) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).to(torch.bfloat16)
    state = {**model.state_dict(), "transposed": torch.arange(6).reshape(2, 3).t()}
    folder.write_model(state)
    read = folder.read_model()
    assert read.keys() == state.keys()
    for name, value in state.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value)


def test_a_damaged_or_missing_model_is_refused(folder: RunFolder) -> None:
    with pytest.raises(RunError, match=r"model\.safetensors cannot be read"):
        folder.read_model()
    folder.write_model({"weight": torch.ones(3)})
    path = folder.path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"model\.safetensors cannot be read"):
        folder.read_model()


def test_a_checkpoint_comes_back(folder: RunFolder) -> None:
    folder.write_history(History(rows=ROWS))
    folder.write_checkpoint({"lr": 0.5, "weight": torch.ones(2)}, epoch=1)
    read = RunFolder(folder.path).read_checkpoint()
    assert read is not None
    assert (read.path.name, read.rows, read.tree["lr"]) == ("checkpoint-1.safetensors", ROWS, 0.5)
    assert torch.equal(read.tree["weight"], torch.ones(2))


def test_the_history_is_a_table_with_empty_cells_for_what_there_is_not(folder: RunFolder) -> None:
    folder.write_history(History(rows=ROWS))
    read = pd.read_csv(folder.path / "history.csv")
    assert list(read.columns) == ["epoch", "split", "loss", "accuracy", "lr", "samples", "seconds", "samples_per_s"]
    assert list(read["split"]) == ["train", "val"]
    assert read["accuracy"].isna().all()
    assert read["loss"].tolist() == [0.1, 0.1]


def test_the_history_of_no_epochs_has_its_header(folder: RunFolder) -> None:
    folder.write_history(History())
    assert (folder.path / "history.csv").read_text() == "epoch,split,loss,accuracy,lr,samples,seconds,samples_per_s\n"
