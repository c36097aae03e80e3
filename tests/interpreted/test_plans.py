"""How the host divides the work of the attention kernels: read off the tables and grids that reach the driver."""

import math

import pytest
import torch
from cases import CASES, build
from standin import on_cuda, words
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lwkd.kernels import spec

FIELDS = ("stride", "rows", "columns", "chunk", "chunks", "blocks", "positions", "offset")
LARGEST_TILE = 65536


@pytest.fixture(autouse=True)
def recording(driver):
    """Nothing is run: the sizes may be those of real nets."""
    driver.interpreting(False)


def tile_launches(driver):
    """Per launch of the tile kernel: its constants, its rows, their running totals of programs, and its grid."""
    for launch in driver.launches:
        if launch.kernel == "attention_tiles_fwd":
            names = [parameter.name for parameter in spec.parse(launch.variant).parameters]
            given = dict(zip(names, launch.parameters, strict=False))
            count = int.from_bytes(given["n_rows"], "little")
            flat = words(given["table_ptr"], count * len(FIELDS))
            rows = [dict(zip(FIELDS, flat[i : i + 8], strict=True)) for i in range(0, len(flat), 8)]
            yield spec.parse(launch.variant).setting, rows, words(given["ends_ptr"], count), launch.grid[0]


class Allocations(TorchDispatchMode):
    """All memory that torch is asked for."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.made += (
            [StorageWeakRef(result.untyped_storage())] if function is torch.ops.aten.empty.memory_format else []
        )
        return result


def compare(student, teacher):
    on_cuda("attention_divergence", student, teacher, "features", 2.0, "jsd", (0.5, 0.5), True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tiles_cover_every_element_once(case, dtype, driver):
    student, teacher = build(case, dtype)
    compare(student, teacher)
    elements, ends_of_maps = [], []
    for setting, rows, ends, grid in tile_launches(driver):
        last = setting["CHANNELS_LAST"]
        # An unaligned launch steps half as far along the channels; chunks are the same.
        step = {0: (16, 8), 1: (128 // dtype.itemsize, 64 // dtype.itemsize)}[last]
        for row, end, start in zip(rows, ends, (0, *ends), strict=False):
            summed, kept = (row["columns"], row["rows"]) if last else (row["rows"], row["columns"])
            tile = 2048 // (128 // dtype.itemsize) if last else 128
            assert (row["chunks"] - 1) * row["chunk"] < summed <= row["chunks"] * row["chunk"]
            assert (row["blocks"] - 1) * tile < kept <= row["blocks"] * tile
            assert row["chunk"] % step[0] == row["chunk"] % step[1] == 0
            samples = (end - start) // (row["chunks"] * row["blocks"])
            assert end - start == samples * row["chunks"] * row["blocks"]
            elements.append(samples * row["rows"] * row["columns"])
            ends_of_maps.append((row["offset"], row["offset"] + samples * row["chunks"] * kept))
            if setting["ALIGNED"]:
                vector = 16 // dtype.itemsize
                assert row["columns"] % vector == row["stride"] % vector == row["chunk"] % vector == 0
        assert ends[-1] == grid
    assert sorted(elements) == sorted(f.numel() for f in [*student, *teacher])
    # Partial maps lie one behind the other.
    ends_of_maps.sort()
    assert [begin for begin, _ in ends_of_maps] == [0, *(end for _, end in ends_of_maps[:-1])]


def test_launches_do_not_grow_with_the_layers(driver):
    wide, odd = torch.empty(1, 64, 28, 28), torch.empty(1, 3, 7, 7)
    for layers in (1, 64, 512):
        driver.clear()
        compare([wide] * layers, [wide] * layers)
        assert len(list(tile_launches(driver))) == 1
        driver.clear()
        compare([wide, odd] * (layers // 2 + 1), [odd, wide] * (layers // 2 + 1))
        assert len(list(tile_launches(driver))) == 2


def test_large_features_are_cut_into_similar_tiles(driver):
    stages = [(64, 56), (128, 28), (256, 14), (512, 7)]
    student, teacher = ([torch.empty(8, c * width, side, side) for c, side in stages] for width in (1, 4))
    compare(student, teacher)
    ((setting, rows, _, grid),) = tile_launches(driver)
    assert setting["ALIGNED"] == 1
    assert max(row["chunk"] * 128 * 4 for row in rows) <= LARGEST_TILE
    # The largest maps come first, so that no long program is left to the end.
    assert [row["positions"] for row in rows] == sorted((row["positions"] for row in rows), reverse=True)
    read = sum(f.numel() * 4 for f in [*student, *teacher])
    assert 4096 < read / grid < LARGEST_TILE


def test_a_small_batch_is_read_back_in_few_parts(driver):
    """Every cut along the channels, and every channel of a folded row, is a partial map that one program adds up."""
    stages = [(1, c, side, side) for c, side in [(64, 56), (512, 14), (2048, 7), (2048, 2), (1024, 3)]]
    for dtype in (torch.float32, torch.bfloat16):
        driver.clear()
        features = [torch.empty(shape, dtype=dtype) for shape in stages]
        compare(features, features)
        (launch,) = [launch for launch in driver.launches if launch.kernel == "attention_divergence_fwd"]
        fields = words(launch.parameters[1], 11 * len(stages))
        partials = [fields[11 * layer + 1] for layer in range(len(stages))]
        assert max(partials) == 16, partials
        assert len(list(tile_launches(driver))) <= 2


def test_large_maps_are_split(driver):
    """Up to 4,096 positions two launches; beyond that, programs of 2,048 positions and a launch after every sum."""
    small, whole, large = torch.empty(3, 2, 8, 8), torch.empty(3, 2, 64, 64), torch.empty(3, 2, 112, 112)
    compare([small, whole], [small, whole])
    assert [launch.grid[0] for launch in driver.launches[1:]] == [6]
    for kind, phases in (("jsd", "sums distances factors"), ("l2", "sums norms distances factors")):
        for layers in (1, 20):
            driver.clear()
            on_cuda("attention_divergence", *2 * [[small, large] * layers], "features", 2.0, kind, (0.5, 0.5), True)
            second = [launch for launch in driver.launches if launch.kernel == "attention_divergence_fwd"]
            assert [spec.parse(launch.variant).setting["PHASE"] for launch in second] == phases.split()
            assert {launch.grid[0] for launch in second} == {3 * (1 + 7) * layers}
    for backward in (False, True):
        driver.clear()
        maps = [torch.empty(3, 64), torch.empty(3, 112 * 112)]
        given = [small, large], [], 2.0, [8, 8, 112, 112]
        if backward:
            on_cuda("attention_maps_backward", maps, [], *given, maps, torch.empty(6, 1))
        else:
            on_cuda("attention_maps", *given)
        second = [launch for launch in driver.launches if launch.kernel.startswith("attention_maps")]
        assert [spec.parse(launch.variant).setting["PHASE"] for launch in second] == ["sums", "rest"]
        if backward:  # goes on from what forward returned: features are read for their gradients only
            assert {launch.kernel for launch in driver.launches} == {"attention_maps_bwd", "attention_tiles_bwd"}
        assert {launch.grid[0] for launch in second} == {3 * (1 + 7)}


@pytest.mark.parametrize(
    ("channels", "positions", "dtype", "fold"),
    [
        (64, 49, torch.float32, 4),
        (64, 49, torch.bfloat16, 8),
        (64, 196, torch.float32, 1),
        (64, 16, torch.float32, 8),
        (64, 4, torch.float32, 16),
        (3, 49, torch.float32, 1),
        (6, 49, torch.float32, 2),
    ],
)
def test_fold(channels, positions, dtype, fold, driver):
    """Channels laid side by side, until rows fill a tile and 16 bytes divide them."""
    feature = torch.empty(2, channels, positions, dtype=dtype)
    compare([feature], [feature])
    ((setting, rows, _, _),) = tile_launches(driver)
    assert {row["columns"] for row in rows} == {fold * positions}
    assert setting["ALIGNED"] == (fold * positions % (16 // dtype.itemsize) == 0)


@pytest.mark.parametrize(
    ("view", "channels_last", "in_place"),
    [
        (lambda t: t, 0, True),
        (lambda t: t.to(memory_format=torch.channels_last), 1, True),
        (lambda t: t[::2], 0, True),
        (lambda t: t[:1].expand(3, -1, -1, -1), 0, True),
        (lambda t: t.transpose(2, 3), 0, False),
        (lambda t: t[:, ::2], 0, False),
        (lambda t: t[..., :1, :1].contiguous(), 1, True),
        (lambda t: t[:, :1].contiguous(), 0, True),
    ],
)
def test_memory_orders(view, channels_last, in_place, driver):
    feature = view(torch.zeros(4, 6, 4, 5))
    compare([feature], [feature])
    (launch,) = [launch for launch in driver.launches if launch.kernel == "attention_tiles_fwd"]
    assert f"CHANNELS_LAST={channels_last}" in launch.variant
    assert (words(launch.parameters[0], 1) == [feature.data_ptr()]) == in_place


@pytest.mark.parametrize("divergence", ["features", "probabilities"])
def test_one_program_a_distance(divergence, driver):
    feature = torch.empty(3, 2, 9, 9)
    on_cuda("attention_divergence", [feature], [feature], divergence, 2.0, "jsd", (0.5, 0.5), False)
    assert driver.launches[-1].kernel == "attention_divergence_fwd"
    assert driver.launches[-1].grid[0] == (3 if divergence == "features" else 27)


@pytest.mark.parametrize(
    ("elements", "programs"), [(1, 1), (128, 1), (129, 2), (512, 4), (128 * 512 + 1, 5), (3 * 128 * 512, 12)]
)
def test_programs_of_a_probe(elements, programs, driver):
    on_cuda("rademacher", [torch.empty(elements)], 1)
    assert driver.launches[-1].grid[0] == programs


def channels_last(tensor):
    return tensor.reshape(2, 3, 4, -1).contiguous(memory_format=torch.channels_last)


def gaps(tensor):
    return tensor.repeat_interleave(2, 1)[:, ::2]


@pytest.mark.parametrize(
    ("view_a", "view_b", "copies"),
    [
        (torch.t, torch.t, 0),
        (channels_last, channels_last, 0),
        (lambda t: t[None, 2:], lambda t: t[None, 2:], 0),
        (lambda t: t, lambda t: t.t().contiguous().t(), 1),
        (lambda t: t.reshape(2, 3, 4, -1), channels_last, 1),
        (gaps, lambda t: t.t().contiguous().t(), 1),
        (gaps, gaps, 2),
        (lambda t: t[:1].expand(6, -1), lambda t: t[:1].expand(6, -1), 2),
    ],
)
def test_derivatives_that_are_copied(view_a, view_b, copies, driver):
    """Where a pair is read in place, the table holds its addresses; else those of copies."""
    a, b = view_a(torch.zeros(24, 50)), view_b(torch.zeros(24, 50))
    on_cuda("jacobian_sums", [a], [b])
    read_a, read_b = words(driver.launches[0].parameters[0], 2)
    assert (read_a != a.data_ptr()) + (read_b != b.data_ptr()) == copies


def test_chunks_of_derivatives(driver):
    sizes = [1, 8192, 8193, 0, 100_000]
    pairs = [torch.empty(size) for size in sizes]
    on_cuda("jacobian_sums", pairs, pairs)
    chunks, layers = driver.launches
    assert chunks.grid[0] == sum(math.ceil(size / 8192) for size in sizes)
    assert layers.grid[0] == len(sizes)


def test_a_plan_keeps_nothing_of_torch(driver):
    """The pool of a CUDA graph's warm-up, or one of the user's, must not hold what lives on after the call."""
    sizes = [(2, 5, 11, 13), (2, 3, 7, 9)]
    compare(*[[torch.empty(4, 4, 4, 4)]] * 2)  # once for all: pinned memory for captures
    driver.clear()
    with Allocations() as allocations:
        compare([torch.empty(size) for size in sizes], [torch.empty(size) for size in sizes[::-1]])
    assert len(allocations.made) > 4
    assert all(memory.expired() for memory in allocations.made)
    assert all(kept for launch in driver.launches for kept in driver.kept(launch))


def test_more_shapes_than_plans_are_kept_for(driver):
    """Tables of plans that were dropped are overwritten by later ones; nothing more is asked of the driver."""
    asked = []
    for _ in range(3):
        for side in range(2, 90):
            compare([torch.empty(1, 1, side, 1)], [torch.empty(1, 1, side, 1)])
            table = words(driver.launches[-2].parameters[1], len(FIELDS))
            assert dict(zip(FIELDS, table, strict=True))["positions"] == side
        asked.append(driver.calls("cuMemAlloc_v2"))
    assert asked[-1] == asked[0] <= 1


def test_memory_is_asked_for_while_another_thread_captures(driver):
    """The driver refuses it then, unless told that it is safe. What it refuses for want of memory is said."""
    layers = [torch.empty(1)] * 30_000  # a table larger than what is left
    driver.library.standin_set_captured_elsewhere(1)
    driver.fail("cuMemAlloc_v2", 2)
    with pytest.raises(RuntimeError, match=r"asking for \d+ bytes on device 0, besides .*empty_cache.*STAND_IN .2.,"):
        on_cuda("rademacher", layers, 1)
    driver.fail("", 0)
    on_cuda("rademacher", layers, 1)
    assert all(driver.kept(driver.launches[-1]))
