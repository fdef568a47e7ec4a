"""The textbook's review classifier over token ids: the linear layer on a one-hot vector, without the vector."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.data.ragged import Ragged

__all__ = ["OneHotLinear", "ReviewClassifier", "review_forward"]


class OneHotLinear(nn.Linear):
    """`nn.Linear` that also takes collapsed one-hot rows as token ids: a sum of its weight's columns.

    Equal to the linear layer on the one-hot vectors in value and gradient, with the same parameters, so that
    weights exchange with `nn.Linear`. The sum is taken in the weight's own precision, under autocast too.
    """

    def forward(self, input: Tensor | Ragged) -> Tensor:
        """Scores of the rows.

        Args:
            input: `Ragged` of [batch] rows of distinct ids below `in_features`; or dense [batch, in_features].

        Returns:
            [batch, out_features], of the weight's dtype for ids.
        """
        if isinstance(input, Ragged):
            return _sum_columns(input, self.weight) + self.bias
        return super().forward(input)


class ReviewClassifier(nn.Module):
    """One linear layer, `fc1`: one output for two ratings, else one for each.

    Args:
        num_features: size of the vocabulary.
        num_outputs: 1, or the number of ratings.
    """

    def __init__(self, num_features: int, num_outputs: int) -> None:
        super().__init__()
        self.fc1 = OneHotLinear(num_features, num_outputs)

    def forward(self, x_in: Tensor | Ragged) -> Tensor:
        """Logits [batch] for one output, else [batch, outputs]; see `OneHotLinear.forward` for the input."""
        scores = self.fc1(x_in)
        return scores.squeeze(1) if self.fc1.out_features == 1 else scores


def review_forward(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, logits and targets of a batch of `x_data` and `y_target` (float 0/1 for one output, else class indices)."""
    logits, targets = model(batch["x_data"]), batch["y_target"]
    if logits.dim() == 1:
        return F.binary_cross_entropy_with_logits(logits, targets), logits, targets
    return F.cross_entropy(logits, targets), logits, targets


def _sum_columns(rows: Ragged, weight: Tensor) -> Tensor:
    """For each row the sum of the weight's columns at its ids: [batch, out_features]."""
    num_outputs, num_features = weight.shape
    if num_outputs == 1:
        return _SumRuns.apply(rows.values, rows.lengths, weight.view(-1)).unsqueeze(1)
    # One output after the other in one flat run: torch's index_add_ is ten times slower on two dimensions.
    first = torch.arange(0, num_outputs * num_features, num_features, device=weight.device, dtype=rows.values.dtype)
    ids = (first.unsqueeze(1) + rows.values).view(-1)
    sums = _SumRuns.apply(ids, rows.lengths.repeat(num_outputs), weight.reshape(-1))
    return sums.view(num_outputs, -1).t()


class _SumRuns(torch.autograd.Function):
    """Gathers entries of a vector and sums them run by run.

    Written out because autograd's own way through `EmbeddingBag` takes 1.4 ms backward where this takes 0.05.
    """

    @staticmethod
    def forward(ctx: Any, ids: Tensor, lengths: Tensor, vector: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Sums of vector[ids] over runs of `lengths`: [runs]."""
        ctx.save_for_backward(ids, lengths)
        ctx.num_entries = vector.shape[0]
        return torch.segment_reduce(vector.index_select(0, ids), "sum", lengths=lengths, unsafe=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor]:
        """Spreads each run's gradient over its ids and adds up by entry."""
        ids, lengths = ctx.saved_tensors
        spread = torch.repeat_interleave(gradients[0], lengths, output_size=ids.shape[0])
        return None, None, spread.new_zeros(ctx.num_entries).index_add_(0, ids, spread)
