"""Where the graph hides an axis or says two things: pools on other dimensions, loops over time, folded batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lwkd
from lwkd.nets.layout import Layout
from lwkd.pairing import PairingError, pair


def layout(net: nn.Module, example: Any, layer: str) -> Layout:
    return pair(net, net, example, layers={layer: layer}).pairs[0].student_layout


class PooledFrequencies(nn.Module):
    """(B, T, F, C) in and out, pooled along F by a pool over the last two dimensions of a transposed view."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(before, after, 3, padding=1), nn.MaxPool2d((1, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.permute(0, 3, 1, 2)).relu().permute(0, 2, 3, 1)
        return self.pool(x.transpose(-1, 2)).transpose(-1, 2)


def test_a_pool_keeps_the_channels_that_are_known():
    net = nn.Sequential(PooledFrequencies(1, 4), PooledFrequencies(4, 8))
    assert layout(net, torch.rand(3, 20, 16, 1), "0") == Layout("channels_last")
    assert layout(net, torch.rand(3, 20, 16, 1), "1") == Layout("channels_last")


class Steps(nn.Module):
    """A recurrent cell, step by step; its outputs are stacked at a dimension."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.cell, self.dim = nn.GRUCell(6, width), dim

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.cell.hidden_size)
        steps = []
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            steps.append(h)
        return torch.stack(steps, self.dim)


@pytest.mark.parametrize(("dim", "expected"), [(1, Layout("tokens")), (2, Layout("channels_first"))])
def test_steps_of_a_loop_are_positions(dim: int, expected: Layout):
    assert layout(nn.Sequential(Steps(8, dim)), torch.rand(4, 9, 6), "0") == expected


class MeanAndDeviation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x.mean(2), x.std(2)], 2).repeat_interleave(2, 2)


@pytest.mark.parametrize("reader", [nn.Conv1d(8, 5, 2), nn.BatchNorm1d(8)], ids=["convolution", "batch norm"])
def test_a_layer_that_reads_an_output_shows_its_channels(reader: nn.Module):
    net = nn.Sequential(nn.Conv1d(6, 8, 3), nn.ReLU(), MeanAndDeviation(), nn.Identity(), reader)
    assert layout(net, torch.rand(4, 6, 9), "2") == Layout("channels_first")


class Lines(nn.Module):
    """Text in a picture: convolutions, then recurrent layers along the columns."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d((8, 2)))
        self.first = kind(4, 4, batch_first=True, bidirectional=True)
        self.second = kind(8, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        columns = self.conv(x).mean(2).transpose(1, 2)
        return self.second(self.first(columns)[0])[0].mean(1)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("columns", [16, 24])
def test_steps_of_a_recurrent_layer_are_no_picture(kind: type[nn.RNNBase], columns: int):
    for layer in ("first", "second"):
        assert layout(Lines(kind), torch.rand(2, 1, 8, 2 * columns), layer) == Layout("tokens")


class OverTime(nn.Module):
    """A module applied at every time of (T, B, ...)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def test_two_dimensions_in_front_of_the_channels_have_no_layout():
    net = nn.Sequential(OverTime(nn.Conv2d(3, 4, 3)), OverTime(nn.Flatten()))
    with pytest.raises(PairingError, match=r"'0' gives shape .*, which is not a map of more than one position over"):
        layout(net, torch.rand(3, 2, 3, 16, 16), "0")


class Unit(nn.Module):
    """A residual block of instance norms: no map in it is made smaller and larger again."""

    def __init__(self, before: int, after: int, stride: int = 2) -> None:
        super().__init__()
        self.short = nn.Conv2d(before, after, 1, stride)
        parts = [nn.Conv2d(before, after, 3, stride, 1), nn.InstanceNorm2d(after), nn.ReLU()]
        for _ in range(2):
            parts += [nn.Conv2d(after, after, 3, padding=1), nn.InstanceNorm2d(after), nn.ReLU()]
        self.long = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.short(x) + self.long(x)


class Skipped(nn.Module):
    """A U-Net of such blocks, with two long skips."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.deep, self.deeper = Unit(1, width), Unit(width, 2 * width), Unit(2 * width, 4 * width)
        self.up = nn.Sequential(nn.ConvTranspose2d(4 * width, width, 2, 2), nn.InstanceNorm2d(width), nn.ReLU())
        self.joined = Unit(3 * width, width, 1)
        self.last = nn.Sequential(nn.ConvTranspose2d(width, width, 2, 2), nn.InstanceNorm2d(width), nn.ReLU())
        self.end = Unit(2 * width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down(x)
        second = self.deep(first)
        x = self.joined(torch.cat([second, self.up(self.deeper(second))], 1))
        return self.end(torch.cat([first, self.last(x)], 1))


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_instance_norms_do_not_shrink_a_map(batch: int):
    found = pair(Skipped(4), Skipped(8), torch.rand(batch, 1, 32, 32)).names
    assert found == ("down", "deep", "deeper", "joined", "last", "end")


class Rearranged(nn.Module):
    """Ends in a layer norm, behind which the output is only put in another order."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.norm, self.how = nn.Linear(6, 8), nn.LayerNorm(8), how

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.linear(x))
        return {
            "slice": lambda: x[:, 1:],
            "channels first": lambda: x.transpose(1, 2),
            "contiguous": lambda: x.transpose(0, 1).contiguous().transpose(0, 1),
        }[self.how]()


@pytest.mark.parametrize("how", ["slice", "channels first", "contiguous"])
def test_a_map_behind_a_norm_is_flat_in_whatever_order(how: str):
    net = nn.Sequential(Rearranged(how), nn.Flatten(), nn.LazyLinear(3))
    x = torch.rand(2, 9, 6)
    net(x)
    with pytest.raises(PairingError, match="'0' ends in a layer norm"):
        pair(net, net, x, layers={"0": "0"})
    assert pair(net, net, x).names == ("0.norm",)


class FromPatches(nn.Module):
    """Its first norm reads the picture itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))  # without dimensions
        self.patches = nn.Sequential(nn.Unflatten(2, (4, 4)), nn.Flatten(2), nn.LayerNorm(16), nn.Linear(16, width))
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.patches(x) * self.scale.unsqueeze(0)).mean(1)


def test_what_the_net_is_called_with_is_no_layer():
    student, teacher, x = FromPatches(6), FromPatches(8), torch.rand(2, 9, 16)
    assert pair(student, teacher, x).names == ("blocks.0", "blocks.1", "blocks.2")
    for layer in ("patches.1", "patches.2"):
        with pytest.raises(PairingError, match=f"'{layer}' gives what the net was called with"):
            pair(student, teacher, x, layers={layer: layer})


def test_nested_tensors_inside_of_a_net_are_left_out():
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv1d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).transpose(1, 2)
            nested = torch.nested.as_nested_tensor(list(x), layout=torch.jagged)
            return torch.stack([one.mean(0) for one in self.linear(nested).unbind()])

    assert lwkd.pair(Nested(), Nested(), torch.rand(2, 3, 9)).names == ("conv",)
