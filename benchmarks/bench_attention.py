"""Attention divergence: lwkd against eager PyTorch, ``torch.compile`` and the time to read the same bytes once.

Run with ``python -m pytest benchmarks/bench_attention.py``; ``conftest.py`` says how the contenders take turns and
where the ratios are written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from lwkd import ops, reference

IMAGENET = tuple((64, 64 * 2**stage, 56 >> stage, 56 >> stage) for stage in range(4))
CIFAR = tuple((128, 16 * 2**stage, 32 >> stage, 32 >> stage) for stage in range(3))
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
CONTENDERS = ("lwkd", "eager", "torch.compile", "read")


def features(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, memory: str) -> tuple[list[Tensor], list[Tensor]]:
    """Student's and teacher's features; the teacher has four times the channels."""
    generator = torch.Generator().manual_seed(0)

    def one(shape: tuple[int, ...], widen: int) -> Tensor:
        wide = (shape[0], shape[1] * widen, *shape[2:])
        return torch.randn(wide, generator=generator).to(dtype).contiguous(memory_format=FORMATS[memory])

    return [one(shape, 1) for shape in shapes], [one(shape, 4) for shape in shapes]


def read(student: list[Tensor], teacher: list[Tensor]) -> list[Tensor]:
    """The floor: every byte is read once and as little as possible is done with it."""
    return [feature.sum() for feature in (*student, *teacher)]


def timed(function: Callable[[], object]) -> Callable[[], float]:
    def run() -> float:
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin

    return run


def timed_backward(
    divergence: Callable[..., Tensor], student: list[Tensor], teacher: list[Tensor]
) -> Callable[[], float]:
    """Seconds of the backward pass alone; the forward pass is run before the clock starts."""

    def run() -> float:
        total = divergence(student, teacher).sum()
        begin = time.perf_counter()
        torch.autograd.grad(total, student)
        return time.perf_counter() - begin

    return run


CASES = [
    pytest.param(shapes, memory, dtype, id=f"{name}-{memory}-{str(dtype).removeprefix('torch.')}")
    for name, shapes in (("imagenet", IMAGENET), ("cifar", CIFAR))
    for memory in FORMATS
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.benchmark(group="forward")
@pytest.mark.parametrize(("shapes", "memory", "dtype"), CASES)
def test_forward(shapes, memory, dtype, contest):
    student, teacher = features(shapes, dtype, memory)
    compiled = torch.compile(reference.attention_divergence, fullgraph=True)
    functions = (ops.attention_divergence, reference.attention_divergence, compiled, read)
    contest({name: timed(partial(f, student, teacher)) for name, f in zip(CONTENDERS, functions, strict=True)})


@pytest.mark.benchmark(group="backward")
@pytest.mark.parametrize(("shapes", "memory", "dtype"), CASES)
def test_backward(shapes, memory, dtype, contest):
    student, teacher = features(shapes, dtype, memory)
    student = [feature.requires_grad_() for feature in student]
    compiled = torch.compile(reference.attention_divergence, fullgraph=True)
    functions = (ops.attention_divergence, reference.attention_divergence, compiled)
    contest({name: timed_backward(f, student, teacher) for name, f in zip(CONTENDERS, functions, strict=False)})
