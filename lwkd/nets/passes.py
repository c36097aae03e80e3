"""Passes that the library makes itself, and that leave no trace in the nets or in anyone's random streams.

A pass runs the unwrapped module on detached aliases of its parameters and clones of its buffers. ``.grad``, buffers,
random streams, modes, ``requires_grad`` and hooks are bitwise the same afterwards, also when the forward raises. What
a model's own Python code changes in ``forward``, and what the user's own hooks do, cannot be protected.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lwkd.nets.inputs import Inputs
from lwkd.nets.names import canonical, named_parameters, unwrap

HALVES = (torch.float16, torch.bfloat16)


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
            stack.enter_context(disable_hooks())
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


class FunctionalModule:
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


_disabled: ContextVar[bool] = ContextVar("lwkd_muted", default=False)


@contextmanager
def disable_hooks() -> Iterator[None]:
    """Lwkd's hooks take no notice of the passes made inside.

    >>> with disable_hooks():
    ...     hooks_disabled()
    True
    >>> hooks_disabled()
    False
    """
    token = _disabled.set(True)
    try:
        yield
    finally:
        _disabled.reset(token)


def hooks_disabled() -> bool:
    """Whether the pass at hand is the library's own."""
    return _disabled.get()


def device_of(net: nn.Module) -> torch.device:
    """The device of the net's first parameter; the CPU for a net without any.

    >>> device_of(nn.Linear(2, 2))
    device(type='cpu')
    """
    first = next(net.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def on_one_device(student: nn.Module, teacher: nn.Module, of_student: torch.device, of_teacher: torch.device) -> None:
    """Check that both nets can be compared.

    Raises:
        RuntimeError: what is compared is on different devices; both nets are named.
    """
    if of_student != of_teacher:
        raise RuntimeError(
            f"the student ({type(unwrap(student)).__name__}) is on {of_student}, the teacher "
            f"({type(unwrap(teacher)).__name__}) on {of_teacher}; both must be on one device to be compared. Call "
            f"teacher.to({str(of_student)!r}) before training"
        )
