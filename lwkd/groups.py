"""Transient parameter groups: each group split by multiplier for the length of one step.

Learning rates are never multiplied in place: that compounds under some schedulers and is erased by others. Inside the
step the base optimizer sees groups of parameters with equal multiplier; before, after, and while a closure runs, the
user's own groups are in place, so schedulers, checkpoints and closures see what they always saw.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.optim import optimizer as torch_optimizer

Closure = Callable[[], Any]
MultiplierOf = Callable[[Tensor], float]

PARALLEL_LISTS = {"params", "param_names"}
"""Keys of a group that hold one entry a parameter."""


class TransientGroups:
    """Splits and restores the groups of one optimizer.

    Args:
        optimizer: the base optimizer.
        multiplier_of: multiplier of a parameter.
    """

    def __init__(self, optimizer: Optimizer, multiplier_of: MultiplierOf) -> None:
        self.optimizer, self.multiplier_of = optimizer, multiplier_of
        self._users: list[dict[str, Any]] | None = None
        self._parts: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], float]] = []

    def install(self) -> None:
        """Put the split groups in place of the user's."""
        groups = self.optimizer.param_groups
        self._users, self._parts = list(groups), []
        transient: list[dict[str, Any]] = []
        for user in self._users:
            by_multiplier: dict[float, list[int]] = {}
            for index, parameter in enumerate(user["params"]):
                by_multiplier.setdefault(self.multiplier_of(parameter), []).append(index)
            if by_multiplier.keys() <= {1.0}:
                transient.append(user)
                continue
            for multiplier, indices in by_multiplier.items():
                part = dict(user)
                for parallel in PARALLEL_LISTS & user.keys():
                    part[parallel] = [user[parallel][index] for index in indices]
                if multiplier != 1.0:
                    part["lr"] = user["lr"] * multiplier
                self._parts.append((user, part, dict(part), multiplier))
                transient.append(part)
        # In place: whoever holds the list (a scheduler, a wrapper around the base) keeps seeing the same object.
        groups[:] = transient

    def restore(self) -> None:
        """Put the user's groups back, with what the base wrote into the split ones (step counters and the like)."""
        if self._users is None:
            return
        for user, part, given, multiplier in self._parts:
            for key, value in part.items():
                if key in PARALLEL_LISTS or (key in given and value is given[key]):
                    continue
                if key != "lr":
                    user[key] = value
                elif multiplier:
                    user[key] = value / multiplier
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
def hooks_muted(optimizer: Optimizer) -> Iterator[None]:
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


def scaled_step(
    optimizer: Optimizer, base_step: Callable[..., Any], multiplier_of: MultiplierOf, closure: Closure | None
) -> Any:
    """One step of the base optimizer in which every parameter moves at its own multiple of its learning rate.

    Args:
        optimizer: the base optimizer.
        base_step: its ``step``.
        multiplier_of: multiplier of a parameter.
        closure: as the user gave it.

    Returns:
        What the base returns: the loss, where there is a closure.
    """
    if takes_one_group(optimizer):
        return _interpolated_step(optimizer, base_step, multiplier_of, closure)
    groups = TransientGroups(optimizer, multiplier_of)
    groups.install()
    try:
        with hooks_muted(optimizer):
            return base_step() if closure is None else base_step(groups.around(closure))
    finally:
        groups.restore()


def _interpolated_step(
    optimizer: Optimizer, base_step: Callable[..., Any], multiplier_of: MultiplierOf, closure: Closure | None
) -> Any:
    """``p_old + m (p_new − p_old)``, for a base that allows one group only; skipped where m = 1."""
    before = [
        (parameter, parameter.detach().clone(), multiplier_of(parameter))
        for group in optimizer.param_groups
        for parameter in group["params"]
        if multiplier_of(parameter) != 1.0
    ]
    with hooks_muted(optimizer):
        loss = base_step() if closure is None else base_step(closure)
    with torch.no_grad():
        for parameter, old, multiplier in before:
            parameter.copy_(torch.lerp(old, parameter, multiplier))
    return loss
