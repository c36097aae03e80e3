"""Tests of what only a GPU has: run by ``make gpu``, skipped where there is none.

The agreement of each op with the reference is in ``tests/ops``, the marker ``cuda``.
"""

from __future__ import annotations

import pytest
import torch
from backends import DEVICE


@pytest.fixture
def cuda() -> torch.device:
    """The CUDA device, for tests that a CPU cannot run."""
    if DEVICE.type != "cuda":
        pytest.skip("a dry run on the CPU")
    return DEVICE


@pytest.fixture
def exact_arithmetic():
    """No TF32: its 10 bits would hide every difference that is looked for."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
