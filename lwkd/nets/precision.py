"""IEEE float32 for passes that the library makes itself, whatever precision the user trains in.

A finite difference, a tangent or a curvature is 10 % off and more in TF32 or bfloat16. What lowers the precision of a
float32 pass is turned off while it is made, and back on afterwards exactly as it was:

1. The switches of torch that let float32 arithmetic be done in TF32 or bfloat16: :func:`ieee_float32`.
2. Autocast, also where the forward itself turns it on: :func:`no_autocast`.
3. What a framework put around ``forward``: :func:`own_forwards`.

1 and 2 belong to the process, and measurements of several threads may overlap: :class:`Shared`.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

from lwkd.nets.walk import modules_of, parameters_of


class Shared:
    """A change of the whole process that lasts for as long as anyone needs it.

    The first who enters makes it, and the last who leaves undoes it, in whichever threads and order: were it saved and
    restored by each, the one who leaves last would restore what another had set.

    Args:
        change: gives a context manager that makes the change and undoes it.
    """

    def __init__(self, change: Callable[[], AbstractContextManager[Any]]) -> None:
        self.change, self.inside, self.made = change, 0, ExitStack()
        self.lock = threading.RLock()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, the change is made."""
        with self.lock:
            if not self.inside:
                self.made.enter_context(self.change())
            self.inside += 1
        try:
            yield
        finally:
            with self.lock:
                self.inside -= 1
                if not self.inside:
                    self.made.close()


# 1. Switches

_SWITCHES = [
    ("generic", "all"),
    *((backend, "all") for backend in ("cuda", "mkldnn")),
    *((backend, op) for backend in ("cuda", "mkldnn") for op in ("conv", "rnn", "matmul")),
]
"""Backends and operations with a precision of float32 arithmetic; those that others inherit from come first."""


@contextmanager
def _ieee_switches() -> Iterator[None]:
    # torch.backends.*.fp32_precision, without the setters that refuse after torch.backends.disable_global_flags().
    get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    saved = {}
    for switch in _SWITCHES:
        saved[switch] = get(*switch)
        put(*switch, "none")  # or those below, which may say nothing themselves, would show what they inherit
    # The older switches (allow_tf32, set_float32_matmul_precision) are kept beside these. Where the two contradict each
    # other, torch raises when the older ones are read, as cuBLAS and torch.backends.cudnn.flags do.
    matmul = torch._C._get_float32_matmul_precision()
    try:
        cudnn = torch._C._get_cudnn_allow_tf32()
    except RuntimeError:  # contradicts the "none" above, so it is on
        cudnn = True
    try:
        torch._C._set_float32_matmul_precision("highest")
        torch._C._set_cudnn_allow_tf32(False)
        for switch in _SWITCHES:
            put(*switch, "ieee")
        yield
    finally:
        torch._C._set_float32_matmul_precision(matmul)
        torch._C._set_cudnn_allow_tf32(cudnn)
        for switch, precision in saved.items():
            put(*switch, precision)


ieee_float32 = Shared(_ieee_switches)
"""Inside, float32 arithmetic is IEEE float32. Afterwards every switch is as it was before the first who entered."""


# 2. Autocast

_KEY = "lwkd_autocast"
"""Of a thread's :class:`_Switch`. Autograd's own threads inherit it, and run checkpointed parts of a net again."""


class _Switch:
    """Whether autocast is kept off in a thread."""

    off = False


@contextmanager
def _ineffective_autocast() -> Iterator[None]:
    entered = torch.autocast.__enter__

    @functools.wraps(entered)
    def enter(self: torch.autocast) -> Any:
        found = entered(self)
        if _without_autocast():
            torch.set_autocast_enabled(self.device, False)  # until __exit__, which restores what was before
        return found

    torch.autocast.__enter__ = enter  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__ = entered  # type: ignore[method-assign]


_patched_autocast = Shared(_ineffective_autocast)


def _without_autocast() -> bool:
    known: bool = torch._C._is_key_in_tls(_KEY)
    return known and _switch().off


def _switch() -> _Switch:
    """This thread's switch, made once."""
    if not torch._C._is_key_in_tls(_KEY):
        made = _Switch()
        # torch takes a reference over that it has not counted (pytorch#180295): True, given at every measurement, was
        # deallocated after some ten thousand of them.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))
        torch._C._stash_obj_in_tls(_KEY, made)
    found: _Switch = torch._C._get_obj_in_tls(_KEY)
    return found


@contextmanager
def no_autocast(devices: set[str]) -> Iterator[None]:
    """Autocast is off inside, on these types of devices, and cannot be turned on there by this thread."""
    switch = _switch()
    before = switch.off
    with ExitStack() as stack:
        for device in sorted(devices):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_patched_autocast())
        switch.off = True
        try:
            yield
        finally:
            switch.off = before


# 3. Forwards


@contextmanager
def own_forwards(net: nn.Module) -> Iterator[None]:
    """Every module has its own ``forward``, without what torch's autocast decorator or Accelerate put around it.

    Other replacements of ``forward`` are the user's, and part of the net. Hooks of Accelerate's that move tensors
    between devices are kept where the net's parameters lie on several.
    """
    placed: dict[nn.Module, Any] = {}  # what the modules had in place of their class's forward
    spread = len({parameter.device for parameter in parameters_of(net).values()}) > 1
    try:
        for module in modules_of(net):
            forward = vars(module).get("forward", type(module).forward)
            own = _own_forward(forward, module, keep_hooks=spread)
            if own is not forward:
                placed[module] = vars(module).get("forward")
                vars(module)["forward"] = own
        yield
    finally:
        for module, found in placed.items():
            if found is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = found


def _own_forward(forward: Any, module: nn.Module, *, keep_hooks: bool) -> Any:
    """What is left of a forward once the wrappers that are no part of the net are taken off."""
    bound = "forward" not in vars(module)  # the class's, which is called with the module
    found = forward
    while (wrapped := getattr(found, "__wrapped__", None)) is not None:
        home = _home(found)
        hook = home == "accelerate" and hasattr(module, "_hf_hook") and isinstance(found, functools.partial)
        if home is None or (hook and (keep_hooks or not _is_accelerates(module._hf_hook))):
            break
        bound = bound or isinstance(found, MethodType)
        found = wrapped
    if found is forward:
        return forward
    return MethodType(found, module) if bound and not isinstance(found, MethodType) else found


def _home(wrapper: Any) -> str | None:
    """Where a wrapper around a forward comes from, if that is a framework that lowers precision or moves tensors."""
    home = home_of(wrapper)
    if home == "torch.amp.autocast_mode":
        return "torch"
    return "accelerate" if home.partition(".")[0] == "accelerate" else None


def home_of(function: Any) -> str:
    """Name of the module whose code a function, a method or a partial of one is."""
    function = function.func if isinstance(function, functools.partial) else function
    function = getattr(function, "__func__", function)
    # functools.wraps replaces __module__ by that of the wrapped function; its globals remain its own.
    home: str = getattr(function, "__globals__", {}).get("__name__") or type(function).__module__
    return home


def _is_accelerates(hook: Any) -> bool:
    """Whether a hook, and all in a chain of them, are of Accelerate's own classes."""
    ours = type(hook).__module__.partition(".")[0] == "accelerate"
    return ours and all(_is_accelerates(one) for one in getattr(hook, "hooks", ()))
