"""What `info` tells of a machine."""

from __future__ import annotations

import json

import pytest
import torch

from fasttrain import info
from fasttrain.info import describe_machine

CPU = torch.device("cpu")


def test_a_cpu_is_described_in_plain_facts() -> None:
    machine = describe_machine(CPU)
    assert json.loads(json.dumps(machine)) == machine
    assert list(machine) == [
        "device",
        "memory",
        "bf16",
        "compiler",
        "cuda",
        "threads",
        "system",
        "versions",
        "precision auto",
        "engine auto",
        "threads auto",
        "compiling for later runs",
        "recorded rows",
    ]
    assert machine["device"].startswith("cpu (")
    assert machine["threads"] == torch.get_num_threads()
    assert f"torch {torch.__version__}" in machine["versions"]
    assert "GiB" in machine["memory"]


def test_auto_choices_come_with_their_reasons() -> None:
    machine = describe_machine(CPU)
    for option, allowed in (("precision auto", {"fp32"}), ("engine auto", {"eager", "eager, then compiled"})):
        value, _, reason = machine[option].partition(": ")
        assert value in allowed
        assert len(reason) > 20


def test_the_threads_that_auto_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    assert describe_machine(CPU)["threads auto"].startswith("the fastest of 1, 2, 4, 6: ")


def test_what_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "cpp_compiler", lambda: None)
    monkeypatch.setattr(info, "good_at_bf16", lambda device: False)
    monkeypatch.setattr(info, "total_bytes", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    machine = describe_machine(CPU)
    assert machine["compiler"].startswith("none: compiled engines cannot run")
    assert machine["bf16"].startswith("not in hardware")
    assert machine["memory"] == "unknown"
    assert machine["cuda"].startswith(("none", "built for"))


def test_memory_is_in_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "total_bytes", lambda device: 8 * 2**30)
    monkeypatch.setattr(info, "free_bytes", lambda device: 3 * 2**29)
    assert describe_machine(CPU)["memory"] == "8.0 GiB, 1.5 GiB free"


@pytest.mark.gpu
def test_a_gpu_is_described() -> None:
    machine = describe_machine(torch.device("cuda"))
    assert torch.cuda.get_device_name() in machine["device"]
    assert "device(s)" in machine["cuda"]
    json.dumps(machine)
