"""Which tensor of a net's output is its logits: the one rule for all of lwkd.

1. The output itself, where it is a tensor.
2. What is called ``logits``: a field or key of a mapping, named tuple, dataclass or object.
3. The only floating-point tensor with a class dimension, that is with two dimensions or more. A scalar loss is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lwkd.nets.inputs import tensors_in


def find_logits(output: Any, whose: str) -> Tensor:
    """The logits in what a net returned, by the rule at the head of this file.

    Args:
        output: what the net returned.
        whose: the net, for messages.

    Raises:
        ValueError: none, or several that may be it; says what was found.

    >>> import torch
    >>> find_logits({"loss": torch.tensor(1.0), "logits": torch.zeros(2, 3)}, "the student").shape
    torch.Size([2, 3])
    """
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    value = named if isinstance(named, Tensor) else output
    values = value if isinstance(value, (Tensor, Mapping, tuple, list)) else getattr(value, "__dict__", value)
    found = [tensor for tensor in tensors_in(values) if tensor.is_floating_point()]
    several = [tensor for tensor in found if tensor.dim() > 1]
    if len(several) == 1:
        return several[0]
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in several or found) or "no floating-point tensor"
    raise ValueError(
        f"{whose} gives {type(output).__name__} with {shapes}; expected a field or key 'logits', or a single tensor "
        "with classes (batch, classes, ...)"
    )
