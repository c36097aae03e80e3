"""The Jacobian signal: maps with their tangents, and the four sums of a pair of derivatives.

lwkd against eager PyTorch, ``torch.compile`` and the time to read the same bytes once. Run with
``python -m pytest benchmarks/bench_jacobian.py``; ``conftest.py`` says how the contenders take turns and where the
ratios are written.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from bench_attention import CONTENDERS, FORMATS, read, timed
from torch import Tensor

from lwkd import ops, reference

# A ResNet-50 at batch 16, and a ResNet for CIFAR at batch 128.
IMAGENET = tuple((16, 256 * 2**stage, 56 >> stage, 56 >> stage) for stage in range(4))
CIFAR = tuple((128, 16 * 2**stage, 32 >> stage, 32 >> stage) for stage in range(3))

CASES = [
    pytest.param(shapes, memory, dtype, id=f"{name}-{memory}-{str(dtype).removeprefix('torch.')}")
    for name, shapes in (("imagenet", IMAGENET), ("cifar", CIFAR))
    for memory in FORMATS
    for dtype in (torch.float32, torch.bfloat16)
]


def pairs(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, memory: str) -> tuple[list[Tensor], list[Tensor]]:
    """Two lists of tensors of equal shapes and layouts: features and tangents, or two derivatives."""
    generator = torch.Generator().manual_seed(0)

    def one(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=FORMATS[memory])

    return [one(shape) for shape in shapes], [one(shape) for shape in shapes]


@pytest.mark.benchmark(group="maps and tangents")
@pytest.mark.parametrize(("shapes", "memory", "dtype"), CASES)
def test_maps_and_tangents(shapes, memory, dtype, contest):
    features, tangents = pairs(shapes, dtype, memory)
    compiled = torch.compile(reference.attention_maps, fullgraph=True)
    functions = (ops.attention_maps, reference.attention_maps, compiled, read)
    contest({name: timed(partial(f, features, tangents)) for name, f in zip(CONTENDERS, functions, strict=True)})


@pytest.mark.benchmark(group="jacobian sums")
@pytest.mark.parametrize(("shapes", "memory", "dtype"), CASES)
def test_jacobian_sums(shapes, memory, dtype, contest):
    student, teacher = pairs(shapes, dtype, memory)
    compiled = torch.compile(reference.jacobian_sums, fullgraph=True)
    functions = (ops.jacobian_sums, reference.jacobian_sums, compiled, read)
    contest({name: timed(partial(f, student, teacher)) for name, f in zip(CONTENDERS, functions, strict=True)})
