"""What can be told of an image without a GPU. A file of its own, so that new processes can import it."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from lwkd.kernels import compile as kernel_compiler
from lwkd.kernels.packs import Image


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
    wide_stores: int
    """Instructions that move 16 bytes a thread."""
    philox_products: int
    ptx_head: str


def examine(variant: str, target: str) -> Facts:
    compiled = kernel_compiler.compile_variant(variant, target)
    image, ptx = kernel_compiler.image_of(compiled, variant, target), compiled.asm["ptx"]
    return Facts(
        variant=variant,
        target=target,
        image=image,
        digest=hashlib.sha256(image.code).hexdigest(),
        resources=kernel_compiler.resources(compiled.asm["cubin"]),
        parameters=kernel_compiler.read_entry(ptx)[1],
        wide_loads=len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
        wide_stores=len(re.findall(r"st\.global\S*\.v4\.b32", ptx)),
        philox_products=ptx.count("mul.hi.u32"),
        ptx_head=ptx[:400],
    )
