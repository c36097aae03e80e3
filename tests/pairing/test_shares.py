"""How much of a student follows a pair, for pairs of well-known nets that have little in common.

``share`` is a lower bound: what is left is the classifier, which only ``head=True`` gives a rate of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torchvision.models as tv
from torch import Tensor, nn

from lwkd.pairing import Pairing, pair

Make = Callable[[], nn.Module]
Names = list[tuple[str, str]]


def vision(name: str) -> Make:
    return lambda: getattr(tv, name)()


def segmenting(name: str) -> Make:
    return lambda: getattr(tv.segmentation, name)(weights_backbone=None)


def timm(name: str, **options: Any) -> Make:
    return lambda: pytest.importorskip("timm").create_model(name, pretrained=False, **options)


class Twice(nn.Sequential):
    def __init__(self, before: int, after: int) -> None:
        def once(channels: int) -> list[nn.Module]:
            return [nn.Conv2d(channels, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]

        super().__init__(*once(before), *once(after))


class UNet(nn.Module):
    """Encoder and decoder with a long skip at every size; ``join`` says how the two meet."""

    def __init__(self, *widths: int, join: str = "cat") -> None:
        super().__init__()
        self.join, steps = join, list(pairwise(widths))
        self.first = Twice(3, widths[0])
        self.down = nn.ModuleList(nn.Sequential(nn.MaxPool2d(2), Twice(a, b)) for a, b in steps)
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in reversed(steps))
        gates = reversed(steps) if join == "attention" else ()
        self.gate = nn.ModuleList(nn.Conv2d(a, 1, 1) for a, _ in gates)
        self.back = nn.ModuleList(Twice(a if join == "add" else 2 * a, a) for a, _ in reversed(steps))
        self.last = nn.Conv2d(widths[0], 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = [self.first(x)]
        for down in self.down:
            kept.append(down(kept[-1]))
        x = kept.pop()
        for i, (up, back) in enumerate(zip(self.up, self.back, strict=True)):
            x, skip = up(x), kept.pop()
            if self.join == "attention":  # the skip is weighted by what comes up
                skip = skip * self.gate[i](torch.relu(x + skip)).sigmoid()
            x = back(x + skip if self.join == "add" else torch.cat([skip, x], 1))
        return self.last(x)


def stages(*student: str, teacher: str, begin: int = 1) -> Names:
    return [(name, teacher.format(i)) for i, name in enumerate(student, begin)]


RESNET = [f"layer{i}" for i in range(1, 5)]
TABLE: dict[str, tuple[Make, Make, int, float, Names]] = {
    "resnet50 to mobilenet_v3_small at 32": (
        vision("mobilenet_v3_small"),
        vision("resnet50"),
        32,
        0.36,
        stages("features.1", "features.3", "features.8", teacher="layer{}"),
    ),
    "resnet50 to mobilenet_v3_small": (
        vision("mobilenet_v3_small"),
        vision("resnet50"),
        224,
        0.36,
        stages("features.1", "features.3", "features.8", "features.12", teacher="layer{}"),
    ),
    "resnet50 to efficientnet_b0 at 32": (
        vision("efficientnet_b0"),
        vision("resnet50"),
        32,
        0.75,
        [("features.1", "relu"), *stages("features.2", "features.3", "features.5", teacher="layer{}")],
    ),
    "resnet50 to efficientnet_b0": (
        timm("efficientnet_b0"),
        timm("resnet50"),
        64,
        0.75,
        [("blocks.0.0.bn2", "act1"), *stages("blocks.1", "blocks.2", "blocks.4", "bn2", teacher="layer{}")],
    ),
    "vit_b_16 to resnet18": (
        vision("resnet18"),
        vision("vit_b_16"),
        224,
        0.95,
        [(f"layer{i}", f"encoder.layers.encoder_layer_{3 * i - 1}") for i in range(1, 5)],
    ),
    "resnet50 to vit_tiny": (
        timm("vit_tiny_patch16_224"),
        vision("resnet50"),
        224,
        0.96,
        [(f"blocks.{3 * i - 1}", f"layer{i}") for i in range(1, 5)],
    ),
    "swin_t to resnet18": (
        vision("resnet18"),
        vision("swin_t"),
        224,
        0.95,
        [(f"layer{i}", f"features.{2 * i - 1}") for i in range(1, 5)],
    ),
    "swin_t to vit_tiny": (
        timm("vit_tiny_patch16_224"),
        timm("swin_tiny_patch4_window7_224"),
        224,
        0.96,
        [(f"blocks.{3 * i + 2}", f"layers.{i}") for i in range(4)],
    ),
    "convnext_tiny to mobilenet_v3_large": (
        vision("mobilenet_v3_large"),
        vision("convnext_tiny"),
        64,
        0.54,
        [(f"features.{n}", f"features.{2 * i + 1}") for i, n in enumerate((3, 6, 12, 16))],
    ),
    "convnext_tiny to mobilenet_v3 of timm": (
        timm("mobilenetv3_large_100"),
        timm("convnext_tiny"),
        64,
        0.54,
        [("blocks.1", "stages.0"), ("blocks.2", "stages.1"), ("blocks.4", "stages.2"), ("blocks.6", "stages.3")],
    ),
    "deit_tiny of 12 to 6 layers": (
        timm("deit_tiny_patch16_224", depth=6),
        timm("deit_tiny_patch16_224"),
        224,
        0.93,
        [(f"blocks.{i}", f"blocks.{2 * i + 1}") for i in range(6)],
    ),
    "mixer of 16 to 32 pixels a patch": (
        timm("mixer_s32_224"),
        timm("mixer_b16_224"),
        224,
        0.97,
        [(f"blocks.{i}", f"blocks.{(3 * i + 4) // 2 - 1}") for i in range(8)],
    ),
    "mixer to resnet18": (
        vision("resnet18"),
        timm("mixer_b16_224"),
        224,
        0.95,
        [(f"layer{i}", f"blocks.{3 * i - 1}") for i in range(1, 5)],
    ),
    "regnet to shufflenet": (
        vision("shufflenet_v2_x1_0"),
        timm("regnety_004"),
        64,
        0.54,
        stages("stage2", "stage3", "conv5", teacher="s{}", begin=2),
    ),
    "unet to unet": (
        lambda: UNet(4, 8, 16),
        lambda: UNet(8, 16, 32),
        32,
        1.0,
        [(n, n) for n in ("first", "down.0.1", "down.1.1", "back.0", "back.1", "last")],
    ),
    "deeplab to lraspp": (
        segmenting("lraspp_mobilenet_v3_large"),
        segmenting("deeplabv3_resnet50"),
        128,
        1.0,
        [],
    ),
}


def paired(case: str) -> tuple[Pairing, Names]:
    student, teacher, size, _, names = TABLE[case]
    with torch.device("meta"):  # tracing needs shapes only
        nets = student(), teacher()
    pairing = pair(*nets, torch.empty(2, 3, size, size, device="meta"))
    return pairing, names


@pytest.mark.parametrize("case", TABLE)
def test_the_share_that_follows_a_pair(case: str):
    pairing, names = paired(case)
    assert pairing.share >= TABLE[case][3]
    assert len(pairing) > 1
    if names:
        assert list(zip(pairing.student_layers, pairing.teacher_layers, strict=True)) == names
    assert f"{100 * pairing.share:.1f} % of" in str(pairing).splitlines()[-1]


def test_stages_of_one_position_follow_the_last_pair_unless_the_logits_are_paired():
    with torch.device("meta"):
        nets = tv.mobilenet_v3_small(), tv.resnet50()
    picture = torch.empty(2, 3, 32, 32, device="meta")
    plain, head = pair(*nets, picture), pair(*nets, picture, head=True)
    assert {"features.9.block.0.0.weight", "features.12.0.weight"} <= set(plain.pairs[-1].parameters)
    assert set(plain.tail) == {f"classifier.{i}.{p}" for i in (0, 3) for p in ("weight", "bias")}
    assert "layer4.2.conv3.weight" in plain.pairs[-1].teacher_parameters
    assert head.share == 1
    assert {"features.12.0.weight", "classifier.3.weight"} <= set(head.pairs[-1].parameters)
    assert head.pairs[2].student == "features.8"
    # Layers that the user names own what runs before them, and nothing else.
    given = pair(*nets, picture, layers={"features.8": "layer3"})
    assert "features.12.0.weight" in given.tail


@pytest.mark.parametrize("join", ["cat", "add", "attention"])
def test_encoder_and_decoder_of_a_unet(join: str):
    pairing = pair(UNet(4, 8, 16, 32, join=join), UNet(8, 16, 32, 64, join=join), torch.rand(1, 3, 32, 32))
    encoder, decoder = ["first", "down.0.1", "down.1.1", "down.2.1"], ["back.0", "back.1", "back.2", "last"]
    assert list(pairing.student_layers) == encoder + decoder
    assert pairing.student_layers == pairing.teacher_layers
    assert pairing.owners()["down.1.1.0.weight"] == 2
    assert pairing.owners()["up.1.weight"] == 5
    deeper = pair(UNet(4, 8, 16, join=join), UNet(8, 16, 32, 64, join=join), torch.rand(1, 3, 32, 32))
    assert deeper.student_layers[-1] == deeper.teacher_layers[-1] == "last"
    assert len(deeper) == 6


class Gate(nn.Module):
    """Squeeze and excite, whose gate is expanded to the size of the map before it is multiplied in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, 4), nn.Linear(4, width)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.two(self.one(x.mean((2, 3))).relu()).sigmoid()
        return x * gate[:, :, None, None].expand_as(x)


class Pyramid(nn.Module):
    """Pooled branches that are enlarged again, beside the map itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(width, 4, 1) for _ in range(2))
        self.last = nn.Conv2d(width + 8, width + 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        pooled = [nn.functional.adaptive_avg_pool2d(x, n) for n in (1, 2)]
        branches = [branch(y) for branch, y in zip(self.branches, pooled, strict=True)]
        return self.last(torch.cat([x, *(nn.functional.interpolate(y, size) for y in branches)], 1))


@pytest.mark.parametrize("part", [Gate, Pyramid])
def test_what_is_no_long_skip(part: type[nn.Module]):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), part(8), nn.Conv2d((part is Pyramid and 9) or 8, 6, 2, 2))
    names = pair(net, net, torch.rand(1, 3, 18, 18)).student_layers
    assert set(names) <= {"1", "2", "3"}
    assert names[-1] == "3"


def test_layers_that_set_no_rate():
    student, teacher = UNet(4, 8), UNet(8, 16)
    pairing = pair(student, teacher, torch.rand(1, 3, 16, 16))
    assert pairing.silent_layers(student) == ()
    student.first.requires_grad_(False)
    student.last.weight.requires_grad_(False)  # its bias still learns
    assert pairing.silent_layers(student) == ("first",)
    assert pairing.silent_layers(nn.DataParallel(student.requires_grad_(False))) == pairing.names
    student.last.requires_grad_(True)
    assert set(pairing.names) - set(pairing.silent_layers(student)) == {"last"}


@pytest.mark.parametrize("batch_first", [True, False])
def test_encoder_and_decoder_whose_words_are_looked_up_before_either(batch_first: bool):
    class Translator(nn.Module):
        def __init__(self, depth: int, width: int) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(30, width), nn.Linear(width, 30)
            self.net = nn.Transformer(width, 2, depth, depth, 2 * width, batch_first=batch_first)

        def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            words = [self.words(ids) for ids in (source, target)]
            return self.head(self.net(*words) if batch_first else self.net(*(w.transpose(0, 1) for w in words)))

    example = torch.randint(30, (3, 7)), torch.randint(30, (3, 5))
    pairing = pair(Translator(2, 8), Translator(4, 16), example)
    assert list(zip(pairing.student_layers, pairing.teacher_layers, strict=True)) == [
        (f"net.{tower}.layers.{i}", f"net.{tower}.layers.{2 * i + 1}")
        for tower in ("encoder", "decoder")
        for i in (0, 1)
    ]
    assert set(pairing.tail) == {f"{name}.{p}" for name in ("net.decoder.norm", "head") for p in ("weight", "bias")}
    # The encoder's norm is read by the decoder's first block, and learns with it.
    owners = pairing.owners()
    assert [owners[f"{name}.weight"] for name in ("words", "net.encoder.norm")] == [0, 2]
