"""What the autograd of several ops shares."""

from __future__ import annotations

import torch
from torch import Tensor

Gradients = list[Tensor | None]
"""One gradient for each tensor of a list; None where none is needed."""


def accumulation(*tensors: Tensor) -> torch.dtype:
    """Dtype of an op's results: float64 if any input is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def gradients_through(outputs: list[Tensor], inputs: list[Tensor], grads: list[Tensor]) -> Gradients:
    """Gradients that can be differentiated again, from outputs that the reference made of the inputs."""
    wanted = [i for i, tensor in enumerate(inputs) if tensor.requires_grad]
    found = torch.autograd.grad(
        outputs, [inputs[i] for i in wanted], grads, create_graph=True, allow_unused=True, materialize_grads=True
    )
    gradients: Gradients = [None] * len(inputs)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return gradients
