"""Every op under NVIDIA's memory checker and race checker, in processes of their own that run side by side."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TOOLS = ("memcheck", "racecheck")
PATIENCE = 130
FOUND = 77
"""Exit status that the checker is asked for when it has found something."""

PLACES = ("/usr/local/cuda*/bin", "/usr/local/cuda*/compute-sanitizer", "/opt/nvidia/*/*", "/opt/nvidia/*")
CANNOT = ("not supported", "unable to", "could not", "failed to initialize", "no attachable process", "permission")


def checker() -> str | None:
    """Path of compute-sanitizer, on PATH or where toolkits put it."""
    found = shutil.which("compute-sanitizer")
    if found is not None:
        return found
    homes = [Path(home) / "bin" for key in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(key))]
    for folder in (*homes, *(path for place in PLACES for path in sorted(Path("/").glob(place.lstrip("/"))))):
        if os.access(folder / "compute-sanitizer", os.X_OK) and (folder / "compute-sanitizer").is_file():
            return str(folder / "compute-sanitizer")
    return None


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The checkers, started together: each takes most of its time on one core."""
    program = checker()
    running = {}
    if program is not None:
        for tool in TOOLS:
            output = tmp_path_factory.mktemp(tool) / "output.txt"
            command = [program, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
            with output.open("w") as sink:
                process = subprocess.Popen(
                    [*command, sys.executable, str(HERE / "every_op.py")],
                    cwd=HERE,
                    # Every tensor an allocation of its own, so that the checker knows where each one ends.
                    env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                )
            running[tool] = (process, output)
    yield running
    for process, _ in running.values():
        process.kill()
        process.wait()


@pytest.mark.timeout(2 * PATIENCE)
@pytest.mark.parametrize("tool", TOOLS)
def test_every_op(tool, runs, cuda):
    if tool not in runs:
        pytest.skip(f"compute-sanitizer is neither on PATH nor in {', '.join(PLACES)}")
    process, output = runs[tool]
    try:
        status = process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{tool} did not finish within {PATIENCE} s:\n{output.read_text()[-1500:]}")
    text = output.read_text()
    if status == 0:
        assert "update_rates" in text, text[-3000:]
        return
    if status != FOUND and any(word in text.lower() for word in CANNOT) and "ERROR SUMMARY: 0" not in text:
        pytest.skip(f"{tool} cannot watch this process:\n{text[-1500:]}")
    pytest.fail(f"{tool}, status {status}:\n{text[-6000:]}")
