"""Builds the C++ extension ``lwkd._C`` and installs ``kernels/`` as ``lwkd.kernels``.

A plain C++ build: no nvcc, no CUDA toolkit, and nothing is asked of the builder's GPU.
"""

import os
import shutil
import sys
from pathlib import Path

import setuptools

HOW = "pip install 'torch>=2.11' 'setuptools>=77' ninja && pip install --no-build-isolation ."
"""The extension fits the torch that it was built with, so pip must not build it against another one of its own."""

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"lwkd needs setuptools >= 77 to be built and found {setuptools.__version__}. Run\n    {HOW}")
try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    sys.exit(f"lwkd builds against PyTorch and cannot import it ({error}). Run\n    {HOW}")

compiler = os.environ.get("CXX", "c++")
if shutil.which(compiler.split()[0]) is None:
    sys.exit(f"lwkd needs a C++ compiler and found none under the name {compiler!r}. Install g++, or set CXX.")

os.environ.setdefault("MAX_JOBS", "2")
# For `make sanitize`: reads and writes outside of memory, and undefined behaviour, end the program where they happen.
SANITIZERS = [
    *("-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined,float-cast-overflow"),
    *("-fno-sanitize=vptr", "-fno-sanitize-recover=all"),
]
sanitized = os.environ.get("LWKD_SANITIZE") == "1"
sources = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))


class Build(BuildExtension):
    """Says how long compiling takes; pip shows it with ``-v``."""

    def build_extensions(self) -> None:
        """Compile."""
        jobs = os.environ["MAX_JOBS"]
        print(f"compiling {len(sources)} C++ files with MAX_JOBS={jobs}: five minutes with 2", flush=True)
        super().build_extensions()


setuptools.setup(
    ext_modules=[
        CppExtension(
            "lwkd._C",
            sources,
            depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
            # The C++ standard is torch's own: its headers want 17 up to torch 2.13, and 20 later.
            # parallel_for runs serially, and silently, without -fopenmp. The two -fno flags let the polynomial
            # logarithm vectorise; results stay IEEE (no -ffast-math).
            extra_compile_args=[
                *("-O3", "-fopenmp", "-fno-trapping-math", "-fno-math-errno", "-g0"),
                *(SANITIZERS if sanitized else ()),
            ],
            extra_link_args=["-fopenmp", *(SANITIZERS if sanitized else ["-s"])],
            libraries=["dl"],  # the CUDA driver is looked for at run time
        )
    ],
    cmdclass={"build_ext": Build},
)
