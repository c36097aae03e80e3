"""The stated interface of the kernels against the kernels themselves, and the names of variants."""

from __future__ import annotations

import importlib
import re

import pytest
from python_runs import ROOT, python
from triton.runtime import JITFunction

from lwkd import reference
from lwkd.kernels import attention, spec
from lwkd.kernels.interface import TUNING, variant_text

ALL = list(spec.all_variants())


@pytest.mark.parametrize("kernel", spec.KERNELS, ids=lambda kernel: kernel.name)
def test_the_interface_is_that_of_the_kernel(kernel):
    function = getattr(importlib.import_module(f"lwkd.kernels.{kernel.module}"), kernel.name)
    constants = [parameter.name for parameter in function.params if parameter.is_constexpr]
    run_time = [parameter.name for parameter in function.params if not parameter.is_constexpr]
    assert [parameter.name for parameter in kernel.parameters] == run_time
    assert list(kernel.constants) == constants
    assert function.arg_names == run_time + constants


def test_every_kernel_is_stated():
    found = set()
    for path in (ROOT / "kernels").glob("*.py"):
        names = re.findall(r"^def ([a-z]\w*_(?:fwd|bwd))\(", path.read_text(), re.MULTILINE)
        module = importlib.import_module(f"lwkd.kernels.{path.stem}") if names else None
        found |= {name for name in names if isinstance(getattr(module, name), JITFunction)}
    assert found == {kernel.name for kernel in spec.KERNELS}


def test_what_counts_as_an_empty_map_is_what_the_reference_says():
    assert attention.EMPTY_MAP.value == reference.EMPTY_MAP


def test_types_follow_the_names():
    """Tables of addresses and numbers are int64 and so is a seed, counts are int32: what the launcher passes."""
    int64 = {"addresses_ptr", "table_ptr", "ends_ptr", "layers_ptr", "counts_ptr", "new_counts_ptr"}
    for parameter in (parameter for kernel in spec.KERNELS for parameter in kernel.parameters):
        name, kind = parameter.name, parameter.type
        assert kind.startswith("*") == name.endswith("_ptr")
        assert (kind == "*i64") == (name in int64)
        assert kind == "i64" or name != "seed"
        assert kind == "i32" or not name.startswith("n_")
        assert parameter.bytes == (8 if "64" in kind or "*" in kind else 4)


def test_names_say_everything():
    assert len({variant.text for variant in ALL}) == len(ALL) == sum(len(k.variants) for k in spec.KERNELS)
    for variant in ALL:
        assert spec.parse(variant.text) is variant
        words = variant.text.split()[1:]
        setting = {key: None if value == "None" else value for key, value in (word.split("=") for word in words)}
        assert setting == {k: v if v is None else str(v) for k, v in variant.setting.items() if k not in TUNING}
        order = [*(p.name for p in variant.kernel.parameters), *variant.kernel.constants, "num_warps"]
        assert list(setting) == [word for word in order if word in setting]


def test_one_name_in_full():
    expected = (
        "attention_tiles_fwd tangent_partials_ptr=None ELEMENT=fp32 CHANNELS_LAST=0 ALIGNED=1 POWER=2 ROWS=8 "
        "COLUMNS=128 num_warps=4"
    )
    assert spec.KERNELS[0].variants[0].text == expected


def test_variants_of_some_element_types():
    halves = list(spec.all_variants(["fp16", "bf16"]))
    assert {variant.setting["ELEMENT"] for variant in halves if "ELEMENT" in variant.setting} == {"fp16", "bf16"}
    assert {v.text for v in ALL if "ELEMENT" not in v.setting} <= {v.text for v in halves}


def test_an_unknown_name_is_refused_with_the_nearest():
    name = "jacobian_sums_fwd ELEMENT=fp32 ALIGNED=1 CHUNK=8192 STEP=999 num_warps=4"
    with pytest.raises(ValueError, match=r"STEP=999.*nearest is 'jacobian_sums_fwd .*STEP=1024"):
        spec.parse(name)
    with pytest.raises(ValueError, match=r"no kernel variant is called 'no_such_kernel'"):
        spec.parse("no_such_kernel")


def test_a_name_needs_every_constant():
    kernel = spec.KERNELS[0]
    with pytest.raises(ValueError, match="COLUMNS"):
        variant_text(kernel, {k: v for k, v in kernel.settings[0].items() if k != "COLUMNS"})
    with pytest.raises(ValueError, match="TABLE"):
        variant_text(kernel, {**kernel.settings[0], "TABLE": 1})


def test_needs_neither_triton_nor_torch():
    code = f"""
import sys, types
package = types.ModuleType("lwkd")
package.__path__ = []
kernels = types.ModuleType("lwkd.kernels")
kernels.__path__ = [{str(ROOT / "kernels")!r}]
package.kernels = kernels
sys.modules |= {{"lwkd": package, "lwkd.kernels": kernels, "torch": None, "triton": None}}
import lwkd.kernels.spec
print(len(list(lwkd.kernels.spec.all_variants())))
"""
    done = python("-c", code)
    assert done.stdout.strip() == str(len(ALL)), done.stderr
