"""Transformers that classify documents: a small one, and MiniLM.

Legend: ``B`` documents, ``T`` words, ``D`` width.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from lwkd.program.data.words import PADDING, WORDS, minilm_folder
from lwkd.program.errors import require

HEAD = 16
"""Width of an attention head."""

MINILM_LAYERS = (1, 2, 3, 6)
"""Numbers of layers that can be taken evenly of MiniLM's six."""

MINILM_LENGTH = 512
"""The most word pieces that MiniLM has places for."""


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


class MiniLM(nn.Module):
    """Transformers' BERT with the weights of all-MiniLM-L6-v2, the mean over word pieces, a linear head.

    Without its dropout, as :class:`Layer`. Of the weights only the head's are random.

    Args:
        layers: taken evenly of its six, the last one always; one of :data:`MINILM_LAYERS`.
        classes: outputs.

    Errors: :class:`~lwkd.program.errors.ProgramError` where the package with the weights, or transformers, is missing.
    """

    def __init__(self, layers: int, *, classes: int):
        super().__init__()
        folder = minilm_folder()
        bert = require("transformers.models.bert")
        options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_hidden_layers": layers}
        config = bert.BertConfig.from_pretrained(folder, **options)
        self.bert = bert.BertModel(config, add_pooling_layer=False)
        theirs = require("safetensors.torch").load_file(folder / "model.safetensors")
        self.bert.load_state_dict({name: theirs[_of_six(name, layers)] for name in self.bert.state_dict()})
        self.head = nn.Linear(config.hidden_size, classes)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) int64 → (B, classes)."""
        words = ids != PADDING
        x: Tensor = self.bert(input_ids=ids, attention_mask=words).last_hidden_state
        logits: Tensor = self.head((x * words[..., None]).sum(1) / words.sum(1, keepdim=True).clamp_min(1))
        return logits


def _of_six(name: str, layers: int) -> str:
    """The weight of the six-layer net that one of fewer layers has under this name."""
    step = 6 // layers
    return re.sub(r"(?<=encoder\.layer\.)\d+", lambda number: str((int(number[0]) + 1) * step - 1), name)
