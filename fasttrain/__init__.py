"""The textbook PyTorch training loop, run as fast as the hardware allows, with the same numbers."""

from fasttrain.data.ragged import Ragged
from fasttrain.data.resident import ResidentBatches, resident
from fasttrain.data.stream import Prefetcher, prefetch
from fasttrain.errors import ConfigError, DataError, DeviceError, EngineError, FasttrainError, RunError
from fasttrain.history import EpochResult, History
from fasttrain.loop import FastLoop
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
    "History",
    "Prefetcher",
    "Ragged",
    "ResidentBatches",
    "RunError",
    "RunningMetrics",
    "TrainStep",
    "prefetch",
    "resident",
]
