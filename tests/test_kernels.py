"""The Triton kernels without a GPU: run in the interpreter, and compiled for real ones."""

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lwkd.kernels import attention, attention_divergence, attention_resize, attention_tiles, rates
from lwkd.kernels.attention_plan import BLOCKS, LOOPING_BLOCK, tile_shape

TESTS = Path(__file__).parent
INTERPRETED = ("attention_divergence", "attention_maps", "rates")


@pytest.fixture(scope="module")
def interpreters(tmp_path_factory):
    """One process for each file of tests/interpreted: the interpreter must be chosen before kernels are imported."""
    running = {}
    for name in INTERPRETED:
        folder = tmp_path_factory.mktemp(name)
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:randomly", "--timeout=280"]
        command += [f"--junitxml={folder / 'report.xml'}", str(TESTS / "interpreted" / f"{name}.py")]
        with (folder / "output.txt").open("w") as output:
            process = subprocess.Popen(
                command, cwd=TESTS.parent, env=os.environ | {"TRITON_INTERPRET": "1"}, stdout=output, stderr=output
            )
        running[name] = (process, folder)
    yield running
    for process, _ in running.values():
        process.kill()
        process.wait()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted(name, interpreters, subtests):
    """Every test of that file, reported one by one."""
    process, folder = interpreters[name]
    status = process.wait()
    report = folder / "report.xml"
    assert report.exists(), f"the interpreter's tests did not run:\n{(folder / 'output.txt').read_text()}"
    cases = list(ElementTree.parse(report).iter("testcase"))
    assert cases, f"no tests were found:\n{(folder / 'output.txt').read_text()}"
    for case in cases:
        with subtests.test(msg=case.get("name")):
            for problem in (*case.iter("failure"), *case.iter("error"), *case.iter("skipped")):
                pytest.fail(problem.text or problem.get("message") or "failed without a message")
    assert status == 0, (folder / "output.txt").read_text()


INT64_TABLES = {"addresses_ptr", "table_ptr", "ends_ptr", "layers_ptr", "counts_ptr", "new_counts_ptr"}


def compiled(kernel, warps=4, absent=(), arch=90, **constants):
    """Image of a kernel for a GPU that need not be there; ``absent`` pointers are None."""
    signature, values, hints = {}, dict(constants), {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants or name in absent:
            signature[name] = "constexpr"
            values.setdefault(name, None)
        elif name.endswith("_ptr"):
            signature[name] = "*i64" if name in INT64_TABLES else "*fp32"
            hints[(index,)] = [["tt.divisibility", 16]]
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
    rule = {"NORMALIZE": False, "STATISTICS": 2, "BLOCK": 128}
    images.append(compiled(rates.rates_update_fwd, absent=("found_inf_ptr",), POLICY="relative", **rule))
    for policy in ("relative", "decay", "constant"):
        images.append(compiled(rates.rates_update_fwd, POLICY=policy, NORMALIZE=True, STATISTICS=1, BLOCK=512))
    for image in images:
        check_image(image, tmp_path)
