"""Which layers of a net are crucial."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lwkd.pairing.crucial_layers import TracedNet
from lwkd.pairing.tracing import trace


def crucial(net: nn.Module, example: Tensor, role: str = "student") -> list[str]:
    return [
        layer.call.name for layer in TracedNet(net, trace(net, role, example)).crucial_layers(bare=role == "student")
    ]


class Block(nn.Module):
    """Expands, strides, projects; with a residual path only where the shape stays."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(width, 3 * width, 1)
        self.stride = nn.Conv2d(3 * width, 3 * width, 3, stride, 1)
        self.project = nn.Conv2d(3 * width, out, 1)
        self.residual = stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.stride(self.expand(x)))
        return x + y if self.residual else y


def test_insides_of_blocks_do_not_count_with_or_without_a_residual_path():
    net = nn.Sequential(Block(3, 4, 2), Block(4, 4, 1), Block(4, 8, 2), Block(8, 8, 1))
    assert crucial(net, torch.rand(1, 3, 16, 16)) == ["1", "3"]


def test_the_stem_before_blocks_is_left_out_of_the_student():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2), Block(4, 4, 1), Block(4, 8, 2))
    assert crucial(net, torch.rand(1, 3, 32, 32)) == ["3", "4"]
    assert crucial(net, torch.rand(1, 3, 32, 32), "teacher") == ["1", "3", "4"]


def test_a_stem_stays_where_little_else_would():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2), Block(4, 4, 1))
    assert crucial(net, torch.rand(1, 3, 16, 16)) == ["1", "3"]


def test_blocks_of_a_net_of_one_shape():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 4, 4), *(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)) for _ in range(3))
    )
    assert crucial(net, torch.rand(1, 3, 16, 16)) == ["1", "2", "3"]


class UNet(nn.Module):
    """One skip connection around everything but the ends."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down, self.up = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 2, 2), nn.ConvTranspose2d(8, 4, 2, 2)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(torch.cat([x, self.up(self.down(x))], 1))


def test_long_skips_do_not_count_as_paths():
    assert crucial(UNet(), torch.rand(1, 3, 8, 8)) == ["first", "down", "up", "last"]


def test_containers_are_no_blocks():
    def half(width: int, out: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(width, out, 1), nn.MaxPool2d(2), nn.Conv2d(out, out, 1), nn.MaxPool2d(2))

    assert crucial(nn.Sequential(half(3, 4), half(4, 8)), torch.rand(1, 3, 32, 32)) == ["0.0", "0.2", "1.0", "1.2"]


class Chain(nn.Module):
    """Holds the rest of the net in itself."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(widths[0], widths[1], 2, 2)
        self.rest = Chain(*widths[1:]) if len(widths) > 2 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.conv(x))


def test_a_class_that_holds_itself_is_no_block():
    assert crucial(Chain(3, 4, 5, 6), torch.rand(1, 3, 16, 16)) == ["conv", "rest.conv", "rest.rest"]


def test_stages_of_tokens_give_all_their_blocks():
    def blocks(width: int) -> list[nn.Module]:
        return [nn.TransformerEncoderLayer(width, 2, width, batch_first=True) for _ in range(2)]

    net = nn.Sequential(nn.Linear(5, 4), *blocks(4), nn.Linear(4, 8), *blocks(8))
    assert crucial(net, torch.rand(1, 6, 5)) == ["1", "2", "4", "5"]
