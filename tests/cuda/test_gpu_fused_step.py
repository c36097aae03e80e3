"""Whole fused steps on the device: against torch's fused forms, bit for bit again, and in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from backends import CUDA, DTYPES
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from lwkd.optimizer.fused_step import FusedStep

SHAPES = ((300, 301), (64, 3, 7, 7), (7,), (0,), (1,), (8193,))
LAYER_OF = (0, 1, None, 1, 0, 2)
MULTIPLIERS = (0.5, 1.0, 1.7)
BASES = {
    "sgd": (SGD, {}),
    "momentum": (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adamw": (AdamW, {}),
    "amsgrad": (AdamW, {"amsgrad": True, "betas": (0.8, 0.95)}),
}
CLOSE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Relative and absolute: a few steps, each rounded to the parameters' dtype."""


def make(base: str, device: torch.device, dtype: torch.dtype, lr: float | Tensor = 0.1, groups: bool = False):
    """Parameters, an optimizer over them in one group or in one for each, and the layer of each."""
    kind, options = BASES[base]
    parameters = [p.to(device).requires_grad_() for p in CUDA.randoms(SHAPES, dtype)]
    rates = [lr * (1.0 if layer is None else MULTIPLIERS[layer]) for layer in LAYER_OF]
    each = [{"params": [p], "lr": rate} for p, rate in zip(parameters, rates, strict=True)]
    layers = {id(parameter): layer for parameter, layer in zip(parameters, LAYER_OF, strict=True)}
    return parameters, kind(each if groups else parameters, lr=lr, fused=True, **options), lambda p: layers[id(p)]


def give_gradients(parameters: list[Tensor], number: int, bucket: bool = False) -> None:
    gradients = [g.to(parameters[0].device) for g in CUDA.randoms(SHAPES, parameters[0].dtype, number)]
    if bucket:  # one behind the other, beginning at an odd place
        whole = torch.cat([gradients[0].new_zeros(1), *(g.flatten() for g in gradients)])
        pieces = whole[1:].split([g.numel() for g in gradients])
        gradients = [piece.view(g.shape) for piece, g in zip(pieces, gradients, strict=True)]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def run(base: str, device: torch.device, dtype: torch.dtype, bucket: bool = False) -> tuple[list[Tensor], Optimizer]:
    parameters, optimizer, layer_of = make(base, device, dtype)
    step, multipliers = FusedStep(optimizer), torch.tensor(MULTIPLIERS, device=device)
    for number in range(1, 5):
        give_gradients(parameters, number, bucket)
        step.step(layer_of, multipliers)
    return parameters, optimizer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", BASES)
def test_as_torch(base, dtype, cuda):
    mine, optimizer = run(base, cuda, dtype)
    theirs, expected, _ = make(base, cuda, dtype, groups=True)
    for number in range(1, 5):
        give_gradients(theirs, number)
        expected.step()
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=CLOSE[dtype], atol=CLOSE[dtype])
        found, state = optimizer.state.get(one, {}), expected.state.get(other, {})
        assert set(found) == set(state)
        for name in state:
            torch.testing.assert_close(found[name], state[name], rtol=CLOSE[dtype], atol=CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", BASES)
def test_the_same_bits(base, dtype, cuda):
    first, _ = run(base, cuda, dtype)
    for bucket in (False, True):
        again, _ = run(base, cuda, dtype, bucket)
        assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


@pytest.mark.parametrize("base", BASES)
def test_replayed(base, cuda):
    """A graph sees the learning rate, the multipliers and the gradients that are there when it is replayed."""

    def follow(do: Callable[[Callable[[], None]], Callable[[], None]]) -> list[Tensor]:
        lr, multipliers = torch.tensor(0.1, device=cuda), torch.tensor(MULTIPLIERS, device=cuda)
        parameters, optimizer, layer_of = make(base, cuda, torch.float32, lr)
        step = FusedStep(optimizer)
        give_gradients(parameters, 1)
        step.step(layer_of, multipliers)
        again = do(lambda: step.step(layer_of, multipliers))
        for number in (2, 3, 4):
            lr.fill_(0.1 * number)
            multipliers.mul_(0.9)
            for parameter, gradient in zip(parameters, CUDA.randoms(SHAPES, torch.float32, number), strict=True):
                parameter.grad.copy_(gradient)
            again()
        return parameters

    def captured(step: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    for one, other in zip(follow(lambda step: step), follow(captured), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_a_grad_scaler_waits_for_nothing(base, cuda):
    parameters, optimizer, layer_of = make(base, cuda, torch.float32)
    before = [p.detach().clone() for p in parameters]
    step, multipliers = FusedStep(optimizer), torch.tensor(MULTIPLIERS, device=cuda)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0, device=cuda), torch.tensor(1.0, device=cuda)
    give_gradients(parameters, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.step(layer_of, multipliers)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(*pair) for pair in zip(parameters, before, strict=True))
    if base == "adamw":
        assert all(optimizer.state[p]["step"] == 0 for p in parameters)
