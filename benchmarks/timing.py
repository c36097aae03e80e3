"""What the contenders of a benchmark are made of: timed calls, timed backward passes, and the least that memory allows.

A contender is a callable that returns seconds; ``conftest.py`` lets contenders take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from shapes import SMALL
from torch import Tensor


def timed(function: Callable[..., object], *arguments: Any, calls: int = 1) -> Callable[[], float]:
    """Seconds of a call, over so many of them: a call of a few microseconds is too short to be timed alone."""

    def run() -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            function(*arguments)
        return (time.perf_counter() - begin) / calls

    return run


def timed_backward(function: Callable[..., Any], *arguments: Any) -> Callable[[], float]:
    """Seconds of the backward pass alone; the forward pass is run before the clock starts."""
    inputs = [tensor for tensor in flat(arguments) if tensor.requires_grad]
    generator = torch.Generator().manual_seed(1)
    grads: list[Tensor] = []

    def run() -> float:
        outputs = flat(function(*arguments))
        if not grads:  # random, since maps sum to 1: a gradient of equal numbers would be 0 behind them
            grads.extend(torch.rand(output.shape, generator=generator).to(output.dtype) for output in outputs)
        begin = time.perf_counter()
        torch.autograd.grad(outputs, inputs, grads)
        return time.perf_counter() - begin

    return run


def rivals(ours: Callable[..., Any], theirs: Callable[..., Any], compiles: bool = True) -> dict[str, Callable]:
    """An op, the same in eager PyTorch, and that compiled, by the names under which they compete."""
    found = {"lwkd": ours, "eager": theirs}
    if compiles and not SMALL:
        found["torch.compile"] = torch.compile(theirs, fullgraph=True)
    return found


def forward(functions: dict[str, Callable], *arguments: Any) -> dict[str, Callable[[], float]]:
    """Contenders of a forward pass over lists of tensors, and the time to read these once."""
    return {name: timed(function, *arguments) for name, function in (functions | {"read": read}).items()}


def backward(functions: dict[str, Callable], *arguments: Any) -> dict[str, Callable[[], float]]:
    """Contenders of a backward pass over lists of tensors, and the time to copy those that get gradients."""
    wanted = [tensors for tensors in arguments if tensors[0].requires_grad]
    contenders = {name: timed_backward(function, *arguments) for name, function in functions.items()}
    return contenders | {"copy": timed(copied, *wanted)}


def read(*lists: Sequence[Tensor]) -> list[Tensor]:
    """The floor of what reads: every byte is read once and as little as possible is done with it."""
    return [tensor.detach().sum() for tensors in lists for tensor in tensors]


def copied(*lists: Sequence[Tensor]) -> list[Tensor]:
    """The floor of what reads and writes as much, such as a gradient in the place of each input."""
    return [tensor.detach().clone() for tensors in lists for tensor in tensors]


def filled(like: Sequence[Tensor]) -> list[Tensor]:
    """The floor of what writes: every byte is written once."""
    return [torch.empty(tensor.shape, dtype=tensor.dtype).fill_(1) for tensor in like]


def flat(result: Any) -> list[Tensor]:
    """All tensors of a result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in flat(part)] if isinstance(result, (list, tuple)) else []
