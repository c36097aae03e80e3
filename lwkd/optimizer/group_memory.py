"""What a base keeps in its parameter groups from step to step, where the layers of a group differ in it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Group = dict[str, Any]


class GroupRecord(NamedTuple):
    """What a base keeps in one of its groups and what differs between the layers in it."""

    shown: dict[str, Any]  # what was left in the user's group
    seen: dict[str, tuple[Any, int | None]]  # the object there, and the version of a tensor
    layers: dict[int, dict[str, Any]]  # by layer; layers with one history share one dict


class GroupMemory:
    """What a base keeps in its groups from step to step, where the layers of a group have come to differ in it.

    A weight sum, a largest learning rate so far: with one group a layer each would have its own. It is kept here, and
    the user's group shows that of the layers at rate 1, or else of the first. What the user changes there counts for
    all layers again.
    """

    def __init__(self) -> None:
        self._groups: dict[int, GroupRecord] = {}

    @property
    def empty(self) -> bool:
        """Whether no group has anything of its own."""
        return not self._groups

    def of(self, position: int, user: Group) -> dict[int, dict[str, Any]]:
        """What each layer has of its own in the user's group at this position; a layer that is not there has nothing.

        Whoever steps writes into these values.
        """
        kept = self._groups.get(position)
        if kept is None:
            return {}
        for key in [key for key in kept.shown if not _still_there(key, user, kept)]:
            del kept.shown[key]
            for own in {id(own): own for own in kept.layers.values()}.values():
                own.pop(key, None)
        return kept.layers if kept.shown else {}

    def keep(self, position: int, user: Group, layers: dict[int, dict[str, Any]]) -> None:
        """Remember what the layers of a group have of their own, after it was left in the user's group too."""
        keys = {key for own in layers.values() for key in own}
        if not keys:
            self._groups.pop(position, None)
            return
        shown = {key: private(user[key]) for key in keys}
        self._groups[position] = GroupRecord(shown, {key: _seen(user[key]) for key in keys}, layers)

    def state_dict(self) -> dict[int, Any]:
        """Plain values and tensors of the CPU, by position of the group."""
        return {
            position: {"shown": _on_cpu(kept.shown), "layers": _on_cpu(kept.layers)}
            for position, kept in self._groups.items()
        }

    def load_state_dict(self, state: dict[int, Any], groups: Sequence[Group]) -> None:
        """Continue where :meth:`state_dict` left off.

        Args:
            state: of :meth:`state_dict`.
            groups: the base's; those that were saved with the state, or that will be loaded after it.
        """
        self._groups = {}
        for position, kept in copy.deepcopy(state).items():
            for own in kept["layers"].values():
                for key, value in own.items():
                    there = groups[position].get(key) if position < len(groups) else None
                    if isinstance(value, Tensor) and isinstance(there, Tensor):
                        own[key] = value.to(there.device)
            self._groups[position] = GroupRecord(kept["shown"], {}, kept["layers"])


def private(value: Any) -> Any:
    """A copy that may be written into; what is neither a tensor nor a container is shared."""
    if isinstance(value, Tensor):
        return value if value.requires_grad else value.clone()
    if type(value) is dict:
        return {key: private(item) for key, item in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(map(private, value))
    return value


def _on_cpu(value: Any) -> Any:
    """A copy for a state dict; what is one object stays one."""
    dicts: dict[int, Any] = {}

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            if id(value) not in dicts:
                dicts[id(value)] = {key: moved(item) for key, item in value.items()}
            return dicts[id(value)]
        if type(value) in (list, tuple, set):
            return type(value)(map(moved, value))
        return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value

    return moved(value)


def alike(one: Any, other: Any, *, read: bool = False) -> bool:
    """Whether two values are known to be equal; tensors of a device are not read unless asked for."""
    if one is other:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)) or one.shape != other.shape:
            return False
        on_cpu = one.device.type == other.device.type == "cpu"
        return (on_cpu or read) and bool(torch.equal(one, other.to(one.device)))
    if type(one) is not type(other):
        return isinstance(one, (int, float)) and isinstance(other, (int, float)) and one == other
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key], read=read) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(alike(*pair, read=read) for pair in zip(one, other, strict=True))
    equal = one == other
    return isinstance(equal, bool) and equal


def _seen(value: Any) -> tuple[Any, int | None]:
    return value, value._version if isinstance(value, Tensor) else None


def _still_there(key: str, user: Group, kept: GroupRecord) -> bool:
    """Whether the user's group still shows what was left in it."""
    if key not in user:
        return False
    value, seen = user[key], kept.seen.get(key)
    if seen is not None and value is seen[0] and isinstance(value, Tensor) and value._version == seen[1]:
        return True
    return alike(value, kept.shown[key], read=True)
