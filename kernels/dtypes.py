"""The dtypes that the kernels read; they accumulate in float32 whatever the input, and have no float64 variants."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_dtypes(tensors: Sequence[Tensor], what: str) -> None:
    """Refuse tensors that the kernels do not read.

    Args:
        tensors: one for each layer.
        what: what they are, for the message; the tensor's index follows.

    Raises:
        TypeError: a dtype that the kernels do not read.
    """
    for index, tensor in enumerate(tensors):
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{what} {index} is {tensor.dtype}; the GPU kernels read float32, float16 and bfloat16. "
                "Convert it, or use lwkd.reference"
            )
