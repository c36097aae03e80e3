"""The rate update, from statistics to multipliers: lwkd beside eager PyTorch, ``torch.compile`` and a no-op.

A few hundred numbers at most, so what is timed is calls: ``noop`` is an op with the same tensors that does nothing
(``noop.py``). One test for each way a divergence is formed, one for each policy that moves; how it grows with layers is
in ``layers.py``.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness import SMALL, beside_eager, timed
from benchmarks.noop import floor
from lwkd import ops, reference
from lwkd.reference import STATISTICS, RateState

CALLS = 1 if SMALL else 50
LAYERS = (4, 64)


def updated(layers: int, **options: str) -> tuple[RateState, torch.Tensor]:
    """A state that has seen a measurement, and the statistics of the next."""
    width = STATISTICS[options["divergence"]]
    generator = torch.Generator().manual_seed(0)
    # The sums of a pair of derivatives: aa, bb, ab, dd; elsewhere any positive numbers will do.
    a, b = torch.randn(2, layers, 32, generator=generator).unbind()
    sums = torch.stack([(a * a).sum(1), (b * b).sum(1), (a * b).sum(1), (a - b).square().sum(1)], 1)
    statistics = sums if width == 4 else sums[:, :width].contiguous()
    state, _, _ = ops.update_rates(reference.initial_rates(layers, width), statistics, **options)
    return state, 1.1 * statistics


def competing(layers: int, compare, **options: str) -> None:
    state, statistics = updated(layers, **options)
    functions = beside_eager(
        lambda state, statistics: ops.update_rates(state, statistics, **options),
        lambda state, statistics: reference.update_rates(state, statistics, **options),
    )
    implementations = {name: timed(f, state, statistics, calls=CALLS) for name, f in functions.items()}
    compare(implementations | floor([*state, statistics], calls=CALLS))


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("divergence", STATISTICS)
def test_divergence(divergence, layers, compare):
    competing(layers, compare, divergence=divergence, policy="relative")


@pytest.mark.parametrize("policy", ["relative", "decay", "local"])
def test_policy(policy, compare):
    competing(16, compare, divergence="attention", policy=policy)
