"""`predict`: ratings of new text with a trained run."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from fasttrain.commands.shared import print_error, print_json, print_line
from fasttrain.data.tokens import Clean
from fasttrain.errors import ConfigError, DataError
from fasttrain.workloads.predict import Prediction, note_on_cleaning, predict

__all__ = ["Predict"]


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Rate new text with a trained run: arguments, or lines on stdin."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""

    text: tyro.conf.Positional[tuple[str, ...]] = ()
    """What to rate; without any, each line of stdin."""

    clean: Clean | None = None
    """How the text is cleaned, see `train --help`. By default as the run's own table was: predictions are then those
    of the test."""

    raw: bool = False
    """The same as --clean none."""

    json: bool = False
    """Print one JSON document on stdout."""

    debug: bool = False
    """Show the traceback of an error."""

    def execute(self, _arguments: list[str]) -> int:
        """Rates the texts; returns the exit code."""
        texts = list(self.text) or _lines_of_stdin()
        if self.raw and self.clean not in (None, "none"):
            raise ConfigError(f"--raw is the same as --clean none: leave it out with --clean {self.clean}")
        clean = "none" if self.raw else self.clean
        predictions = predict(self.run, texts, clean=clean, tell=_print_note)
        note = note_on_cleaning(self.run, texts) if clean is None else None
        if note is not None:
            _print_note(note)
        if self.json:
            print_json([asdict(each) for each in predictions])
        else:
            for each in predictions:
                print_line(_prediction_line(each))
        return 0


def _print_note(note: str) -> None:
    print_error(f"note: {note}")


def _lines_of_stdin() -> list[str]:
    if sys.stdin is None:  # pyright: ignore[reportUnnecessaryComparison] - Python sets it to None if it is closed
        raise ConfigError("there is no text: stdin is closed; give the text as arguments")
    try:
        return [line.rstrip("\r\n") for line in sys.stdin]
    except UnicodeDecodeError as error:
        found = error.object[error.start]
        raise DataError(f"byte 0x{found:02x} is not UTF-8: give text in UTF-8", file="stdin") from error


def _prediction_line(prediction: Prediction) -> str:
    known = ", ".join(prediction.known_words) or "none: the rating is the model's bias alone"
    return f"{prediction.rating}  {prediction.probability:.1%}  {prediction.text}\n    known words: {known}"
