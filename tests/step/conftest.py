"""Fixtures of the compiled step's tests: private folders, and `auto` and compiler in a hurry."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from fasttrain.step.cache import default_folder
from tests.step.fakes import Graphs, hasten


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, of this test alone."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` takes a program up within ten steps, faster or not."""
    hasten(monkeypatch)


@pytest.fixture
def own_programs(own_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of programs, of this test alone; not made yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return default_folder()


@pytest.fixture
def graphs(own_programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """The traced graph runs in place of machine code."""
    return Graphs(monkeypatch, tmp_path)
