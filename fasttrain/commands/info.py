"""`info`: what this machine can do, and what `auto` would choose."""

from __future__ import annotations

from dataclasses import dataclass

from fasttrain.commands.shared import print_json, print_line
from fasttrain.device import resolve_device
from fasttrain.info import describe_machine

__all__ = ["Info"]


@dataclass(frozen=True, kw_only=True)
class Info:
    """Tell what this machine can do, and what `auto` would choose, with reasons."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    json: bool = False
    """Print one JSON document on stdout."""

    debug: bool = False
    """Show the traceback of an error."""

    def execute(self, _arguments: list[str]) -> int:
        """Tells it; returns the exit code."""
        machine = describe_machine(resolve_device(self.device))
        if self.json:
            print_json(machine)
        else:
            width = max(map(len, machine))
            for name, value in machine.items():
                print_line(f"{name:<{width}}  {value}")
        return 0
