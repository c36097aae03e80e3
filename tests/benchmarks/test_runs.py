"""The benchmarks run: every file once, in another process, with tiny sizes and one round."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from python_runs import ROOT, python

NEEDS = {"layer_decay": "timm", "launch": "triton"}
"""What a file does not run without."""


def test_every_file_runs(tmp_path: Path) -> None:
    # Nothing is compiled or built at these sizes: torch.compile and the do-nothing op would take minutes.
    small = {"LWKD_BENCHMARK_SMALL": "1", "LWKD_BENCHMARK_ROUNDS": "1", "LWKD_BENCHMARK_RESULTS": str(tmp_path)}
    done = python("-m", "pytest", "benchmarks/ops", "-p", "no:cacheprovider", **small)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    (path,) = tmp_path.glob("*.json")
    stems = {file.stem for file in (ROOT / "benchmarks" / "ops").glob("*.py")} - {"conftest"}
    missing = {stem for stem, package in NEEDS.items() if find_spec(package) is None}
    assert json.loads(path.read_text()).keys() == stems - missing
