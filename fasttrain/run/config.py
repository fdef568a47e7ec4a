"""The options of `train`, checked when they are made; the command line is generated from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fasttrain.data.tokens import CleanOrAuto
from fasttrain.device import PrecisionOrAuto
from fasttrain.errors import ConfigError
from fasttrain.printable import is_utf8
from fasttrain.step.train_step import EngineName

__all__ = ["TrainConfig"]

LARGEST_SEED = 2**64 - 1
"""Torch's generators take no larger one."""

LARGEST_THREADS = 2**31 - 1
"""Torch stores the number of threads in 32 bits."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train the review classifier of the textbook."""

    data: Path | None = None
    """A table with the columns rating, review and split (train, val, test): .csv, .csv.gz or .parquet.
    Without it, reviews are generated."""

    out: Path | None = None
    """Folder for the run's files; it must not exist. By default runs/<date>-<time>-reviews."""

    epochs: int = 100
    """Epochs at most."""

    batch_size: int = 128
    """Reviews in a batch; in training the short last batch of an epoch is dropped."""

    learning_rate: float = 1e-3
    """Adam's, at the start."""

    lr_factor: float = 0.5
    """What the learning rate is multiplied with when the validation loss has reached a plateau."""

    lr_patience: int = 1
    """Epochs without a new best validation loss that a plateau may last before the learning rate falls."""

    cutoff: int = 25
    """A word is known if it occurs more often than this in the train split."""

    clean: CleanOrAuto = "auto"
    """How reviews are cleaned, in training, validation, test and `predict` alike. none: words are what stands between
    spaces. book: lower case, and a space for everything but a-z . , ! ?. unicode: for any script: case folded, words
    kept whole, punctuation apart, emoji kept, Chinese, Japanese, Thai and the like cut into characters and pairs of
    them. auto: none where the train split is already in tokens that unicode would change, else unicode, which leaves
    text cleaned as the book does as it is."""

    patience: int = 5
    """Stop after so many epochs without a new best validation loss."""

    seed: int = 1337
    """Of the initial weights, the order of the data, and the generated reviews."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto is CUDA where there is one."""

    engine: EngineName = "auto"
    """What runs the steps; see `info` for what auto chooses here, and why."""

    precision: PrecisionOrAuto = "auto"
    """Of the forward pass; auto is bf16 on CUDA hardware that is good at it, else fp32."""

    threads: int | Literal["auto"] | None = None
    """CPU threads of a step, or auto: before training, the job's own steps are timed (eagerly) with 1, 2, 4 ...
    By default 1 on the CPU, since a step on sparse reviews is too small to share. Two runs with `--threads auto` may
    get other counts, and so differ in their last digits."""

    tf32: bool = False
    """Let fp32 matrix products use TF32 on CUDA: faster, with 10 bits of mantissa."""

    channels_last: bool = False
    """Keep four-dimensional weights in channels_last order; a model without any is not affected."""

    cache: bool = True
    """Keep the vectorised table on disk, by content, so that the next run starts at once."""

    def __post_init__(self) -> None:
        """Checks every option by itself.

        Raises:
            ConfigError: an option that cannot work.
        """
        for name in ("epochs", "batch_size", "patience"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("cutoff", "seed", "lr_patience"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(self.seed <= LARGEST_SEED, "seed", self.seed, f"{LARGEST_SEED} at most")
        _require(0 < self.learning_rate < float("inf"), "learning_rate", self.learning_rate, "a positive number")
        _require(0 < self.lr_factor < 1, "lr_factor", self.lr_factor, "a number between 0 and 1")
        if isinstance(self.threads, int):
            _require(self.threads >= 1, "threads", self.threads, "1 or more, or auto")
            _require(self.threads <= LARGEST_THREADS, "threads", self.threads, f"{LARGEST_THREADS} at most")
        for name in ("data", "out"):
            _require(is_utf8(str(getattr(self, name))), name, getattr(self, name), "a name in UTF-8")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, as in config.json."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> TrainConfig:
        """The options that `to_dict` wrote.

        Raises:
            ConfigError: an unknown option, or one that cannot work.
        """
        kinds = get_type_hints(cls)
        unknown = sorted(set(given) - set(kinds))
        if unknown:
            raise ConfigError(
                f"unknown options {', '.join(unknown)}; was this run made by another version of fasttrain?"
            )
        for name, value in given.items():
            _require(_is_stored(value, kinds[name]), name, value, "a value of the option's type")
        paths: dict[str, Any] = {name: Path(given[name]) for name in ("data", "out") if given.get(name) is not None}
        return cls(**{**given, **paths})


def _is_stored(value: object, kind: Any) -> bool:
    """Whether a value from JSON can be one of an option of this type."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_args(kind):
        return any(_is_stored(value, each) for each in get_args(kind))
    stored_as = {Path: (str,), float: (float, int)}
    return type(value) in stored_as.get(kind, (kind,))


def _require(is_met: bool, name: str, value: object, allowed: str) -> None:
    if not is_met:
        raise ConfigError(f"--{name.replace('_', '-')} {value}: use {allowed}")
