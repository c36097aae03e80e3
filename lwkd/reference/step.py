r"""The specification of the optimizer steps with a learning rate for each tensor: SGD and AdamW as in ``torch.optim``.

Legend: ``p`` parameter, ``g`` gradient; ``m`` momentum buffer, or first moment; ``v`` second moment;
``η_i = lr · multiplier of the layer of tensor i``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lwkd.reference.attention import widen


def _rates(multipliers: Tensor, layer_of: Sequence[int], lr: float | Tensor) -> list[Tensor]:
    """η of every tensor, in float64; layer −1 has a multiplier of 1."""
    of_layer = multipliers.double()
    of_tensor = [of_layer.new_ones(()) if layer < 0 else of_layer[layer] for layer in layer_of]
    return [(lr.reshape(()).double() if isinstance(lr, Tensor) else lr) * multiplier for multiplier in of_tensor]


def _skipped(found_inf: Tensor | None) -> bool:
    return found_inf is not None and bool(found_inf != 0)


def _descent(gradient: Tensor, grad_scale: Tensor | None, maximize: bool) -> Tensor:
    """The direction to descend along, at least in float32; a scaled gradient is unscaled in place."""
    g = widen(gradient)
    if grad_scale is not None:
        g = g / grad_scale.to(g.dtype)
        gradient.copy_(g)
    return -g if maximize else g


@torch.no_grad()
def sgd_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    multipliers: Tensor,
    layer_of: Sequence[int],
    lr: float | Tensor,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    r"""In plain PyTorch what :func:`lwkd.ops.sgd_step` does, on every device and for float64 too.

    .. math:: g \leftarrow g + \lambda p,\quad m \leftarrow \mu m + (1-\tau)\,g\ (\mathrm{first}: g),\quad
        p \leftarrow p - \eta_i\,m\ (\mathrm{Nesterov}: g + \mu m;\ \mu = 0: g)
    """
    if _skipped(found_inf):
        return
    buffers = list(momentum_buffers) if momentum != 0 else [None] * len(parameters)
    rates = _rates(multipliers, layer_of, lr)
    for parameter, gradient, buffer, rate in zip(parameters, gradients, buffers, rates, strict=True):
        p, g = widen(parameter), _descent(gradient, grad_scale, maximize)
        if weight_decay != 0:
            g = g + weight_decay * p
        if buffer is not None:
            m = g if first else momentum * widen(buffer) + (1 - dampening) * g
            buffer.copy_(m)
            g = g + momentum * m if nesterov else m
        parameter.copy_(p - rate.to(p.dtype) * g)


@torch.no_grad()
def adamw_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    multipliers: Tensor,
    layer_of: Sequence[int],
    lr: float | Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    r"""In plain PyTorch what :func:`lwkd.ops.adamw_step` does, on every device and for float64 too.

    .. math:: t \leftarrow t + 1,\quad p \leftarrow p - \eta_i \lambda p,\quad
        m \leftarrow \beta_1 m + (1-\beta_1)\,g,\quad v \leftarrow \beta_2 v + (1-\beta_2)\,g^2

    .. math:: p \leftarrow p - \frac{\eta_i}{1-\beta_1^t}\,\frac{m}{\sqrt{v}/\sqrt{1-\beta_2^t} + \epsilon}
        \quad(\mathrm{AMSGrad}: \text{the largest } v \text{ so far})
    """
    if _skipped(found_inf):
        return
    beta1, beta2 = betas
    largest = list(max_exp_avg_sqs) if amsgrad else [None] * len(parameters)
    rates = _rates(multipliers, layer_of, lr)
    columns = zip(parameters, gradients, exp_avgs, exp_avg_sqs, largest, steps, rates, strict=True)
    for parameter, gradient, exp_avg, exp_avg_sq, max_exp_avg_sq, step, tensor_rate in columns:
        p, g = widen(parameter), _descent(gradient, grad_scale, maximize)
        step += 1
        t, rate = step.double(), tensor_rate.to(p.dtype)
        p = p - rate * weight_decay * p
        m = beta1 * widen(exp_avg) + (1 - beta1) * g
        v = beta2 * widen(exp_avg_sq) + (1 - beta2) * g * g
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)
        if max_exp_avg_sq is not None:
            v = torch.maximum(widen(max_exp_avg_sq), v)
            max_exp_avg_sq.copy_(v)
        size, root = rate / (1 - beta1**t).to(p.dtype), (1 - beta2**t).sqrt().to(p.dtype)
        parameter.copy_(p - size * m / (v.sqrt() / root + eps))
