"""Fixtures of the compiled step's tests: private folders, and `auto` and compiler in a hurry."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fasttrain.step.cache import default_folder
from tests.step.cuda_stand_in import Recording
from tests.step.fakes import Graphs, hasten


@pytest.fixture
def in_double() -> Iterator[None]:
    """Double precision, and one thread: the models of these tests are far too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


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


@pytest.fixture
def lane(graphs: Graphs) -> Recording:
    """What stands in for CUDA graphs."""
    return Recording(graphs)
