"""scikit-learn's `SGDClassifier` over the same token ids: another algorithm, for a feeling of what is fast."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from sklearn.linear_model import SGDClassifier

from fasttrain.errors import EngineError
from fasttrain.measure.bench.arm import Arm
from fasttrain.workloads.job import Job
from fasttrain.workloads.review_job import ReviewJob


def make_arm(job: Job) -> Arm:
    """The arm.

    Raises:
        EngineError: the job is not the review job, or would have to run on another device, or in several threads.
    """
    if not isinstance(job, ReviewJob) or job.device.type != "cpu" or torch.get_num_threads() != 1:
        raise EngineError("SGDClassifier takes the review job, on the CPU, in one thread")
    return SgdArm(job)


class SgdArm:
    """One pass a call: a step of plain gradient descent a row, shuffled inside, without figures.

    Args:
        job: whose train rows it takes.
    """

    description = "SGDClassifier(log_loss).partial_fit, a pass a call: a step a row, no Adam, no loss or accuracy read"

    def __init__(self, job: ReviewJob) -> None:
        tokens = job.train.tokens
        ones = np.ones(len(tokens.ids))
        rows = csr_matrix((ones, tokens.ids.astype(np.int32), tokens.offsets.astype(np.int32)))
        self._steps = job.num_rows // job.batch_size
        self._rows = rows[: self._steps * job.batch_size]
        self._labels = job.train.labels[: self._steps * job.batch_size]
        self._classes = np.unique(self._labels)
        penalty: Any = None  # annotated as text only
        self._model = SGDClassifier(loss="log_loss", penalty=penalty, random_state=0)

    def step(self) -> int:
        """See `Arm.step`: as many steps as a batch a step would be."""
        self._model.partial_fit(self._rows, self._labels, classes=self._classes)
        return self._steps

    def sync(self) -> None:
        """See `Arm.sync`: nothing runs beside the call."""

    def losses(self) -> None:
        """See `Arm.losses`: the algorithm is another one."""
        return None
