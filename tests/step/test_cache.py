"""The program cache: whom it trusts, what it makes of damage, how large it grows, two users at once."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.errors import EngineError
from fasttrain.step import cache as cache_module
from fasttrain.step.cache import ProgramCache, Verdict, default_folder, held

CONTENT = b"machine code"
VERDICT = Verdict(eager_us=100.0, program_us=50.0, trace_s=0.5, compile_s=20.0, refused=None)


@pytest.fixture
def cache(tmp_path: Path) -> ProgramCache:
    return ProgramCache(tmp_path / "programs")


def add(cache: ProgramCache, key: str, content: bytes = CONTENT) -> Path:
    package = cache.folder.parent / f"{key}-built.pt2"
    package.write_bytes(content)
    return cache.add(key, package, "MLP")


def names(cache: ProgramCache) -> set[str]:
    return {path.name for path in cache.folder.iterdir()}


def test_a_program_comes_back_as_it_was(cache: ProgramCache) -> None:
    home = add(cache, "a")
    found = cache.find("a")
    assert found == home
    assert found.read_bytes() == CONTENT
    assert cache.find("b") is None
    assert ProgramCache(cache.folder).find("a") == home
    assert names(cache) == {"a.pt2", "a.json"}


def test_the_folder_is_this_users_alone(cache: ProgramCache) -> None:
    assert cache.folder.stat().st_mode & 0o777 == 0o700


def test_the_default_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "fasttrain" / "programs"
    for unusable in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert default_folder() == Path.home() / ".cache" / "fasttrain" / "programs"


def open_to_the_group(folder: Path, _: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    folder.chmod(0o770)


def open_to_all(folder: Path, _: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    folder.chmod(0o702)


def of_another_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(mode=0o700)
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)


def a_link(folder: Path, _: pytest.MonkeyPatch) -> None:
    target = folder.with_name("elsewhere")
    target.mkdir(mode=0o700)
    folder.symlink_to(target)


def a_file(folder: Path, _: pytest.MonkeyPatch) -> None:
    folder.write_text("")


def below_a_file(folder: Path, _: pytest.MonkeyPatch) -> None:
    folder.parent.rmdir()
    folder.parent.write_text("")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (open_to_the_group, "others may write"),
        (open_to_all, "others may write"),
        (of_another_user, "belongs to another user"),
        (a_link, "not a folder"),
        (a_file, "cannot be made"),
        (below_a_file, "cannot be made"),
    ],
)
def test_a_folder_that_cannot_be_trusted_is_refused(
    spoil: Callable[[Path, pytest.MonkeyPatch], None], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "base" / "programs"
    folder.parent.mkdir()
    spoil(folder, monkeypatch)
    with pytest.raises(EngineError, match=reason) as caught:
        ProgramCache(folder)
    assert str(folder) in str(caught.value)


def truncate(package: Path, _: Path) -> None:
    package.write_bytes(package.read_bytes()[:-1])


def flip(package: Path, _: Path) -> None:
    content = bytearray(package.read_bytes())
    content[3] ^= 1
    package.write_bytes(bytes(content))


def lose_package(package: Path, _: Path) -> None:
    package.unlink()


def lose_record(_: Path, record: Path) -> None:
    record.unlink()


def cut_record(_: Path, record: Path) -> None:
    record.write_text(record.read_text()[:-5])


def other_format(_: Path, record: Path) -> None:
    record.write_text(json.dumps(json.loads(record.read_text()) | {"format": 0}))


@pytest.mark.parametrize("damage", [truncate, flip, lose_package, lose_record, cut_record, other_format])
def test_a_damaged_entry_is_removed_and_can_be_made_anew(
    damage: Callable[[Path, Path], None], cache: ProgramCache
) -> None:
    package = add(cache, "a")
    kept = add(cache, "b")
    damage(package, package.with_suffix(".json"))
    assert cache.find("a") is None
    assert names(cache) == {"b.pt2", "b.json"}
    add(cache, "a")
    assert cache.find("a") == package
    assert cache.find("b") == kept


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda child: st.lists(child, max_size=3) | st.dictionaries(st.sampled_from(["format", "what"]), child),
)


@given(content=st.one_of(st.binary(max_size=40), any_json.map(lambda value: json.dumps(value).encode())))
@settings(deadline=None, max_examples=60)
def test_no_record_however_spoilt_is_trusted_or_an_error(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = ProgramCache(tmp_path_factory.mktemp("spoilt") / "programs")
    package = add(cache, "a")
    package.with_suffix(".json").write_bytes(content)
    (cache.folder / "job.verdict").write_bytes(content)
    cache.entries()
    assert cache.verdict("job") is None
    assert cache.find("a") is None
    assert not package.exists()


def test_a_verdict_comes_back_as_it_was(cache: ProgramCache) -> None:
    assert cache.verdict("job") is None
    cache.remember("job", VERDICT)
    assert cache.verdict("job") == VERDICT
    assert names(cache) == {"job.verdict"}


def failing(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", ["os.replace", "shutil.copyfile", "_write"])
def test_what_cannot_be_written_leaves_the_package_and_no_litter(
    step: str, cache: ProgramCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = cache.folder.parent / "built.pt2"
    package.write_bytes(CONTENT)
    monkeypatch.setattr(f"{cache_module.__name__}.{step}", failing)
    with pytest.raises(OSError, match="No space"):
        cache.add("a", package, "MLP")
    monkeypatch.undo()
    assert package.read_bytes() == CONTENT
    assert not any(name.endswith(".partial") for name in names(cache))
    assert cache.find("a") is None
    assert names(cache) == set()


def test_a_verdict_that_cannot_be_written_leaves_no_litter(
    cache: ProgramCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="No space"):
        cache.remember("job", VERDICT)
    assert names(cache) == set()


def used_at(cache: ProgramCache, key: str, seconds: float) -> None:
    os.utime(cache.folder / f"{key}.json", (seconds, seconds))


def test_the_programs_unused_for_longest_make_room(cache: ProgramCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "MAX_BYTES", 30)
    for age, key in enumerate("abc"):
        add(cache, key, b"x" * 10)
        used_at(cache, key, 100.0 + age)
    assert cache.find("a") is not None  # it counts as used now
    add(cache, "d", b"x" * 10)
    assert {entry.key for entry in cache.entries()} == {"a", "c", "d"}
    add(cache, "large", b"x" * 100)
    assert {entry.key for entry in cache.entries()} == {"large"}, "the newest stays, however large"


def test_what_children_keep_is_bounded(cache: ProgramCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "SCRATCH_BYTES", 1 << 20)
    header = cache.inductor_folder / "tmp" / "header.gch"
    header.parent.mkdir(parents=True)
    header.write_bytes(b"x" * (1 << 19))
    add(cache, "a", b"x")
    assert header.exists()
    header.write_bytes(b"x" * (1 << 20))
    with held(cache.inductor_folder):  # by a child that is at work
        add(cache, "b", b"x")
        assert header.exists()
    add(cache, "b", b"x")
    assert list(cache.inductor_folder.iterdir()) == []
    assert {entry.key for entry in cache.entries()} == {"a", "b"}


def test_entries_are_listed_by_use(cache: ProgramCache) -> None:
    for age, key in enumerate("abc"):
        add(cache, key, b"x" * (age + 1))
        used_at(cache, key, 100.0 - age)
    assert [(entry.key, entry.num_bytes, entry.what, entry.used) for entry in cache.entries()] == [
        ("a", 1, "MLP", 100.0),
        ("b", 2, "MLP", 99.0),
        ("c", 3, "MLP", 98.0),
    ]


def test_clear_removes_all_that_is_its_own(cache: ProgramCache) -> None:
    add(cache, "a")
    add(cache, "b")
    cache.remember("job", VERDICT)
    (cache.folder / "a.pt2.1.2.partial").write_bytes(b"half")
    (cache.folder / "notes.txt").write_text("the user's")
    assert cache.clear() == 2
    assert names(cache) == {"notes.txt"}
    assert cache.clear() == 0


def test_an_entry_removed_by_another_process_meanwhile_is_no_error(
    cache: ProgramCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(cache, "a")
    real = cache_module._sha256  # pyright: ignore[reportPrivateUsage]

    def removed_meanwhile(path: Path) -> str:
        digest = real(path)
        ProgramCache(cache.folder).clear()
        return digest

    monkeypatch.setattr(cache_module, "_sha256", removed_meanwhile)
    assert cache.find("a") is None


def test_an_entry_serves_where_its_use_cannot_be_noted(cache: ProgramCache, monkeypatch: pytest.MonkeyPatch) -> None:
    add(cache, "a")

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "read-only file system")

    monkeypatch.setattr(cache_module.os, "utime", refuse)
    assert cache.find("a") is not None


def test_two_at_once_see_whole_programs_or_none(cache: ProgramCache) -> None:
    """Two that build the same program make packages that differ (they hold times); every reader gets a whole one."""
    contents = [bytes([number]) * 5000 for number in range(2)]
    broken: list[object] = []
    start = threading.Barrier(3)

    def write(content: bytes) -> None:
        own = ProgramCache(cache.folder)
        package = cache.folder.parent / f"{content[0]}.pt2"
        start.wait()
        for _ in range(30):
            package.write_bytes(content)
            own.add("a", package, "MLP")

    def read() -> None:
        own = ProgramCache(cache.folder)
        start.wait()
        for _ in range(100):
            found = own.find("a")
            try:
                seen = found and found.read_bytes()
            except FileNotFoundError:  # it was replaced or removed since: its loader says so
                continue
            if seen is not None and seen not in contents:
                broken.append(seen)

    threads = [threading.Thread(target=guarded, args=(broken, write, content)) for content in contents]
    threads.append(threading.Thread(target=guarded, args=(broken, read)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not broken
    add(cache, "a", contents[0])
    assert cache.find("a") is not None
    assert names(cache) == {"a.pt2", "a.json"}


def guarded(broken: list[object], function: Callable[..., None], *arguments: Any) -> None:
    """Brings a thread's error to the test."""
    try:
        function(*arguments)
    except Exception as error:
        broken.append(error)
