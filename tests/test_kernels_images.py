"""The Triton kernels compiled for GPUs that need not be there: no spills, and loads as wide as they were meant."""

import re
import subprocess

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lwkd.kernels import (
    attention,
    attention_divergence,
    attention_resize,
    attention_tiles,
    hutchinson,
    jacobian,
    rates,
)
from lwkd.kernels.attention_plan import BLOCKS, LOOPING_BLOCK, tile_shape

INT64_TABLES = {"addresses_ptr", "table_ptr", "ends_ptr", "layers_ptr", "counts_ptr", "new_counts_ptr"}


def compiled(kernel, warps=4, absent=(), float64=(), arch=90, **constants):
    """Image of a kernel for a GPU that need not be there; ``absent`` pointers are None, ``float64`` ones float64."""
    signature, values, hints = {}, dict(constants), {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants or name in absent:
            signature[name] = "constexpr"
            values.setdefault(name, None)
        elif name.endswith("_ptr"):
            signature[name] = "*i64" if name in INT64_TABLES else "*fp64" if name in float64 else "*fp32"
            hints[(index,)] = [["tt.divisibility", 16]]
        elif name == "seed":
            signature[name] = "i64"
        else:
            signature[name] = "i32" if name.startswith("n_") else "fp32"
    source = ASTSource(kernel, signature=signature, constexprs=values, attrs=hints)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})


def check_image(image, folder):
    """No register is spilled and no hidden memory is asked for."""
    path = folder / "kernel.cubin"
    path.write_bytes(image.asm["cubin"])
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", path], capture_output=True, text=True, check=True
    ).stdout
    registers, stack, local = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK", "LOCAL"))
    assert (stack, local) == (0, 0), f"{image.metadata.name} spills: {usage}"
    assert registers <= 160, usage
    assert image.metadata.global_scratch_size == 0
    assert image.metadata.num_ctas == 1


def wide(image, direction):
    """Number of 128-bit loads or stores."""
    return len(re.findall(rf"{direction}\.global\S*\.v4\.b32", image.asm["ptx"]))


TILE_VARIANTS = [
    pytest.param(element, dtype, channels_last, aligned, id=f"{element}-{order}-{'aligned' if aligned else 'any'}")
    for element, dtype in ((tl.float32, torch.float32), (tl.bfloat16, torch.bfloat16))
    for channels_last, order in ((False, "channels_first"), (True, "channels_last"))
    for aligned in (True, False)
]


@pytest.mark.parametrize(("element", "dtype", "channels_last", "aligned"), TILE_VARIANTS)
def test_tiles_compile(element, dtype, channels_last, aligned, tmp_path):
    rows, columns = tile_shape(dtype, channels_last, aligned)
    variant = {"ELEMENT": element, "CHANNELS_LAST": channels_last, "ALIGNED": aligned, "ROWS": rows, "COLUMNS": columns}
    steps = rows * columns * dtype.itemsize // 128 // 16  # 128-bit loads a thread in one step, 128 threads
    forward = compiled(attention_tiles.attention_tiles_fwd, absent=("tangent_partials_ptr",), POWER=2, **variant)
    backward = compiled(attention_tiles.attention_tiles_bwd, TANGENT=False, POWER=2, **variant)
    check_image(forward, tmp_path)
    check_image(backward, tmp_path)
    assert wide(forward, "ld") == wide(backward, "ld") == wide(backward, "st") == (steps if aligned else 0)


@pytest.mark.parametrize("power", [0, 3])
def test_tiles_with_tangents_compile(power, tmp_path):
    rows, columns = tile_shape(torch.float32, False, True)
    variant = {"ELEMENT": tl.float32, "CHANNELS_LAST": False, "ALIGNED": True, "ROWS": rows, "COLUMNS": columns}
    forward = compiled(attention_tiles.attention_tiles_fwd, POWER=power, **variant)
    backward = compiled(attention_tiles.attention_tiles_bwd, absent=("grad_ptr",), TANGENT=True, POWER=power, **variant)
    check_image(forward, tmp_path)
    check_image(backward, tmp_path)
    assert wide(forward, "ld") == wide(backward, "ld") == wide(backward, "st") == 8


@pytest.mark.parametrize("kind", ["jsd", "l2"])
@pytest.mark.parametrize(
    ("block", "warps", "more"), [(*BLOCKS[0], False), (*BLOCKS[-1], False), (*LOOPING_BLOCK, True)]
)
def test_divergence_compiles(kind, block, warps, more, tmp_path):
    kernel = attention_divergence.attention_divergence_fwd
    check_image(compiled(kernel, warps, KIND=kind, MORE=more, BLOCK=block), tmp_path)


@pytest.mark.parametrize("arch", [80, 100])
def test_other_architectures(arch, tmp_path):
    rows, columns = tile_shape(torch.float32, False, True)
    variant = {"ELEMENT": tl.float32, "CHANNELS_LAST": False, "ALIGNED": True, "ROWS": rows, "COLUMNS": columns}
    absent = ("tangent_partials_ptr",)
    tiles = compiled(attention_tiles.attention_tiles_fwd, absent=absent, arch=arch, POWER=2, **variant)
    block, warps = BLOCKS[-1]
    kernel = attention_divergence.attention_divergence_fwd
    divergence = compiled(kernel, warps, arch=arch, KIND="jsd", MORE=False, BLOCK=block)
    check_image(tiles, tmp_path)
    check_image(divergence, tmp_path)
    assert wide(tiles, "ld") == 4


def test_the_rest_compiles(tmp_path):
    block, warps = BLOCKS[-1]
    images = [
        compiled(attention.attention_maps_fwd, warps, MORE=False, BLOCK=block),
        compiled(attention.attention_maps_bwd, LOOPING_BLOCK[1], BLOCK=LOOPING_BLOCK[0]),
        compiled(attention_resize.attention_resize_fwd, BLOCK=256),
        compiled(attention_resize.attention_resize_bwd, BLOCK=256),
        compiled(attention_divergence.attention_mean_fwd, BLOCK=attention_divergence.MEAN_BLOCK),
    ]
    images.append(compiled(attention.attention_maps_fwd, absent=("tangent_partials_ptr",), MORE=True, BLOCK=block // 4))
    for image in images:
        check_image(image, tmp_path)


@pytest.mark.parametrize("divergence", rates.STATISTICS)
def test_rates_compile(divergence, tmp_path):
    kernel, form = rates.rates_update_fwd, {"DIVERGENCE": divergence, "STATISTICS": rates.STATISTICS[divergence]}
    check_image(
        compiled(kernel, absent=("found_inf_ptr",), POLICY="relative", NORMALIZE=False, BLOCK=128, **form), tmp_path
    )
    for policy in ("relative", "decay", "constant"):
        check_image(compiled(kernel, POLICY=policy, NORMALIZE=True, BLOCK=512, **form), tmp_path)


CHUNK_VARIANTS = [
    pytest.param(element, dtype, aligned, arch, id=f"{element}-{'aligned' if aligned else 'any'}-sm_{arch}")
    for element, dtype in ((tl.float32, torch.float32), (tl.float16, torch.float16), (tl.bfloat16, torch.bfloat16))
    for aligned in (True, False)
    for arch in (80, 90, 100)
]


@pytest.mark.parametrize(("element", "dtype", "aligned", "arch"), CHUNK_VARIANTS)
def test_jacobian_compiles(element, dtype, aligned, arch, tmp_path):
    variant = {"ELEMENT": element, "ALIGNED": aligned, "CHUNK": jacobian.CHUNK, "STEP": jacobian.STEP}
    forward = compiled(jacobian.jacobian_sums_fwd, arch=arch, **variant)
    backward = compiled(jacobian.jacobian_sums_bwd, arch=arch, **variant)
    check_image(forward, tmp_path)
    check_image(backward, tmp_path)
    # Of both tensors, 128 threads.
    steps = 2 * jacobian.STEP * dtype.itemsize // 128 // 16 if aligned else 0
    assert wide(forward, "ld") == wide(backward, "ld") == wide(backward, "st") == steps


@pytest.mark.parametrize(("element", "dtype", "aligned", "arch"), CHUNK_VARIANTS)
def test_hutchinson_compiles(element, dtype, aligned, arch, tmp_path):
    columns, step = hutchinson.part_shape(dtype, aligned)
    variant = {"ELEMENT": element, "COLUMNS": columns, "STEP": step}
    images = [compiled(hutchinson.hutchinson_trace_fwd, 1, arch=arch, ALIGNED=aligned, **variant)]
    assert wide(images[0], "ld") == (step if aligned else 0)
    if aligned:
        images.append(compiled(hutchinson.hutchinson_rademacher_fwd, 1, arch=arch, **variant))
        assert wide(images[1], "st") == step
    for image in images:
        check_image(image, tmp_path)
        # Ten rounds of two products: one call for each column that a thread has, and the words are never made again.
        assert image.asm["ptx"].count("mul.hi.u32") <= 20 * columns // 32


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_second_stages_compile(arch, tmp_path):
    kernel = jacobian.jacobian_layers_fwd
    images = [compiled(kernel, arch=arch, absent=("distances_ptr",), KIND="none", BLOCK=jacobian.LAYER_BLOCK)]
    for kind in ("direction", "norm", "relative"):
        images.append(compiled(kernel, arch=arch, float64=("sums_ptr",), KIND=kind, BLOCK=jacobian.LAYER_BLOCK))
    images.append(compiled(hutchinson.hutchinson_layers_fwd, arch=arch, BLOCK=hutchinson.LAYER_BLOCK))
    for image in images:
        check_image(image, tmp_path)
