"""The cnn job: a small convolutional network with batch norm on handwritten digits."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fasttrain.workloads.common import data_file
from fasttrain.workloads.tensor_job import TensorJob

__all__ = ["DigitDataset", "cnn_job"]

MEAN, STD = 0.1307, 0.3081
"""Of MNIST's pixels, scaled to 0..1: the figures that PyTorch's own example uses."""

CHANNELS = (32, 64)
NUM_CLASSES = 10

TOLERANCE = 1e-3
"""torch's batch norm sums channels_last images on the CPU one after the other in fp32: over the 50,176 values of a
channel here its mean is off by 2e-4, and the running loss by up to 4e-4 in 30 steps (contiguous: 3e-6; in fp64 both
formats agree within 1e-15)."""


def cnn_job(device: torch.device) -> TensorJob:
    """MNIST's 10,000 test images, all of them to train on: the job is for timing, nothing is evaluated.

    Raises:
        DataError: `mnist_t10k.npz` is not in the folder of real data.
    """
    path = data_file("mnist_t10k.npz")
    with np.load(path) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    return TensorJob(
        name="cnn",
        device=device,
        inputs=normalised(images).unsqueeze(1),
        targets=torch.from_numpy(labels.astype("int64")),
        network=_network,
        dataset=lambda: DigitDataset(images, labels),
        batch_size=64,
        memory_format=torch.channels_last,  # on the CPU 1.5 times as fast with one thread, 1.3 times with four
        tolerance=TOLERANCE,
        facts={
            "data": path.name,
            "data_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "network": f"2 x (3x3 convolution, BatchNorm, ReLU, 2x2 max pool) of {CHANNELS} channels, linear",
        },
    )


class DigitDataset(Dataset[tuple[Tensor, int]]):
    """Normalises one image at a time, when it is asked for it, as a textbook's dataset does.

    Args:
        images: [rows, 28, 28], uint8.
        labels: [rows], uint8.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self._images = images
        self._labels = labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """An image, float32 [1, 28, 28], and its class."""
        return normalised(self._images[index]).unsqueeze(0), int(self._labels[index])


def normalised(pixels: np.ndarray) -> Tensor:
    """Pixels (uint8) as float32 of about mean 0 and variance 1."""
    return (torch.from_numpy(pixels).float() / 255 - MEAN) / STD


def _network() -> nn.Module:
    # Convolutions without bias: batch norm takes a bias away again, so that its gradient would be rounding noise,
    # which Adam scales up to steps of full size.
    return nn.Sequential(
        *_block(1, CHANNELS[0]), *_block(*CHANNELS), nn.Flatten(), nn.Linear(CHANNELS[1] * 7 * 7, NUM_CLASSES)
    )


def _block(num_in: int, num_out: int) -> list[nn.Module]:
    """Halves height and width."""
    convolution = nn.Conv2d(num_in, num_out, 3, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(num_out), nn.ReLU(), nn.MaxPool2d(2)]
