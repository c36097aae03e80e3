"""A net's modules and tensors, in the order of ``nn.Module.named_modules``, in a fraction of its time.

The generators of ``nn.Module`` are one inside the other, as deep as the net: one walk over a ResNet takes them half a
millisecond. A measurement looks at all modules of each net some ten times, for which a GPU waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn

_remembered: ContextVar[dict[int, list[tuple[str, nn.Module]]] | None] = ContextVar("lwkd_walks", default=None)
"""Walks by ``id`` of the net, which the walk holds."""


@contextmanager
def walks_remembered() -> Iterator[None]:
    """Inside, which modules a net has is found out once: modules that a pass makes are gone after it."""
    if _remembered.get() is not None:
        yield
        return
    token = _remembered.set({})
    try:
        yield
    finally:
        _remembered.reset(token)


def named_modules_of(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module once, under its first name; the net itself is ``""``.

    >>> [name for name, _ in named_modules_of(nn.Sequential(nn.Sequential(nn.ReLU()), nn.ReLU()))]
    ['', '0', '0.0', '1']
    """
    remembered = _remembered.get()
    if remembered is not None and id(net) in remembered:
        return remembered[id(net)]
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    left: list[tuple[str, nn.Module]] = [("", net)]
    while left:
        name, module = left.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append((name, module))
        prefix = f"{name}." if name else ""
        children = [(prefix + child, inner) for child, inner in module._modules.items() if inner is not None]
        left.extend(reversed(children))
    if remembered is not None:
        remembered[id(net)] = found
    return found


def modules_of(net: nn.Module) -> list[nn.Module]:
    """Every module once."""
    return [module for _, module in named_modules_of(net)]


def parameters_of(net: nn.Module) -> dict[str, Tensor]:
    """Every parameter once, under its first name.

    >>> list(parameters_of(nn.Sequential(nn.Linear(2, 2))))
    ['0.weight', '0.bias']
    """
    return _tensors(net, "_parameters")


def buffers_of(net: nn.Module) -> dict[str, Tensor]:
    """Every buffer once, under its first name."""
    return _tensors(net, "_buffers")


def tensors_of(net: nn.Module) -> dict[str, Tensor]:
    """Every parameter and every buffer once, under its first name."""
    return _tensors(net, "_parameters", "_buffers")


def _tensors(net: nn.Module, *stores: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, module in named_modules_of(net):
        for store in stores:
            for name, tensor in getattr(module, store).items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[f"{prefix}.{name}" if prefix else name] = tensor
    return found
