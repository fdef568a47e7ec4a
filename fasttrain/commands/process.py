"""Settings of a whole process, which a command may change and a library may not."""

from __future__ import annotations

import torch

from fasttrain.device import resolve_device
from fasttrain.run.config import TrainConfig

__all__ = ["set_up_process"]


def set_up_process(config: TrainConfig) -> None:
    """Sets torch's threads and TF32 as the options say; threads that are to be measured are the job's to set."""
    if isinstance(config.threads, int):
        torch.set_num_threads(config.threads)
    elif config.threads is None and resolve_device(config.device).type == "cpu":
        torch.set_num_threads(1)
    if config.tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
