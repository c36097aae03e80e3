"""Fake kernels of the optimizer steps, which write in place and return nothing."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.register_fake("lwkd::sgd_step")
def _sgd_step_fake(
    parameters: list[Tensor],
    gradients: list[Tensor],
    momentum_buffers: list[Tensor],
    multipliers: Tensor,
    layer_of: list[int],
    lr: float,
    lr_tensor: Tensor | None,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    pass


@torch.library.register_fake("lwkd::adamw_step")
def _adamw_step_fake(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    multipliers: Tensor,
    layer_of: list[int],
    lr: float,
    lr_tensor: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    pass
