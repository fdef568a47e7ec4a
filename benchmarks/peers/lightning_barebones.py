"""Lightning without all that it can do without: `Trainer(barebones=True)`."""

from __future__ import annotations

from benchmarks.peers.lightning import LightningArm
from fasttrain.measure.bench.arm import Arm
from fasttrain.workloads.job import Job


def make_arm(job: Job) -> Arm:
    """The arm."""
    return LightningArm(job, is_barebones=True)
