"""What to change in a loop: from what the passes of a profile saw to advice. On clean code there is none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fasttrain.measure.data_wait import record_advice
from fasttrain.measure.host_reads import Read
from fasttrain.measure.places import Place, is_of_torch, shown
from fasttrain.measure.profiling.compile_events import CompileEvents
from fasttrain.measure.profiling.record import Finding
from fasttrain.measure.profiling.suspects import Seen

__all__ = ["Observations", "find"]

MIN_PER_STEP = 0.5
"""What happens in fewer steps than every other one is done now and then, as it should be."""

MIN_DATA_SHARE, MIN_DATA_US = 0.2, 50.0
"""From here on, waiting for data is worth a finding."""

MAX_FINDINGS = 24

_READ_LATER = (
    "keep it as a tensor and read it once an epoch, or an interval late (RunningMetrics.read_late); FastLoop does so"
)
_LOAD_BESIDE = (
    "keep the rows on the device with fasttrain.resident; where they do not fit, DataLoader(num_workers=...) loads "
    "beside the steps, and fasttrain.prefetch copies to a GPU ahead of them"
)
_ADVICE = {
    "host read": f"each read waits for the device: {_READ_LATER}",
    "logging every step": f"write every 100 steps or so, or once an epoch; what is written, {_READ_LATER}",
    "extra copy": "the copy has the same values, dtype and device: use the tensor itself",
    "growing container": "it keeps every tensor, and each with its graph unless detached: sum up in place, or keep "
    "detached scalars of an epoch in one preallocated tensor",
    "memory grows": "let go of what a step has made before the next one ends: carry on detached values only, sum up in "
    "place, and give a cache a limit",
    "slow __getitem__": f"make the rows before training, and {_LOAD_BESIDE}",
    "loader over tensors": "the rows are in memory already: FastLoop trains on a DataLoader over a TensorDataset as on "
    "resident data (where it does not, FastLoop.source tells why), and fasttrain.resident gathers a batch in one "
    "operator",
    "data wait": _LOAD_BESIDE,
    "graph break": "torch.compile splits the function here: take what it cannot trace out of it",
    "recompilation": "it is compiled anew for what keeps changing: pad batches to one shape, drop the short last one, "
    "pass tensors instead of numbers, or compile with dynamic=True",
}


@dataclass(frozen=True, kw_only=True)
class Observations:
    """What findings are made from; times are us per step, counts are over so many steps.

    Attributes:
        data_wait_us: of a clean step of `step_us`.
        reads: over `read_steps` steps.
        read_us: by place, in clean steps.
        outputs, copies: over `watched_steps` steps.
        grown: entries that lines add to containers, over `grown_steps` steps.
        growing_bytes: of tensor memory that a step leaves behind; None: it does not grow in every step.
        staying: bytes that lines have made and that stay.
        joining: lines that join every step's graph to that of the step before.
        item_us: in datasets' `__getitem__`, by where it begins.
        loops: where loaders are looped over.
        is_recordable: whether the last of these is over a loader that `fasttrain.record` takes.
        compiled: see there.
    """

    step_us: float
    data_wait_us: float
    reads: list[Read]
    read_steps: int
    read_us: Mapping[Place, float]
    outputs: Mapping[Place, Seen]
    copies: Mapping[Place, Seen]
    watched_steps: int
    grown: Mapping[Place, int]
    grown_steps: int
    growing_bytes: float | None
    staying: Mapping[Place, int]
    joining: list[Place]
    item_us: Mapping[Place, float]
    loops: list[Place]
    is_recordable: bool
    compiled: CompileEvents


def find(seen: Observations) -> list[Finding]:
    """What to change, costliest first; what has no measured cost comes last."""
    found = [*_reads_and_outputs(seen), *_copies(seen), *_growth(seen), *_data(seen), *_compilation(seen)]
    return sorted(found, key=lambda each: (-(each.cost_us or 0.0), each.kind, each.file or "", each.line or 0))[
        :MAX_FINDINGS
    ]


def _finding(kind: str, place: Place | None, cost_us: float | None, detail: str = "") -> Finding:
    return Finding(
        kind=kind,
        file=None if place is None else shown(place[0]),
        line=None if place is None else place[1],
        cost_us=cost_us,
        advice=f"{detail}{_ADVICE[kind]}",
    )


def _reads_and_outputs(seen: Observations) -> Iterable[Finding]:
    """One finding a line: what is printed is read too."""
    reads: dict[Place, list[str]] = {}
    for read in seen.reads:
        if read.count >= MIN_PER_STEP * seen.read_steps:
            reads.setdefault((read.file, read.line), []).append(read.what)
    outputs = {place: each for place, each in seen.outputs.items() if each.count >= MIN_PER_STEP * seen.watched_steps}
    for place in {**reads, **outputs}:
        whats = reads.get(place, [])
        costs = [seen.read_us[place]] if place in seen.read_us else []
        if place in outputs:
            costs.append(outputs[place].seconds * 1e6 / seen.watched_steps)
        is_output = place in outputs and "str or print" not in whats
        kind = "logging every step" if is_output else "host read"
        yield _finding(kind, place, max(costs, default=None), f"{', '.join(whats)}: " if whats else "")


def _copies(seen: Observations) -> Iterable[Finding]:
    for place, each in seen.copies.items():
        if each.count >= MIN_PER_STEP * seen.watched_steps:
            yield _finding("extra copy", place, each.seconds * 1e6 / seen.watched_steps)


def _growth(seen: Observations) -> Iterable[Finding]:
    """What holds the memory where that is known, else what has made most of it."""
    told = "" if seen.growing_bytes is None else f"{seen.growing_bytes:,.0f} bytes of tensors a step stay in use: "
    containers = [place for place, entries in seen.grown.items() if entries >= MIN_PER_STEP * seen.grown_steps]
    for place in containers:
        yield _finding("growing container", place, None, told)
    for place in seen.joining:
        yield _finding("memory grows", place, None, f"{told}here, each step's graph is joined to all those before it: ")
    if seen.growing_bytes is not None and seen.staying and not containers and not seen.joining:
        place = max(seen.staying, key=lambda each: seen.staying[each])
        yield _finding("memory grows", place, None, f"{told}most of them are made here: ")


def _data(seen: Observations) -> Iterable[Finding]:
    if seen.data_wait_us < max(MIN_DATA_US, MIN_DATA_SHARE * seen.step_us):
        return
    loop = seen.loops[-1] if seen.loops else None
    advice = record_advice(seen.step_us, seen.data_wait_us) if seen.is_recordable else None
    advised = "" if advice is None else f"{advice}; or "
    place, us = max(seen.item_us.items(), key=lambda item: item[1], default=(None, 0.0))
    # The hook that sees the items slows them down: what they take in it is no more than a hint.
    if place is None or us < 0.5 * seen.data_wait_us:
        yield _finding("data wait", loop, seen.data_wait_us, advised)
    elif is_of_torch(place[0]):
        yield _finding("loader over tensors", loop, seen.data_wait_us)
    else:
        yield _finding("slow __getitem__", place, seen.data_wait_us, advised)


def _compilation(seen: Observations) -> Iterable[Finding]:
    for place in seen.compiled.breaks:
        yield _finding("graph break", place, None)
    by_place: dict[Place, str] = {}
    for (place, reason), _ in seen.compiled.recompiled.most_common():
        by_place.setdefault(place, reason)
    for place, reason in by_place.items():
        yield _finding("recompilation", place, None, f"{reason}: " if reason else "")
