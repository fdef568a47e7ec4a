"""Where arms come from: the core ones, peers in a checkout's `benchmarks/peers`, and a user's own module."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any, cast

from fasttrain.errors import ConfigError, EngineError
from fasttrain.measure.bench.arm import Arm
from fasttrain.measure.bench.arms import CORE_ARMS
from fasttrain.workloads.job import Job

__all__ = ["DEFAULT_ARMS", "NOT_THERE", "check_source", "find_factory", "peers"]

DEFAULT_ARMS = ("textbook", "record", "drop-in", "tuned", "eager", "torch-compile", "compiled", "auto")

PEERS = "benchmarks.peers"

NOT_THERE = 44
"""Exit code of `python -m fasttrain.measure.bench.sources SOURCE` where there is no such arm: no other error's."""


def peers() -> tuple[str, ...]:
    """Names of the peers.

    Raises:
        ConfigError: they are not in reach: a checkout of fasttrain has them.
    """
    try:
        return tuple(importlib.import_module(PEERS).NAMES)
    except ModuleNotFoundError as error:
        raise ConfigError("the peers are in fasttrain's repository: run this in the root of a checkout") from error


def check_source(source: str) -> None:
    """Refuses a name that stands for no arm.

    Args:
        source: a core arm, a peer, or "module:function" of a user's own.

    Raises:
        ConfigError: it is none of these.
    """
    if ":" in source or source in CORE_ARMS:
        return
    try:
        known = (*CORE_ARMS, *peers())
    except ConfigError:
        known = tuple(CORE_ARMS)
    if source not in known:
        raise ConfigError(f"arm {source!r}: use one of {', '.join(known)}, or --module my_code:make_arm")


def find_factory(source: str) -> Callable[[Job], Arm]:
    """Imports what makes an arm.

    Args:
        source: as `check_source` takes it.

    Raises:
        EngineError: a package that the peer needs is not installed.
        ConfigError: a user's module has no such function, or is not there.
    """
    if source in CORE_ARMS:
        return CORE_ARMS[source]
    if ":" in source:
        return _users_factory(source)
    module = f"{PEERS}.{source.replace('-', '_')}"
    try:
        return importlib.import_module(module).make_arm
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("benchmarks"):
            raise ConfigError(f"arm {source!r}: there is no {module}") from error
        raise EngineError(f"{error.name} is not installed: pip install '.[peers]'") from error


def _users_factory(source: str) -> Callable[[Job], Arm]:
    name, _, attribute = source.partition(":")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # a package that the user's own code imports
        raise ConfigError(f"--module {source}: there is no module {error.name!r} here; run in its folder") from error
    factory: Any = getattr(module, attribute, None)
    if not callable(factory):
        raise ConfigError(f"--module {source}: {name} has no function {attribute!r}")
    return cast("Callable[[Job], Arm]", factory)


def main(source: str) -> int:
    """Looks for an arm; returns the exit code, and says on stderr why there is none."""
    try:
        find_factory(source)
    except ConfigError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return NOT_THERE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
