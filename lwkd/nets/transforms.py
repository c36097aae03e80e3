"""Passes inside of a transform of ``torch.func`` (``grad``, ``vmap``, ``vjp``), whose tensors are wrapped.

A measurement looks at what is inside of the wrappers, and runs as if there were no transform. Under ``vmap`` a net sees
one item of a batch; the items of all calls are the rows again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from lwkd.nets.inputs import Inputs
from lwkd.nets.passes import hooks_disabled


def transformed() -> bool:
    """Whether a transform is running: no rule of the ops is open to it, and nothing outside may be written to."""
    return not torch.compiler.is_compiling() and _functorch.peek_interpreter_stack() is not None


def outside(tensor: Tensor) -> Tensor:
    """The tensor without wrappers, outside of all transforms; what ``vmap`` runs over and the batch are one dimension.

    Raises:
        NotImplementedError: one ``vmap`` runs inside of another.

    >>> def one(row):
    ...     print(row[None].shape, outside(row[None]).shape)
    ...     return row
    >>> _ = torch.vmap(one)(torch.zeros(4, 3))
    torch.Size([1, 3]) torch.Size([4, 3])
    """
    items = -1  # the dimension that vmap runs over; other transforms change no shape
    while _functorch.is_functorch_wrapped_tensor(tensor):
        found = _functorch.maybe_get_bdim(tensor)
        if found >= 0 <= items:
            raise NotImplementedError(
                "a net that lwkd watches is called inside of two vmaps, one in the other, and which items are the rows "
                "of its batch is not known. Call it with a batch instead of the inner vmap"
            )
        items = max(items, found)
        tensor = _functorch.get_unwrapped(tensor)
    if items < 0:
        return tensor
    tensor = tensor.movedim(items, 0)
    return tensor.flatten(0, 1) if tensor.dim() > 1 else tensor


def untransformed(function: Callable[..., None]) -> Callable[..., None]:
    """The function, called outside of all transforms, with inputs as they are there; not so in lwkd's own passes."""

    @wraps(function)
    def call(*args: Any) -> None:
        if not transformed() or hooks_disabled():
            function(*args)
            return
        with temporarily_clear_interpreter_stack():
            function(*(arg.map(outside) if isinstance(arg, Inputs) else arg for arg in args))

    return call
