"""Which of the student's crucial layers goes with which of the teacher's."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lwkd.nets.layout import Layout
from lwkd.pairing.assignment import match_layers
from lwkd.pairing.crucial_layers import MapLayer
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
