"""A wheel that carries images of the kernels needs neither a compiler nor Triton where it is installed.

It is built as `make wheel` does, in a copy of the repository, with two variants instead of all, and with the extension
that the tests use instead of compiling it again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lwkd import _C
from lwkd.kernels import packs
from lwkd.kernels.compile import make_image

ROOT = Path(__file__).parents[2]
VARIANTS = ("attention_resize_fwd BLOCK=256 num_warps=4", "hutchinson_layers_fwd BLOCK=1024 num_warps=4")
TARGETS = ("sm_80", "sm_90", packs.PORTABLE)

INSTALLED = """
import sys

sys.modules["triton"] = None  # as if it were not installed
import torch
import lwkd
import lwkd.kernels.images as images
for module in (lwkd, lwkd._C, images):
    assert module.__file__.startswith(sys.argv[1]), module.__file__
"""


def run(*command: object, **options: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    copy = tmp_path_factory.mktemp("source")
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "*.zip")
    for name in ("lwkd", "kernels", "csrc"):
        # In a checkout lwkd/kernels may be a link to kernels/.
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=unwanted)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    for target in TARGETS:
        made = [make_image(variant, target) for variant in VARIANTS]
        packs.write_pack(copy / "kernels" / "images" / f"{target}.zip", "3.6.0", made)
    setup = (sys.executable, "setup.py", "--quiet")
    run(*setup, "build_py", cwd=copy)
    built = next((copy / "build").glob("lib*"))
    # build_ext would put it there.
    shutil.copy(_C.__file__, built / "lwkd")
    run(*setup, "bdist_wheel", "--skip-build", "--dist-dir", copy / "dist", cwd=copy)
    (made,) = (copy / "dist").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    run(*pip, "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


@pytest.fixture
def installed(site, tmp_path):
    """Runs code where the wheel is installed, outside the repository, without a compiler on the path."""

    def python(code: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(site), "PATH": str(tmp_path), "LWKD_CACHE_DIR": str(tmp_path)}
        return run(sys.executable, "-c", INSTALLED + code, site, cwd=tmp_path, env=environment)

    return python


def test_what_the_wheel_holds(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    kernels = {f"lwkd/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert {f"lwkd/kernels/images/{target}.zip" for target in TARGETS} | kernels <= names
    assert {"lwkd/py.typed", f"lwkd/{Path(_C.__file__).name}"} <= names
    assert not [name for name in names if name.startswith(("csrc", "tests", "kernels"))]
    assert "none-any" not in wheel.name


def test_it_runs_and_finds_its_images(installed):
    lines = installed(f"""
features = [torch.rand(2, 3, 4, 4)]
print(lwkd.ops.attention_divergence(features, features).shape)
for architecture in (80, 90, 121):
    for variant in {VARIANTS}:
        code, entry, *_ = images.find(variant, architecture)
        print(architecture, entry, "cubin" if code.startswith(bytes([127]) + b"ELF") else "PTX")
print(sys.modules["triton"] is not None)
print(images.describe(80))
""").splitlines()
    assert lines[0] == "torch.Size([1])"
    entries = [variant.split()[0] for variant in VARIANTS]
    forms = ((80, "cubin"), (90, "cubin"), (121, "PTX"))
    assert lines[1:7] == [f"{number} {entry} {form}" for number, form in forms for entry in entries]
    assert lines[7:] == ["False", "shipped for sm_80, else shipped as PTX, which the driver compiles"]


def test_what_it_lacks_is_a_clear_error(installed, site):
    message = installed(f"""
try:
    images.find({VARIANTS[0]!r}, 75)
except RuntimeError as error:
    print(error)
""")
    assert f"{site}/lwkd/kernels/images/sm_75.zip: not there" in message
    assert "Triton: cannot be imported (import of triton halted" in message
    assert "python -m lwkd.kernels.compile --arch 75 --out DIR" in message
