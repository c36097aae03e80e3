"""sgd_step and adamw_step against the reference, over a few steps; they have kernels for CUDA only."""

import math

import pytest
import torch
from backends import DTYPES, over
from tolerances import ROUNDED_BETA, STEPPED, assert_close

from lwkd import ops, reference

# Around a vector, the narrow loop, the wide loop and a chunk; the largest is three chunks.
SHAPES = [(size,) for size in (1, 7, 8, 0, 255, 257, 1023, 1029, 8192, 8193, 2 * 8192 + 1030)]
LAYER_OF = [index % 4 - 1 for index in range(len(SHAPES))]
STEPS = 3
by_kernels = over("dtype", interpreted=DTYPES, cuda=DTYPES)


class Both:
    """Parameters and states twice: stepped by the op on the backend's device, and by the reference on the CPU."""

    def __init__(self, backend, dtype, fill, states, counters=0):
        backend.needs_kernels()
        self.backend, self.dtype = backend, dtype
        parameters = backend.randoms(SHAPES, dtype)
        lists = [[torch.full_like(p, fill) for p in parameters] for _ in range(states)]
        lists += [[torch.zeros(()) for _ in parameters] for _ in range(counters)]
        self.truth = [parameters, *lists]
        self.mine = [backend.given(side) for side in self.truth]

    def step(self, number, op, **options):
        gradients = self.backend.randoms(SHAPES, self.dtype, number + 1)
        multipliers = torch.tensor((0.5, 1.0, 1.7))
        for of, side, on in ((ops, self.mine, self.backend.given), (reference, self.truth, list)):
            parameters, *states = side
            getattr(of, op)(parameters, on(gradients), *states, on([multipliers])[0], LAYER_OF, 0.3, **options)

    def compare(self, lists, tolerance):
        # All tensors at once: a single element of half precision may be off by more than the tolerance.
        for found, expected in zip(self.mine[lists], self.truth[lists], strict=True):
            found, expected = (torch.cat([t.cpu().flatten().float() for t in side]) for side in (found, expected))
            assert_close(found, expected, tolerance)


@by_kernels
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1, "maximize": True},
        {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
        {"momentum": 0.8, "nesterov": True, "maximize": True},
    ],
    ids=str,
)
def test_sgd(backend, options, dtype):
    both = Both(backend, dtype, math.nan, 1)  # the buffers hold nothing before the first step
    for number in range(STEPS):
        both.step(number, "sgd_step", first=number == 0, **options)
    both.compare(slice(None if options.get("momentum") else 1), STEPPED[dtype])


@by_kernels
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-4, "maximize": True},
        {"amsgrad": True, "weight_decay": 0.0, "betas": (0.0, 0.5)},
    ],
    ids=str,
)
def test_adamw(backend, options, dtype):
    both = Both(backend, dtype, 0.0, 3, counters=1)
    for number in range(STEPS):
        both.step(number, "adamw_step", **options)
    both.compare(slice(1), STEPPED[dtype])
    both.compare(slice(1, None), max(ROUNDED_BETA, STEPPED[dtype]))
    assert [step.item() for step in both.mine[-1]] == [STEPS] * len(SHAPES)
