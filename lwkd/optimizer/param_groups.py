"""Transient parameter groups: each group split by rate for the length of one step.

Learning rates are never multiplied in place: that compounds under some schedulers and is erased by others. Inside the
step the base optimizer sees groups of parameters with equal rate; before, after, and while a closure runs, the user's
own groups are in place, so schedulers, checkpoints and closures see what they always saw. What the base keeps in its
groups (a sum of weights, a counter in a tensor) is kept for each layer where layers come to differ in it
(:class:`GroupMemory`), so that all moves as with one explicit group a layer.

Rates on the host (:class:`HostScaling`) merge parameters of equal multiplier; rates that stay on the device
(:class:`DeviceScaling`), whose values nobody reads, keep a group for every layer.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

Group = dict[str, Any]
Closure = Callable[[], Any]
LayerOf = Callable[[Tensor], "int | None"]

PARALLEL_LISTS = {"params", "param_names"}
"""Keys of a group that hold one entry a parameter."""


class LrScaling(Protocol):
    """How the learning rate of a group becomes those of its parts."""

    layer_of: LayerOf

    @property
    def uniform(self) -> bool:
        """Whether the host knows that every multiplier is 1."""

    def part_of(self, parameter: Tensor) -> Hashable:
        """Which part the parameter goes to; None keeps the group's own learning rate."""

    def stand_still(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Those of which the host knows that their multiplier is 0."""

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


class KeptGroup(NamedTuple):
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
        self._groups: dict[int, KeptGroup] = {}

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
        self._groups[position] = KeptGroup(shown, {key: _seen(user[key]) for key in keys}, layers)

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
            self._groups[position] = KeptGroup(kept["shown"], {}, kept["layers"])


NO_LAYER = -1
"""Stands for the layer of parameters that no pair owns."""


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


def _alike(one: Any, other: Any, *, read: bool = False) -> bool:
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
        return one.keys() == other.keys() and all(_alike(one[key], other[key], read=read) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(_alike(*pair, read=read) for pair in zip(one, other, strict=True))
    equal = one == other
    return isinstance(equal, bool) and equal


def _same_kind(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def _seen(value: Any) -> tuple[Any, int | None]:
    return value, value._version if isinstance(value, Tensor) else None


def _still_there(key: str, user: Group, kept: KeptGroup) -> bool:
    """Whether the user's group still shows what was left in it."""
    if key not in user:
        return False
    value, seen = user[key], kept.seen.get(key)
    if seen is not None and value is seen[0] and isinstance(value, Tensor) and value._version == seen[1]:
        return True
    return _alike(value, kept.shown[key], read=True)


def _can_be_written_into(value: Any) -> bool:
    if type(value) is tuple:
        return any(map(_can_be_written_into, value))
    return isinstance(value, (Tensor, list, dict, set))


class Part(NamedTuple):
    """One part of a user's group, for the length of a step."""

    of: Hashable
    group: Group
    given: Group  # what it was made of
    inner: dict[str, int | None]  # what can be written into, with the version of a tensor
    own: set[str]  # keys whose values were the layers' own

    def written(self, user: Group) -> set[str]:
        """Keys that the base may have written."""
        given = self.given
        keys = {key for key, value in self.group.items() if key not in given or value is not given[key]}
        for key, version in self.inner.items():
            value = self.group.get(key)
            if version is None:
                untouched = key in user and _alike(value, user[key])
            else:
                untouched = getattr(value, "_version", None) == version
            if not untouched:
                keys.add(key)
        return keys - PARALLEL_LISTS


class TransientGroups:
    """Splits and restores the groups of one optimizer.

    Args:
        optimizer: the base optimizer.
        scale: which parameters go together, and their learning rate.
        memory: what the base keeps in its groups from step to step.
    """

    def __init__(self, optimizer: Optimizer, scale: LrScaling, memory: GroupMemory) -> None:
        self.optimizer, self.scale, self.memory = optimizer, scale, memory
        self._users: list[Group] | None = None
        self._parts: dict[int, list[Part]] = {}  # by position of the user's group

    def _layer_of(self, parameter: Tensor) -> int:
        layer = self.scale.layer_of(parameter)
        return NO_LAYER if layer is None else layer

    def install(self) -> None:
        """Put the split groups in place of the user's."""
        groups = self.optimizer.param_groups
        self._users, self._parts = list(groups), {}
        transient: list[Group] = []
        for position, user in enumerate(self._users):
            own = self.memory.of(position, user)
            # Layers go together that have the same rate and the same history.
            parts: dict[tuple[Hashable, int], list[int]] = {}
            for index, parameter in enumerate(user["params"]):
                history = id(own.get(self._layer_of(parameter))) if own else 0
                parts.setdefault((self.scale.part_of(parameter), history), []).append(index)
            if not own and parts.keys() <= {(None, 0)}:
                transient.append(user)
                continue
            scaled = self.scale.scaled(user["lr"])
            inner = [key for key, v in user.items() if _can_be_written_into(v) and key not in {"lr", *PARALLEL_LISTS}]
            self._parts[position] = [
                self._part(user, of, indices, own, inner, scaled) for (of, _), indices in parts.items()
            ]
            transient.extend(part.group for part in self._parts[position])
        # In place: whoever holds the list (a scheduler, a wrapper around the base) keeps seeing the same object.
        groups[:] = transient

    def _part(
        self,
        user: Group,
        of: Hashable,
        indices: list[int],
        own: dict[int, dict[str, Any]],
        inner: list[str],
        scaled: Callable[[Any], Any],
    ) -> Part:
        group = dict(user)
        for key in PARALLEL_LISTS & user.keys():
            group[key] = [user[key][index] for index in indices]
        for key in inner:
            group[key] = private(user[key])
        mine = own.get(self._layer_of(group["params"][0])) if own else None
        if mine is not None:
            for key in {key for one in own.values() for key in one} - mine.keys():
                group.pop(key, None)  # the base has not written it for these layers yet
            group.update(mine)
        if of is not None:
            group["lr"] = scaled(of)
        mine = mine or {}
        versions = {
            key: group[key]._version if isinstance(group[key], Tensor) else None
            for key in inner
            if key in group and key not in mine
        }
        return Part(of, group, dict(group), versions, set(mine))

    def restore(self) -> None:
        """Put the user's groups back, with what the base wrote into the split ones (step counters and the like)."""
        if self._users is None:
            return
        for position, parts in self._parts.items():
            user = self._users[position]
            written = [part.written(user) for part in parts]
            for part, keys in zip(parts, written, strict=True):
                if "lr" in keys:
                    user["lr"] = self.scale.unscaled(part.group["lr"], user["lr"], part.of)
            keys = set().union(*written, *(part.own for part in parts)) - {"lr"}
            if not keys:
                continue
            differing = [key for key in keys if self._merge(key, user, parts)]
            layers: dict[int, dict[str, Any]] = {}
            for part in parts:
                values = {key: part.group[key] for key in differing if key in part.group}
                layers.update(dict.fromkeys(map(self._layer_of, part.group["params"]), values))
            self.memory.keep(position, user, layers)
        self.optimizer.param_groups[:] = self._users
        self._users, self._parts = None, {}

    def _merge(self, key: str, user: Group, parts: list[Part]) -> bool:
        """Leave in the user's group what the parts have; whether they differ in it."""
        having = [part for part in parts if key in part.group]
        first = next((part for part in having if part.of is None), having[0])
        value, old = first.group[key], user.get(key)
        differ = len(having) < len(parts) or not all(_alike(part.group[key], value) for part in having)
        if isinstance(old, Tensor) and isinstance(value, Tensor) and _same_kind(old, value):
            with torch.no_grad():
                old.copy_(value)
        else:
            user[key] = private(value) if differ else value
        return differ

    def around(self, closure: Closure) -> Closure:
        """The closure, run with the user's groups in place; the split is made anew afterwards."""

        def closure_with_user_groups() -> Any:
            self.restore()
            try:
                return closure()
            finally:
                self.install()

        return closure_with_user_groups


STEP_HOOKS = {"_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"}


@contextlib.contextmanager
def step_hooks_disabled(optimizer: Optimizer) -> Iterator[None]:
    """Step hooks of this optimizer, and global ones, silent: they fire around the whole step, with the user's groups.

    Without this they would fire a second time inside, and see the split groups.
    """
    # A base that never ran the constructor of Optimizer has none of its own.
    own = {name: hooks for name, hooks in vars(optimizer).items() if name in STEP_HOOKS}
    everywhere = torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks
    if not any((*own.values(), *everywhere)):
        yield
        return
    vars(optimizer).update({name: OrderedDict() for name in own})
    torch_optimizer._global_optimizer_pre_hooks = OrderedDict()
    torch_optimizer._global_optimizer_post_hooks = OrderedDict()
    try:
        yield
    finally:
        vars(optimizer).update(own)
        torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks = everywhere


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a base's ``step``."""


@contextlib.contextmanager
def scaled_groups(
    optimizer: Optimizer,
    scale: LrScaling,
    memory: GroupMemory,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    displaced: bool = False,
) -> Iterator[Call]:
    """Around one step of the base optimizer: in it every parameter moves at its own multiple of its learning rate.

    A parameter whose multiplier is known to be 0 stays bitwise as it is; what the base averages over its gradients goes
    on as at a learning rate of 0.

    Args:
        optimizer: the base optimizer.
        scale: which parameters go together, and their learning rate.
        memory: what the base keeps in its groups from step to step.
        args: for the base's ``step``, as the user gave them; a closure is the first, or called ``closure``.
        kwargs: as ``args``.
        displaced: the base steps with the user's groups, and parameters move by ``p_old + m (p_new − p_old)``.

    Yields:
        What to call the base's ``step`` with: closures run with the user's groups in place.
    """
    if scale.uniform and memory.empty:  # as in all of a training from scratch under the default policy
        yield args, dict(kwargs or {})
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    still = [(parameter, parameter.detach().clone()) for parameter in scale.stand_still(parameters)]
    moves = [(p, p.detach().clone()) for p in parameters if displaced and scale.part_of(p) is not None]
    groups, kwargs = TransientGroups(optimizer, scale, memory), dict(kwargs or {})
    if not displaced:
        groups.install()
        args = tuple(groups.around(a) if index == 0 and callable(a) else a for index, a in enumerate(args))
        kwargs = {name: groups.around(a) if name == "closure" and callable(a) else a for name, a in kwargs.items()}
    try:
        yield args, kwargs
    finally:
        groups.restore()
    with torch.no_grad():
        for parameter, old in moves:
            parameter.copy_(scale.interpolated(parameter, old))
        for parameter, old in still:
            parameter.copy_(old)
