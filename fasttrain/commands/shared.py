"""What every command shares: its exit codes and how it prints."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from fasttrain.device import resolve_device
from fasttrain.run.config import TrainConfig
from fasttrain.run.folder import json_text

__all__ = ["EXIT_BAD_INPUT", "EXIT_INTERRUPTED", "Runnable", "print_json", "print_line", "set_up_process"]

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class Runnable(Protocol):
    """The options of a command, as they were given."""

    def execute(self, arguments: list[str], /) -> int:
        """Carries the command out.

        Args:
            arguments: the command line, for a command that repeats or records it.

        Returns:
            The exit code.
        """
        ...


def set_up_process(config: TrainConfig) -> None:
    """Threads and TF32: settings of a whole process, which a command may change and a library may not."""
    if config.threads is not None or resolve_device(config.device).type == "cpu":
        torch.set_num_threads(config.threads or 1)
    if config.tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    print_line(json_text(document))


def print_line(line: str) -> None:
    """One line on stdout."""
    print(line)  # noqa: T201
