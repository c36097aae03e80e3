"""Which parameters a derivative may be counted for: those whose every element is a free number of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def check_countable(parameters: Mapping[str, Tensor], names: Iterable[str], whose: str) -> None:
    """Check that traces and norms of these parameters mean something.

    Args:
        parameters: all of the net, tied ones once.
        names: those that are counted.
        whose: the net, for messages.

    Raises:
        ValueError: a parameter that is quantized or sparse, that repeats one number (``expand``), or that shares
            memory with another one without being the same object; it is named.
    """
    by_storage: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        if parameter.layout == torch.strided and not parameter.is_quantized:
            by_storage.setdefault(_storage(parameter), []).append(name)
    for name in names:
        parameter = parameters[name]
        found = None
        if parameter.is_quantized:
            found = f"is quantized ({parameter.dtype}), and has no derivative"
        elif parameter.layout != torch.strided:
            found = f"is sparse ({parameter.layout}), and only dense parameters are counted"
        elif torch._debug_has_internal_overlap(parameter) == 1:
            found = f"repeats numbers in memory (shape {tuple(parameter.shape)}, strides {parameter.stride()})"
        else:
            # Places of storage 0 are empty tensors and subclasses without memory of their own.
            beside = by_storage[_storage(parameter)] if _storage(parameter) else []
            other = next((o for o in beside if o != name and _overlap(parameter, parameters[o])), None)
            if other is not None:
                found = f"shares memory with {other!r} (tie them by assigning one and the same Parameter)"
        if found is not None:
            raise ValueError(
                f"{whose}: parameter {name!r} {found}, so a curvature or gradient norm of it would be counted wrong. "
                "Use the attention signal, or a net with plain parameters"
            )


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors on the same storage have a byte in common."""
    spans = [_span(tensor) for tensor in (one, other)]
    if spans[0][0] >= spans[1][1] or spans[1][0] >= spans[0][1]:
        return False
    if one.dtype != other.dtype:
        return True
    first, second = (_places(tensor) for tensor in (one, other))
    return bool(torch.isin(first, second).any())


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte, and the one behind the last."""
    if tensor.numel() == 0:
        return 0, 0
    begin = int(tensor.storage_offset())
    end = begin + sum(int(size - 1) * int(step) for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return begin * tensor.element_size(), end * tensor.element_size()


def _places(tensor: Tensor) -> Tensor:
    """Where in the storage each element lies."""
    places = torch.tensor(tensor.storage_offset(), dtype=torch.int64, device="cpu")
    for size, step in zip(tensor.shape, tensor.stride(), strict=True):
        places = places.unsqueeze(-1) + torch.arange(size, device="cpu") * step
    return places.flatten()
