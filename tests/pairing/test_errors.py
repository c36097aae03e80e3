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
        found = self.both(self.relu(self.norm(self.stem(x))))
        return self.head(found["x"].mean((2, 3))) + 0 * self.index(found["extra"]).sum()


class Both(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": self.conv(x), "extra": x}


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


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ({}, "layers is empty"),
        ({"stm": "stem"}, "the student (Net) has no layer 'stm'; did you mean 'stem'?"),
        ({"stem": "both.cnv"}, "the teacher (Net) has no layer 'both.cnv'; did you mean 'both.conv'"),
        ({"xyz": "stem"}, "outermost layers are stem, norm"),
        ({"": "stem"}, "has no layer ''"),
        ({"idle": "stem"}, "the student's layer 'idle' was never executed"),
        ({"both": "stem"}, "'both' does not give a floating-point tensor but a dict. Its child 'both.conv' gives one"),
        ({"index": "stem"}, "torch.int64 tensor"),
        ({"head": "stem"}, "gives shape (2, 5), which is not a map"),
        ({"norm": "stem"}, "'norm' is overwritten in place by 'relu': name 'relu' instead"),
    ],
)
def test_layers_that_cannot_be_used(layers: dict[str, str], expected: str):
    assert expected in message(Net(), Net(), layers=layers)


def test_a_map_over_something_else_than_the_batch():
    turned = nn.Sequential(nn.Flatten(1, 2), nn.Flatten(0, 1), nn.Linear(9, 4), nn.Unflatten(0, (27, 2)))
    assert "over the batch of 2" in message(turned, Net(), layers={"3": "stem"})


class NormedTokens(nn.Module):
    """Tokens behind a layer norm that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 3, stride=3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(self.patches(x).flatten(2).mT, (8,))


def test_a_layer_behind_a_norm_that_is_no_module():
    net = lambda: nn.Sequential(NormedTokens(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))  # noqa: E731
    said = message(net(), net(), layers={"0": "0"})
    assert "the student's layer '0' ends in a layer norm" in said
    assert "make the norm an nn.LayerNorm" in said


def test_a_layer_named_twice():
    assert "named twice" in message(nn.DataParallel(Net()), Net(), layers={"stem": "stem", "module.stem": "relu"})


def test_a_forward_that_fails():
    text = message(Net(), Net(), torch.rand(2, 4, 9, 9))
    assert "the student (Net) failed on example_input of shape (2, 4, 9, 9): RuntimeError" in text
    with pytest.raises(PairingError, match=r"the teacher \(Sequential\) failed") as caught:
        pair(Net(), MLP, torch.rand(2, 3, 8, 8))
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


class Sequences(nn.Module):
    """Called with (N, B), or, where it turns its input, with (B, N)."""

    def __init__(self, *, turns: bool, pools: bool = True) -> None:
        super().__init__()
        self.turns, self.pools = turns, pools
        self.words, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 8) for _ in range(2)))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.blocks(self.words(ids.t() if self.turns else ids))
        return self.head(x.mean(0) if self.pools else x)


@pytest.mark.parametrize("pools", [True, False])
def test_a_net_that_is_called_with_sequences_first(pools: bool):
    net = Sequences(turns=False, pools=pools)
    text = message(net, net, torch.randint(20, (7, 3)))
    assert "layer 'blocks.0.self_attn' of the student (Sequences) has batch_first=False" in text
    assert "shape (7, 3, 8)" in text
    assert "takes (B, N) and transposes" in text


def test_as_many_rows_as_tokens_do_not_tell_which_come_first():
    net = Sequences(turns=True)
    assert "give one in which they differ" in message(net, net, torch.randint(20, (5, 5)))
    assert not pair(net, net, torch.randint(20, (5, 4))).pairs[0].student_layout.batch_first


def test_attention_over_the_rows_of_a_batch_is_left_to_the_user():
    class Mixing(Sequences):
        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.blocks(self.words(ids)).mean(1))  # batch_first was forgotten

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.GRU(5, 6), nn.GRU(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x)[0])[0][:, -1])

    for net, example in ((Mixing(turns=False), torch.randint(20, (7, 3))), (Recurrent(), torch.rand(7, 3, 5))):
        assert {p.student_layout.batch_first for p in pair(net, net, example)} == {True}
