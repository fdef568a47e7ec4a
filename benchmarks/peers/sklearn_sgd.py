"""scikit-learn's `SGDClassifier` over the same token ids: another algorithm, for a feeling of what is fast."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.linear_model import SGDClassifier

from benchmarks.harness import Arm
from benchmarks.review_arms import ReviewJob
from fasttrain.errors import EngineError


def build(job: ReviewJob, threads: int) -> Arm:
    """The arm.

    Raises:
        EngineError: it would have to run on another device, or in several threads.
    """
    if job.device.type != "cpu" or threads != 1:
        raise EngineError("SGDClassifier runs on the CPU, in one thread")
    return SgdArm(job)


class SgdArm:
    """One pass a call: a step of plain gradient descent a row, shuffled inside, without figures.

    Args:
        job: whose train rows it takes.
    """

    name = "scikit-learn"
    threads = 1
    compile_s: float | None = None
    description = "SGDClassifier(log_loss).partial_fit, a pass a call: a step a row, no Adam, no loss or accuracy read"

    def __init__(self, job: ReviewJob) -> None:
        tokens = job.train.tokens
        ones = np.ones(len(tokens.ids))
        parts = (ones, tokens.ids.astype(np.int32), tokens.offsets.astype(np.int32))
        self._rows = csr_matrix(parts, shape=(len(job.train.labels), job.textbook.num_features))
        self._labels = job.train.labels
        self._classes = np.unique(self._labels)
        penalty: Any = None  # annotated as text only
        self._model = SGDClassifier(loss="log_loss", penalty=penalty, random_state=0)

    def losses(self, num_batches: int) -> None:  # noqa: ARG002
        """See `Arm.losses`: the algorithm is another one."""
        return None

    def run(self) -> int:
        """See `Arm.run`."""
        self._model.partial_fit(self._rows, self._labels, classes=self._classes)
        return len(self._labels)
