"""The textbook PyTorch training loop, run as fast as the hardware allows, with the same numbers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fasttrain.data.ragged import Ragged
    from fasttrain.data.record import RecordedLoader, record
    from fasttrain.data.resident import ResidentBatches, resident
    from fasttrain.data.stream import Prefetcher, prefetch
    from fasttrain.errors import ConfigError, DataError, DeviceError, EngineError, FasttrainError, RunError
    from fasttrain.history import EpochResult, History
    from fasttrain.loop import FastLoop, FitState, Interrupted
    from fasttrain.measure.host_reads import count_host_reads
    from fasttrain.measure.profiling.profiler import profile
    from fasttrain.metrics import RunningMetrics
    from fasttrain.step.train_step import TrainStep

__all__ = [
    "ConfigError",
    "DataError",
    "DeviceError",
    "EngineError",
    "EpochResult",
    "FastLoop",
    "FasttrainError",
    "FitState",
    "History",
    "Interrupted",
    "Prefetcher",
    "Ragged",
    "RecordedLoader",
    "ResidentBatches",
    "RunError",
    "RunningMetrics",
    "TrainStep",
    "count_host_reads",
    "prefetch",
    "profile",
    "record",
    "resident",
]

_MODULES = {
    "data.ragged": ["Ragged"],
    "data.record": ["RecordedLoader", "record"],
    "data.resident": ["ResidentBatches", "resident"],
    "data.stream": ["Prefetcher", "prefetch"],
    "errors": ["ConfigError", "DataError", "DeviceError", "EngineError", "FasttrainError", "RunError"],
    "history": ["EpochResult", "History"],
    "loop": ["FastLoop", "FitState", "Interrupted"],
    "measure.host_reads": ["count_host_reads"],
    "measure.profiling.profiler": ["profile"],
    "metrics": ["RunningMetrics"],
    "step.train_step": ["TrainStep"],
}
"""Where the public names come from. They are imported when they are first asked for: torch takes seconds, and pytest
loads fasttrain's fixtures in tests that have nothing to do with it."""

_HOMES = {name: f"fasttrain.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fasttrain' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value
