"""`python -m fasttrain profile`, over an arm of the user's own, and what it refuses."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fasttrain.cli import main
from fasttrain.measure.profiling.file import profile_path, read_profile
from fasttrain.measure.profiling.record import PHASES, Finding
from fasttrain.measure.profiling.text import profile_text
from tests.conftest import REPOSITORY
from tests.measure.profiling.test_record import a_profile

ARM = """
import torch

class Arm:
    def __init__(self, job):
        self.job, self.model = job, job.model()
        self.optimizer = job.optimizer(self.model)
        self.batches = iter(())

    def step(self):
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.job.batches())
            batch = next(self.batches)
        loss, _, _ = self.job.forward(self.model, batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.last = loss.item()

    def sync(self):
        pass

    def losses(self):
        return []

def make_arm(job):
    return Arm(job)
"""


def test_a_users_own_arm_is_profiled(tmp_path: Path) -> None:
    (tmp_path / "my_code.py").write_text(ARM)
    options = ["--workload", "mlp", "--module", "my_code:make_arm", "--name", "mine", "--device", "cpu", "--json"]
    ran = subprocess.run(
        [sys.executable, "-m", "fasttrain", "profile", *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert ran.returncode == 0, ran.stderr
    profile = read_profile(profile_path(tmp_path / "profiles", "mlp", "cpu", "mine"))
    assert json.loads(ran.stdout) == profile.to_dict()
    line = ARM.splitlines().index("        self.last = loss.item()") + 1
    assert [(each.kind, each.file, each.line) for each in profile.findings] == [("host read", "my_code.py", line)]
    assert profile.workload["arm"] == "my_code:make_arm"
    assert profile.phases["other"] < 0.1 * profile.step_us
    assert profile.phases["data wait"] > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--engine", "warp"], "arm 'warp'"),
        (["--module", "my_code"], "my_code:make_arm"),
        (["--name", "../../x"], "name '../../x'"),
        (["--name", "/etc/x"], "name '/etc/x'"),
        (["--cpu-threads", "0"], "cpu-threads 0"),
        (["--workload", "mlp", "--module", "no_such_module:make_arm"], "no_such_module"),
    ],
)
def test_bad_options_are_refused(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", "--device", "cpu", "--out", str(tmp_path / "out"), *options]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_file_in_the_way_of_the_folder_is_named(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["profile", "--workload", "mlp", "--device", "cpu", "--out", str(tmp_path / out)]) == 2
    said = capsys.readouterr().err
    assert "the folder cannot be made" in said
    assert str(tmp_path / out) in said


def test_the_text_says_what_the_profile_holds() -> None:
    text = profile_text(a_profile())
    assert "auto: 100.0 us a step (150.0 us while traced)" in text
    assert "forward             30.0 us   30.0%  #########" in text
    assert "host read at train.py:7, at most 3.0 us a step\n    read later" in text
    assert "kernels launched" not in text
    assert "findings: none" in profile_text(replace(a_profile(), findings=[]))


def test_a_program_is_split_in_the_order_of_a_step() -> None:
    program = {"not attributed": 4.0, "backward + optimizer": 4.5, "forward": 1.5}
    lines = profile_text(replace(a_profile(), program=program)).splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("program "))
    assert [line.split() for line in lines[at + 1 : at + 4]] == [
        ["1.5", "us", "15.0%", "of", "it:", "forward"],
        ["4.5", "us", "45.0%", "of", "it:", "backward", "+", "optimizer"],
        ["4.0", "us", "40.0%", "of", "it:", "not", "attributed"],
    ]


def test_a_program_that_took_no_time_has_no_shares() -> None:
    phases = dict.fromkeys(PHASES, 10.0) | {"forward": 40.0, "program": 0.0}
    assert "program" not in profile_text(replace(a_profile(), phases=phases, program={"forward": 0.0})).split()


def test_a_terminal_is_not_told_what_to_do() -> None:
    bad = Finding(kind="host read", file="a\x1b[2J.py", line=1, cost_us=None, advice="b\x07\nfake line")
    text = profile_text(replace(a_profile(), findings=[bad]))
    assert "a?[2J.py" in text
    assert "b??fake line" in text
