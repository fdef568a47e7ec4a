"""The command line: options are generated from the commands' dataclasses; only results go to stdout."""

from __future__ import annotations

import functools
import importlib
import operator
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from fasttrain.commands.shared import (
    EXIT_BAD_INPUT,
    EXIT_INTERRUPTED,
    Runnable,
    drop_output,
    flush_streams,
    interrupts_end_at_once,
    print_error,
)
from fasttrain.errors import FasttrainError
from fasttrain.printable import printable

__all__ = ["main"]

DESCRIPTION = (
    "The textbook PyTorch training loop, run as fast as the hardware allows, with the same numbers. "
    "Without a command it trains: `python -m fasttrain --data reviews.csv` is `python -m fasttrain train --data "
    "reviews.csv`, and without --data the reviews are generated."
)

COMMANDS = ("train", "predict", "info", "bench", "profile", "compare", "cache")
"""Each is the module of its name in `fasttrain.commands`, and the class of its name there. Only the one that was asked
for is imported: `compare` needs no torch, which takes seconds to import."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0 done, 2 bad input or usage, 130 interrupted; `compare` has more."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    code = EXIT_INTERRUPTED
    try:
        code = _parse(arguments).execute(arguments)
        flush_streams()
    except (FasttrainError, UnicodeEncodeError) as error:  # the latter: of a terminal, or a pipe, that is not UTF-8
        if debug:
            raise
        _print_end(str(error), error)
        return EXIT_BAD_INPUT
    except BrokenPipeError:  # the reader of our output has seen enough
        drop_output()  # Python flushes once more at its end
    except KeyboardInterrupt as error:
        _print_end("interrupted", error)
        return EXIT_INTERRUPTED
    return code


def _print_end(message: str, error: BaseException) -> None:
    """Says why the command ended, with the notes of the error. The message may quote from anybody's files."""
    for text in (message, *getattr(error, "__notes__", ())):
        for line in f"fasttrain: {text}".split("\n"):
            print_error(printable(line))


def _parse(arguments: list[str]) -> Runnable:
    is_bare = not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help"))
    name, *options = ["train", *arguments] if is_bare else arguments
    if name in COMMANDS:
        return tyro.cli(_options(name), prog=f"fasttrain {name}", args=options)
    every: Any = functools.reduce(
        operator.or_, (Annotated[_options(each), tyro.conf.subcommand(each)] for each in COMMANDS)
    )
    return tyro.cli(every, prog="fasttrain", description=DESCRIPTION, args=arguments)


def _options(name: str) -> Any:
    """The dataclass of a command's options."""
    with interrupts_end_at_once():
        module = importlib.import_module(f"fasttrain.commands.{name}")
    return getattr(module, name.capitalize())
