"""Passes that the library makes itself, and that leave no trace in the nets or in anyone's random streams.

A pass runs the unwrapped module on detached aliases of its parameters and clones of its buffers. ``.grad``, buffers,
random streams, modes, ``requires_grad`` and hooks are bitwise the same afterwards, also when the forward raises. What
a model's own Python code changes in ``forward``, and what the user's own hooks do, cannot be protected.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lwkd.devices import device_of
from lwkd.muting import muted
from lwkd.names import canonical, named_parameters, unwrap

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Inputs:
    """What a net is called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any) -> Inputs:
        """From a tensor, a tuple of positional arguments or a dict of keyword arguments.

        >>> len(Inputs.of(torch.zeros(2)).args), Inputs.of({"x": 1}).kwargs
        (1, {'x': 1})
        """
        if isinstance(value, Inputs):
            return value
        if isinstance(value, Mapping):
            return cls((), value)
        return cls(value if isinstance(value, tuple) else (value,))

    def map(self, change: Any) -> Inputs:
        """Every tensor replaced by ``change(tensor)``, in nested tuples, lists and mappings too."""
        return Inputs(_mapped(self.args, change), _mapped(self.kwargs, change))

    def tensors(self) -> list[Tensor]:
        """All tensors, in order."""
        return list(tensors_in((self.args, self.kwargs)))

    def rows(self, batch: int, count: int | None) -> Inputs:
        """A private, detached copy of the first ``count`` rows of every tensor that has ``batch`` of them."""

        def first(tensor: Tensor) -> Tensor:
            whole = count is None or tensor.dim() == 0 or tensor.shape[0] != batch
            return (tensor if whole else tensor[:count]).detach().clone()

        return self.map(first)

    def first_floating(self) -> int | None:
        """Index, among :meth:`tensors`, of the first floating-point one: what a derivative is taken with respect to."""
        return next((i for i, tensor in enumerate(self.tensors()) if tensor.is_floating_point()), None)

    def with_tensor(self, index: int, tensor: Tensor) -> Inputs:
        """The tensor with this index replaced."""
        counter = iter(range(len(self.tensors())))
        return self.map(lambda old: tensor if next(counter) == index else old)


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_mapped(item, change) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


@contextmanager
def untraced(net: nn.Module, inputs: Sequence[Tensor] = (), *, seed: int | None = None) -> Iterator[None]:
    """Random streams, modes and settings of the passes made inside are as before afterwards; hooks of lwkd are mute.

    Args:
        net: the unwrapped module.
        inputs: the tensors that it will be called with, for the devices whose streams are kept.
        seed: seed of all streams inside; None goes on from where they are.
    """
    devices = cuda_devices(net, inputs)
    modes = {module: module.training for module in net.modules()}
    python, numpy = random.getstate(), sys.modules.get("numpy")
    legacy = None if numpy is None else numpy.random.get_state()
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        with ExitStack() as stack:
            stack.enter_context(muted())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.random.fork_rng(devices=[device.index for device in devices]))
            if any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in modes):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            torch.backends.mha.set_fastpath_enabled(False)
            if seed is not None:
                restart(seed, devices)
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        torch.backends.mha.set_fastpath_enabled(fastpath)
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(legacy)


def cuda_devices(net: nn.Module, inputs: Sequence[Tensor]) -> set[torch.device]:
    """The GPUs that a pass of this net draws random numbers on."""
    return {t.device for t in (*inputs, *net.parameters(), *net.buffers()) if t.device.type == "cuda"}


def restart(seed: int, devices: Iterable[torch.device] = ()) -> None:
    """Seed every stream that a forward pass may draw from, so that two passes drop the same units.

    ``torch.manual_seed`` would seed the streams of all GPUs, also of those whose streams nobody has kept, and replace
    the seed that waits for GPUs not in use yet.
    """
    torch.default_generator.manual_seed(seed)
    for device in devices:
        torch.cuda.default_generators[device.index].manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


@contextmanager
def exact(net: nn.Module) -> Iterator[None]:
    """Autocast off and attention written out in full: what derivatives of every kind can go through."""
    kinds = {"cpu", *(t.device.type for t in net.parameters())}
    with ExitStack() as stack:
        for kind in sorted(kinds - {"meta"}):
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def alias(tensor: Tensor) -> Tensor:
    """The same values, detached; tensors made under inference_mode cannot be part of a graph, and are copied."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def widened(tensor: Tensor) -> Tensor:
    """Half precision as float32: tangents and curvatures in half precision are 10 % off."""
    return tensor.float() if tensor.dtype in HALVES else tensor


class Twin:
    """A net at its present weights, to be differentiated: calls leave the module as it is.

    Args:
        net: the net as the user calls it; wrappers are removed, mode and memory format are kept.
        whose: "student" or "teacher", for messages.

    ``parameters`` are detached aliases by canonical name (tied ones once), in float32 where the net is in half
    precision; buffers are cloned for every call. ``device`` is that of the first parameter.

    Raises:
        NotImplementedError: the parameters are sharded.
    """

    def __init__(self, net: nn.Module, whose: str) -> None:
        self.net, self.whose = unwrap(net), whose
        self.device = device_of(self.net)
        self.own_names: dict[str, str] = {}
        self.parameters: dict[str, Tensor] = {}
        for name, parameter in self.net.named_parameters():
            if type(parameter).__name__ == "DTensor":
                raise NotImplementedError(
                    f"{whose}: parameter {name!r} is sharded, and derivatives do not go through shards. Use the "
                    "attention signal, or measure on a full-size copy"
                )
            self.own_names[canonical(name)] = name
            self.parameters[canonical(name)] = widened(alias(parameter))

    def names_of(self, names: Sequence[str]) -> list[str]:
        """Which of ``parameters`` these canonical names mean, tied ones once, those that hold no reals left out."""
        by_id = {id(p): canonical(name) for name, p in self.net.named_parameters()}
        every = named_parameters(self.net)
        unknown = next((name for name in names if name not in every), None)
        if unknown is not None:
            raise ValueError(f"{self.whose} ({type(self.net).__name__}): no parameter is called {unknown!r}")
        found = dict.fromkeys(by_id[id(every[name])] for name in names)
        return [name for name in found if self.parameters[name].is_floating_point()]

    def state(self) -> dict[str, Tensor]:
        """Parameters and cloned buffers under the module's own names, for ``torch.func.functional_call``."""
        state = {self.own_names[name]: tensor for name, tensor in self.parameters.items()}
        state.update((name, widened(b.detach().clone())) for name, b in self.net.named_buffers())
        return state

    def holding(self, function: Callable[[], Any]) -> Any:
        """``function()`` while the module holds the parameters and clones of the buffers.

        Backward passes belong inside: activation checkpointing runs the forward again in them, which must find the same
        parameters and must not reach the net's own buffers.
        """
        state = {f"net.{name}": tensor for name, tensor in self.state().items()}
        return torch.func.functional_call(_Holder(self.net, function), state, ())

    def __call__(self, inputs: Inputs) -> Any:
        """The output for these inputs."""
        return torch.func.functional_call(self.net, self.state(), inputs.args, dict(inputs.kwargs))


class _Holder(nn.Module):
    """Calls a function while it is itself called with other parameters for the module it holds."""

    def __init__(self, net: nn.Module, function: Callable[[], Any]) -> None:
        super().__init__()
        self.net, self.function = net, function

    def forward(self) -> Any:
        return self.function()
