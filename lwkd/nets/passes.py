"""Passes that the library makes itself, and that leave no trace in the nets or in anyone's random streams.

A pass runs the unwrapped module on copies of its parameters and buffers: ``forward`` may write to them, as
``nn.Embedding(max_norm=...)`` does. Parameters, ``.grad``, buffers, random streams, modes, ``requires_grad``, hooks and
attributes are bitwise the same afterwards, also when the forward raises. What a model's code changes in globals, in its
classes or in objects outside its attributes (:mod:`lwkd.nets.attributes` says which are kept), and what the user's own
hooks do there, cannot be protected.

Reading order: :func:`side_effect_free` (the frame around such passes), :func:`differentiable_math` (what derivatives
need), :class:`FunctionalModule` (the net that is called inside), its device, and how small things get there.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cached_property, wraps
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy

from lwkd.nets.attributes import attributes_kept
from lwkd.nets.countable import check_countable
from lwkd.nets.inputs import Inputs
from lwkd.nets.names import canonical, named_parameters, unwrap
from lwkd.nets.precision import Shared, ieee_float32, no_autocast, own_forwards
from lwkd.nets.sharding import unsharded, whole_parameters
from lwkd.nets.walk import buffers_of, modules_of, parameters_of, tensors_of

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
    """The net's own forward in IEEE float32, and attention by plain matrix products, which have all derivatives."""
    kinds = {"cpu", *(t.device.type for t in parameters_of(net).values())}
    with own_forwards(net), unsharded(net), no_autocast(kinds - {"meta"}), ieee_float32(), _plain_attention():
        yield


_plain_attention = Shared(lambda: sdpa_kernel(SDPBackend.MATH))


_spare: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()
"""Private parameters on the CPU between measurements, by net: to ask for new memory takes longer than to copy."""


class FunctionalModule:
    """A net at its current weights, as a function that can be differentiated; the module itself never changes.

    Args:
        net: the net as the user calls it; wrappers are removed, mode and memory format are kept.
        whose: "student" or "teacher", for messages.

    ``parameters`` are private copies by canonical name (tied ones once), in float32 where the net is in half precision
    or less, complex ones as their real and imaginary parts ``(..., 2)``. A call may write to them and to the buffers,
    which are cloned for it: the next call finds the values of the net again. ``device`` is that of the first parameter.
    Parameters sharded by ``fully_shard`` are gathered, for which every rank has to make one.

    Raises:
        NotImplementedError: the parameters are sharded in another way.
        RuntimeError: a parameter has no values here, since it is offloaded.
        ValueError: a parameter is not initialised.
    """

    def __init__(self, net: nn.Module, whose: str) -> None:
        self.net, self.whose = unwrap(net), whose
        self.device = device_of(self.net)
        self.own_names: dict[str, str] = {}
        self._complex: set[str] = set()
        self._values: dict[str, Tensor] = {}  # aliases of the net's own, which ``parameters`` are copied from
        self._called = False
        if (unready := uninitialized(self.net, whose)) is not None:
            raise ValueError(unready)
        self._whole = whole_parameters(self.net, whose)
        for name, parameter in self._whole.items():
            if parameter.device.type == "meta":
                raise RuntimeError(
                    f"{whose}: parameter {name!r} is on the meta device, where it has no values: Accelerate has "
                    "offloaded it, or the net was never loaded. Load the net without offloading, or use the attention "
                    "signal"
                )
            self.own_names[canonical(name)] = name
            alias = detached_alias(parameter)
            if alias.is_complex():
                self._complex.add(canonical(name))
                alias = torch.view_as_real(alias.resolve_conj())
            self._values[canonical(name)] = alias
        first: dict[int, str] = {}
        self._key_of = {name: first.setdefault(id(p), name) for name, p in named_parameters(self.net).items()}

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """Private copies, made when they are first asked for."""
        self._memory = _spare.pop(self.net, {})
        before = {name: copy for name, copy in self._memory.items() if _fits(copy, self._values.get(name))}
        copies = before | _wide_copies({name: v for name, v in self._values.items() if name not in before})
        _copy_into(before.values(), [self._values[name] for name in before])
        self._memory = {name: copy for name, copy in copies.items() if copy.device.type == "cpu" and _is_plain(copy)}
        # Aliases, so that requires_grad ends with this measurement.
        return {name: copies[name].detach() for name in self._values}

    def __del__(self) -> None:
        if memory := vars(self).get("_memory"):
            _spare[self.net] = memory

    def __call__(self, inputs: Inputs, within: AbstractContextManager[Any] | None = None) -> Any:
        """The output for these inputs; ``within`` is entered around the forward alone, without the copies before it."""
        with attributes_kept(self.net):
            state = self.state()
            with nullcontext() if within is None else within:
                return torch.func.functional_call(self.net, state, inputs.args, dict(inputs.kwargs))

    def call_with_state(self, function: Callable[[], Any]) -> Any:
        """``function()``, during which the module itself has clones of the parameters and buffers.

        Backward passes belong inside: activation checkpointing runs the forward again in them, which must find the same
        parameters and must not reach the net's own buffers.
        """
        state = {f"net.{name}": tensor for name, tensor in self.state().items()}
        with attributes_kept(self.net):
            return torch.func.functional_call(_FunctionOfNet(self.net, function), state, ())

    def state(self) -> dict[str, Tensor]:
        """Private parameters and buffers under the module's own names, for ``torch.func.functional_call``."""
        parameters = self.parameters
        if self._called and torch._C._functorch.peek_interpreter_stack() is not None:
            # Inside a transform of torch.func nothing outside may be written to.
            parameters = _wide_copies(self._values)
        elif self._called:
            written = [tensor.data for tensor in parameters.values()]  # a call may have written through .data, too
            _copy_into(written, self._values.values())
        self._called = True
        state = {
            self.own_names[name]: torch.view_as_complex(tensor) if name in self._complex else tensor
            for name, tensor in parameters.items()
        }
        return state | _wide_copies(buffers_of(self.net))

    def resolve_names(self, names: Sequence[str]) -> list[str]:
        """The keys of ``parameters`` for these canonical names: tied ones once, no integers, which do not change."""
        unknown = next((name for name in names if name not in self._key_of), None)
        if unknown is not None:
            raise ValueError(f"{self.whose} ({type(self.net).__name__}): no parameter is called {unknown!r}")
        found = dict.fromkeys(self._key_of[name] for name in names)
        return [name for name in found if self._values[name].is_floating_point() or self._values[name].is_quantized]

    def count(self, names: Iterable[str]) -> int:
        """Number of reals in the parameters with these keys."""
        return sum(self._values[name].numel() for name in names)

    def check_countable(self, names: Iterable[str]) -> None:
        """Check that each of these keys of ``parameters`` can be counted; see :mod:`lwkd.nets.countable`.

        Raises:
            ValueError: one cannot.
        """
        check_countable({canonical(name): p for name, p in self._whole.items()}, names, self.whose)


class _FunctionOfNet(nn.Module):
    """A function as the ``forward`` of a module that holds the net: ``functional_call`` takes modules only."""

    def __init__(self, net: nn.Module, function: Callable[[], Any]) -> None:
        super().__init__()
        self.net, self.function = net, function

    def forward(self) -> Any:
        return self.function()


def detached_alias(tensor: Tensor) -> Tensor:
    """The same values, detached; tensors made under inference_mode cannot be part of a graph, and are copied."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _wide_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Private, detached copies, in float32 where a tensor is in half precision."""
    copies: dict[str, Tensor] = {}
    plain: list[str] = []
    for name, tensor in tensors.items():
        if _is_plain(tensor):
            copies[name] = torch.empty_like(tensor, dtype=_wide_dtype(tensor), requires_grad=False)
            plain.append(name)
        else:
            wide = at_least_float32(tensor.detach())
            copies[name] = wide.clone() if wide.dtype == tensor.dtype else wide
    _copy_into([copies[name] for name in plain], [tensors[name].detach() for name in plain])
    return copies


def _copy_into(copies: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Each of these values into its copy."""
    alike: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}  # torch takes one launch for values of one dtype
    for copy, value in zip(copies, values, strict=True):
        if _is_plain(copy) and _is_plain(value):
            into, given = alike.setdefault((value.device, value.dtype), ([], []))
            into.append(copy)
            given.append(value)
        else:
            copy.copy_(value)
    for into, given in alike.values():
        torch._foreach_copy_(into, given)


_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64)
_ORDINARY = {*_FLOATING, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is a block of ordinary numbers, which many can be copied of at once, and nothing more."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype in _ORDINARY
        and tensor.layout is torch.strided
        and not (tensor.is_nested or tensor.has_names())
    )


def _fits(copy: Tensor, values: Tensor | None) -> bool:
    """Whether values may be copied to where earlier ones of the same parameter lie."""
    if values is None or not _is_plain(values):
        return False
    same_place = copy.device == values.device and copy.dtype == _wide_dtype(values)
    return same_place and copy.shape == values.shape and copy.stride() == values.stride()


def uninitialized(net: nn.Module, whose: str) -> str | None:
    """What to say of a lazy parameter or buffer, which its first pass would initialise; None if there is none."""
    for name, tensor in tensors_of(net).items():
        if is_lazy(tensor):
            return (
                f"{whose} ({type(net).__name__}): {name!r} is not initialised, and its shape is not known before the "
                "first pass. Call the net once on a batch before"
            )
    return None


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision and less as float32, other dtypes unchanged: in half, tangents and curvatures are 10 % off."""
    return tensor.to(_wide_dtype(tensor))


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.is_floating_point() and tensor.element_size() < 4 else tensor.dtype


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


def staged(values: Tensor, device: torch.device) -> Tensor:
    """The values in memory that a GPU reads by itself: before ``.to(device, non_blocking=True)`` and ``copy_``.

    From other memory of the host the copy may wait for all that was launched before, whatever ``non_blocking`` says.
    """
    return values.pin_memory() if _reads_pinned(device) and values.device.type == "cpu" else values


def _reads_pinned(device: torch.device) -> bool:
    return device.type == "cuda"
