"""The textbook's whole script: read a table, train on it, test. Prints what it reached as one JSON line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fasttrain.reference import TextbookClassifier, TextbookDataset, train_textbook


def main(arguments: Sequence[str]) -> int:
    """Trains; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.textbook", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="a .csv or .csv.gz")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--patience", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--threads", type=int, help="torch's; by default its own choice")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    dataset = TextbookDataset.from_csv(options.data)
    model = TextbookClassifier(dataset.num_features, dataset.num_outputs)
    result = train_textbook(dataset, model, epochs=options.epochs, patience=options.patience, seed=options.seed)
    epochs = max(row["epoch"] for row in result.history)
    print(json.dumps({"test_loss": result.test_loss, "test_accuracy": result.test_accuracy, "epochs": epochs}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
