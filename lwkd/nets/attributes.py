"""What modules keep in plain attributes, put back after a pass: counters, caches, parts made in the forward.

Parameters and buffers are not the business of this file: passes run on copies of them (:mod:`lwkd.nets.passes`).
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from operator import is_
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lwkd.nets.sharding import by_fsdp
from lwkd.nets.walk import modules_of, tensors_of

_REGISTERED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_TORCHS_OWN = frozenset(nn.Module().__dict__)
_PLAIN = frozenset({int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size})
_LONG = 1024
"""Entries of a list or dict above which those inside are not looked at: no state of a module is that long."""


@contextmanager
def attributes_kept(net: nn.Module) -> Iterator[None]:
    """Whatever a pass made inside does to the modules' attributes is undone, also when it raises.

    Kept are the attributes of every module, with what was registered (parameters, buffers, modules), and in them
    numbers, tensors, arrays, random generators, lists, dicts, sets, deques, tuples, dataclasses, and objects whose
    class comes from the same package as the module's. During the pass, tensors are private copies; afterwards the
    attributes hold the same objects as before, with the same contents. Not kept: what lies in other objects, in classes
    and in globals; tensors that carry a graph, where they are written in place; the parameters of modules that are not
    registered in the net, and what lies in lists and dicts of more than 1,024 entries, likewise.

    >>> class Counter(nn.Module):
    ...     seen = 0
    ...     def forward(self, x):
    ...         self.seen += 1
    ...         return x
    >>> net = Counter()
    >>> with attributes_kept(net):
    ...     net(1), net.seen
    (1, 1)
    >>> net.seen
    0
    """
    keeper = _Keeper(net)
    try:
        keeper.put_copies()
        yield
    finally:
        keeper.restore()


class _Keeper:
    """Contents of containers before a pass, each with how they are put back."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.containers: list[tuple[Any, Any]] = []  # each with its contents
        self.namespaces: list[tuple[dict[str, Any], dict[str, Any], frozenset[str]]] = []
        self.undo: list[Callable[[], None]] = []
        self.seen: dict[int, Any] = {}  # id of what was met → what stands for it during the pass
        self.alive: list[Any] = []  # so that no id is used twice

    def put_copies(self) -> None:
        """Tensors in attributes are replaced by copies."""
        # Also reachable through attributes, as in an LSTM; they are replaced where they are registered.
        self.seen.update((id(tensor), tensor) for tensor in tensors_of(self.net).values())
        modules = [module for module in modules_of(self.net) if not _is_frameworks(module)]
        for module in modules:
            self.seen[id(module)] = module
        for module in modules:
            self._module(module)

    def restore(self) -> None:
        """Everything as it was."""
        for container, saved in self.containers:
            _refill(container, saved)
        for attributes, before, skipped in self.namespaces:
            _put_back(attributes, before, skipped)
        for undo in self.undo:
            undo()

    def _module(self, module: nn.Module) -> None:
        for name in _REGISTERED:
            self._save(module.__dict__[name])
        self._namespace(module.__dict__, type(module), _TORCHS_OWN)

    def _hidden_module(self, hidden: nn.Module) -> None:
        """A module that the net uses and has not registered: its buffers are attributes like others."""
        for module in hidden.modules():
            if id(module) not in self.seen and not _is_frameworks(module):
                self.seen[id(module)] = module
                self._module(module)
                self._entries(module._buffers, type(module))

    def _namespace(self, attributes: dict[str, Any], holder: type, skipped: frozenset[str] = frozenset()) -> None:
        saved = attributes.copy()
        self.namespaces.append((attributes, saved, skipped))
        for name, value in saved.items():
            if type(value) not in _PLAIN and name not in skipped:
                copy = self._copy(value, holder)
                if copy is not value:
                    attributes[name] = copy

    def _copy(self, value: Any, holder: type) -> Any:
        """What stands for a value during the pass: itself, or a copy where it could be written in place."""
        if type(value) in _PLAIN:
            return value
        if id(value) in self.seen:
            return self.seen[id(value)]
        if isinstance(value, tuple):
            return self._tuple(value, holder)
        self.seen[id(value)] = value
        self.alive.append(value)
        if isinstance(value, Tensor):
            if value.grad_fn is None and not torch.nn.parameter.is_lazy(value):
                self.seen[id(value)] = value.detach().clone().requires_grad_(value.requires_grad)
        elif isinstance(value, (list, deque, dict, set)):
            self._save(value)
            if len(value) <= _LONG:
                self._entries(value, holder)
        elif isinstance(value, nn.Module):
            del self.seen[id(value)]
            self._hidden_module(value)
        elif (state := _random_state(value)) is not None:
            self.undo.append(state)
        elif type(value).__module__ == "numpy" and hasattr(value, "copy"):
            self.seen[id(value)] = value.copy()
        elif _is_part_of(value, holder):
            self._namespace(vars(value), holder)
        return self.seen.get(id(value), value)

    def _tuple(self, value: tuple[Any, ...], holder: type) -> tuple[Any, ...]:
        copies = [self._copy(entry, holder) for entry in value]
        if all(copy is entry for copy, entry in zip(copies, value, strict=True)):
            return value
        return type(value)(*copies) if hasattr(value, "_fields") else tuple(copies)

    def _entries(self, container: Any, holder: type) -> None:
        """Put copies into a container."""
        if isinstance(container, set):
            return
        keys = list(container) if isinstance(container, MutableMapping) else range(len(container))
        for key in keys:
            copy = self._copy(container[key], holder)
            if copy is not container[key]:
                container[key] = copy

    def _save(self, container: Any) -> None:
        """Remember the entries of a list, deque, dict or set."""
        self.containers.append((container, dict(container) if isinstance(container, dict) else list(container)))


def _same(one: Any, other: Any) -> bool:
    """Whether two containers of one kind hold the same objects in the same order."""
    if len(one) != len(other) or not all(map(is_, one, other)):
        return False
    return not isinstance(one, dict) or all(map(is_, one.values(), other.values()))


def _refill(container: Any, saved: Any) -> None:
    """The entries of a container are those saved, in their order."""
    if _same(container, saved):
        return
    container.clear()
    if isinstance(container, (list, deque)):
        container.extend(saved)
    else:
        container.update(saved)


def _put_back(attributes: dict[str, Any], saved: dict[str, Any], skipped: frozenset[str]) -> None:
    """Attributes are those saved, but for the skipped ones."""
    if _same(attributes, saved):
        return
    for name in [name for name in attributes if name not in skipped and name not in saved]:
        del attributes[name]
    for name, value in saved.items():
        if name not in skipped and (name not in attributes or attributes[name] is not value):
            attributes[name] = value


def _is_frameworks(module: nn.Module) -> bool:
    """Whether a module is compiled, or of torch's own that sets itself up in its first pass, outside of attributes."""
    if by_fsdp(module):  # the user's module, whose class torch has derived one from
        return False
    wrappers = (torch.jit.ScriptModule, nn.parallel.DistributedDataParallel, nn.DataParallel)
    return isinstance(module, wrappers) or type(module).__module__.startswith("torch.distributed")


def _is_part_of(value: Any, holder: type) -> bool:
    """Whether an object is a module's own record: of plain data, or of a class from the package of the module's."""
    if isinstance(value, type) or callable(value) or not hasattr(value, "__dict__"):
        return False
    package = type(value).__module__.partition(".")[0]
    ours = package == holder.__module__.partition(".")[0] and package not in ("torch", "lwkd", "builtins")
    return ours or is_dataclass(value) or isinstance(value, SimpleNamespace)


def _random_state(value: Any) -> Callable[[], None] | None:
    """How a random generator is put back to where it is now; None for anything else."""
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: (value.set_state(state), None)[1]
    if isinstance(value, random.Random):
        place = value.getstate()
        return lambda: value.setstate(place)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        legacy = value.get_state()
        return lambda: value.set_state(legacy)
    if numpy is not None and isinstance(value, numpy.random.Generator):
        bits, before = value.bit_generator, value.bit_generator.state
        return lambda: setattr(bits, "state", before)
    return None
