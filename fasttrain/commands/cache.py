"""`cache`: the compiled programs on disk."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import tyro

from fasttrain.commands.process import set_up_process
from fasttrain.commands.shared import print_line
from fasttrain.run.config import TrainConfig
from fasttrain.step.build import stop_ahead
from fasttrain.step.cache import ProgramCache, default_folder
from fasttrain.workloads.reviews import warm_reviews

__all__ = ["Cache"]


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Show or clear the compiled programs on disk, or compile a job's step ahead (`warm`, with train options)."""

    action: tyro.conf.Positional[Literal["show", "clear", "warm", "stop"]] = "show"
    """show lists the programs; clear removes them and what was decided about them; warm compiles for a job that is too
    short to do so itself; stop ends the process that compiles for later runs."""

    config: tyro.conf.OmitArgPrefixes[TrainConfig]

    debug: bool = False
    """Show the traceback of an error."""

    def execute(self, _arguments: list[str]) -> int:
        """Shows, clears or warms; returns the exit code."""
        cache = ProgramCache(default_folder())
        if self.action == "clear":
            print_line(f"removed {cache.clear()} programs from {cache.folder}")
        elif self.action == "stop":
            pid = stop_ahead(cache)
            print_line("no process compiles for later runs" if pid is None else f"ended process {pid}")
        elif self.action == "warm":
            set_up_process(self.config)
            choice = warm_reviews(self.config)
            print_line(f"auto will run this job {choice.value}: {choice.reason}")
        else:
            for entry in cache.entries():
                used = datetime.fromtimestamp(entry.used)
                size = f"{entry.num_bytes / 2**20:6.1f} MiB"
                print_line(f"{entry.key[:12]}  {size}  used {used:%Y-%m-%d %H:%M}  {entry.what}")
            print_line(f"{len(cache.entries())} programs in {cache.folder}")
        return 0
