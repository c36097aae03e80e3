r"""Optimizer steps with a learning rate for each tensor, one launch for all parameters of a dtype; on CUDA only.

Legend: ``p`` parameter, ``g`` gradient; ``m`` momentum buffer, or first moment; ``v`` second moment;
``η_i = lr · multiplier of the layer of tensor i``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@torch.library.register_fake("lwkd::sgd_step")
@torch.library.register_fake("lwkd::adamw_step")
def _step_fake(*arguments: Any) -> None:
    """The steps write in place and return nothing."""


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
    r"""One step of SGD, in place, with a rate for each tensor.

    .. math:: g \leftarrow g + \lambda p,\quad m \leftarrow \mu m + (1-\tau)\,g\ (\mathrm{first}: g),\quad
        p \leftarrow p - \eta_i\,m\ (\mathrm{Nesterov}: g + \mu m;\ \mu = 0: g)

    What ``torch.optim.SGD(fused=True)`` does, within rounding. Multipliers, a learning rate in a tensor, ``grad_scale``
    and ``found_inf`` are read on the device, so nothing waits and a CUDA graph can replay the step.

    Args:
        parameters: on one CUDA device; any shapes, in memory without gaps; float32, float16 or bfloat16, one launch
            for each dtype (computed in float32).
        gradients: in the shapes and dtypes of the parameters. One in another memory order is copied.
        momentum_buffers: m, in the shapes, dtypes and memory order of the parameters; empty where ``momentum`` is 0.
        multipliers: ``(layers,)`` float32 on the device.
        layer_of: the layer of each parameter, whose multiplier it gets; −1 for a multiplier of 1.
        lr: learning rate, a number or a float32 tensor of one element on the device.
        momentum: μ.
        dampening: τ.
        weight_decay: λ.
        nesterov: step along ``g + μm``.
        maximize: ascend.
        first: the buffers hold nothing yet, and become the gradients.
        grad_scale: float32 of one element; the gradients are divided by it first, in place.
        found_inf: float32 of one element; where it is not 0 nothing changes.

    Raises:
        ValueError: lists of different length, tensors that do not belong together or are on different devices, a
            parameter with gaps, a state in another memory order, or a layer that has no multiplier.
        TypeError: for a dtype that is not one of the above, and for a sparse gradient.
        NotImplementedError: for tensors that are not on CUDA.

    Source: ``torch.optim.SGD``.

    On the CPU the reference does the same:

    >>> import lwkd.reference
    >>> p, g = torch.ones(2), torch.tensor([1.0, 2.0])
    >>> lwkd.reference.sgd_step([p], [g], [], torch.tensor([0.5]), [0], lr=0.1)
    >>> p
    tensor([0.9500, 0.9000])
    """
    _on_cuda("sgd_step", parameters)
    number, tensor = _split(lr)
    _call(
        "sgd_step",
        parameters,
        gradients,
        momentum_buffers,
        multipliers,
        layer_of,
        number,
        tensor,
        momentum,
        dampening,
        weight_decay,
        nesterov,
        maximize,
        first,
        grad_scale,
        found_inf,
    )


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
    r"""One step of AdamW, in place, with a rate for each tensor.

    .. math:: t \leftarrow t + 1,\quad p \leftarrow p - \eta_i \lambda p,\quad
        m \leftarrow \beta_1 m + (1-\beta_1)\,g,\quad v \leftarrow \beta_2 v + (1-\beta_2)\,g^2

    .. math:: p \leftarrow p - \frac{\eta_i}{1-\beta_1^t}\,\frac{m}{\sqrt{v}/\sqrt{1-\beta_2^t} + \epsilon}
        \quad(\mathrm{AMSGrad}: \text{the largest } v \text{ so far})

    What ``torch.optim.AdamW(fused=True)`` does, within rounding, with the same states. Steps, multipliers, a learning
    rate in a tensor, ``grad_scale`` and ``found_inf`` are read on the device, so nothing waits and a CUDA graph can
    replay the step.

    Args:
        parameters: on one CUDA device; any shapes, in memory without gaps; float32, float16 or bfloat16, one launch
            for each dtype (computed in float32).
        gradients: in the shapes and dtypes of the parameters. One in another memory order is copied.
        exp_avgs: m, in the shapes, dtypes and memory order of the parameters.
        exp_avg_sqs: v, likewise.
        max_exp_avg_sqs: the largest v so far, likewise; empty without ``amsgrad``.
        steps: t of each parameter, float32 of one element on the device; incremented by one.
        multipliers: ``(layers,)`` float32 on the device.
        layer_of: the layer of each parameter, whose multiplier it gets; −1 for a multiplier of 1.
        lr: learning rate, a number or a float32 tensor of one element on the device.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: λ.
        amsgrad: divide by the largest v so far.
        maximize: ascend.
        grad_scale: float32 of one element; the gradients are divided by it first, in place.
        found_inf: float32 of one element; where it is not 0 nothing changes.

    Raises:
        ValueError: lists of different length, tensors that do not belong together or are on different devices, a
            parameter with gaps, a state in another memory order, or a layer that has no multiplier.
        TypeError: for a dtype that is not one of the above, and for a sparse gradient.
        NotImplementedError: for tensors that are not on CUDA.

    Source: ``torch.optim.AdamW``; Loshchilov & Hutter 2019, Reddi et al. 2018 (AMSGrad).

    On the CPU the reference does the same:

    >>> import lwkd.reference
    >>> p, g, m, v, t = torch.ones(2), torch.tensor([1.0, -2.0]), torch.zeros(2), torch.zeros(2), torch.tensor(0.0)
    >>> lwkd.reference.adamw_step([p], [g], [m], [v], [], [t], torch.tensor([0.5]), [0], lr=0.1, weight_decay=0.0)
    >>> p, t
    (tensor([0.9500, 1.0500]), tensor(1.))
    """
    _on_cuda("adamw_step", parameters)
    number, tensor = _split(lr)
    _call(
        "adamw_step",
        parameters,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        steps,
        multipliers,
        layer_of,
        number,
        tensor,
        *betas,
        eps,
        weight_decay,
        amsgrad,
        maximize,
        grad_scale,
        found_inf,
    )


def _on_cuda(op: str, parameters: Sequence[Tensor]) -> None:
    """Raise unless there is a kernel for the first parameter's device; the op compares the other devices with it."""
    if parameters and parameters[0].device.type not in ("cuda", "meta"):
        raise NotImplementedError(
            f"lwkd.ops.{op}: found parameters on {parameters[0].device}; it has a kernel for CUDA only, since on a CPU "
            f"parameter groups cost a few percent of a step at most. Step the base optimizer, or call "
            f"lwkd.reference.{op}, which runs on every device."
        )


def _call(op: str, parameters: Sequence[Tensor], gradients: Sequence[Tensor], *others: Any) -> None:
    """Call an op. Where it has no kernel for its input, look for a sparse gradient, and name it if that is why."""
    try:
        getattr(torch.ops.lwkd, op)(parameters, gradients, *others)
    except NotImplementedError:
        for index, gradient in enumerate(gradients):
            if gradient.layout != torch.strided:
                raise TypeError(
                    f"lwkd.ops.{op}: gradient {index}: expected a dense tensor, found layout {gradient.layout}. Use "
                    "layers without sparse gradients, or step without lwkd's fused step."
                ) from None
        raise


def _split(lr: float | Tensor) -> tuple[float, Tensor | None]:
    """The learning rate as two arguments of the op: a number, and a tensor that takes precedence over it."""
    return (0.0, lr.detach()) if isinstance(lr, Tensor) else (float(lr), None)
