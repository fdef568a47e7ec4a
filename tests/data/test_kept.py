"""`record(loader, keep=...)`: the next process replays from its first pass on, and what is stale is never served."""

from __future__ import annotations

import errno
import functools
import hashlib
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import fasttrain
from fasttrain import ConfigError, DataError
from fasttrain.data import kept
from fasttrain.data.kept import KeptFolder, NotWrittenError, key_of
from fasttrain.data.purity import Facts
from tests.data import kept_program
from tests.data.record_loaders import (
    DATASETS,
    UNCOLLATED,
    Case,
    DictOfNumpy,
    SharedRows,
    identity,
    reads_by_epoch,
    run,
    scribble,
    seed_all,
)

REPOSITORY = Path(__file__).parents[2]


# The next process -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes, one after the other, come to."""
    folder = tmp_path_factory.mktemp("records")
    command = [sys.executable, "-m", "tests.data.kept_program", str(folder)]
    return [
        json.loads(subprocess.run([*command, *more], capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout)
        for more in ([], ["count"])
    ]


@pytest.mark.parametrize("number", range(len(kept_program.CASES)), ids=lambda n: kept_program.CASES[n].name)
def test_the_next_process_gives_the_plain_loaders_batches(number: int, processes: list[dict[str, Any]]) -> None:
    plain = kept_program.digest(run(kept_program.CASES[number], identity, epochs=3).events)
    for found in processes:
        assert found["cases"][number]["refused"] is None
        assert found["cases"][number]["events"] == plain
    assert sum(processes[1]["cases"][number]["reads"]) <= 8, "those that are read again when a record is opened"


def test_a_loop_is_resident_in_the_first_epoch_of_the_next_process(processes: list[dict[str, Any]]) -> None:
    first, second = (found["loop"] for found in processes)
    assert first["sources"] == ["streamed", "resident", "resident"]
    assert second["sources"] == ["resident"] * 3
    plain = kept_program.trained(kept_program.one_hot())
    assert first["losses"] == second["losses"] == plain["losses"]


def test_keys_are_the_same_in_every_process(processes: list[dict[str, Any]]) -> None:
    """Each process has its own order of sets and its own addresses."""
    assert processes[0]["keys"] == processes[1]["keys"]
    assert len(set(processes[0]["keys"])) == len(kept_program.held_values())


@pytest.mark.parametrize("name", [*DATASETS, *UNCOLLATED])
def test_every_dataset_is_served_right_or_refused(name: str, tmp_path: Path) -> None:
    case = Case(name, collate="default" if name in DATASETS else "as list", own=name in DATASETS)
    plain = run(case, identity, epochs=2)
    for _ in range(2):
        found = run(case, functools.partial(fasttrain.record, keep=tmp_path / "records"), epochs=2)
        assert found.difference(plain) is None
        assert found.refused is None or "does not write to disk" in found.refused


# What is kept, and where ----------------------------------------------------------------------------------------------


class Rows(Dataset[Any]):
    """Rows of a table, and how many were read in this process."""

    scale = 2

    def __init__(self, size: int = 60) -> None:
        self.table = np.arange(size * 4, dtype=np.float32).reshape(size, 4)
        self.names = [f"row {number}" for number in range(size)]
        self.options = {"offset": 1.5, "kinds": {"a", "b", "c"}}

    def __getitem__(self, i: int) -> Any:
        return self.table[i] * self.scale + self.options["offset"], self.names[i], i

    def __len__(self) -> int:
        return len(self.table)


def passes(dataset: Any, folder: Path, count: int = 1, **options: Any) -> tuple[list[Any], Any]:
    loader = fasttrain.record(DataLoader(dataset, batch_size=8), keep=folder, **options)
    return [list(loader) for _ in range(count)], loader


def is_replayed(dataset: Any, folder: Path, **options: Any) -> bool:
    """Whether a new recorder replays from its first pass on; its batches are right either way."""
    [batches], loader = passes(dataset, folder, **options)
    plain = list(DataLoader(dataset, batch_size=8))
    assert kept_program.digest(batches) == kept_program.digest(plain)
    return loader.choice.value == "recorded"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that holds the record of `Rows()`."""
    assert not is_replayed(Rows(), tmp_path / "records")
    return tmp_path / "records"


def record_in(folder: Path) -> Path:
    [found] = folder.iterdir()
    return found


def test_what_has_not_changed_is_replayed(folder: Path) -> None:
    assert is_replayed(Rows(), folder)
    assert is_replayed(Rows(), Path(os.path.relpath(folder)))


def test_a_record_is_this_users_alone(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def test_keep_may_be_a_folder_of_fasttrains_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loader = fasttrain.record(DataLoader(Rows(), batch_size=8), keep=True)
    list(loader)
    assert loader.choice.reason.endswith(f"; kept in {tmp_path / 'fasttrain' / 'records'}")
    assert len(list((tmp_path / "fasttrain" / "records").iterdir())) == 1
    assert kept.describe_folder().startswith("1, 0.0 MiB in ")


@pytest.mark.parametrize("given", [5, "", 1.5, [], b"x"])
def test_what_is_no_folder_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match="keep"):
        fasttrain.record(DataLoader(Rows()), keep=given)


@pytest.mark.parametrize("given", [0, -1, 1.5, True])
def test_what_is_no_size_is_refused(given: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keep_bytes"):
        fasttrain.record(DataLoader(Rows()), keep=tmp_path, keep_bytes=given)


def test_a_folder_that_others_could_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "file").touch()
    for name in ("open", "link", "file"):
        with pytest.raises(ConfigError, match=name):
            fasttrain.record(DataLoader(Rows()), keep=tmp_path / name)


def test_mapped_tables_are_not_written_to(folder: Path) -> None:
    before = hashlib.sha256((record_in(folder) / "tables").read_bytes()).hexdigest()
    loader: Any = fasttrain.record(DataLoader(Rows(), batch_size=8), keep=folder)
    for batch in loader:
        scribble(batch)
    assert loader.choice.value == "recorded"
    store = loader._recordings[-1].store
    for column in store.columns(store.numbers, torch.device("cpu")):
        for table in column.tables:
            table.zero_()
    assert hashlib.sha256((record_in(folder) / "tables").read_bytes()).hexdigest() == before


def test_mapped_rows_take_no_memory_of_the_bound(folder: Path) -> None:
    """A record that was made with more memory is replayed with less."""
    assert is_replayed(Rows(), folder, memory_bytes=30_000)


def test_the_record_that_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    size = sum(each.stat().st_size for each in record_files(tmp_path / "one"))
    for number in range(3):
        passes(Rows(60 + number), tmp_path / "all", keep_bytes=int(2.5 * size))
        os.utime(next(iter(newest(tmp_path / "all"))) / "manifest", (number, number))
    assert [is_replayed(Rows(60 + number), tmp_path / "all") for number in (2, 1)] == [True, True]
    assert not is_replayed(Rows(60), tmp_path / "all")


def record_files(folder: Path) -> list[Path]:
    passes(Rows(), folder)
    return [each for each in folder.rglob("*") if each.is_file()]


def newest(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda each: -(each / "manifest").stat().st_mtime)


def test_a_record_larger_than_the_bound_is_not_kept(tmp_path: Path) -> None:
    _, loader = passes(Rows(), tmp_path / "records", keep_bytes=1_000)
    assert "records may take 1,000" in loader.choice.reason
    assert list((tmp_path / "records").iterdir()) == []


def test_rows_beyond_the_bound_on_memory_are_not_kept(tmp_path: Path) -> None:
    batches, loader = passes(Rows(), tmp_path / "records", 2, memory_bytes=300)
    assert kept_program.digest(batches[1]) == kept_program.digest(list(DataLoader(Rows(), batch_size=8)))
    assert "not kept on disk: the rows take more memory" in loader.choice.reason
    assert list((tmp_path / "records").iterdir()) == []


class Logs(Rows):
    """Rows that write a log, which is read from nowhere."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        self.log = log

    def __getitem__(self, i: int) -> Any:
        with self.log.open("a") as file:
            file.write(f"{i}\n")
        return self.table[i]


def test_a_file_that_rows_only_write_to_is_not_what_they_are_read_from(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    batches, loader = passes(Logs(tmp_path / "log"), tmp_path / "records", 3)
    assert loader.choice.value == "recorded"
    assert "kept in" in loader.choice.reason
    assert len({kept_program.digest(each) for each in batches}) == 1


# What is refused, and what is not kept --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("dataclasses", "a Sample"),
        ("huge ints", "a int"),
        ("unequal", "not all of one form"),
        ("kind by row", "one form"),
        ("strided", "ndarray|Tensor"),
        ("named mappings", "a Named"),
    ],
)
def test_rows_of_other_kinds_are_refused_by_name(name: str, told: str, tmp_path: Path) -> None:
    loader = fasttrain.record(DataLoader((DATASETS | UNCOLLATED)[name](), collate_fn=list), keep=tmp_path)
    with pytest.raises(DataError, match=f"gives .*({told}).*leave out keep"):
        list(loader)


def with_socket(rows: Rows) -> Any:
    rows.held = socket.socket()
    return rows.held.close


def with_iterator(rows: Rows) -> None:
    rows.held = iter([1])


def with_lock(rows: Rows) -> None:
    rows.held = threading.Lock()


@pytest.mark.parametrize(("change", "told"), [(with_socket, "socket.socket"), (with_iterator, "is an iterator")])
def test_what_has_no_content_is_not_kept(change: Any, told: str, tmp_path: Path) -> None:
    rows = Rows()
    close = change(rows)
    batches, loader = passes(rows, tmp_path)
    assert kept_program.digest(batches[0]) == kept_program.digest(list(DataLoader(rows, batch_size=8)))
    assert told in loader.choice.reason
    assert list(tmp_path.iterdir()) == []
    if close is not None:
        close()


def test_a_lock_has_no_content(tmp_path: Path) -> None:
    rows, other = Rows(), Rows()
    with_lock(rows)
    with_lock(other)
    assert not is_replayed(rows, tmp_path)
    assert is_replayed(other, tmp_path)


def test_rows_that_the_dataset_hands_out_are_not_taken_by_a_collate_that_hands_them_on(tmp_path: Path) -> None:
    def both(record: Any) -> Any:
        first = record(DataLoader(SharedRows(), batch_size=4))
        list(first)
        dataset = SharedRows()
        found = []
        for _ in range(3):
            for batch in record(DataLoader(dataset, batch_size=4, collate_fn=list)):
                found.append(kept_program.digest(batch))
                scribble(batch)
        return found

    assert both(functools.partial(fasttrain.record, keep=tmp_path)) == both(identity)


# What has changed is recorded anew ------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Rows], object]] = {
    "attribute": lambda rows: rows.options.update(offset=2.5),
    "new attribute": lambda rows: setattr(rows, "more", 1),
    "sign of zero": lambda rows: rows.options.update(offset=-0.0),
    "type of a number": lambda rows: rows.options.update(offset=np.float64(1.5)),
    "element": lambda rows: rows.table.__setitem__((59, 3), 7),
    "last bit": lambda rows: rows.table.view(np.int32).__setitem__((30, 3), rows.table.view(np.int32)[30, 3] ^ 1),
    "dtype": lambda rows: setattr(rows, "table", rows.table.astype(np.float64)),
    "shape": lambda rows: setattr(rows, "table", rows.table.reshape(120, 2)[:60]),
    "text": lambda rows: rows.names.__setitem__(30, "other"),
    "order": lambda rows: rows.names.reverse(),
    "set": lambda rows: rows.options["kinds"].add("d"),  # type: ignore[union-attr]
    "number of rows": lambda rows: setattr(rows, "table", rows.table[:50]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_dataset_that_has_changed_is_recorded_anew(name: str, folder: Path) -> None:
    rows = Rows()
    CHANGES[name](rows)
    assert not is_replayed(rows, folder)
    assert is_replayed(rows, folder)
    assert is_replayed(Rows(), folder)


SOURCE = """
import numpy as np
from torch.utils.data import Dataset

SCALE = 3
TABLE = {"add": [1, 2, 3]}

def helper(x, times=2, *, plus=1):
    return x * times + plus

class Base(Dataset):
    def rows(self):
        return 40

class Coded(Base):
    factor = 2.5

    def __init__(self):
        self.adds = (lambda number: lambda x: x + number)(4)

    def __len__(self):
        return self.rows()

    def __getitem__(self, i):
        import other
        x = np.full(3, helper(i) * SCALE + TABLE["add"][i % 3] + self.factor + other.VALUE)
        return self.adds(x + np.float64("0.5"))
"""

EDITS = [
    ("SCALE = 3", "SCALE = 4"),
    ("[1, 2, 3]", "[1, 2, 4]"),
    ("times=2", "times=3"),
    ("plus=1", "plus=2"),
    ("* times", "- times"),
    ("return 40", "return 41"),
    ("factor = 2.5", "factor = 2.25"),
    ("(4)", "(5)"),
    ('"0.5"', '"0.25"'),
    ("VALUE = 1", "VALUE = 2"),
    ("np.full", "np.float32(1) * np.full"),
]


def coded(folder: Path, old: str = "", new: str = "") -> Any:
    """A dataset of a module of the user's, which is edited."""
    for name, text in (("other", "VALUE = 1\n"), ("coded", SOURCE)):
        path = folder / f"{name}.py"
        edited = text.replace(old, new) if old else text
        if not path.exists() or path.read_text() != edited:
            path.write_text(edited)
        sys.modules.pop(name, None)
        importlib.invalidate_caches()
        shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    spec = importlib.util.spec_from_file_location("coded", folder / "coded.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["coded"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Coded()


def test_code_that_was_edited_is_recorded_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "records"
    assert not is_replayed(coded(tmp_path), folder)
    assert is_replayed(coded(tmp_path), folder)
    assert is_replayed(coded(tmp_path, "class Coded", "# a comment\n\nclass Coded"), folder), "lines may move"
    for old, new in EDITS:
        assert not is_replayed(coded(tmp_path, old, new), folder), (old, new)
    for name in ("coded", "other"):
        sys.modules.pop(name)


class FromFiles(Dataset[Any]):
    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __getitem__(self, i: int) -> Any:
        return np.frombuffer(Path(self.folder, f"{i}.bin").read_bytes(), dtype=np.uint8)[:4].copy()

    def __len__(self) -> int:
        return 20


@pytest.mark.parametrize("options", [{}, {"workers": 2}], ids=["alone", "read ahead"])
def test_a_file_that_was_edited_is_recorded_anew(options: Any, tmp_path: Path) -> None:
    data, folder = tmp_path / "data", tmp_path / "records"
    data.mkdir()
    for number in range(20):
        (data / f"{number}.bin").write_bytes(bytes(range(number, number + 40)))
    assert not is_replayed(FromFiles(data), folder, **options)
    assert is_replayed(FromFiles(data), folder, **options)
    edited = data / "17.bin"
    before = edited.stat()
    edited.write_bytes(bytes(40))
    os.utime(edited, ns=(before.st_atime_ns, before.st_mtime_ns))  # the same size and time: its content tells
    [batches], loader = passes(FromFiles(data), folder, **options)
    assert kept_program.digest(batches) == kept_program.digest(list(DataLoader(FromFiles(data), batch_size=8)))
    assert "kept in" in loader.choice.reason
    assert is_replayed(FromFiles(data), folder, **options)
    (data / "3.bin").touch()
    assert not is_replayed(FromFiles(data), folder, **options)


class FromText(Dataset[Any]):
    """Rows of a file that no Python code opens; its name is in the dataset's state."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __getitem__(self, i: int) -> Any:
        return torch.from_file(self.path, size=20, dtype=torch.uint8)[i].clone()

    def __len__(self) -> int:
        return 20


def test_a_file_that_compiled_code_opens_is_recorded_anew(tmp_path: Path) -> None:
    path, folder = tmp_path / "data.bin", tmp_path / "records"
    path.write_bytes(bytes(range(20)))
    assert not is_replayed(FromText(path), folder)
    assert is_replayed(FromText(path), folder)
    path.write_bytes(bytes(20))
    os.utime(path, ns=(1, 1))
    assert not is_replayed(FromText(path), folder)


@pytest.mark.parametrize("name", ["fasttrain", "torch", "numpy", "pandas", "package"])
def test_another_version_is_recorded_anew(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_replayed(Rows(), folder)
    if name == "package":
        monkeypatch.setattr(kept, "_version_of", lambda package: f"another {package}")
    elif name == "fasttrain":
        monkeypatch.setattr(kept, "versions", lambda: {"fasttrain": "another"})
    else:
        monkeypatch.setattr(sys.modules[name], "__version__", "9.9.9")
    assert not is_replayed(Rows(), folder)


def test_another_folder_to_work_in_is_recorded_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert not is_replayed(Rows(), folder)


class FromEnvironment(Rows):
    def __getitem__(self, i: int) -> Any:
        return self.table[i] + float(os.environ.get("KEPT_SCALE", "1"))


def test_the_environment_counts_where_code_reads_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_replayed(FromEnvironment(), folder)
    monkeypatch.setenv("KEPT_SCALE", "2")
    assert is_replayed(Rows(), folder)
    assert not is_replayed(FromEnvironment(), folder)


class Hidden(Rows):
    def __getitem__(self, i: int) -> Any:
        return self.table[i] + vars(sys.modules["kept_hidden"])["VALUE"]


def test_a_change_that_no_key_sees_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("kept_hidden")
    module.VALUE = 1
    monkeypatch.setitem(sys.modules, "kept_hidden", module)
    assert not is_replayed(Hidden(), tmp_path)
    module.VALUE = 2
    with pytest.raises(DataError, match=rf"row \d+ of Hidden.__getitem__ .*delete {record_in(tmp_path)}"):
        passes(Hidden(), tmp_path)


class Caching(Rows):
    """Rows fill a cache, which the key does not see: it is made before there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[int, Any] = {}
        self.opened: Any = None

    def __getitem__(self, i: int) -> Any:
        self.opened = self.opened or [1]
        if i not in self.cache:
            self.cache[i] = self.table[i] + 1
        return self.cache[i].copy()


def test_rows_that_fill_a_cache_are_replayed(tmp_path: Path) -> None:
    assert not is_replayed(Caching(), tmp_path)
    batches, loader = passes(Caching(), tmp_path, 3)
    assert loader.choice.value == "recorded"
    assert len({kept_program.digest(each) for each in batches}) == 1


# Keys -----------------------------------------------------------------------------------------------------------------


class Frames(Dataset[Any]):
    def __init__(self) -> None:
        self.frame = pd.DataFrame({"a": [1, 2, 3], "b": ["x", "y", None], "c": pd.Categorical(["u", "v", "u"])})
        self.frame.index = pd.Index(["p", "q", "r"], name="key")

    def __getitem__(self, i: int) -> Any:
        return self.frame["a"].iloc[i]

    def __len__(self) -> int:
        return 3


FRAMES: list[Callable[[pd.DataFrame], Any]] = [
    lambda frame: frame.assign(a=[1, 2, 4]),
    lambda frame: frame.assign(a=[1.0, 2.0, 3.0]),
    lambda frame: frame.assign(b=["x", "y", "z"]),
    lambda frame: frame.assign(c=pd.Categorical(["u", "v", "u"], categories=["u", "v", "w"])),
    lambda frame: frame.rename(columns={"a": "A"}),
    lambda frame: frame.reset_index(drop=True),
    lambda frame: frame[["b", "a", "c"]],
]


def test_keys_of_tables() -> None:
    keys = {key_of(Frames())}
    assert keys == {key_of(Frames())}
    for change in FRAMES:
        frames = Frames()
        frames.frame = change(frames.frame)
        keys.add(key_of(frames))
    assert len(keys) == 1 + len(FRAMES)


def test_a_key_leaves_the_generators_and_the_dataset_as_they_are() -> None:
    dataset = Frames()
    facts, state = Facts(dataset), (torch.get_rng_state(), random.getstate(), np.random.get_state())
    key_of(dataset)
    assert facts.difference() is None
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == random.getstate()
    assert repr(state[2]) == repr(np.random.get_state())


def test_a_set_has_no_order() -> None:
    made = [Rows() for _ in range(2)]
    for rows, elements in zip(made, ([(1, "a"), (2, "b"), frozenset("xyz")],) * 2, strict=True):
        rows.options["kinds"] = set(elements if rows is made[0] else reversed(elements))
    assert key_of(made[0]) == key_of(made[1])


@pytest.mark.parametrize("name", DATASETS)
def test_a_key_sees_what_the_facts_of_a_pass_see(name: str) -> None:
    """The walk of a key goes wherever that of `Facts` goes."""
    dataset = DATASETS[name]()
    walk: Any = kept._Walk(None)
    walk.add(dataset, "dataset")
    facts: Any = Facts(dataset)
    unseen = [
        each
        for number, each in facts._seen.items()
        if number not in walk._seen and not kept._is_plain(each) and not is_of_a_package(each)
    ]
    assert unseen == []


def is_of_a_package(value: Any) -> bool:
    """What counts by the version of its package, or is made by each look."""
    kind = type(value)
    return kind.__module__.partition(".")[0] in ("builtins", "types", "torch", "typing", "functools", "abc", "random")


# Faults ---------------------------------------------------------------------------------------------------------------


def test_a_damaged_record_is_never_served(folder: Path) -> None:
    home = record_in(folder)
    whole = {path: path.read_bytes() for path in home.iterdir()}
    keeper, chosen = KeptFolder(folder), random.Random(3)
    served: list[str] = []
    for number in range(200):
        path = list(whole)[number % 2]
        content = bytearray(whole[path])
        place = chosen.randrange(len(content))
        home.mkdir(mode=0o700, exist_ok=True)
        for each, before in whole.items():
            each.write_bytes(before)
        if number % 8 < 2:
            path.write_bytes(content[:place])
        else:
            content[place] ^= 1 << chosen.randrange(8)
            path.write_bytes(content)
        found = keeper.find(home.name)
        if not (isinstance(found, str) and "damaged" in found and not home.exists()):
            served.append(f"{path.name} at {place}: {found}")
        if number % 40 == 0:  # as a program sees it
            home.mkdir(mode=0o700)
            for each, before in whole.items():
                each.write_bytes(before if each != path else bytes(content[:place]))
            batches, loader = passes(Rows(), folder, 2)
            assert kept_program.digest(batches[1]) == kept_program.digest(list(DataLoader(Rows(), batch_size=8)))
            assert loader.choice.reason.endswith("kept in " + str(folder))
    assert served == []
    assert len(list(folder.iterdir())) <= 1


@pytest.mark.parametrize("missing", ["tables", "manifest"])
def test_a_record_without_a_file_is_never_served(missing: str, folder: Path) -> None:
    (record_in(folder) / missing).unlink()
    assert not is_replayed(Rows(), folder)
    assert is_replayed(Rows(), folder)


@pytest.mark.parametrize(
    "change",
    [
        {"num_rows": 59},
        {"num_rows": "60"},
        {"form": ["pickle", "x"]},
        {"form": ["named", [], "os", "system"]},
        {"columns": []},
        {"size": 1 << 40},
        {"read_s": float("nan")},
        {"more": 1},
        {"key": "0" * 64},
        {"files": [{"path": 5}]},
    ],
    ids=str,
)
def test_a_manifest_of_other_content_is_never_served(change: dict[str, Any], folder: Path) -> None:
    path = record_in(folder) / "manifest"
    text = json.dumps(json.loads(path.read_bytes().partition(b"\n")[2]) | change).encode()
    path.write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
    found = KeptFolder(folder).find(path.parent.name)
    assert isinstance(found, str)
    assert not is_replayed(Rows(), folder)


@pytest.mark.parametrize("place", ["fsync", "rename", "mkdtemp", "open"])
def test_a_full_disk_costs_the_record_alone(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    loader = fasttrain.record(DataLoader(Rows(), batch_size=8), keep=tmp_path / "records")
    with monkeypatch.context() as patched:
        if place == "mkdtemp":
            patched.setattr(kept.tempfile, "mkdtemp", full)
        elif place == "open":
            patched.setattr(kept, "_write", full)
        else:
            patched.setattr(kept.os, place, full)
        batches = [list(loader) for _ in range(2)]
    assert kept_program.digest(batches[1]) == kept_program.digest(list(DataLoader(Rows(), batch_size=8)))
    assert "No space left on device" in loader.choice.reason
    assert list((tmp_path / "records").iterdir()) == []
    assert not is_replayed(Rows(), tmp_path / "records")


def in_a_fork(action: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def test_a_file_that_may_not_grow_costs_the_record_alone(tmp_path: Path) -> None:
    """The kernel itself refuses the write."""

    def record() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, 6_000))
        batches, loader = passes(Rows(), tmp_path / "records", 2)
        assert kept_program.digest(batches[1]) == kept_program.digest(list(DataLoader(Rows(), batch_size=8)))
        assert "File too large" in loader.choice.reason

    assert os.waitpid(in_a_fork(record), 0)[1] == 0
    assert list((tmp_path / "records").iterdir()) == []


class Large(Rows):
    """Rows that take some time to be written."""

    def __init__(self) -> None:
        super().__init__(100)

    def __getitem__(self, i: int) -> Any:
        return self.table[i], np.full(20_000, i + 0.5)


def test_a_process_that_is_killed_leaves_no_half(tmp_path: Path) -> None:
    folder = tmp_path / "records"
    begin = time.monotonic()
    os.waitpid(in_a_fork(lambda: passes(Large(), tmp_path / "other")), 0)
    took, chosen = time.monotonic() - begin, random.Random(5)
    for number in range(5):
        child = in_a_fork(lambda: passes(Large(), folder))
        while number % 2 and not list(folder.glob(".part-*/tables")) and not list(folder.glob("?" * 64)):
            time.sleep(0.001)  # half of the times, while it writes
        time.sleep(chosen.uniform(0, 0.01) if number % 2 else chosen.uniform(0.2, 1) * took)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for home in folder.glob("?" * 64):
            assert isinstance(KeptFolder(folder).find(home.name), kept.Kept)
            shutil.rmtree(home)
    is_replayed(Large(), folder)
    assert is_replayed(Large(), folder)
    assert len(list(folder.iterdir())) == 1, "what ended processes have left is removed"


def test_two_processes_keep_the_same_rows(tmp_path: Path) -> None:
    children = [in_a_fork(lambda: is_replayed(Large(), tmp_path / "records")) for _ in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert is_replayed(Large(), tmp_path / "records")
    assert len(list((tmp_path / "records").iterdir())) == 1


def test_a_record_goes_while_another_process_replays_it(folder: Path) -> None:
    loader = fasttrain.record(DataLoader(Rows(), batch_size=8), keep=folder)
    batches = iter(loader)
    first = next(batches)
    shutil.rmtree(record_in(folder))
    found = [first, *batches, *loader]
    plain = list(DataLoader(Rows(), batch_size=8))
    assert kept_program.digest(found) == kept_program.digest([*plain, *plain])


def test_rows_of_other_kinds_are_not_written(tmp_path: Path) -> None:
    from fasttrain.data.rows import RowStore

    store = RowStore(2)
    store.put([0, 1], [{"x": 1j}, {"x": 2j}])
    made = kept.Kept(store=store, read_s=0.0, is_pickled=False, is_shared=False, files=())
    with pytest.raises(NotWrittenError, match="a complex"):
        KeptFolder(tmp_path).write("0" * 64, made, {})


def test_reads_are_counted_as_the_harness_counts(tmp_path: Path) -> None:
    record = functools.partial(fasttrain.record, keep=tmp_path)
    assert reads_by_epoch(Case("dict of numpy"), record)[0] == len(DictOfNumpy())
    seed_all()
    assert reads_by_epoch(Case("dict of numpy"), record)[0] == 8
