"""Transient parameter groups: each group split by rate for the length of one step.

Learning rates are never multiplied in place: that compounds under some schedulers and is erased by others. Inside the
step the base optimizer sees groups of parameters with equal rate; before, after, and while a closure runs, the user's
own groups are in place, so schedulers, checkpoints and closures see what they always saw. What the base keeps in its
groups (a sum of weights, a counter in a tensor) is kept for each layer where layers come to differ in it
(:mod:`lwkd.optimizer.group_memory`), so that all moves as with one explicit group a layer.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from lwkd.nets.precision import Shared
from lwkd.optimizer.group_memory import Group, GroupMemory, alike, private
from lwkd.optimizer.lr_scaling import LrScaling
from lwkd.optimizer.ownership import Layer, Places

Closure = Callable[[], Any]

PlacesOf = Callable[[int, list[Tensor]], Places]
"""Where each layer's parameters are in a group, by the group's position and parameters."""

PARALLEL_LISTS = {"params", "param_names"}
"""Keys of a group that hold one entry a parameter."""

NOT_INNER = {"lr", *PARALLEL_LISTS}
"""Keys of a group that each part gets anew."""


def _key(layer: Layer) -> int:
    """A layer among those that a base keeps something for: -1 for parameters that no pair owns."""
    return -1 if layer is None else layer


def _same_kind(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def _can_be_written_into(value: Any) -> bool:
    if type(value) is tuple:
        return any(map(_can_be_written_into, value))
    return isinstance(value, (Tensor, list, dict, set))


class Part(NamedTuple):
    """One part of a user's group, for the length of a step."""

    of: Hashable
    layers: list[Layer]
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
                untouched = key in user and alike(value, user[key])
            else:
                untouched = getattr(value, "_version", None) == version
            if not untouched:
                keys.add(key)
        return keys - PARALLEL_LISTS


class TransientGroups:
    """Splits and restores the groups of one optimizer.

    Args:
        optimizer: the base optimizer.
        scaling: which layers go together, and their learning rate.
        places_of: where they are in a group.
        memory: what the base keeps in its groups from step to step.
    """

    def __init__(self, optimizer: Optimizer, scaling: LrScaling, places_of: PlacesOf, memory: GroupMemory) -> None:
        self.optimizer, self.scaling, self.places_of, self.memory = optimizer, scaling, places_of, memory
        self._users: list[Group] | None = None
        self._parts: dict[int, list[Part]] = {}  # by position of the user's group

    def install(self) -> None:
        """Put the split groups in place of the user's."""
        groups = self.optimizer.param_groups
        self._users, self._parts = list(groups), {}
        transient: list[Group] = []
        for position, user in enumerate(self._users):
            own = self.memory.of(position, user)
            places = self.places_of(position, user["params"])
            # Layers go together that have the same rate and the same history.
            parts: dict[tuple[Hashable, int], list[Layer]] = {}
            for layer in places:
                history = id(own.get(_key(layer))) if own else 0
                parts.setdefault((self.scaling.part_of(layer), history), []).append(layer)
            if not own and parts.keys() <= {(None, 0)}:
                transient.append(user)
                continue
            scaled = self.scaling.scaled(user["lr"])
            inner = [key for key, value in user.items() if key not in NOT_INNER and _can_be_written_into(value)]
            self._parts[position] = [
                self._part(user, of, layers, places, own, inner, scaled) for (of, _), layers in parts.items()
            ]
            transient.extend(part.group for part in self._parts[position])
        # In place: whoever holds the list (a scheduler, a wrapper around the base) keeps seeing the same object.
        groups[:] = transient

    def _part(
        self,
        user: Group,
        of: Hashable,
        layers: list[Layer],
        places: Places,
        own: dict[int, dict[str, Any]],
        inner: list[str],
        scaled: Callable[[Any], Any],
    ) -> Part:
        group = dict(user)
        indices = places[layers[0]] if len(layers) == 1 else sorted(i for layer in layers for i in places[layer])
        for key in PARALLEL_LISTS & user.keys():
            group[key] = [user[key][index] for index in indices]
        for key in inner:
            group[key] = private(user[key])
        mine = own.get(_key(layers[0])) if own else None
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
        return Part(of, layers, group, dict(group), versions, set(mine))

    def restore(self) -> None:
        """Put the user's groups back, with what the base wrote into the split ones (step counters and the like)."""
        if self._users is None:
            return
        for position, parts in self._parts.items():
            user = self._users[position]
            written = [part.written(user) for part in parts]
            for part, keys in zip(parts, written, strict=True):
                if "lr" in keys:
                    user["lr"] = self.scaling.unscaled(part.group["lr"], user["lr"], part.of)
            keys = set().union(*written, *(part.own for part in parts)) - {"lr"}
            if not keys:
                continue
            differing = [key for key in keys if self._merge(key, user, parts)]
            by_layer: dict[int, dict[str, Any]] = {}
            for part in parts:
                values = {key: part.group[key] for key in differing if key in part.group}
                by_layer.update(dict.fromkeys(map(_key, part.layers), values))
            self.memory.keep(position, user, by_layer)
        self.optimizer.param_groups[:] = self._users
        self._users, self._parts = None, {}

    def _merge(self, key: str, user: Group, parts: list[Part]) -> bool:
        """Leave in the user's group what the parts have; whether they differ in it."""
        having = [part for part in parts if key in part.group]
        first = next((part for part in having if part.of is None), having[0])
        value, old = first.group[key], user.get(key)
        differ = len(having) < len(parts) or not all(alike(part.group[key], value) for part in having)
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


def _global_hooks() -> tuple[dict[int, Any], dict[int, Any]]:
    """Hooks before and behind the steps of all optimizers."""
    return torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks


_silent: list[Optimizer] = []
"""Bases inside a step, whose global hooks fire around the whole of it."""


@contextlib.contextmanager
def _global_hooks_guarded() -> Iterator[None]:
    """Global step hooks pass the steps of :data:`_silent` over; those of other optimizers, in a closure, they see."""

    def guarded(hook: Callable[..., Any]) -> Callable[..., Any]:
        return lambda optimizer, *call: None if any(optimizer is one for one in _silent) else hook(optimizer, *call)

    everywhere = _global_hooks()
    before = [dict(hooks) for hooks in everywhere]
    try:
        for hooks in everywhere:
            hooks.update({key: guarded(hook) for key, hook in hooks.items()})
        yield
    finally:
        for hooks, were in zip(everywhere, before, strict=True):
            hooks.update({key: hook for key, hook in were.items() if key in hooks})


_guard = Shared(_global_hooks_guarded)


@contextlib.contextmanager
def step_hooks_disabled(optimizer: Optimizer) -> Iterator[None]:
    """Step hooks of this optimizer, and global ones, silent: they fire around the whole step, with the user's groups.

    Without this they would fire a second time inside, and see the split groups.
    """
    # A base that never ran the constructor of Optimizer has none of its own.
    own = {name: hooks for name, hooks in vars(optimizer).items() if name in STEP_HOOKS}
    if not any((*own.values(), *_global_hooks())):
        yield
        return
    vars(optimizer).update({name: OrderedDict() for name in own})
    _silent.append(optimizer)
    try:
        with _guard():
            yield
    finally:
        _silent.remove(optimizer)
        vars(optimizer).update(own)


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a base's ``step``."""


@contextlib.contextmanager
def scaled_groups(
    optimizer: Optimizer,
    scaling: LrScaling,
    places_of: PlacesOf,
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
        scaling: which layers go together, and their learning rate.
        places_of: where they are in a group.
        memory: what the base keeps in its groups from step to step.
        args: for the base's ``step``, as the user gave them; a closure is the first, or called ``closure``.
        kwargs: as ``args``.
        displaced: the base steps with the user's groups, and parameters move by ``p_old + m (p_new − p_old)``.

    Yields:
        What to call the base's ``step`` with: closures run with the user's groups in place.
    """
    if scaling.uniform and memory.empty:  # as in all of a training from scratch under the default policy
        yield args, dict(kwargs or {})
        return
    before: list[tuple[int, Tensor, Tensor]] = []  # parameters that are written to after the step, as they were
    if displaced or scaling.still:
        for position, group in enumerate(optimizer.param_groups):
            for layer, indices in places_of(position, group["params"]).items():
                written = layer in scaling.still or (displaced and scaling.part_of(layer) is not None)
                if layer is not None and written:
                    parameters = [group["params"][index] for index in indices]
                    before += [(layer, parameter, parameter.detach().clone()) for parameter in parameters]
    groups, kwargs = TransientGroups(optimizer, scaling, places_of, memory), dict(kwargs or {})
    if not displaced:
        groups.install()
        args = tuple(groups.around(a) if index == 0 and callable(a) else a for index, a in enumerate(args))
        kwargs = {name: groups.around(a) if name == "closure" and callable(a) else a for name, a in kwargs.items()}
    try:
        yield args, kwargs
    finally:
        groups.restore()
    if before:
        with torch.no_grad():
            for layer, parameter, old in before:
                parameter.copy_(old if layer in scaling.still else scaling.interpolated(layer, parameter, old))
