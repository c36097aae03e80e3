"""Shared by the autograd of several ops: dtypes, how a rule is called, second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

Gradients = list[Tensor | None]
"""One gradient for each tensor of a list; None where none is needed."""


def accumulation(*tensors: Tensor) -> torch.dtype:
    """Dtype of an op's results: float64 if any input is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


class DifferentiableOp:
    """An op of ``torch.ops.lwkd`` with the rule of its gradient, called with no more work than its inputs need.

    Where no input needs a gradient, autograd is passed by. Where one does, the rule is that of an ``autograd.Function``
    whose arguments are the tensors themselves: with ``torch.library.register_autograd``, which takes lists apart and
    puts them together at every turn, forward and backward cost the host twice as much. ``torch.compile``, which looks
    at calls from above, finds the registered rule; fake tensors and dispatch modes come below both.

    Args:
        name: of the op. Its arguments are lists of tensors and plain values; it gives a tensor, or a tuple of tensors
            and lists of them.
        setup: ``(ctx, arguments, output)``, saves what ``backward`` needs.
        backward: ``(ctx, wanted, *grads)`` → a gradient for each argument. ``wanted`` says of each list which of its
            tensors need one; ``grads`` are as the output is, with None where nothing depends on a tensor.
    """

    def __init__(self, name: str, setup: Callable[..., None], backward: Callable[..., tuple[Any, ...]]) -> None:
        def registered(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            return backward(ctx, ctx.needs_input_grad, *grads)

        torch.library.register_autograd(f"lwkd::{name}", registered, setup_context=setup)
        self.op, self.setup, self.backward = getattr(torch.ops.lwkd, name).default, setup, backward

    def __call__(self, *arguments: Any) -> Any:
        """What the op gives out for these arguments."""
        if torch.compiler.is_compiling():
            return self.op(*arguments)
        tensors = _tensors(arguments) if torch.is_grad_enabled() else []
        if any(tensor.requires_grad for tensor in tensors):
            lengths: list[int | None] = []
            found = _Differentiated.apply(self, arguments, lengths, *tensors)
            output = _structured(found, lengths)
            return output if len(output) > 1 else output[0]
        with torch._C._AutoDispatchBelowAutograd():
            return self.op(*arguments)


class _Differentiated(torch.autograd.Function):
    """An op and its rule, on the tensors of all lists one after another."""

    @staticmethod
    def forward(
        ctx: Any, op: DifferentiableOp, arguments: tuple[Any, ...], lengths: list[int | None], *_: Tensor
    ) -> tuple[Tensor, ...]:
        """What the op gives out, flat; ``lengths`` becomes that of each of its parts, None for a tensor."""
        with torch._C._AutoDispatchBelowAutograd():
            output = op.op(*arguments)
        op.setup(ctx, arguments, output)
        parts = output if isinstance(output, tuple) else (output,)
        lengths += _lengths(parts)
        ctx.op, ctx.given, ctx.made = op, [length or 0 for length in _lengths(arguments)], lengths
        return tuple(_tensors(parts))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Gradients of the tensors, after none for the three arguments before them."""
        wanted = _structured(ctx.needs_input_grad[3:], ctx.given)
        found = ctx.op.backward(ctx, wanted, *_structured(grads, ctx.made))
        return (None, None, None, *(gradient for of in found if isinstance(of, list) for gradient in of))


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among values and in lists among them."""
    parts = (value if isinstance(value, list) else (value,) for value in values)
    return [one for part in parts for one in part if isinstance(one, Tensor)]


def _lengths(values: Sequence[Any]) -> list[int | None]:
    """Of each list of tensors; None for all else."""
    lists = (isinstance(value, list) and all(isinstance(one, Tensor) for one in value) for value in values)
    return [len(value) if is_list else None for value, is_list in zip(values, lists, strict=True)]


def _structured(flat: Sequence[Any], lengths: Sequence[int | None]) -> list[Any]:
    """Lists of these lengths, and single values for None, cut from a flat sequence."""
    left = iter(flat)
    return [next(left) if length is None else list(islice(left, length)) for length in lengths]


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
