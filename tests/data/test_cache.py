"""The cache: a hit equals a miss, and nothing that is wrong with it stops a run."""

import os
import stat
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors import SafetensorError

from fasttrain.data import cache
from fasttrain.data.cache import default_cache_dir, load_reviews
from fasttrain.data.text import EncodedReviews
from fasttrain.errors import ConfigError, DataError

TEXT = 'rating,review,split\npos,"good , really good",train\nneg,bad,train\npos,,val\n'


@pytest.fixture
def table(tmp_path) -> Path:
    path = tmp_path / "reviews.csv"
    path.write_text(TEXT)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "made" / "cache"


def assert_same(one: EncodedReviews, other: EncodedReviews) -> None:
    for name in ("train", "val", "test"):
        first, second = one.splits[name], other.splits[name]
        np.testing.assert_array_equal(first.tokens.ids, second.tokens.ids, strict=True)
        np.testing.assert_array_equal(first.tokens.offsets, second.tokens.offsets, strict=True)
        np.testing.assert_array_equal(first.labels, second.labels, strict=True)
    assert one.vectorizer == other.vectorizer
    assert (one.sha256, one.source, one.notes) == (other.sha256, other.source, other.notes)


def refuse_to_build(*args, **kwargs):
    raise AssertionError("built though it was in the cache")


def test_a_hit_equals_a_miss(table, folder, monkeypatch):
    plain = load_reviews(table, cutoff=0, cache_dir=None)
    assert_same(load_reviews(table, cutoff=0, cache_dir=folder), plain)
    monkeypatch.setattr(cache, "encode_reviews", refuse_to_build)
    assert_same(load_reviews(table, cutoff=0, cache_dir=folder), plain)


def test_a_hit_equals_a_miss_on_real_reviews(data_dir, folder, monkeypatch):
    miss = load_reviews(data_dir / "reviews_lite.csv.gz", cache_dir=folder)
    monkeypatch.setattr(cache, "encode_reviews", refuse_to_build)
    assert_same(load_reviews(data_dir / "reviews_lite.csv.gz", cache_dir=folder), miss)


def test_the_key_is_content_and_cutoff(table, folder, monkeypatch):
    load_reviews(table, cutoff=0, cache_dir=folder)
    load_reviews(table, cutoff=1, cache_dir=folder)
    table.write_text(TEXT.replace("bad", "sad"))
    assert "sad" in load_reviews(table, cutoff=0, cache_dir=folder).vectorizer.review_vocab.token_to_idx
    assert len(list(folder.iterdir())) == 3
    table.write_text(TEXT)
    moved = table.rename(table.with_name("moved.csv"))
    monkeypatch.setattr(cache, "encode_reviews", refuse_to_build)
    assert load_reviews(moved, cutoff=0, cache_dir=folder).source == str(moved)


def test_folders_and_entries_are_private_and_whole(table, folder):
    load_reviews(table, cutoff=0, cache_dir=folder)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder.parent, folder)] == [0o700, 0o700]
    (entry,) = folder.iterdir()
    assert entry.suffix == ".safetensors"
    assert stat.S_IMODE(entry.stat().st_mode) & 0o077 == 0


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "foreign", "metadata"])
def test_a_damaged_entry_is_built_again(table, folder, damage):
    plain = load_reviews(table, cutoff=0, cache_dir=folder)
    (entry,) = folder.iterdir()
    raw = entry.read_bytes()
    entry.write_bytes(
        {
            "empty": b"",
            "cut": raw[:-5],
            "flipped": raw[:-1] + bytes([raw[-1] ^ 1]),
            "foreign": b"rating,review,split",
            "metadata": raw.replace(b"really", b"realle"),
        }[damage]
    )
    again = load_reviews(table, cutoff=0, cache_dir=folder)
    assert "damaged" in again.notes[-1]
    assert again.notes[:-1] == plain.notes
    assert_same(load_reviews(table, cutoff=0, cache_dir=folder), plain)


def test_an_entry_of_another_kind_is_built_again(table, folder):
    load_reviews(table, cutoff=0, cache_dir=folder)
    (entry,) = folder.iterdir()
    cache.save_file({"x": np.zeros(2)}, entry)
    assert "damaged" in load_reviews(table, cutoff=0, cache_dir=folder).notes[-1]


def test_a_cache_that_cannot_be_written_is_noted(table, tmp_path):
    (tmp_path / "file").write_text("in the way")
    loaded = load_reviews(table, cutoff=0, cache_dir=tmp_path / "file" / "cache")
    assert "could not be kept" in loaded.notes[-1]
    assert len(loaded.splits["train"].labels) == 2


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("no space")])
def test_a_full_disk_leaves_nothing_behind(table, folder, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(cache, "save_file", fail)
    assert "space" in load_reviews(table, cutoff=0, cache_dir=folder).notes[-1]
    assert list(folder.iterdir()) == []


def test_the_oldest_entries_go_first(table, folder, monkeypatch):
    for cutoff in range(3):
        load_reviews(table, cutoff=cutoff, cache_dir=folder)
        os.utime(next(folder.glob(f"*-{cutoff}-none-v*")), (cutoff, cutoff))
    load_reviews(table, cutoff=0, cache_dir=folder)  # used again: now the newest
    size = max(path.stat().st_size for path in folder.iterdir())
    monkeypatch.setattr(cache, "MAX_CACHE_BYTES", 2 * size + size // 2)
    (folder / "precious.safetensors").write_bytes(b"x" * 3 * size)
    (folder / "fasttrain-part-left").write_bytes(b"x" * size)
    for path in ("precious.safetensors", "fasttrain-part-left"):
        os.utime(folder / path, (0, 0))
    load_reviews(table, cutoff=3, cache_dir=folder)
    kept = {path.name: path.name.split("-")[1:2] for path in folder.iterdir()}
    assert kept.pop("precious.safetensors") == []
    assert sorted(kept.values()) == [["0"], ["3"]]


def test_each_cleaning_has_an_entry_of_its_own(table, folder):
    for clean in ("none", "book", "unicode", "auto"):
        plain = load_reviews(table, cutoff=0, clean=clean, cache_dir=None)
        for _ in range(2):
            cached = load_reviews(table, cutoff=0, clean=clean, cache_dir=folder)
            assert cached.vectorizer == plain.vectorizer
            assert cached.clean_reason == plain.clean_reason
    assert len(list(folder.iterdir())) == 4


def test_a_frame_is_not_cached(folder):
    frame = pd.DataFrame({"rating": ["a", "b"], "review": ["x", "y"], "split": ["train", "train"]})
    assert load_reviews(frame, cutoff=0, cache_dir=folder).source == "DataFrame"
    assert not folder.exists()


def test_bad_input_is_refused_before_the_cache_is_touched(table, folder):
    with pytest.raises(ConfigError, match="cutoff"):
        load_reviews(table, cutoff=-1, cache_dir=folder)
    with pytest.raises(DataError, match="no such file"):
        load_reviews("absent.csv", cache_dir=folder)
    with pytest.raises(DataError, match="a table is a"):
        load_reviews("reviews.txt", cache_dir=folder)
    assert not folder.exists()


def test_where_the_cache_is(table, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert default_cache_dir() == tmp_path / "xdg" / "fasttrain" / "text"
        load_reviews(table, cutoff=0)
        assert len(list((tmp_path / "xdg" / "fasttrain" / "text").iterdir())) == 1
        patch.setenv("XDG_CACHE_HOME", "relative")
        patch.setenv("HOME", str(tmp_path))
        assert default_cache_dir() == tmp_path / ".cache" / "fasttrain" / "text"


def test_a_user_without_a_home_has_no_cache(table, monkeypatch):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    with monkeypatch.context() as patch:
        patch.delenv("XDG_CACHE_HOME")
        patch.setattr(Path, "home", fail)
        assert default_cache_dir() is None
        assert len(load_reviews(table, cutoff=0).splits["train"].labels) == 2
