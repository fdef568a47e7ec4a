"""`profile`: where the time of a training step goes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fasttrain.commands.shared import print_json, print_line, recorded_command
from fasttrain.device import resolve_device
from fasttrain.errors import ConfigError
from fasttrain.measure.bench.sources import check_source
from fasttrain.measure.profiling.run import ProfileTask, run_profile
from fasttrain.measure.profiling.text import profile_text

__all__ = ["Profile"]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Tell where the time of a training step goes, and what to change: phases, operators, exact counters, findings.

    Leaves OUT/WORKLOAD-DEVICE/NAME.json, and beside it the raw trace, which opens in Perfetto.
    """

    workload: Literal["reviews", "mlp", "cnn", "chars"] = "reviews"
    """What is trained."""

    engine: str = "auto"
    """An engine (auto, eager, compiled, torch-compile, graphed) or another arm of `bench`, such as textbook."""

    module: str | None = None
    """Instead of an engine an arm of your own: my_code:make_arm, where make_arm(workload) gives an object with step(),
    sync() and losses()."""

    name: str | None = None
    """Of the profile; by default the engine's."""

    out: Path = Path("profiles")
    """Folder of profiles."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    cpu_threads: int = 1
    """Torch's threads."""

    json: bool = False
    """Print the profile on stdout instead of a table."""

    debug: bool = False
    """Show the traceback of an error."""

    def execute(self, arguments: list[str]) -> int:
        """Profiles; returns the exit code."""
        if self.cpu_threads < 1:
            raise ConfigError(f"cpu-threads {self.cpu_threads}: use 1 or more")
        source = self.engine if self.module is None else self.module
        if self.module is not None and ":" not in self.module:
            raise ConfigError(f"module {self.module!r}: use my_code:make_arm")
        check_source(source)
        task = ProfileTask(
            source=source,
            workload=self.workload,
            device=str(resolve_device(self.device)),
            threads=self.cpu_threads,
            name=self.name or source.replace(":", "-"),
            out=str(self.out),
            command=recorded_command(arguments),
        )
        profile = run_profile(task)
        if self.json:
            print_json(profile.to_dict())
        else:
            print_line(profile_text(profile))
            print_line(f"\n{task.path}")
        return 0
