"""Tests that need a CUDA device: run by ``make gpu``, skipped where there is none.

``LWKD_TEST_DEVICE=cpu`` runs on the CPU what does not ask for CUDA by name (the fixture ``cuda``): a dry run, for
whoever writes these tests without a GPU. ``LWKD_TEST_SEED`` repeats the random inputs of a run, which prints it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from device_inputs import DEVICE, SEED

HERE = Path(__file__).parent
READY = DEVICE.type != "cuda" or torch.cuda.is_available()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = pytest.mark.skip(reason="no CUDA device; `make gpu` runs these tests where there is one")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cuda)
            if not READY:
                item.add_marker(absent)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if READY:
        terminalreporter.write_line(f"random inputs of tests/cuda: LWKD_TEST_SEED={SEED}")


@pytest.fixture
def cuda() -> torch.device:
    """The CUDA device, for tests that a CPU cannot run."""
    if DEVICE.type != "cuda":
        pytest.skip("a dry run on the CPU")
    return DEVICE


@pytest.fixture
def poisoned():
    """Fresh memory is NaN (whole numbers: their largest), in PyTorch and in C++, so that what nobody writes is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def exact_arithmetic():
    """No TF32: its 10 bits would hide every difference that is looked for."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
