"""From a traced step to its program: by the cache where it is known, by a compiling child where not."""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from fasttrain.data.batch import tensors
from fasttrain.data.ragged import Ragged
from fasttrain.device import device_name
from fasttrain.errors import EngineError
from fasttrain.step.build import Build, GraphJob
from fasttrain.step.cache import ProgramCache, Verdict, default_folder
from fasttrain.step.program import StepProgram
from fasttrain.step.spec import StepSpec
from fasttrain.step.trace import Mismatch, TracedStep, trace_step

__all__ = ["Compiler", "Pending"]

Batch = Any


class Pending:
    """A program that is on its way.

    Attributes:
        traced: the step that it is of.
        trace_s: how long the trace took.
        compile_s: how long the child took; None while it runs, or where the cache had the program.
    """

    def __init__(self, compiler: Compiler, traced: TracedStep, batch: Batch, trace_s: float) -> None:
        self.traced = traced
        self.trace_s = trace_s
        self.compile_s: float | None = None
        self._compiler = compiler
        inputs = traced.inputs(batch)
        if isinstance(inputs, Mismatch):
            raise EngineError(f"the step changes while it is traced: {inputs.reason}")
        job = GraphJob.of(traced.graph, inputs, traced.open_dims)
        self._key = program_key(job)
        self._package = compiler.cache.find(self._key)
        self._build = None if self._package is not None else Build(job, compiler.cache.inductor_folder)

    def is_ready(self) -> bool:
        """True once the program can be loaded.

        Raises:
            EngineError: the child failed.
        """
        return self._package is not None or (self._build is not None and self._arrived(self._build.poll()))

    def wait(self) -> None:
        """Waits until it can be loaded; errors as in `is_ready`."""
        if self._package is None:
            assert self._build is not None
            self._arrived(self._build.wait())

    def load(self) -> StepProgram:
        """The program. It must be ready.

        Raises:
            EngineError: it cannot be loaded.
        """
        assert self._package is not None
        return StepProgram(self._package, self.traced.spec.device)

    def close(self) -> None:
        """Ends the child, if it still runs."""
        if self._build is not None:
            self._build.close()

    def _arrived(self, package: Path | None) -> bool:
        if package is None:
            return False
        assert self._build is not None
        self.compile_s = self._build.seconds
        try:
            self._package = self._compiler.cache.add(self._key, package, type(self.traced.spec.model).__name__)
        except OSError:
            self._package = package  # the cache is full or gone: the program serves this run
        return True


class Compiler:
    """Makes programs of one step, and remembers what was measured of them.

    Args:
        spec: the step.

    Raises:
        EngineError: the program cache cannot be trusted or made.
    """

    def __init__(self, spec: StepSpec) -> None:
        self.cache = ProgramCache(default_folder())
        self._spec = spec
        self._signature: str | None = None

    def begin(self, batch: Batch) -> Pending:
        """Traces the step, which takes a while, and has its program made if the cache does not have it.

        Raises:
            EngineError: the step cannot be traced, or no child be started.
        """
        begin = time.perf_counter()
        traced = trace_step(self._spec, batch)
        return Pending(self, traced, batch, time.perf_counter() - begin)

    def verdict(self, batch: Batch) -> Verdict | None:
        """What was measured of a step that looks like this one, on this machine."""
        self._signature = job_signature(self._spec, batch)
        return self.cache.verdict(self._signature)

    def remember(self, verdict: Verdict) -> None:
        """Keeps what was measured; where it cannot be written, the next run measures again."""
        if self._signature is not None:
            with suppress(OSError):
                self.cache.remember(self._signature, verdict)


def program_key(job: GraphJob) -> str:
    """Of everything that a program depends on: graph, constants, shapes, versions, hardware, threads."""
    constants = [
        (name, value.shape, value.dtype, value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, value in sorted(job.graph.named_buffers())  # a graph keeps its constants there
    ]
    inputs = [
        ([None if dim in dims else length for dim, length in enumerate(size)], stride, dtype, device)
        for (size, stride, dtype, device), dims in zip(job.inputs, job.open_dims, strict=True)
    ]
    return _hash(job.graph.code, constants, inputs, job.num_threads, *_machine(job.inputs[0][3]))


def job_signature(spec: StepSpec, batch: Batch) -> str:
    """Of what a job looks like from outside: enough to remember what was measured, not to trust a program."""
    options = [
        {name: value for name, value in group.items() if name not in ("params", "lr", "initial_lr")}
        for group in spec.optimizer.param_groups
    ]
    leaves = [leaf.offsets if isinstance(leaf, Ragged) else leaf for leaf in tensors(batch)]
    return _hash(
        repr(spec.model),
        [(name, value.shape, value.dtype) for name, value in spec.model.state_dict().items()],
        type(spec.optimizer).__qualname__,
        options,
        [(leaf.shape, leaf.dtype) for leaf in leaves],
        (spec.precision, spec.accumulate, spec.clip_norm, spec.clip_value),
        torch.get_num_threads(),
        *_machine(spec.device),
    )


def _machine(device: torch.device) -> tuple[str, ...]:
    return str(torch.__version__), device.type, device_name(device), torch.backends.cpu.get_cpu_capability()


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:40]
