"""The commands. Options are generated from the dataclasses; results go to stdout, everything else to stderr."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import torch
import tyro

from fasttrain.device import resolve_device
from fasttrain.errors import ConfigError, DataError, FasttrainError
from fasttrain.info import describe_machine
from fasttrain.loop import Interrupted
from fasttrain.run.config import TrainConfig
from fasttrain.run.folder import RunFolder, json_text
from fasttrain.step.cache import ProgramCache, default_folder
from fasttrain.workloads.predict import Prediction, predict
from fasttrain.workloads.reviews import ReviewsOutcome, train_reviews, warm_reviews

__all__ = ["main"]

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

DESCRIPTION = (
    "The textbook PyTorch training loop, run as fast as the hardware allows, with the same numbers. "
    "Without a command it trains: `python -m fasttrain --data reviews.csv` is `python -m fasttrain train --data "
    "reviews.csv`, and without --data the reviews are generated."
)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train the review classifier; leaves a run folder with model, history and report.

    Reviews come from a table with the columns rating, review and split (train, val, test), or are generated.
    """

    config: tyro.conf.OmitArgPrefixes[TrainConfig]

    resume: Path | None = None
    """Go on with an earlier run, in its folder, from its last finished epoch. Options are the run's; --epochs may raise
    its limit."""

    json: bool = False
    """Print one JSON document on stdout."""

    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Rate new text with a trained run: arguments, or lines on stdin."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""

    text: tyro.conf.Positional[tuple[str, ...]] = ()
    """What to rate; without any, each line of stdin."""

    raw: bool = False
    """The text is already in tokens, separated by single spaces: do not clean it."""

    json: bool = False
    """Print one JSON document on stdout."""

    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Show or clear the compiled programs on disk, or compile a job's step ahead (`warm`, with train options)."""

    action: tyro.conf.Positional[Literal["show", "clear", "warm"]] = "show"
    """show lists the programs, clear removes them, warm compiles for a job that is too short to do so itself."""

    config: tyro.conf.OmitArgPrefixes[TrainConfig]

    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True, kw_only=True)
class Info:
    """Tell what this machine can do, and what `auto` would choose, with reasons."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    json: bool = False
    """Print one JSON document on stdout."""

    debug: bool = False
    """Show the traceback of an error."""


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
        code = _run(_parse(arguments), arguments)
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


def _run(command: Train | Predict | Info | Cache, arguments: list[str]) -> int:
    if isinstance(command, Train):
        return _train(command, arguments)
    if isinstance(command, Predict):
        return _predict(command)
    return _info(command) if isinstance(command, Info) else _cache(command)


def _parse(arguments: list[str]) -> Train | Predict | Info | Cache:
    is_bare = not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help"))
    return tyro.cli(
        Command,  # pyright: ignore[reportArgumentType]  # a union of dataclasses is what tyro takes for subcommands
        prog="fasttrain",
        description=DESCRIPTION,
        args=["train", *arguments] if is_bare else arguments,
    )


def _train(command: Train, arguments: list[str]) -> int:
    config = command.config if command.resume is None else _resumed(command.resume, arguments)
    _set_up_process(config)
    with _first_interrupt_ends_cleanly() as interrupt:
        outcome = train_reviews(
            config,
            resume=command.resume,
            check_interrupt=interrupt.check,
            command=shlex.join(["python", "-m", "fasttrain", *arguments]),
        )
    if command.json:
        _print_json({"run": str(outcome.path), "notes": outcome.notes, **outcome.summary})
    else:
        _print_outcome(outcome)
    return EXIT_INTERRUPTED if outcome.summary["stopped"] == "interrupted" else 0


def _set_up_process(config: TrainConfig) -> None:
    """Threads and TF32: settings of a whole process, which a command may change and a library may not."""
    if config.threads is not None or resolve_device(config.device).type == "cpu":
        torch.set_num_threads(config.threads or 1)
    if config.tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True


def _resumed(run: Path, arguments: list[str]) -> TrainConfig:
    """The run's own options, with what may change: the limit of epochs.

    The arguments are read again with the run's options as defaults: what differs then was given.

    Raises:
        ConfigError: another option was given that differs from the run's.
        RunError: the folder is not a run's.
    """
    stored = TrainConfig.from_dict(RunFolder.open(run).read_json("config.json"))
    options = arguments[1:] if arguments[0] == "train" else arguments
    given = tyro.cli(Train, args=options, default=Train(config=stored)).config
    for option in fields(TrainConfig):
        value, kept = getattr(given, option.name), getattr(stored, option.name)
        if option.name != "epochs" and value != kept:
            raise ConfigError(
                f"--{option.name.replace('_', '-')} {value}: {run} was trained with {kept}; "
                "a resumed run keeps its options, only --epochs may change"
            )
    return given


class _Interrupt:
    """Turns the first Ctrl-C during training into a clean end after the current step."""

    def __init__(self) -> None:
        self._is_training = False
        self._is_wanted = False

    def check(self) -> None:
        """Called after every step."""
        self._is_training = True
        if self._is_wanted:
            raise Interrupted

    def handle(self, _signal: int, _frame: FrameType | None) -> None:
        """The handler of SIGINT."""
        if self._is_wanted or not self._is_training:
            raise KeyboardInterrupt
        self._is_wanted = True


@contextmanager
def _first_interrupt_ends_cleanly() -> Generator[_Interrupt]:
    interrupt = _Interrupt()
    before = signal.signal(signal.SIGINT, interrupt.handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


def _predict(command: Predict) -> int:
    texts = list(command.text) or _lines_of_stdin()
    predictions = predict(command.run, texts, raw=command.raw)
    if command.json:
        _print_json([asdict(each) for each in predictions])
    else:
        for each in predictions:
            _print(_prediction_line(each))
    return 0


def _lines_of_stdin() -> list[str]:
    try:
        return [line.rstrip("\r\n") for line in sys.stdin]
    except UnicodeDecodeError as error:
        found = error.object[error.start]
        raise DataError(f"byte 0x{found:02x} is not UTF-8: give text in UTF-8", file="stdin") from error


def _prediction_line(prediction: Prediction) -> str:
    known = ", ".join(prediction.known_words) or "none: the rating is the model's bias alone"
    return f"{prediction.rating}  {prediction.probability:.1%}  {prediction.text}\n    known words: {known}"


def _info(command: Info) -> int:
    machine = describe_machine(resolve_device(command.device))
    if command.json:
        _print_json(machine)
    else:
        width = max(map(len, machine))
        for name, value in machine.items():
            _print(f"{name:<{width}}  {value}")
    return 0


def _cache(command: Cache) -> int:
    cache = ProgramCache(default_folder())
    if command.action == "clear":
        _print(f"removed {cache.clear()} programs from {cache.folder}")
    elif command.action == "warm":
        _set_up_process(command.config)
        choice = warm_reviews(command.config)
        _print(f"auto will run this job {choice.value}: {choice.reason}")
    else:
        for entry in cache.entries():
            used = datetime.fromtimestamp(entry.used)
            _print(f"{entry.key[:12]}  {entry.num_bytes / 2**20:6.1f} MiB  used {used:%Y-%m-%d %H:%M}  {entry.what}")
        _print(f"{len(cache.entries())} programs in {cache.folder}")
    return 0


def _print_outcome(outcome: ReviewsOutcome) -> None:
    summary = outcome.summary
    if summary["test_loss"] is not None:
        _print(f"test loss {summary['test_loss']:.4f}, test accuracy {summary['test_accuracy']:.2f}%")
    if summary["best_epoch"] is not None:
        _print(f"best epoch {summary['best_epoch']} of {summary['epochs']}, {summary['samples_per_s']:,.0f} samples/s")
    for rating, words in outcome.influential_words.items():
        _print(f"{rating}: {' '.join(word for word, _ in words)}")
    for note in outcome.notes:
        _print(f"note: {note}")
    _print(f"engine {summary['engine']}: {summary['engine_reason']}")
    _print(f"run: {outcome.path} (open {outcome.path / 'report.html'})")


def _print_json(document: Any) -> None:
    _print(json_text(document))


def _print(line: str) -> None:
    print(line)  # noqa: T201
