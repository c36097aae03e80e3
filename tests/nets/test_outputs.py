"""The one rule that finds the logits in what a net returns."""

from __future__ import annotations

import dataclasses
import types
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lwkd.nets.outputs import class_dimension, find_logits

Z = torch.rand(4, 3)
HIDDEN = torch.rand(4, 7, 5)
LOSS = torch.tensor(1.0)


@dataclasses.dataclass
class Data:
    loss: Tensor | None
    logits: Tensor
    hidden: tuple[Tensor, ...] = ()


class Named(NamedTuple):
    logits: Tensor
    aux_logits: Tensor


class Plain:
    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)


class Opaque:
    __slots__ = ("z",)

    def __init__(self, z: Tensor) -> None:
        self.z = z


FOUND: dict[str, Any] = {
    "tensor": Z,
    "mapping": {"loss": LOSS, "hidden": HIDDEN, "logits": Z},
    "dataclass": Data(LOSS, Z, (HIDDEN, HIDDEN)),
    "named tuple": Named(Z, torch.rand(4, 3)),
    "model output": OrderedDict(loss=LOSS, logits=Z, hidden_states=(HIDDEN,)),
    "namespace": types.SimpleNamespace(logits=Z, hidden=HIDDEN),
    "object": Plain(logits=Z, hidden=HIDDEN),
    "tuple with a loss": (LOSS, Z),
    "tuple with ids": (torch.zeros(4, 3).long(), Z),
    "the outermost": {"aux": {"logits": torch.rand(4, 3)}, "logits": Z},
    "a level down": ({"logits": Z}, HIDDEN, HIDDEN),
    "one with classes": {"loss": LOSS, "losses": torch.rand(4), "scores": Z},
}


@pytest.mark.parametrize("name", FOUND)
def test_logits_are_found(name: str) -> None:
    assert find_logits(FOUND[name], "the student") is Z


REFUSED: dict[str, tuple[Any, str]] = {
    "two tensors": (
        (Z, HIDDEN),
        r"the student gives \[0\] \(4, 3\), \[1\] \(4, 7, 5\); none is called 'logits'.*output=",
    ),
    "a loss only": ({"loss": LOSS}, r"gives loss \(\); expected logits \(\.\.\., classes\).*dict returned.*output="),
    "a scalar": (LOSS, r"gives shape \(\); expected logits"),
    "one number a row": ({"logits": Z[:, 0], "hidden": HIDDEN}, r"gives shape \(4,\); expected logits"),
    "two of the name": ([{"logits": Z}, {"logits": Z}], r"\[0\]\['logits'\] \(4, 3\), \[1\]\['logits'\] \(4, 3\)"),
    "integers": (Z.long(), r"gives a torch.int64 tensor; expected logits"),
    "an object without a way in": (Opaque(Z), r"gives no tensor; expected logits .*Opaque returned"),
    "text": ("text", r"gives no tensor; expected logits"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_clear_is_refused(name: str) -> None:
    output, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        find_logits(output, "the student")


@pytest.mark.parametrize(
    ("output", "choice"),
    [
        ((Z, HIDDEN), 0),
        ((HIDDEN, Z), lambda out: out[1]),
        ({"out": Z, "logits": HIDDEN}, "out"),
        (OrderedDict(out=Z, aux=HIDDEN), 0),
        (Data(None, HIDDEN, (Z,)), lambda out: out.hidden[0]),
        (Plain(z=Z, logits=HIDDEN), "z"),
        (Opaque(Z), "z"),
        (Named(HIDDEN, Z), "aux_logits"),
    ],
    ids=["tuple", "tuple, function", "dict", "ordered dict", "data", "attributes", "opaque", "named tuple"],
)
def test_the_user_says_which(output: Any, choice: Any) -> None:
    assert find_logits(output, "the student", choice) is Z


def test_what_the_user_says_must_be_there_and_be_logits() -> None:
    for output, choice in (({"out": Z}, "logits"), ((Z,), 1), (Plain(out=Z), "logits"), (Z[0, 0], 1)):
        with pytest.raises(ValueError, match=r"the teacher gives .*in which output=.* is not found; it holds"):
            find_logits(output, "the teacher", choice)
    with pytest.raises(ValueError, match=r"the teacher gives shape \(\); expected logits"):
        find_logits({"loss": LOSS, "z": Z}, "the teacher", "loss")
    with pytest.raises(ValueError, match="the teacher gives str and no tensor; expected logits"):
        find_logits(Z, "the teacher", lambda out: "text")


def test_classes_are_at_dimension_one_and_with_three_dimensions_the_graph_says_where() -> None:
    for shape in ((4, 3), (4, 3, 8, 8), (4, 3, 2, 8, 8)):
        assert class_dimension(torch.zeros(shape), "a net") == 1
    assert [class_dimension(HIDDEN, "a net", channels) for channels in (1, 2)] == [1, 2]
    for channels in (None, 0):
        with pytest.raises(
            ValueError, match=r"the net gives logits of shape \(4, 7, 5\), whose classes .*flatten\(0, 1\)"
        ):
            class_dimension(HIDDEN, "the net", channels)
