"""Images in channels_last: what is recorded must be of the layout that really runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fasttrain.step.eager import EagerEngine
from fasttrain.step.trace import Mismatch, trace_step
from tests.step.models import ASKED, OPTIMIZERS, Case, assert_same, indices, numbers, started


def channels_last() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    return model.to(memory_format=torch.channels_last)


# In single precision and of more than 16 images: else oneDNN does not run the convolutions, and results are contiguous.
IMAGES = Case(channels_last, numbers(32, 1, 6, 6), indices(3, 32), F.cross_entropy)


def test_a_convolution_in_channels_last_may_be_flattened() -> None:
    (spec, batch), (eager_spec, _) = started(IMAGES, OPTIMIZERS["sgd"]), started(IMAGES, OPTIMIZERS["sgd"])
    traced = trace_step(spec, batch)
    inputs = traced.inputs(batch)
    assert not isinstance(inputs, Mismatch)
    examples = tuple(tensor.detach() for tensor in inputs)
    torch.export.export(traced.parts[0].graph, examples, strict=False)
    torch.testing.assert_close(traced.run(inputs), EagerEngine(eager_spec, ASKED).step(batch))
    assert_same(spec, eager_spec, rtol=1e-5)
