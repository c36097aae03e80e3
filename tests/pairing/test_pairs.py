from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torchvision.models as tv
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from lwkd.nets.layout import Layout
from lwkd.pairing import Pairing, pair


def meta(make: Any, *args: Any, **kwargs: Any) -> nn.Module:
    """A net without values: tracing needs shapes only, so that full-size nets cost nothing."""
    with torch.device("meta"):
        return make(*args, **kwargs)


def resnet10() -> nn.Module:
    return meta(ResNet, BasicBlock, [1, 1, 1, 1])


def names(pairing: Pairing) -> list[tuple[str, str]]:
    return list(zip(pairing.student_layers, pairing.teacher_layers, strict=True))


PICTURE = torch.empty(2, 3, 224, 224, device="meta")
STAGES = [(f"layer{i}", f"layer{i}") for i in range(1, 5)]


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (resnet10, lambda: meta(tv.resnet18), STAGES),
        (lambda: meta(tv.resnet18), lambda: meta(tv.resnet50), STAGES),
        (
            lambda: meta(tv.mobilenet_v3_small),
            lambda: meta(tv.vgg16_bn),
            [
                ("features.1", "features.22"),
                ("features.3", "features.32"),
                ("features.8", "features.42"),
                ("features.12", "avgpool"),
            ],
        ),
        (
            resnet10,
            lambda: meta(tv.swin_t),
            [("layer1", "features.1"), ("layer2", "features.3"), ("layer3", "features.5"), ("layer4", "features.7")],
        ),
        (
            lambda: meta(tv.convnext_tiny),
            lambda: meta(tv.densenet121),
            [(f"features.{2 * i - 1}", f"features.denseblock{i}") for i in range(1, 5)],
        ),
        (
            lambda: meta(tv.googlenet, init_weights=False),
            lambda: meta(tv.resnet18),
            [("conv3", "layer1"), ("inception3b", "layer2"), ("inception4e", "layer3"), ("inception5b", "layer4")],
        ),
    ],
)
def test_nets_of_torchvision(student: Any, teacher: Any, expected: list[tuple[str, str]]):
    pairing = pair(student(), teacher(), PICTURE)
    assert names(pairing) == expected
    for p in pairing:
        assert p.student_layout.shape(p.student_shape)[2:] == p.teacher_layout.shape(p.teacher_shape)[2:]
        assert p.parameters


def test_swin_is_channels_last():
    pairing = pair(meta(tv.swin_t), meta(tv.swin_t), PICTURE)
    assert [p.student_shape for p in pairing] == [(2, 56, 56, 96), (2, 28, 28, 192), (2, 14, 14, 384), (2, 7, 7, 768)]
    assert {p.student_layout for p in pairing} == {Layout("channels_last")}


def test_vit_blocks_by_relative_depth():
    student = meta(tv.VisionTransformer, 224, 32, 4, 2, 64, 128)
    pairing = pair(student, meta(tv.vit_b_16), PICTURE)
    assert names(pairing) == [
        (f"encoder.layers.encoder_layer_{i}", f"encoder.layers.encoder_layer_{3 * i + 2}") for i in range(4)
    ]
    assert pairing.pairs[0].student_layout == Layout("tokens", 1, (7, 7))
    assert pairing.pairs[0].teacher_layout == Layout("tokens", 1, (14, 14))
    owners = pairing.owners()
    assert owners["class_token"] == owners["conv_proj.weight"] == owners["encoder.pos_embedding"] == 0
    assert owners["encoder.layers.encoder_layer_2.self_attention.out_proj.weight"] == 2
    assert set(pairing.tail) == {"encoder.ln.weight", "encoder.ln.bias", "heads.head.weight", "heads.head.bias"}


def plain(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, width in zip((3, *widths), widths, strict=False):
        layers += [
            nn.Conv2d(before, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 5))


def test_plain_sequential_nets():
    pairing = pair(plain(4, 8), plain(6, 12), torch.rand(2, 3, 16, 16))
    # The activation before each pool: the batch norm's output is overwritten, the pool has nothing to learn.
    assert names(pairing) == [("2", "2"), ("6", "6")]
    assert pairing.owners() == {f"{m}.{p}": m // 4 for m in (0, 1, 4, 5) for p in ("weight", "bias")}
    assert pairing.tail == ("10.weight", "10.bias")


def test_unequal_depths_pair_by_size():
    pairing = pair(plain(4, 8), plain(4, 8, 16, 32), torch.rand(2, 3, 32, 32))
    assert names(pairing) == [("2", "2"), ("6", "14")]
    pairing = pair(plain(4, 8, 16, 32), plain(4, 8), torch.rand(2, 3, 32, 32))
    # The last maps go together whatever their sizes: the teacher's last pool is all it has at 8×8.
    assert names(pairing) == [("2", "2"), ("6", "6"), ("14", "7")]


class Bert(nn.Module):
    """Token ids and a mask in; blocks that give tuples, as transformers' do."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
            self.output = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))

        def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor]:
            x = x + self.attention(x, x, x, key_padding_mask=mask)[0]
            return (self.output(x),)

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.word, self.place = nn.Embedding(11, width), nn.Embedding(9, width)
        self.blocks = nn.ModuleList(self.Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        x = self.word(input_ids) + self.place(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            (x,) = block(x, attention_mask == 0)
        return {"cache": None, "logits": self.head(x[:, 0])}


@pytest.mark.parametrize("mask", [torch.long, torch.float32])
def test_token_ids_as_keywords(mask: torch.dtype):
    example = {"input_ids": torch.ones(2, 9, dtype=torch.long), "attention_mask": torch.ones(2, 9, dtype=mask)}
    pairing = pair(Bert(4, 2), Bert(6, 4).requires_grad_(False), example)
    assert names(pairing) == [("blocks.0", "blocks.1"), ("blocks.1", "blocks.3")]
    assert [p.student_layout.before for p in pairing] == ["blocks.0.output.1", "blocks.1.output.1"]
    assert pairing.owners()["word.weight"] == 0
    assert pairing.owners()["blocks.1.attention.out_proj.bias"] == 1
    assert pairing.tail == ("head.weight", "head.bias")


def test_inputs_as_a_tuple():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = plain(4, 8)

        def forward(self, x: Tensor, scale: float) -> Tensor:
            return self.net(x * scale)

    assert names(pair(Two(), Two(), (torch.rand(2, 3, 16, 16), 2.0))) == [("net.2", "net.2"), ("net.6", "net.6")]


class Half(nn.Module):
    """Gives half of a split, and keeps the other half for later."""

    def forward(self, x: Tensor) -> Tensor:
        one, self.other = x.chunk(2, 1)
        return one


class Branches(nn.Module):
    """A split of which the paths use both halves, and a branch that jumps over a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.part = nn.Conv2d(3, 4, 1), Half()
        self.jumped, self.last = nn.Conv2d(4, 6, 1), nn.Conv2d(10, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.part(self.first(x)) * 2, self.part.other], 1)
        return self.last(torch.cat([x, self.jumped(x)], 1))


def test_only_what_every_path_runs_through():
    assert names(pair(Branches(), Branches(), torch.rand(2, 3, 8, 8))) == [("first", "first"), ("last", "last")]


def test_given_layers_in_the_students_order_and_off_the_spine():
    student, teacher = plain(4, 8), Branches()
    pairing = pair(student, teacher, torch.rand(2, 3, 8, 8), layers={"6": "last", "0": "jumped"})
    assert names(pairing) == [("0", "jumped"), ("6", "last")]
    assert pairing.owners()["1.weight"] == 1


def test_given_layers_nested_in_each_other():
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), nn.Conv2d(4, 2, 1))
    pairing = pair(net, net, torch.rand(1, 3, 9, 9), layers={"0": "0", "0.0": "0.1"})
    assert [(p.student, p.parameters) for p in pairing] == [
        ("0.0", ("0.0.weight", "0.0.bias")),
        ("0", ("0.1.weight", "0.1.bias")),
    ]


def test_an_auxiliary_head_that_eval_mode_skips_is_tail():
    pairing = pair(meta(tv.googlenet, init_weights=False), meta(tv.resnet18), PICTURE)
    assert {"aux1.fc1.weight", "aux2.conv.conv.weight", "fc.weight"} <= set(pairing.tail)


def test_pairing_is_a_value():
    pairing = pair(plain(4, 8), plain(6, 12), torch.rand(2, 3, 16, 16))
    assert pickle.loads(pickle.dumps(pairing)) == pairing
    assert len(pairing) == 2
    assert [p.student for p in pairing] == list(pairing.names) == ["2", "6"]
    pairing.check(plain(4, 8), plain(6, 12))


def test_the_table():
    pairing = pair(plain(4, 8), plain(6, 12), torch.rand(2, 3, 16, 16))
    assert str(pairing).splitlines() == [
        "student layer   shape    teacher layer  shape    parameters",
        "--------------  -------  -------------  -------  ----------------",
        "2               4x16x16  2              6x16x16  120 in 4 tensors",
        "6               8x8x8    6              12x8x8   312 in 4 tensors",
        "(tail, rate 1)                                   45 in 2 tensors",
        "90.6 % of 477 parameters follow a pair.",
    ]
    assert pairing.share == pytest.approx(432 / 477)


def test_the_table_names_layouts_and_the_single_pair():
    vit = tv.VisionTransformer(16, 8, 1, 1, 8, 8)
    table = str(pair(vit, vit, torch.rand(1, 3, 16, 16)))
    assert "5x8 (tokens 1 + 2x2, before its norm)" in table
    assert "(Local, Relative) keep its rate at 1" in table.splitlines()[-2]
    assert table.splitlines()[-1].endswith("parameters follow a pair.")
