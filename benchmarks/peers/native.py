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

from benchmarks.arms import BATCH_SIZE, LEARNING_RATE, running_means
from benchmarks.harness import Arm
from benchmarks.review_arms import ReviewJob
from fasttrain.errors import EngineError

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O3", "-march=native", "-ffast-math")


def build(job: ReviewJob, threads: int) -> Arm:
    """The arm.

    Raises:
        EngineError: there is no C compiler, or the job is not one of two ratings on the CPU in one thread.
    """
    if job.textbook.num_outputs != 1 or job.device.type != "cpu" or threads != 1:
        raise EngineError("the native yardstick is for two ratings, on the CPU, in one thread")
    return NativeArm(job)


class NativeArm:
    """Whole epochs in one call of the compiled loop.

    Args:
        job: of two ratings.
    """

    name = "native"
    threads = 1

    def __init__(self, job: ReviewJob) -> None:
        self.description = f"one thread of C over the same token ids, cc {' '.join(FLAGS)}"
        begin = time.perf_counter()
        self._train = compiled_train()
        self.compile_s: float | None = time.perf_counter() - begin
        self._job = job
        self._epoch = self._step = 0
        tokens = job.train.tokens
        self._ids = np.ascontiguousarray(tokens.ids, dtype=np.int32)
        self._offsets = np.ascontiguousarray(tokens.offsets, dtype=np.int64)
        self._targets = job.targets().numpy()
        weight = [job.weights["fc1.weight"].numpy().ravel(), job.weights["fc1.bias"].numpy()]
        self._weight = np.concatenate(weight)
        self._first, self._second, self._gradient = (np.zeros_like(self._weight) for _ in range(3))
        self._logits = np.zeros(BATCH_SIZE, dtype=np.float32)

    def losses(self, num_batches: int) -> list[float]:
        """See `Arm.losses`."""
        return running_means(self._pass(num_batches)[0].tolist())

    def run(self) -> int:
        """See `Arm.run`."""
        losses, correct = self._pass(None)
        _loss, _accuracy = losses.mean(), 100.0 * correct / (len(losses) * BATCH_SIZE)
        return len(losses) * BATCH_SIZE

    def _pass(self, num_batches: int | None) -> tuple[np.ndarray, int]:
        order = self._job.order(self._epoch)
        self._epoch += 1
        losses = np.zeros(len(order) // BATCH_SIZE)[:num_batches]
        parameters = (self._weight, self._first, self._second, self._gradient, self._logits)
        correct = self._train(
            *(self._ids, self._offsets, self._targets, order),
            *(len(losses), BATCH_SIZE, len(self._weight) - 1),
            *parameters,
            *(self._step, LEARNING_RATE, losses),
        )
        self._step += len(losses)
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
