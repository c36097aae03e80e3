"""Sizes, forms and random inputs of the benchmarks.

Legend: ``B`` batch; a feature's shape is ``(B, C, H, W)``. Student before teacher.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import SMALL

Shapes = tuple[tuple[int, ...], ...]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMS = tuple((memory, dtype) for memory in FORMATS for dtype in DTYPES)
EXTREMES = (("contiguous", "float32"), ("channels_last", "bfloat16"))
"""Most bytes in the easier order, and fewest in the harder one: for cases that are not worth all four forms."""

TINY = (2, 8, 4, 4)
"""A feature so small that the time of a call is all there is."""


def stages(batch: int, channels: int, side: int, count: int) -> Shapes:
    """Features behind the stages of a ResNet: channels double where the side halves."""
    if SMALL:
        batch, channels, side, count = 2, 4, 8, 2
    return tuple((batch, channels << stage, side >> stage, side >> stage) for stage in range(count))


# Of a student with blocks as ResNet-18 has them, of ResNet-50, and of a ResNet for CIFAR.
NARROW_B64 = stages(64, 64, 56, 4)
NARROW_B16 = stages(16, 64, 56, 4)
WIDE_B64 = stages(64, 256, 56, 4)
WIDE_B16 = stages(16, 256, 56, 4)
CIFAR = stages(128, 16, 32, 3)


def cases(sizes: Mapping[str, Shapes], forms: Iterable[tuple[str, str]] = FORMS) -> list[Any]:
    """Parameters ``(shapes, memory, dtype)``, every size in every form, named after both."""
    return [
        pytest.param(shapes, memory, DTYPES[dtype], id=f"{name}-{memory}-{dtype}")
        for name, shapes in sizes.items()
        for memory, dtype in forms
    ]


def pairs(
    shapes: Shapes,
    dtype: torch.dtype,
    memory: str = "contiguous",
    *,
    wider: int = 1,
    grad: str = "",
    device: Any = "cpu",
) -> tuple[list[Tensor], list[Tensor]]:
    """Two lists of random tensors: student and teacher, or features and tangents.

    Args:
        shapes: of the first list.
        dtype: of all.
        memory: a key of :data:`FORMATS`; what has not four dimensions is contiguous.
        wider: times as many channels in the second list.
        grad: which lists require a gradient: ``"first"``, ``"both"`` or none.
        device: where they are.
    """
    generator = torch.Generator(device).manual_seed(0)

    def one(shape: tuple[int, ...], widen: int) -> Tensor:
        wide = (shape[0], shape[1] * widen, *shape[2:]) if widen > 1 else shape
        tensor = torch.randn(wide, generator=generator, device=device).to(dtype)
        return tensor.contiguous(memory_format=FORMATS[memory]) if len(shape) == 4 else tensor

    first, second = [one(shape, 1) for shape in shapes], [one(shape, wider) for shape in shapes]
    if grad:
        for tensor in [*first, *(second if grad == "both" else ())]:
            tensor.requires_grad_()
    return first, second
