"""Where the figures come from, beside them in every file that is kept."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from lwkd import ops
from lwkd.program.provenance import command, commit, processor


def driver() -> str:
    """Version of the GPU's driver."""
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, check=False, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0].strip()


def accelerator(device: torch.device) -> dict[str, Any]:
    """The device in words and numbers."""
    if device.type != "cuda":
        return {"name": "none, a dry run"}
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": found.L2_cache_size,
        "driver": driver(),
    }


def triton_version() -> str:
    """Version of Triton, where there is one."""
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


def provenance(device: torch.device) -> dict[str, Any]:
    """Machine, versions, commit and command."""
    return {
        "machine": {"processor": processor(), "cores": os.cpu_count(), "accelerator": accelerator(device)},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": triton_version(),
            "backend": ops.backend(),
        },
        "commit": commit(),
        "command": command(),
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """A JSON file that appears whole or not at all: a stage may be stopped at any moment."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(aside, path)
