"""Ratings of new text by a trained run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fasttrain.data.ragged import Ragged
from fasttrain.data.text import ReviewVectorizer
from fasttrain.data.tokens import Clean
from fasttrain.errors import RunError
from fasttrain.run.folder import RunFolder
from fasttrain.workloads.onehot import ReviewClassifier

__all__ = ["Prediction", "note_on_cleaning", "predict"]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One text's rating.

    Attributes:
        text: as it was given.
        rating: the likeliest one.
        probability: of that rating, by the model.
        known_words: words of the text that the model knows, in order of their index; without any, the rating is only
            the model's bias.
    """

    text: str
    rating: str
    probability: float
    known_words: list[str]


def predict(
    run: Path, texts: Sequence[str], *, clean: Clean | None = None, tell: Callable[[str], None] | None = None
) -> list[Prediction]:
    """Rates texts with the model of a run, on the CPU.

    Args:
        run: folder of the run.
        texts: what to rate.
        clean: how the texts are cleaned; None for the way of the run, which gives a text of its table the rating that
            it had in training and in the test.
        tell: called with each note about the files of the run.

    Raises:
        RunError: the folder is not a run's, a file of its model is missing or damaged, or a weight is not finite.
    """
    folder = RunFolder.open(run)
    folder.check_model()
    if tell is not None:
        for note in folder.notes:
            tell(note)
    vectorizer = ReviewVectorizer.load(run / "vectorizer.json")
    words, ratings = list(vectorizer.review_vocab.token_to_idx), list(vectorizer.rating_vocab.token_to_idx)
    model = ReviewClassifier(len(words), 1 if len(ratings) == 2 else len(ratings))
    try:
        model.load_state_dict(folder.read_model())
    except RuntimeError as error:
        problem = " ".join(str(error).split())  # torch writes several lines
        raise RunError(f"{run / 'model.safetensors'} does not fit vectorizer.json: {problem}") from error
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise RunError(
            f"{run / 'model.safetensors'} has weights that are not finite numbers: its training diverged; "
            "train again with a lower --learning-rate"
        )
    rows = (vectorizer if clean is None else replace(vectorizer, clean=clean)).encode(list(texts))
    ids, offsets = torch.from_numpy(rows.ids.astype("int32")), torch.from_numpy(rows.offsets)
    with torch.no_grad():
        logits = model(Ragged(ids, offsets))
        scores = torch.stack([-logits, logits], dim=1) if logits.dim() == 1 else logits
        chances = (torch.sigmoid(scores) if logits.dim() == 1 else torch.softmax(scores, dim=1)).double()
    best = chances.max(dim=1)
    known = [[words[i] for i in row.tolist() if i] for row in ids.split(offsets.diff().tolist())]
    return [
        Prediction(text=text, rating=ratings[index], probability=chance, known_words=known_words)
        for text, index, chance, known_words in zip(
            texts, best.indices.tolist(), best.values.tolist(), known, strict=True
        )
    ]


def note_on_cleaning(run: Path, texts: Sequence[str]) -> str | None:
    """Says so where a run takes text in tokens, and these texts hold words that it would know once they are cleaned.

    Args:
        run: folder of a run that `predict` has read.
        texts: what it has rated.
    """
    vectorizer = ReviewVectorizer.load(run / "vectorizer.json")
    if vectorizer.clean != "none":
        return None
    as_given, cleaned = (replace(vectorizer, clean=clean).encode(list(texts)) for clean in ("none", "unicode"))
    known = [np.diff(np.append(0, np.cumsum(rows.ids > 0))[rows.offsets]) for rows in (as_given, cleaned)]
    count = int((known[1] > known[0]).sum())
    if not count:
        return None
    return (
        f"the run was trained on text in tokens (clean none), and {count} of {len(texts)} texts have words that it "
        "would know if they were cleaned; --clean unicode does that"
    )
