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
            return _SumColumns.apply(input.values, input.lengths, self.weight, self.bias)
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


class _SumColumns(torch.autograd.Function):
    """For each row the sum of the weight's columns at its ids, plus the bias.

    Written out, and as one node, because autograd's own way through `EmbeddingBag` takes 1.4 ms backward where this
    takes 0.1, and each node of a graph costs some 10 us on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, ids: Tensor, lengths: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Scores [rows, outputs]."""
        num_outputs, num_features = weight.shape
        if num_outputs > 1:
            # One output after the other in one flat run: index_add_ is ten times slower on two dimensions.
            first = torch.arange(0, weight.numel(), num_features, device=ids.device, dtype=ids.dtype)
            ids, lengths = (first.unsqueeze(1) + ids).view(-1), lengths.repeat(num_outputs)
        ctx.save_for_backward(ids, lengths)
        ctx.weight_shape = weight.shape
        sums = torch.segment_reduce(weight.reshape(-1).index_select(0, ids), "sum", lengths=lengths, unsafe=True)
        return sums.view(num_outputs, -1).t() + bias

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor, Tensor]:
        """Spreads each row's gradient over its ids and adds up by entry of the weight."""
        ids, lengths = ctx.saved_tensors
        by_output = gradients[0].t()
        spread = torch.repeat_interleave(by_output.reshape(-1), lengths, output_size=ids.shape[0])
        weight = spread.new_zeros(ctx.weight_shape.numel()).index_add_(0, ids, spread)
        return None, None, weight.view(ctx.weight_shape), by_output.sum(1)
