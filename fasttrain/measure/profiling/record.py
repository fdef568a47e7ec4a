"""A profile as plain data: small, canonical, made to be read in a diff."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from fasttrain.errors import ConfigError, DataError
from fasttrain.measure.strict import Node

__all__ = [
    "PHASES",
    "PROGRAM",
    "Copies",
    "Counters",
    "Finding",
    "Gpu",
    "HostRead",
    "Memory",
    "Operator",
    "Profile",
    "Recompilation",
    "Traffic",
    "check_name",
]

SCHEMA_VERSION = 1

PHASES = ("data wait", "host to device", "forward", "backward", "optimizer", "metrics", "program", "other")
"""What a step's time is divided into, in the order in which a step meets them."""

PROGRAM = "program"
"""The phase that is split further: see `Profile.program`."""

SUM_TOLERANCE = 0.01
"""Relative; phases and operators are rounded to four digits each."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Operator:
    """An operator in one phase of a step; figures are per step.

    Attributes:
        name: such as "aten::addmm"; "forward: cpp_fused_relu_2" for a compiled program's kernel, after the parts of the
            step that it computes; "python" for what the interpreter does between operators, "generated code" for a
            compiled program but for its kernels and operators, "other" for all that the list leaves out.
        phase: one of `PHASES`; "" in the row "other".
        calls: how often it runs; 0 where that has no meaning.
        self_us: without what it calls, scaled to the time of an untraced step.
    """

    name: str
    phase: str
    calls: float
    self_us: float

    @classmethod
    def from_node(cls, node: Node) -> Operator:
        """Reads one; raises `DataError`."""
        return cls(
            name=node.text("name"),
            phase=node.text("phase"),
            calls=node.number("calls"),
            self_us=node.number("self_us"),
        )


@dataclass(frozen=True, kw_only=True)
class HostRead:
    """A place that makes Python wait for a device value.

    Attributes:
        file: of the innermost frame outside torch, fasttrain and the standard library (where there is none, outside
            torch); relative to the working folder where it lies in it. "other places" in a last entry for all that the
            list has no room for.
        line: its line; 0 in that entry.
        what: the method or operator, such as "item".
        per_step: how often in a step.
    """

    file: str
    line: int
    what: str
    per_step: float

    @classmethod
    def from_node(cls, node: Node) -> HostRead:
        """Reads one; raises `DataError`."""
        return cls(
            file=node.text("file"),
            line=node.integer("line"),
            what=node.text("what"),
            per_step=node.number("per_step"),
        )


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Copies one way, per step."""

    count: float
    bytes: float

    @classmethod
    def from_node(cls, node: Node) -> Traffic:
        """Reads one; raises `DataError`."""
        return cls(count=node.number("count"), bytes=node.number("bytes"))


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Copies between host and device, per step; all zero where the device is the CPU."""

    h2d: Traffic
    d2h: Traffic

    @classmethod
    def from_node(cls, node: Node) -> Copies:
        """Reads them; raises `DataError`."""
        return cls(h2d=Traffic.from_node(node.node("h2d")), d2h=Traffic.from_node(node.node("d2h")))


@dataclass(frozen=True, kw_only=True)
class Recompilation:
    """A reason why `torch.compile` compiled a function again, and how often, over the whole process.

    "other reasons" in a last entry for all that the list has no room for.
    """

    reason: str
    count: int

    @classmethod
    def from_node(cls, node: Node) -> Recompilation:
        """Reads one; raises `DataError`."""
        return cls(reason=node.text("reason"), count=node.integer("count", 1))


@dataclass(frozen=True, kw_only=True)
class Counters:
    """Exact counts, which need no statistics. Per step, but for the last four named below.

    Attributes:
        dispatched_operators: calls that torch's dispatcher ran, nested ones counted too.
        kernel_launches: on CUDA, kernels and graphs launched; None on the CPU.
        host_reads: by place, most frequent first.
        copies: between host and device.
        allocations: of tensor memory.
        graph_breaks: of `torch.compile`, over the whole process; likewise.
        recompilations: of `torch.compile`, over the whole process, as far back as it keeps them: among its last 64
            compilations.
        programs_loaded: fasttrain's compiled programs, over the whole process.
        flops: floating-point operations of a step run operator by operator; None where nothing counts them.
        flops_not_counted: operators with tensors in and out that have no formula.
    """

    dispatched_operators: float
    kernel_launches: float | None
    host_reads: list[HostRead]
    copies: Copies
    allocations: float
    graph_breaks: int
    recompilations: list[Recompilation]
    programs_loaded: int
    flops: float | None
    flops_not_counted: list[str]

    @classmethod
    def from_node(cls, node: Node) -> Counters:
        """Reads them; raises `DataError`."""
        return cls(
            dispatched_operators=node.number("dispatched_operators"),
            kernel_launches=node.number_or_none("kernel_launches"),
            host_reads=[HostRead.from_node(each) for each in node.nodes("host_reads")],
            copies=Copies.from_node(node.node("copies")),
            allocations=node.number("allocations"),
            graph_breaks=node.integer("graph_breaks"),
            recompilations=[Recompilation.from_node(each) for each in node.nodes("recompilations")],
            programs_loaded=node.integer("programs_loaded"),
            flops=node.number_or_none("flops"),
            flops_not_counted=list(node.texts("flops_not_counted")),
        )


MemoryPoint = tuple[int, int]
"""(step from 0, bytes in use after it)."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of tensors.

    Attributes:
        peak_bytes: the most that was in use at a time.
        by_kind: what that was: parameters, gradients, optimizer, buffers, data (other tensors that Python holds between
            steps) and other (what a step makes and lets go). Adds up to `peak_bytes`.
        timeline: bytes in use after each step, in order.
    """

    peak_bytes: int
    by_kind: dict[str, int]
    timeline: list[MemoryPoint]

    @classmethod
    def from_node(cls, node: Node) -> Memory:
        """Reads it; raises `DataError`."""
        by_kind = node.node("by_kind")
        return cls(
            peak_bytes=node.integer("peak_bytes"),
            by_kind={name: by_kind.integer(name) for name in by_kind.names()},
            timeline=node.pairs("timeline"),
        )


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The GPU during the clean pass.

    Attributes:
        utilisation: share of time with a kernel running, 0 to 1, as the driver samples it; None where it does not.
        power_w: mean.
        energy_j_per_sample: None for windows below 10 s, over which the driver's counter is too coarse, and where the
            number of samples is unknown.
        idle_us: per step, the device's idle time by cause: "host", "launch gaps", "data wait", "synchronisation".
    """

    utilisation: float | None
    power_w: float | None
    energy_j_per_sample: float | None
    idle_us: dict[str, float] | None

    @classmethod
    def from_node(cls, node: Node) -> Gpu:
        """Reads it; raises `DataError`."""
        idle = node.node("idle_us") if node.has("idle_us") else None
        return cls(
            utilisation=node.number_or_none("utilisation"),
            power_w=node.number_or_none("power_w"),
            energy_j_per_sample=node.number_or_none("energy_j_per_sample"),
            idle_us=None if idle is None else {name: idle.number(name) for name in idle.names()},
        )


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something to change.

    Attributes:
        kind: such as "host read" or "slow __getitem__".
        file: where; None where no place is known.
        line: where; None likewise.
        cost_us: what it costs a step at most; None where that was not measured.
        advice: what to try.
    """

    kind: str
    file: str | None
    line: int | None
    cost_us: float | None
    advice: str

    @classmethod
    def from_node(cls, node: Node) -> Finding:
        """Reads one; raises `DataError`."""
        return cls(
            kind=node.text("kind"),
            file=node.text_or_none("file"),
            line=node.integer_or_none("line"),
            cost_us=node.number_or_none("cost_us"),
            advice=node.text("advice"),
        )


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Where the time of a training step goes.

    Attributes:
        name: of the profile: its file's name without the suffix.
        workload: what is trained, as the job describes itself.
        command: that made it.
        created: UTC, ISO 8601.
        environment: hardware and versions.
        step_us: wall time of one step in a clean pass.
        traced_step_us: the same under the tracer, which slows it down; phases and operators are scaled to `step_us`.
        phases: us by phase; adds up to `step_us`.
        program: us of the phase "program" by where they come from: the kernels of one part of a step ("forward",
            "backward", "optimizer", "metrics"), those of several ("backward + optimizer"), what is beside the program,
            and what is "not attributed"; adds up to the phase. Empty where no program ran, or a profile is from before
            there was this split.
        operators: 40 by self time, then one row "other"; adds up to `step_us`.
        counters: exact counts.
        memory: of tensors.
        gpu: None on the CPU.
        findings: costliest first.
    """

    name: str
    workload: dict[str, Any]
    command: str
    created: str
    environment: dict[str, Any]
    step_us: float
    traced_step_us: float
    phases: dict[str, float]
    program: dict[str, float]
    operators: list[Operator]
    counters: Counters
    memory: Memory
    gpu: Gpu | None
    findings: list[Finding]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, floats rounded to four significant digits."""
        return {"schema_version": SCHEMA_VERSION, "kind": "profile", **_rounded(asdict(self))}

    @classmethod
    def from_dict(cls, given: Any) -> Profile:
        """Checks and takes over what `to_dict` made, once it went through JSON.

        Raises:
            DataError: it is not a profile of this version, a value cannot be, or it contradicts itself.
        """
        node = Node(given, "the profile")
        if not node.has("schema_version") or node.integer("schema_version") != SCHEMA_VERSION:
            raise DataError(f"is not a profile of schema version {SCHEMA_VERSION}: profile again")
        if node.text("kind") != "profile":
            raise DataError(f"is a record of kind {node.text('kind')!r:.40}, not a profile")
        phases = node.node("phases")
        program = node.node("program") if node.has("program") else None
        profile = cls(
            name=node.text("name"),
            workload=node.plain("workload"),
            command=node.text("command"),
            created=node.text("created"),
            environment=node.plain("environment"),
            step_us=node.number("step_us", is_positive=True),
            traced_step_us=node.number("traced_step_us", is_positive=True),
            phases={name: phases.number(name) for name in phases.names()},
            program={} if program is None else {name: program.number(name) for name in program.names()},
            operators=[Operator.from_node(each) for each in node.nodes("operators")],
            counters=Counters.from_node(node.node("counters")),
            memory=Memory.from_node(node.node("memory")),
            gpu=Gpu.from_node(node.node("gpu")) if node.has("gpu") else None,
            findings=[Finding.from_node(each) for each in node.nodes("findings")],
        )
        problem = _contradiction(profile)
        if problem is not None:
            raise DataError(problem)
        return profile

    def to_text(self) -> str:
        """Canonical JSON: sorted keys, one value a line."""
        return json.dumps(self.to_dict(), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def check_name(name: str) -> str:
    """The name itself, if it can name a file in a given folder and nothing else.

    Raises:
        ConfigError: it cannot.
    """
    if _NAME.fullmatch(name) is None:
        raise ConfigError(
            f"name {name[:80]!r}: use up to 64 letters, digits, dots, dashes and underscores, no dot first"
        )
    return name


def _contradiction(profile: Profile) -> str | None:
    """What contradicts itself in a profile, None if nothing does."""
    if _NAME.fullmatch(profile.name) is None:
        return "its name must be up to 64 letters, digits, dots, dashes and underscores"
    if set(profile.phases) != set(PHASES):
        return f"its phases must be exactly {', '.join(PHASES)}"
    operators = sum(operator.self_us for operator in profile.operators)
    for what, total in (("phases", sum(profile.phases.values())), ("operators", operators)):
        if abs(total - profile.step_us) > SUM_TOLERANCE * profile.step_us:
            return f"its {what} add up to {total:.4g} us, but a step takes {profile.step_us:.4g} us"
    parts, program = sum(profile.program.values()), profile.phases["program"]
    if profile.program and abs(parts - program) > SUM_TOLERANCE * program:
        return f"the parts of its program add up to {parts:.4g} us, but the phase takes {program:.4g} us"
    return None


def _rounded(node: Any) -> Any:
    if isinstance(node, float):
        short = float(f"{node:.4g}")
        return int(short) if short.is_integer() and abs(short) < 2**53 else short
    if isinstance(node, dict):
        return {name: _rounded(value) for name, value in node.items()}
    if isinstance(node, list | tuple):
        return [_rounded(value) for value in node]
    return node
