"""The main job: its figures on real data, its tables of any number of ratings, and that it repeats bit by bit."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import pkgutil
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from fasttrain.data.text import ReviewVectorizer, Vocabulary
from fasttrain.errors import ConfigError, DataError, RunError
from fasttrain.history import History
from fasttrain.loop import Interrupted
from fasttrain.run.checkpoint import pack_tree
from fasttrain.run.config import TrainConfig
from fasttrain.run.folder import RunFolder
from fasttrain.workloads.generate import generate_reviews
from fasttrain.workloads.onehot import ReviewClassifier
from fasttrain.workloads.predict import predict
from fasttrain.workloads.reviews import ReviewsOutcome, influential_words, train_reviews


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    # As the command does: a step on sparse reviews is too small to share.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generated") / "reviews.csv"
    generate_reviews(600, seed=2).table.to_csv(path, index=False)
    return path


def config_of(data: Path, out: Path, **options: object) -> TrainConfig:
    small = TrainConfig(data=data, out=out, device="cpu", cutoff=5, batch_size=32, epochs=6, learning_rate=0.02)
    return replace(small, **options)  # type: ignore[arg-type]


def train(config: TrainConfig) -> ReviewsOutcome:
    return train_reviews(config, progress=False)


# --- real data ---


def real_outcome(data_dir: Path, name: str, out: Path, *, epochs: int, cutoff: int = 25) -> ReviewsOutcome:
    """The defaults on a real table, but for the number of epochs: the bound is passed long before the run ends."""
    path = data_dir / name
    if not path.is_file():
        pytest.skip(f"no real data: {path} does not exist; set FASTTRAIN_DATA")
    return train(TrainConfig(data=path, out=out, device="cpu", epochs=epochs, cutoff=cutoff))


def test_sentences_with_the_default_cutoff(data_dir: Path, tmp_path: Path) -> None:
    outcome = real_outcome(data_dir, "sentences.csv.gz", tmp_path / "run", epochs=16)
    assert outcome.summary["test_accuracy"] >= 95.2
    words = {rating: [word for word, _ in found] for rating, found in outcome.influential_words.items()}
    assert {"delicious", "excellent", "amazing", "perfect"} <= set(words["positive"])
    assert {"worst", "horrible", "terrible", "rude"} <= set(words["negative"])


def test_sentences_with_a_low_cutoff(data_dir: Path, tmp_path: Path) -> None:
    outcome = real_outcome(data_dir, "sentences.csv.gz", tmp_path / "run", epochs=20, cutoff=5)
    assert outcome.summary["test_accuracy"] >= 96.0


def test_long_reviews(data_dir: Path, tmp_path: Path) -> None:
    outcome = real_outcome(data_dir, "reviews_lite.csv.gz", tmp_path / "run", epochs=6)
    assert outcome.summary["test_accuracy"] >= 99.8


# --- the figures of a run ---


def test_test_figures_are_those_of_dense_one_hot_rows(generated: Path, tmp_path: Path) -> None:
    outcome = train(config_of(generated, tmp_path / "run"))
    model = load_file(outcome.path / "model.safetensors")
    vocabularies = json.loads((outcome.path / "vectorizer.json").read_text())
    words = vocabularies["review_vocab"]["token_to_idx"]
    ratings = vocabularies["rating_vocab"]["token_to_idx"]
    table = pd.read_csv(generated)
    test = table[table["split"] == "test"]
    one_hot = torch.zeros(len(test), len(words))
    for row, review in enumerate(test["review"]):
        for token in review.split(" "):
            if token not in ".,!":
                one_hot[row, words.get(token, 0)] = 1
    logits = F.linear(one_hot, model["fc1.weight"], model["fc1.bias"]).squeeze(1)
    targets = torch.tensor([float(ratings[rating]) for rating in test["rating"]])
    loss = F.binary_cross_entropy_with_logits(logits, targets).item()
    accuracy = 100 * ((logits > 0) == targets.bool()).double().mean().item()
    assert outcome.summary["test_loss"] == pytest.approx(loss, rel=1e-5)
    assert outcome.summary["test_accuracy"] == pytest.approx(accuracy, abs=1e-9)


def test_generated_reviews_are_learnt(generated: Path, tmp_path: Path) -> None:
    outcome = train(config_of(generated, tmp_path / "run", epochs=20))
    assert outcome.summary["test_accuracy"] > 70  # of 600 reviews; guessing gives 50


def two_models(generated: Path, tmp_path: Path, **options: object) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    first = train(config_of(generated, tmp_path / "first"))
    second = train(config_of(generated, tmp_path / "second", **options))
    return load_file(first.path / "model.safetensors"), load_file(second.path / "model.safetensors")


def test_two_runs_are_alike_bit_by_bit(generated: Path, tmp_path: Path) -> None:
    first, second = two_models(generated, tmp_path)
    assert all(torch.equal(first[name], second[name]) for name in first)
    histories = [pd.read_csv(tmp_path / name / "history.csv") for name in ("first", "second")]
    for column in ("loss", "accuracy", "lr"):
        assert histories[0][column].tolist() == histories[1][column].tolist()


def test_another_seed_is_another_run(generated: Path, tmp_path: Path) -> None:
    first, second = two_models(generated, tmp_path, seed=7)
    assert not torch.equal(first["fc1.weight"], second["fc1.weight"])


def test_the_random_generator_of_the_process_is_left_alone(generated: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(config_of(generated, tmp_path / "run", epochs=1))
    assert torch.equal(torch.get_rng_state(), before)


# --- tables of other shapes ---

MARKERS = ("awful", "poor", "plain", "nice", "superb")


def graded_table(path: Path, ratings: list[str]) -> Path:
    """Reviews of 7 words; the marker of the rating is among them in nine of ten."""
    draw = random.Random(3)
    rows = []
    for number in range(600):
        grade = number % len(ratings)
        marker = MARKERS[grade] if draw.random() < 0.9 else "unclear"
        words = [draw.choice(("the", "meal", "service", "was", "here", "we")) for _ in range(6)]
        words.insert(draw.randrange(7), marker)
        rows.append((ratings[grade], " ".join(words), draw.choice(("train", "train", "train", "val", "test"))))
    pd.DataFrame(rows, columns=["rating", "review", "split"]).to_csv(path, index=False)
    return path


@pytest.mark.parametrize("ratings", [["1", "2", "3", "4", "5"], ["north", "east", "south", "west"], ["9", "10", "11"]])
def test_more_than_two_ratings_have_an_output_each(ratings: list[str], tmp_path: Path) -> None:
    data = graded_table(tmp_path / "graded.csv", ratings)
    outcome = train(config_of(data, tmp_path / "run", epochs=20))
    assert outcome.summary["test_accuracy"] > 80
    vectorizer = ReviewVectorizer.load(outcome.path / "vectorizer.json")
    is_numbers = ratings[0].isdigit()
    assert list(vectorizer.rating_vocab.token_to_idx) == (ratings if is_numbers else sorted(ratings))
    assert load_file(outcome.path / "model.safetensors")["fc1.weight"].shape[0] == len(ratings)
    for marker, rating in zip(MARKERS, ratings, strict=False):
        assert outcome.influential_words[rating][0][0] == marker


def without(generated: Path, path: Path, split: str) -> Path:
    table = pd.read_csv(generated)
    table[table["split"] != split].to_csv(path, index=False)
    return path


def test_without_val_rows_the_last_epoch_is_tested_and_nothing_stops_early(generated: Path, tmp_path: Path) -> None:
    data = without(generated, tmp_path / "reviews.csv", "val")
    outcome = train(config_of(data, tmp_path / "run", epochs=8, patience=1, learning_rate=0.5))
    assert (outcome.summary["epochs"], outcome.summary["stopped"]) == (8, "epochs")
    assert any("no val rows" in note for note in outcome.notes)
    history = pd.read_csv(outcome.path / "history.csv")
    assert set(history["split"]) == {"train"}


def test_without_test_rows_the_test_figures_are_null(generated: Path, tmp_path: Path) -> None:
    data = without(generated, tmp_path / "reviews.csv", "test")
    outcome = train(config_of(data, tmp_path / "run", epochs=1))
    assert outcome.summary["test_loss"] is None
    assert outcome.summary["test_accuracy"] is None
    assert any("no test rows" in note for note in outcome.notes)


def test_training_stops_when_patience_ends_and_the_best_epoch_is_tested(generated: Path, tmp_path: Path) -> None:
    outcome = train(config_of(generated, tmp_path / "run", epochs=100, patience=3, learning_rate=0.5))
    history = pd.read_csv(outcome.path / "history.csv")
    val = history[history["split"] == "val"].set_index("epoch")["loss"]
    best = outcome.summary["best_epoch"]
    assert outcome.summary["stopped"] == "patience"
    assert best == val.idxmin()
    assert outcome.summary["epochs"] == best + 3
    short = train(config_of(generated, tmp_path / "short", epochs=best, patience=100, learning_rate=0.5))
    assert short.summary["test_loss"] == outcome.summary["test_loss"]


# --- ending early ---


def test_an_interrupt_ends_after_the_step_and_keeps_the_finished_epochs(generated: Path, tmp_path: Path) -> None:
    steps = 0

    def check() -> None:
        nonlocal steps
        steps += 1
        if steps == 30:  # 420 train rows make 13 steps an epoch
            raise Interrupted

    config = config_of(generated, tmp_path / "run", engine="eager")
    outcome = train_reviews(config, progress=False, check_interrupt=check)
    assert steps == 30
    assert (outcome.summary["stopped"], outcome.summary["epochs"]) == ("interrupted", 2)
    assert any("--resume" in note for note in outcome.notes)
    resumed = train_reviews(config, resume=tmp_path / "run", progress=False)  # without the steps of the third epoch
    assert_alike(resumed, train(replace(config, out=tmp_path / "straight")))


def test_a_table_that_changed_is_not_gone_on_with(generated: Path, tmp_path: Path) -> None:
    data = tmp_path / "reviews.csv"
    data.write_bytes(generated.read_bytes())
    config = config_of(data, tmp_path / "run", epochs=1)
    train(config)
    data.write_bytes(generated.read_bytes().replace(b"great", b"grand"))
    with pytest.raises(DataError, match="not the one that the run was trained on"):
        train_reviews(replace(config, epochs=2), resume=tmp_path / "run", progress=False)


def test_a_batch_larger_than_the_train_split_is_refused(generated: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--batch-size 421 .* at most 420"):
        train(config_of(generated, tmp_path / "run", batch_size=421))
    assert not (tmp_path / "run").exists()
    train(config_of(generated, tmp_path / "run", batch_size=420, epochs=1))


def assert_alike(one: ReviewsOutcome, other: ReviewsOutcome) -> None:
    """Two runs have the same model, bit by bit, and the same best epoch."""
    models = [load_file(each.path / "model.safetensors") for each in (one, other)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    for name in ("epochs", "best_epoch"):
        assert one.summary[name] == other.summary[name]


# --- what a failure leaves ---


def failing(
    error: type[BaseException], *, after: int = 0, call: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """A function that calls another one `after` times and then fails."""
    calls = 0

    def replacement(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise error("on purpose")
        assert call is not None
        return call(*arguments, **options)

    return replacement


BEFORE = {
    "reading": ("fasttrain.workloads.reviews._load", 0),
    "the job": ("fasttrain.workloads.reviews._Job.__init__", 0),
    "the threads": ("fasttrain.workloads.reviews._Job.settle_threads", 0),
    "the first epoch": ("fasttrain.loop.FastLoop.train", 0),
    "the first validation": ("fasttrain.loop.FastLoop.evaluate", 0),
    "the first checkpoint": ("fasttrain.run.folder.RunFolder.write_checkpoint", 0),
}
AFTER = {
    "the second epoch": ("fasttrain.loop.FastLoop.train", 1),
    "the second validation": ("fasttrain.loop.FastLoop.evaluate", 1),
    "the history": ("fasttrain.run.folder.RunFolder.append_history", 1),
    "the last checkpoint": ("fasttrain.run.folder.RunFolder.write_checkpoint", 1),
    "the model": ("fasttrain.run.folder.RunFolder.write_model", 0),
    "the test": ("fasttrain.workloads.reviews._Job.test", 0),
    "the summary": ("fasttrain.workloads.reviews._summary", 0),
    "the summary's file": ("fasttrain.run.folder.RunFolder.write_json", 0),
    "the words": ("fasttrain.workloads.reviews.influential_words", 0),
    "the report": ("fasttrain.workloads.reviews.render_report", 0),
    "the report's file": ("fasttrain.run.folder.RunFolder.write_text", 1),  # the first is the summary's
}


def fail_at(stage: tuple[str, int], error: type[BaseException], patch: pytest.MonkeyPatch) -> None:
    target, after = stage
    patch.setattr(target, failing(error, after=after, call=pkgutil.resolve_name(target)))


@pytest.mark.parametrize("stage", BEFORE)
def test_a_failure_before_anything_is_reached_leaves_no_folder(
    stage: str, generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(BEFORE[stage], MemoryError, monkeypatch)
    with pytest.raises(MemoryError, match="on purpose"):
        train(config_of(generated, tmp_path / "new" / "run", epochs=2, engine="eager"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", AFTER)
def test_a_failure_later_keeps_what_was_reached(
    stage: str, generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(generated, tmp_path / "run", epochs=3, engine="eager")
    error = KeyboardInterrupt if stage == "the second epoch" else RuntimeError
    with monkeypatch.context() as patch:
        fail_at(AFTER[stage], error, patch)
        with pytest.raises(error, match="on purpose") as raised:
            train(config)
    assert raised.value.__notes__ == [f"what the run has reached is kept; go on with --resume {tmp_path / 'run'}"]
    outcome = train_reviews(config, resume=tmp_path / "run", progress=False)
    assert_alike(outcome, train(replace(config, out=tmp_path / "straight")))


def test_a_loss_that_is_not_finite_is_never_the_best(generated: Path, tmp_path: Path) -> None:
    outcome = train(config_of(generated, tmp_path / "run", epochs=3, learning_rate=1e38, engine="eager"))
    history = pd.read_csv(outcome.path / "history.csv")
    losses = history[history["split"] == "val"].set_index("epoch")["loss"]
    assert not np.isfinite(losses).all()
    best = outcome.summary["best_epoch"]
    assert best is None or math.isfinite(losses[best])
    with pytest.raises(RunError, match="weights that are not finite numbers"):
        predict(outcome.path, ["good"])


# --- checkpoints ---


def test_packing_is_done_when_due_and_does_not_grow_with_the_epochs(
    generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def pack(tree: Any) -> bytes:
        packed = pack_tree(tree)
        sizes.append(len(packed))
        return packed

    monkeypatch.setattr("fasttrain.run.folder.pack_tree", pack)
    monkeypatch.setattr("fasttrain.workloads.reviews.CHECKPOINT_S", math.inf)
    outcome = train(config_of(generated, tmp_path / "run", epochs=40, patience=100, engine="eager"))
    assert outcome.summary["epochs"] == 40
    assert len(sizes) == 2
    assert sizes[1] < sizes[0] + 100  # numbers have more digits later


@pytest.fixture(scope="module")
def checkpointed(generated: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path]:
    """A run of 4 epochs with the checkpoints of the last two."""
    config = config_of(generated, tmp_path_factory.mktemp("checkpointed") / "run", epochs=4, engine="eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fasttrain.workloads.reviews.CHECKPOINT_S", 0.0)
        return config, train(config).path


def read_for_resume(folder: RunFolder) -> None:
    folder.read_config()
    folder.read_checkpoint()


def told_by(read: Callable[[RunFolder], object], run: Path) -> str:
    """What a user learns about the files of a run: the error, or the notes."""
    folder = RunFolder.open(run)
    try:
        read(folder)
    except RunError as error:
        return str(error)
    return "\n".join(folder.notes)


def test_a_flipped_bit_in_any_file_is_noticed(checkpointed: tuple[TrainConfig, Path]) -> None:
    _, run = checkpointed
    files = sorted(run.iterdir())
    assert len(files) == 11

    assert told_by(read_for_resume, run) == told_by(RunFolder.check_model, run) == ""
    draw = random.Random(5)
    silent: list[str] = []
    for number in range(220):
        path = files[number % len(files)]
        content = path.read_bytes()
        position, bit = draw.randrange(len(content)), draw.randrange(8)
        damaged = bytearray(content)
        damaged[position] ^= 1 << bit
        path.write_bytes(damaged)
        for read in (read_for_resume, RunFolder.check_model):
            if path.name not in told_by(read, run):
                silent.append(f"{path.name}, byte {position}, bit {bit}, {read}")
        path.write_bytes(content)
    assert silent == []


def test_a_run_that_is_killed_between_any_two_writes_has_no_damaged_file(
    checkpointed: tuple[TrainConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = checkpointed
    monkeypatch.setattr("fasttrain.workloads.reviews.CHECKPOINT_S", 0.0)
    rename = os.replace
    for number in range(100):
        killed = tmp_path / str(number)
        shutil.copytree(run, killed)
        with monkeypatch.context() as patch:
            patch.setattr("os.replace", failing(KeyboardInterrupt, after=number, call=rename))
            with contextlib.suppress(KeyboardInterrupt):
                train_reviews(replace(config, epochs=6), resume=killed, progress=False)
                break
        assert told_by(read_for_resume, killed) == told_by(RunFolder.check_model, killed) == ""
    assert number > 15  # as many files were written


def test_files_of_another_run_are_noticed(checkpointed: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    config, run = checkpointed
    other = train(replace(config, out=tmp_path / "other", cutoff=6, seed=3)).path
    for name in ("vectorizer.json", "model.safetensors", "config.json", "history.csv"):
        mixed = tmp_path / f"mixed-{name}"
        shutil.copytree(run, mixed)
        shutil.copy(other / name, mixed / name)
        assert name in told_by(RunFolder.check_model, mixed)


@pytest.mark.parametrize("name", ["checkpoint-4.safetensors", "checkpoint-4.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    name: str, checkpointed: tuple[TrainConfig, Path], tmp_path: Path
) -> None:
    config, run = checkpointed
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    content = bytearray((damaged / name).read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / name).write_bytes(content)
    outcome = train_reviews(replace(config, epochs=6), resume=damaged, progress=False)
    assert any(note.startswith(f"{name} is damaged") for note in outcome.notes)
    assert "The run goes on from an earlier checkpoint, of epoch 3." in outcome.notes
    assert_alike(outcome, train(replace(config, out=tmp_path / "straight", epochs=6)))
    assert list(pd.read_csv(outcome.path / "history.csv")["epoch"]) == [each // 2 for each in range(2, 14)]
    assert told_by(RunFolder.check_model, outcome.path) == ""


def test_rows_after_the_last_checkpoint_are_cut(checkpointed: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    config, run = checkpointed
    killed = tmp_path / "killed"
    shutil.copytree(run, killed)
    with (killed / "history.csv").open("a") as file:
        file.write("5,train,0.25,50.0,0.02,416,0.1,4160.0\n5,val,0.2")
    outcome = train_reviews(config, resume=killed, progress=False)
    assert (killed / "history.csv").read_bytes() == (run / "history.csv").read_bytes()
    assert outcome.summary["epochs"] == 4


def test_a_checkpoint_without_a_key_is_one_error(checkpointed: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    config, run = checkpointed
    for key in ("model", "history", "best_weights", "data_sha256"):
        broken = tmp_path / key
        shutil.copytree(run, broken)
        folder = RunFolder.open(broken)
        stored = folder.read_checkpoint()
        assert stored is not None
        del stored.tree[key]
        folder.write_history(History(rows=stored.rows))
        folder.write_checkpoint(stored.tree, epoch=4)
        with pytest.raises(
            RunError, match=f"checkpoint-4.safetensors is not a checkpoint of this run: KeyError.*{key}"
        ):
            train_reviews(config, resume=broken, progress=False)


def test_a_read_only_folder_is_one_error(
    checkpointed: tuple[TrainConfig, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = checkpointed

    def refuse(path: Path, *_: object, **__: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for method in ("write_bytes", "unlink"):
        monkeypatch.setattr(Path, method, refuse)
    with pytest.raises(RunError, match="cannot be written: Read-only file system"):
        train_reviews(replace(config, epochs=5), resume=run, progress=False)
    monkeypatch.undo()
    assert told_by(RunFolder.check_model, run) == ""


# --- influential words ---


def model_of(weight: list[list[float]]) -> ReviewClassifier:
    model = ReviewClassifier(len(weight[0]), len(weight))
    model.load_state_dict({"fc1.weight": torch.tensor(weight), "fc1.bias": torch.zeros(len(weight))})
    return model


def vectorizer_of(words: list[str], ratings: list[str]) -> ReviewVectorizer:
    def vocabulary(names: list[str], *, add_unk: bool) -> Vocabulary:
        return Vocabulary(token_to_idx={name: index for index, name in enumerate(names)}, add_unk=add_unk)

    return ReviewVectorizer(vocabulary(["<UNK>", *words], add_unk=True), vocabulary(ratings, add_unk=False))


def test_one_output_speaks_for_both_of_two_ratings() -> None:
    found = influential_words(model_of([[0.0, 3.0, -2.0, 1.0]]), vectorizer_of(["good", "bad", "fine"], ["-", "+"]))
    assert [word for word, _ in found["+"]] == ["good", "fine", "<UNK>", "bad"]
    assert found["-"] == [("bad", 2.0), ("<UNK>", 0.0), ("fine", -1.0), ("good", -3.0)]


def test_each_of_more_outputs_speaks_for_its_own_rating() -> None:
    weight = [[0.0, 1.0, 2.0], [0.0, 5.0, -1.0], [3.0, 0.0, 0.0]]
    found = influential_words(model_of(weight), vectorizer_of(["a", "b"], ["1", "2", "3"]))
    assert {rating: words[0] for rating, words in found.items()} == {
        "1": ("b", 2.0),
        "2": ("a", 5.0),
        "3": ("<UNK>", 3.0),
    }


def test_twenty_words_are_enough() -> None:
    weight = [[float(index) for index in range(51)]]
    found = influential_words(model_of(weight), vectorizer_of([f"w{index}" for index in range(50)], ["-", "+"]))
    assert [word for word, _ in found["+"]] == [f"w{index}" for index in range(49, 29, -1)]
