"""The textbook's review classifier over token ids: the linear layer on a one-hot vector, without the vector."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.data.ragged import Ragged

__all__ = ["ReviewClassifier", "one_hot_linear", "review_forward"]


class ReviewClassifier(nn.Module):
    """One linear layer, `fc1`: one output for two ratings, else one for each.

    Args:
        num_features: size of the vocabulary.
        num_outputs: 1, or the number of ratings.
    """

    def __init__(self, num_features: int, num_outputs: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(num_features, num_outputs)

    def forward(self, x_in: Tensor | Ragged) -> Tensor:
        """Logits of the rows.

        Args:
            x_in: collapsed one-hot rows, as token ids (see `one_hot_linear`) or dense [batch, num_features].

        Returns:
            [batch] for one output, else [batch, num_outputs].
        """
        if isinstance(x_in, Ragged):
            return one_hot_linear(x_in, self.fc1.weight, self.fc1.bias)
        logits = self.fc1(x_in)
        return logits.squeeze(1) if self.fc1.out_features == 1 else logits


def review_forward(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, logits and targets of a batch of `x_data` and `y_target` (float 0/1 for one output, else class indices)."""
    logits, targets = model(batch["x_data"]), batch["y_target"]
    if logits.dim() == 1:
        return F.binary_cross_entropy_with_logits(logits, targets), logits, targets
    return F.cross_entropy(logits, targets), logits, targets


def one_hot_linear(rows: Ragged, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.linear` on collapsed one-hot rows, equal to it in value and gradient: a sum of the weight's columns.

    A gather and a sum by runs, in the weight's own precision (under autocast too). Forward and backward of these take
    0.2 ms where `EmbeddingBag`'s backward takes 1.4; no needless view is made: each costs some 10 us of autograd.

    Args:
        rows: for each row its distinct ids, below the number of features.
        weight: [outputs, features].
        bias: [outputs].

    Returns:
        [batch] for one output, else [batch, outputs].
    """
    num_outputs, num_features = weight.shape
    ids, offsets = rows
    if num_outputs > 1:
        # One output after the other in one flat run: gradients of a gather are ten times slower on two dimensions.
        first = torch.arange(num_outputs, device=ids.device, dtype=ids.dtype).unsqueeze(1)
        begins = first.to(offsets.dtype) * ids.shape[0] + offsets[:-1]
        ids = (first * num_features + ids).view(-1)
        offsets = torch.cat([begins.view(-1), offsets[-1:] * num_outputs])
    columns = weight.reshape(-1).index_select(0, ids)
    sums = torch.segment_reduce(columns, "sum", offsets=offsets, unsafe=True)
    return sums + bias if num_outputs == 1 else sums.view(num_outputs, -1).t() + bias
