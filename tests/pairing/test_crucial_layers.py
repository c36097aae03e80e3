from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lwkd.nets.layout import Layout
from lwkd.pairing.assignment import match
from lwkd.pairing.crucial_layers import Layer, Net
from lwkd.pairing.tracing import Call, trace

SIZES = st.lists(st.sampled_from([(16, 16), (8, 8), (7, 7), (4, 4), (9,)]), max_size=7)


def layers(sizes: list[tuple[int, ...]]) -> list[Layer]:
    return [
        Layer(Call(str(i), nn.Identity(), i, shape=(1, 2, *s)), Layout("channels_first")) for i, s in enumerate(sizes)
    ]


def indices(students: list[tuple[int, ...]], teachers: list[tuple[int, ...]]) -> list[tuple[int, int]]:
    return [(int(s.call.name), int(t.call.name)) for s, t in match(layers(students), layers(teachers))]


@settings(max_examples=200, deadline=None)
@given(SIZES, SIZES)
def test_matching_is_monotone_and_respects_size(students, teachers):
    found = indices(students, teachers)
    for (s, t), (s_next, t_next) in pairwise(found):
        assert s < s_next
        assert t < t_next
    for s, t in found:
        assert students[s] == teachers[t] or (students[s] not in teachers and teachers[t] not in students)
        assert len(students[s]) == len(teachers[t])
    comparable = {len(s) for s in students} & {len(t) for t in teachers}
    assert bool(found) == bool(set(students) & set(teachers)) or comparable


@settings(max_examples=50, deadline=None)
@given(SIZES)
def test_a_net_matches_itself(sizes):
    assert indices(sizes, sizes) == [(i, i) for i in range(len(sizes))]


def test_one_layer_takes_the_deepest_of_equal_size():
    assert indices([(8, 8)], [(16, 16), (8, 8), (8, 8), (8, 8), (4, 4)]) == [(0, 3)]


def test_layers_of_one_size_go_by_relative_depth():
    assert indices([(9,)] * 4, [(9,)] * 12) == [(0, 2), (1, 5), (2, 8), (3, 11)]
    assert indices([(9,)] * 12, [(9,)] * 4) == [(2, 0), (5, 1), (8, 2), (11, 3)]
    assert indices([(7, 7)] * 2, [(14, 14)] * 4) == [(0, 1), (1, 3)]


def test_unequal_sizes_go_to_the_nearest():
    assert indices([(15, 15), (7, 7), (3, 3)], [(32, 32), (16, 16), (8, 8), (4, 4)]) == [(0, 1), (1, 2), (2, 3)]


def crucial(net: nn.Module, example: Tensor, role: str = "student") -> list[str]:
    return [layer.call.name for layer in Net(net, trace(net, role, example)).crucial_layers()]


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


def test_what_a_skip_connection_jumps_over_is_not_crucial():
    assert crucial(UNet(), torch.rand(1, 3, 8, 8)) == ["first", "last"]


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
