"""The whole check on a machine with a CUDA GPU, in under nine minutes: the gpu tests, then the benchmarks.

    python -m benchmarks.gpu [--out FOLDER] [--data FILE]

Each part has a bound on its time and runs whether or not the one before it failed. The records (small JSON files) and
the output of the tests go to FOLDER; commit the records under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

PARTS_S = {"tests": 240, "reviews": 200, "mlp": 90}
"""Seconds that each part may take."""


def commands(out: Path, data: Path | None) -> dict[str, list[str]]:
    """What each part runs."""
    python = [sys.executable, "-m"]
    table = [] if data is None else ["--data", str(data)]
    return {
        "tests": [*python, "pytest", "-q", "-m", "gpu", "tests"],
        "reviews": [*python, "benchmarks.reviews", "--device", "cuda", "--out", str(out / "reviews-cuda.json"), *table],
        "mlp": [*python, "benchmarks.mlp", "--device", "cuda", "--out", str(out / "mlp-cuda.json")],
    }


def run_part(name: str, command: list[str], out: Path) -> str:
    """Runs a part, its output in `out`/<name>.txt, and says how it ended."""
    begin = time.perf_counter()
    with (out / f"{name}.txt").open("wb") as log:
        try:
            code = subprocess.run(command, stdout=log, stderr=log, timeout=PARTS_S[name], check=False).returncode
        except subprocess.TimeoutExpired:
            return f"ended after {PARTS_S[name]} s"
    return f"{'ok' if code == 0 else f'exit code {code}'}, {time.perf_counter() - begin:.0f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder for records and output")
    parser.add_argument("--data", type=Path, help="table of reviews, as benchmarks.reviews takes it")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("this machine has no CUDA device that torch can use", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    ended = {name: run_part(name, each, options.out) for name, each in commands(options.out, options.data).items()}
    for name, how in ended.items():
        print(f"{name}: {how} (see {options.out / name}.txt)")
    return 0 if all(how.startswith("ok") for how in ended.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
