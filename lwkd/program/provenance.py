"""Where a figure comes from: machine, versions, commit and command, written beside every figure that is published."""

from __future__ import annotations

import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import lwkd


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, to four digits; a single value is all three.

    >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0])
    {'median': 3.0, 'low': 2.0, 'high': 4.0}
    """
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * list(values)
    return {"median": float(f"{median:.4g}"), "low": float(f"{low:.4g}"), "high": float(f"{high:.4g}")}


def spread(values: Mapping[str, float], scale: float = 1.0, digits: int = 1, unit: str = "") -> str:
    """Median and quartiles, as text.

    >>> spread({"median": 0.0123, "low": 0.012, "high": 0.013}, 100, 2, "%")
    '1.23 % (1.20 to 1.30)'
    """
    low, median, high = (f"{scale * values[name]:.{digits}f}" for name in ("low", "median", "high"))
    return f"{median}{unit and ' '}{unit} ({low} to {high})"


def commit() -> str:
    """The commit that lwkd runs from, and whether code differs from it; ``LWKD_COMMIT`` where there is no history.

    Results of benchmarks do not count as code.
    """
    if given := os.environ.get("LWKD_COMMIT"):
        return given
    folder = Path(lwkd.__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=False
        ).stdout.strip()

    try:
        # An installed package may lie in the checkout of something else.
        if not git("ls-files", "--", "__init__.py"):
            return f"lwkd {lwkd.__version__}, not a git checkout"
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "..", ":!../benchmarks/results")
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except FileNotFoundError:
        return f"lwkd {lwkd.__version__}; git is not installed, and LWKD_COMMIT is not set"


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def command() -> str:
    """The command line that runs now, with paths as they are from the root of a checkout."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    script = Path(sys.argv[0])
    if spec is not None:  # python -m
        words = ["python", "-m", spec.name.removesuffix(".__main__")]
    elif script.suffix == ".py":
        words = ["python", f"{script.parent.name}/{script.name}"]
    else:
        words = [script.name]
    return shlex.join([*words, *sys.argv[1:]])


def accelerator(device: torch.device) -> dict[str, object]:
    """Name, size and driver of a GPU; on a CPU only a name that says that there is none."""
    if device.type != "cuda":
        return {"name": "none, a dry run"}
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": found.L2_cache_size,
        "driver": _driver(),
    }


def _driver() -> str:
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, check=False, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0].strip()


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)


def origin(device: torch.device | None = None, **more: object) -> dict[str, object]:
    """Where, with what and how the figures beside this were measured.

    Args:
        device: describes the accelerator and the versions of CUDA and Triton as well; None leaves them out.
        more: facts of the same kind, such as the number of rounds.

    >>> origin(torch.device("cpu"), rounds=3)["machine"]["accelerator"]
    {'name': 'none, a dry run'}
    """
    machine: dict[str, object] = {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()}
    versions: dict[str, object] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lwkd": lwkd.__version__,
        "backend": lwkd.backend(),
    }
    if device is not None:
        machine["accelerator"] = accelerator(device)
        versions |= {"cuda": torch.version.cuda, "triton": _triton_version()}
    return {
        "machine": machine,
        "load_average_at_the_end": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        **more,
        "versions": versions,
        "commit": commit(),
        "command": command(),
    }
