"""What a net is called with, and the tensors in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """The positional and keyword arguments of a forward pass."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any) -> Inputs:
        """From a tensor, a tuple of positional arguments or a dict of keyword arguments.

        >>> import torch
        >>> len(Inputs.of(torch.zeros(2)).args), Inputs.of({"x": 1}).kwargs
        (1, {'x': 1})
        """
        if isinstance(value, Inputs):
            return value
        if isinstance(value, Mapping):
            return cls((), value)
        return cls(value if isinstance(value, tuple) else (value,))

    def map(self, change: Callable[[Tensor], Any]) -> Inputs:
        """Every tensor replaced by ``change(tensor)``, in nested tuples, lists and mappings too."""
        return Inputs(_mapped(self.args, change), _mapped(self.kwargs, change))

    def tensors(self) -> list[Tensor]:
        """All tensors, in order."""
        return tensors_in((self.args, self.kwargs))

    def identity(self) -> InputIdentity:
        """Which tensors these are, to be compared with those of another pass."""
        return InputIdentity(tuple(tensor.detach() for tensor in self.tensors()))

    def rows(self, batch: int, count: int | None) -> Inputs:
        """A private, detached copy of the first ``count`` rows of every tensor that has ``batch`` of them."""

        def first(tensor: Tensor) -> Tensor:
            whole = count is None or tensor.dim() == 0 or tensor.shape[0] != batch
            return (tensor if whole else tensor[:count]).detach().clone()

        return self.map(first)

    def first_floating_index(self) -> int | None:
        """Index, among :meth:`tensors`, of the first floating-point one: what a derivative is taken with respect to."""
        return next((i for i, tensor in enumerate(self.tensors()) if tensor.is_floating_point()), None)

    def with_tensor(self, index: int, tensor: Tensor) -> Inputs:
        """The inputs with the tensor of this index, among :meth:`tensors`, replaced."""
        counter = iter(range(len(self.tensors())))
        return self.map(lambda old: tensor if next(counter) == index else old)


class InputIdentity:
    """The tensors that a pass was called with: the same memory, version, shape and strides are the same input.

    The tensors are held, so that their memory is not given to others meanwhile, and their graphs are not.

    Args:
        tensors: detached.

    >>> import torch
    >>> x, mask = torch.rand(2, 3), torch.ones(2)
    >>> both, same = Inputs.of((x, mask)).identity(), Inputs.of(x).identity()
    >>> both.matches(same), both.matches(Inputs.of(x.clone()).identity())
    (True, False)
    >>> _ = x.zero_()
    >>> both.matches(Inputs.of(x).identity())
    False
    """

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self._tensors = tensors
        self._keys = frozenset(key for tensor in tensors if (key := _memory_key(tensor)) is not None)

    def matches(self, other: InputIdentity) -> bool:
        """Whether one pass was called with all tensors of the other (it may have got more, such as labels)."""
        fewer, more = sorted((self._keys, other._keys), key=len)
        return bool(fewer) and fewer <= more


def _memory_key(tensor: Tensor) -> tuple[Any, ...] | None:
    """Where the values lie and how often they were changed; None for a tensor without memory of its own."""
    if tensor.numel() == 0:
        return None
    try:
        place = tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.stride()
    except (RuntimeError, NotImplementedError):  # sparse, nested, or a subclass around other tensors
        return ("object", id(tensor))
    # Tensors made under inference_mode count no versions.
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.device, tensor.dtype, tuple(tensor.shape), *place, version


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and mappings, in order.

    >>> import torch
    >>> [t.item() for t in tensors_in({"x": torch.tensor(1), "more": [torch.tensor(2), "text"]})]
    [1, 2]
    """
    found: list[Tensor] = []
    _mapped(value, found.append)
    return found


def _mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_mapped(item, change) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return value
