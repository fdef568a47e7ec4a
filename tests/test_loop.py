"""FastLoop against the textbook's loop: the same numbers, and the user's objects left as they are found."""

import copy
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fasttrain import ConfigError, DataError, EngineError, FastLoop, resident
from fasttrain.data.ragged import Ragged
from fasttrain.data.resident import Span
from fasttrain.data.table import read_reviews
from fasttrain.data.text import encode_reviews
from fasttrain.device import Choice
from fasttrain.loop import FitState, Interrupted
from fasttrain.metrics import RunningMetrics
from fasttrain.reference import TextbookClassifier, TextbookDataset, evaluate_epoch, textbook_loss, train_epoch
from fasttrain.step.eager import EagerEngine
from fasttrain.workloads.generate import generate_reviews
from fasttrain.workloads.onehot import ReviewClassifier, review_forward

BATCH = 32
EPOCHS = 3


def reviews(num_ratings: int) -> pd.DataFrame:
    table = generate_reviews(1_000, seed=3).table
    if num_ratings > 2:
        table["rating"] = [str(1 + i % num_ratings) for i in range(len(table))]
    return table


class Textbook:
    """A textbook training whose every batch's running figures are kept."""

    def __init__(self, table: pd.DataFrame, orders: list[list[int]]) -> None:
        self.dataset = TextbookDataset.from_dataframe(table, cutoff=5)
        torch.manual_seed(0)
        self.model = TextbookClassifier(self.dataset.num_features, self.dataset.num_outputs)
        self.weights = copy.deepcopy(self.model.state_dict())
        self.orders = orders

    def train(self) -> list[tuple[float, float]]:
        optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        seen: list[tuple[float, float]] = []
        for order in self.orders:
            loader = self.dataset.batches(BATCH, shuffle=False, drop_last=True, order=order)
            loss = textbook_loss(self.dataset.num_outputs)
            train_epoch(self.model, loader, loss, optimizer, on_batch=lambda *pair: seen.append(pair))
        return seen


def textbook_forward(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    logits, targets = model(x_in=batch["x_data"]), batch["y_target"]
    if logits.dim() == 1:
        return F.binary_cross_entropy_with_logits(logits, targets.float()), logits, targets.float()
    return F.cross_entropy(logits, targets), logits, targets


def resident_reviews(table: pd.DataFrame) -> tuple[Any, int]:
    data = encode_reviews(read_reviews(table), cutoff=5)
    split = data.splits["train"]
    labels = torch.from_numpy(split.labels)
    columns = {
        "x_data": Ragged(torch.from_numpy(split.tokens.ids.astype("int32")), torch.from_numpy(split.tokens.offsets)),
        "y_target": labels.float() if len(data.vectorizer.rating_vocab.token_to_idx) == 2 else labels,
    }
    return resident(columns, batch_size=BATCH, device="cpu", seed=5), len(data.vectorizer.review_vocab.token_to_idx)


@pytest.mark.parametrize("num_ratings", [2, 4])
@pytest.mark.parametrize("path", ["resident", "streamed", "textbook dataset"])
@pytest.mark.parametrize("engine", ["eager"])
def test_parity_with_the_textbook(num_ratings: int, path: str, engine: str) -> None:
    """Equal weights, equal order: running loss within 1e-5 at every batch of three epochs, equal accuracy."""
    table = reviews(num_ratings)
    batches, num_features = resident_reviews(table)
    orders = [batches.order(epoch).tolist() for epoch in range(EPOCHS)]
    textbook = Textbook(table, orders)
    wanted = textbook.train()
    assert num_features == textbook.dataset.num_features

    model: nn.Module = ReviewClassifier(num_features, textbook.dataset.num_outputs)
    forward: Callable[..., Any] = review_forward
    if path != "resident":
        model, forward = TextbookClassifier(num_features, textbook.dataset.num_outputs), textbook_forward
    model.load_state_dict(textbook.weights)
    loop = FastLoop(model, torch.optim.Adam(model.parameters(), lr=0.01), forward, engine=engine)
    got: list[tuple[float, float]] = []

    def watch(_batches: int, _samples: int, _seconds: float, metrics: RunningMetrics) -> None:
        readout = metrics.compute()
        assert readout.loss is not None
        assert readout.accuracy is not None
        got.append((readout.loss, readout.accuracy))

    for order in orders:
        source: Any = batches
        if path == "textbook dataset":
            source = textbook.dataset.batches(BATCH, shuffle=False, drop_last=True, order=order)
        elif path == "streamed":
            source = iter(list(textbook.dataset.batches(BATCH, shuffle=False, drop_last=True, order=order)))
        loop.train(source, watch=watch)
    assert len(got) == len(wanted) == EPOCHS * (700 // BATCH)
    for (loss, accuracy), (wanted_loss, wanted_accuracy) in zip(got, wanted, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=1e-5)
        assert accuracy == pytest.approx(wanted_accuracy, rel=1e-9)
    for name, value in textbook.model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def regression() -> tuple[nn.Module, TensorDataset]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))
    return model, TensorDataset(torch.randn(50, 4), torch.randn(50, 1))


def classification() -> tuple[nn.Module, TensorDataset]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)), TensorDataset(
        torch.randn(50, 4), torch.randint(0, 3, (50,))
    )


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def test_evaluation_counts_every_sample_once() -> None:
    model, data = classification()
    loop = FastLoop(model, sgd(model), loss=nn.CrossEntropyLoss())
    result = loop.evaluate(DataLoader(data, batch_size=16))
    wanted = evaluate_epoch(model, [data.tensors], nn.CrossEntropyLoss())
    assert result.loss == pytest.approx(wanted.loss, rel=1e-6)
    assert result.accuracy == pytest.approx(wanted.accuracy)
    assert (result.batches, result.samples) == (4, 50)


def test_training_averages_batches_as_the_book_does() -> None:
    model, data = classification()
    reference = copy.deepcopy(model)
    batches = DataLoader(data, batch_size=16)  # the last batch is short, and counts as much as any
    result = FastLoop(model, sgd(model), loss=nn.CrossEntropyLoss()).train(batches)
    wanted = train_epoch(reference, batches, nn.CrossEntropyLoss(), sgd(reference))
    assert result.loss == pytest.approx(wanted.loss, rel=1e-6)
    assert result.accuracy == pytest.approx(wanted.accuracy)
    assert result.samples_per_s == pytest.approx(result.samples / result.seconds)
    assert result.engine == "eager"


def test_modes_and_gradients_are_left_as_they_are_found() -> None:
    model, data = regression()
    model[1].eval()  # pyright: ignore
    before = [module.training for module in model.modules()]
    loop = FastLoop(model, sgd(model), loss=nn.MSELoss())
    seen: list[bool] = []
    model[3].register_forward_pre_hook(lambda module, _: seen.append(module.training))  # pyright: ignore
    loop.train(DataLoader(data, batch_size=25))
    loop.evaluate(DataLoader(data, batch_size=25))
    assert seen == [True, True, False, False]
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_error_in_the_middle_leaves_modes_and_gradients_too() -> None:
    model, data = regression()
    model.eval()

    def watch(batches: int, *_: object) -> None:
        raise RuntimeError(f"at {batches}")

    loop = FastLoop(model, sgd(model), loss=nn.MSELoss())
    with pytest.raises(RuntimeError, match="at 1"):
        loop.train(DataLoader(data, batch_size=5), watch=watch)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_param_group_option_changes() -> None:
    model, data = regression()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    before = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    FastLoop(model, optimizer, loss=nn.MSELoss()).train(DataLoader(data, batch_size=25))
    after = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    assert after == before


@pytest.mark.parametrize("batches", [7, 8, 9])
def test_accumulated_batches_step_as_in_the_usual_loop(batches: int) -> None:
    """(loss / 4).backward(), a step at each fourth batch and at the last: a short group is divided by 4 too."""
    model, data = classification()
    reference = copy.deepcopy(model)
    x, y = (tensor[: 5 * batches] for tensor in data.tensors)
    loop = FastLoop(model, sgd(model), loss=nn.CrossEntropyLoss(), accumulate=4)
    loop.train(list(zip(x.split(5), y.split(5), strict=True)))
    optimizer = sgd(reference)
    for number, (xs, ys) in enumerate(zip(x.split(5), y.split(5), strict=True), start=1):
        (F.cross_entropy(reference(xs), ys) / 4).backward()
        if number % 4 == 0 or number == batches:
            optimizer.step()
            optimizer.zero_grad()
    for got, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    "options", [{"clip_norm": 0.05}, {"clip_value": 0.01}, {"clip_value": 0.01, "clip_norm": 0.02}]
)
def test_clipping(options: dict[str, float]) -> None:
    model, data = classification()
    reference = copy.deepcopy(model)
    FastLoop(model, sgd(model), loss=nn.CrossEntropyLoss(), **options).train([data.tensors])  # pyright: ignore
    F.cross_entropy(reference(data.tensors[0]), data.tensors[1]).backward()
    if "clip_value" in options:
        nn.utils.clip_grad_value_(reference.parameters(), options["clip_value"])
    if "clip_norm" in options:
        nn.utils.clip_grad_norm_(reference.parameters(), options["clip_norm"])
    sgd(reference).step()
    for got, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_norm_is_that_of_the_models_parameters(accumulate: int) -> None:
    """Also of those that the optimizer does not have; a weight of the loss alone is trained and not clipped."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(self.scale * predictions, targets)

    def made() -> tuple[nn.Module, Scaled, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model, loss = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), Scaled()
        return model, loss, torch.optim.SGD([*model[2].parameters(), loss.scale], lr=0.5)

    x, y = classification()[1].tensors
    x = torch.randn(len(y), 6, generator=torch.Generator().manual_seed(1))
    batches = list(zip(x.split(20), y.split(20), strict=True))
    model, loss, optimizer = made()
    FastLoop(model, optimizer, loss=loss, clip_norm=0.05, accumulate=accumulate, engine="eager").train(batches)
    usual, usual_loss, optimizer = made()
    for number, (xs, ys) in enumerate(batches, start=1):
        (usual_loss(usual(xs), ys) / accumulate).backward()
        if number % accumulate == 0 or number == len(batches):
            nn.utils.clip_grad_norm_(usual.parameters(), 0.05)
            optimizer.step()
            usual.zero_grad()
            optimizer.zero_grad()
    torch.testing.assert_close(list(model.parameters()), list(usual.parameters()))
    torch.testing.assert_close(loss.scale, usual_loss.scale)
    assert all(parameter.grad is None for parameter in (*model.parameters(), loss.scale))


@pytest.mark.parametrize("num_rows", [10, 64, 100])
def test_evaluation_uses_every_row_of_resident_data_once(num_rows: int) -> None:
    x, y = torch.randn(num_rows, 4), torch.randn(num_rows, 1)
    model, seen = nn.Linear(4, 1), []

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if not model.training:
            seen.append(batch[0])
        return F.mse_loss(model(batch[0]), batch[1])

    batches, again = (resident(x, y, batch_size=8, device="cpu", seed=3) for _ in range(2))
    loop = FastLoop(model, sgd(model), forward, engine="eager")
    result = loop.evaluate(batches)
    assert torch.equal(torch.cat(seen), x)
    assert result.samples == num_rows
    assert result.loss == pytest.approx(F.mse_loss(model(x), y).item(), rel=1e-6)
    seen.clear()
    loop.fit(batches, batches, epochs=2, progress=False)
    assert torch.equal(torch.cat(seen), torch.cat([x, x]))
    assert batches.epoch == 2
    assert all(torch.equal(one[0], other[0]) for one, other in zip(batches, _third(again), strict=True))


def _third(batches: Any) -> Any:
    batches.set_epoch(2)
    return batches


def test_an_empty_batch_counts_for_nothing_in_evaluation() -> None:
    model, data = classification()
    x, y = data.tensors
    loop = FastLoop(model, sgd(model), loss=nn.CrossEntropyLoss(), engine="eager")
    with_empty = loop.evaluate([(x[:0], y[:0]), (x, y), (x[:0], y[:0])])
    alone = loop.evaluate([(x, y)])
    assert (with_empty.loss, with_empty.accuracy) == (alone.loss, alone.accuracy)
    assert alone.accuracy is not None
    with pytest.raises(DataError, match="no sample in any"):
        loop.evaluate([(x[:0], y[:0])])


class MacroF1:
    """From the counts of an epoch."""

    def __init__(self, num_classes: int = 2) -> None:
        self.counts = torch.zeros(num_classes, num_classes)

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        assert not predictions.requires_grad
        self.counts.index_put_((targets, predictions.argmax(1)), torch.ones(len(targets)), accumulate=True)

    def compute(self) -> Tensor:
        hits = self.counts.diagonal()
        return (2 * hits / (self.counts.sum(0) + self.counts.sum(1))).mean()

    def reset(self) -> None:
        self.counts.zero_()


def test_a_metric_of_the_epoch_is_computed_from_all_batches() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(60, 4), torch.randint(0, 2, (60,))
    model, f1 = nn.Linear(4, 2), MacroF1()
    loop = FastLoop(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        loss=nn.CrossEntropyLoss(),
        engine="eager",
        metrics={"f1": f1, "loss again": lambda loss, _predictions, _targets: loss},
    )
    batches = list(zip(x.split(7), y.split(7), strict=True))
    wanted = MacroF1()
    wanted.update(model(x).detach(), y)
    for _ in range(2):  # a new epoch starts anew
        for result in (loop.train(batches), loop.evaluate(batches)):
            assert result.metrics["f1"] == pytest.approx(wanted.compute().item())
            assert result.metrics["loss again"] == pytest.approx(result.loss)
            assert list(result.metrics) == ["f1", "loss again"]
    assert f1.compute() == wanted.compute()


def test_a_metric_of_the_epoch_is_refused_where_it_cannot_be_one() -> None:
    model, data = classification()
    for metrics, message in (({"f1": 3}, "metrics\\['f1'\\] must be a function"),):
        with pytest.raises(ConfigError, match=message):
            FastLoop(model, sgd(model), loss=nn.CrossEntropyLoss(), metrics=metrics)  # pyright: ignore
    loop = FastLoop(
        model, sgd(model), lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), metrics={"f1": MacroF1()}
    )
    with pytest.raises(ConfigError, match="forward returned a loss alone"):
        loop.train([data.tensors])


def test_compiled_steps_refuse_a_metric_of_the_epoch() -> None:
    model, data = classification()
    loop = FastLoop(model, sgd(model), loss=nn.CrossEntropyLoss(), engine="compiled", metrics={"f1": MacroF1(3)})
    with pytest.raises(EngineError, match="'f1' is computed from the whole epoch"):
        loop.train(DataLoader(data, batch_size=16))


def test_an_optimizer_of_another_model_is_refused() -> None:
    model, _ = classification()
    other = copy.deepcopy(model)
    with pytest.raises(ConfigError, match="none of the optimizer"):
        FastLoop(model, sgd(other), loss=nn.CrossEntropyLoss())
    image = nn.Parameter(torch.zeros(3, 4))
    FastLoop(model, torch.optim.SGD([image], lr=0.1), lambda model, _: model(image).sum())  # forward names it
    FastLoop(model, sgd(other), lambda model, batch: model(other(batch[0])).sum())


def test_user_metrics() -> None:
    model, data = classification()

    def top2(_loss: Tensor, predictions: Tensor | None, targets: Tensor | None) -> Tensor:
        assert predictions is not None
        assert targets is not None
        return predictions.topk(2, dim=1).indices.eq(targets[:, None]).any(1).double().mean()

    loop = FastLoop(model, sgd(model), loss=nn.CrossEntropyLoss(), metrics={"top2": top2})
    result = loop.evaluate(DataLoader(data, batch_size=16))
    wanted = top2(torch.tensor(0.0), model(data.tensors[0]), data.tensors[1])
    assert result.metrics["top2"] == pytest.approx(wanted.item())


@pytest.mark.parametrize("data", [[], iter(())])
def test_no_batch_is_an_error(data: Any) -> None:
    model, _ = classification()
    loop = FastLoop(model, sgd(model), loss=nn.CrossEntropyLoss())
    with pytest.raises(DataError, match="there was no batch"):
        loop.train(data)
    with pytest.raises(DataError, match="there was no batch"):
        loop.evaluate([])


def test_fit_keeps_the_best_weights_and_stops_in_time() -> None:
    model, data = classification()
    losses = iter([1.0, 0.5, 0.7, 0.6, 0.8, 0.1])
    loop = FastLoop(model, sgd(model), loss=nn.CrossEntropyLoss())
    kept: list[dict[str, Tensor]] = []

    def scripted(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).sum() * 0 + next(losses)

    evaluation = FastLoop(model, sgd(model), scripted)
    loop.evaluate = evaluation.evaluate  # pyright: ignore
    history = loop.fit(
        DataLoader(data, batch_size=25),
        [data.tensors],
        epochs=10,
        patience=3,
        progress=False,
        on_epoch=lambda _: kept.append({k: v.clone() for k, v in model.state_dict().items()}),
    )
    assert (history.best_epoch, history.epochs, history.stopped) == (2, 5, "patience")
    assert history.best_loss == pytest.approx(0.5)
    for name, value in model.state_dict().items():
        assert torch.equal(value, kept[1][name])
        assert not torch.equal(kept[1][name], kept[4][name])
    frame = history.to_frame()
    assert list(frame.columns) == ["epoch", "split", "loss", "accuracy", "lr", "samples", "seconds", "samples_per_s"]
    assert frame["split"].tolist() == ["train", "val"] * 5


def test_fit_steps_schedulers() -> None:
    model, data = classification()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
    loop = FastLoop(model, optimizer, loss=nn.CrossEntropyLoss())
    history = loop.fit([data.tensors], epochs=4, scheduler=scheduler, progress=False)
    assert [row.lr for row in history.rows] == pytest.approx([0.05, 0.05, 0.005, 0.005])
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=10.0)
    history = loop.fit([data.tensors], [data.tensors], epochs=3, scheduler=plateau, progress=False)
    assert history.rows[-1].lr < history.rows[0].lr


def interruptible() -> tuple[FastLoop, Any]:
    model, data = classification()
    return FastLoop(model, sgd(model), loss=nn.CrossEntropyLoss()), resident(*data.tensors, batch_size=10, device="cpu")


def test_fit_ends_cleanly_after_the_step_that_is_interrupted() -> None:
    loop, batches = interruptible()
    steps = 0

    def watch(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == 12:
            raise Interrupted

    history = loop.fit(list(batches), epochs=4, progress=False, watch=watch)  # one step a call
    assert (history.stopped, history.epochs, steps) == ("interrupted", 2, 12)


def test_fit_goes_on_from_a_state() -> None:
    straight, batches = interruptible()
    wanted = straight.fit(batches, epochs=4, progress=False)
    loop, batches = interruptible()
    state = FitState()
    loop.fit(batches, epochs=2, progress=False, state=state)
    history = loop.fit(batches, epochs=4, progress=False, state=state)
    assert history.stopped == "epochs"
    assert [row.loss for row in history.rows] == [row.loss for row in wanted.rows]


class Spans(EagerEngine):
    """Runs four steps in one call, where the batches allow it."""

    def __init__(self, loop: FastLoop) -> None:
        super().__init__(loop.step.spec, Choice("eager", "asked for"))
        self.span = 4
        self.calls: list[int] = []

    def steps(self, span: Span) -> Tensor:
        self.calls.append(span.steps)
        return super().steps(span)


def in_spans() -> tuple[FastLoop, Spans, Any]:
    """Eleven batches an epoch: spans of four, four and two, and a short batch."""
    model, data = classification()
    loop = FastLoop(model, sgd(model), loss=nn.CrossEntropyLoss())
    engine = loop.step._engine = Spans(loop)  # pyright: ignore[reportPrivateUsage]
    columns = [column[:43] for column in data.tensors]
    return loop, engine, resident(*columns, batch_size=4, device="cpu", drop_last=False)


def test_batches_and_samples_of_calls_of_several_steps_are_counted() -> None:
    loop, engine, batches = in_spans()
    seen: list[tuple[int, int]] = []
    result = loop.train(batches, watch=lambda batches, samples, *_: seen.append((batches, samples)))
    assert seen == [(4, 16), (8, 32), (10, 40), (11, 43)]
    assert (result.batches, result.samples) == (11, 43)
    assert engine.calls == [4, 4, 2]
    loop, engine, batches = in_spans()
    engine.span = 0
    wanted = loop.train(batches)
    assert (wanted.batches, wanted.samples) == (11, 43)
    assert (result.loss, result.accuracy) == (wanted.loss, wanted.accuracy)


def test_an_interruption_ends_the_epoch_after_the_call_that_is_watched() -> None:
    loop, engine, batches = in_spans()

    def watch(batches: int, *_: object) -> None:
        if batches >= 5:
            raise Interrupted

    before = [parameter.clone() for parameter in loop.model.parameters()]
    history = loop.fit(batches, epochs=3, progress=False, watch=watch)
    assert (history.stopped, history.epochs, engine.calls) == ("interrupted", 0, [4, 4])
    assert not any(map(torch.equal, before, loop.model.parameters()))


def test_batches_that_are_not_resident_are_never_run_several_at_a_time() -> None:
    loop, engine, batches = in_spans()
    assert loop.train(list(batches)).batches == 11
    assert engine.calls == []


@pytest.mark.parametrize("options", [{"epochs": 0}, {"epochs": 1, "patience": 0}, {"epochs": 1, "patience": 3}])
def test_fit_refuses(options: dict[str, Any]) -> None:
    model, data = classification()
    loop = FastLoop(model, sgd(model), loss=nn.CrossEntropyLoss())
    with pytest.raises(ConfigError, match="use 1 or more"):
        loop.fit([data.tensors], progress=False, **options)


def test_fit_refuses_a_plateau_of_what_is_to_rise() -> None:
    model, data = classification()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max")
    with pytest.raises(ConfigError, match="use mode='min'"):
        FastLoop(model, optimizer, loss=nn.CrossEntropyLoss()).fit([data.tensors], epochs=1, scheduler=scheduler)


def test_state_dicts_are_right_at_any_moment() -> None:
    model, data = classification()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loop = FastLoop(model, optimizer, loss=nn.CrossEntropyLoss())
    tensors = {name: value.data_ptr() for name, value in model.state_dict().items()}
    loop.train([data.tensors] * 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    loop.train([data.tensors] * 2)
    after = copy.deepcopy(model.state_dict())
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    loop.train([data.tensors] * 2)
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == tensors
    for name, value in model.state_dict().items():
        assert torch.equal(value, after[name])
