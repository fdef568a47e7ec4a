"""The fixture passes a loop that never waits and fails one that does, naming the place."""

import subprocess
import sys
from pathlib import Path

TESTS = """
import torch

def test_passes(no_host_reads):
    x = torch.ones(3)
    x.sum().item()  # before the block
    with no_host_reads():
        x.add_(1)

def test_fails(no_host_reads):
    with no_host_reads():
        for _ in range(3):
            torch.ones(3).sum().item()
"""


def test_the_fixture_gates_a_users_own_loop(tmp_path: Path) -> None:
    file = tmp_path / "test_mine.py"
    file.write_text(TESTS)
    # Blocked by its name and loaded by its module, so that it does not matter whether fasttrain is installed.
    plugin = ["-p", "no:fasttrain", "-p", "fasttrain.measure.pytest_plugin", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *plugin, str(file)]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert "1 failed, 1 passed" in ran.stdout, ran.stdout + ran.stderr
    assert "3 host reads, where none is allowed" in ran.stdout
    assert "test_mine.py:13: item, 3 times" in ran.stdout
