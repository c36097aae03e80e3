"""What the backward of several ops needs."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation(*tensors: Tensor) -> torch.dtype:
    """What results are in: float64 if any input is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def gradients_through(outputs: list[Tensor], inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor | None]:
    """Gradients that can be differentiated again: a second derivative goes through the reference."""
    wanted = [i for i, tensor in enumerate(inputs) if tensor.requires_grad]
    found = torch.autograd.grad(
        outputs, [inputs[i] for i in wanted], grads, create_graph=True, allow_unused=True, materialize_grads=True
    )
    gradients: list[Tensor | None] = [None] * len(inputs)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return gradients
