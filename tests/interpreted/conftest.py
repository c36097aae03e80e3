"""Tests that run the Triton kernels on CPU tensors, in Triton's interpreter.

They need a process in which TRITON_INTERPRET=1 was set before the kernels were imported; ``tests/test_kernels.py``
starts one for each file here and reports its results. By hand:

    TRITON_INTERPRET=1 python -m pytest tests/interpreted/rates.py
"""

import os

import pytest
import torch
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


@pytest.fixture(autouse=True)
def interpreting():
    if not INTERPRETING:
        pytest.fail("tests/interpreted needs TRITON_INTERPRET=1 in the environment before Python starts")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Every output starts as NaN, so that what a kernel fails to write is seen."""
    empty = torch.empty

    def poisoned(*arguments, **options):
        tensor = empty(*arguments, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-1)

    monkeypatch.setattr(torch, "empty", poisoned)
