"""The digits of the convolutional network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fasttrain.workloads.cnn import cnn_job
from tests.workloads.test_jobs import CPU


def test_resident_rows_are_the_datasets(data_dir: Path) -> None:
    job = cnn_job(CPU)
    dataset = job.dataset()
    for index in (0, 1, job.num_rows - 1):
        image, label = dataset[index]
        assert torch.equal(image, job.inputs[index])
        assert label == job.targets[index]


def test_pixels_are_normalised(data_dir: Path) -> None:
    inputs = cnn_job(CPU).inputs
    assert inputs.shape == (10_000, 1, 28, 28)
    assert inputs.mean().item() == pytest.approx(0, abs=0.02)
    assert inputs.std().item() == pytest.approx(1, abs=0.02)
    assert inputs.dtype == torch.float32
