"""The program on the GPU: a short comparison on real pictures, from the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from backends import DEVICE

DATA = Path(os.environ.get("LWKD_DATA", "data"))


def data_set() -> str:
    """Fashion-MNIST where it lies at hand, else the digits of scikit-learn; nothing is fetched."""
    raw = [DATA / "FashionMNIST" / "raw", DATA / "fashion-mnist", Path("/usr/share/datasets/fashion-mnist")]
    here = any((folder / f"train-images-idx3-ubyte{ending}").exists() for folder in raw for ending in ("", ".gz"))
    return "fashion-mnist" if here else "digits"


@pytest.mark.parametrize("signal", ["attention", "hessian"])
def test_distill(signal: str, tmp_path: Path) -> None:
    words = ["distill", "--data", data_set(), "--data-dir", str(DATA), "--device", DEVICE.type, "--signal", signal]
    words += ["--teacher", "cnn_8", "--student", "cnn_4", "--teacher-epochs", "2", "--epochs", "2"]
    words += ["--student-limit", "1000", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "lwkd.program", *words], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kept = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert DEVICE.type in str(kept)
