"""From 1 to 512 layers of small maps: one call for all beside one a layer, eager PyTorch, and a call that does nothing.

Features of 2 × 8 × 4 × 4 leave nothing but calls to be timed: ``noop`` is an op with the same tensors that does nothing
(``noop.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import SMALL, beside_eager, timed
from benchmarks.noop import floor
from benchmarks.ops.hutchinson import SEED, eager_trace
from benchmarks.shapes import TINY, pairs
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
    """Implementations of an op that takes these lists, one entry a layer in each."""
    layers = len(lists[0])
    functions = beside_eager(ours, theirs, compiles=layers <= COMPILED_UP_TO)
    one_by_one = [[[tensor] for tensor in layer] for layer in zip(*lists, strict=True)]

    def separate() -> None:
        for layer in one_by_one:
            ours(*layer)

    timed_here = partial(timed, calls=calls(layers))
    found = {name: timed_here(f, *lists) for name, f in functions.items()}
    return found | {"separate calls": timed_here(separate)} | floor(*lists, calls=calls(layers))


@many
def test_attention_divergence(layers, compare):
    lists = pairs((TINY,) * layers, torch.float32)
    compare(growing(ops.attention_divergence, reference.attention_divergence, lists))


@many
def test_attention_maps(layers, compare):
    features, _ = pairs((TINY,) * layers, torch.float32)
    compare(growing(ops.attention_maps, reference.attention_maps, [features]))


@many
def test_jacobian_sums(layers, compare):
    compare(growing(ops.jacobian_sums, reference.jacobian_sums, pairs((TINY,) * layers, torch.float32)))


@many
def test_hutchinson_trace(layers, compare):
    products, _ = pairs((TINY,) * layers, torch.float32)
    probes = ops.rademacher(products, SEED)

    def ours(products: list[Tensor]) -> Tensor:
        return ops.hutchinson_trace(products, range(len(products)), SEED, len(products))

    def theirs(products: list[Tensor]) -> Tensor:
        return eager_trace(products, probes, list(range(len(products))), len(products))

    compare(growing(ours, theirs, [products]))


@many
def test_update_rates(layers, compare):
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
    implementations = {name: timed_here(f, state, statistics) for name, f in beside_eager(ours, theirs).items()}
    implementations["separate calls"] = timed_here(separate)
    compare(implementations | floor([*state, statistics], calls=calls(layers)))
