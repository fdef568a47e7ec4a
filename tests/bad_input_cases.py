"""What users get wrong: the cases of test_bad_input.py, with the files, options and machines that they take."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch

HEADER = "rating,review,split"
GOOD = "\n".join(
    [HEADER]
    + ["good,a tasty meal,train", "bad,a stale meal,train"] * 15
    + ["good,a tasty dish,val", "bad,a stale dish,test"] * 5
)


@dataclass(frozen=True)
class Case:
    """What a user does.

    Attributes:
        did: in words, for the table.
        make: (empty folder, a trained run) -> the command's arguments; makes the files that they name.
        patch: makes this machine lack something.
        library: pattern of what a library adds to the message; its words vary with its version.
    """

    did: str
    make: Callable[[Path, Path], list[str]]
    patch: Callable[[pytest.MonkeyPatch], None] = lambda patch: None
    library: str = r"(?!)"


def train(folder: Path, *options: str, data: Path | None = None) -> list[str]:
    if data is None:
        data = folder / "reviews.csv"
        data.write_text(GOOD)
    small = ["--cutoff", "0", "--batch-size", "8", "--epochs", "1", "--device", "cpu"]
    return ["train", "--data", str(data), "--out", str(folder / "runs" / "mine"), *small, *options]


def table(did: str, content: str | bytes, *, name: str = "reviews.csv", library: str = r"(?!)") -> Case:
    """Trains on a file with this content."""

    def make(folder: Path, _run: Path) -> list[str]:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return train(folder, data=folder / name)

    return Case(did, make, library=library)


def rows(did: str, *added: str) -> Case:
    """Trains on a good table with these rows at its end."""
    return table(did, "\n".join([GOOD, *added]))


def options(*given: str, patch: Callable[[pytest.MonkeyPatch], None] = lambda patch: None) -> Case:
    """Trains on a good table with these options."""
    return Case(f"`{' '.join(given)}`", lambda folder, _run: train(folder, *given), patch)


def resume(did: str, *given: str, change: Callable[[Path], object] = lambda run: None, library: str = r"(?!)") -> Case:
    """Goes on with a copy of the trained run after a change to it."""
    return Case(did, lambda folder, run: ["--resume", copy(run, folder, change), *given], library=library)


def predict(did: str, *given: str, change: Callable[[Path], object] = lambda run: None, library: str = r"(?!)") -> Case:
    """Rates text with a copy of the trained run after a change to it."""
    texts = given or ("a tasty meal",)
    return Case(did, lambda folder, run: ["predict", copy(run, folder, change), *texts], library=library)


def copy(run: Path, folder: Path, change: Callable[[Path], object]) -> str:
    mine = folder / "mine"
    shutil.copytree(run, mine)
    change(mine)
    return str(mine)


def parquet(frame: Mapping[str, list[object]]) -> bytes:
    return pd.DataFrame(frame).to_parquet(index=False)


def edit_json(name: str, **changes: object) -> Callable[[Path], object]:
    def change(run: Path) -> None:
        (run / name).write_text(json.dumps({**json.loads((run / name).read_text()), **changes}))

    return change


def cut(name: str) -> Callable[[Path], object]:
    """Takes the second half of a file away."""
    return lambda run: os.truncate(run / name, (run / name).stat().st_size // 2)


def add_word(run: Path) -> None:
    vectorizer = json.loads((run / "vectorizer.json").read_text())
    known = vectorizer["review_vocab"]["token_to_idx"]
    known["new"] = len(known)
    (run / "vectorizer.json").write_text(json.dumps(vectorizer))


def resume_with_changed_data(folder: Path, run: Path) -> list[str]:
    data = folder / "changed.csv"
    data.write_text(GOOD.replace("tasty", "fine"))
    return ["--resume", copy(run, folder, lambda _: None), "--data", str(data)]


def edit_config(**changes: object) -> Callable[[Path], object]:
    """Changes config.json of a run that has no manifests."""

    def change(run: Path) -> None:
        for path in run.glob("checkpoint-*.json"):
            path.unlink()
        edit_json("config.json", **changes)(run)

    return change


def unreadable(folder: Path, _run: Path) -> list[str]:
    arguments = train(folder)
    (folder / "reviews.csv").chmod(0)
    return arguments


def a_folder_for_data(folder: Path, _run: Path) -> list[str]:
    (folder / "reviews.csv").mkdir()
    return train(folder, data=folder / "reviews.csv")


def out_at(name: str, *, prepare: Callable[[Path], object] = lambda path: None) -> Callable[[Path, Path], list[str]]:
    def make(folder: Path, _run: Path) -> list[str]:
        prepare(folder / name)
        return train(folder, "--out", str(folder / name))

    return make


def locked_folder(path: Path) -> None:
    path.parent.mkdir(mode=0o500)


def refuse(error: int, *names: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Makes methods of `Path` fail as the system does."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        for name in names:
            monkeypatch.setattr(Path, name, fail)

    return patch


def refuse_root(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Permissions bind every user but root, for whom the refusal is played."""
    return refuse(errno.EACCES, name) if os.geteuid() == 0 else lambda patch: None


def cuda_devices(count: int) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return patch


def plain_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasttrain.device._cpu_has", lambda *features: False)
    monkeypatch.setattr("fasttrain.device.cpu_name", lambda: "Plain CPU")


def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasttrain.step.eager.cpp_compiler", lambda: None)


PACKED = gzip.compress(GOOD.encode(), mtime=0)

REFUSED = {
    # --- the table ---
    "missing file": Case("`--data no.csv`", lambda folder, _run: train(folder, data=folder / "no.csv")),
    "folder": Case("`--data` of a folder", a_folder_for_data),
    "unreadable file": Case("`--data` of a file without permission", unreadable, refuse_root("read_bytes")),
    "unknown kind of file": table("a file `reviews.tsv`", GOOD, name="reviews.tsv"),
    "empty file": table("a file of 0 bytes", ""),
    "header only": table(f"`{HEADER}` and no rows", HEADER + "\n"),
    "missing column": table("a column `stars` in place of `rating`", GOOD.replace("rating", "stars", 1)),
    "duplicate column": table("two columns `review`", "rating,review,split,review\ngood,a,train,b\n"),
    "unknown split": rows("a row with the split `dev`", "good,a tasty meal,dev"),
    "wrongly spelled split": rows("a row with the split `Train`", "good,a tasty meal,Train"),
    "missing split": rows("a row without a split", "good,a tasty meal,"),
    "no train rows": table("only val and test rows", GOOD.replace("train", "val")),
    "one rating only": table("every train row rated `good`", GOOD.replace("bad", "good")),
    "unseen rating": rows("a val row rated `mixed`, as no train row is", "mixed,a tasty meal,val"),
    "missing rating": rows("a row without a rating", ",a tasty meal,train"),
    "short row": rows("a row of two fields", "good,a tasty meal"),
    "over-long row": rows("a review with a comma, without quotes", "good,a tasty, hot meal,train"),
    "text not in UTF-8": table("a row in Latin-1", f"{GOOD}\ngood,très bon,train".encode("latin-1")),
    "UTF-16 text": table("a table saved as UTF-16", GOOD.encode("utf-16")),
    "NUL byte": rows("a NUL byte in a review", "good,a \0 meal,train"),
    "unclosed quote": rows("a quote that is never closed", 'good,"a tasty meal,train', "bad,a stale meal,train"),
    "text after a quote": rows("a quote within a quoted review", 'good,"a "tasty" meal",train'),
    "truncated gzip": table("half of a .csv.gz", PACKED[: len(PACKED) // 2], name="reviews.csv.gz"),
    "not gzip": table("plain text named .csv.gz", HEADER, name="reviews.csv.gz", library=r"(?<=data )\(.*\)(?=:)"),
    "damaged gzip": table(
        "a .csv.gz with changed bytes",
        PACKED[:20] + bytes(len(PACKED) - 20),
        name="reviews.csv.gz",
        library=r"(?<=damaged )\(.*\)(?=:)",
    ),
    "gzip named .csv": table("gzip data named .csv", PACKED),
    "Excel file named .csv": table("an Excel file named .csv", b"PK\x03\x04" + bytes(100)),
    "Parquet named .csv": table("a Parquet file named .csv", b"PAR1" + bytes(100)),
    "damaged Parquet": table(
        "half of a .parquet", parquet({"rating": [1, 2]})[:300], name="reviews.parquet", library=r"(?<=file: ).*"
    ),
    "Parquet without a column": table(
        "a .parquet without `split`", parquet({"rating": [1, 2], "review": ["a", "b"]}), name="reviews.parquet"
    ),
    "numbers for reviews": table(
        "a .parquet with numbers for reviews",
        parquet({"rating": [1, 2], "review": [1, 2], "split": ["train", "train"]}),
        name="reviews.parquet",
    ),
    # --- options ---
    "batch larger than train": options("--batch-size", "31"),
    "no batch": options("--batch-size", "0"),
    "no epochs": options("--epochs", "0"),
    "learning rate of zero": options("--learning-rate", "0"),
    "negative learning rate": options("--learning-rate", "-1"),
    "learning rate not a number": options("--learning-rate", "nan"),
    "infinite learning rate": options("--learning-rate", "inf"),
    "learning rate that never falls": options("--lr-factor", "1"),
    "negative plateau": options("--lr-patience", "-1"),
    "negative cutoff": options("--cutoff", "-1"),
    "no patience": options("--patience", "0"),
    "negative seed": options("--seed", "-1"),
    "seed too large": options("--seed", str(10**20)),
    "no threads": options("--threads", "0"),
    "too many threads": options("--threads", str(10**20)),
    # --- the machine ---
    "no CUDA": options("--device", "cuda", patch=cuda_devices(0)),
    "too few CUDA devices": options("--device", "cuda:99", patch=cuda_devices(2)),
    "unknown device": options("--device", "gpu"),
    "unsupported device": options("--device", "mps"),
    "no bf16 units": options("--precision", "bf16", patch=plain_cpu),
    "no fp16 units": options("--precision", "fp16", patch=plain_cpu),
    "no compiler": options("--engine", "compiled", patch=no_compiler),
    "info on a missing device": Case("`info --device cuda`", lambda *_: ["info", "--device", "cuda"], cuda_devices(0)),
    # --- the run's folder ---
    "output exists": Case("`--out` of an old folder", out_at("old", prepare=lambda out: out.mkdir())),
    "output is a file": Case("`--out` of a file", out_at("old", prepare=lambda out: out.write_text("mine"))),
    "output under a file": Case(
        "`--out` under a file", out_at("old/new", prepare=lambda out: out.parent.write_text("mine"))
    ),
    "output without permission": Case(
        "`--out` in a folder without permission", out_at("old/new", prepare=locked_folder), refuse_root("mkdir")
    ),
    "name too long": Case("`--out` with a name of 300 letters", out_at("new/" + "x" * 300)),
    "name not in UTF-8": Case("`--out` with a byte 0xff in its name", out_at("new-\udcff")),
    "full disk": Case(
        "training on a full disk", lambda folder, _run: train(folder), refuse(errno.ENOSPC, "write_bytes")
    ),
    # --- going on with a run ---
    "resume of nothing": Case("`--resume no`", lambda folder, _run: ["--resume", str(folder / "no")]),
    "resume of another folder": Case("`--resume` of an empty folder", lambda folder, _run: ["--resume", str(folder)]),
    "resume with another option": resume("`--resume mine --cutoff 3`", "--cutoff", "3"),
    "resume with a default option": resume("`--resume mine --cutoff 25` (the default)", "--cutoff", "25"),
    "resume with changed data": Case("`--resume mine --data changed.csv`", resume_with_changed_data),
    "damaged checkpoint": resume("`--resume mine` with half a checkpoint", change=cut("checkpoint-1.safetensors")),
    "checkpoint of something else": resume(
        "`--resume mine` with a model for a checkpoint",
        change=lambda run: shutil.copy(run / "model.safetensors", run / "checkpoint-1.safetensors"),
    ),
    "missing checkpoint": resume(
        "`--resume mine` without its checkpoint",
        change=lambda run: (run / "checkpoint-1.safetensors").unlink(),
    ),
    "damaged config.json": resume(
        "`--resume mine` with half a config.json", change=cut("config.json"), library=r"(?<=read: ).*"
    ),
    "config.json of another shape": resume(
        "`--resume mine` with a list for config.json", change=lambda run: (run / "config.json").write_text("[]")
    ),
    "changed config.json": resume(
        '`--resume mine` with `"cutoff": 1` in config.json', change=edit_json("config.json", cutoff=1)
    ),
    "deep JSON": resume(
        "`--resume mine` with 100,000 nested lists in config.json",
        change=lambda run: (run / "config.json").write_text("[" * 100_000),
        library=r"(?<=read: ).*",
    ),
    "config.json with another option": resume("`--resume mine` of another version", change=edit_config(momentum=0.9)),
    "config.json with a wrong value": resume(
        '`--resume mine` with `"epochs": "two"` in config.json', change=edit_config(epochs="two")
    ),
    # --- predictions ---
    "predict with nothing": Case("`predict no TEXT`", lambda folder, _run: ["predict", str(folder / "no"), "a meal"]),
    "predict with another folder": Case(
        "`predict` of an empty folder", lambda folder, _run: ["predict", str(folder), "a meal"]
    ),
    "missing model": predict(
        "`predict mine TEXT` without its model", change=lambda run: (run / "model.safetensors").unlink()
    ),
    "damaged model": predict("`predict mine TEXT` with half a model", change=cut("model.safetensors")),
    "missing vectorizer": predict(
        "`predict mine TEXT` without its vectorizer", change=lambda run: (run / "vectorizer.json").unlink()
    ),
    "damaged vectorizer": predict("`predict mine TEXT` with half a vectorizer", change=cut("vectorizer.json")),
    "vectorizer of another run": predict(
        "`predict mine TEXT` with one word too many in the vectorizer", change=add_word
    ),
    "text not in UTF-8 to predict": predict(
        "`predict mine` with a byte 0xff in TEXT", "a \udcff meal", "--raw", library=r"(?<=hold: ).*"
    ),
}

ACCEPTED = {
    "no val rows": table("no val rows", GOOD.replace("val", "train")),
    "no test rows": table("no test rows", GOOD.replace("test", "val")),
    "empty reviews": rows("two empty reviews", "good,,train", 'bad,"",val'),
    "no known words": options("--cutoff", "1000"),
}
