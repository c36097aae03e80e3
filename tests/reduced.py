"""TF32 and the like on a CPU: inputs of convolutions and matrix products are rounded, as a GPU's tensor cores do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CONVOLUTIONS = torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default
PRODUCTS = torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default


def rounded(value: Any, bits: int) -> Any:
    """A float32 tensor with so many bits of the mantissa left, to nearest; anything else as it is."""
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return value
    mantissa, exponent = torch.frexp(value)
    return torch.ldexp(torch.round(mantissa * 2 ** (bits + 1)) / 2 ** (bits + 1), exponent)


def by_switches(function: Any) -> bool:
    """Whether torch's switches let this operation use TF32 on a GPU."""
    if function in PRODUCTS:
        return torch.backends.cuda.matmul.fp32_precision == "tf32"
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


class Reduced(TorchDispatchMode):
    """Inside, operations for which ``lowered`` holds see their inputs with ``bits`` of the mantissa: 10 are TF32."""

    def __init__(self, lowered: Callable[[Any], bool] = by_switches, bits: int = 10) -> None:
        super().__init__()
        self.lowered, self.bits, self.count = lowered, bits, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (*CONVOLUTIONS, *PRODUCTS) and self.lowered(func):
            self.count += 1
            args = [rounded(value, self.bits) for value in args]
        return func(*args, **(kwargs or {}))
