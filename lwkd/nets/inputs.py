"""What a net is called with, and the tensors in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


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
