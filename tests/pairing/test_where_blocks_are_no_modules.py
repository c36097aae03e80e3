"""Nets in which no module gives out what a block makes, a module gives out more, or the output is several tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lwkd
from lwkd.pairing import PairingError, pair


class PreNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x)).tanh()


class Add(nn.Module):
    def forward(self, x: Tensor, more: Tensor) -> Tensor:
        return x + more


class Sums(nn.Module):
    """Residual sums made by the net itself, of branches in lists of lists, or by a module without weights."""

    def __init__(self, width: int, depth: int, *, by_module: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(6, width)
        parts = [[PreNorm(width), PreNorm(width), *([Add()] if by_module else [])] for _ in range(depth)]
        self.layers = nn.ModuleList(nn.ModuleList(part) for part in parts)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for first, second, *add in self.layers:
            x = x + first(x)
            x = add[0](x, second(x)) if add else x + second(x)
        return self.head(self.norm(x))


def test_norms_stand_for_the_sums_that_they_read():
    student, teacher = Sums(8, 2, by_module=False), Sums(12, 4, by_module=False)
    found = pair(student, teacher, torch.rand(2, 9, 6))
    assert found.names == ("layers.1.0.norm", "norm")
    assert found.teacher_layers == ("layers.2.0.norm", "norm")
    assert [one.student_layout.before for one in found.pairs] == list(found.names)
    assert [name for name in found.pairs[0].parameters if "linear.weight" in name] == [
        "layers.0.0.linear.weight",
        "layers.0.1.linear.weight",
    ]
    assert found.tail == ("head.weight", "head.bias")


def test_modules_without_weights_that_give_out_the_sums():
    student, teacher = Sums(8, 2, by_module=True), Sums(12, 4, by_module=True)
    found = pair(student, teacher, torch.rand(2, 9, 6))
    assert found.names == ("layers.0.2", "layers.1.2")
    assert found.teacher_layers == ("layers.1.2", "layers.3.2")


def test_what_norms_read_is_what_is_measured():
    torch.manual_seed(0)
    student, teacher = Sums(8, 2, by_module=False), Sums(12, 4, by_module=False).eval()
    x = torch.rand(3, 9, 6)
    optimizer = lwkd.LayerwiseOptimizer(
        torch.optim.SGD(student.parameters(), lr=0.1), student, teacher, pair(student, teacher, x)
    )
    with torch.no_grad():
        teacher(x)
    student(x).sum().backward()

    def maps(net: Sums, blocks: int) -> Tensor:
        with torch.no_grad():
            sums = net.embed(x)
            for first, second in list(net.layers)[:blocks]:
                sums = sums + first(sums)
                sums = sums + second(sums)
        squares = sums.double().square().sum(2)
        return squares / squares.sum(1, keepdim=True)

    def entropy(p: Tensor) -> Tensor:
        return -torch.xlogy(p, p).sum(1)

    expected = []
    for mine, theirs in ((1, 2), (2, 4)):
        q, p = maps(student, mine), maps(teacher, theirs)
        expected.append(float((entropy((q + p) / 2) - entropy(q) / 2 - entropy(p) / 2).mean()))
    optimizer.step()
    assert list(optimizer.divergences.values()) == pytest.approx(expected, rel=1e-4)


def stage(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, 2, 1), nn.ReLU(), nn.Conv2d(after, after, 3, 1, 1), nn.ReLU())


class Stages(nn.Module):
    """Gives out all its stages, the first in front."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList([stage(3, width), stage(width, 2 * width), stage(2 * width, 4 * width)])

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for one in self.stages:
            x = one(x)
            found.append(x)
        return found


class WithStages(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder, self.head = Stages(width), nn.Linear(4 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x)[-1].mean((2, 3)))


def test_a_module_that_gives_out_a_list_does_not_stand_for_its_first_stage():
    found = pair(WithStages(4), WithStages(8), torch.rand(2, 3, 32, 32))
    assert found.names == ("encoder.stages.0", "encoder.stages.1", "encoder.stages.2")
    for index, one in enumerate(found.pairs):
        assert {name.split(".")[2] for name in one.parameters} == {str(index)}


class StageOutputs(nn.Module):
    """As a ControlNet: an output for every stage, the shallowest first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = Stages(width)
        self.outs = nn.ModuleList(nn.Conv2d(width * scale, 3, 1) for scale in (1, 2, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(out(one) for out, one in zip(self.outs, self.encoder(x), strict=True))


def test_the_deepest_of_several_outputs_is_the_end():
    found = pair(StageOutputs(4), StageOutputs(8), torch.rand(2, 3, 32, 32))
    assert found.names[:3] == ("encoder.stages.0", "encoder.stages.1", "encoder.stages.2")


class TwoTowers(nn.Module):
    """As CLIP: a feature of the picture, and one of the text."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()

        def tower() -> nn.Sequential:
            return nn.Sequential(
                *(nn.TransformerEncoderLayer(width, 2, 8, 0.0, batch_first=True) for _ in range(depth))
            )

        self.patches, self.words = nn.Conv2d(3, width, 4, 4), nn.Embedding(9, width)
        self.visual, self.text = tower(), tower()

    def forward(self, image: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.visual(self.patches(image).flatten(2).transpose(1, 2)).mean(1)
        return seen, self.text(self.words(ids)).mean(1)


def test_towers_that_end_in_outputs_of_their_own():
    example = torch.rand(2, 3, 16, 16), torch.randint(9, (2, 7))
    found = pair(TwoTowers(8, 2), TwoTowers(12, 4), example)
    assert found.names == ("visual.0", "visual.1", "text.0", "text.1")
    assert found.teacher_layers == ("visual.1", "visual.3", "text.1", "text.3")


class TwoStreams(nn.Module):
    """Text and picture side by side, each of which reads the other; the text comes first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.text, self.picture = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, text: Tensor, picture: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.norm(picture)
        return text + self.text(seen.mean(1, keepdim=True)), picture + self.picture(seen + text.mean(1, keepdim=True))


class OfTwoStreams(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.words, self.patches = nn.Linear(5, width), nn.Linear(6, width)
        self.blocks = nn.ModuleList(TwoStreams(width) for _ in range(depth))
        self.head = nn.Linear(width, 3)

    def forward(self, text: Tensor, picture: Tensor) -> Tensor:
        text, picture = self.words(text), self.patches(picture)
        for block in self.blocks:
            text, picture = block(text, picture)
        return self.head(picture.mean(1))


def test_a_block_of_two_streams_does_not_stand_for_the_first_of_them():
    student, teacher = OfTwoStreams(8, 2), OfTwoStreams(12, 4)
    example = torch.rand(2, 7, 5), torch.rand(2, 9, 6)
    with pytest.raises(
        PairingError, match=r"'blocks.0' gives several sequences, of shapes \(2, 7, 8\), \(2, 9, 8\), and"
    ):
        pair(student, teacher, example, layers={"blocks.0": "blocks.1"})
    found = pair(student, teacher, example, layers={"blocks.1.norm": "blocks.2.norm"})
    assert found.pairs[0].student_shape == (2, 9, 8)


class Detector(nn.Module):
    """Its head gives boxes when it is evaluated, and what a loss needs in training."""

    def __init__(self, width: int, *, rows: int = 0) -> None:
        super().__init__()
        self.stages = nn.Sequential(stage(3, width), stage(width, 2 * width))
        self.head = Head(2 * width, rows)

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        return self.head(self.stages(x))


class Head(nn.Module):
    def __init__(self, width: int, rows: int) -> None:
        super().__init__()
        self.boxes, self.rows = nn.Conv2d(width, 4, 1), rows

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        if self.training and len(x) < self.rows:
            raise ValueError("labels are missing")
        boxes = self.boxes(x)
        return {"boxes": boxes} if self.training else boxes.sigmoid()


def test_a_head_that_gives_something_else_in_training_is_left_out():
    student, teacher = Detector(4), Detector(8)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    student.train(), teacher.eval()
    found = pair(student, teacher, torch.rand(2, 3, 32, 32))
    assert found.names == found.teacher_layers == ("stages.0", "stages.1", "head.boxes")
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert student.head.training
    assert not teacher.head.training
    optimizer = lwkd.LayerwiseOptimizer(torch.optim.SGD(student.parameters(), lr=0.1), student, teacher, found)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        teacher(x)
    student(x)["boxes"].sum().backward()
    optimizer.step()
    assert optimizer.passes == {"measured": 1}


def test_a_net_that_does_not_run_in_training_is_paired_as_it_is():
    assert pair(Detector(4, rows=3), Detector(8, rows=3), torch.rand(2, 3, 32, 32)).names[-1] == "head"
