"""What can be told of an image without a GPU. A file of its own, so that new processes can import it."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from lwkd.kernels import compile as kernel_compiler
from lwkd.kernels.loops import Loop, loops, machine_code, outside_loops
from lwkd.kernels.packs import Image

PROCESSOR = {"registers": 65536, "shared": 227 * 1024, "warps": 64, "programs": 32}
"""What the programs on one processor of an sm_90 share; a program takes 1 KB of shared memory beside its own."""


@dataclass(frozen=True)
class Facts:
    variant: str
    target: str
    image: Image
    digest: str
    resources: kernel_compiler.Resources
    parameters: list[str]
    """Types of all parameters in the PTX, hidden ones last."""
    wide_loads: int
    wide_copies: int
    wide_stores: int
    """Instructions that move 16 bytes a thread."""
    philox_products: int
    ptx_head: str
    loops: list[Loop]
    outside_loops: int

    @property
    def threads(self) -> int:
        """Threads of this kernel that a processor holds at once."""
        warps = self.image.warps
        of_program = {
            "registers": -(-self.resources.registers // 8) * 8 * 32 * warps,
            "shared": self.image.shared + 1024,
            "warps": warps,
            "programs": 1,
        }
        return 32 * warps * min(PROCESSOR[what] // taken for what, taken in of_program.items())


def examine(variant: str, target: str) -> Facts:
    compiled = kernel_compiler.compile_variant(variant, target)
    image, ptx = kernel_compiler.image_of(compiled, variant, target), compiled.asm["ptx"]
    listing = machine_code(compiled.asm["cubin"])
    return Facts(
        variant=variant,
        target=target,
        image=image,
        digest=hashlib.sha256(image.code).hexdigest(),
        resources=kernel_compiler.resources(compiled.asm["cubin"]),
        parameters=kernel_compiler.read_entry(ptx)[1],
        wide_loads=len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
        wide_copies=len(re.findall(r"cp\.async\.\S+ \[[^]]+\], \[[^]]+\], 0x10", ptx)),
        wide_stores=len(re.findall(r"st\.global\S*\.v4\.b32", ptx)),
        philox_products=ptx.count("mul.hi.u32"),
        ptx_head=ptx[:400],
        loops=loops(listing),
        outside_loops=outside_loops(listing),
    )
