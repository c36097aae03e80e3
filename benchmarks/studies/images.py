"""Registers, shared memory and bytes in flight of every kernel, for every architecture that wheels carry.

    python -m benchmarks.studies.images      writes benchmarks/results/kernel_images.md

The commonest variant of each kernel, which is the first that kernels/spec.py lists.
"""

from __future__ import annotations

import itertools

import triton
from triton.backends.nvidia.compiler import get_ptxas

from benchmarks import report
from lwkd.kernels import spec
from lwkd.kernels.compile import compile_variant, in_parallel, resources
from lwkd.kernels.loops import last_in_flight, of_image
from lwkd.program.provenance import commit

ARCHITECTURES = (80, 86, 89, 90, 100, 120)


def measure(variant: str, target: str) -> str:
    """Registers, dynamic shared memory, and what the last loop keeps in flight, as they stand in the table."""
    compiled = compile_variant(variant, target)
    in_flight = last_in_flight(of_image(compiled.asm))
    return f"{resources(compiled.asm['cubin']).registers} / {compiled.metadata.shared} / {in_flight}"


def main() -> None:
    variants = [kernel.variants[0].text for kernel in spec.KERNELS]
    work = [(variant, f"sm_{architecture}") for variant in variants for architecture in ARCHITECTURES]
    found = iter(list(in_parallel(measure, work, title="compiled")))
    ptxas = sorted({get_ptxas(architecture).version for architecture in ARCHITECTURES})
    rows = [[f"`{variant}`", *itertools.islice(found, len(ARCHITECTURES))] for variant in variants]
    head = ["commonest variant", *(f"sm_{architecture}" for architecture in ARCHITECTURES)]
    lines = [
        "# Registers a thread / bytes of dynamic shared memory a program / bytes in flight a thread",
        "",
        f"Triton {triton.__version__}, ptxas {' and '.join(ptxas)}, commit {commit()}, "
        "`python -m benchmarks.studies.images`. These figures are exact: they have no spread. Bytes in flight: of "
        "the last loop that reads memory, read off the machine code by `kernels/loops.py`.",
        "",
        report.markdown([head, *rows]),
        "",
    ]
    (report.folder() / "kernel_images.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
