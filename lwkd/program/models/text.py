"""A small transformer that classifies documents.

Legend: ``B`` documents, ``T`` words, ``D`` width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lwkd.program.data.words import PADDING, WORDS

HEAD = 16
"""Width of an attention head."""


class Embedding(nn.Module):
    """The vector of each word plus that of its place."""

    def __init__(self, words: int, length: int, width: int):
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.places = nn.Parameter(torch.zeros(length, width))
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.places, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) → (B, T, D), zero where there is padding."""
        vectors = self.words(ids) + self.places[: ids.shape[1]]
        return vectors.masked_fill((ids == PADDING)[..., None], 0.0)


class Layer(nn.TransformerEncoderLayer):
    """Pre-norm self-attention and a perceptron four times as wide.

    Its output is zero where there is padding. The net is called with ids alone, so lwkd is told of no mask: this is
    how padded positions are none in the maps that it compares.
    """

    def __init__(self, width: int):
        options: Any = {"activation": "gelu", "batch_first": True, "norm_first": True}
        # No dropout: on a CPU it costs a quarter of a step.
        super().__init__(width, width // HEAD, 4 * width, dropout=0.0, **options)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:  # type: ignore[override]
        """(B, T, D) → the same; ``padding`` (B, T) is True where there is no word."""
        found: Tensor = super().forward(x, src_key_padding_mask=padding)
        return found.masked_fill(padding[..., None], 0.0)


class TextNet(nn.Module):
    """Embedding, ``layer1`` … ``layerN``, the mean over words, a linear head.

    Args:
        layers: N.
        width: D, a multiple of :data:`HEAD`.
        classes: outputs.
        length: the most words of a document.
        words: ids there are; :data:`~lwkd.program.data.words.PADDING` is none of a word.

    >>> net = TextNet(2, 16, classes=5, length=8).eval()
    >>> ids = torch.tensor([[7, 9, 4]])
    >>> torch.allclose(net(ids), net(torch.cat([ids, torch.zeros(1, 5, dtype=torch.int64)], 1)), atol=1e-6)
    True
    """

    def __init__(self, layers: int, width: int, *, classes: int, length: int, words: int = WORDS):
        super().__init__()
        self.embedding = Embedding(words, length, width)
        self.depth = layers
        for number in range(1, layers + 1):
            self.add_module(f"layer{number}", Layer(width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) int64 → (B, classes)."""
        padding = ids == PADDING
        x = self.embedding(ids)
        for number in range(1, self.depth + 1):
            x = self.get_submodule(f"layer{number}")(x, padding)
        x = self.norm(x).masked_fill(padding[..., None], 0.0)
        logits: Tensor = self.head(x.sum(1) / (~padding).sum(1, keepdim=True).clamp_min(1))
        return logits
