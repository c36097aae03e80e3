"""Passes that the library makes itself, and that leave no trace in the nets or in anyone's random streams.

A pass runs the unwrapped module on copies of its parameters and buffers: ``forward`` may write to them, as
``nn.Embedding(max_norm=...)`` does. Parameters, ``.grad``, buffers, random streams, modes, ``requires_grad``, hooks and
attributes are bitwise the same afterwards, also when the forward raises. What a model's code changes in globals, in its
classes or in objects outside its attributes (:mod:`lwkd.nets.attributes` says which are kept), and what the user's own
hooks do there, cannot be protected.

Reading order: :func:`side_effect_free` (the frame around such passes), :func:`differentiable_math` (what derivatives
need), the device of a net, and how small things get there. The net that is called inside is a
:class:`lwkd.nets.functional_module.FunctionalModule`.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.nn.attention import SDPBackend, sdpa_kernel

from lwkd.nets.checkpointing import passing_checkpoints
from lwkd.nets.names import unwrap
from lwkd.nets.precision import Shared, ieee_float32, no_autocast, own_forwards
from lwkd.nets.sharding import unsharded
from lwkd.nets.walk import modules_of, parameters_of, tensors_of

P = ParamSpec("P")
R = TypeVar("R")


def may_be_traced() -> bool:
    """Whether Dynamo looks at the frames of this thread; where it does not, there is nothing to keep from it."""
    return torch.compiler.is_compiling() or get_eval_frame_callback() is not None


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which torch.compile leaves alone when it is called in a compiled region.

    What frames a pass or a step (random streams, hooks, switches of torch) cannot be traced. Elsewhere the function is
    called as it is: ``torch.compiler.disable`` imports the compiler, which takes a second, and costs every step time.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if may_be_traced():
            found: R = torch.compiler.disable(function)(*args, **kwargs)
            return found
        return function(*args, **kwargs)

    return call


@contextmanager
def side_effect_free(net: nn.Module, inputs: Sequence[Tensor] = (), *, seed: int | None = None) -> Iterator[None]:
    """Passes made inside change no random stream, no mode and no setting of torch, and lwkd's hooks ignore them.

    Args:
        net: the unwrapped module.
        inputs: the tensors that it will be called with; the random streams of their devices are restored too.
        seed: seed of all random streams inside; None continues them from where they are.
    """
    devices = cuda_devices(net, inputs)
    modes = {module: module.training for module in modules_of(net)}
    python, numpy = random.getstate(), sys.modules.get("numpy")
    legacy = None if numpy is None else numpy.random.get_state()
    try:
        with ExitStack() as stack:
            stack.enter_context(disable_hooks())
            stack.enter_context(_no_fastpath())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.random.fork_rng(devices=[device.index for device in devices]))
            if any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in modes):
                stack.enter_context(_uncompiled())
            if seed is not None:
                seed_streams(seed, devices)
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(legacy)


@contextmanager
def _fastpath_off() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


_no_fastpath = Shared(_fastpath_off)
_uncompiled = Shared(lambda: torch.compiler.set_stance("force_eager"))


_hooks_disabled: ContextVar[bool] = ContextVar("lwkd_hooks_disabled", default=False)


@contextmanager
def disable_hooks() -> Iterator[None]:
    """Lwkd's hooks ignore the passes made inside.

    >>> with disable_hooks():
    ...     hooks_disabled()
    True
    >>> hooks_disabled()
    False
    """
    token = _hooks_disabled.set(True)
    try:
        yield
    finally:
        _hooks_disabled.reset(token)


def hooks_disabled() -> bool:
    """Whether the current pass is one that the library makes itself."""
    return _hooks_disabled.get()


def in_backward() -> bool:
    """Whether autograd is running: a pass made now is a recomputation."""
    return torch._C._current_graph_task_id() != -1


def cuda_devices(net: nn.Module, inputs: Sequence[Tensor]) -> set[torch.device]:
    """The GPUs whose random streams a pass of this net may draw from."""
    if not torch.cuda.is_initialized():
        return set()
    return {t.device for t in (*inputs, *tensors_of(net).values()) if t.device.type == "cuda"}


def seed_streams(seed: int, devices: Iterable[torch.device] = ()) -> None:
    """Seed every random stream that a forward pass may draw from, so that two passes drop the same units.

    ``torch.manual_seed`` would seed the streams of all GPUs, also those that :func:`side_effect_free` does not restore,
    and replace the seed of GPUs that are not in use yet.
    """
    torch.default_generator.manual_seed(seed)
    for device in devices:
        torch.cuda.default_generators[device.index].manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


@contextmanager
def differentiable_math(net: nn.Module) -> Iterator[None]:
    """The net's own forward in IEEE float32, attention by plain matrix products, and checkpointed parts as they are.

    So all of it has derivatives of every kind.
    """
    kinds = {"cpu", *(t.device.type for t in parameters_of(net).values())}
    off = no_autocast(kinds - {"meta"})
    with own_forwards(net), unsharded(net), off, ieee_float32(), _plain_attention(), plain_checkpoints():
        yield


_plain_attention = Shared(lambda: sdpa_kernel(SDPBackend.MATH))
plain_checkpoints = passing_checkpoints(hooks_disabled)


def device_of(net: nn.Module) -> torch.device:
    """The device of the net's first parameter; the CPU for a net without any.

    >>> device_of(nn.Linear(2, 2))
    device(type='cpu')
    """
    first = _first_parameter(net)
    first = next(net.parameters(), None) if first is None else first
    return torch.device("cpu") if first is None else first.device


def _first_parameter(net: nn.Module) -> Tensor | None:
    """What ``net.parameters()`` gives first; asked in every step, where that generator takes longer than all else."""
    for parameter in net._parameters.values():
        if parameter is not None:
            return parameter
    for module in net._modules.values():
        if module is not None and (found := _first_parameter(module)) is not None:
            return found
    return None


def check_same_device(
    student: nn.Module, teacher: nn.Module, of_student: torch.device, of_teacher: torch.device
) -> None:
    """Check that what is compared of the two nets is on one device.

    Raises:
        RuntimeError: it is not; both nets and both devices are named.
    """
    if of_student != of_teacher:
        raise RuntimeError(
            f"the student ({type(unwrap(student)).__name__}) is on {of_student}, the teacher "
            f"({type(unwrap(teacher)).__name__}) on {of_teacher}; both must be on one device to be compared. Call "
            f"teacher.to({str(of_student)!r}) before training"
        )


def check_two_nets(student: nn.Module, teacher: nn.Module, who: str) -> None:
    """Check that the teacher is a module of its own.

    Raises:
        ValueError: it is the student itself; says what to do.
    """
    if unwrap(student) is unwrap(teacher):
        raise ValueError(
            f"student and teacher are one module, a {type(unwrap(student)).__name__}, and {who} cannot know what makes "
            "its passes the teacher's (adapters that are switched off, say). Use signal='attention', which takes its "
            "passes without gradients for the teacher's, or give a teacher of its own: copy.deepcopy(student), before "
            "it changes"
        )


def staged(values: Tensor, device: torch.device) -> Tensor:
    """The values in memory that a GPU reads by itself: before ``.to(device, non_blocking=True)`` and ``copy_``.

    From other memory of the host the copy may wait for all that was launched before, whatever ``non_blocking`` says.
    """
    return values.pin_memory() if _reads_pinned(device) and values.device.type == "cpu" else values


def _reads_pinned(device: torch.device) -> bool:
    return device.type == "cuda"
