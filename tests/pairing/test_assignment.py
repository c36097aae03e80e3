"""Which of the student's crucial layers goes with which of the teacher's."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lwkd.nets.layout import Layout
from lwkd.pairing.assignment import match_layers, match_stages
from lwkd.pairing.blocks import MapLayer
from lwkd.pairing.tracing import Call

SIZES = st.lists(st.sampled_from([(16, 16), (8, 8), (7, 7), (4, 4), (9,)]), max_size=7)


def layers(sizes: list[tuple[int, ...]]) -> list[MapLayer]:
    return [
        MapLayer(Call(str(i), nn.Identity(), i, shape=(1, 2, *s)), Layout("channels_first"))
        for i, s in enumerate(sizes)
    ]


def indices(students: list[tuple[int, ...]], teachers: list[tuple[int, ...]]) -> list[tuple[int, int]]:
    return [(int(s.call.name), int(t.call.name)) for s, t in match_layers(layers(students), layers(teachers))]


@settings(max_examples=200, deadline=None)
@given(SIZES, SIZES)
def test_matching_is_monotone_and_respects_size(students, teachers):
    found = indices(students, teachers)
    for (s, t), (s_next, t_next) in pairwise(found):
        assert s < s_next
        assert t < t_next
    for s, t in found:
        assert len(students[s]) == len(teachers[t])
    assert bool(found) == bool({len(s) for s in students} & {len(t) for t in teachers})


@settings(max_examples=200, deadline=None)
@given(SIZES, SIZES)
def test_nothing_is_left_out_without_need(students, teachers):
    """Between two pairs, no student layer of a size of its own is left beside a teacher layer of as many dimensions."""
    found = indices(students, teachers)
    for (s, t), (s_next, t_next) in pairwise([(-1, -1), *found]):
        left_S = {len(size) for size in students[s + 1 : s_next] if size not in teachers}
        left_T = {len(size) for size in teachers[t + 1 : t_next]}
        assert not left_S & left_T


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([(16, 16), (8, 8), (4, 4)]), min_size=1, max_size=6), st.data())
def test_the_last_map_of_both_nets_is_a_pair(students, data):
    teachers = data.draw(st.lists(st.sampled_from([(16, 16), (8, 8), (4, 4), (2, 2)]), min_size=1, max_size=6))
    for match in (match_layers, match_stages):
        s, t = match(layers(students), layers(teachers))[-1]
        assert (int(s.call.name), int(t.call.name)) == (len(students) - 1, len(teachers) - 1)


@settings(max_examples=50, deadline=None)
@given(SIZES)
def test_a_net_matches_itself(sizes):
    assert indices(sizes, sizes) == [(i, i) for i in range(len(sizes))]


def test_one_layer_takes_the_last_and_the_one_before_it_the_deepest_of_equal_size():
    assert indices([(8, 8)], [(16, 16), (8, 8), (8, 8), (8, 8), (4, 4)]) == [(0, 4)]
    assert indices([(8, 8), (4, 4)], [(16, 16), (8, 8), (8, 8), (8, 8), (4, 4)]) == [(0, 3), (1, 4)]


def test_layers_of_one_size_go_by_relative_depth():
    assert indices([(9,)] * 4, [(9,)] * 12) == [(0, 2), (1, 5), (2, 8), (3, 11)]
    assert indices([(9,)] * 12, [(9,)] * 4) == [(2, 0), (5, 1), (8, 2), (11, 3)]
    assert indices([(7, 7)] * 2, [(14, 14)] * 4) == [(0, 1), (1, 3)]


def test_unequal_sizes_go_to_the_nearest():
    assert indices([(15, 15), (7, 7), (3, 3)], [(32, 32), (16, 16), (8, 8), (4, 4)]) == [(0, 1), (1, 2), (2, 3)]


def test_what_equal_sizes_leave_is_filled_in():
    assert indices([(32, 32), (16, 16), (4, 4)], [(32, 32), (8, 8), (4, 4)]) == [(0, 0), (1, 1), (2, 2)]
    assert indices([(32, 32), (8, 8), (4, 4)], [(32, 32), (16, 16), (8, 8)]) == [(0, 0), (1, 1), (2, 2)]
    # No stage is left out here: its last layer has a partner of equal size.
    assert indices([(16, 16), (16, 16), (8, 8)], [(32, 32), (16, 16), (8, 8)]) == [(1, 1), (2, 2)]


def test_blocks_at_even_depths_stand_for_stages():
    blocks, stages = layers([(14, 14)] * 12), layers([(56, 56), (28, 28), (14, 14), (7, 7)])
    assert [int(b.call.name) for b, _ in match_stages(blocks, stages)] == [2, 5, 8, 11]
    assert [int(b.call.name) for _, b in match_stages(stages, blocks[:5])] == [0, 1, 2, 4]
    assert [int(s.call.name) for s, _ in match_stages(stages, blocks[:2])] == [1, 3]
