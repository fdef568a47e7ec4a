"""Fourteen training loops of the kinds that books and public repositories have (DCGAN twice), against plain PyTorch.

Each loop is written once, for a `Side`: plain PyTorch, or `TrainStep` and `FastLoop` with one engine. Everything is in
double precision, from the same seed; losses, parameters and buffers must agree within `TOLERANCE`. `test_public_loops`
runs captured graphs in place of compiled programs, `public_loops_speed` compiles and times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fasttrain import FastLoop, TrainStep

TOLERANCE = 1e-9
"""Relative, and absolute for values below one."""

BATCHES, EPOCHS, ROWS = 12, 3, 8
"""`auto` takes its program up within 20 steps of these."""

Batch = Any
Forward = Callable[[Any, Batch], Any]


class Side:
    """What a loop trains with.

    Args:
        engine: of fasttrain; None is plain PyTorch.
        count: is called after steps, with their number.

    Attributes:
        models: all models that were trained.
        steps: the steps of fasttrain.
    """

    def __init__(self, engine: str | None, count: Callable[[int], None] = lambda _: None) -> None:
        self.engine = engine
        self.count = count
        self.models: list[nn.Module] = []
        self.steps: list[TrainStep] = []

    def step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, forward: Forward, **options: Any
    ) -> Callable[[Batch], Tensor]:
        """A step of a loop that the user keeps: takes a batch, returns its loss."""
        self.models.append(model)
        if self.engine is None:
            step = PlainStep(model, optimizer, forward, **options)
        else:
            step = TrainStep(model, optimizer, forward, engine=self.engine, **options)
            step.expect(BATCHES * EPOCHS)
            self.steps.append(step)

        def counted(batch: Batch) -> Tensor:
            self.count(1)
            return step(batch)

        return counted

    def epochs(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        forward: Forward,
        batches: Sequence[Batch],
        after: Callable[[], None] = lambda: None,
    ) -> list[float]:
        """The mean loss of each epoch; `after` runs between two."""
        if self.engine is None:
            self.models.append(model)
            step = PlainStep(model, optimizer, forward)
            train = lambda: math.fsum(step(batch).item() for batch in batches) / len(batches)  # noqa: E731
        else:
            loop = FastLoop(model, optimizer, forward, engine=self.engine)
            self.models.append(model)
            self.steps.append(loop.step)
            train = lambda: loop.train(batches).loss  # noqa: E731
        losses: list[float] = []
        for _ in range(EPOCHS):
            losses.append(train())
            after()
            self.count(len(batches))
        return losses


class PlainStep:
    """The step of plain PyTorch: gradients to zero, forward, backward, clipping, optimizer."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        forward: Forward,
        accumulate: int = 1,
        clip_norm: float | None = None,
    ) -> None:
        self._model, self._optimizer, self._forward = model, optimizer, forward
        self._accumulate, self._clip_norm = accumulate, clip_norm
        self._count = 0

    def __call__(self, batch: Batch) -> Tensor:
        if isinstance(self._optimizer, torch.optim.LBFGS):
            return self._optimizer.step(lambda: self._backward(batch))  # pyright: ignore[reportReturnType, reportArgumentType]
        loss = self._backward(batch)
        self._count += 1
        if self._count % self._accumulate == 0:
            if self._clip_norm is not None:
                nn.utils.clip_grad_norm_(self._model.parameters(), self._clip_norm)
            self._optimizer.step()
        return loss.detach()

    def _backward(self, batch: Batch) -> Tensor:
        if self._count % self._accumulate == 0:
            self._optimizer.zero_grad()
        output = self._forward(self._model, batch)
        loss = output[0] if isinstance(output, tuple) else output
        (loss / self._accumulate).backward()
        return loss


# Perceptron, surnames, CBOW.


class Perceptron(nn.Module):
    def __init__(self, words: int) -> None:
        super().__init__()
        self.fc = nn.Linear(words, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).squeeze(-1)


def perceptron_on_reviews(side: Side) -> list[float]:
    """One-hot reviews, one output, Adam."""
    model = Perceptron(40)
    batches = [
        {"x_data": (torch.rand(ROWS, 40) < 0.2).double(), "y_target": torch.randint(2, (ROWS,)).double()}
        for _ in range(BATCHES)
    ]

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> Any:
        logits = model(batch["x_data"])
        return F.binary_cross_entropy_with_logits(logits, batch["y_target"]), logits, batch["y_target"]

    return side.epochs(model, torch.optim.Adam(model.parameters(), lr=0.01), forward, batches)


class SurnamesMLP(nn.Module):
    def __init__(self, letters: int, hidden: int, nations: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(letters, hidden), nn.Linear(hidden, nations)

    def forward(self, x: Tensor, apply_softmax: bool = False) -> Tensor:
        x = self.fc2(F.dropout(F.relu(self.fc1(x)), p=0.5, training=self.training))
        return F.softmax(x, dim=1) if apply_softmax else x


def classes_of(batches: int, *shape: int, classes: int = 5) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(ROWS, *shape), torch.randint(classes, (ROWS,))) for _ in range(batches)]


def surnames_mlp(side: Side) -> list[float]:
    """Dropout, weighted classes, a rate that falls after each epoch."""
    model = SurnamesMLP(30, 16, 5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scheduler = StepLR(optimizer, 1, 0.5)
    criterion = nn.CrossEntropyLoss(torch.rand(5) + 0.5)

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
        logits = model(batch[0])
        return criterion(logits, batch[1]), logits, batch[1]

    return side.epochs(model, optimizer, forward, classes_of(BATCHES, 30), scheduler.step)


class SurnamesCNN(nn.Module):
    def __init__(self, letters: int, channels: int, nations: int) -> None:
        super().__init__()
        self.convnet = nn.Sequential(
            nn.Conv1d(letters, channels, 3),
            nn.ELU(),
            nn.BatchNorm1d(channels),
            nn.Conv1d(channels, channels, 3, stride=2),
            nn.ELU(),
            nn.Conv1d(channels, channels, 3, stride=2),
            nn.ELU(),
        )
        self.fc = nn.Linear(channels, nations)

    def forward(self, x: Tensor) -> Tensor:
        features = self.convnet(x)
        remaining = features.size(dim=2)
        features = F.avg_pool1d(features, remaining) if remaining > 1 else features
        return self.fc(F.dropout(features.squeeze(dim=2), p=0.1, training=self.training))


def surnames_cnn(side: Side) -> list[float]:
    """Strided convolutions over letters, batch norm, pooling where something remains."""
    model = SurnamesCNN(20, 8, 5)

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
        logits = model(batch[0])
        return F.cross_entropy(logits, batch[1]), logits, batch[1]

    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    return side.epochs(model, optimizer, forward, classes_of(BATCHES, 20, 17))


class CBOW(nn.Module):
    def __init__(self, words: int, size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, size, padding_idx=0)
        self.fc = nn.Linear(size, words)

    def forward(self, context: Tensor) -> Tensor:
        return self.fc(F.dropout(self.embedding(context).sum(dim=1), 0.3, self.training))


def cbow(side: Side) -> list[float]:
    """The word in the middle of four others, with a padded context."""
    model = CBOW(25, 8)
    batches = [(torch.randint(25, (ROWS, 4)), torch.randint(1, 25, (ROWS,))) for _ in range(BATCHES)]

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    return side.epochs(model, torch.optim.Adam(model.parameters(), lr=0.01), forward, batches)


# Recurrent models.


class PackedGRU(nn.Module):
    def __init__(self, letters: int, size: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters, size, padding_idx=0)
        self.rnn = nn.GRU(size, size, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(2 * size, classes)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embedding(x), lengths.cpu(), batch_first=True, enforce_sorted=False)
        output, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.fc(output.sum(dim=1) / lengths.unsqueeze(1))


def gru_with_packing(side: Side) -> list[float]:
    """Sentences of several lengths, packed."""
    model = PackedGRU(20, 6, 4)
    batches: list[Batch] = []
    for _ in range(BATCHES):
        lengths = torch.randint(2, 8, (ROWS,))
        x = torch.randint(1, 20, (ROWS, 7)) * (torch.arange(7) < lengths[:, None])
        batches.append((x, lengths, torch.randint(4, (ROWS,))))

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Any:
        logits = model(batch[0], batch[1])
        return F.cross_entropy(logits, batch[2]), logits, batch[2]

    return side.epochs(model, torch.optim.Adam(model.parameters(), lr=0.01), forward, batches)


class Translator(nn.Module):
    """A GRU encoder, and a decoder that attends to it and sees its own word now and then instead of the true one."""

    def __init__(self, words: int, size: int) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(words, size), nn.Embedding(words, size)
        self.encoder = nn.GRU(size, size, batch_first=True)
        self.decoder = nn.GRUCell(2 * size, size)
        self.fc = nn.Linear(2 * size, words)

    def forward(self, x: Tensor, y: Tensor, sampled: float) -> Tensor:
        states, hidden = self.encoder(self.source(x))
        hidden, context, word = hidden[0], torch.zeros_like(hidden[0]), y[:, 0]
        outputs: list[Tensor] = []
        for at in range(1, y.size(1)):
            hidden = self.decoder(torch.cat([self.target(word), context], dim=1), hidden)
            weights = F.softmax(torch.bmm(states, hidden.unsqueeze(2)).squeeze(2), dim=1)
            context = (weights.unsqueeze(2) * states).sum(dim=1)
            outputs.append(self.fc(torch.cat([hidden, context], dim=1)))
            word = outputs[-1].argmax(dim=1) if np.random.random() < sampled else y[:, at]
        return torch.stack(outputs, dim=1)


def seq2seq_with_attention(side: Side) -> list[float]:
    """Scheduled sampling by numpy's random numbers, more of it from epoch to epoch; clipped."""
    model = Translator(15, 6)
    np.random.seed(0)
    batches = [(torch.randint(1, 15, (ROWS, 5)), torch.randint(1, 15, (ROWS, 6))) for _ in range(BATCHES)]
    sampled = 0.0

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        outputs = model(*batch, sampled)
        return F.cross_entropy(outputs.reshape(-1, 15), batch[1][:, 1:].reshape(-1), ignore_index=0)

    step = side.step(model, torch.optim.Adam(model.parameters(), lr=0.01), forward, clip_norm=1.0)
    losses: list[float] = []
    for epoch in range(EPOCHS):
        sampled = epoch / EPOCHS
        losses += [step(batch).item() for batch in batches]
    return losses


class WordModel(nn.Module):
    def __init__(self, words: int, size: int) -> None:
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(words, size), nn.LSTM(size, size)
        self.fc = nn.Linear(size, words)

    def forward(self, x: Tensor, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        output, hidden = self.rnn(self.embedding(x), hidden)
        return self.fc(output), hidden


def word_language_model(side: Side) -> list[float]:
    """An LSTM whose hidden state a closure carries from batch to batch; SGD, clipped."""
    model = WordModel(18, 6)
    text = torch.randint(18, (BATCHES * 5 + 1, ROWS))
    hidden = torch.zeros(1, ROWS, 6), torch.zeros(1, ROWS, 6)

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal hidden
        output, (h, c) = model(batch[0], hidden)
        hidden = h.detach(), c.detach()
        return F.cross_entropy(output.reshape(-1, 18), batch[1].reshape(-1))

    step = side.step(model, torch.optim.SGD(model.parameters(), lr=1.0), forward, clip_norm=0.25)
    losses: list[float] = []
    for _ in range(EPOCHS):
        hidden = torch.zeros(1, ROWS, 6), torch.zeros(1, ROWS, 6)
        for at in range(0, len(text) - 1, 5):
            losses.append(step((text[at : at + 5], text[at + 1 : at + 6])).item())
    return losses


# Generative models.


class VAE(nn.Module):
    def __init__(self, pixels: int, size: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(pixels, 10)
        self.mean, self.log_var = nn.Linear(10, size), nn.Linear(10, size)
        self.decoder = nn.Sequential(nn.Linear(size, 10), nn.ReLU(), nn.Linear(10, pixels))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = F.relu(self.encoder(x.view(x.size(0), -1)))
        mean, log_var = self.mean(hidden), self.log_var(hidden)
        code = mean + torch.randn_like(mean) * torch.exp(0.5 * log_var)
        return torch.sigmoid(self.decoder(code)), mean, log_var


def vae(side: Side) -> list[float]:
    """Noise drawn in forward, a loss that is summed."""
    model = VAE(36, 3)

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        image, mean, log_var = model(batch)
        divergence = -0.5 * torch.sum(1 + log_var - mean.pow(2) - log_var.exp())
        return F.binary_cross_entropy(image, batch.view(-1, 36), reduction="sum") + divergence

    batches = [torch.rand(ROWS, 1, 6, 6) for _ in range(BATCHES)]
    return side.epochs(model, torch.optim.Adam(model.parameters(), lr=1e-3), forward, batches)


def adversaries() -> nn.ModuleDict:
    generator = nn.Sequential(
        nn.ConvTranspose2d(4, 6, 4, 1, 0, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(6, 1, 4, 2, 1, bias=False),
        nn.Tanh(),
    )
    discriminator = nn.Sequential(
        nn.Conv2d(1, 6, 4, 2, 1, bias=False),
        nn.BatchNorm2d(6),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(6, 1, 4, 1, 0, bias=False),
        nn.Flatten(0),
    )
    return nn.ModuleDict({"generator": generator, "discriminator": discriminator})


def adversarial_losses(side: Side, pair: nn.ModuleDict, models: list[nn.Module]) -> list[float]:
    """The losses of two steps in turn, each with an optimizer of its own part and, as its model, one of `models`."""
    discriminator, generator = pair["discriminator"], pair["generator"]
    optimizers = [
        torch.optim.Adam(part.parameters(), lr=2e-4, betas=(0.5, 0.999)) for part in (discriminator, generator)
    ]

    def judge(_: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        real, made = discriminator(batch[0]), discriminator(generator(batch[1]).detach())
        of_real = F.binary_cross_entropy_with_logits(real, torch.ones_like(real))
        return of_real + F.binary_cross_entropy_with_logits(made, torch.zeros_like(made))

    def deceive(_: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        made = discriminator(generator(batch[1]))
        return F.binary_cross_entropy_with_logits(made, torch.ones_like(made))

    steps = [side.step(models[0], optimizers[0], judge), side.step(models[1], optimizers[1], deceive)]
    images, losses = [torch.rand(ROWS, 1, 8, 8) * 2 - 1 for _ in range(BATCHES)], list[float]()
    for real in images * EPOCHS:
        batch = real, torch.randn(ROWS, 4, 1, 1)
        losses += [step(batch).item() for step in steps]
    return losses


def dcgan(side: Side) -> list[float]:
    """Both steps have the pair of networks as their model."""
    pair = adversaries()
    return adversarial_losses(side, pair, [pair, pair])


def dcgan_of_two_models(side: Side) -> list[float]:
    """Each step has one network as its model, and its forward reads the other one as well."""
    pair = adversaries()
    return adversarial_losses(side, pair, [pair["discriminator"], pair["generator"]])


# Transformers.


class Block(nn.Module):
    bias: Tensor

    def __init__(self, size: int, heads: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.attend, self.project = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size), nn.Dropout(0.1))
        self.register_buffer("bias", torch.tril(torch.ones(length, length)).view(1, 1, length, length))

    def forward(self, x: Tensor) -> Tensor:
        rows, length, size = x.size()
        parts = self.attend(self.norm1(x)).split(size, dim=2)
        query, key, value = (part.view(rows, length, self.heads, -1).transpose(1, 2) for part in parts)
        scores = (query @ key.transpose(-2, -1)) / math.sqrt(key.size(-1))
        scores = scores.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
        mixed = F.dropout(F.softmax(scores, dim=-1), 0.1, self.training) @ value
        x = x + self.project(mixed.transpose(1, 2).contiguous().view(rows, length, size))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, words: int, size: int, length: int, *, is_tied: bool) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, size), nn.Embedding(length, size)
        self.blocks = nn.ModuleList([Block(size, 2, length)])
        self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, words, bias=False)
        if is_tied:
            self.words.weight = self.head.weight

    def forward(self, x: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        hidden = self.words(x) + self.places(torch.arange(x.size(1), device=x.device))
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(self.norm(hidden))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


def loss_of_gpt(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return model(*batch)[1]


def words_of(batches: int) -> list[tuple[Tensor, Tensor]]:
    texts = [torch.randint(12, (ROWS, 7)) for _ in range(batches)]
    return [(text[:, :-1].contiguous(), text[:, 1:].contiguous()) for text in texts]


def decay_groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [
        {"params": [each for each in parameters if each.dim() >= 2], "weight_decay": decay},
        {"params": [each for each in parameters if each.dim() < 2], "weight_decay": 0.0},
    ]


def mingpt_with_clipping(side: Side) -> list[float]:
    """AdamW with decay for matrices alone, clipped."""
    model = GPT(12, 8, 6, is_tied=False)
    optimizer = torch.optim.AdamW(decay_groups(model, 0.1), lr=3e-3, betas=(0.9, 0.95))
    step = side.step(model, optimizer, loss_of_gpt, clip_norm=1.0)
    return [step(batch).item() for batch in words_of(BATCHES) * EPOCHS]


def nanogpt_with_accumulation(side: Side) -> list[float]:
    """Tied weights, three batches a step, and a rate of its own for each step: a warm-up, then a cosine."""
    model = GPT(12, 8, 6, is_tied=True)
    optimizer = torch.optim.AdamW(decay_groups(model, 0.1), lr=6e-3, betas=(0.9, 0.95))
    step = side.step(model, optimizer, loss_of_gpt, accumulate=3, clip_norm=1.0)
    batches, losses, total = words_of(BATCHES) * EPOCHS, list[float](), BATCHES * EPOCHS // 3
    for iteration in range(total):
        for group in optimizer.param_groups:
            group["lr"] = 6e-3 * min((iteration + 1) / 4, 0.5 * (1.0 + math.cos(math.pi * iteration / total)))
        losses += [step(batch).item() for batch in batches[3 * iteration : 3 * iteration + 3]]
    return losses


class BERT(nn.Module):
    def __init__(self, words: int, size: int, length: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, size, padding_idx=0), nn.Embedding(length, size)
        layer = nn.TransformerEncoderLayer(size, 2, 2 * size, dropout=0.1, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(size, words)

    def forward(self, x: Tensor, is_padding: Tensor) -> Tensor:
        hidden = self.words(x) + self.places.weight[: x.size(1)]
        return self.head(self.encoder(hidden, src_key_padding_mask=is_padding))


def tiny_bert(side: Side) -> list[float]:
    """Masked words, padded sentences, a warm-up that a scheduler makes step by step; clipped."""
    model = BERT(16, 8, 7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    scheduler = LambdaLR(optimizer, lambda at: min((at + 1) / 6, 1 - at / (BATCHES * EPOCHS + 1)))
    batches: list[dict[str, Tensor]] = []
    for _ in range(BATCHES):
        words = torch.randint(2, 16, (ROWS, 7))
        is_padding = torch.arange(7) >= torch.randint(4, 8, (ROWS, 1))
        is_masked = (torch.rand(ROWS, 7) < 0.3) & ~is_padding
        is_masked[:, 0] = True
        inputs = words.masked_fill(is_masked, 1).masked_fill(is_padding, 0)
        batches.append({"inputs": inputs, "padding": is_padding, "labels": words.masked_fill(~is_masked, -100)})

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> Any:
        logits = model(batch["inputs"], batch["padding"])
        loss = F.cross_entropy(logits.view(-1, 16), batch["labels"].view(-1))
        return loss, logits.view(-1, 16), batch["labels"].view(-1)

    step, losses = side.step(model, optimizer, forward, clip_norm=1.0), list[float]()
    for batch in batches * EPOCHS:
        losses.append(step(batch).item())
        scheduler.step()
    return losses


# Fine-tuning, and an optimizer that needs a closure.


def ema_one_cycle_frozen(side: Side) -> list[float]:
    """A frozen backbone that thaws after an epoch, OneCycleLR, and an average of the weights that is evaluated."""
    backbone = nn.Sequential(nn.Linear(10, 12), nn.BatchNorm1d(12), nn.ReLU())
    model = nn.Sequential(backbone, nn.Dropout(0.2), nn.Linear(12, 5))
    backbone.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = OneCycleLR(optimizer, max_lr=0.01, total_steps=BATCHES * EPOCHS + 1)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    batches, losses = classes_of(BATCHES, 10), list[float]()

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
        logits = model(batch[0])
        return F.cross_entropy(logits, batch[1], label_smoothing=0.1), logits, batch[1]

    step = side.step(model, optimizer, forward)
    for epoch in range(EPOCHS):
        if epoch == 1:
            backbone.requires_grad_(True)
        for batch in batches:
            losses.append(step(batch).item())
            scheduler.step()
            average.update_parameters(model)
        average.eval()
        with torch.no_grad():
            losses.append(forward(average, batches[0])[0].item())
    return losses


def lbfgs(side: Side) -> list[float]:
    """Regression with a strong Wolfe line search."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe")

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    step = side.step(model, optimizer, forward)
    batch = torch.randn(32, 4), torch.randn(32, 1)
    return [step(batch).item() for _ in range(BATCHES * EPOCHS)]


@dataclass(frozen=True)
class Expected:
    """A loop and what must become of it.

    Attributes:
        loop: trains with a side and returns losses.
        eagerly: why it runs eagerly, as a regular expression; None where it compiles.
        missed: how many steps `compiled` runs eagerly, from a change until the next program.
    """

    loop: Callable[[Side], list[float]]
    eagerly: str | None = None
    missed: int = 0


LOOPS = [
    Expected(perceptron_on_reviews),
    Expected(surnames_mlp),
    Expected(surnames_cnn),
    Expected(cbow),
    Expected(gru_with_packing, "forward packs sequences.*'packed = pack_padded_sequence.* in public_loops"),
    Expected(seq2seq_with_attention, "numpy.*draws random numbers.*'word = .*np.random.random.* in public_loops"),
    Expected(word_language_model, "forward changes Python objects.*'hidden = h.detach.* in public_loops"),
    Expected(vae),
    Expected(dcgan),
    Expected(
        dcgan_of_two_models,
        r"(changes generator|needs the gradient of discriminator)\[.*give the step a model that holds",
    ),
    Expected(mingpt_with_clipping),
    Expected(nanogpt_with_accumulation),
    Expected(tiny_bert),
    Expected(ema_one_cycle_frozen, missed=16),
    Expected(lbfgs, "LBFGS evaluates the loss several times a step"),
]


def trained(expected: Expected, side: Side) -> list[Any]:
    """The losses, and what the models hold afterwards."""
    torch.manual_seed(0)
    return [expected.loop(side), *[dict(model.state_dict()) for model in side.models]]
