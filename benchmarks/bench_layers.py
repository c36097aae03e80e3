"""From 1 to 512 layers of small maps: one call for all against one a layer, eager PyTorch, and a call of nothing.

Run with ``python -m pytest benchmarks/bench_layers.py``; ``conftest.py`` says how the contenders take turns and where
the ratios are kept. Features of 2 × 8 × 4 × 4 leave nothing but calls to be timed: ``nothing`` is an op with the same
tensors that does nothing (``nothing.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from bench_hutchinson import SEED, eager_trace
from nothing import floor
from shapes import SMALL, TINY, pairs
from timing import rivals, timed
from torch import Tensor

from lwkd import ops, reference
from lwkd.reference import RateState

LAYERS = (1, 4) if SMALL else (1, 4, 16, 64, 256, 512)

# torch.compile unrolls the layers: beyond this, compiling takes minutes, which says nothing of its speed.
COMPILED_UP_TO = 16

many = pytest.mark.parametrize("layers", LAYERS)


def calls(layers: int) -> int:
    """So many calls are timed together: few layers take microseconds."""
    return 1 if SMALL else max(1, 64 // layers)


def growing(
    ours: Callable[..., Any], theirs: Callable[..., Any], lists: Sequence[list[Tensor]]
) -> dict[str, Callable[[], float]]:
    """Contenders of an op that takes these lists, one entry a layer in each."""
    layers = len(lists[0])
    functions = rivals(ours, theirs, compiles=layers <= COMPILED_UP_TO)
    one_by_one = [[[tensor] for tensor in layer] for layer in zip(*lists, strict=True)]

    def separate() -> None:
        for layer in one_by_one:
            ours(*layer)

    timed_here = partial(timed, calls=calls(layers))
    found = {name: timed_here(f, *lists) for name, f in functions.items()}
    return found | {"separate calls": timed_here(separate)} | floor(*lists, calls=calls(layers))


@many
@pytest.mark.benchmark(group="attention divergence")
def test_attention_divergence(layers, contest):
    lists = pairs((TINY,) * layers, torch.float32)
    contest(growing(ops.attention_divergence, reference.attention_divergence, lists))


@many
@pytest.mark.benchmark(group="attention maps")
def test_attention_maps(layers, contest):
    features, _ = pairs((TINY,) * layers, torch.float32)
    contest(growing(ops.attention_maps, reference.attention_maps, [features]))


@many
@pytest.mark.benchmark(group="jacobian sums")
def test_jacobian_sums(layers, contest):
    contest(growing(ops.jacobian_sums, reference.jacobian_sums, pairs((TINY,) * layers, torch.float32)))


@many
@pytest.mark.benchmark(group="hutchinson trace")
def test_hutchinson_trace(layers, contest):
    products, _ = pairs((TINY,) * layers, torch.float32)
    probes = ops.rademacher(products, SEED)

    def ours(products: list[Tensor]) -> Tensor:
        return ops.hutchinson_trace(products, range(len(products)), SEED, len(products))

    def theirs(products: list[Tensor]) -> Tensor:
        return eager_trace(products, probes, list(range(len(products))), len(products))

    contest(growing(ours, theirs, [products]))


@many
@pytest.mark.benchmark(group="update rates")
def test_update_rates(layers, contest):
    """Under ``decay``, where layers do not know of each other, so that they can be updated one by one at all."""
    statistics = torch.rand(layers, 1, generator=torch.Generator().manual_seed(0)) + 0.1
    state, _, _ = ops.update_rates(reference.initial_rates(layers), statistics, policy="decay")
    each = [
        (RateState(*(tensor[layer : layer + 1] for tensor in state[:-1]), state.counts), statistics[layer : layer + 1])
        for layer in range(layers)
    ]

    def ours(state: RateState, statistics: Tensor) -> object:
        return ops.update_rates(state, statistics, policy="decay")

    def theirs(state: RateState, statistics: Tensor) -> object:
        return reference.update_rates(state, statistics, policy="decay")

    def separate() -> None:
        for one in each:
            ours(*one)

    # The number of layers is a size here, not a number of tensors: compiling takes as long for one as for many.
    timed_here = partial(timed, calls=calls(layers))
    contenders = {name: timed_here(f, state, statistics) for name, f in rivals(ours, theirs).items()}
    contenders["separate calls"] = timed_here(separate)
    contest(contenders | floor([*state, statistics], calls=calls(layers)))
