"""Through which arm two results may be compared: one that has not changed itself."""

from __future__ import annotations

from pathlib import Path

import pytest

import benchmarks.peers
from fasttrain.errors import ConfigError
from fasttrain.measure.verdict.compare import PEERS
from tests.measure.verdict.comparisons import arm, compared, stored


@pytest.mark.parametrize("others", [("eager B",), ("torch-compile", "compiled", "tuned"), ("my_code:make_arm",)])
def test_no_arm_that_may_have_changed_itself_is_a_yardstick(tmp_path: Path, others: tuple[str, ...]) -> None:
    a, b = (
        stored(tmp_path / f"{us}.json", {label: arm(us) for label in ("eager A", *others)}) for us in (500, 1000)
    )  # everything takes twice as long
    sides = f"{a}:eager A", f"{b}:eager A"
    found = compared(*sides)
    assert (found.outcome, found.exit_code) == ("TIME NOT JUDGED", 3)
    assert compared(*sides, through=others[0]).outcome == "SAME", "whoever names a yardstick vouches for it"


@pytest.mark.parametrize(
    ("shared", "yardstick"),
    [
        (("jax-scan", "textbook, 4 threads", "textbook"), "textbook"),
        (("tuned", "jax-scan", "textbook, 4 threads"), "textbook, 4 threads"),
        (("my_code:make_arm", "tuned", "native"), "native"),
    ],
)
def test_the_textbook_and_the_peers_are_yardsticks(tmp_path: Path, shared: tuple[str, ...], yardstick: str) -> None:
    a, b = (stored(tmp_path / f"{us}.json", {**dict.fromkeys(shared, arm(9000)), "auto": arm(us)}) for us in (500, 400))
    found = compared(a, b)
    assert found.outcome == "FASTER"
    assert found.timing is not None
    assert found.timing.through == yardstick


def test_an_arm_is_not_judged_by_itself(tmp_path: Path) -> None:
    textbooks = "textbook", "textbook, 4 threads"
    a, b = (stored(tmp_path / f"{us}.json", dict.fromkeys(textbooks, arm(us))) for us in (9000, 18000))
    sides = f"{a}:textbook", f"{b}:textbook"
    assert compared(*sides).outcome == "TIME NOT JUDGED"
    with pytest.raises(ConfigError, match="--through 'textbook': it is what is compared"):
        compared(*sides, through="textbook")


def test_the_peers_are_known_by_their_names() -> None:
    assert PEERS == benchmarks.peers.NAMES
