"""How the attention kernels' work is planned: every element once, in a constant number of launches."""

import math

import pytest
import torch
from cases import CASES, build

from lwkd.kernels import attention_memory, attention_plan
from lwkd.kernels.attention_memory import Geometry, geometry, memory_order
from lwkd.kernels.attention_plan import plan_divergence, plan_resize, plan_tiles, tile_shape


def readable(case, dtype=torch.float32):
    student, teacher = build(case, dtype)
    return attention_memory.readable([*student, *teacher], "the feature")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tiles_cover_every_element_once(case, dtype):
    _, geometries = readable(case, dtype)
    plan = plan_tiles(geometries)
    seen = sorted(index for group in plan.groups for index in group.features)
    assert seen == list(range(len(geometries)))
    for group in plan.groups:
        tile_rows, tile_columns = tile_shape(group.dtype, group.channels_last, True)
        narrow_rows, narrow_columns = tile_shape(group.dtype, group.channels_last, False)
        starts = (0, *group.ends)
        for row, (index, fields) in enumerate(zip(group.features, group.table, strict=True)):
            g = geometries[index]
            stride, height, width, chunk, chunks, blocks, positions, _ = fields
            assert (stride, positions) == (g.sample_stride, g.positions)
            assert height * width == g.channels * g.positions
            summed, kept = (width, height) if group.channels_last else (height, width)
            assert (chunks - 1) * chunk < summed <= chunks * chunk
            kept_tile = tile_rows if group.channels_last else tile_columns
            assert (blocks - 1) * kept_tile < kept <= blocks * kept_tile
            # Both variants step through whole chunks, and hints on the chunk hold.
            assert chunk % (tile_columns if group.channels_last else tile_rows) == 0
            assert chunk % (narrow_columns if group.channels_last else narrow_rows) == 0
            assert group.ends[row] - starts[row] == g.samples * chunks * blocks
            assert plan.places[index].partials == chunks * kept // g.positions
            if group.wide:
                assert width % g.vector == stride % g.vector == chunk % g.vector == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_partial_and_resized_maps_do_not_overlap(case):
    student, teacher = build(case)
    _, geometries = readable(case)
    tiles = plan_tiles(geometries)
    sizes = [tuple(map(min, zip(s.shape[2:], t.shape[2:], strict=True))) for s, t in zip(student, teacher, strict=True)]
    resizing = plan_resize(geometries, tiles, [*sizes, *sizes])
    spans = [(p.offset, p.partials * g.samples * g.positions) for p, g in zip(tiles.places, geometries, strict=True)]
    spans += [
        (row[8], geometries[i].samples * math.prod(row[5:8]))
        for i, row in zip(resizing.features, resizing.table, strict=True)
    ]
    assert sorted(spans)[0][0] == 0
    ends = [offset + length for offset, length in sorted(spans)]
    assert [offset for offset, _ in sorted(spans)[1:]] == ends[:-1]
    assert ends[-1] == resizing.length
    plan = plan_divergence(geometries[: len(student)], geometries[len(student) :], resizing.places, "features")
    assert plan.ends[-1] == sum(feature.shape[0] for feature in student)


def test_launches_do_not_grow_with_the_layers():
    layer = Geometry(8, 64, (28, 28), torch.float32, False, 64 * 784)
    odd = Geometry(8, 3, (7, 7), torch.float32, False, 147)
    for layers in (1, 64, 512):
        assert len(plan_tiles([layer] * layers).groups) == 1
        assert len(plan_tiles([layer, odd] * layers).groups) == 2


def test_large_features_are_cut_into_similar_tiles():
    stages = [(64, 56), (128, 28), (256, 14), (512, 7)]
    features = [
        Geometry(64, channels * width, (side, side), torch.float32, False, channels * width * side * side)
        for width in (1, 4)
        for channels, side in stages
    ]
    (group,) = plan_tiles(features).groups
    assert group.wide
    sizes = [row[3] * 128 * 4 for row in group.table]
    assert max(sizes) <= attention_plan.LARGEST_TILE
    # The largest maps come first, so that no long program is left to the end.
    assert [row[6] for row in group.table] == sorted((row[6] for row in group.table), reverse=True)


@pytest.mark.parametrize(
    ("channels", "positions", "dtype", "fold"),
    [
        (64, 49, torch.float32, 4),
        (64, 49, torch.bfloat16, 8),
        (64, 196, torch.float32, 1),
        (64, 16, torch.float32, 8),
        (3, 49, torch.float32, 1),
        (6, 49, torch.float32, 2),
    ],
)
def test_fold(channels, positions, dtype, fold):
    g = Geometry(2, channels, (positions,), dtype, False, channels * positions)
    assert g.fold == fold
    assert g.wide == (fold * positions % g.vector == 0)


def test_memory_order():
    feature = torch.zeros(2, 6, 4, 5)
    assert memory_order(feature) == "channels_first"
    assert memory_order(feature.to(memory_format=torch.channels_last)) == "channels_last"
    assert memory_order(feature[::2]) == "channels_first"
    assert memory_order(feature.expand(2, 6, 4, 5)) == "channels_first"
    assert memory_order(feature.transpose(2, 3)) == "other"
    assert memory_order(feature[:, ::2]) == "other"
    assert memory_order(torch.zeros(2, 6, 1, 1)) == "channels_last"
    assert memory_order(torch.zeros(2, 1, 4, 5)) == "channels_first"


def test_only_other_orders_are_copied():
    for memory in ("contiguous", "channels_last", "offset", "transposed", "sliced"):
        case = next(case for case in CASES if case.memory == memory)
        features = build(case)[0]
        read, _ = attention_memory.readable(features, "the feature")
        in_place = [mine.data_ptr() == given.data_ptr() for mine, given in zip(read, features, strict=True)]
        assert all(in_place) == (memory in ("contiguous", "channels_last", "offset"))


def test_gradients_keep_the_memory_order():
    feature = torch.zeros(2, 11, 6)[:, 1:].transpose(1, 2)
    g = geometry(feature)
    (gradient,) = attention_memory.gradients_like([feature], [g])
    assert gradient.shape == feature.shape
    assert memory_order(gradient) == "channels_last"
    assert gradient.stride(0) == 60
