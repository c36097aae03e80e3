"""Transient parameter groups: each group split by rate for the length of one step.

Learning rates are never multiplied in place: that compounds under some schedulers and is erased by others. Inside the
step the base optimizer sees groups of parameters with equal rate; before, after, and while a closure runs, the user's
own groups are in place, so schedulers, checkpoints and closures see what they always saw.

Rates on the host (:class:`HostScaling`) merge parameters of equal multiplier; rates that stay on the device
(:class:`DeviceScaling`), whose values nobody reads, keep a group for every layer.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.optim import optimizer as torch_optimizer

Group = dict[str, Any]
Closure = Callable[[], Any]
LayerOf = Callable[[Tensor], "int | None"]

PARALLEL_LISTS = {"params", "param_names"}
"""Keys of a group that hold one entry a parameter."""


class LrScaling(Protocol):
    """How the learning rate of a group becomes those of its parts."""

    def part_of(self, parameter: Tensor) -> Hashable:
        """Which part the parameter goes to; None keeps the group's own learning rate."""

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

    def _multiplier_of(self, parameter: Tensor) -> float:
        layer = self.layer_of(parameter)
        return 1.0 if layer is None else self.multipliers[layer]

    def part_of(self, parameter: Tensor) -> float | None:
        """The multiplier, where that is not 1."""
        multiplier = self._multiplier_of(parameter)
        return None if multiplier == 1.0 else multiplier

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
        self.part_of, self.multipliers = layer_of, multipliers

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


def why_on_host(groups: Sequence[Group], device: torch.device, fused_step: bool = False) -> str | None:
    """Why the host has to read the multipliers; None where the learning rates are read on the device.

    They are where every group has a tensor on this CUDA device for a learning rate, and the base is fused or
    capturable, or the step is our own.

    Args:
        groups: the base's parameter groups.
        device: the device of the student.
        fused_step: whether the step is that of :class:`lwkd.optimizer.fused_step.FusedStep`.
    """
    if device.type != "cuda":
        return f"the student is on {device}, not on a CUDA device"
    for index, group in enumerate(groups):
        rate = group.get("lr")
        if not isinstance(rate, Tensor):
            return f"the learning rate of parameter group {index} is {rate!r}, not a tensor on {device}"
        if rate.device != device:
            return f"the learning rate of parameter group {index} is a tensor on {rate.device}, not on {device}"
        if not (fused_step or group.get("fused") or group.get("capturable")):
            return f"parameter group {index} is neither fused nor capturable"
    return None if groups else "there is no parameter group"


class TransientGroups:
    """Splits and restores the groups of one optimizer.

    Args:
        optimizer: the base optimizer.
        scale: which parameters go together, and their learning rate.
    """

    def __init__(self, optimizer: Optimizer, scale: LrScaling) -> None:
        self.optimizer, self.scale = optimizer, scale
        self._users: list[dict[str, Any]] | None = None
        self._parts: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], Hashable]] = []

    def install(self) -> None:
        """Put the split groups in place of the user's."""
        groups = self.optimizer.param_groups
        self._users, self._parts = list(groups), []
        transient: list[dict[str, Any]] = []
        for user in self._users:
            parts: dict[Hashable, list[int]] = {}
            for index, parameter in enumerate(user["params"]):
                parts.setdefault(self.scale.part_of(parameter), []).append(index)
            if parts.keys() <= {None}:
                transient.append(user)
                continue
            scaled = self.scale.scaled(user["lr"])
            for of, indices in parts.items():
                part = dict(user)
                for parallel in PARALLEL_LISTS & user.keys():
                    part[parallel] = [user[parallel][index] for index in indices]
                if of is not None:
                    part["lr"] = scaled(of)
                self._parts.append((user, part, dict(part), of))
                transient.append(part)
        # In place: whoever holds the list (a scheduler, a wrapper around the base) keeps seeing the same object.
        groups[:] = transient

    def restore(self) -> None:
        """Put the user's groups back, with what the base wrote into the split ones (step counters and the like)."""
        if self._users is None:
            return
        for user, part, given, of in self._parts:
            for key, value in part.items():
                if key in PARALLEL_LISTS or (key in given and value is given[key]):
                    continue
                user[key] = self.scale.unscaled(value, user[key], of) if key == "lr" else value
        self.optimizer.param_groups[:] = self._users
        self._users, self._parts = None, []

    def around(self, closure: Closure) -> Closure:
        """The closure, run with the user's groups in place; the split is made anew afterwards."""

        def closure_with_user_groups() -> Any:
            self.restore()
            try:
                return closure()
            finally:
                self.install()

        return closure_with_user_groups


def takes_one_group(optimizer: Optimizer) -> bool:
    """Whether the optimizer refuses several groups: LBFGS, and relatives that keep a parameter list of their own."""
    return isinstance(optimizer, LBFGS) or "_params" in vars(optimizer)


@contextlib.contextmanager
def step_hooks_disabled(optimizer: Optimizer) -> Iterator[None]:
    """Step hooks of this optimizer, and global ones, silent: they fire around the whole step, with the user's groups.

    Without this they would fire a second time inside, and see the split groups.
    """
    own = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    everywhere = torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks
    optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    torch_optimizer._global_optimizer_pre_hooks = OrderedDict()
    torch_optimizer._global_optimizer_post_hooks = OrderedDict()
    try:
        yield
    finally:
        optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = own
        torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks = everywhere


def scaled_step(optimizer: Optimizer, base_step: Callable[..., Any], scale: LrScaling, closure: Closure | None) -> Any:
    """One step of the base optimizer in which every parameter moves at its own multiple of its learning rate.

    Args:
        optimizer: the base optimizer.
        base_step: its ``step``.
        scale: which parameters go together, and their learning rate.
        closure: as the user gave it.

    Returns:
        What the base returns: the loss, where there is a closure.
    """
    if takes_one_group(optimizer):
        return _interpolated_step(optimizer, base_step, scale, closure)
    groups = TransientGroups(optimizer, scale)
    groups.install()
    try:
        with step_hooks_disabled(optimizer):
            return base_step() if closure is None else base_step(groups.around(closure))
    finally:
        groups.restore()


def _interpolated_step(
    optimizer: Optimizer, base_step: Callable[..., Any], scale: LrScaling, closure: Closure | None
) -> Any:
    """``p_old + m (p_new − p_old)``, for a base that allows one group only; skipped where m = 1."""
    before = [
        (parameter, parameter.detach().clone())
        for group in optimizer.param_groups
        for parameter in group["params"]
        if scale.part_of(parameter) is not None
    ]
    with step_hooks_disabled(optimizer):
        loss = base_step() if closure is None else base_step(closure)
    with torch.no_grad():
        for parameter, old in before:
            parameter.copy_(scale.interpolated(parameter, old))
    return loss
