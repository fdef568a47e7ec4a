"""Commands as a user types them, for the tests of the command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from fasttrain import cli

FILES = {
    "checkpoint.json",
    "checkpoint.safetensors",
    "config.json",
    "history.csv",
    "manifest.json",
    "model.safetensors",
    "report.html",
    "summary.json",
    "vectorizer.json",
}


def files_of(run: Path) -> set[str]:
    """Names of a run's files, those of checkpoints without the number of their epoch."""
    return {re.sub(r"^checkpoint-\d+", "checkpoint", path.name) for path in run.iterdir()}


def small(data: Path, out: Path, *options: str) -> list[str]:
    shape = ["--cutoff", "5", "--batch-size", "16", "--device", "cpu"]
    return ["train", "--data", str(data), "--out", str(out), *shape, *options]


def strict_json(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def command(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "fasttrain", *arguments],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
