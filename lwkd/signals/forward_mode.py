"""Functions of torch that are computed by rules of our own while a net is differentiated in forward mode.

First derivatives, :class:`JointForwardMode`. torch (2.11) pushes a tangent through a convolution or a linear layer in
three calls: of the input, of the tangent, and of the input with a weight's tangent of zeros that it fills first; and
through a batch norm by a decomposition in Python. Here input and tangent go through a linear layer together, as the
rows of one batch, and the weights' tangent, which nobody asked for, is left out. The numbers are the same but for
rounding.

Second derivatives, :class:`ExplicitNorms`. torch (2.11) loses the dependence of a norm's saved mean and deviation on
the input in nested forward mode, without a word: second derivatives through ``batch_norm`` in train mode,
``instance_norm`` and ``layer_norm`` are 8 to 110 % off. First derivatives, double backward and ``group_norm`` are
right.

Third derivatives, :class:`TrainedNorms`. The same dependence is lost in a third backward: gradients of second
derivatives are 11 to 61 % off. torch 2.15 refuses that for ``batch_norm``, and is as wrong for ``layer_norm``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode


class ReplacedFunctions(TorchFunctionMode):
    """Inside, functions that have a rule are computed by it; a rule that returns None leaves the call to torch."""

    rules: ClassVar[Mapping[Any, Callable[..., Tensor | None]]]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = self.rules.get(func)
        found = None if rule is None else rule(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if found is None else found


# First derivatives: primal and tangent in one call


def _tangent(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else forward_ad.unpack_dual(tensor).tangent


def _joint_linear(function: Callable[..., Tensor], dims: int | None) -> Callable[..., Tensor | None]:
    """The rule of a function that is linear in its first argument and does the same to each of its rows.

    Args:
        function: the function.
        dims: dimensions of an input that has rows; None is any number above one.
    """

    def rule(input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **more: Any) -> Tensor | None:
        if (input.dim() != dims if dims else input.dim() < 2) or not (_tangent(weight) is _tangent(bias) is None):
            return None
        primal, tangent = forward_ad.unpack_dual(input)
        if tangent is None:
            return None
        output, change = function(torch.cat([primal, tangent]), weight, None, *rest, **more).chunk(2)
        if bias is not None:
            output.add_(bias.view(-1, *[1] * (dims - 2)) if dims else bias)
        return forward_ad.make_dual(output, change)

    return rule


def _joint_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    one_value = training and input.numel() == input.shape[1]  # an error, which torch's own function raises
    if input.dim() < 2 or one_value or not (_tangent(weight) is _tangent(bias) is None):
        return None
    primal, tangent = forward_ad.unpack_dual(input)
    if tangent is None:
        return None
    shape = (-1, *[1] * (input.dim() - 2))
    if not training and running_mean is not None and running_var is not None:
        output = F.batch_norm(primal, running_mean, running_var, weight, bias, False, momentum, eps)
        scale = (running_var + eps).rsqrt()
        return forward_ad.make_dual(output, tangent * (scale if weight is None else scale * weight).view(shape))
    output, mean, scale = torch.native_batch_norm(primal, weight, bias, running_mean, running_var, True, momentum, eps)
    over = (0, *range(2, input.dim()))
    normal = (primal - mean.view(shape)).mul_(scale.view(shape))
    along = (normal * tangent).mean(over, keepdim=True)
    change = (tangent - tangent.mean(over, keepdim=True)).sub_(normal.mul_(along))
    return forward_ad.make_dual(output, change.mul_((scale if weight is None else scale * weight).view(shape)))


def _group_norm_in_order(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor | None:
    """Torch (2.11) views the rows of a group norm in forward mode, which channels-last tensors do not allow."""
    return None if input.is_contiguous() else F.group_norm(input.contiguous(), num_groups, weight, bias, eps)


class JointForwardMode(ReplacedFunctions):
    """Inside a dual level: these layers push primal and tangent forward together, without a graph."""

    rules: ClassVar = {
        F.linear: _joint_linear(F.linear, None),
        F.conv1d: _joint_linear(F.conv1d, 3),
        F.conv2d: _joint_linear(F.conv2d, 4),
        F.conv3d: _joint_linear(F.conv3d, 5),
        F.batch_norm: _joint_batch_norm,
        F.group_norm: _group_norm_in_order,
    }


# Second derivatives: normalisations in plain arithmetic


def _explicit_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    return _normalised(input, (0, *range(2, input.dim())), weight, bias, eps, channels=True) if training else None


def _explicit_instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    return _normalised(input, range(2, input.dim()), weight, bias, eps, channels=True) if use_input_stats else None


def _explicit_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return _normalised(input, range(-len(normalized_shape), 0), weight, bias, eps, channels=False)


def _normalised(
    x: Tensor, over: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float, *, channels: bool
) -> Tensor:
    """``(x − mean) / deviation`` over these dimensions, then the affine map; ``channels``: its shape is ``(C,)``."""
    dims = tuple(over)
    off = x - x.mean(dims, keepdim=True)
    found = off * (off.square().mean(dims, keepdim=True) + eps).rsqrt()
    shape = (-1, *[1] * (x.dim() - 2)) if channels else None
    if weight is not None:
        found = found * (weight if shape is None else weight.view(shape))
    if bias is not None:
        found = found + (bias if shape is None else bias.view(shape))
    return found


class ExplicitNorms(ReplacedFunctions):
    """Inside, normalisations of ``torch.nn.functional`` are plain arithmetic; running statistics are not updated."""

    rules: ClassVar = {
        F.batch_norm: _explicit_batch_norm,
        F.instance_norm: _explicit_instance_norm,
        F.layer_norm: _explicit_layer_norm,
        F.group_norm: _group_norm_in_order,
    }


# Third derivatives: the same, and what a training pass leaves in the net


def _trained(explicit: Callable[..., Tensor | None], function: Callable[..., Tensor]) -> Callable[..., Tensor | None]:
    """The rule of a norm by ``explicit``, which updates the running statistics as ``function`` does."""

    def rule(
        input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None, *rest: Any, **more: Any
    ) -> Any:
        found = explicit(input, running_mean, running_var, *rest, **more)
        if found is not None and running_mean is not None:
            with torch.no_grad():
                function(input.detach(), running_mean, running_var, *rest, **more)
        return found

    return rule


class TrainedNorms(ExplicitNorms):
    """Inside, normalisations of ``torch.nn.functional`` are plain arithmetic; running statistics are updated."""

    rules: ClassVar = {
        **ExplicitNorms.rules,
        F.batch_norm: _trained(_explicit_batch_norm, F.batch_norm),
        F.instance_norm: _trained(_explicit_instance_norm, F.instance_norm),
    }
