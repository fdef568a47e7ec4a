"""The chars job: a character transformer on Shakespeare, whose steps are nearly all matrix products."""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from fasttrain.workloads.common import data_file
from fasttrain.workloads.tensor_job import TensorJob

__all__ = ["CharDataset", "CharTransformer", "chars_job"]

CONTEXT = 64
WIDTH = 128
NUM_LAYERS = 4
NUM_HEADS = 4


def chars_job(device: torch.device) -> TensorJob:
    """Every piece of 64 characters of tinyshakespeare, end to end, each to be continued by its next character.

    Raises:
        DataError: `tinyshakespeare.txt` is not in the folder of real data.
    """
    path = data_file("tinyshakespeare.txt")
    raw = path.read_bytes()
    text = raw.decode("utf-8")
    dataset = CharDataset(text)
    ids = torch.tensor([dataset.char_to_idx[char] for char in text])
    num_rows = len(dataset)
    num_chars = len(dataset.char_to_idx)
    return TensorJob(
        name="chars",
        device=device,
        inputs=ids[: num_rows * CONTEXT].view(num_rows, CONTEXT),
        targets=ids[1 : num_rows * CONTEXT + 1].view(num_rows, CONTEXT),
        network=lambda: CharTransformer(num_chars),
        dataset=lambda: dataset,
        batch_size=64,
        optimizer_kind=torch.optim.AdamW,
        facts={
            "data": path.name,
            "data_sha256": hashlib.sha256(raw).hexdigest(),
            "vocabulary_size": num_chars,
            "network": f"transformer, {NUM_LAYERS} layers, width {WIDTH}, {NUM_HEADS} heads, tied embeddings",
        },
    )


class CharDataset(Dataset[tuple[Tensor, Tensor]]):
    """Looks up the characters of one piece at a time, when it is asked for it, as a textbook's dataset does.

    Args:
        text: cut into pieces of `CONTEXT` characters, end to end; what is left at the end is left out.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self.char_to_idx = {char: idx for idx, char in enumerate(sorted(set(text)))}

    def __len__(self) -> int:
        return (len(self._text) - 1) // CONTEXT

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """A piece and the piece one character on: int64 [CONTEXT] each."""
        begin = index * CONTEXT
        ids = [self.char_to_idx[char] for char in self._text[begin : begin + CONTEXT + 1]]
        return torch.tensor(ids[:-1]), torch.tensor(ids[1:])


class CharTransformer(nn.Module):
    """A decoder with layer norm first, learned positions, and one matrix for input and output embeddings.

    No dropout: all arms must agree on the losses. No bias in front of the attention's softmax, which takes a key's
    bias away again.

    Args:
        num_chars: size of the vocabulary.
    """

    def __init__(self, num_chars: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_chars, WIDTH)
        self.positions = nn.Parameter(torch.empty(CONTEXT, WIDTH))
        self.layers = nn.Sequential(*(_Layer() for _ in range(NUM_LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        for parameter in (self.embedding.weight, self.positions):
            nn.init.normal_(parameter, std=0.02)  # as GPT-2: an output embedding of variance 1 would start far off

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the next characters.

        Args:
            ids: [batch, CONTEXT], int64.

        Returns:
            [batch, num_chars, CONTEXT]: classes in dimension 1, where cross-entropy and accuracy look for them.
        """
        hidden = self.norm(self.layers(self.embedding(ids) + self.positions))
        return F.linear(hidden, self.embedding.weight).transpose(1, 2)


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.mix = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 4 * WIDTH, bias=False),
            nn.GELU(),
            nn.Linear(4 * WIDTH, WIDTH, bias=False),
        )

    def forward(self, hidden: Tensor) -> Tensor:  # [batch, chars, width]
        hidden = hidden + self.mix(self._attend(self.attention_norm(hidden)))
        return hidden + self.mlp(hidden)

    def _attend(self, hidden: Tensor) -> Tensor:
        heads = self.query_key_value(hidden).unflatten(-1, (3, NUM_HEADS, WIDTH // NUM_HEADS))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each [batch, heads, chars, width of a head]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return mixed.transpose(1, 2).flatten(-2)
