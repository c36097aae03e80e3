"""The layouts that pairing finds for layers of all kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lwkd.nets.layout import Layout
from lwkd.pairing import pair

PATCHES, WIDTH = 4, 6


def layouts(net: nn.Module, example: Any, *layers: str) -> list[Layout]:
    """What pairing finds for these layers (the net paired with itself)."""
    found = pair(net, net, example, layers={layer: layer for layer in layers})
    return [found.pairs[found.names.index(layer)].student_layout for layer in layers]


class Patches(nn.Module):
    """Image → tokens, with class and register tokens in front, behind, or inserted behind the class token."""

    def __init__(self, front: int = 0, behind: int = 0, inserted: int = 0, *, conv: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, PATCHES, PATCHES) if conv else None
        self.linear = nn.Linear(3 * PATCHES * PATCHES, WIDTH)
        self.front = nn.Parameter(torch.randn(1, front, WIDTH))
        self.behind = nn.Parameter(torch.randn(1, behind, WIDTH))
        self.inserted = nn.Parameter(torch.randn(1, inserted, WIDTH))
        self.blocks = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))
        self.patches_only = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            x = self.conv(x).flatten(2).transpose(1, 2)
        else:
            B, _, H, W = x.shape
            x = x.reshape(B, 3, H // PATCHES, PATCHES, W // PATCHES, PATCHES).permute(0, 2, 4, 1, 3, 5)
            x = self.linear(x.reshape(B, -1, 3 * PATCHES * PATCHES))
        x = torch.cat([self.front.expand(len(x), -1, -1), x], dim=1)
        if self.inserted.numel():
            x = torch.cat([x[:, :1], self.inserted.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        if self.behind.numel():
            x = torch.cat([x, self.behind.expand(len(x), -1, -1)], dim=1)
        x = x + self.blocks(x)
        return self.patches_only(x[:, self.front.shape[1] + self.inserted.shape[1] :])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("front", "inserted"), [(0, 0), (1, 0), (2, 0), (1, 4)])
def test_tokens_from_a_patch_convolution(front: int, inserted: int, batch: int):
    found = layouts(Patches(front, inserted=inserted), torch.rand(batch, 3, 8, 20), "blocks", "patches_only")
    assert found == [Layout("tokens", front + inserted, (2, 5)), Layout("tokens", 0, (2, 5))]


def test_tokens_from_a_linear_embedding_are_a_square_grid():
    found = layouts(Patches(1, conv=False), torch.rand(2, 3, 12, 12), "blocks", "patches_only")
    assert found == [Layout("tokens", 1, (3, 3)), Layout("tokens", 0, (3, 3))]


def test_tokens_in_no_expressible_order_have_no_grid():
    assert layouts(Patches(behind=1), torch.rand(2, 3, 12, 12), "blocks") == [Layout("tokens")]


def test_text_has_no_grid():
    net = nn.Sequential(nn.Embedding(10, WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU())
    assert layouts(net, torch.zeros(2, 16, dtype=torch.long), "0", "2") == [Layout("tokens")] * 2


class ChannelsLast(nn.Module):
    """As in swin and convnext: a convolution, then (B, H, W, C) until the end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 1)
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.back = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).permute(0, 2, 3, 1)
        return self.back((x + self.mlp(self.norm(x))).movedim(-1, 1) * 2)


def test_channels_last_is_followed_through_permutations():
    # Six channels on a 6×6 picture: shapes alone could not tell.
    found = layouts(ChannelsLast(), torch.rand(2, 3, WIDTH, WIDTH), "conv", "norm", "mlp", "mlp.1", "back")
    assert [layout.kind for layout in found] == ["channels_first"] + ["channels_last"] * 3 + ["channels_first"]


def test_a_signal_is_channels_first():
    net = nn.Sequential(nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5), nn.ReLU(), nn.MaxPool1d(2), nn.AvgPool1d(2), nn.GELU())
    assert set(layouts(net, torch.rand(2, 3, 30), "0", "1", "2", "3", "4", "5")) == {Layout("channels_first")}


def test_a_volume_is_channels_first():
    net = nn.Sequential(nn.Conv3d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.AvgPool3d(2))
    assert set(layouts(net, torch.rand(2, 1, 8, 8, 8), "0", "1", "2", "3")) == {Layout("channels_first")}


def test_attention_of_torch_gives_tokens():
    net = nn.Sequential(nn.Linear(5, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3))
    block = Layout("tokens", before="1.norm2")
    assert layouts(net, torch.rand(2, 7, 5), "0", "1", "2") == [Layout("tokens"), block, Layout("tokens")]


class Attention(nn.Module):
    """Self-attention of tokens (N, B, C) in batched products, with the block around it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        N, B, C = x.shape
        heads = (part.reshape(N, 2 * B, C // 2).transpose(0, 1) for part in self.inner(self.norm(x)).chunk(3, -1))
        q, k, v = heads
        attended = torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), -1), v)
        return self.outer(attended.transpose(0, 1).reshape(N, B, C)) + x


class SequenceFirst(nn.Module):
    """Input with the batch in front → tokens (N, B, C) → logits (B, 3), with the turn at different places."""

    def __init__(self, read: nn.Module, turned: str, *blocks: nn.Module) -> None:
        super().__init__()
        self.read, self.turned, self.blocks, self.head = read, turned, nn.ModuleList(blocks), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.turned == "before":
            x = self.read(x.transpose(0, 1))
        elif self.turned == "behind":
            x = self.read(x).transpose(0, 1)
        else:
            x = self.read(x).flatten(2).permute(2, 0, 1)
        for block in self.blocks:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.head(x.transpose(0, 1).mean(1))


def blocks_of_torch() -> list[nn.Module]:
    return [nn.TransformerEncoderLayer(WIDTH, 2, 8, 0.0, norm_first=True) for _ in range(2)]


WORDS, FRAMES = torch.randint(10, (3, 7)), torch.rand(3, 7, 5)
SEQUENCES_FIRST = {
    "words, turned before they are looked up": ("before", nn.Embedding(10, WIDTH), blocks_of_torch, WORDS),
    "words": ("behind", nn.Embedding(10, WIDTH), blocks_of_torch, WORDS),
    "frames, turned before": ("before", nn.Linear(5, WIDTH), blocks_of_torch, FRAMES),
    "frames": ("behind", nn.Linear(5, WIDTH), blocks_of_torch, FRAMES),
    "of one row": ("behind", nn.Linear(5, WIDTH), blocks_of_torch, FRAMES[:1]),
    "as many rows as tokens": ("behind", nn.Linear(5, WIDTH), blocks_of_torch, torch.rand(7, 7, 5)),
    "own attention": ("behind", nn.Linear(5, WIDTH), lambda: [Attention(WIDTH), Attention(WIDTH)], FRAMES),
    "lstm": ("before", nn.Linear(5, WIDTH), lambda: [nn.LSTM(WIDTH, WIDTH), nn.LSTM(WIDTH, WIDTH)], FRAMES),
    "gru": ("behind", nn.Linear(5, WIDTH), lambda: [nn.GRU(WIDTH, WIDTH), nn.GRU(WIDTH, WIDTH)], FRAMES),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", SEQUENCES_FIRST)
def test_a_batch_that_is_second_is_followed(case: str, dtype: torch.dtype):
    # float64: there torch makes recurrent nets of single steps, which are stacked.
    turned, read, blocks, example = SEQUENCES_FIRST[case]
    net = SequenceFirst(read, turned, *blocks()).to(dtype)
    given = example.to(dtype) if example.is_floating_point() else example
    found = pair(net, net, given)
    assert list(found.student_layers) == ["blocks.0", "blocks.1"]
    expected = Layout("tokens", batch_first=False)
    assert [p.student_layout for p in found] == [expected] * 2


@pytest.mark.parametrize("batch", [1, 2])
def test_a_grid_of_tokens_whose_batch_is_second(batch: int):
    net = SequenceFirst(nn.Conv2d(3, WIDTH, 4, 4), "grid", *blocks_of_torch())
    found = layouts(net, torch.rand(batch, 3, 8, 20), "read", "blocks.0", "blocks.1")
    assert found == [Layout("channels_first"), *[Layout("tokens", 0, (2, 5), batch_first=False)] * 2]


def test_a_class_token_in_front_of_a_sequence():
    class Clip(Patches):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).flatten(2).permute(2, 0, 1)
            x = torch.cat([self.front.transpose(0, 1).expand(-1, x.shape[1], -1), x])
            x = x + self.blocks(x)
            return self.patches_only(x[1:])

    found = layouts(Clip(1), torch.rand(2, 3, 8, 20), "blocks", "patches_only")
    assert found == [Layout("tokens", prefix, (2, 5), batch_first=False) for prefix in (1, 0)]
