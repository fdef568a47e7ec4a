"""Layouts: of images in channels_last, which must be recorded as they run, and of batches."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain import EngineError, TrainStep
from fasttrain.data.batch import num_samples
from fasttrain.step.batch_layout import BatchLayout, leaves_of, path_name
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


# Batches: what fits a layout, and what no compiled step takes.


class Mode(Enum):
    A = 1
    B = 2


class Named(dict[str, Any]):
    """A dict that may have attributes."""


def with_attribute(value: Any, **attributes: Any) -> Any:
    vars(value).update(attributes)
    return value


@pytest.mark.parametrize(
    ("make", "other"),
    [
        (lambda: 0.0, lambda: -0.0),
        (lambda: 1, lambda: True),
        (lambda: 1, lambda: 1.0),
        (lambda: complex(0.0, -0.0), lambda: complex(0.0, 0.0)),
        (lambda: np.float64(0.5), lambda: 0.5),
        (lambda: np.float64(0.5), lambda: np.float64(0.25)),
        (lambda: Mode.A, lambda: Mode.B),
        (lambda: 2.0, lambda: torch.ones(3)),
        (lambda: None, lambda: torch.ones(3)),
        (lambda: "a", lambda: object()),
        (lambda: {"a": 1, "b": 2}, lambda: {"b": 2, "a": 1}),
        (lambda: with_attribute(Named(), weight=1.0), lambda: with_attribute(Named(), weight=0.25)),
        (lambda: Named(), lambda: with_attribute(Named(), weight=0.25)),
        (lambda: torch.ones(2), lambda: with_attribute(torch.ones(2), weight=0.25)),
        (lambda: torch.ones(2), lambda: torch.ones(2).to_sparse()),
    ],
)
def test_a_value_that_may_matter_must_be_the_same(make: Callable[[], Any], other: Callable[[], Any]) -> None:
    layout = BatchLayout({"x": torch.zeros(1), "value": make()})
    assert layout.flatten({"x": torch.zeros(1), "value": make()}) is not None
    assert layout.flatten({"x": torch.zeros(1), "value": other()}) is None


def test_not_a_number_is_itself() -> None:
    assert BatchLayout(float("nan")).flatten(float("nan")) == []


def test_tensors_in_attributes_are_inputs() -> None:
    batch = with_attribute(Named(x=with_attribute(torch.ones(2), scale=torch.ones(1))), weights=torch.zeros(3))
    layout = BatchLayout(batch)
    assert [path_name(path) for path in layout.paths] == ["batch.weights", "batch['x'].scale", "batch['x']"]
    found = layout.flatten(batch)
    assert found is not None
    rebuilt = layout.rebuild([each.clone() for each in found])
    torch.testing.assert_close(rebuilt.weights, batch.weights)
    torch.testing.assert_close(rebuilt["x"].scale, batch["x"].scale)


def test_what_forward_never_reads_may_be_anything() -> None:
    batch = {"x": torch.ones(2), "text": ["a", "b"], "id": object(), "mask": torch.ones(1).to_sparse()}
    unread = {("text",), ("id",), ("mask",)}
    layout = BatchLayout(batch, unread)
    assert layout.paths == [("x",)]
    assert layout.flatten({**batch, "text": "other", "id": 5, "mask": None}) == [batch["x"]]
    assert layout.flatten({"x": batch["x"], "text": []}) is None, "the keys are read by whoever iterates over them"
    assert layout.rebuild([batch["x"]]) == {"x": batch["x"], "text": None, "id": None, "mask": None}
    one = BatchLayout(("a", torch.ones(1), "b"), {(0,)})
    assert one.flatten(("other", torch.ones(1), "b")) is not None
    assert one.flatten(("other", torch.ones(1), "other")) is None
    with pytest.raises(EngineError, match=r"batch\['id'\] is object"):
        BatchLayout(batch, {("text",), ("mask",)})


def test_all_that_is_in_a_batch_by_path() -> None:
    inner = Named(b="text")
    batch = {"x": [torch.ones(1), 2], "y": with_attribute(inner, c=None)}
    assert {path_name(path): value for path, value in leaves_of(batch).items()} == {
        "batch['x'][0]": batch["x"][0],
        "batch['x'][1]": 2,
        "batch['y'].c": None,
        "batch['y']['b']": "text",
    }


class Tagged(Tensor):
    """A tensor of a class of its own."""


UNPLAIN: dict[str, tuple[Callable[[], Tensor], str]] = {
    "coo": (lambda: torch.eye(3).to_sparse(), "has the layout torch.sparse_coo"),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), "has the layout torch.sparse_csr"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "is a nested tensor"),
    "subclass": (lambda: torch.eye(3).as_subclass(Tagged), "is of the class Tagged"),
    "conjugated": (lambda: torch.ones(3, dtype=torch.complex64).conj(), "is a conjugated or negated view"),
}


@pytest.mark.parametrize("name", UNPLAIN)
@pytest.mark.parametrize("engine", ["eager", "auto", "compiled"])
@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|nested tensors).*:UserWarning")
def test_a_tensor_that_is_not_dense_runs_eagerly_with_the_reason(
    name: str, engine: str, hasty: None, own_programs: Path
) -> None:
    make, reason = UNPLAIN[name]
    model = nn.Linear(4, 3)
    step = TrainStep(model, torch.optim.SGD(model.parameters(), 0.1), lambda m, b: m(b["x"]).sum(), engine=engine)
    step.expect(1_000_000)
    batch = {"other": make(), "x": torch.ones(3, 4)}
    if engine == "compiled":
        step(batch)
        with pytest.raises(EngineError, match=reason):
            step(batch)
        return
    assert len(list(step.run([batch] * 6))) == 6
    assert step.engine.value == "eager"
    assert engine == "eager" or reason in step.engine.reason
    assert num_samples((batch["other"],)) == batch["other"].size(0)


def test_a_buffer_or_state_that_is_not_dense_is_told() -> None:
    model = nn.Linear(4, 3)
    model.register_buffer("mask", torch.eye(3).to_sparse())
    step = TrainStep(model, torch.optim.SGD(model.parameters(), 0.1), lambda m, b: m(b).sum(), engine="compiled")
    step(torch.ones(3, 4))
    with pytest.raises(EngineError, match=r"'mask' has the layout torch\.sparse_coo: only dense"):
        step(torch.ones(3, 4))
