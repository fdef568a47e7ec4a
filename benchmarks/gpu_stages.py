"""The stages of `benchmarks.gpu`, each run in a process of its own: STAGE and its arguments.

As a plugin of pytest, it appends the outcome of each test to the results, and leaves out tests that an earlier call has
passed.
"""

from __future__ import annotations

import copy
import gzip
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu import DATA, NO_DEVICE, VARIANTS, append_line, data_folder, read_lines
from fasttrain import FastLoop
from fasttrain.measure.bench.arms import LoopArm
from fasttrain.measure.bench.losses import check_losses, running_means
from fasttrain.workloads.job import Job, load_job

WORK = Path(os.environ.get("FASTTRAIN_CHECK_WORK", "."))
DEVICE = torch.device(os.environ.get("FASTTRAIN_CHECK_DEVICE", "cpu"))
STAGE = os.environ.get("FASTTRAIN_CHECK_STAGE", "")

CHECKED_LOSSES = 32
"""Two graphs of 16: the first call from the job's start runs eagerly, so at least one is launched."""

BF16_TOLERANCE = 2e-2

TURN_S = 0.2
"""An arm's turn is as many whole epochs as take so long, at least one; where an epoch takes longer, a part of it."""

LEAST_ROUNDS = 3

TRACE_S = 6.0
"""Kept for the traces, before the deadline."""

LEAST_ARM_S, LEAST_TRACE_S = 4.0, 1.0
"""With less time left, no further arm is made, and nothing is timed or traced."""

BENCH_ARMS = ("textbook", "graphed", "eager", "auto", "tuned", "compiled")
"""In this order they are left out where time is short."""

BENCH_START_S, BENCH_ARM_S = 14.0, 10.0
"""What `bench` takes before its first arm, and for each arm; where it is cut off it has no result."""

CHILD_SETTINGS = {
    "combo": "import torch._inductor.config as config; config.combo_kernels = True",
    "pdl": "import torch._inductor.config as config; config.triton.enable_pdl = True",
    "cudnn-norm": """
import torch
from torch._inductor.decomposition import decompositions as table
from torch._inductor.lowering import constrain_to_fx_strides, make_fallback
for name in ("cudnn_batch_norm", "native_batch_norm"):
    for each in (name, name + "_backward"):
        del table[getattr(torch.ops.aten, each).default]
        # Without the constraint its input may come in another memory format than the graph says, and its output is
        # then read in a wrong order.
        make_fallback(getattr(torch.ops.aten, each), constrain_to_fx_strides, warn=False)
""",
}
"""Variants that are settings of the process that compiles: Python code that it runs when it starts."""

SITE_CUSTOMIZE = """import os, sys, traceback
if "fasttrain.step.build" in sys.orig_argv:
    try:
        exec({settings!r})
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    with open({noted!r}, "a") as file:
        file.write("set\\n")
"""
"""The module `sitecustomize`, which Python runs when it starts: settings, and a note that they are set."""

ERRORS: list[str] = []
"""What this stage has told of as an error: it then ends as failed, and a second call runs it again."""


def tell(kind: str, **record: Any) -> None:
    """Appends a result."""
    path = os.environ.get("FASTTRAIN_CHECK_RESULTS")
    t = round(time.time() - float(os.environ.get("FASTTRAIN_CHECK_BEGIN", time.time())), 1)
    line = {"kind": kind, "stage": STAGE, **record, "t": t}
    if path:
        append_line(Path(path), line)
    print(json.dumps(line, default=str), flush=True)


def left_s() -> float:
    """Seconds until this stage is interrupted."""
    return float(os.environ.get("FASTTRAIN_CHECK_DEADLINE", "inf")) - time.time()


def planned_end() -> float:
    """When this stage is to end, by `time.time`: at its deadline, or before where earlier stages have left time."""
    return float(os.environ.get("FASTTRAIN_CHECK_UNTIL", "inf"))


@contextmanager
def told_if_it_fails(what: str) -> Generator[None]:
    """Notes an error and goes on: one arm's error does not end the others."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        ERRORS.append(what)
        tell("error", what=what, error=f"{type(error).__name__}: {error}"[:2000])


def pytest_runtest_logreport(report: Any) -> None:
    """Of pytest: notes how a test ended."""
    is_worker = "PYTEST_XDIST_WORKER" in os.environ  # its reports come to the main process too
    if is_worker or (report.when != "call" and report.outcome == "passed"):
        return
    text = str(report.longrepr)[-3000:] if report.outcome == "failed" else None
    tell("test", test=report.nodeid, how=report.outcome, seconds=round(report.duration, 2), text=text)


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Of pytest: leaves out the tests that have passed in an earlier call."""
    earlier = os.environ.get("FASTTRAIN_CHECK_EARLIER")
    told = [] if earlier is None else read_lines(Path(earlier))
    passed = {each["test"] for each in told if each["kind"] == "test" and each["how"] == "passed"}
    config.hook.pytest_deselected(items=[each for each in items if each.nodeid in passed])
    items[:] = [each for each in items if each.nodeid not in passed]


def probe() -> None:
    """What this machine has; fails where the device is missing."""
    import importlib.metadata as metadata

    names = "torch triton numpy pandas pyarrow safetensors tqdm jinja2 nvidia-ml-py pytest pytest-xdist hypothesis tyro"
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in names.split():
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    tell("versions", **versions)
    if versions["tyro"] is None:
        tell(
            "note", text="tyro is missing: the commands of fasttrain cannot start; the check calls the library instead"
        )
    data = data_folder(None)
    tell("data", folder=data, missing=[name for name in DATA if data is None or not (data / name).is_file()])
    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    kept = {name: memory[name].strip() for name in ("MemTotal", "MemAvailable")}
    limits = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}")) for name in ("DATA", "AS", "NOFILE")}
    cores, disk = len(os.sched_getaffinity(0)), shutil.disk_usage(tempfile.gettempdir()).free
    tell("machine", cores=cores, system=platform.platform(), **kept, limits=limits, free_disk_bytes=disk)
    tell("compilers", gxx=said("g++", "--version"), nvcc=said("nvcc", "--version"), nvcc_path=shutil.which("nvcc"))
    with told_if_it_fails("headers of CUDA"):
        from fasttrain.step.build import cuda_home

        tell("cuda home", variable=os.environ.get("CUDA_HOME"), found=cuda_home())
    if DEVICE.type == "cuda":
        fields = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
        tell("nvidia-smi", fields=fields, found=said("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"))
        begin = time.perf_counter()
        torch.zeros(8, device=DEVICE).sum().item()
        about = torch.cuda.get_device_properties(DEVICE)
        tell("gpu", first_use_s=time.perf_counter() - begin, cuda=torch.version.cuda, properties=str(about))


def said(*command: str) -> str | None:
    """What a command prints; None where it is missing."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()[:500]
    except (OSError, subprocess.TimeoutExpired):
        return None


def ceilings() -> None:
    """What the device can do at best: copies, matrix products, and replays of graphs of tiny kernels."""
    is_cuda = DEVICE.type == "cuda"
    source = torch.randn((1 << 30) if is_cuda else (1 << 22), device=DEVICE)
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source))
    tell("ceiling", what="copy", gb_per_s=2 * source.nbytes / seconds / 1e9, n=10)
    for dtype, size in ((torch.bfloat16, 8192), (torch.float32, 8192), (torch.float32, 512)):
        size = size if is_cuda else 256
        left, right = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
        seconds = timed(lambda left=left, right=right: left @ right)
        tell("ceiling", what=f"{dtype} product of {size}", tflop_per_s=2 * size**3 / seconds / 1e12, n=10)
    if not is_cuda:
        tell("skipped", what="CUDA graphs of tiny kernels", reason="the device is the CPU")
        return
    value = torch.zeros(1024, device=DEVICE)
    for count in (1, 10, 100, 1000):
        value.add_(1.0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                value.add_(1.0)
        tell("ceiling", what=f"replay of {count} tiny kernels", us=timed(graph.replay, repeats=50) * 1e6, n=50)


def timed(run: Callable[[], Any], repeats: int = 10) -> float:
    """The median of the seconds that a call takes on the device, after three that are not timed."""
    found: list[float] = []
    for number in range(3 + repeats):
        seconds, _ = on_device(run)
        found += [seconds] if number >= 3 else []
    return statistics.median(found)


def on_device(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of a call between two events of the device, and seconds until the call returned."""
    if DEVICE.type != "cuda":
        begin = time.perf_counter()
        run()
        seconds = time.perf_counter() - begin
        return seconds, seconds
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin = time.perf_counter()
    first.record()
    run()
    host_s = time.perf_counter() - begin
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3, host_s


def job_of(workload: str, variant: str = "") -> tuple[Job, str]:
    """A job on the device, and its precision."""
    job = load_job(workload.removesuffix("-bf16"), DEVICE)
    if variant == "contiguous":
        job = replace(job, memory_format=torch.contiguous_format)  # pyright: ignore[reportArgumentType]
    return job, "bf16" if workload.endswith("-bf16") or variant == "bf16" else "fp32"


def cache_of(workload: str, variant: str) -> Path:
    """Where the programs of a variant are kept."""
    return WORK / "cache" / "variants" / f"{workload}-{variant}"


@contextmanager
def variant_in_use(workload: str, variant: str, *, compiles: bool) -> Iterator[None]:
    """Has programs traced, and (if `compiles`) compiled, in a variant, with a cache of its own; "" changes nothing."""
    if not variant:
        yield
        return
    kept, cache = os.environ["XDG_CACHE_HOME"], cache_of(workload, variant)
    os.environ["XDG_CACHE_HOME"] = str(cache)
    settings = CHILD_SETTINGS.get(variant) if compiles else None
    try:
        with foreach_in_use(variant == "foreach"), set_in_children(settings, cache):
            yield
    finally:
        os.environ["XDG_CACHE_HOME"] = kept


@contextmanager
def set_in_children(settings: str | None, cache: Path) -> Iterator[None]:
    """Has the processes that compile run Python code when they start.

    Raises:
        RuntimeError: programs were compiled without it; they are removed, for they are not of the variant.
    """
    if settings is None:
        yield
        return
    before, path = set(cache.rglob("*.pt2")), list(sys.path)
    with tempfile.TemporaryDirectory() as folder:
        noted = Path(folder, "noted")
        Path(folder, "sitecustomize.py").write_text(SITE_CUSTOMIZE.format(settings=settings, noted=str(noted)))
        sys.path.insert(0, folder)  # the process that compiles is given this path
        try:
            yield
        finally:
            sys.path[:] = path
            count = len(noted.read_text().splitlines()) if noted.exists() else 0
    new = set(cache.rglob("*.pt2")) - before
    if len(new) > count:
        shutil.rmtree(cache)
        raise RuntimeError(f"{len(new)} programs were compiled, {count} of them with the settings of the variant")


@contextmanager
def foreach_in_use(is_wanted: bool) -> Iterator[None]:
    """Has the optimizer's step traced with `foreach`, which the library turns off.

    With a learning rate in a tensor torch's optimizers ask for `capturable` besides.
    """
    if not is_wanted:
        yield
        return
    from fasttrain.step.optimizer import OptimizerStep

    before: Any = OptimizerStep._group

    def with_foreach(self: Any, *given: Any) -> dict[str, Any]:
        group = before(self, *given)
        return {**group, "foreach": True, "capturable": True} if "foreach" in group else group

    OptimizerStep._group = with_foreach
    try:
        yield
    finally:
        OptimizerStep._group = before


def programs(workload: str, variant: str = "") -> None:
    """Has all programs of a workload compiled, so that no measurement waits for a compiler."""
    with variant_in_use(workload, variant, compiles=True):
        job, precision = job_of(workload, variant)
        begin = time.perf_counter()
        arm = LoopArm(job, engine="graphed" if DEVICE.type == "cuda" else "compiled", precision=precision)
        for _ in range(2):  # in the second call it waits until it is decided what runs the steps
            arm.step()
        seconds = time.perf_counter() - begin
        tell("program", workload=workload, variant=variant, engine=arm.engine, waited_s=arm.compile_s, seconds=seconds)


class ArmSpec(NamedTuple):
    """An arm of a headline.

    Attributes:
        label: its name.
        engine: of `FastLoop`.
        size: steps of the larger CUDA graph; None: as many as the engine says.
        variant: of its programs.
    """

    label: str
    engine: str
    size: int | None = None
    variant: str = ""


HEADLINE = (
    ArmSpec("eager", "eager"),
    ArmSpec("program", "compiled"),
    ArmSpec("graph of 1", "graphed", 1),
    ArmSpec("graph of 4", "graphed", 4),
    ArmSpec("graph of 16", "graphed", 16),
)


class TimedArm:
    """A training that runs epoch by epoch, with CUDA graphs of a given size: eagerly step by step, else in calls of
    as many steps as the engine takes.

    Args:
        workload: name of the job, perhaps with "-bf16".
        spec: how it runs.

    Attributes:
        losses: of the first steps from the job's start, after it was decided what runs the steps.
        turns: seconds on the device and on the host, and steps, of each turn.
        agrees: whether the losses are those of the first arm.
    """

    def __init__(self, workload: str, spec: ArmSpec) -> None:
        self.spec = spec
        self.turns: list[tuple[float, float, int]] = []
        self.agrees = False
        with variant_in_use(workload, spec.variant, compiles=False), graphs_of(spec.size):
            job, precision = job_of(workload, spec.variant)
            model = job.model()
            optimizer = job.optimizer(model)
            self.step = FastLoop(model, optimizer, job.forward, engine=spec.engine, precision=precision).step
            self.batches = job.batches()
            self.tolerance = BF16_TOLERANCE if precision == "bf16" else job.tolerance
            before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            if spec.engine != "eager":
                self.step(next(iter(self.batches)))
                self.step.settle(self.batches)
                model.load_state_dict(before[0])
                optimizer.load_state_dict(before[1])
            self.batches.set_epoch(0)
            self.losses = self._first_losses()
            self._epoch_s, _ = on_device(lambda: self.steps(len(self.batches) if DEVICE.type == "cuda" else 20))
            self._epoch_s *= 1 if DEVICE.type == "cuda" else len(self.batches) / 20

    def steps(self, num_steps: int) -> int:
        """Runs steps of one epoch, and reads its metrics at the end; returns how many."""
        epoch, done = iter(self.batches), 0
        self.step.metrics.reset()
        while done < num_steps:
            ran = self._call(epoch, num_steps - done)
            if ran is None:
                break
            done += ran.numel()
        self.step.flush()
        self.step.metrics.compute()
        return done

    def turn(self) -> None:
        """One turn, timed."""
        epochs = max(1, int(TURN_S / self._epoch_s))
        steps = len(self.batches)
        if self._epoch_s > 4 * TURN_S:
            steps = max(16, int(steps * TURN_S / self._epoch_s))
        done: list[int] = []
        seconds, host_s = on_device(lambda: done.extend(self.steps(steps) for _ in range(epochs)))
        self.turns.append((seconds, host_s, sum(done)))

    def two_calls(self) -> Callable[[], None]:
        """What runs two calls, each of one step or one graph, of an epoch whose first one is over."""
        epoch, size = iter(self.batches), self.spec.size or 1
        self._call(epoch, size)

        def run() -> None:
            for _ in range(2):
                self._call(epoch, size)

        return run

    def _call(self, epoch: Any, most: int) -> Tensor | None:
        """One call of at most so many steps; None where the epoch is over."""
        size = self.spec.size or 1
        steps = 0 if self.spec.engine == "eager" else max(size, self.step.span // size * size)
        span = epoch.take(min(steps, most)) if steps and self.step.span else None
        if span is not None:
            return self.step.steps(span)
        batch = next(epoch, None)
        return None if batch is None else self.step(batch)

    def _first_losses(self) -> list[float]:
        epoch, found = iter(self.batches), []
        while len(found) < CHECKED_LOSSES:
            losses = self._call(epoch, CHECKED_LOSSES - len(found))
            assert losses is not None
            found += losses.reshape(-1).tolist()
        return found[:CHECKED_LOSSES]


@contextmanager
def graphs_of(size: int | None) -> Iterator[None]:
    """Has the larger CUDA graphs that are made meanwhile hold so many steps; None changes nothing."""
    from fasttrain.step import cudagraph

    before = cudagraph.MANY
    cudagraph.MANY = before if size is None else size
    try:
        yield
    finally:
        cudagraph.MANY = before


def headline(workload: str) -> None:
    """Eager steps, the program, and graphs of 1, 4 and 16 steps in turn; then a trace of two calls of each."""
    measure(workload, HEADLINE)


def variants(workload: str) -> None:
    """The program as it is, against its variants."""
    engine, size = ("graphed", 16) if DEVICE.type == "cuda" else ("compiled", None)
    specs = [ArmSpec("as it is", engine, size)]
    specs += [ArmSpec(name, engine, size, name) for name in VARIANTS[workload]]
    measure(workload, [ArmSpec("eager", "eager"), *specs])


def measure(workload: str, specs: Sequence[ArmSpec]) -> None:
    """Makes arms, compares their losses with the first one's, lets them take turns, and traces them."""
    arms = made_arms(workload, specs)
    try:
        take_turns(workload, arms, planned_end() - TRACE_S)
    finally:
        tell_times(workload, arms, kind="step")
    for arm in reversed(arms):  # the last ones are of most interest
        if left_s() < LEAST_TRACE_S:
            tell("skipped", workload=workload, what=f"trace of {arm.spec.label}", reason="no time was left")
            continue
        with told_if_it_fails(f"{workload}: {arm.spec.label}: trace"):
            tell_syncs(workload, arm)
            trace(workload, arm)


def take_turns(workload: str, arms: Sequence[TimedArm], until: float) -> None:
    """Rounds in which each arm has one turn; an arm that fails has no more."""
    alive, rounds = list(arms), 0
    while alive and (rounds < LEAST_ROUNDS or time.time() < until) and left_s() > LEAST_TRACE_S:
        for arm in list(alive):
            alive.remove(arm)
            with told_if_it_fails(f"{workload}: {arm.spec.label}: a turn"):
                arm.turn()
                alive.append(arm)
        rounds += 1
        if rounds == LEAST_ROUNDS:
            tell_times(workload, arms, kind="step, so far")


def made_arms(workload: str, specs: Sequence[ArmSpec]) -> list[TimedArm]:
    """The arms that can be made here in time; each one's losses are compared with the first one's."""
    arms: list[TimedArm] = []
    for spec in specs:
        if spec.engine == "graphed" and DEVICE.type != "cuda":
            tell("skipped", workload=workload, what=spec.label, reason="CUDA graphs need a CUDA device")
            continue
        if spec.variant and not list(cache_of(workload, spec.variant).glob("**/*.pt2")):
            tell("skipped", workload=workload, what=spec.label, reason="its programs were not compiled")
            continue
        if arms and left_s() < LEAST_ARM_S:
            tell("skipped", workload=workload, what=spec.label, reason="no time was left")
            continue
        with told_if_it_fails(f"{workload}: {spec.label}"):
            begin = time.perf_counter()
            arm = TimedArm(workload, spec)
            seconds = time.perf_counter() - begin
            tell("arm", workload=workload, arm=spec.label, ready_s=seconds, engine=str(arm.step.engine))
            arms.append(arm)
            agreed = check_losses(running_means(arm.losses), running_means(arms[0].losses), arm.tolerance)
            arm.agrees = True
            tell("losses", workload=workload, arm=spec.label, largest_difference=agreed, first=arm.losses[:20])
            arm.turn()
            tell_times(workload, [arm], kind="step, alone")  # stays where a later arm hangs or breaks the device
            arm.turns.clear()
    return arms


def tell_times(workload: str, arms: Sequence[TimedArm], kind: str) -> None:
    """What the arms' turns took."""
    for arm in arms:
        if arm.turns:
            steps = [seconds / count * 1e6 for seconds, _, count in arm.turns]
            host = [seconds / count * 1e6 for _, seconds, count in arm.turns]
            figures = {"step_us": statistics.median(steps), "host_us": statistics.median(host), "n": len(steps)}
            named = {"workload": workload, "arm": arm.spec.label, "agrees": arm.agrees}
            tell(kind, **named, **figures, all_us=[round(each, 3) for each in steps])


def tell_syncs(workload: str, arm: TimedArm) -> None:
    """How often two calls wait for the device."""
    if DEVICE.type != "cuda":
        return
    calls = arm.two_calls()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            calls()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [str(each.message)[:200] for each in caught if "synchroniz" in str(each.message).lower()]
    found = [each for each in found if "prototype" not in each.lower()]
    tell("syncs", workload=workload, arm=arm.spec.label, count=len(found), first=found[:1])


def trace(workload: str, arm: TimedArm) -> None:
    """Every kernel of two calls, its time and the gap before it. Nothing is timed in this process afterwards."""
    from torch.profiler import ProfilerActivity, profile

    is_cuda = DEVICE.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    calls = arm.two_calls()
    if is_cuda:
        torch.cuda.synchronize()
    with profile(activities=activities) as profiler:
        calls()
        if is_cuda:
            torch.cuda.synchronize()
    name = f"{STAGE}-{arm.spec.label.replace(' ', '-')}.json"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        profiler.export_chrome_trace(str(path))
        content = path.read_bytes()
    (WORK / "profiles" / f"{name}.gz").write_bytes(gzip.compress(content, 5))
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if is_cuda else ("cpu_op",)
    tell("trace", workload=workload, arm=arm.spec.label, **kernels_of(json.loads(content), kinds))


def kernels_of(document: dict[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """How often each kernel of a trace runs and how long, the time between kernels, and all in order."""
    events = sorted((each for each in document["traceEvents"] if each.get("cat") in kinds), key=lambda each: each["ts"])
    by_name: dict[str, list[float]] = defaultdict(list)
    gaps: list[float] = []
    end: float | None = None
    for each in events:
        by_name[each["name"][:160]].append(each["dur"])
        gaps += [] if end is None else [max(0.0, each["ts"] - end)]
        end = max(end or 0.0, each["ts"] + each["dur"])
    table = sorted(((name, len(us), sum(us)) for name, us in by_name.items()), key=lambda row: -row[2])
    return {
        "num_kernels": len(events),
        "busy_us": sum(sum(us) for us in by_name.values()),
        "gaps_us": sum(gaps),
        "median_gap_us": statistics.median(gaps) if gaps else None,
        "kernels": [{"name": name, "calls": calls, "us": us} for name, calls, us in table[:40]],
    }


def bench(workload: str, blocks: str) -> None:
    """`fasttrain bench --keep-cache`, by the library: it needs no package for the command line."""
    from fasttrain.commands.bench import Bench

    count = int(max(2, (left_s() - BENCH_START_S) / BENCH_ARM_S / int(blocks)))
    arms = [each for each in BENCH_ARMS if each != "graphed" or DEVICE.type == "cuda"][:count]
    out = WORK / "records" / f"{workload}-{DEVICE.type}.json"
    options = ["--workload", workload, "--arms", *arms, "--blocks", blocks, "--keep-cache", "--device", str(DEVICE)]
    options += ["--warmup-s", "0.3", "--timed-s", "0.5", "--out", out.name]
    command = Bench(
        workload=workload,  # pyright: ignore[reportArgumentType]
        arms=tuple(arms),
        blocks=int(blocks),
        keep_cache=True,
        device=str(DEVICE),
        warmup_s=0.3,
        timed_s=0.5,
        out=out,
    )
    code = command.execute(["bench", *options])
    record = json.loads(out.read_text("utf-8"))
    for name, reason in record["refused"].items():
        tell("bench", workload=workload, arm=name, refused=reason)
    for name, arm in record["arms"].items():
        step_us = statistics.median(block["step_s"] for block in arm["blocks"]) * 1e6
        rate = arm["blocks"][0]["samples_per_step"] / step_us * 1e6
        tell(
            "bench",
            workload=workload,
            arm=name,
            step_us=step_us,
            samples_per_s=rate,
            engine=arm["blocks"][-1]["engine"],
        )
    if code:
        raise SystemExit(code)


STAGES: dict[str, Callable[..., None]] = {
    each.__name__: each for each in (probe, ceilings, programs, headline, variants, bench)
}


def main(arguments: Sequence[str]) -> int:
    """Runs a stage; returns the exit code."""
    if DEVICE.type == "cuda":
        if not torch.cuda.is_available():
            tell("error", what="the device", error="torch finds no CUDA device: see torch.cuda.is_available()")
            return NO_DEVICE
        torch.backends.cudnn.allow_tf32 = False
    torch.set_num_threads(1)
    name, *rest = arguments
    try:
        STAGES[name](*rest)
    except (Exception, KeyboardInterrupt) as error:
        tell("error", what=name, error=f"{type(error).__name__}: {error}"[:3000], text=traceback.format_exc()[-3000:])
        return 1
    return 1 if ERRORS else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
