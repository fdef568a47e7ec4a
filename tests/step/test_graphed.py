"""The graphed engine on a stand-in for CUDA graphs: whatever changes on the way, the numbers are eager's."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain import EngineError, TrainStep
from fasttrain.step import cudagraph, ladder
from tests.step import jobs
from tests.step.cuda_stand_in import EXACT, Recording, graph_backend, graphed_engine, graphed_step, with_graphs
from tests.step.jobs import assert_as_eager, batches, everything, run
from tests.step.models import CASES, OPTIMIZERS, started
from tests.step.test_compiled import CHANGES, STAYS

pytestmark = pytest.mark.usefixtures("in_double")


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_in_the_middle_has_eagers_effect(name: str, lane: Recording) -> None:
    step = graphed_step(lane)
    seen: list[int] = []
    changes = CHANGES[name](16)
    before = changes.get(16, lambda _: None)
    changes[16] = lambda each: (seen.append(lane.launches), before(each))
    assert_as_eager(step, batches(44), changes, rtol=EXACT)
    assert seen[-1] == 15, "no graph ran before the change"
    assert step.engine.value == "graphed"
    if name in STAYS:
        assert lane.launches - seen[-1] == 28
        assert lane.captures == (2 if name == "the optimizer's state" else 1), "captured again where state is elsewhere"


def test_values_that_are_moved_are_followed(lane: Recording) -> None:
    """`parameter.data = other` leaves the parameter the same object."""

    def move(step: TrainStep) -> None:
        for parameter in step.spec.model.parameters():
            parameter.data = parameter.data * 0.5

    assert_as_eager(graphed_step(lane), batches(12), {6: move}, rtol=EXACT)
    assert (lane.captures, lane.launches) == (2, 11)


def test_warming_up_leaves_no_trace(lane: Recording) -> None:
    step = graphed_step(lane)
    data = batches(3)
    run(step, data[:2])
    untouched = everything(step)
    expected = {name: value.clone() for name, value in untouched["model"].items()}
    states = [{k: v.clone() for k, v in each.items()} for each in step.spec.optimizer.state.values()]
    rng, totals = torch.get_rng_state(), step.metrics.totals.clone()
    seen: list[int] = []

    def look() -> None:
        seen.append(1)
        assert all(torch.equal(value, expected[name]) for name, value in step.spec.model.state_dict().items())
        for each, wanted in zip(step.spec.optimizer.state.values(), states, strict=True):
            assert all(torch.equal(value, wanted[name]) for name, value in each.items())
        assert torch.equal(torch.get_rng_state(), rng)
        assert torch.equal(step.metrics.totals, totals)

    lane.on_capture = look
    step.spec.model.load_state_dict({k: v.clone() for k, v in expected.items()})
    for parameter in step.spec.model.parameters():
        parameter.data = parameter.data.clone()  # it captures anew
    step(data[2])
    assert seen == [1]


def test_a_loss_is_not_overwritten_by_later_steps(lane: Recording) -> None:
    step, eager = graphed_step(lane), jobs.train_step("eager")
    torch.manual_seed(11)
    losses = [step(batch) for batch in batches(6)]
    torch.manual_seed(11)
    wanted = [eager(batch).clone() for batch in batches(6)]
    torch.testing.assert_close(losses, wanted, rtol=EXACT, atol=EXACT)
    assert lane.launches == 5


@pytest.mark.parametrize("name", ["sgd-momentum", "adam", "adamw", "rmsprop-centered", "nadam", "radam", "asgd"])
def test_optimizers(name: str, lane: Recording) -> None:
    kind, options = OPTIMIZERS[name]
    steps = [
        TrainStep(net, kind(net.parameters(), **options), loss=F.cross_entropy, engine="eager", clip_norm=0.2)
        for net in (jobs.model(), jobs.model())
    ]
    with_graphs(steps[0], lane)
    data = batches(12)
    torch.testing.assert_close(run(steps[0], data), run(steps[1], data), rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(everything(steps[0]), everything(steps[1]), rtol=EXACT, atol=EXACT)
    assert (lane.captures, lane.launches) == (1, 11)


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"accumulate": 3, "clip_norm": 0.1}])
def test_accumulated_gradients(options: dict[str, Any], lane: Recording) -> None:
    step = graphed_step(lane, **options)
    assert_as_eager(step, batches(20), rtol=EXACT, **options)
    assert lane.captures == 2
    assert lane.launches == 20 - options["accumulate"]
    assert all(parameter.grad is None for parameter in step.spec.trained())
    assert step.span == 1


def test_scaled_gradients(lane: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)  # autocast leaves doubles alone
    monkeypatch.setattr("fasttrain.device._cpu_has", lambda *_: True)
    changes = {0: lambda step: setattr(step.spec.scaler, "_init_scale", 2.0**22)}
    step = graphed_step(lane, precision="fp16")
    assert_as_eager(step, batches(30), changes, rtol=2e-3, precision="fp16")
    assert lane.launches > 8
    assert step.spec.scaler is not None
    assert step.spec.scaler.get_scale() < 2.0**22


def test_a_batch_of_another_size_runs_eagerly_until_it_has_its_graph(lane: Recording) -> None:
    full, short = batches(80), batches(80, rows=5)
    data = [short[place] if place > 15 and place % 2 else batch for place, batch in enumerate(full)]
    step = graphed_step(lane)
    assert_as_eager(step, data, rtol=EXACT)
    assert lane.captures == 2
    assert lane.launches == 79 - ladder.ENOUGH_MISSED
    assert step.engine.value == "graphed"
    assert "16 steps ran eagerly, the last because this differed" in step.engine.reason


def test_the_number_of_programs_is_bounded(lane: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "ENOUGH_MISSED", 2)
    step = graphed_step(lane)
    assert_as_eager(step, [batch for rows in range(4, 10) for batch in batches(7, rows=rows)], rtol=EXACT)
    assert (lane.captures, lane.programs.builds) == (ladder.MAX_CANDIDATES, 4)
    assert step.engine.value == "eager"
    before = lane.launches
    step(batches(1, rows=4)[0])  # all programs that were made are kept
    assert lane.launches == before + 1
    step(batches(1, rows=8)[0])
    assert lane.launches == before + 1


def test_a_step_on_the_cpu_is_refused() -> None:
    with pytest.raises(EngineError, match="CUDA graphs need a CUDA device, and the job is on cpu"):
        jobs.train_step("graphed")


def test_rows_of_unequal_length_run_by_the_program_itself(lane: Recording) -> None:
    spec, batch = started(CASES["sparse"], OPTIMIZERS["adam"])
    engine = graphed_engine(spec, lane)
    for _ in range(4):
        engine.step(batch)
    assert (lane.captures, lane.programs.replayed) == (0, 3)
    assert engine.choice.value == "compiled"
    assert "rows of unequal length are in no CUDA graph" in engine.choice.reason


def test_an_optimizer_that_cannot_be_recorded_is_refused(lane: Recording) -> None:
    step = graphed_step(lane)
    step.spec.optimizer.register_step_pre_hook(lambda *_: None)
    step(batches(1)[0])
    with pytest.raises(EngineError, match=r"no CUDA graph can hold this step: AdamW steps eagerly \(it has hooks"):
        step(batches(1)[0])


def test_a_forward_that_reads_the_device_is_refused(lane: Recording) -> None:
    net = jobs.model()

    def forward(model: nn.Module, batch: Any) -> Tensor:
        loss = F.cross_entropy(model(batch[0]), batch[1])
        return loss * 2 if loss.item() > 100 else loss

    step = with_graphs(TrainStep(net, torch.optim.Adam(net.parameters()), forward, engine="eager"), lane)
    step(batches(1)[0])
    with pytest.raises(EngineError, match="on the host"):
        step(batches(1)[0])


def test_tensors_on_the_host_are_refused() -> None:
    graph = torch.fx.symbolic_trace(nn.Identity())
    part = SimpleNamespace(
        graph=graph, anywhere=(), kinds=[(torch.Size([2]), (1,), torch.float32, torch.device("meta"))]
    )
    spec = SimpleNamespace(device=torch.device("cpu"), optimizer=jobs.train_step("eager").spec.optimizer)
    traced: Any = SimpleNamespace(why_eager=None, parts=[part], spec=spec)
    with pytest.raises(EngineError, match=r"a tensor of shape \[2\] that the step reads is on meta"):
        cudagraph._refuse_unfit(traced)  # pyright: ignore[reportPrivateUsage]


class OnMeta:
    """A step whose parameters are on another device than the count of their optimizer's steps."""

    def __init__(self, lane: Recording, *, is_required: bool) -> None:
        net = nn.Linear(2, 2, device="meta")
        optimizer = torch.optim.Adam(net.parameters())
        self.state = optimizer.state[net.weight]
        self.state.update({"step": torch.tensor(3.0), "exp_avg": torch.zeros(2, 2, device="meta"), "note": 1})
        self.traced = False
        self.spec: Any = SimpleNamespace(optimizer=optimizer, device=torch.device("meta"))
        self.backend, _ = graph_backend(self.spec, lane, is_required=is_required)

    def begin(self) -> None:
        self.backend.begin(SimpleNamespace(begin=lambda *_: setattr(self, "traced", True)), None)  # pyright: ignore[reportArgumentType]


def test_step_counts_are_brought_to_the_device(lane: Recording) -> None:
    step = OnMeta(lane, is_required=True)
    step.begin()
    assert step.traced
    assert step.state["step"].device.type == "meta"
    assert step.state["note"] == 1


def test_step_counts_stay_on_the_host_where_graphs_were_not_asked_for(lane: Recording) -> None:
    """Single steps run by the program itself then, which can count there."""
    step = OnMeta(lane, is_required=False)
    step.begin()
    assert step.traced
    assert step.state["step"].device.type == "cpu"
    traced: Any = SimpleNamespace(why_eager=None, open_dims=(), remark="", spec=step.spec)
    choice = step.backend.explain(traced, walks=False)
    assert choice.value == "compiled"
    assert "make it with capturable=True, or ask for engine 'graphed'" in choice.reason
    assert step.backend.load(SimpleNamespace(load=lambda: "the program", traced=traced)) == "the program"  # pyright: ignore[reportArgumentType]
    assert step.backend.explain(traced, walks=True).value == "compiled"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda loss: loss * 1.01, "cannot run this step: its numbers differ from eager's: the loss is"),
        (lambda loss: loss + 0 * loss.item(), "waits for the device, or copies from or to the host"),
    ],
)
def test_what_a_capture_would_get_wrong_is_refused(
    spoil: Callable[[Tensor], Tensor], message: str, lane: Recording
) -> None:
    lane.programs.spoil = spoil
    step = graphed_step(lane)
    with pytest.raises(EngineError, match=message):
        run(step, batches(3))  # eagerly, then compared: a single difference may be chance


def test_a_step_that_was_refused_stays_refused(lane: Recording) -> None:
    lane.programs.spoil = lambda loss: loss * 1.01
    step = graphed_step(lane)
    run(step, batches(2))
    launches: list[int] = []
    for batch in batches(3):
        with pytest.raises(EngineError, match="cannot run this step: its numbers differ"):
            step(batch)
        launches.append(lane.launches)
    assert len(set(launches)) == 1, "no graph runs after that"


def test_a_batch_that_forward_changes_is_refused(lane: Recording) -> None:
    net = jobs.model()

    def forward(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0].mul_(0.5)), batch[1])

    step = with_graphs(TrainStep(net, torch.optim.Adam(net.parameters()), forward, engine="eager"), lane)
    step(batches(1)[0])
    with pytest.raises(EngineError, match="forward changes its batch in place"):
        step(batches(1)[0])


def test_a_graph_from_before_a_failed_capture_is_captured_anew(lane: Recording) -> None:
    step = graphed_step(lane)
    run(step, batches(4))
    lane.failures += 1  # of another graph of the same device
    captures = lane.captures
    run(step, batches(2))
    assert lane.captures == captures + 1


def test_a_compiler_that_fails_leaves_the_state_as_it_was(lane: Recording) -> None:
    step, eager = graphed_step(lane), jobs.train_step("eager")
    data = batches(6)
    run(step, data[:1])
    run(eager, data[:1])

    def fail(loss: Tensor) -> Tensor:
        raise RuntimeError("no compiler\nis here")

    lane.programs.spoil = fail
    with pytest.raises(EngineError, match=r"cannot be compiled for a CUDA graph: RuntimeError: no compiler$"):
        step(data[1])
    torch.testing.assert_close(everything(step), everything(eager), rtol=0, atol=0)


def test_what_does_not_fit_in_memory_is_refused(lane: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasttrain.step.cudagraph.fits_in_memory", lambda *_: False)
    step = graphed_step(lane)
    step(batches(1)[0])
    with pytest.raises(EngineError, match="no memory for two copies"):
        step(batches(1)[0])
