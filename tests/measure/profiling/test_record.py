"""A profile survives its file, and a file that is none is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.errors import ConfigError, DataError
from fasttrain.measure.profiling.file import MAX_BYTES, profile_path, read_profile, write_profile
from fasttrain.measure.profiling.record import (
    PHASES,
    Copies,
    Counters,
    Finding,
    Gpu,
    HostRead,
    Memory,
    Operator,
    Profile,
    Recompilation,
    Traffic,
)

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=30)


def a_profile(**changes: Any) -> Profile:
    phases = dict.fromkeys(PHASES, 10.0) | {"forward": 30.0}
    fields: dict[str, Any] = {
        "name": "auto",
        "workload": {"name": "mlp", "batch_size": 128},
        "command": "python -m fasttrain profile",
        "created": "2026-01-01T00:00:00+00:00",
        "environment": {"cpu": "a CPU", "cores": 4},
        "step_us": 100.0,
        "traced_step_us": 150.0,
        "phases": phases,
        "program": {"forward": 4.0, "not attributed": 6.0},
        "operators": [
            Operator(name="aten::addmm", phase="forward", calls=2, self_us=60.0),
            Operator(name="other", phase="", calls=0, self_us=40.0),
        ],
        "counters": Counters(
            dispatched_operators=40,
            kernel_launches=None,
            host_reads=[HostRead(file="train.py", line=7, what="item", per_step=1)],
            copies=Copies(h2d=Traffic(count=0, bytes=0), d2h=Traffic(count=0, bytes=0)),
            allocations=12,
            graph_breaks=0,
            recompilations=[Recompilation(reason="size of x", count=2)],
            programs_loaded=1,
            flops=1e6,
            flops_not_counted=["aten.relu"],
        ),
        "memory": Memory(peak_bytes=100, by_kind={"parameters": 100}, timeline=[(0, 90), (1, 91)]),
        "gpu": Gpu(utilisation=0.5, power_w=300.0, energy_j_per_sample=None, idle_us={"host": 1.0}),
        "findings": [Finding(kind="host read", file="train.py", line=7, cost_us=3.0, advice="read later")],
    }
    return Profile(**fields | changes)


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    path = profile_path(tmp_path, "mlp", "cpu", "auto")
    write_profile(a_profile(), path)
    assert path == tmp_path / "mlp-cpu" / "auto.json"
    assert read_profile(path) == a_profile()


@given(name=TEXT, us=st.floats(1e-3, 1e9), calls=st.floats(0, 1e6))
@settings(deadline=None)
def test_any_name_and_number_survives_to_four_digits(name: str, us: float, calls: float) -> None:
    operators = [Operator(name=name, phase="forward", calls=calls, self_us=us)]
    phases = dict.fromkeys(PHASES, 0.0) | {"forward": us}
    profile = a_profile(step_us=us, phases=phases, program={}, operators=operators)
    read = Profile.from_dict(json.loads(profile.to_text()))
    assert read.operators[0].name == name
    assert read.operators[0].self_us == pytest.approx(us, rel=1e-3)
    assert read.to_text() == profile.to_text() == Profile.from_dict(json.loads(read.to_text())).to_text()


def test_the_text_is_canonical() -> None:
    text = a_profile(environment={"b": 1, "a": 1 / 3}).to_text()
    assert text.index('"a": 0.3333,') < text.index('"b": 1')
    assert text == a_profile(environment={"a": 1 / 3, "b": 1}).to_text()


def changed(path: str, value: Any) -> dict[str, Any]:
    content = json.loads(a_profile().to_text())
    *parents, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    node = content
    for step in parents:
        node = node[step]
    node[last] = value
    return content


HOSTILE: list[tuple[str, Any]] = [
    ("schema_version", 2),
    ("schema_version", [1]),
    ("kind", "bench"),
    ("name", "../../etc/passwd"),
    ("name", "a/b"),
    ("name", 7),
    ("step_us", "fast"),
    ("step_us", -1),
    ("step_us", True),
    ("step_us", 1e300),
    ("step_us", 10**400),
    ("step_us", None),
    ("phases", {"forward": 100.0}),
    ("phases", []),
    ("phases.forward", 1e6),
    ("program", []),
    ("program", {"forward": 9.0}),
    ("program.forward", "long"),
    ("operators", {"a": 1}),
    ("operators.0.self_us", 1e6),
    ("operators.0", "aten::mm"),
    ("operators.0.name", "x" * 100_000),
    ("counters", None),
    ("counters.host_reads", [[]]),
    ("counters.graph_breaks", 0.5),
    ("counters.flops_not_counted", [1]),
    ("counters.recompilations", [{"reason": "x", "count": 1e20}]),
    ("memory.timeline", [[1]]),
    ("memory.timeline", [{"step": 1}]),
    ("memory.by_kind", [1]),
    ("gpu", []),
    ("findings", [{"kind": 1}]),
    ("environment", {"a": [[[[[[[[[1]]]]]]]]]}),
    ("environment", {"a": 10**300}),
]


@pytest.mark.parametrize(("path", "value"), HOSTILE, ids=[f"{path} = {value!r:.40}" for path, value in HOSTILE])
def test_a_hostile_field_is_refused(path: str, value: Any, tmp_path: Path) -> None:
    file = tmp_path / "hostile.json"
    file.write_text(json.dumps(changed(path, value)))
    with pytest.raises(DataError, match=r"hostile\.json"):
        read_profile(file)


@pytest.mark.parametrize("text", ["", "[", "[]", "null", '"profile"', "NaN", "[" * 100_000, "\x80\x04K\x01.", "{}"])
def test_what_is_no_profile_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "none.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"none\.json"):
        read_profile(file)


@pytest.mark.parametrize("missing", list(json.loads(a_profile().to_text())))
def test_no_field_may_be_missing(missing: str) -> None:
    content = json.loads(a_profile().to_text())
    del content[missing]
    if missing == "gpu":  # unknown is null, and so is what is not there
        assert Profile.from_dict(content).gpu is None
    elif missing == "program":  # profiles from before the phase was split stay readable
        assert Profile.from_dict(content).program == {}
    else:
        with pytest.raises(DataError):
            Profile.from_dict(content)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "x" * 65, "a b", "ä", "a\n", "/abs"])
def test_a_name_cannot_lead_elsewhere(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        profile_path(tmp_path, "mlp", "cpu", name)
    with pytest.raises(ConfigError):
        profile_path(tmp_path, name, "cpu", "auto")


def test_a_profile_that_is_too_large_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with pytest.raises(DataError, match="bytes"):
        write_profile(a_profile(command="x" * MAX_BYTES), path)
    assert not path.exists()
