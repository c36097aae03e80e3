"""Builds the C++ extension ``lwkd._C`` and installs ``kernels/`` as ``lwkd.kernels``.

A plain C++ build: no nvcc, no CUDA toolkit, and nothing is asked of the builder's GPU.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    sys.exit(
        f"lwkd builds against PyTorch and cannot import it ({error}). Install torch >= 2.11 first, then run\n"
        "    pip install --no-build-isolation ."
    )

compiler = os.environ.get("CXX", "c++")
if shutil.which(compiler.split()[0]) is None:
    sys.exit(f"lwkd needs a C++17 compiler and found none under the name {compiler!r}. Install g++, or set CXX.")

os.environ.setdefault("MAX_JOBS", "2")

setup(
    ext_modules=[
        CppExtension(
            "lwkd._C",
            sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
            # parallel_for runs serially, and silently, without -fopenmp. The two -fno flags let the polynomial
            # logarithm vectorise; results stay IEEE (no -ffast-math).
            extra_compile_args=["-O3", "-std=c++17", "-fopenmp", "-fno-trapping-math", "-fno-math-errno", "-g0"],
            extra_link_args=["-fopenmp", "-s"],
            libraries=["dl"],  # the CUDA driver is looked for at run time
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
