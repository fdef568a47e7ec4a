"""The main job: the review classifier of the textbook, from a table to a run on disk."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fasttrain.data.cache import load_reviews
from fasttrain.data.ragged import Ragged
from fasttrain.data.resident import ResidentBatches, resident
from fasttrain.data.text import EncodedReviews, EncodedSplit, ReviewVectorizer
from fasttrain.device import Choice, choose_precision, device_name, free_bytes, resolve_device, versions
from fasttrain.errors import ConfigError, DataError, RunError
from fasttrain.history import EpochResult, EpochRow, History
from fasttrain.loop import FastLoop, FitState
from fasttrain.metrics import RunningMetrics
from fasttrain.pages.report import RunReport, render_report
from fasttrain.run.checkpoint import copy_tree
from fasttrain.run.config import TrainConfig
from fasttrain.run.folder import RunFolder, StoredCheckpoint
from fasttrain.step.timing import ThreadChoice, choose_threads
from fasttrain.workloads.common import seeded
from fasttrain.workloads.generate import generate_reviews
from fasttrain.workloads.onehot import ReviewClassifier, review_forward

__all__ = ["ReviewsOutcome", "influential_words", "train_reviews", "warm_reviews"]

EVALUATION_BATCH = 1024
"""Least rows in a batch of evaluation: every sample counts once, so its size changes no figure, only the speed."""

CHECKPOINT_S = 10.0
"""Least seconds between two checkpoints on disk. The first one is written after the first epoch."""

RESIDENT_SHARE = 0.5
"""Most of a device's free memory that the token ids may take; a larger table stays on the host and is streamed."""

NUM_WORDS = 20


@dataclass(frozen=True, kw_only=True)
class ReviewsOutcome:
    """What a run has reached.

    Attributes:
        path: the run's folder.
        summary: the content of summary.json.
        notes: what the user should be told.
        influential_words: by rating, (word, weight) pairs, the most influential first.
        report: the content of report.html.
    """

    path: Path
    summary: dict[str, Any]
    notes: tuple[str, ...]
    influential_words: dict[str, list[tuple[str, float]]]
    report: RunReport


def train_reviews(
    config: TrainConfig,
    *,
    resume: Path | None = None,
    progress: bool = True,
    check_interrupt: Callable[[], None] | None = None,
    command: str = "",
) -> ReviewsOutcome:
    """Trains the classifier and leaves a run folder. If it fails, the folder stays once it holds a checkpoint.

    With `threads="auto"` it sets torch's threads for the process; with any other value, its caller has set them.

    Args:
        config: the options; when resuming, those of the run, whose limit of epochs may be another.
        resume: folder of an earlier run to go on with, from its last good checkpoint; without one, from the start.
        progress: show it on stderr.
        check_interrupt: called after every step; may raise `fasttrain.loop.Interrupted`.
        command: how this run was started, for the report.

    Raises:
        FasttrainError: the table, an option, the device or the folder will not do.
    """
    begin = time.perf_counter()
    device = resolve_device(config.device)
    choose_precision(config.precision, device)
    with RunFolder.open(resume) if resume else RunFolder.create(config.out, "reviews") as folder:
        if not resume:
            folder.write_config(config.to_dict())  # first, so that --resume knows the folder of a run that was killed
        data, notes = _load(config)
        job = _Job(config, data, device)
        if resume:
            job.restore(folder.read_checkpoint())
            folder.write_config(config.to_dict())
        threads = job.settle_threads()
        folder.write_vectorizer(data.vectorizer.to_json())
        history = job.fit(folder, progress=progress, check_interrupt=check_interrupt)
        folder.write_model(job.model.state_dict())
        summary = _summary(job, threads, history, job.test(), begin=begin)
        folder.write_json("summary.json", summary)
        words = influential_words(job.model, data.vectorizer)
        report = RunReport(
            name=folder.path.name,
            workload="reviews",
            summary=summary,
            config=config.to_dict(),
            history=[asdict(row) for row in history.rows],
            influential_words=words,
            notes=(*notes, *folder.notes, *_notes_on_end(history, folder.path)),
            command=command,
        )
        unwritten = _write_report(folder, report)
    return ReviewsOutcome(
        path=folder.path,
        summary=summary,
        notes=(*report.notes, *unwritten),
        influential_words=words,
        report=report,
    )


def warm_reviews(config: TrainConfig) -> Choice:
    """Compiles the step of a job ahead, for jobs that are too short to do so themselves. Leaves no run.

    Args:
        config: the options of the job; for its threads, see `train_reviews`.

    Returns:
        What `auto` will run, and why.

    Raises:
        FasttrainError: the table, an option or the device will not do.
    """
    data, _ = _load(config)
    job = _Job(replace(config, engine="auto"), data, resolve_device(config.device))
    job.settle_threads()
    job.loop.step.settle(job.batches)
    return job.loop.step.engine


def influential_words(model: ReviewClassifier, vectorizer: ReviewVectorizer) -> dict[str, list[tuple[str, float]]]:
    """By rating, the 20 words that speak most for it and their weights. Waits for the device."""
    words = list(vectorizer.review_vocab.token_to_idx)
    ratings = list(vectorizer.rating_vocab.token_to_idx)
    weight = model.fc1.weight.detach().cpu()  # HOST READ: once, after training
    if len(weight) == 1:  # one output speaks for the second rating, its negative for the first
        ratings, weight = ratings[::-1], torch.cat([weight, -weight])
    found: dict[str, list[tuple[str, float]]] = {}
    for rating, scores in zip(ratings, weight, strict=True):
        top = scores.topk(min(NUM_WORDS, len(words)))
        found[rating] = [(words[i], value) for i, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
    return found


class _Job:
    """Model, optimizer, schedule and batches of a run."""

    def __init__(self, config: TrainConfig, data: EncodedReviews, device: torch.device) -> None:
        self.config = config
        self.data = data
        self.device = device
        num_ratings = len(data.vectorizer.rating_vocab.token_to_idx)
        num_features = len(data.vectorizer.review_vocab.token_to_idx)
        with seeded(config.seed):
            self.model = ReviewClassifier(num_features, 1 if num_ratings == 2 else num_ratings)
        self.model.to(device)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate, fused=True)
        self.scheduler = ReduceLROnPlateau(self.optimizer, factor=config.lr_factor, patience=config.lr_patience)
        self.loop = FastLoop(
            self.model, self.optimizer, review_forward, precision=config.precision, engine=config.engine
        )
        self.state = FitState()
        self.is_restored = False
        self.batches = self._train_batches(data.splits["train"])

    def settle_threads(self) -> ThreadChoice:
        """How many CPU threads the steps have, and why; where the options leave it to measuring, it is done and set."""
        given = self.config.threads
        if given != "auto":
            return ThreadChoice(count=torch.get_num_threads(), reason="the default" if given is None else "asked for")
        epoch, epochs_left = self.batches.epoch, self.config.epochs - self.state.history.epochs
        chosen = choose_threads(self.loop.step.spec, self.batches, steps=epochs_left * len(self.batches))
        self.batches.set_epoch(epoch)
        torch.set_num_threads(chosen.count)
        return chosen

    def fit(self, folder: RunFolder, *, progress: bool, check_interrupt: Callable[[], None] | None) -> History:
        """Trains; a checkpoint is written after the first epoch, then every few seconds, and at the end."""
        val = self.data.splits["val"]
        has_val = len(val.labels) > 0
        history = self.state.history
        folder.write_history(history)
        checkpoints = _Checkpoints(folder, self._tree, history.epochs, has_one=self.is_restored)

        def keep(state: FitState) -> None:
            epoch = state.history.epochs
            folder.append_history([row for row in state.history.rows[-2:] if row.epoch == epoch])
            checkpoints.keep(epoch)

        def watch(_batches: int, _samples: int, _seconds: float, _metrics: RunningMetrics) -> None:
            if check_interrupt is not None:
                check_interrupt()

        self.loop.fit(
            self.batches,
            self._evaluation_batches(val) if has_val else None,
            epochs=self.config.epochs,
            scheduler=self.scheduler,
            patience=self.config.patience if has_val else None,
            progress=progress,
            state=self.state,
            on_epoch=keep,
            watch=watch,
        )
        checkpoints.write()
        return history

    def test(self) -> EpochResult | None:
        """The test split's figures; None where it has no rows."""
        split = self.data.splits["test"]
        return self.loop.evaluate(self._evaluation_batches(split)) if len(split.labels) else None

    def restore(self, stored: StoredCheckpoint | None) -> None:
        """Brings everything to where a checkpoint stood; without one, the job stays at its start.

        Raises:
            DataError: the table is not the one that the run was trained on.
            RunError: the checkpoint is not one of this job.
        """
        if stored is None:
            return
        try:
            self._restore(stored.tree, stored.rows)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
            problem = " ".join(str(error).split())  # torch writes several lines
            raise RunError(
                f"{stored.path} is not a checkpoint of this run: {type(error).__name__}: {problem}; restore it from "
                "a copy, or train anew with a new --out"
            ) from error
        self.is_restored = not stored.is_old

    def _restore(self, checkpoint: dict[str, Any], rows: list[EpochRow]) -> None:
        if checkpoint["data_sha256"] != self.data.sha256:
            raise DataError(
                "this table is not the one that the run was trained on (its content has changed)", file=self.data.source
            )
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scheduler.load_state_dict(checkpoint["scheduler"])
        best = checkpoint["history"]
        self.state = FitState(
            history=History(rows=rows, best_epoch=best["best_epoch"], best_loss=best["best_loss"]),
            best_weights={name: value.to(self.device) for name, value in checkpoint["best_weights"].items()},
        )
        self.batches.set_epoch(self.state.history.epochs)

    def _tree(self) -> dict[str, Any]:
        """What a checkpoint holds. The rows of the history are in history.csv."""
        history = self.state.history
        return {
            "data_sha256": self.data.sha256,
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "history": {"best_epoch": history.best_epoch, "best_loss": history.best_loss},
            "best_weights": self.state.best_weights,
        }

    def _train_batches(self, split: EncodedSplit) -> ResidentBatches:
        rows = len(split.labels)
        if rows < self.config.batch_size:
            raise ConfigError(
                f"--batch-size {self.config.batch_size} is larger than the train split: use at most {rows}, its rows"
            )
        return self._resident(split, self.config.batch_size, shuffle=True)

    def _evaluation_batches(self, split: EncodedSplit) -> ResidentBatches:
        return self._resident(split, max(self.config.batch_size, EVALUATION_BATCH), shuffle=False)

    def _resident(self, split: EncodedSplit, batch_size: int, *, shuffle: bool) -> ResidentBatches:
        ids = torch.from_numpy(split.tokens.ids.astype("int32", copy=False))
        free = free_bytes(self.device)
        fits = free is None or ids.nbytes <= RESIDENT_SHARE * free
        targets = torch.from_numpy(split.labels)
        return resident(
            {
                "x_data": Ragged(ids, torch.from_numpy(split.tokens.offsets)),
                "y_target": targets.float() if self.model.fc1.out_features == 1 else targets,
            },
            batch_size=batch_size,
            device=self.device if fits else "cpu",
            shuffle=shuffle,
            seed=self.config.seed,
            drop_last=shuffle,
        )


class _Checkpoints:
    """Writes checkpoints when they are due, and the last epoch's at the end.

    Args:
        folder: where to.
        tree: gives what a checkpoint holds, with the job's own tensors.
        epoch: the last finished epoch, at which the job stands now.
        has_one: whether the folder has a checkpoint of that epoch.
    """

    def __init__(self, folder: RunFolder, tree: Callable[[], dict[str, Any]], epoch: int, *, has_one: bool) -> None:
        self._folder = folder
        self._tree = tree
        self._written_at: float | None = None
        self._epoch = epoch
        self._unwritten = None if has_one else copy_tree(tree())

    def keep(self, epoch: int) -> None:
        """Called after each epoch: writes a checkpoint if one is due, else copies what the next one would hold."""
        self._epoch = epoch
        if self._written_at is None or time.perf_counter() - self._written_at >= CHECKPOINT_S:
            self._unwritten = self._tree()
            self.write()
        else:
            self._unwritten = copy_tree(self._tree())  # the next epoch may be interrupted halfway

    def write(self) -> None:
        """Writes a checkpoint of the last finished epoch, unless the folder has it."""
        if self._unwritten is not None:
            self._folder.write_checkpoint(self._unwritten, self._epoch)
            self._unwritten, self._written_at = None, time.perf_counter()


def _notes_on_end(history: History, path: Path) -> tuple[str, ...]:
    notes: list[str] = []
    if any(not math.isfinite(row.loss) for row in history.rows):
        notes.append("The loss was not a finite number in some epochs: lower --learning-rate.")
    if history.stopped == "interrupted":
        notes.append(f"Interrupted after {history.epochs} finished epochs; go on with --resume {path}.")
    return tuple(notes)


def _write_report(folder: RunFolder, report: RunReport) -> tuple[str, ...]:
    """Writes report.html. The run is complete without it: what prevents it becomes a note."""
    try:
        folder.write_text("report.html", render_report(report))
    except RunError as error:
        return (f"The run is complete, but it has no report: {error}.",)
    return ()


def _load(config: TrainConfig) -> tuple[EncodedReviews, tuple[str, ...]]:
    """The encoded table and the notes about it."""
    if config.data is not None:
        cache_dir = "default" if config.cache else None
        data = load_reviews(config.data, cutoff=config.cutoff, clean=config.clean, cache_dir=cache_dir)
        return data, data.notes
    generated = generate_reviews(seed=config.seed)
    data = load_reviews(generated.table, cutoff=config.cutoff, clean=config.clean)
    data = replace(data, source="generated reviews")
    best = generated.best_accuracy("test")
    note = f"These reviews are generated. The best possible accuracy on these very test rows is {best:.2f}%."
    return data, (note, *data.notes)


def _summary(
    job: _Job, threads: ThreadChoice, history: History, test: EpochResult | None, *, begin: float
) -> dict[str, Any]:
    rates = [row.samples_per_s for row in history.rows if row.split == "train"]
    step = job.loop.step
    return {
        "workload": "reviews",
        "test_loss": test and test.loss,
        "test_accuracy": test and test.accuracy,
        "best_epoch": history.best_epoch,
        "epochs": history.epochs,
        "stopped": history.stopped,
        "engine": step.engine.value,
        "engine_reason": step.engine.reason,
        "device": device_name(job.device),
        "precision": step.precision.value,
        "threads": threads.count,
        "threads_reason": threads.reason,
        "samples_per_s": statistics.median(rates[1:] or rates) if rates else None,
        "compile_s": step.compile_s,
        "total_s": time.perf_counter() - begin,
        "clean": job.data.vectorizer.clean,
        "clean_reason": job.data.clean_reason,
        "vocabulary_size": job.model.fc1.in_features,
        "data_sha256": job.data.sha256,
        "receipt": None,
        "versions": versions(),
    }
