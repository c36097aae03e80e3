"""What a net is called with, the tensors in it, and where its rows are (legend: B rows of the batch).

Walked are tuples, named tuples, lists, mappings, dataclasses, packed sequences, and objects that behave like a batch:
those with ``to``, with ``__getitem__`` and ``__len__``, or with attributes that are tensors. Whatever is taken apart is
put together again as what it was.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

_PICTURE_CHANNELS = (1, 3, 4)


@dataclass(frozen=True)
class Inputs:
    """The positional and keyword arguments of a forward pass."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any) -> Inputs:
        """From one argument, a plain tuple of positional arguments or a mapping of keyword arguments.

        A named tuple and a packed sequence are one argument.

        >>> import torch
        >>> len(Inputs.of(torch.zeros(2)).args), Inputs.of({"x": 1}).kwargs
        (1, {'x': 1})
        """
        if isinstance(value, Inputs):
            return value
        if isinstance(value, Mapping):
            return cls((), value)
        return cls(value if isinstance(value, tuple) and not hasattr(value, "_fields") else (value,))

    def map(self, change: Callable[[Tensor], Any]) -> Inputs:
        """Every tensor replaced by ``change(tensor)``; containers keep their types."""
        return Inputs(_mapped(self.args, change), _mapped(self.kwargs, change))

    def tensors(self) -> list[Tensor]:
        """All tensors, in order."""
        if not self.kwargs and len(self.args) == 1 and isinstance(self.args[0], Tensor):
            return [self.args[0]]  # as most nets are called; the walk below takes longer than what is done with it
        return tensors_in((self.args, self.kwargs))

    def identity(self) -> InputIdentity:
        """Which tensors these are, to be compared with those of another pass."""
        return InputIdentity(self.tensors())

    def batch_sizes(self) -> list[int]:
        """What B may be, the likeliest first; empty where nothing has rows.

        B is the first dimension of the first tensor, the number of sequences where that is packed, and the length of a
        list of rows: of pictures ``(C, H, W)``, of mappings, or of tensors whose first dimensions differ. A list of
        equal tensors with three dimensions may hold pictures, or several inputs ``(B, N, C)`` of a batch.

        >>> import torch
        >>> Inputs.of((torch.zeros(5, 2),)).batch_sizes(), Inputs.of(([torch.zeros(3, 8, 8)] * 2,)).batch_sizes()
        ([5], [2, 3])
        """
        return next((sizes for value in (*self.args, *self.kwargs.values()) if (sizes := _batch_sizes(value))), [])

    @property
    def batch(self) -> int | None:
        """B, the first of :meth:`batch_sizes`; None where nothing has rows."""
        return next(iter(self.batch_sizes()), None)

    def rows(self, batch: int, count: int | None, said: set[str] | None = None) -> Inputs:
        """A private, detached copy of the first ``count`` of ``batch`` rows.

        Cut is what has its rows in front: tensors ``(B, ...)``, packed sequences, lists of B rows, and objects with a
        length of B that can be sliced; what has no dimension of size B is kept whole. Where an argument may have its
        rows elsewhere (the state ``(layers, B, H)`` of a recurrent net, B numbers in a list), all rows of all arguments
        are kept, which is always right, and a warning says so.

        Args:
            batch: B.
            count: rows to keep; None keeps all.
            said: warnings that were given before, and are not given again.
        """
        kept = self
        if count is not None and count < batch:
            leader = next((tensor for tensor in self.tensors() if tensor.dim()), None)
            try:
                cut = _Cut(batch, count, leader)
                kept = Inputs(
                    tuple(cut(value, f"argument {place}") for place, value in enumerate(self.args)),
                    {name: cut(value, f"argument {name!r}") for name, value in self.kwargs.items()},
                )
            except _UnclearRowsError as error:
                said = set() if said is None else said
                if str(error) not in said:
                    said.add(str(error))
                    warnings.warn(
                        f"{error}, so the first {count} rows of the batch cannot be cut out: signals with passes of "
                        f"their own are measured on all {batch} rows, which is right but slower. Give them in a form "
                        "with the rows in front, or use smaller batches, to make it faster",
                        UserWarning,
                        stacklevel=2,
                    )
        return kept.map(lambda tensor: tensor.detach().clone())

    def first_floating_index(self) -> int | None:
        """Index, among :meth:`tensors`, of the first floating-point one: what a derivative is taken with respect to."""
        return next((i for i, tensor in enumerate(self.tensors()) if tensor.is_floating_point()), None)

    def with_tensor(self, index: int, tensor: Tensor) -> Inputs:
        """The inputs with the tensor of this index, among :meth:`tensors`, replaced."""
        counter = iter(range(len(self.tensors())))
        return self.map(lambda old: tensor if next(counter) == index else old)


class InputIdentity:
    """The tensors that a pass was called with: the same memory, version, shape and strides are the same input.

    Nothing is kept from being freed; memory that is given to others after that is another's.

    Args:
        tensors: what the pass was called with.

    >>> import torch
    >>> x, mask = torch.rand(2, 3), torch.ones(2)
    >>> both, same = Inputs.of((x, mask)).identity(), Inputs.of(x).identity()
    >>> both.matches(same), both.matches(Inputs.of(x.clone()).identity())
    (True, False)
    >>> _ = x.zero_()
    >>> both.matches(Inputs.of(x).identity())
    False
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._storages: list[StorageWeakRef] = []  # so that no address of one is used twice
        self._keys = frozenset(filter(None, map(self._key, tensors)))

    def matches(self, other: InputIdentity) -> bool:
        """Whether one pass was called with all tensors of the other (it may have got more, such as labels)."""
        mine, theirs = self._keys, other._keys
        return bool(mine and theirs) and (mine <= theirs or theirs <= mine)

    def _key(self, tensor: Tensor) -> tuple[Any, ...] | None:
        """Where the values lie and how often they were changed; None for a tensor without memory of its own."""
        if tensor.numel() == 0:
            return None
        try:
            storage = StorageWeakRef(tensor.untyped_storage())
            place = storage.cdata, tensor.storage_offset(), tensor.stride()
        except (RuntimeError, NotImplementedError):  # sparse, nested, or a subclass around other tensors
            return (object(),)  # equal to no other
        self._storages.append(storage)
        # Tensors made under inference_mode count no versions.
        version = 0 if tensor.is_inference() else tensor._version
        return tensor.device, tensor.dtype, tuple(tensor.shape), *place, version


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in whatever is walked, in order.

    >>> import torch
    >>> [t.item() for t in tensors_in({"x": torch.tensor(1), "more": [torch.tensor(2), "text"]})]
    [1, 2]
    """
    return [tensor for _, tensor in named_tensors_in(value)]


def named_tensors_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """All tensors in whatever is walked, each with the fields, keys and places that lead to it.

    >>> import torch
    >>> [path for path, _ in named_tensors_in({"logits": torch.zeros(1), "hidden": (torch.zeros(1),)})]
    [('logits',), ('hidden', 0)]
    """
    if isinstance(value, Tensor):
        yield path, value
    else:
        yield from _named_tensors(value, path, frozenset())


def _named_tensors(
    value: Any, path: tuple[Any, ...], around: frozenset[int]
) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    if id(value) in around:  # an object that holds itself
        return
    for name, item in _items(value):
        if isinstance(item, Tensor):
            yield (*path, name), item
        else:
            yield from _named_tensors(item, (*path, name), around | {id(value)})


def _items(value: Any) -> list[tuple[Any, Any]]:
    """What a container holds, by field, key or place; nothing for all that is no container."""
    if isinstance(value, PackedSequence):  # its batch_sizes belong to its structure, and stay on the CPU
        return [(n, getattr(value, n)) for n in ("data", "sorted_indices", "unsorted_indices")]
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (tuple, list)):
        return list(zip(getattr(value, "_fields", range(len(value))), value, strict=True))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if hasattr(value, f.name)]
    return list(vars(value).items()) if _is_batch_object(value) else []


def _is_batch_object(value: Any) -> bool:
    if not hasattr(value, "__dict__") or isinstance(value, (type, nn.Module)):
        return False
    like_a_batch = hasattr(value, "to") or (hasattr(value, "__getitem__") and hasattr(value, "__len__"))
    return like_a_batch or any(isinstance(item, Tensor) for item in vars(value).values())


def _mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    return _walked(value, lambda item, _: change(item) if isinstance(item, Tensor) else _WALK, "", {})


_WALK = object()
"""What a visitor returns for a value that is to be taken apart."""


def _walked(value: Any, visit: Callable[[Any, str], Any], where: str, made: dict[int, Any]) -> Any:
    """The value with everything in it replaced by what ``visit(item, where it is)`` returns.

    Args:
        value: anything.
        visit: called from the outside inwards; what it does not return :data:`_WALK` for is not taken apart.
        where: the value in words.
        made: ``id`` of an object → its copy, for objects that hold themselves.
    """
    found = visit(value, where)
    if found is not _WALK:
        return found
    items = _items(value)
    names = [name for name, _ in items]
    if _is_object(value):
        if id(value) in made or not tensors_in(value):
            return made.get(id(value), value)  # an object without tensors is nobody's copy
        made[id(value)] = copied = copy.copy(value)
        for name, item in items:
            # Not setattr: a frozen dataclass, too.
            object.__setattr__(copied, name, _walked(item, visit, f"{name!r} of {where}", made))
        return copied
    return _rebuilt(value, names, [_walked(item, visit, f"{name!r} of {where}", made) for name, item in items])


def _is_object(value: Any) -> bool:
    return not isinstance(value, (Mapping, tuple, list)) and (
        dataclasses.is_dataclass(value) or _is_batch_object(value)
    )


def _rebuilt(value: Any, names: list[Any], new: list[Any]) -> Any:
    """A tuple, list or mapping of the same type that holds other items; whatever else it knows is kept."""
    if isinstance(value, PackedSequence):
        return PackedSequence(new[0], value.batch_sizes, *new[1:])
    if isinstance(value, tuple):
        if hasattr(value, "_make"):
            return value._make(new)
        return tuple(new) if type(value) is tuple else type(value)(new)
    if isinstance(value, list):
        copied: Any = copy.copy(value)
        copied[:] = new
        return copied
    if not isinstance(value, Mapping):
        return value
    if not isinstance(value, MutableMapping):
        return type(value)(dict(zip(names, new, strict=True)))  # type: ignore[call-arg]
    copied = copy.copy(value)
    for name, item in zip(names, new, strict=True):
        copied[name] = item  # not update(), which some refuse
    return copied


def _batch_sizes(value: Any) -> list[int]:
    if isinstance(value, PackedSequence):
        return [int(value.batch_sizes[0])]
    if isinstance(value, Tensor):
        return [value.shape[0]] if value.dim() else []
    if _is_list_of_rows(value):
        return [len(value), *({len(v) for v in value if isinstance(v, Tensor) and v.dim()} if _equal(value) else ())]
    return next((sizes for _, item in _items(value) if (sizes := _batch_sizes(item))), [])


def _is_list_of_rows(value: Any) -> bool:
    if not isinstance(value, (tuple, list)) or hasattr(value, "_fields") or not value:
        return False
    if all(isinstance(item, Mapping) for item in value):
        return bool(tensors_in(value))
    if not all(isinstance(item, Tensor) for item in value):
        return False
    picture = all(item.dim() == 3 and item.shape[0] in _PICTURE_CHANNELS for item in value)
    return picture or not _equal(value)


def _equal(value: Any) -> bool:
    """Whether all are tensors whose first dimensions are the same, so that these may be the rows."""
    return len({item.shape[:1] if isinstance(item, Tensor) else None for item in value}) == 1


class _UnclearRowsError(Exception):
    """An argument whose rows may be anywhere."""


class _Cut:
    """Takes the first rows of an argument.

    Args:
        batch: B.
        count: rows to keep.
        leader: the tensor whose first dimension is B by definition.
    """

    def __init__(self, batch: int, count: int, leader: Tensor | None) -> None:
        self.batch, self.count, self.leader = batch, count, leader

    def __call__(self, value: Any, where: str) -> Any:
        return _walked(value, self._visit, where, {})

    def _visit(self, value: Any, where: str) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value, where)
        if isinstance(value, PackedSequence):
            return self._packed(value, where)
        if isinstance(value, (tuple, list)):
            if not hasattr(value, "_fields") and len(value) == self.batch and self._holds_rows(value, where):
                return _rebuilt(value, [], list(value[: self.count]))
            return _WALK
        return self._slice(value) if _is_object(value) else _WALK

    def _tensor(self, tensor: Tensor, where: str) -> Tensor:
        found = [dim for dim, size in enumerate(tensor.shape) if size == self.batch]
        if not found:
            return tensor
        # A third dimension tells a mask (B, N) from a state (layers, B, H) with as many layers as rows.
        doubtful = tensor.dim() == 3 and found[:2] == [0, 1] and tensor is not self.leader
        if found[0] or doubtful:
            raise _UnclearRowsError(
                f"{where} has shape {tuple(tensor.shape)}, in which the {self.batch} rows are not clearly in front"
            )
        return tensor[: self.count]

    def _packed(self, packed: PackedSequence, where: str) -> PackedSequence:
        if int(packed.batch_sizes[0]) != self.batch:
            raise _UnclearRowsError(
                f"{where} packs {int(packed.batch_sizes[0])} sequences, and the batch has {self.batch} rows"
            )
        padded, lengths = pad_packed_sequence(packed, batch_first=True)
        lengths = lengths[: self.count]
        return pack_padded_sequence(
            padded[: self.count, : int(lengths.max())],
            lengths,
            batch_first=True,
            enforce_sorted=packed.sorted_indices is None,
        )

    def _holds_rows(self, value: Any, where: str) -> bool:
        """Whether a list of B things holds one a row: pictures, texts, mappings, tensors without rows of their own."""
        if all(isinstance(item, str) for item in value):
            return True
        if all(isinstance(item, (int, float)) for item in value):
            raise _UnclearRowsError(f"{where} holds {self.batch} numbers, which may be one a row")
        whole = all(isinstance(item, Tensor) and item.shape[:1] != (self.batch,) for item in value)
        return whole or _is_list_of_rows(value)

    def _slice(self, value: Any) -> Any:
        """The first rows by the object's own ``__getitem__``, where it has one for slices."""
        try:
            if len(value) == self.batch:
                part = value[: self.count]
                if type(part) is type(value) and len(part) == self.count:
                    return part
        except (TypeError, KeyError, IndexError, AttributeError, NotImplementedError):
            pass
        return _WALK
