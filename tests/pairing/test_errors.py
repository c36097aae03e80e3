"""Every way in which a pairing can fail, and what the message says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lwkd.pairing import PairingError, pair


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.both = Both(width)
        self.idle = nn.Conv2d(width, width, 1)
        self.index = ArgMax()
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x, extra = self.both(self.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3))) + 0 * self.index(extra).sum()


class Both(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x), x


class ArgMax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(1)


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).detach() + 1


PICTURE = torch.rand(2, 3, 9, 9)
MLP = nn.Sequential(nn.Flatten(), nn.Linear(243, 8), nn.ReLU(), nn.Linear(8, 5))
TOKENS = nn.Sequential(nn.Flatten(2), nn.Linear(81, 6), nn.GELU(), nn.Linear(6, 4))


def message(student: nn.Module, teacher: nn.Module, example: Any = PICTURE, **options: Any) -> str:
    with pytest.raises(PairingError) as caught:
        pair(student, teacher, example, **options)
    return str(caught.value)


def test_it_is_a_value_error():
    assert issubclass(PairingError, ValueError)


def test_nothing_to_pair_says_what_was_found():
    text = message(Net(), MLP)
    assert "nothing to pair" in text
    assert "in the student: relu 4x9x9 (channels first), both.conv 4x4x4" in text
    assert "in the teacher: no map of more than one position" in text
    assert "1 (2, 8)" in text
    assert 'layers={"student layer": "teacher layer"}' in text


def test_no_layers_given():
    assert "layers is empty" in message(Net(), Net(), layers={})


def test_unknown_names_with_near_matches():
    assert "the student (Net) has no layer 'stm'; did you mean 'stem'?" in message(Net(), Net(), layers={"stm": "stem"})
    assert "the teacher (Net) has no layer 'both.cnv'; did you mean 'both.conv'" in message(
        Net(), Net(), layers={"stem": "both.cnv"}
    )
    assert "outermost layers are stem, norm" in message(Net(), Net(), layers={"xyz": "stem"})
    assert "has no layer ''" in message(Net(), Net(), layers={"": "stem"})


def test_a_layer_never_executed():
    assert "the student's layer 'idle' was never executed" in message(Net(), Net(), layers={"idle": "stem"})


def test_an_output_that_is_not_a_tensor():
    text = message(Net(), Net(), layers={"both": "stem"})
    assert "'both' does not give a floating-point tensor but a tuple. Its child 'both.conv' gives one" in text
    assert "torch.int64 tensor" in message(Net(), Net(), layers={"index": "stem"})


def test_an_output_that_is_not_a_map():
    assert "gives shape (2, 5), which is not a map" in message(Net(), Net(), layers={"head": "stem"})
    turned = nn.Sequential(nn.Flatten(1, 2), nn.Flatten(0, 1), nn.Linear(9, 4), nn.Unflatten(0, (27, 2)))
    assert "over the batch of 2" in message(turned, Net(), layers={"3": "stem"})


def test_an_output_overwritten_in_place():
    assert "'norm' is overwritten in place by 'relu': name 'relu' instead" in message(
        Net(), Net(), layers={"norm": "stem"}
    )


def test_a_layer_named_twice():
    assert "named twice" in message(nn.DataParallel(Net()), Net(), layers={"stem": "stem", "module.stem": "relu"})


def test_a_forward_that_fails():
    text = message(Net(), Net(), torch.rand(2, 4, 9, 9))
    assert "the student (Net) failed on example_input of shape (2, 4, 9, 9): RuntimeError" in text
    with pytest.raises(PairingError) as caught:
        pair(Net(), MLP, torch.rand(2, 3, 8, 8))
    assert "the teacher (Sequential) failed" in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_no_differentiable_path():
    text = message(Net(), Detached())
    assert "no differentiable path leads from the teacher's input" in text
    assert "layers=" in text
    assert len(pair(Net(), Detached(), PICTURE, layers={"stem": "conv"})) == 1


def test_maps_of_unequal_rank():
    text = message(Net(), TOKENS)
    assert "nothing to pair; their maps have different numbers of dimensions" in text
    assert "(tokens N)" in text
    text = message(Net(), TOKENS, layers={"stem": "1"})
    assert "'stem' and '1' cannot be compared: the student's map is 4x9x9 (channels first)" in text
    assert "the teacher's 6x3 (tokens N)" in text


def test_a_pairing_for_another_model():
    pairing = pair(Net(), Net(8), PICTURE)
    pairing.check(Net(2), Net(3))  # widths do not matter, names do
    with pytest.raises(PairingError, match=r"another model: the teacher \(Sequential\) has no layer 'relu'"):
        pairing.check(Net(), MLP)
    with pytest.raises(PairingError, match=r"another model: the student \(Sequential\) has no layer"):
        pairing.check(MLP, Net())
    fewer, more = Net(), Net()
    fewer.idle = nn.Identity()
    more.extra = nn.Linear(1, 1, bias=False)
    with pytest.raises(PairingError, match=r"has no parameter 'idle\.bias'"):
        pairing.check(fewer, Net())
    with pytest.raises(PairingError, match=r"has the unpaired parameter 'extra\.weight'"):
        pairing.check(more, Net())
