"""Records of benchmarks survive the file, and files that are none are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain import DataError
from fasttrain.measure.bench.record import check_target, read_record, write_record
from fasttrain.measure.verdict.stats import Noise
from tests.measure.bench.bench_fakes import arm, figures, record

seconds = st.floats(1e-9, 1e6)
shares = st.floats(0, 1)
names = st.text(min_size=1, max_size=30).filter(lambda name: name.isprintable())


@given(
    arms=st.dictionaries(names, st.lists(seconds, min_size=1, max_size=4), min_size=1, max_size=3),
    refused=st.dictionaries(names, st.text(max_size=50)),
    noise=st.none()
    | st.builds(Noise, floor=st.floats(0, 1), smallest_effect=st.floats(0, 1), pairs=st.integers(7, 20)),
    flags=st.lists(st.sampled_from(["load", "throttled"]), max_size=2),
)
@settings(deadline=None)
def test_records_survive_the_file(
    arms: dict[str, list[float]],
    refused: dict[str, str],
    noise: Noise | None,
    flags: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    repeated = (figures(0, 1.0, flags=tuple(flags), repeats=1, engine="eager: why", runnable=3, peak_bytes=None),)
    made = {name: arm(*steps, repeated=repeated, agreement=None) for name, steps in arms.items()}
    written = record(made, refused=refused, noise=noise, notes=("a note",))
    path = tmp_path_factory.getbasetemp() / "folder" / "record.json"
    write_record(written, path)
    assert read_record(path) == written


DAMAGES: list[tuple[list[Any], Any, str]] = [
    (["schema_version"], 1, "schema version 3"),
    (["schema_version"], None, "schema version 3"),
    (["kind"], "profile", "kind 'profile'"),
    (["arms"], [], "'arms' must be an object"),
    (["arms", "fast"], 3, "must be an object"),
    (["arms", "fast", "blocks"], [], "needs blocks"),
    (["arms", "fast", "blocks", 1, "block"], 0, "needs blocks in order"),
    (["arms", "fast", "blocks", 0, "step_s"], 0.0, "positive"),
    (["arms", "fast", "blocks", 0, "step_s"], -1.0, "positive"),
    (["arms", "fast", "blocks", 0, "step_s"], "0.1", "positive"),
    (["arms", "fast", "blocks", 0, "step_s"], True, "positive"),
    (["arms", "fast", "blocks", 0, "step_s"], float("nan"), "positive"),
    (["arms", "fast", "blocks", 0, "step_s"], float("inf"), "positive"),
    (["arms", "fast", "blocks", 0, "step_s"], 10**400, "positive"),
    (["arms", "fast", "blocks", 0, "steps"], 1.5, "whole number"),
    (["arms", "fast", "blocks", 0, "samples_per_step"], 0, "whole number, 1 or more"),
    (["arms", "fast", "blocks", 0, "peak_bytes"], 10**400, "a huge number"),
    (["arms", "fast", "blocks", 0, "flags"], "load", "must be a list"),
    (["arms", "fast", "blocks", 0, "flags"], [3], "must be text"),
    (["arms", "fast", "agreement"], "close", "number"),
    (["refused"], {"jax": ["<script>"]}, "must be text"),
    (["refused"], {"a\ud800": "reason"}, "lone surrogates"),
    (["command"], "bench \udcff", "lone surrogates"),
    (["workload", "deep"], {"\ud800": 1}, "lone surrogates"),
    (["environment", "deep"], ["\ud800"], "lone surrogates"),
    (["noise"], {"floor": 0.1}, "has no 'smallest_effect'"),
    (["notes"], ["x" * 5_000], "at most 4000"),
    (["environment", "cores"], "four", "'cores'"),
    (["environment", "torch"], None, "'torch'"),
    (["environment", "load_average"], [0.1], "'load_average'"),
    (["environment", "commit"], 7, "'commit'"),
    (["workload", "name"], ["mlp"], "'name'"),
    (["workload", "train_rows"], float("inf"), "finite"),
    (["workload", "deep"], [[[[[[[[1]]]]]]]], "nested deeper"),
    (["design", "extended"], 1, "true or false"),
]


@pytest.mark.parametrize(("where", "value", "message"), DAMAGES, ids=lambda given: str(given)[:40])
def test_damaged_records_are_refused(where: list[Any], value: Any, message: str, tmp_path: Path) -> None:
    content = node = json.loads(json.dumps(record({"fast": arm(1e-3, 2e-3)}).to_dict()))
    for key in where[:-1]:
        node = node[key]
    node[where[-1]] = value
    path = tmp_path / "record.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as raised:
        read_record(path)
    assert raised.value.file == str(path)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"\xff\xfe", b"{" * 100_000, b"[" * 100_000, b'{"schema_version": 1' + b"0" * 5_000 + b"}"]
)
def test_files_that_are_no_records_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as raised:
        read_record(path)
    assert raised.value.file == str(path)


def test_a_missing_file_and_an_endless_one_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"no-such\.json"):
        read_record(tmp_path / "no-such.json")
    monkeypatch.setattr("fasttrain.measure.strict.MAX_FILE_BYTES", 10)
    path = tmp_path / "record.json"
    write_record(record({"fast": arm(1e-3)}), path)
    with pytest.raises(DataError, match="larger than"):
        read_record(path)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_regular_file_is_not_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    if kind == "pipe":
        os.mkfifo(path)  # nobody writes to it: to open it would take for ever
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(DataError, match="no regular file"):
        read_record(path)


def test_no_more_is_read_of_a_file_than_it_may_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasttrain.measure.strict.MAX_FILE_BYTES", 10)
    path = Path("/proc/self/status")
    assert path.stat().st_size == 0
    with pytest.raises(DataError, match="larger than"):
        read_record(path)


def test_a_record_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        write_record(record({"fast": arm(1e-3)}), tmp_path / "file" / "record.json")


def test_a_target_is_checked_before_there_is_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "new.json", tmp_path / "a" / "b" / "new.json", tmp_path / "file", Path("new.json")):
        check_target(path)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file"]
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "file" / "a" / "new.json", "file is no folder")):
        with pytest.raises(DataError, match=message) as raised:
            check_target(path)
        assert raised.value.file == str(path)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    monkeypatch.setattr("fasttrain.measure.bench.record.os.access", lambda found, _: found == pipe)
    check_target(pipe)  # like a device, it is written to as it is
    monkeypatch.setattr("fasttrain.measure.bench.record.os.access", lambda found, _: found == tmp_path / "file")
    with pytest.raises(DataError, match=f"{tmp_path} is read-only"):  # a file is replaced, not written over
        check_target(tmp_path / "file")
    monkeypatch.setattr("fasttrain.measure.bench.record.os.access", lambda *_: False)
    for path in (tmp_path / "new.json", tmp_path / "file"):
        with pytest.raises(DataError, match="read-only"):
            check_target(path)
