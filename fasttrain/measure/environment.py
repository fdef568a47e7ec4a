"""Under what something was measured: hardware, versions, commit, load."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fasttrain.device import cpu_name, device_name, total_bytes, versions

__all__ = [
    "clock_mhz",
    "core_wait_s",
    "environment",
    "load_average",
    "now",
    "runnable",
    "swapped_in",
    "throttle_count",
    "usable_cores",
]

CHECKOUT = Path(__file__).parents[2]
"""Where fasttrain's repository is, if it runs from one."""

CODE = ("fasttrain", "benchmarks/*.py", "benchmarks/peers")
"""What figures depend on: changes elsewhere do not count as uncommitted ones."""


def environment(device: torch.device) -> dict[str, Any]:
    """What figures depend on; commit and changes are None where fasttrain does not run from a git checkout."""
    status = _git("status", "--porcelain", "--", *CODE)
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "memory_bytes": total_bytes(torch.device("cpu")),
        "device": device_name(device),
        "system": platform.platform(),
        **versions(),
        "commit": _git("rev-parse", "HEAD"),
        "has_uncommitted_changes": None if status is None else status != "",
        "clock_mhz": clock_mhz(),
        "load_average": load_average(),
    }


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_average() -> float | None:
    """Of the last minute; None where the system tells none."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def clock_mhz() -> float | None:
    """Mean clock of the cores right now; None where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        clocks = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    except (OSError, ValueError):
        return None
    return round(sum(clocks) / len(clocks), 1) if clocks else None


def runnable() -> int | None:
    """Threads that run or wait for a core right now, this one left out; None where the system does not tell."""
    try:
        return int(Path("/proc/loadavg").read_text().split()[3].split("/")[0]) - 1
    except (OSError, ValueError, IndexError):
        return None


def core_wait_s() -> float:
    """Seconds that the calling thread has waited for a core so far; 0: or the system does not tell."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def throttle_count() -> int:
    """How often the CPU was slowed down so far, by its heat or by a quota of this control group; 0: or not known."""
    files = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_count")
    heat = sum(_number(path) for path in files)
    try:
        quota = Path("/sys/fs/cgroup/cpu.stat").read_text().split()
    except OSError:
        return heat
    return heat + (int(quota[quota.index("nr_throttled") + 1]) if "nr_throttled" in quota else 0)


def swapped_in() -> int:
    """Pages that came back from the disk so far, because memory was short; 0: or the system does not tell."""
    try:
        facts = Path("/proc/vmstat").read_text().split()
    except OSError:
        return 0
    return int(facts[facts.index("pswpin") + 1]) if "pswpin" in facts else 0


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def _git(*arguments: str) -> str | None:
    """What git says about fasttrain's checkout; None where there is none."""
    if not (CHECKOUT / ".git").exists():  # installed: a repository further up would be another project's
        return None
    try:
        ran = subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None
