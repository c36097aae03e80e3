"""Tests that run the host code of the CUDA ops and their Triton kernels on CPU tensors.

The driver is the stand-in of tests/standin.py, which runs every launch in Triton's interpreter. That needs a process in
which TRITON_INTERPRET=1 was set before the kernels were imported; ``tests/kernels/test_interpreted.py`` starts one for
each file here and reports its results. By hand:

    TRITON_INTERPRET=1 python -m pytest tests/interpreted/rates.py
"""

import os

import pytest
import torch
from standin import Driver
from triton.runtime import interpreter

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
_patch_lang = interpreter._patch_lang
_patched: set[frozenset[int]] = set()


def _patch_once(fn):
    """The interpreter patches triton.language anew for every call of a device function; once is enough."""
    modules = frozenset(
        id(value) for value in fn.__globals__.values() if value is interpreter.tl or value is interpreter.tl.core
    )
    if modules not in _patched:
        _patched.add(modules)
        _patch_lang(fn)
    return interpreter._LangPatchScope()


if INTERPRETING:
    interpreter._patch_lang = _patch_once


@pytest.fixture(scope="session")
def _driver(tmp_path_factory):
    if not INTERPRETING:
        pytest.fail("tests/interpreted needs TRITON_INTERPRET=1 in the environment before Python starts")
    return Driver(tmp_path_factory.mktemp("standin"))


@pytest.fixture(autouse=True)
def driver(_driver):
    """The driver of this process; launches are interpreted, and what goes wrong in one fails the test."""
    _driver.clear()
    _driver.interpreting(True)
    yield _driver
    assert not _driver.problems, _driver.problems[0]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every output starts as NaN, so that what a kernel fails to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.isnan(torch.empty(3)).all()
    yield
    torch.use_deterministic_algorithms(False)
