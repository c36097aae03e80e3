"""A net as a function of private copies of its parameters, which derivatives can be taken of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lwkd.nets.attributes import attributes_kept
from lwkd.nets.countable import check_countable
from lwkd.nets.inputs import Inputs
from lwkd.nets.names import canonical, named_parameters, unwrap
from lwkd.nets.passes import device_of
from lwkd.nets.sharding import whole_parameters
from lwkd.nets.transforms import transformed
from lwkd.nets.walk import buffers_of, named_modules_of, tensors_of

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

    @cached_property
    def _key_of(self) -> dict[str, str]:
        """Every name of a parameter → its key in ``parameters``, the first of its names."""
        first: dict[int, str] = {}
        return {name: first.setdefault(id(p), name) for name, p in named_parameters(self.net).items()}

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
            with _holding(self.net, state), nullcontext() if within is None else within:
                return self.net(*inputs.args, **inputs.kwargs)

    def call_with_state(self, function: Callable[[], Any]) -> Any:
        """``function()``, during which the module itself has clones of the parameters and buffers.

        Backward passes belong inside: activation checkpointing runs the forward again in them, which must find the same
        parameters and must not reach the net's own buffers.
        """
        state = self.state()
        with attributes_kept(self.net), _holding(self.net, state):
            return function()

    def state(self) -> dict[str, Tensor]:
        """Private parameters and buffers under the module's own names."""
        parameters = self.parameters
        if self._called and transformed():  # nothing outside may be written to
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
        found: dict[str, None] = {}
        for name in names:
            key = name if name in self._values else self._key_of.get(name)
            if key is None:
                raise ValueError(f"{self.whose} ({type(self.net).__name__}): no parameter is called {name!r}")
            found[key] = None
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


@contextmanager
def _holding(net: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the net has these tensors for its parameters and buffers, tied ones in every place.

    As ``torch.func.functional_call`` does it, which takes longer than a pass of a small net.

    Args:
        net: no wrapper.
        state: by the first name of each parameter and buffer.
    """
    modules = dict(named_modules_of(net))
    stands_for: dict[int, Tensor] = {}
    places: list[tuple[Any, str, Tensor]] = []  # what was where
    try:
        for name, tensor in state.items():
            prefix, _, leaf = name.rpartition(".")
            module = modules[prefix]
            store: Any = module._parameters if leaf in module._parameters else module._buffers
            places.append((store, leaf, store[leaf]))
            stands_for[id(places[-1][2])] = tensor
            store[leaf] = tensor
        for module in modules.values():
            for store in (module._parameters, module._buffers):
                for leaf, tied in store.items():
                    if id(tied) in stands_for:
                        places.append((store, leaf, tied))
                        store[leaf] = stands_for[id(tied)]
        yield
    finally:
        for store, leaf, tensor in places:
            store[leaf] = tensor


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
        and not tensor.is_nested
        and not any(getattr(tensor, "names", ()))  # named tensors, which newer versions of torch do not have
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
