"""How the learning rate of a parameter group becomes those of its layers: on the host, or where it is read on a device.

Rates on the host (:class:`HostScaling`) merge parameters of equal multiplier; rates that stay on the device
(:class:`DeviceScaling`), whose values nobody reads, keep a group for every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lwkd.optimizer.group_memory import Group

LayerOf = Callable[[Tensor], "int | None"]


class LrScaling(Protocol):
    """How the learning rate of a group becomes those of its parts."""

    layer_of: LayerOf

    @property
    def uniform(self) -> bool:
        """Whether the host knows that every multiplier is 1."""

    def part_of(self, parameter: Tensor) -> Hashable:
        """Which part the parameter goes to; None keeps the group's own learning rate."""

    def stand_still(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """The parameters of which the host knows that their multiplier is 0."""

    def scaled(self, lr: Any) -> Callable[[Any], Any]:
        """Part → learning rate, for a group with this one."""

    def unscaled(self, lr: Any, user: Any, part: Any) -> Any:
        """The group's learning rate, which was ``user``, once the base has written ``lr`` into this part."""

    def interpolated(self, parameter: Tensor, old: Tensor) -> Tensor:
        """``p_old + m (p_new − p_old)``."""


class HostScaling:
    """Multipliers that are numbers on the host: one part for each value.

    Args:
        layer_of: index of a parameter's layer; None for those of no layer, whose multiplier is 1.
        multipliers: one a layer.
    """

    def __init__(self, layer_of: LayerOf, multipliers: Sequence[float]) -> None:
        self.layer_of, self.multipliers = layer_of, multipliers
        self.uniform = all(multiplier == 1.0 for multiplier in multipliers)

    def _multiplier_of(self, parameter: Tensor) -> float:
        layer = self.layer_of(parameter)
        return 1.0 if layer is None else self.multipliers[layer]

    def part_of(self, parameter: Tensor) -> float | None:
        """The multiplier, where that is not 1."""
        multiplier = self._multiplier_of(parameter)
        return None if multiplier == 1.0 else multiplier

    def stand_still(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Those whose multiplier is 0."""
        return [p for p in parameters if self._multiplier_of(p) == 0] if 0 in self.multipliers else []

    def scaled(self, lr: Any) -> Callable[[float], Any]:
        """``lr · m``."""
        return lambda multiplier: lr * multiplier

    def unscaled(self, lr: Any, user: Any, part: float | None) -> Any:
        """``lr / m``; what was there before, for a multiplier of 0."""
        if part is None:
            return lr
        return lr / part if part else user

    def interpolated(self, parameter: Tensor, old: Tensor) -> Tensor:
        """``p_old + m (p_new − p_old)``."""
        return torch.lerp(old, parameter, self._multiplier_of(parameter))


class DeviceScaling:
    """Multipliers that stay on the device: one part for each layer, whose learning rate is a view of one tensor.

    Args:
        layer_of: index of a parameter's layer; None for those of no layer.
        multipliers: ``(L,)``, on the device of the learning rates.
    """

    def __init__(self, layer_of: LayerOf, multipliers: Tensor) -> None:
        self.layer_of = self.part_of = layer_of
        self.multipliers, self.uniform = multipliers, False

    def stand_still(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Nobody reads the multipliers: a learning rate of 0 has to do."""
        return []

    def scaled(self, lr: Tensor) -> Callable[[int], Tensor]:
        """``lr · m_l`` for all layers in one multiplication, in the precision of ``lr``."""
        rates = (lr.detach().reshape(()) * self.multipliers.to(lr.dtype)).unbind()
        return lambda layer: rates[layer].view(lr.shape)

    def unscaled(self, lr: Any, user: Tensor, part: int | None) -> Tensor:
        """``lr / m``, written into the user's own tensor; what was there before, for a multiplier of 0."""
        if part is None:
            return user.copy_(torch.as_tensor(lr))
        multiplier = self.multipliers[part].to(user.dtype)
        return user.copy_(torch.where(multiplier == 0, user, lr / multiplier))

    def interpolated(self, parameter: Tensor, old: Tensor) -> Tensor:
        """``p_old + m (p_new − p_old)``."""
        layer = self.part_of(parameter)
        assert layer is not None
        return torch.lerp(old, parameter, self.multipliers[layer].to(old.dtype))


def lr_scaling(multipliers: Sequence[float] | Tensor, layer_of: LayerOf) -> LrScaling:
    """How a step scales the learning rates of parameters.

    Args:
        multipliers: one a layer: numbers, or ``(L,)`` on the device of the learning rates.
        layer_of: index of a parameter's layer; None for those of no layer, which keep their group's learning rate.
    """
    if isinstance(multipliers, Tensor):
        return DeviceScaling(layer_of, multipliers)
    return HostScaling(layer_of, multipliers)


def why_on_host(groups: Sequence[Group], device: torch.device) -> str | None:
    """Why the host has to read the multipliers; None where the learning rates are read on the device.

    They are where every group has a tensor on this CUDA device for a learning rate, and the base is fused or
    capturable.

    Args:
        groups: the base's parameter groups.
        device: the device of the student.
    """
    if device.type != "cuda":
        return f"the student is on {device}, not on a CUDA device"
    for index, group in enumerate(groups):
        rate = group.get("lr")
        if not isinstance(rate, Tensor):
            return f"the learning rate of parameter group {index} is {rate!r}, not a tensor on {device}"
        if rate.device != device:
            return f"the learning rate of parameter group {index} is a tensor on {rate.device}, not on {device}"
        if not (group.get("fused") or group.get("capturable")):
            return f"parameter group {index} is neither fused nor capturable"
    return None if groups else "there is no parameter group"
