"""The Triton kernels compiled for GPUs that need not be there.

Every variant for one architecture, the commonest of each kernel for all: launched as stated, no spills, loads
as wide as they were meant, the same bytes wherever they are compiled.
"""

from __future__ import annotations

import re
import shutil

import pytest
import triton
from image_facts import Facts, examine
from python_runs import ROOT, python

from lwkd.kernels import packs, spec
from lwkd.kernels.compile import FEW, MOST_REGISTERS, compile_variant, in_parallel
from lwkd.kernels.interface import Variant
from lwkd.kernels.loops import last_in_flight, of_image

WHOLE = "sm_90"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
TARGETS = (*(f"sm_{architecture}" for architecture in ARCHITECTURES), packs.PORTABLE)
COMMONEST = [kernel.variants[0] for kernel in spec.KERNELS]
NAMES = [kernel.name for kernel in spec.KERNELS]

pytestmark = pytest.mark.timeout(600)

tuned_for_36 = pytest.mark.skipif(
    not triton.__version__.startswith("3.6."),
    reason=f"registers and the order of loads were tuned with Triton 3.6; {triton.__version__} has ways of its own",
)


@pytest.fixture(scope="module")
def facts() -> dict[tuple[str, str], Facts]:
    """Of every variant for WHOLE, of the commonest for the other targets; float16 is as bfloat16 is but for casts."""
    work = [(variant.text, WHOLE) for variant in spec.all_variants(["fp32", "bf16"])]
    work += [(variant.text, target) for target in TARGETS if target != WHOLE for variant in COMMONEST]
    return {(found.variant, found.target): found for found in in_parallel(examine, work, jobs=2)}


def of_kernel(facts: dict[tuple[str, str], Facts], name: str) -> list[tuple[Variant, Facts]]:
    return [(spec.parse(found.variant), found) for found in facts.values() if found.variant.split()[0] == name]


def item_bytes(variant: Variant) -> int:
    return spec.ITEM_BYTES[str(variant.setting["ELEMENT"])]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_spills(name, facts):
    for variant, found in of_kernel(facts, name):
        few = 0 if variant.registers is None else FEW
        assert found.resources.stack <= few, (found.variant, found.target, found.resources)
        assert found.resources.local == 0, (found.variant, found.target, found.resources)
        assert found.resources.registers <= MOST_REGISTERS, (found.variant, found.target, found.resources)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_stated(name, facts):
    for variant, found in of_kernel(facts, name):
        stated = [
            "u64" if p.type.startswith("*") else {"i32": "u32", "i64": "u64", "fp32": "f32"}[p.type]
            for p in variant.parameters
        ]
        assert found.parameters == stated + ["u64"] * found.image.hidden, (found.variant, found.target)
        assert found.image.parameters == tuple(p.bytes for p in variant.parameters)
        assert found.image.entry == name
        assert found.image.warps == variant.warps


def test_all_images_have_the_same_hidden_pointers(facts):
    # Two in Triton 3.6; whatever it is, it is counted, not assumed.
    assert len({found.image.hidden for found in facts.values()}) == 1


@pytest.mark.parametrize("name", ["attention_tiles_fwd", "attention_tiles_bwd"])
def test_tiles_move_wide(name, facts):
    for variant, found in of_kernel(facts, name):
        s = variant.setting
        # Of 16 bytes a thread, 128 threads, in one step.
        step = s["ROWS"] * s["COLUMNS"] * item_bytes(variant) // 128 // 16 if s["ALIGNED"] else 0
        forward = name.endswith("fwd")
        tangents = "tangent_partials_ptr" not in s if forward else bool(s["TANGENT"])
        # A plain sum's gradient does not depend on the features, which are not read then.
        reads = 0 if s["POWER"] == -1 and not forward else 1 + tangents
        writes = 0 if forward else 1 + tangents
        assert found.wide_stores == step * writes, (found.variant, found.target)
        # Steps that are read ahead are copied, one more time in front of the loop for each.
        ahead = s["ALIGNED"] and s["STAGES"] > 1
        assert found.wide_loads == (0 if ahead else step * reads), (found.variant, found.target)
        assert found.wide_copies == (step * reads * s["STAGES"] if ahead else 0), (found.variant, found.target)


@pytest.mark.parametrize("name", ["jacobian_sums_fwd", "jacobian_sums_bwd"])
def test_jacobian_moves_wide(name, facts):
    for variant, found in of_kernel(facts, name):
        s = variant.setting
        both = 2 * s["STEP"] * item_bytes(variant) // 128 // 16 if s["ALIGNED"] else 0
        ahead = s["ALIGNED"] and s["STAGES"] > 1
        assert found.wide_loads == (0 if ahead else both), (found.variant, found.target)
        assert found.wide_copies == (both * s["STAGES"] if ahead else 0), (found.variant, found.target)
        assert found.wide_stores == (both if name.endswith("bwd") else 0), (found.variant, found.target)


@pytest.mark.parametrize("name", ["hutchinson_rademacher_fwd", "hutchinson_trace_fwd"])
def test_hutchinson_moves_wide_and_makes_no_word_twice(name, facts):
    for variant, found in of_kernel(facts, name):
        s = variant.setting
        step = s["STEP"] if s.get("ALIGNED", 1) else 0
        wide = found.wide_stores if name == "hutchinson_rademacher_fwd" else found.wide_loads
        assert wide == step, (found.variant, found.target)
        # Ten rounds of two products: one call for each column that a thread has.
        assert found.philox_products <= 20 * s["COLUMNS"] // 32, (found.variant, found.target)


STREAMING = ("attention_tiles_fwd", "attention_tiles_bwd", "jacobian_sums_fwd", "jacobian_sums_bwd")


def is_narrow(variant: Variant) -> bool:
    """Logarithms of elements that asynchronous copies cannot move: arithmetic, not memory, is what they wait for."""
    return item_bytes(variant) == 2 and not variant.setting["ALIGNED"] and variant.setting.get("POWER") == 0


@tuned_for_36
@pytest.mark.parametrize("name", [*STREAMING, "hutchinson_trace_fwd"])
def test_every_streaming_loop_keeps_enough_bytes_in_flight(name, facts):
    """By Little's law a processor of an H100 needs 25 GB/s · 0.7 µs = 17 KB on their way, and twice that when full."""
    for variant, found in of_kernel(facts, name):
        if found.target != WHOLE or is_narrow(variant):
            continue
        for loop in found.loops[1:]:  # the first finds the program's row of the table
            assert loop.in_flight >= 32, (found.variant, loop)
            assert loop.in_flight * found.threads >= 32 * 1024, (found.variant, loop, found.resources)


@tuned_for_36
@pytest.mark.parametrize("name", ["attention_maps_fwd", "attention_divergence_fwd"])
def test_a_whole_map_takes_few_registers_and_instructions(name, facts):
    """A block of 4,096 on eight warps took 151 registers and 3,322 instructions.

    With 64 registers two programs of 16 warps fit on a processor. What is counted are the instructions of a block and
    of the quarter of it that smaller maps take.
    """
    whole = [
        (v, found)
        for v, found in of_kernel(facts, name)
        if found.target == WHOLE and v.setting["PHASE"] == "whole" and v.setting["BLOCK"] > 256
    ]
    # Of maps all that have more than one block are split.
    assert {v.setting["MORE"] for v, _ in whole} == ({0} if name == "attention_maps_fwd" else {0, 1})
    assert max(v.setting["BLOCK"] for v, _ in whole) == 4096
    for variant, found in whole:
        most = 64 if variant.setting["BLOCK"] == 4096 else 128
        assert found.resources.registers <= most, (variant.text, found.resources)
        assert found.outside_loops <= 2750, (variant.text, found.outside_loops)


@tuned_for_36
@pytest.mark.parametrize(("element", "alone", "tuned"), [("bf16", 32 / 3, 32), ("fp32", 32, 128)])
def test_left_alone_the_loads_would_wait_for_each_other(element, alone, tuned, facts):
    variant = next(
        v for v in spec.KERNELS[0].variants if (v.setting["ELEMENT"], v.setting["CHANNELS_LAST"]) == (element, 0)
    )
    assert facts[variant.text, WHOLE].loops[-1].in_flight == tuned
    step = variant.setting["ROWS"] * variant.setting["COLUMNS"] * item_bytes(variant)
    for tuning, in_flight in (({"STAGES": 1}, alone), ({"STAGES": 3}, 2 * step // 128)):
        compiled = compile_variant(variant.text, WHOLE, tuning)
        assert of_image(compiled.asm)[-1].in_flight == pytest.approx(in_flight), tuning


def test_portable_images_are_old_ptx(facts):
    for variant in COMMONEST:
        found = facts[variant.text, packs.PORTABLE]
        assert found.image.code.endswith(b"}\n\0") or found.image.code.rstrip(b"\0\n \t").endswith(b"}")
        assert found.image.code.endswith(b"\0")
        assert re.search(r"\.version 8\.0\s+\.target sm_80\b", found.ptx_head)


def test_bytes_do_not_depend_on_folder_or_process(facts, tmp_path):
    shutil.copytree(ROOT / "lwkd", tmp_path / "lwkd", ignore=shutil.ignore_patterns("kernels", "__pycache__"))
    shutil.copytree(ROOT / "kernels", tmp_path / "lwkd" / "kernels", ignore=shutil.ignore_patterns("images/"))
    code = (
        "import sys, hashlib, lwkd.kernels.compile as c; print(c.__file__)\n"
        "for text in sys.argv[1:]: print(hashlib.sha256(c.make_image(text, 'sm_90').code).hexdigest())"
    )
    texts = [variant.text for variant in COMMONEST]
    done = python("-c", code, *texts, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    place, *digests = done.stdout.split()
    assert place.startswith(str(tmp_path))
    assert digests == [facts[text, "sm_90"].digest for text in texts]


def test_the_table_of_resources_is_true(facts):
    """benchmarks/results/kernel_images.md, which `python -m benchmarks.studies.images` writes."""
    table = (ROOT / "benchmarks" / "results" / "kernel_images.md").read_text()
    version = re.search(r"Triton (\S+),", table)[1]
    if version != triton.__version__:
        pytest.skip(f"the table is of Triton {version}, this is {triton.__version__}")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| `")]
    assert [row[0].strip("`") for row in rows] == [variant.text for variant in COMMONEST]
    for text, *cells in rows:
        measured = [facts[text.strip("`"), f"sm_{architecture}"] for architecture in ARCHITECTURES]
        assert cells == [
            f"{found.resources.registers} / {found.image.shared} / {last_in_flight(found.loops)}" for found in measured
        ], text
