"""Where a figure comes from: machine, versions, commit and command stand beside every one that is kept."""

from __future__ import annotations

import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from pytest_benchmark.utils import get_machine_id

from lwkd import ops


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles, to four digits."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": float(f"{median:.4g}"), "low": float(f"{low:.4g}"), "high": float(f"{high:.4g}")}


def commit() -> str:
    """The commit that is checked out, and whether code differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    found = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "..", ":!results")
    return (found or "not a git checkout") + (" with changes" if changed else "")


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def origin(**more: object) -> dict[str, object]:
    """Where, with what and how the figures beside this were measured."""
    script = Path(sys.argv[0])
    command = [f"benchmarks/{script.name}", *sys.argv[1:]] if script.parent.name == "benchmarks" else ["-m", "pytest"]
    command += [] if script.parent.name == "benchmarks" else sys.argv[1:]
    return {
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": get_machine_id()},
        "load_average_at_the_end": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        **more,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "backend": ops.backend()},
        "commit": commit(),
        "command": shlex.join(["python", *command]),
    }
