"""Small copies of a base: its class, options and state (cut), with parameters of a few numbers and without hooks."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lwkd.optimizer.group_memory import private
from lwkd.optimizer.nested import with_those_inside
from lwkd.optimizer.param_groups import PARALLEL_LISTS

EDGE = 3
"""Largest size of a dimension of a small parameter."""


class Toy(NamedTuple):
    """A small parameter: where it stands among the base's, and which of two layers it plays."""

    group: int
    number: int  # in the group
    layer: int
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype


def toys_of(optimizer: Optimizer, dtype: torch.dtype) -> list[Toy]:
    """Two small parameters for each number of dimensions in a group, in turns of one layer and the other."""
    toys: list[Toy] = []
    for number, group in enumerate(optimizer.param_groups):
        kinds: dict[Any, int] = defaultdict(int)
        turn = 0
        for index, parameter in enumerate(group["params"]):
            kind = parameter.dim(), parameter.dtype, parameter.device
            if kinds[kind] == 2 or not (parameter.is_floating_point() or parameter.is_complex()):
                continue
            kinds[kind] += 1
            device = torch.device("cpu") if parameter.device.type == "meta" else parameter.device
            of = torch.promote_types(dtype, torch.complex64) if parameter.is_complex() else dtype
            toys.append(Toy(number, index, turn % 2, _cut_shape(parameter), device, of))
            turn += 1
    if not toys:
        raise ValueError("it holds no floating-point parameter")
    return toys


def _cut_shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(min(size, EDGE) for size in tensor.shape)


def _cut(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The corner of a tensor of a state; counters keep their dtype."""
    if type(tensor) not in (Tensor, nn.Parameter):  # of several machines, or of a format of its own
        return torch.zeros(_cut_shape(tensor), dtype=dtype, device="cpu")
    corner = tensor.detach()[tuple(slice(size) for size in _cut_shape(tensor))].clone()
    return corner.to(dtype) if corner.dim() and corner.is_floating_point() else corner


def small_copy(optimizer: Optimizer, groups: list[list[Toy]], parameters: Mapping[Toy, Tensor]) -> Optimizer:
    """An optimizer of the same class and options that holds small parameters.

    Optimizers inside (of a Lookahead, say) are copied too. Nothing of it is shared with the base.
    """
    small = {toy[:2]: parameter for toy, parameter in parameters.items()}
    memo: dict[int, Any] = {}
    keys: dict[int, Tensor] = {}
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            known = small.get((number, index))
            memo[id(parameter)] = torch.zeros((), dtype=torch.float32, device="cpu") if known is None else known
            if known is not None:
                keys[id(parameter)] = known
    originals = with_those_inside(optimizer)
    for one in originals:
        memo[id(one)] = object.__new__(type(one))
    for one in originals:
        state = vars(one).get("state")
        if isinstance(state, dict) and id(state) not in memo:
            memo[id(state)] = _small_state(state, keys, memo)
    for one in originals:
        for name, value in vars(one).items():
            if name.endswith("_hooks"):
                vars(memo[id(one)])[name] = type(value)()
            elif name not in ("step", "_optimizer_original_step_method", "_optimizer_patched_step_method"):
                vars(memo[id(one)])[name] = copy.deepcopy(value, memo)
    small_base: Optimizer = memo[id(optimizer)]
    whole, split = list(small_base.param_groups), []
    for toys in groups:
        if not toys:
            continue
        group = copy.copy(whole[toys[0].group])
        for key in PARALLEL_LISTS & group.keys():
            group[key] = [whole[toys[0].group][key][toy.number] for toy in toys]
        group.update({key: private(value) for key, value in group.items() if key not in PARALLEL_LISTS})
        group["lr"] = _trial_rate(group["lr"])
        split.append(group)
    small_base.param_groups[:] = split
    return small_base


def _trial_rate(lr: Any) -> Any:
    """The group's own learning rate; one that is (still) next to nothing would move nothing."""
    if abs(float(lr)) > 1e-6:
        return lr
    return torch.full_like(lr, 1e-3) if isinstance(lr, Tensor) else 1e-3


def _small_state(state: dict[Any, Any], keys: dict[int, Tensor], memo: dict[int, Any]) -> dict[Any, Any]:
    """What the base knows of the parameters that have a small one, cut to its size."""
    cut: dict[Any, Any] = defaultdict(dict)
    for key, values in state.items():
        small = keys.get(id(key))
        if small is None and isinstance(key, Tensor):
            continue
        for value in _tensors(values):
            if id(value) not in memo:
                memo[id(value)] = _cut(value, torch.float64 if small is None else small.real.dtype)
        cut[key if small is None else small] = copy.deepcopy(values, memo)
    return cut


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
