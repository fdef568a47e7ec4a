"""Files that are no records, or hold any value in any place: compared or refused, nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.errors import ConfigError, DataError, FasttrainError
from tests.measure.verdict.comparisons import OPERATORS, SPREAD, arm, compared, profile, record

HOSTILE = [
    "",
    "[]",
    "{}",
    '{"kind": "bench"}',
    '{"kind": "profile"}',
    '{"kind": ["bench"]}',
    '{"kind": "bench", "schema_version": 1e999}',
    "[" * 100_000,
    '{"kind": "bench", "schema_version": ' + "9" * 5000 + "}",
    "\x80\x04\x95pickle",
]


@pytest.mark.parametrize("content", HOSTILE, ids=range(len(HOSTILE)))
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "r.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"r\.json"):
        compared(file, file)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to every value of plain data."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_value_in_any_place_is_compared_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("files")
    bench = json.loads(json.dumps(record({"eager": arm(500), "auto": arm(400, SPREAD[:8])}).to_dict()))
    content = data.draw(st.sampled_from([bench, json.loads(profile(OPERATORS).to_text())]))
    *way, last = data.draw(st.sampled_from(places(content)[1:]))
    node = content
    for key in way:
        node = node[key]
    node[last] = data.draw(anything)
    file = folder / "r.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    side = f"{file}:eager" if content is bench else str(file)
    try:
        found = compared(side, file)
    except FasttrainError as error:
        assert str(file) in str(error) or isinstance(error, ConfigError)  # noqa: PT017
    else:
        json.dumps(found.to_dict())
        assert found.exit_code in (0, 1, 3, 4)
