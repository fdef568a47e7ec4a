"""`fasttrain.record` never serves a wrong batch: the plain loader's, or a refusal by name and line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import fasttrain
from tests.data import record_adversaries
from tests.data.record_adversaries import ADVERSARIES, THEN, Adversary, judge
from tests.data.record_loaders import Record, ReplaysFirstEpoch, freezes_rows, identity, reads_in_a_child


@pytest.fixture
def record() -> Record:
    return fasttrain.record


def names(adversary: Adversary) -> str:
    return adversary.name


@pytest.mark.parametrize("adversary", [*ADVERSARIES, *THEN], ids=names)
def test_no_batch_is_wrong(adversary: Adversary, record: Record, tmp_path: Path) -> None:
    outcome = judge(adversary, record, tmp_path)
    assert outcome.wrong is None
    if outcome.refused is not None:
        assert adversary.is_refusal_right
        assert outcome.refused.startswith(("DataError", "ConfigError"))
        check_names_the_dataset(outcome.refused, outcome.dataset)


def check_names_the_dataset(message: str, dataset: Any) -> None:
    inside = list(datasets_inside(dataset))
    assert any(type(each).__name__ in message for each in inside), message
    getters = [getattr(type(each), name, None) for each in inside for name in ("__getitem__", "__getitems__")]
    file = record_adversaries.__file__
    if any(getattr(getattr(getter, "__code__", None), "co_filename", None) == file for getter in getters):
        assert re.search(r"record_adversaries\.py\W+(line )?\d+", message), message


def datasets_inside(dataset: Any) -> Any:
    yield dataset
    held = getattr(dataset, "datasets", None)
    for each in held if isinstance(held, list | tuple) else [getattr(dataset, "dataset", None)]:
        if each is not None:
            yield from datasets_inside(each)


def test_there_are_200_and_each_has_its_own_name() -> None:
    assert len(ADVERSARIES) >= 200
    assert len({adversary.name for adversary in [*ADVERSARIES, *THEN]}) == len(ADVERSARIES) + len(THEN)


# The harness itself ---------------------------------------------------------------------------------------------------

ONE_PROCESS = [adversary for adversary in ADVERSARIES if "workers" not in adversary.name]
RAISING = {"RaisesAlways", "changed error by epoch"}
UNCOLLATED = {"meta tensor", "big-endian array", "range", "keys of any kind", "large int", "complex with -0.0"}
RAISING |= {f"holds {name}, collated" for name in UNCOLLATED}
FROZEN_RIGHT = {
    *(
        f"{rows}{ahead}"
        for rows in ("ByWorker", "BySeedOfWorker", "ByProcess", "ByParent", "ByThread")
        for ahead in ("", ", read ahead")
    ),
    *("ByWorker, one worker", "another thread, same rows", "DynamicLength", "GetitemsIsAnother"),
    *("GetitemsIsAnother in a Subset", "RaisesAlways", "Stops", "Lazy", "Memo", "ByIndexType", "InsertsInto"),
    *("DelaysByOne", "default_collate over views", "array by lists", "changed longer list", "changed size behind"),
    *("changed batch size", "changed drop_last", "changed weights", "changed sampler's generator"),
}
"""Adversaries of another fault than rows that are read once: of reading ahead, of samplers that do not run live."""


def test_harness_the_plain_loader_is_never_wrong_and_comes_to_its_end(tmp_path: Path) -> None:
    judged = {each.name: judge(each, identity, tmp_path / str(n)) for n, each in enumerate([*ONE_PROCESS, *THEN])}
    assert {name: outcome.wrong for name, outcome in judged.items() if outcome.wrong or outcome.refused} == {}
    assert {name for name, outcome in judged.items() if outcome.error is not None} == RAISING


@pytest.mark.parametrize(("broken", "right"), [(freezes_rows, FROZEN_RIGHT), (ReplaysFirstEpoch, {"RaisesAlways"})])
def test_harness_catches_a_recorder_that_never_looks_again(broken: Record, right: set[str], tmp_path: Path) -> None:
    moving = [each for each in ONE_PROCESS if not each.name.startswith("holds ")]
    missed = [each.name for n, each in enumerate(moving) if judge(each, broken, tmp_path / str(n)).wrong is None]
    assert set(missed) <= right


def test_harness_catches_rows_that_are_read_in_another_process(tmp_path: Path) -> None:
    elsewhere = {"ByWorker", "BySeedOfWorker", "ByProcess", "ByParent", "Counted Global", "always torch_rand"}
    chosen = [adversary for adversary in ADVERSARIES if adversary.name in elsewhere]
    wrong = [each.name for n, each in enumerate(chosen) if judge(each, reads_in_a_child, tmp_path / str(n)).wrong]
    assert set(wrong) == elsewhere
