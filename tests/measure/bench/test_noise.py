"""What is known of a machine's noise lies in one small file of the user's."""

from __future__ import annotations

from pathlib import Path

import pytest

from fasttrain import DataError
from fasttrain.measure.bench.noise import known_noise, noise_file, noise_with, remember_noise
from fasttrain.measure.verdict.stats import Noise
from tests.measure.bench.bench_fakes import ENVIRONMENT


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def noise(floor: float) -> Noise:
    return Noise(floor=floor, smallest_effect=2 * floor, pairs=10)


def test_noise_is_known_of_this_machine_alone() -> None:
    assert known_noise(ENVIRONMENT, "mlp") is None
    remember_noise(ENVIRONMENT, "mlp", noise(0.01))
    remember_noise(ENVIRONMENT, "cnn", noise(0.03))
    other = {**ENVIRONMENT, "cores": 8}
    remember_noise(other, "mlp", noise(0.5))
    assert known_noise(ENVIRONMENT, "mlp") == noise(0.01)
    assert known_noise(ENVIRONMENT, "chars") == noise(0.03)  # the worst that was met
    assert known_noise(other, "mlp") == noise(0.5)
    assert noise_with(ENVIRONMENT, "chars") == ("cnn", noise(0.03))
    assert noise_with(ENVIRONMENT, "mlp") == ("mlp", noise(0.01))
    remember_noise(ENVIRONMENT, "mlp", noise(0.02))
    assert known_noise(ENVIRONMENT, "mlp") == noise(0.02)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"schema_version": 3, "kind": "noise", "machines": {}}',
        '{"schema_version": 1, "kind": "bench", "machines": {}}',
        '{"schema_version": 2, "kind": "noise", "machines": {"a": {"mlp": {"floor": "0"}}}}',
    ],
)
def test_a_damaged_file_is_named(content: str) -> None:
    noise_file().parent.mkdir(parents=True)
    noise_file().write_text(content)
    with pytest.raises(DataError, match=r"noise\.json"):
        known_noise(ENVIRONMENT, "mlp")


def test_noise_that_was_measured_in_an_older_way_is_forgotten() -> None:
    noise_file().parent.mkdir(parents=True)
    noise_file().write_text('{"schema_version": 1, "kind": "noise", "machines": {"a": {"mlp": {"floor": 0.25}}}}')
    assert known_noise(ENVIRONMENT, "mlp") is None
    remember_noise(ENVIRONMENT, "mlp", noise(0.01))
    assert known_noise(ENVIRONMENT, "mlp") == noise(0.01)


def test_noise_that_cannot_be_kept_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "fasttrain").touch()
    with pytest.raises(DataError, match="the noise cannot be written"):
        remember_noise(ENVIRONMENT, "mlp", noise(0.01))
