"""The command line: options are generated from the commands' dataclasses; only results go to stdout."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from fasttrain.commands.cache import Cache
from fasttrain.commands.info import Info
from fasttrain.commands.predict import Predict
from fasttrain.commands.shared import EXIT_BAD_INPUT, EXIT_INTERRUPTED, Runnable
from fasttrain.commands.train import Train
from fasttrain.errors import FasttrainError

__all__ = ["main"]

DESCRIPTION = (
    "The textbook PyTorch training loop, run as fast as the hardware allows, with the same numbers. "
    "Without a command it trains: `python -m fasttrain --data reviews.csv` is `python -m fasttrain train --data "
    "reviews.csv`, and without --data the reviews are generated."
)

Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Predict, tyro.conf.subcommand("predict")]
    | Annotated[Info, tyro.conf.subcommand("info")]
    | Annotated[Cache, tyro.conf.subcommand("cache")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0 done, 2 bad input or usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        code = _parse(arguments).execute(arguments)
        sys.stdout.flush()
        return code
    except FasttrainError as error:
        if debug:
            raise
        print(f"fasttrain: {error}", file=sys.stderr)  # noqa: T201
        return EXIT_BAD_INPUT
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 0
    except KeyboardInterrupt:
        print("fasttrain: interrupted", file=sys.stderr)  # noqa: T201
        return EXIT_INTERRUPTED


def _parse(arguments: list[str]) -> Runnable:
    is_bare = not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help"))
    return tyro.cli(
        Command,  # pyright: ignore[reportArgumentType]  # a union of dataclasses is what tyro takes for subcommands
        prog="fasttrain",
        description=DESCRIPTION,
        args=["train", *arguments] if is_bare else arguments,
    )
