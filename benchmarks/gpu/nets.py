"""The pairs of nets that training steps are measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.harness import SMALL
from lwkd.program.models.registry import build

CLASSES = 10


def convolutional(name: str) -> Callable[[int], nn.Module]:
    """A net of the program, by name, for pictures of a side."""
    return lambda size: build(name, classes=CLASSES, channels=3, size=size)


def transformer(layers: int, width: int, heads: int, patch: int) -> Callable[[int], nn.Module]:
    """A vision transformer like torchvision's ViT-B/16, which has 12 layers of width 768."""

    def make(size: int) -> nn.Module:
        from torchvision.models import VisionTransformer

        return VisionTransformer(size, patch, layers, heads, width, 4 * width, num_classes=CLASSES)

    return make


@dataclass(frozen=True)
class Pair:
    """Teacher, student, and the batch that both see."""

    name: str
    teacher: Callable[[int], nn.Module]
    student: Callable[[int], nn.Module]
    size: int
    batch: int
    half: bool
    """Under bfloat16 autocast."""

    @property
    def title(self) -> str:
        """What it is called in tables."""
        return f"{self.name}, {self.size}², B={self.batch}, {'bf16' if self.half else 'fp32'}"


def pairs() -> list[Pair]:
    """All pairs, those that matter most first."""
    vit_b, vit_s = transformer(12, 768, 12, 16), transformer(6, 384, 6, 16)
    resnets = [convolutional(f"resnet{depth}") for depth in (50, 18, 10)]
    if SMALL:
        tiny = transformer(2, 16, 2, 4), transformer(2, 8, 2, 4)
        return [
            Pair("cnn_8→cnn_4", convolutional("cnn_8"), convolutional("cnn_4"), 16, 4, False),
            Pair("ViT→ViT", *tiny, 8, 2, True),
        ]
    kinds = [
        ("resnet18→resnet10", resnets[1], resnets[2], 32, 128),
        ("resnet50→resnet18", resnets[0], resnets[1], 224, 64),
        ("ViT-B/16→ViT-S/6", vit_b, vit_s, 224, 32),
        ("resnet18→resnet10", resnets[1], resnets[2], 32, 1024),
    ]
    return [Pair(*kind, half) for kind in kinds for half in (True, False)]


def made(pair: Pair, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Student and teacher (in eval mode) on the device, with random weights, the same at every call."""
    torch.manual_seed(0)
    with torch.device(device):  # random numbers for 86 million weights take seconds on a host
        student, teacher = pair.student(pair.size), pair.teacher(pair.size)
    memory = torch.channels_last if pair.half else torch.contiguous_format
    student, teacher = (net.to(device, memory_format=memory) for net in (student, teacher))
    return student.train(), teacher.eval()


def batch_of(pair: Pair, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random pictures and labels; what they show has no influence on the time."""
    x = torch.rand(pair.batch, 3, pair.size, pair.size, device=device)
    if pair.half:
        x = x.contiguous(memory_format=torch.channels_last)
    return x, torch.randint(CLASSES, (pair.batch,), device=device)
