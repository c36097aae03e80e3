"""What the package needs, what it says where that is missing, and under which names it is imported."""

from __future__ import annotations

import importlib

import pytest
from python_runs import ROOT, python

IMPORTS = {
    "lwkd": (
        *("Attachment", "Capture", "Constant", "Decay", "LayerwiseOptimizer", "Pair", "Pairing", "PairingError"),
        *("Relative", "TraceEstimate", "attach", "backend", "ggn_trace", "hessian_trace", "losses", "ops", "pair"),
        *("policies", "reference", "signals", "warmup"),
    ),
    "lwkd.losses": ("attention_transfer", "distillation", "hessian_matching", "jacobian_matching"),
    "lwkd.ops": (
        *("attention_divergence", "attention_maps", "backend", "hutchinson_trace"),
        *("jacobian_divergence", "jacobian_sums", "rademacher", "update_rates"),
    ),
    "lwkd.optimizer": ("Attachment", "LayerwiseOptimizer", "attach"),
    "lwkd.pairing": ("Pair", "Pairing", "PairingError", "pair"),
    "lwkd.policies": ("Constant", "Decay", "Policy", "Relative"),
    "lwkd.rates": ("LayerRates",),
    "lwkd.signals": ("Attention", "Hessian", "Jacobian"),
}
"""The documented names; users import them from here, wherever the library keeps them."""


def test_the_library_needs_torch_only() -> None:
    extras = ["torchvision", "sklearn", "matplotlib", "typer", "rich", "yaml", "tensorboard", "triton"]
    blocked = f"import sys; sys.modules.update(dict.fromkeys({extras}))"
    done = python("-c", f"{blocked}; import lwkd; print(lwkd.backend())")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("C++ kernels on the CPU")


@pytest.mark.parametrize("module", IMPORTS)
def test_documented_names_can_be_imported(module: str) -> None:
    found = importlib.import_module(module)
    assert [name for name in IMPORTS[module] if not hasattr(found, name)] == []


def test_kernels_are_part_of_the_package() -> None:
    pytest.importorskip("triton")
    done = python("-c", "import lwkd.kernels.attention, lwkd.kernels.rates")
    assert done.returncode == 0, done.stderr


HOW = "pip install 'torch>=2.11' 'setuptools>=77' ninja && pip install --no-build-isolation ."


@pytest.mark.parametrize(
    ("missing", "compiler", "message"),
    [
        ("sys.modules['torch.utils.cpp_extension'] = None", "c++", HOW),
        ("import setuptools; setuptools.__version__ = '65.5.0'", "c++", f"found 65.5.0. Run\n    {HOW}"),
        ("", "no-such-compiler", "found none under the name 'no-such-compiler'. Install g++, or set CXX."),
    ],
    ids=["no torch", "an old setuptools", "no compiler"],
)
def test_the_build_says_what_is_missing(missing: str, compiler: str, message: str) -> None:
    code = f"import runpy, sys; {missing or 'pass'}; sys.argv = ['setup.py', '--name']; "
    done = python("-c", code + "runpy.run_path('setup.py', run_name='__main__')", CXX=compiler)
    assert done.returncode != 0
    assert message in done.stderr


def test_the_readme_says_the_same() -> None:
    assert HOW in (ROOT / "README.md").read_text()
    assert HOW in (ROOT / "setup.py").read_text()
