"""How the learning rate of a parameter group becomes those of its layers: on the host, or where it is read on a device.

Rates on the host (:class:`HostScaling`) merge parameters of equal multiplier; rates that stay on the device
(:class:`DeviceScaling`), whose values nobody reads, keep a group for every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lwkd.optimizer.group_memory import Group
from lwkd.optimizer.ownership import Layer


class LrScaling(Protocol):
    """How the learning rate of a group becomes those of its parts."""

    @property
    def uniform(self) -> bool:
        """Whether the host knows that every multiplier is 1."""

    @property
    def still(self) -> frozenset[int]:
        """Layers of which the host knows that their multiplier is 0."""

    def part_of(self, layer: Layer) -> Hashable:
        """Which part the layer's parameters go to; None keeps the group's own learning rate."""

    def scaled(self, lr: Any) -> Callable[[Any], Any]:
        """Part → learning rate, for a group with this one."""

    def unscaled(self, lr: Any, user: Any, part: Any) -> Any:
        """The group's learning rate, which was ``user``, once the base has written ``lr`` into this part."""

    def interpolated(self, layer: int, new: Tensor, old: Tensor) -> Tensor:
        """``p_old + m (p_new − p_old)``."""


class HostScaling:
    """Multipliers that are numbers on the host: one part for each value.

    Args:
        multipliers: one a layer.
    """

    def __init__(self, multipliers: Sequence[float]) -> None:
        self.multipliers = multipliers
        self.uniform = all(multiplier == 1.0 for multiplier in multipliers)
        self.still = frozenset(layer for layer, multiplier in enumerate(multipliers) if multiplier == 0)

    def part_of(self, layer: Layer) -> float | None:
        """The multiplier, where that is not 1."""
        if layer is None or self.multipliers[layer] == 1.0:
            return None
        return self.multipliers[layer]

    def scaled(self, lr: Any) -> Callable[[float], Any]:
        """``lr · m``."""
        return lambda multiplier: lr * multiplier

    def unscaled(self, lr: Any, user: Any, part: float | None) -> Any:
        """``lr / m``; what was there before, for a multiplier of 0."""
        if part is None:
            return lr
        return lr / part if part else user

    def interpolated(self, layer: int, new: Tensor, old: Tensor) -> Tensor:
        """``p_old + m (p_new − p_old)``."""
        return torch.lerp(old, new, self.multipliers[layer])


class DeviceScaling:
    """Multipliers that stay on the device: one part for each layer, whose learning rate is a view of one tensor.

    Nobody reads the multipliers: where one is 0, a learning rate of 0 has to do.

    Args:
        multipliers: ``(L,)``, on the device of the learning rates.
    """

    uniform = False
    still: frozenset[int] = frozenset()

    def __init__(self, multipliers: Tensor) -> None:
        self.multipliers = multipliers

    def part_of(self, layer: Layer) -> Layer:
        """The layer itself."""
        return layer

    def scaled(self, lr: Tensor) -> Callable[[int], Tensor]:
        """``lr · m_l`` for all layers in one multiplication, in the precision of ``lr``."""
        rates = (lr.detach().reshape(()) * self.multipliers.to(lr.dtype)).unbind()
        return lambda layer: rates[layer].view(lr.shape)

    def unscaled(self, lr: Any, user: Tensor, part: int | None) -> Tensor:
        """``lr / m``, written into the user's own tensor; what was there before, for a multiplier of 0."""
        if part is None:
            return user.copy_(torch.as_tensor(lr, dtype=user.dtype, device=user.device))
        multiplier = self.multipliers[part].to(user.dtype)
        return user.copy_(torch.where(multiplier == 0, user, lr / multiplier))

    def interpolated(self, layer: int, new: Tensor, old: Tensor) -> Tensor:
        """``p_old + m (p_new − p_old)``."""
        return torch.lerp(old, new, self.multipliers[layer].to(old.dtype))


def lr_scaling(multipliers: Sequence[float] | Tensor) -> LrScaling:
    """How a step scales the learning rates of layers.

    Args:
        multipliers: one a layer: numbers, or ``(L,)`` on the device of the learning rates.
    """
    return DeviceScaling(multipliers) if isinstance(multipliers, Tensor) else HostScaling(multipliers)


def why_on_host(groups: Sequence[Group], device: torch.device) -> str | None:
    """Why the host has to read the multipliers; None where the learning rates are read on the device.

    They are where every group has a tensor on this CUDA device for a learning rate, and the base is fused or
    capturable.

    Args:
        groups: the base's parameter groups.
        device: the device of the student.
    """
    if device.type != "cuda":
        return "the student is not on a CUDA device"  # which one it is on, as text, takes longer than all else
    for index, group in enumerate(groups):
        rate = group.get("lr")
        if not isinstance(rate, Tensor):
            return f"the learning rate of parameter group {index} is {rate!r}, not a tensor on {device}"
        if rate.device != device:
            return f"the learning rate of parameter group {index} is a tensor on {rate.device}, not on {device}"
        if not (group.get("fused") or group.get("capturable")):
            return f"parameter group {index} is neither fused nor capturable"
    return None if groups else "there is no parameter group"
