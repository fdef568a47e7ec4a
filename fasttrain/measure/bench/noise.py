"""What is known of this machine's noise: one small file of this user's, written by `bench --aa`, read by later runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fasttrain.errors import DataError
from fasttrain.measure.bench.record import noise_from
from fasttrain.measure.files import write_text
from fasttrain.measure.strict import Node, read_json
from fasttrain.measure.verdict.stats import Noise
from fasttrain.step.cache import default_folder

__all__ = ["known_noise", "noise_file", "noise_with", "remember_noise"]

SCHEMA_VERSION = 2
"""Raise it when noise is measured in another way; what an older version has measured is forgotten."""

OF_MACHINE = ("cpu", "cores", "device")
"""What of an environment makes a machine another one."""


def noise_file() -> Path:
    """`$XDG_CACHE_HOME/fasttrain/noise.json`, by default below `~/.cache`."""
    return default_folder().parent / "noise.json"


def remember_noise(environment: dict[str, Any], workload: str, noise: Noise) -> None:
    """Keeps what an arm against itself has told.

    Args:
        environment: it was measured in.
        workload: it was measured with.
        noise: what it told; it replaces what was known before.

    Raises:
        DataError: the file cannot be written, or is damaged: remove it.
    """
    path = noise_file()
    machines = _machines(path)
    machines.setdefault(_machine(environment), {})[workload] = noise
    content = {
        "schema_version": SCHEMA_VERSION,
        "kind": "noise",
        "machines": {
            machine: {name: asdict(each) for name, each in known.items()} for machine, known in machines.items()
        },
    }
    write_text(path, json.dumps(content, indent=1), "the noise")


def known_noise(environment: dict[str, Any], workload: str) -> Noise | None:
    """What is known of this machine: with this workload, else the worst of any; None where nothing is.

    Raises:
        DataError: the file is damaged: remove it.
    """
    found = noise_with(environment, workload)
    return None if found is None else found[1]


def noise_with(environment: dict[str, Any], workload: str) -> tuple[str, Noise] | None:
    """As `known_noise`, with the workload that it was measured with."""
    known = _machines(noise_file()).get(_machine(environment), {})
    if workload in known:
        return workload, known[workload]
    return max(known.items(), key=lambda entry: entry[1].floor, default=None)


def _machine(environment: dict[str, Any]) -> str:
    return ", ".join(f"{name} {environment[name]}" for name in OF_MACHINE)


def _machines(path: Path) -> dict[str, dict[str, Noise]]:
    if not path.exists():
        return {}
    try:
        node = Node(read_json(path), "the noise")
        if node.integer("schema_version") < SCHEMA_VERSION and node.text("kind") == "noise":
            return {}
        if node.integer("schema_version") != SCHEMA_VERSION or node.text("kind") != "noise":
            raise DataError(f"is not of schema version {SCHEMA_VERSION}: remove it, and run bench --aa again")
        machines = node.named("machines")
        return {
            machine: {workload: noise_from(known.node(workload)) for workload in known.names()}
            for machine, known in machines.items()
        }
    except DataError as error:
        raise DataError(error.problem, file=str(path)) from None
