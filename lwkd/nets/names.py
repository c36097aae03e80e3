"""Canonical names of modules and parameters: the same under DDP, ``torch.compile``, FSDP and checkpoint wrappers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

_WRAPPER_COMPONENTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""Name components that wrappers (the last: of Lightning Fabric) insert and that no user wrote."""

_MODULE_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)
"""Wrappers that hold the user's model as their child ``module``."""


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Canonical name → module over the unwrapped model; the root is ``""``.

    A module that is reachable by several names appears under each. Where a child is itself wrapped, its name gives
    the module inside the wrapper.

    >>> list(named_modules(nn.DataParallel(nn.Sequential(nn.ReLU()))))
    ['', '0']
    """
    return {canonical(name): module for name, module in unwrap(model).named_modules(remove_duplicate=False)}


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Canonical name → parameter over the unwrapped model; a tied parameter appears under each of its names.

    >>> list(named_parameters(nn.DataParallel(nn.Linear(2, 2))))
    ['weight', 'bias']
    """
    return {canonical(name): p for name, p in unwrap(model).named_parameters(remove_duplicate=False)}


def parameter_names_by_id(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """``id`` of each parameter → all its canonical names, in the order of :func:`named_parameters`."""
    names: dict[int, tuple[str, ...]] = {}
    for name, parameter in named_parameters(model).items():
        names[id(parameter)] = (*names.get(id(parameter), ()), name)
    return names


def canonical(name: str, model: nn.Module | None = None) -> str:
    """The name without what wrappers inserted.

    Args:
        name: name of a module or parameter.
        model: the model from which the name was read; where that is a DDP-like wrapper, one leading ``module.`` is
            the wrapper's and is removed too. None leaves a leading ``module.`` alone.

    >>> canonical("_orig_mod.layer1.0._checkpoint_wrapped_module.conv.weight")
    'layer1.0.conv.weight'
    >>> canonical("module.fc"), canonical("module.fc", nn.DataParallel(nn.Identity()))
    ('module.fc', 'fc')
    """
    if model is None and not any(map(name.__contains__, _WRAPPER_COMPONENTS)):
        return name  # as nearly all names
    components = [c for c in name.split(".") if c not in _WRAPPER_COMPONENTS]
    while model is not None and (wrapper := _outermost_wrapper(model)) is not None:
        component, model = wrapper
        if component == "module" and components[:1] == ["module"]:
            components = components[1:]
    return ".".join(components)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside DDP, DataParallel, AveragedModel and ``torch.compile``, nested in any order.

    A model of the user's that merely has a child called ``module`` is not a wrapper and is returned as it is.

    >>> net = nn.Linear(2, 2)
    >>> unwrap(nn.DataParallel(net)) is net
    True
    """
    while (wrapper := _outermost_wrapper(model)) is not None:
        model = wrapper[1]
    return model


def wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """What :func:`unwrap` takes off, from the outside inwards."""
    while (wrapper := _outermost_wrapper(model)) is not None:
        yield model
        model = wrapper[1]


def _outermost_wrapper(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The component that the outermost wrapper inserts, and what it wraps; None if the model is no wrapper."""
    if isinstance(model, torch.jit.ScriptModule):
        return None
    for component in ("module",) if isinstance(model, _MODULE_WRAPPERS) else _WRAPPER_COMPONENTS:
        inner = model._modules.get(component)
        if inner is not None:
            return component, inner
    return None
