"""Checkpoints: what is read is what was written, and a damaged file is an error like any other."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fasttrain.errors import RunError
from fasttrain.run.checkpoint import load_tree, pack_tree, save_tree, write_atomically

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Of any dtype and of 0 to 3 dimensions, some of them empty; every bit pattern of a float, NaN too."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = int(torch.tensor(shape).prod()) if shape else 1
    size = torch.empty(0, dtype=dtype).element_size()
    raw = draw(st.binary(min_size=count * size, max_size=count * size))
    if dtype == torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | tensors()
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    """Equal in type, order and every bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same_form = a.dtype == b.dtype and a.shape == b.shape
        bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
        return same_form and torch.equal(*bits)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trees") / "tree.safetensors"


@given(tree=trees)
@settings(deadline=None, max_examples=100)
def test_what_is_read_is_what_was_written(file: Path, tree: Any) -> None:
    save_tree(file, tree)
    assert same(load_tree(file), tree)


def test_tuples_come_back_as_lists(file: Path) -> None:
    save_tree(file, {"betas": (0.9, 0.999)})
    assert load_tree(file) == {"betas": [0.9, 0.999]}


def test_tensors_may_share_memory_or_lie_across_it(file: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    tree = {"weight": weight, "tied": weight, "transposed": weight.t(), "part": weight[:, 1:]}
    save_tree(file, tree)
    read = load_tree(file)
    assert all(torch.equal(read[name], value) for name, value in tree.items())
    assert not any(value.requires_grad for value in read.values())


def test_an_optimizer_goes_on_as_if_never_stored(file: Path) -> None:
    def optimizer_of(weight: Tensor) -> torch.optim.Adam:
        weight.grad = torch.ones_like(weight)
        return torch.optim.Adam([weight], lr=0.1, amsgrad=True)

    stored, straight = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    first, second = optimizer_of(stored), optimizer_of(straight)
    first.step()
    second.step()
    save_tree(file, first.state_dict())
    resumed = optimizer_of(stored)
    resumed.load_state_dict(load_tree(file))
    resumed.step()
    second.step()
    assert torch.equal(stored, straight)


def test_what_a_checkpoint_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot hold a set"):
        save_tree(tmp_path / "tree", {"steps": {1, 2}})
    assert list(tmp_path.iterdir()) == []


SAMPLE = pack_tree({"model": {"fc1.weight": torch.ones(2, 3)}, "epochs": 2, "lr": [1e-3, None], "name": "ä"})


@given(data=st.data())
@settings(deadline=None, max_examples=300)
def test_a_damaged_file_is_one_error(file: Path, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(SAMPLE) - 1))
    if data.draw(st.booleans()):
        damaged = SAMPLE[:position]
    else:
        damaged = SAMPLE[:position] + data.draw(st.binary(min_size=1, max_size=1)) + SAMPLE[position + 1 :]
    file.write_bytes(damaged)
    with contextlib.suppress(RunError):  # a byte of a tensor may pass for another; any other error fails the test
        load_tree(file)


def test_a_file_that_is_cut_short_is_refused(file: Path) -> None:
    for length in range(0, len(SAMPLE), 7):
        file.write_bytes(SAMPLE[:length])
        with pytest.raises(RunError, match="cannot be read"):
            load_tree(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"none\.safetensors cannot be read"):
        load_tree(tmp_path / "none.safetensors")


def test_another_version_is_refused(file: Path) -> None:
    file.write_bytes(SAMPLE.replace(b'"fasttrain_version":"1"', b'"fasttrain_version":"9"'))
    with pytest.raises(RunError, match="not a checkpoint of this version"):
        load_tree(file)


@pytest.mark.parametrize("step", ["write", "replace"])
def test_a_failed_write_leaves_the_old_content_and_nothing_else(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    write_atomically(path, b"old")
    write = Path.write_bytes

    def fail(target: object, content: bytes | Path) -> int:
        if isinstance(target, Path) and isinstance(content, bytes):
            write(target, content[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if step == "write":
        monkeypatch.setattr(Path, "write_bytes", fail)
    else:
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(RunError, match="model cannot be written: No space left on device"):
        write_atomically(path, b"new")
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("model", b"old")]


def test_an_interrupted_write_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "model"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("model", b"old")]


def test_a_write_replaces_the_old_content(tmp_path: Path) -> None:
    write_atomically(tmp_path / "model", b"old")
    write_atomically(tmp_path / "model", b"new")
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("model", b"new")]
