"""What nets are called with: containers keep their types, and rows are cut where they are."""

from __future__ import annotations

import copy
import dataclasses
import types
import warnings
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lwkd.nets.inputs import Inputs, named_tensors_in, tensors_in


class Named(NamedTuple):
    x: Tensor
    more: Any


@dataclasses.dataclass(frozen=True)
class Data:
    x: Tensor
    name: str = "text"


@dataclasses.dataclass(slots=True)
class Slots:
    x: Tensor
    ids: list[Tensor]


class Encoding(UserDict):
    """As BatchEncoding: a mapping with more beside its data."""

    def __init__(self, data: dict[str, Any], encodings: str) -> None:
        super().__init__(data)
        self.encodings = encodings


class ModelOutput(OrderedDict):
    """As that of transformers: fields are keys, and ``update`` is refused."""

    def __init__(self, **fields: Tensor) -> None:
        super().__init__(fields)
        for name, value in fields.items():
            super().__setattr__(name, value)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def update(self, *_: Any, **__: Any) -> None:
        raise TypeError("refused")

    def __reduce__(self) -> Any:
        return copy.copyreg.__newobj__, (dict,), None, None, iter(self.items())  # type: ignore[attr-defined]

    def __copy__(self) -> ModelOutput:
        return ModelOutput(**self)


class Pictures:
    """As DETR's NestedTensor: tensors as attributes, and ``to``."""

    def __init__(self, tensors: Tensor, mask: Tensor) -> None:
        self.tensors, self.mask, self.itself = tensors, mask, self

    def to(self, device: Any) -> Pictures:
        return Pictures(self.tensors.to(device), self.mask.to(device))


class Ragged:
    """Its rows are where only it knows."""

    def __init__(self, values: Tensor, ends: list[int]) -> None:
        self.values, self.ends = values, ends

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, rows: slice) -> Ragged:
        ends = self.ends[rows]
        return Ragged(self.values[: ends[-1]], ends)


def x() -> Tensor:
    return torch.arange(12.0).view(4, 3)


CONTAINERS: dict[str, Callable[[], Any]] = {
    "tuple": lambda: (x(), "text"),
    "list": lambda: [x(), None],
    "dict": lambda: {"x": x(), "flag": True},
    "ordered dict": lambda: OrderedDict(x=x()),
    "default dict": lambda: defaultdict(list, x=x()),
    "frozen mapping": lambda: types.MappingProxyType({"x": x()}),
    "encoding": lambda: Encoding({"x": x()}, "kept"),
    "model output": lambda: ModelOutput(logits=x(), hidden=x()),
    "named tuple": lambda: Named(x(), [x()]),
    "torch's return type": lambda: torch.max(x(), 1),
    "dataclass": lambda: Data(x()),
    "dataclass with slots": lambda: Slots(x(), [x()]),
    "namespace": lambda: types.SimpleNamespace(x=x(), name="text"),
    "user class": lambda: Pictures(x(), x() > 3),
    "nested": lambda: {"a": [Named(Data(x()), (x(),))]},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_keep_their_types_and_all_else_they_know(name: str) -> None:
    value = CONTAINERS[name]()
    mapped = Inputs((value,)).map(lambda t: t.double() + 1).args[0]
    assert type(mapped) is type(value)
    before, after = tensors_in(value), tensors_in(mapped)
    assert len(before) == len(after) > 0
    assert [p for p, _ in named_tensors_in(value)] == [p for p, _ in named_tensors_in(mapped)]
    for old, new in zip(before, after, strict=True):
        assert new.dtype == torch.float64
        assert torch.equal(old.double() + 1, new)
        assert not torch.equal(old.double(), new), "the user's own is not touched"
    for attribute in ("name", "encodings", "default_factory"):
        assert getattr(mapped, attribute, None) == getattr(value, attribute, None)


def test_a_packed_sequence_and_a_named_tuple_are_one_argument() -> None:
    packed = pack_padded_sequence(torch.rand(2, 3, 1), torch.tensor([3, 1]), batch_first=True)
    assert Inputs.of(packed).args == (packed,)
    assert len(Inputs.of(Named(x(), None)).args) == 1
    assert len(Inputs.of((x(), None)).args) == 2
    assert list(Inputs.of(Encoding({"ids": x()}, "")).kwargs) == ["ids"]


def test_an_object_without_tensors_is_handed_on_as_it_is() -> None:
    class Tokenizer:
        def __init__(self) -> None:
            self.vocabulary = {"a": 1}

        def to(self, _: Any) -> None: ...

    tokenizer = Tokenizer()
    assert Inputs((tokenizer,)).map(torch.clone).args[0] is tokenizer


@pytest.mark.parametrize(("in_order", "count"), [(True, 2), (False, 3), (False, 1)])
def test_a_packed_sequence_is_cut_by_sequences(in_order: bool, count: int) -> None:
    lengths = torch.tensor([7, 5, 4, 2] if in_order else [2, 7, 4, 5])
    padded = torch.rand(4, 7, 5, requires_grad=True)
    packed = pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=in_order)
    inputs = Inputs.of((packed,))
    assert inputs.batch == 4
    part = inputs.rows(4, count).args[0]
    assert isinstance(part, PackedSequence)
    found, kept = pad_packed_sequence(part, batch_first=True)
    assert kept.tolist() == lengths[:count].tolist()
    assert torch.equal(found, pad_packed_sequence(packed, batch_first=True)[0][:count, : int(kept.max())])
    assert not part.data.requires_grad
    whole = inputs.rows(4, None).args[0]
    assert torch.equal(whole.data, packed.data)
    assert whole.data.data_ptr() != packed.data.data_ptr()


CUT: dict[str, tuple[tuple[Any, ...], int]] = {
    "tensors with rows in front": ((torch.zeros(8, 3), torch.zeros(8)), 2),
    "a square batch": ((torch.zeros(8, 8, 8), torch.zeros(8, 8)), 2),
    "pictures": (([torch.zeros(3, 4, 5)] * 8,), 8),
    "grey pictures": (([torch.zeros(1, 4, 5)] * 8,), 8),
    "a tuple of pictures": ((tuple([torch.zeros(3, 4, 4)] * 8),), 8),
    "sequences of all lengths": (([torch.zeros(n, 3) for n in range(1, 9)],), 8),
    "pictures and their targets": (
        ([torch.zeros(3, 4, 5)] * 8, [{"boxes": torch.zeros(n, 4), "labels": torch.zeros(n)} for n in range(8)]),
        24,
    ),
    "pictures as mappings": (([{"image": torch.zeros(3, 4, 4), "height": 4} for _ in range(8)],), 8),
    "two inputs in a list": (([torch.zeros(8, 5, 2), torch.zeros(8, 5, 2)],), 2),
    "masks, one a row": ((torch.zeros(8, 3), [torch.zeros(2, 2)] * 8), 9),
    "texts": ((torch.zeros(8, 3), ["text"] * 8), 1),
    "an object of its own": ((torch.zeros(8, 3), Ragged(torch.zeros(24), list(range(3, 27, 3)))), 2),
    "an object with tensors": ((Pictures(torch.zeros(8, 3, 4, 4), torch.zeros(8, 4, 4)),), 2),
    "what has no rows": ((torch.zeros(8, 3), torch.zeros(10, 5), torch.tensor(1.0), None, [1, 2]), 3),
}


@pytest.mark.parametrize("name", CUT)
def test_what_is_cut(name: str) -> None:
    args, tensors = CUT[name]
    inputs = Inputs.of(args)
    assert inputs.batch == 8
    assert len(inputs.tensors()) == tensors
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        part = inputs.rows(8, 5)
    assert part.batch == 5
    assert type(part.args[0]) is type(args[0])
    for value in part.args[:2]:
        if isinstance(value, Tensor):
            assert value.shape[0] in (5, 10)
        elif isinstance(value, Ragged):
            assert (len(value), value.values.shape) == (5, (15,))
        elif isinstance(value, Pictures):
            assert value.tensors.shape[0] == value.mask.shape[0] == 5
        elif name != "two inputs in a list":
            assert len(value) == 5
        else:
            assert [t.shape[0] for t in value] == [5, 5]
    assert inputs.rows(8, 8).batch == inputs.rows(8, 99).batch == inputs.rows(8, None).batch == 8


UNCLEAR: dict[str, Any] = {
    "the state of a recurrent net": torch.zeros(2, 8, 6),
    "with as many layers as rows": torch.zeros(8, 8, 6),
    "two states": (torch.zeros(1, 8, 6), torch.zeros(1, 8, 6)),
    "in a mapping": {"state": torch.zeros(2, 8, 6)},
    "lengths as numbers": [3] * 8,
    "a sequence first mask": torch.zeros(5, 8),
    "other sequences": pack_padded_sequence(torch.rand(3, 4, 2), torch.tensor([4, 3, 2]), batch_first=True),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_where_rows_may_be_elsewhere_all_of_all_arguments_are_kept_and_that_is_said_once(name: str) -> None:
    inputs, said = Inputs((torch.rand(8, 3), UNCLEAR[name])), set[str]()
    with pytest.warns(UserWarning, match="argument 1.*measured on all 8 rows, which is right but slower"):
        kept = inputs.rows(8, 3, said)
    assert [t.shape for t in kept.tensors()] == [t.shape for t in inputs.tensors()]
    assert torch.equal(kept.args[0], inputs.args[0])
    assert kept.args[0].data_ptr() != inputs.args[0].data_ptr(), "a private copy"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inputs.rows(8, 3, said)
        inputs.rows(8, 8)
        inputs.rows(8, None)


def test_what_the_number_of_rows_may_be() -> None:
    assert Inputs.of(()).batch is None
    assert Inputs.of({"flag": True, "scale": torch.tensor(2.0)}).batch is None
    assert Inputs.of((torch.tensor(2.0), torch.zeros(5, 1))).batch == 5
    assert Inputs.of(([torch.zeros(3, 8, 8)] * 2,)).batch_sizes() == [2, 3]
    assert Inputs.of(([torch.zeros(6, 8, 8)] * 2,)).batch_sizes() == [6]
    assert Inputs.of(([{"ids": torch.zeros(3)}, {"ids": torch.zeros(5)}],)).batch_sizes()[0] == 2
    assert Inputs.of((Ragged(torch.zeros(6), [2, 4, 6]),)).batch == 6, "without a tensor of rows, its first tensor's"
    assert Inputs.of({"more": {"ids": torch.zeros(7).long()}}).batch == 7
