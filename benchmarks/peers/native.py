"""The review job in one thread of straight compiled C (`native.c`): the yardstick for what is possible."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fasttrain.errors import EngineError
from fasttrain.measure.bench.arm import CHECKED_STEPS, EPOCHS, Arm
from fasttrain.workloads.job import Job
from fasttrain.workloads.review_job import ReviewJob

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O3", "-march=native", "-ffast-math")
LEARNING_RATE = 1e-3


def make_arm(job: Job) -> Arm:
    """The arm.

    Raises:
        EngineError: there is no C compiler, or the job is not the review job with two ratings on the CPU in one thread.
    """
    is_possible = isinstance(job, ReviewJob) and job.num_outputs == 1
    if not is_possible or job.device.type != "cpu" or torch.get_num_threads() != 1:
        raise EngineError("the native yardstick is for the review job with two ratings, on the CPU, in one thread")
    return NativeArm(job)


class NativeArm:
    """Whole epochs in one call of the compiled loop; the first call runs only the steps that are checked.

    Args:
        job: of two ratings.
    """

    def __init__(self, job: ReviewJob) -> None:
        self.description = f"one thread of C over the same token ids, cc {' '.join(FLAGS)}"
        begin = time.perf_counter()
        self._train = compiled_train()
        self.compile_s = time.perf_counter() - begin
        self._job = job
        self._epoch = self._steps = 0
        tokens = job.train.tokens
        self._ids = np.ascontiguousarray(tokens.ids, dtype=np.int32)
        self._offsets = np.ascontiguousarray(tokens.offsets, dtype=np.int64)
        self._targets = job.targets().numpy()
        self._weight = np.concatenate([job.weights[name].numpy().ravel() for name in ("fc1.weight", "fc1.bias")])
        self._start = self._weight.copy()
        self._first, self._second, self._gradient = (np.zeros_like(self._weight) for _ in range(3))
        self._logits = np.zeros(job.batch_size, dtype=np.float32)
        self._losses: list[float] = []

    def step(self) -> int:
        """See `Arm.step`."""
        is_checked = len(self._losses) >= CHECKED_STEPS
        losses, correct = self._pass(None if is_checked else CHECKED_STEPS)
        _loss, _accuracy = losses.mean(), 100.0 * correct / (len(losses) * self._job.batch_size)
        if not is_checked:
            self._losses += losses.tolist()
        return len(losses)

    def sync(self) -> None:
        """See `Arm.sync`: nothing runs beside the call."""

    def losses(self) -> list[float]:
        """See `Arm.losses`."""
        return self._losses

    def _begin_again(self) -> None:
        self._weight[:] = self._start
        for state in (self._first, self._second):
            state.fill(0.0)
        self._steps = 0

    def _pass(self, num_batches: int | None) -> tuple[np.ndarray, int]:
        order, batch_size = self._job.order(self._epoch), self._job.batch_size
        if self._epoch and self._epoch % EPOCHS == 0:
            self._begin_again()
        self._epoch += 1
        losses = np.zeros(len(order) // batch_size)[:num_batches]
        parameters = (self._weight, self._first, self._second, self._gradient, self._logits)
        correct = self._train(
            *(self._ids, self._offsets, self._targets, order),
            *(len(losses), batch_size, len(self._weight) - 1),
            *parameters,
            *(self._steps, LEARNING_RATE, losses),
        )
        self._steps += len(losses)
        return losses, correct


def compiled_train() -> Any:
    """The function `train` of native.c, compiled for this machine.

    Raises:
        EngineError: there is no C compiler, or it fails.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise EngineError("there is no C compiler (cc) on the PATH")
    with tempfile.TemporaryDirectory(prefix="fasttrain-native-") as folder:
        library = Path(folder) / "native.so"
        compiled = library.with_suffix(".o")
        # Linked without -ffast-math: with it, loading the library would make this whole process flush denormal numbers.
        for command in (
            [compiler, *FLAGS, "-fPIC", "-c", str(SOURCE), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), "-o", str(library), "-lm"],
        ):
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
            if ran.returncode != 0:
                raise EngineError(f"{compiler} failed: {ran.stderr.strip()}")
        train = ctypes.CDLL(str(library)).train
    int32, int64, float32, float64 = (
        np.ctypeslib.ndpointer(dtype=kind, flags="C_CONTIGUOUS")
        for kind in (np.int32, np.int64, np.float32, np.float64)
    )
    size = ctypes.c_int64
    train.argtypes = [
        *(int32, int64, float32, int64),
        *(size, size, size),
        *[float32] * 5,
        *(size, ctypes.c_double, float64),
    ]
    train.restype = size
    return train
