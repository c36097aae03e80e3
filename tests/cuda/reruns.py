"""Results kept to be compared with those of another run, and code that runs in a process of its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import torch
from python_runs import python


def assert_same(found, expected, note=""):
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one.nan_to_num(7e7), other.nan_to_num(7e7)), f"result {index} {note}"


def copies(tensors):
    return [t.clone() for t in tensors]


def in_a_process_of_its_own(code: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run Python code with this folder and its parent importable."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    return python("-c", code, cwd=here, timeout=timeout, PYTHONPATH=path)
