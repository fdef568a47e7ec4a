"""Traces: read event by event, whatever their layout, and summed up by phase."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.errors import DataError
from fasttrain.measure.profiling import trace_file
from fasttrain.measure.profiling.phases import MARK
from fasttrain.measure.profiling.trace_file import trace_events
from fasttrain.measure.profiling.trace_summary import TraceSummary, summarise_trace
from fasttrain.step.compiler import KernelCall
from fasttrain.step.torch_private.marking import EMPTY_EVENT


def mark(name: str, ts: float, dur: float = 0.0) -> dict[str, Any]:
    return {"ph": "X", "cat": "user_annotation", "name": MARK + name, "tid": 1, "ts": ts, "dur": dur}


def op(name: str, ts: float, dur: float, *, tid: int = 1, cat: str = "cpu_op", **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "tid": tid, "ts": ts, "dur": dur, "args": args}


def summary(tmp_path: Path, events: list[dict[str, Any]]) -> TraceSummary:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"schemaVersion": 1, "traceEvents": events}))
    return summarise_trace(path)


def test_operators_are_summed_by_phase(tmp_path: Path) -> None:
    found = summary(
        tmp_path,
        [
            op("aten::add", 131, 4),  # in any order
            mark("step", 100),
            mark("forward: python", 110, 20),
            op("aten::linear", 111, 10),
            op("aten::addmm", 112, 6),
            mark("step", 200),
            op("aten::late", 250, 5),
            mark("backward: python", 130, 30),
            mark("program: generated code", 170, 20),
        ],
    )
    assert found.wall_us == 100
    assert found.phases == {"other": 10 + 10, "forward": 20, "backward": 30, "program": 20, "metrics": 10}
    times = {(row.name, row.phase): (row.calls, row.self_us) for row in found.operators}
    assert times["aten::linear", "forward"] == (1, 4)
    assert times["aten::addmm", "forward"] == (1, 6)
    assert times["python", "forward"] == (0, 10)
    assert times["aten::add", "backward"] == (1, 4)
    assert times["generated code", "program"] == (0, 20)
    assert sum(found.phases.values()) == pytest.approx(100)
    assert sum(row.self_us for row in found.operators) == pytest.approx(100)
    assert not any(row.name == "aten::late" for row in found.operators)


def test_kernels_are_wholes_without_what_recording_costs(tmp_path: Path) -> None:
    """An event costs 1 us, outside of it: a kernel holds one, and the program holds two kernels and an operator."""
    programs = [[KernelCall("aoti_torch_cpu_mm_out", ("forward",)), KernelCall("cpp_fused_sin_0", ("metrics",))]]
    path = tmp_path / "trace.json"
    events = [
        *(op(EMPTY_EVENT, ts, 0) for ts in (1, 2, 3, 4)),
        mark("step", 10),
        mark("program: generated code", 10, 100),
        op("aoti_torch_cpu_mm_out", 20, 30),
        op("aten::mm", 25, 20),
        op("graph_0_cpp_fused_sin_0", 60, 20),
        op("aten::copy_", 90, 5),
        mark("step", 110),
    ]
    path.write_text(json.dumps({"traceEvents": events}))
    found = summarise_trace(path, programs)
    times = {row.name: row.self_us for row in found.operators}
    whole = 100 - 3  # what recording has cost is no part of any, and the rest is scaled to the whole
    assert times["forward: mm_out"] == pytest.approx(29 * 100 / whole)
    assert times["metrics: cpp_fused_sin_0"] == pytest.approx(20 * 100 / whole)
    assert times["generated code"] == pytest.approx((100 - 30 - 20 - 5 - 2) * 100 / whole)
    assert found.program == {
        "forward": times["forward: mm_out"],
        "metrics": times["metrics: cpp_fused_sin_0"],
        "not attributed": pytest.approx(times["generated code"] + times["aten::copy_"]),
    }
    assert sum(found.program.values()) == pytest.approx(100)
    assert found.num_operators == 2


def test_backward_in_a_thread_of_its_own_belongs_to_backward(tmp_path: Path) -> None:
    events = [mark("step", 0), mark("backward: python", 10, 50), op("aten::mm", 20, 80, tid=2), mark("step", 100)]
    found = summary(tmp_path, events)
    rows = {(row.name, row.phase): row.self_us for row in found.operators}
    assert rows["aten::mm", "backward"] == pytest.approx(found.phases["backward"]) == 50


def test_a_device_is_idle_for_a_reason(tmp_path: Path) -> None:
    def kernel(begin: float, end: float, name: str = "kernel") -> dict[str, Any]:
        return op(name, begin, end - begin, tid=7, cat="kernel")

    events = [
        mark("step", 0),
        mark("data wait: python", 30, 40),
        op("cudaLaunchKernel", 1, 2, cat="cuda_runtime"),
        op("cudaLaunchKernel", 5, 2, cat="cuda_runtime"),
        op("cudaDeviceSynchronize", 100, 50, cat="cuda_runtime"),
        *(kernel(0, 10), kernel(12, 40), kernel(60, 80), kernel(95, 110), kernel(150, 160), kernel(155, 158)),
        op("Memcpy HtoD (Pageable -> Device)", 160, 5, tid=7, cat="gpu_memcpy", bytes=4096),
        mark("step", 200),
    ]
    found = summary(tmp_path, events)
    assert found.idle_us == {"launch gaps": 2, "data wait": 20, "host": 15, "synchronisation": 40}
    assert found.launches == 2
    assert found.copies == {"h2d": (1, 4096), "d2h": (0, 0)}


def test_waiting_for_the_end_of_the_trace_is_no_fault_of_the_loop(tmp_path: Path) -> None:
    """The host has queued all of two steps by 40; the rest is the device's, and the wait the instrument's."""
    events = [
        mark("step", 0),
        mark("step", 20),
        mark("step", 40),
        op("cudaDeviceSynchronize", 41, 150, cat="cuda_runtime"),
        *(op("kernel", begin, 20, tid=7, cat="kernel") for begin in (10, 50, 80, 160)),
    ]
    found = summary(tmp_path, events)
    assert found.idle_us == {"host": 20, "launch gaps": 10 + 60, "data wait": 0, "synchronisation": 0}
    assert found.wall_us == 180
    assert sum(found.phases.values()) == 40


def test_a_trace_without_marks_is_one_phase(tmp_path: Path) -> None:
    found = summary(tmp_path, [op("aten::add", 10, 5), op("aten::mul", 20, 10)])
    assert found.phases == {"other": 20}
    assert (found.wall_us, found.launches, found.idle_us) == (20, None, None)
    assert summary(tmp_path, []).operators == []


EVENTS = st.lists(
    st.dictionaries(st.text(max_size=5), st.recursive(st.integers() | st.text(), st.lists, max_leaves=5), max_size=4)
)


@given(events=EVENTS, indent=st.sampled_from([None, 1, 4]), chunk=st.integers(1, 60))
@settings(deadline=None, max_examples=60)
def test_events_are_read_as_json_reads_them(
    tmp_path_factory: pytest.TempPathFactory, events: list[dict[str, Any]], indent: int | None, chunk: int
) -> None:
    text = json.dumps({"a": [1], "traceEvents": events, "b": {}}, indent=indent)
    path = tmp_path_factory.getbasetemp() / "any.json.gz"
    path.write_bytes(gzip.compress(text.encode()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_file, "CHUNK", chunk)
        assert list(trace_events(path)) == events


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", "[1]", '{"traceEvents": [', '{"traceEvents": [{"ph": "X"', '{"traceEvents": [1]}', "\x00" * 100),
        '{"traceEvents": [' + "[" * 100_000,
        '{"traceEvents": [nonsense]}',
    ],
)
def test_what_is_no_trace_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"bad\.json"):
        list(trace_events(path))


def test_what_is_not_compressed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.json.gz"
    path.write_text("{}")
    with pytest.raises(DataError):
        list(trace_events(path))


def test_an_event_of_endless_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_file, "MAX_EVENT", 1 << 16)
    path = tmp_path / "bad.json"
    path.write_text('{"traceEvents": [{"name": "' + "x" * (4 << 20) + '"}]}')
    with pytest.raises(DataError, match="ends in the middle"):
        list(trace_events(path))


@pytest.mark.parametrize(
    "event",
    [
        {"ph": "X", "ts": "0", "dur": 1, "name": "a", "cat": "cpu_op", "tid": 1},
        {"ph": "X", "ts": 0, "dur": -1, "name": "a", "cat": "cpu_op", "tid": 1},
        {"ph": "X", "ts": 0, "dur": 1, "name": ["a"], "cat": "cpu_op", "tid": 1},
        {"ph": "X", "ts": 0, "dur": 1, "name": "a", "cat": {}, "tid": 1} | {"cat": "nothing"},
        {"ph": "X", "ts": 0, "dur": 1, "name": "a", "cat": "cpu_op", "tid": "main"},
    ],
)
def test_events_of_another_shape_are_left_out(event: dict[str, Any], tmp_path: Path) -> None:
    found = summary(tmp_path, [mark("step", 0), event, mark("step", 10)])
    assert found.num_operators == 0
    assert sum(found.phases.values()) == 10


MEASURE = """
import resource, sys
from pathlib import Path
from fasttrain.measure.profiling.trace_summary import summarise_trace
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = summarise_trace(Path(sys.argv[1]))
print(found.num_operators, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_stays_far_below_the_size_of_the_trace(tmp_path: Path) -> None:
    """30 MB of trace; `json.load` of it takes 130 MB and more. 500 MB were measured once: 300 MB of memory."""
    path = tmp_path / "large.json"
    num_events = 120_000
    with path.open("w") as file:
        file.write('{"traceEvents": [' + json.dumps(mark("step", 0)))
        for number in range(num_events):
            file.write(",\n" + json.dumps(op("aten::add", number, 0.5, stack="x" * 150)))
        file.write("," + json.dumps(mark("step", num_events)) + "]}")
    assert path.stat().st_size > 30e6
    command = [sys.executable, "-c", MEASURE, str(path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    operators, grown_kb = map(int, ran.stdout.split())
    assert operators == num_events
    assert grown_kb * (1 if sys.platform == "linux" else 1 / 1024) < 40_000
