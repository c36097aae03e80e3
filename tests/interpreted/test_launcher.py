"""The launcher against the stand-in: what reaches the driver, byte for byte, and what is said when it is wrong."""

import struct
import threading

import pytest
import torch
from python_runs import python
from standin import HIDDEN, on_cuda, words

from lwkd import _C
from lwkd.kernels import spec


def features(layers=2, seed=0, channels=8):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, channels, 6, 6, generator=generator) for _ in range(layers)]


def divergence(student, teacher, factors=False):
    return on_cuda("attention_divergence", student, teacher, "features", 2.0, "jsd", (0.25, 0.75), factors)[0]


def test_two_launches_however_many_layers(driver):
    driver.interpreting(False)
    for layers in (1, 16, 64, 512):
        driver.clear()
        divergence(features(layers), features(layers, 1, 4), factors=True)
        assert [launch.kernel for launch in driver.launches] == ["attention_tiles_fwd", "attention_divergence_fwd"]


def test_arguments_byte_for_byte(driver):
    driver.interpreting(False)
    student, teacher = features(2), features(2, 1)
    divergence(student, teacher)
    tiles, distances = driver.launches
    variant = spec.parse(tiles.variant)
    assert [p.name for p in variant.parameters] == [
        *("addresses_ptr", "table_ptr", "ends_ptr", "partials_ptr", "n_rows", "power"),
    ]
    assert [len(value) for value in tiles.parameters] == [8, 8, 8, 8, 4, 4, *[8] * HIDDEN]
    assert tiles.parameters[4:6] == (struct.pack("<i", 4), struct.pack("<f", 2.0))
    assert tiles.parameters[6:] == (bytes(8),) * HIDDEN
    assert words(tiles.parameters[0], 4) == [f.data_ptr() for f in [*student, *teacher]]
    # Per tensor: sample stride, rows, columns, rows a chunk, chunks, blocks, N, offset of its partial maps. Eight
    # channels of 36 positions are folded into two rows of four channels each.
    assert words(tiles.parameters[1], 8) == [8 * 36, 2, 4 * 36, 16, 1, 2, 36, 0]
    assert words(tiles.parameters[2], 4) == [4, 8, 12, 16]
    assert tiles.grid == (16, 1, 1)
    assert tiles.block == (128, 1, 1)
    names = [p.name for p in spec.parse(distances.variant).parameters]
    found = dict(zip(names, distances.parameters, strict=False))
    assert found["partials_ptr"] == tiles.parameters[3]
    assert (found["beta_S"], found["beta_T"]) == (struct.pack("<f", 0.25), struct.pack("<f", 0.75))
    assert found["n_layers"] == struct.pack("<i", 2)
    assert distances.grid == (4, 1, 1)
    assert distances.block == (32, 1, 1)


def test_a_seed_has_64_bits(driver):
    driver.interpreting(False)
    on_cuda("rademacher", [torch.empty(5)], -(2**62) - 3)
    (launch,) = driver.launches
    assert launch.parameters[3] == struct.pack("<q", -(2**62) - 3)
    assert launch.block == (32, 1, 1)


def test_addresses_are_copied_only_when_a_tensor_moved(driver):
    student, teacher = features(), features(seed=1)
    first = divergence(student, teacher)
    again = divergence(student, teacher)
    assert torch.equal(first, again)
    moved = [f.clone() for f in student]
    assert torch.equal(divergence(moved, teacher), first)
    tables = {launch.parameters[1] for launch in driver.launches if launch.kernel == "attention_tiles_fwd"}
    assert len(tables) == 1, "the table of one shape stays where it is"
    assert not torch.equal(divergence([2 + f for f in student], teacher), first)


def test_shapes_that_alternate_keep_their_plans(driver):
    small, large = features(2), [torch.randn(3, 4, 9, 7) for _ in range(2)]
    expected = [divergence(small, small[::-1]), divergence(large, large[::-1])]
    for _ in range(3):
        assert torch.equal(divergence(small, small[::-1]), expected[0])
        assert torch.equal(divergence(large, large[::-1]), expected[1])
    tables = [launch.parameters[1] for launch in driver.launches if launch.kernel == "attention_tiles_fwd"]
    assert len(set(tables[4:])) == 2, "the first calls may have been one shape too many for plans of earlier tests"


def test_inference_mode_does_not_spoil_the_tables(driver):
    student, teacher = [torch.randn(2, 5, 4, 4)], [torch.randn(2, 3, 4, 4)]
    with torch.inference_mode():
        inside = divergence(student, teacher)
    assert torch.equal(divergence([f.clone() for f in student], teacher), inside)
    with torch.inference_mode():
        assert torch.equal(divergence(student, [f.clone() for f in teacher]), inside)


def test_unaligned_tensors_take_the_other_variant(driver):
    driver.interpreting(False)
    aligned = [torch.empty(2, 8, 6, 6)]
    divergence(aligned, aligned)
    divergence([torch.empty(2 * 8 * 36 + 1)[1:].view(2, 8, 6, 6)], aligned)
    tiles = [launch.variant for launch in driver.launches if launch.kernel == "attention_tiles_fwd"]
    assert ["ALIGNED=1" in variant for variant in tiles] == [True, False]


def test_a_kernel_is_loaded_once(driver):
    student = features(3, channels=24)
    for _ in range(3):
        divergence(student, student)
    assert len(driver.asked) == len(set(driver.asked))
    assert driver.calls("cuModuleLoadData") == len(driver.asked)


def test_a_graph_captures_tables_of_its_own(driver):
    student, teacher = features(), features(seed=1)
    expected = divergence(student, teacher)
    outside = driver.launches[0].parameters[1]
    driver.library.standin_set_capturing(1)
    captured = [divergence(student, teacher) for _ in range(2)]
    driver.library.standin_set_capturing(0)
    assert all(torch.equal(one, expected) for one in captured)
    inside = {launch.parameters[1] for launch in driver.launches[2:6:2]}
    assert outside not in inside
    assert not any(kept for launch in driver.launches[2:6] for kept in driver.kept(launch)), "they are the graph's own"
    assert torch.equal(divergence(student, teacher), expected)
    assert driver.launches[6].parameters[1] == outside


def test_nothing_is_loaded_while_a_graph_is_captured(driver):
    driver.library.standin_set_capturing(1)
    with pytest.raises(RuntimeError, match=r"rates_update_fwd .* is not loaded yet.*lwkd\.warmup\(device\)"):
        on_cuda(
            "update_rates",
            *(torch.ones(2, 1), *[torch.ones(2)] * 3, torch.zeros(2, dtype=torch.long), torch.ones(2, 1)),
            *("attention", "constant", 1.0, 0.5, [0.0, 1.0], True, 4.0, torch.zeros(1)),
        )


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("cuLaunchKernel", "launching kernel attention_tiles_fwd .* with 16 programs on device 0"),
        ("cuCtxGetCurrent", "asking for the current context"),
        ("cuStreamIsCapturing", "asking whether a graph is captured"),
    ],
)
def test_errors_of_the_driver(driver, function, said):
    student = features()
    expected = divergence(student, student)
    driver.fail(function, 700)
    with pytest.raises(RuntimeError, match=f"{said}.*CUDA_ERROR_ILLEGAL_ADDRESS .700., the stand-in was told to fail"):
        divergence(student, student)
    driver.clear()
    assert torch.equal(divergence(student, student), expected)


@pytest.mark.parametrize("function", ["cuModuleLoadData", "cuModuleGetFunction"])
def test_errors_of_loading(driver, function):
    """An error leaves nothing behind: the next call loads the kernel."""
    student = [torch.randn(1, 2, 70, 70)] if function == "cuModuleLoadData" else [torch.randn(1, 2, 30, 30)]
    driver.fail(function, 209)
    with pytest.raises(RuntimeError, match=r"of kernel attention_divergence_fwd .*CUDA_ERROR_STAND_IN \(209\)"):
        on_cuda("attention_divergence", student, student, "features", 2.0, "l2", (0.5, 0.5), False)
    driver.clear()
    on_cuda("attention_divergence", student, student, "features", 2.0, "l2", (0.5, 0.5), False)


@pytest.fixture
def images(driver):
    """Images that a test spoils; afterwards they are the stand-in's again."""

    def spoil(change):
        def find(variant, architecture):
            return change(*driver.find(variant, architecture))

        _C.set_image_provider(find)

    yield spoil
    _C.set_image_provider(driver.find)


def trace(dtype, aligned=True):
    """An op whose variants no other test of this file has loaded."""
    return on_cuda("hutchinson_trace", [torch.ones(40, dtype=dtype)[0 if aligned else 1 :]], [0], 1, 1)


def test_an_image_of_another_version(images):
    images(lambda image, entry, sizes, *rest: (image, entry, [8, 8, 8, 8, 4, 4], *rest))
    with pytest.raises(RuntimeError, match=r"hutchinson_trace_fwd .*argument 4 has 4 bytes in the image, 8 are given"):
        trace(torch.float32)


def test_an_image_with_other_parameters(images):
    images(lambda image, entry, sizes, *rest: (image, entry, sizes[1:], *rest))
    with pytest.raises(
        RuntimeError, match=r"its image takes 5 arguments, 6 are given. The image is of another version"
    ):
        trace(torch.float16)


def test_an_image_that_is_not_whole(images):
    images(lambda image, entry, sizes, hidden, shared, warps: (b"", entry, sizes, hidden, shared, warps))
    with pytest.raises(RuntimeError, match=r"the image of kernel hutchinson_trace_fwd .* is not whole: 0 bytes"):
        trace(torch.bfloat16)


def test_no_image(images):
    def none(*_):
        raise LookupError("there is none in this folder")

    images(none)
    with pytest.raises(
        RuntimeError, match=r"no image for kernel hutchinson_trace_fwd .*architecture 90.*in this folder"
    ):
        trace(torch.bfloat16)


def test_much_shared_memory_is_asked_for(images, driver):
    images(lambda image, entry, sizes, hidden, shared, warps: (image, entry, sizes, hidden, 100_000, warps))
    trace(torch.bfloat16)
    assert driver.calls("cuFuncSetAttribute") >= 1
    assert driver.launches[0].shared == 100_000


def test_a_thread_without_a_context_gets_one(driver):
    student = features()
    expected, found = divergence(student, student[::-1]), []
    thread = threading.Thread(target=lambda: found.append(divergence(student, student[::-1])))
    thread.start()
    thread.join()
    assert torch.equal(found[0], expected)
    assert driver.calls("cuDevicePrimaryCtxRetain") == 1


FORKS = """
import os, sys, torch
torch.version.cuda, torch.cuda._device_count_nvml = "13.0", lambda: 1
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
import lwkd
backend = lwkd.backend()
child = os.fork()
if child == 0:
    os._exit(lwkd._C.architecture(0))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), backend)
"""


def test_a_child_can_use_the_driver_after_backend(driver):
    """The driver works in no child of a process that has initialised it."""
    done = python("-c", FORKS, LWKD_CUDA_DRIVER=driver.library._name)
    assert done.stdout.startswith("90 C++ kernels"), (done.stdout, done.stderr)


def test_two_threads_do_not_share_a_table(driver):
    """Each with tensors of its own, of one shape: no call may see the other's addresses."""
    inputs = [(features(2, seed), features(2, seed + 100)) for seed in range(2)]
    expected = [divergence(*pair) for pair in inputs]
    wrong = []

    def run(index):
        for _ in range(8):
            if not torch.equal(divergence(*inputs[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_functions_belong_to_one_device(driver):
    """The same variant on two devices is loaded twice, in the context of each."""
    variant = "attention_resize_fwd BLOCK=256 num_warps=4"

    def load(device):
        driver.library.standin_drop_context()
        _C.load_kernel(variant, f"cpu:{device}")

    for device in (0, 1, 1):
        thread = threading.Thread(target=load, args=(device,))
        thread.start()
        thread.join()
    assert driver.asked.count((variant, 90)) == 2


def test_an_unknown_variant_names_the_nearest(driver):
    with pytest.raises(
        RuntimeError, match=r"no kernel variant is called .*the nearest is 'attention_resize_fwd BLOCK=256"
    ):
        _C.load_kernel("attention_resize_fwd BLOCK=512 num_warps=4", "cpu:0")
