"""The options of `train`: checked when made, and the same again from JSON."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.errors import ConfigError
from fasttrain.run import config
from fasttrain.run.config import TrainConfig

paths = st.none() | st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).map(Path)
configs = st.builds(
    TrainConfig,
    data=paths,
    out=paths,
    epochs=st.integers(1, 10**6),
    batch_size=st.integers(1, 10**6),
    learning_rate=st.floats(0, 1e300, exclude_min=True),
    lr_factor=st.floats(0, 1, exclude_min=True, exclude_max=True),
    lr_patience=st.integers(0, 100),
    cutoff=st.integers(0, 10**6),
    clean=st.sampled_from(["auto", "none", "book", "unicode"]),
    patience=st.integers(1, 100),
    seed=st.integers(0, 2**63),
    device=st.sampled_from(["auto", "cpu", "cuda", "cuda:1"]),
    engine=st.sampled_from(["auto", "eager", "compiled"]),
    precision=st.sampled_from(["auto", "fp32", "bf16", "fp16"]),
    threads=st.none() | st.just("auto") | st.integers(1, 256),
    tf32=st.booleans(),
    channels_last=st.booleans(),
    cache=st.booleans(),
)


def test_the_defaults_are_the_books() -> None:
    default = TrainConfig()
    assert (default.epochs, default.batch_size, default.learning_rate, default.seed) == (100, 128, 1e-3, 1337)
    assert (default.cutoff, default.patience, default.lr_factor, default.lr_patience) == (25, 5, 0.5, 1)


@given(configs)
@settings(deadline=None, max_examples=50)
def test_json_gives_the_same_config_again(given_config: TrainConfig) -> None:
    text = json.dumps(given_config.to_dict(), allow_nan=False)
    assert TrainConfig.from_dict(json.loads(text)) == given_config


def test_options_that_a_stored_config_lacks_have_their_defaults() -> None:
    assert TrainConfig.from_dict({"epochs": 3}) == TrainConfig(epochs=3)


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("epochs", 0, "1 or more"),
        ("batch_size", -1, "1 or more"),
        ("patience", 0, "1 or more"),
        ("cutoff", -1, "0 or more"),
        ("seed", -1, "0 or more"),
        ("lr_patience", -1, "0 or more"),
        ("seed", 2**64, "18446744073709551615 at most"),
        ("threads", 2**31, "2147483647 at most"),
        ("threads", 0, "1 or more, or auto"),
        ("learning_rate", 0.0, "a positive number"),
        ("learning_rate", float("nan"), "a positive number"),
        ("learning_rate", float("inf"), "a positive number"),
        ("lr_factor", 0.0, "a number between 0 and 1"),
        ("lr_factor", 1.0, "a number between 0 and 1"),
        ("lr_factor", float("nan"), "a number between 0 and 1"),
    ],
)
def test_an_impossible_option_is_named_as_it_is_typed(option: str, value: float, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**{option: value})
    assert str(caught.value) == f"--{option.replace('_', '-')} {value}: use {allowed}"


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown options momentum, nesterov;"):
        TrainConfig.from_dict({"nesterov": True, "momentum": 0.9, "epochs": 1})


@pytest.mark.parametrize(
    "stored",
    [
        {"epochs": "two"},
        {"data": 5},
        {"cutoff": None},
        {"epochs": 2.5},
        {"seed": [1]},
        {"threads": "all"},
        {"threads": 1.0},
    ],
)
def test_a_stored_value_of_the_wrong_type_is_refused(stored: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"--{next(iter(stored))}"):
        TrainConfig.from_dict(stored)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().epochs = 3  # type: ignore[misc]


def test_every_option_has_its_help() -> None:
    [definition] = [
        node for node in ast.parse(inspect.getsource(config)).body if getattr(node, "name", "") == "TrainConfig"
    ]
    assert isinstance(definition, ast.ClassDef)
    following = dict(zip(definition.body, definition.body[1:], strict=False))
    options = [node for node in definition.body if isinstance(node, ast.AnnAssign)]
    assert 10 < len(options) < 40
    for option in options:
        after = following[option]
        assert isinstance(after, ast.Expr), ast.unparse(option)
        assert isinstance(after.value, ast.Constant)
