"""Implementations take turns, round by round, so that whatever else the machine does meets all of them alike.

An implementation is a callable without arguments that takes one turn and returns what it measured, in most cases the
seconds of a call.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lwkd.program.provenance import quartiles

SMALL = os.environ.get("LWKD_BENCHMARK_SMALL") == "1"
"""All sizes are tiny, and nothing is compiled or built: whether the benchmarks run at all is then known in seconds."""

CLOCK: Callable[[], float] = time.perf_counter
"""What :func:`timed` and :func:`timed_backward` read."""

Name, Measured = TypeVar("Name"), TypeVar("Measured")
Timed = dict[str, Callable[[], float]]
"""Implementations by name, each of which returns seconds."""


def take_turns(
    implementations: Mapping[Name, Callable[[], Measured]],
    rounds: float = math.inf,
    *,
    warm_up: int = 0,
    fewest: int = 1,
    seconds: float = math.inf,
    enough: Callable[[Mapping[Name, list[Measured]]], bool] = lambda found: False,
) -> dict[Name, list[Measured]]:
    """What each implementation measured, round by round.

    Args:
        implementations: by name; each takes one turn a round, in this order.
        rounds: how many at most.
        warm_up: rounds before, of which nothing is kept.
        fewest: rounds that are made in any case.
        seconds: after which no further round is begun.
        enough: asked between rounds whether what was found will do.

    >>> take_turns({"lwkd": lambda: 1.0, "eager": lambda: 3.0}, 2)
    {'lwkd': [1.0, 1.0], 'eager': [3.0, 3.0]}
    """
    for _ in range(warm_up):
        for turn in implementations.values():
            turn()
    found: dict[Name, list[Measured]] = {name: [] for name in implementations}
    begin, done = time.perf_counter(), 0
    while done < fewest or (done < rounds and time.perf_counter() - begin < seconds and not enough(found)):
        for name, turn in implementations.items():
            found[name].append(turn())
        done += 1
    return found


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
