"""Puts the package together in a folder of its own: ``python package.py FOLDER`` leaves it in ``FOLDER/lib``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def main(folder: str) -> int:
    """Exit status of the build."""
    build = Path(folder).resolve()
    # The build copies what is newer and leaves what is gone; objects are kept, so that a second run only links.
    shutil.rmtree(build / "lib", ignore_errors=True)
    # Where the build looks for the package's own modules, none must be found that was built before.
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "setup.py", "build", "--build-base", str(build), "--build-lib", str(build / "lib")]
    status = subprocess.run(command, cwd=ROOT, env=clean, check=False).returncode
    if status:
        return status
    found = "import lwkd, lwkd.kernels; print(lwkd.__file__, lwkd.kernels.__file__, lwkd.backend(), sep='\\n')"
    return subprocess.run([sys.executable, "-c", found], cwd=build / "lib", check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
