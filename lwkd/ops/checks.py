"""Checks of the input that every op makes before it calls a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

DEVICES = ("cpu", "cuda", "meta")


def check_inputs(op: str, tensors: Sequence[Tensor]) -> None:
    """Raise for what no kernel can notice itself: an empty list, mixed or other devices, tangents of forward mode."""
    if not tensors:
        raise ValueError(f"lwkd.ops.{op}: expected at least one layer, found an empty list. Pass one feature a layer.")
    dual = forward_ad._current_level >= 0
    device = tensors[0].device
    # Host time delays the launch on a GPU, so tensors are examined one by one only if some tensor is wrong.
    if not dual and device.type in DEVICES and len({tensor.device for tensor in tensors}) == 1:
        return
    for index, tensor in enumerate(tensors):
        if tensor.device.type not in DEVICES:
            raise NotImplementedError(
                f"lwkd.ops.{op}: found a tensor on {tensor.device}; there are kernels for the CPU and for CUDA. "
                f"Move it, or call lwkd.reference.{op}, which runs on every device."
            )
        if tensor.device != device:
            raise ValueError(
                f"lwkd.ops.{op}: tensor {index} is on {tensor.device}, the first one on {device}. Move student's and "
                "teacher's tensors to one device."
            )
        if dual and _carries_tangent(tensor):
            raise RuntimeError(
                f"lwkd.ops.{op} has no forward-mode rule and would drop the tangent of its input. Pass tangents as "
                f"arguments (attention_maps), detach the input, or call lwkd.reference.{op}."
            )


def _carries_tangent(tensor: Tensor) -> bool:
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return forward_ad.unpack_dual(tensor).tangent is not None
