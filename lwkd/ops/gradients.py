"""Shared by the autograd of several ops: dtypes, the way past autograd, second derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

Gradients = list[Tensor | None]
"""One gradient for each tensor of a list; None where none is needed."""


def accumulation(*tensors: Tensor) -> torch.dtype:
    """Dtype of an op's results: float64 if any input is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def below_autograd(*lists: Sequence[Tensor]) -> AbstractContextManager[object]:
    """Context that skips the Python frame of an op's autograd where no input needs a gradient.

    The frame costs more than the dispatch of the whole op. What looks at calls from above (``torch.compile``, a
    transform of ``torch.func``) finds it in place; fake tensors and dispatch modes come below it.

    Args:
        lists: all tensors that the op is called with.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or (torch.is_grad_enabled() and any(tensor.requires_grad for tensors in lists for tensor in tensors))
    ):
        return nullcontext()
    return torch._C._AutoDispatchBelowAutograd()


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
