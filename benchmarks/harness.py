"""Implementations that take turns (``lwkd/program/turns.py``), and the figures that come of it.

An implementation is a callable without arguments that takes one turn and returns what it measured, in most cases the
seconds of a call.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lwkd.program.provenance import quartiles

SMALL = os.environ.get("LWKD_BENCHMARK_SMALL") == "1"
"""All sizes are tiny, and nothing is compiled or built: whether the benchmarks run at all is then known in seconds."""

CLOCK: Callable[[], float] = time.perf_counter
"""What :func:`timed` and :func:`timed_backward` read."""

Timed = dict[str, Callable[[], float]]
"""Implementations by name, each of which returns seconds."""


def summary(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """The figures of one case from the seconds of its implementations, round by round; ``lwkd`` is among them.

    Ratios are formed within each round, which meets all implementations alike. The least times, which noise can only
    raise, are what ``floors.py`` compares.

    >>> found = summary({"lwkd": [0.001, 0.002, 0.001], "eager": [0.003, 0.004, 0.003]})
    >>> found["eager"]["ratio_to_lwkd"], found["eager"]["ratio_of_least"]
    ({'median': 3.0, 'low': 2.5, 'high': 3.0}, 3.0)
    """
    least = {name: min(times) for name, times in seconds.items()}
    return {
        name: {
            "milliseconds": quartiles([1e3 * time for time in times]),
            "ratio_to_lwkd": quartiles([time / ours for time, ours in zip(times, seconds["lwkd"], strict=True)]),
            "least_milliseconds": float(f"{1e3 * least[name]:.4g}"),
            "ratio_of_least": float(f"{least[name] / least['lwkd']:.4g}"),
        }
        for name, times in seconds.items()
    }


def timed(function: Callable[..., object], *arguments: Any, calls: int = 1) -> Callable[[], float]:
    """Seconds of a call, as a mean over ``calls``: a call of a few microseconds is too short to be timed alone."""

    def run() -> float:
        begin = CLOCK()
        for _ in range(calls):
            function(*arguments)
        return (CLOCK() - begin) / calls

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
        begin = CLOCK()
        torch.autograd.grad(outputs, inputs, grads)
        return CLOCK() - begin

    return run


def beside_eager(ours: Callable[..., Any], theirs: Callable[..., Any], compiles: bool = True) -> dict[str, Callable]:
    """An op, the same in eager PyTorch, and that compiled, by the names that stand in the tables."""
    found = {"lwkd": ours, "eager": theirs}
    if compiles and not SMALL:
        found["torch.compile"] = torch.compile(theirs, fullgraph=True)
    return found


def forward(functions: Mapping[str, Callable], *arguments: Any) -> Timed:
    """Forward passes over lists of tensors, and the time to read these once."""
    return {name: timed(function, *arguments) for name, function in (*functions.items(), ("read", read))}


def backward(functions: Mapping[str, Callable], *arguments: Any) -> Timed:
    """Backward passes over lists of tensors, and the time to copy those that get gradients."""
    wanted = [tensors for tensors in arguments if tensors[0].requires_grad]
    passes = {name: timed_backward(function, *arguments) for name, function in functions.items()}
    return passes | {"copy": timed(copied, *wanted)}


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
