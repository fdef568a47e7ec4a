"""Files are written whole, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fasttrain import DataError
from fasttrain.measure.files import write_text


def test_a_file_is_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "file.json"
    write_text(path, "old", "the record")

    def fail(*_: object) -> None:
        assert path.read_text() == "old"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fasttrain.measure.files.os.replace", fail)
    with pytest.raises(DataError, match="the record cannot be written: No space left") as raised:
        write_text(path, "new", "the record")
    assert raised.value.file == str(path)
    monkeypatch.undo()
    assert path.read_text() == "old"
    write_text(path, "né\n", "the record")
    assert path.read_bytes() == "né\n".encode()
    assert list(path.parent.iterdir()) == [path]


def test_text_that_utf_8_cannot_hold_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")
    with pytest.raises(DataError, match="surrogates"):
        write_text(path, "\ud800", "the record")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_one(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    for content in ("first", "second"):
        write_text(link, content, "the record")
        assert link.is_symlink()
        assert target.read_text() == content


def test_what_is_no_file_is_written_to_as_it_is(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_text(pipe, "through", "the record")
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
    assert list(tmp_path.iterdir()) == [pipe]
