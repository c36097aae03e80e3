"""Pairing of two nets: ``lwkd.pair`` beside the two forward passes that it cannot do without.

The example is one picture. Pairing runs once before training, so what counts is that nobody waits.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lwkd
from benchmarks.harness import SMALL, timed
from lwkd.program.models.registry import build

CIFAR, IMAGENET = (10, 32), (1000, 224)
PAIRS = {
    "resnet56-resnet20": ("resnet56", "resnet20", CIFAR),
    "resnet110-resnet20": ("resnet110", "resnet20", CIFAR),
    "resnet50-resnet18": ("resnet50", "resnet18", IMAGENET),
    "convnext_tiny-mobilenet_v3_small": ("convnext_tiny", "mobilenet_v3_small", IMAGENET),
    "vit_b_16-vit_b_32": ("vit_b_16", "vit_b_32", IMAGENET),
}
if SMALL:
    PAIRS = {"resnet14-resnet8": ("resnet14", "resnet8", CIFAR)}


@torch.no_grad()
def passes(student: nn.Module, teacher: nn.Module, x: torch.Tensor) -> None:
    """What is watched, unwatched."""
    student(x)
    teacher(x)


@pytest.mark.parametrize(("teacher", "student", "data"), PAIRS.values(), ids=PAIRS)
def test_pair(teacher, student, data, compare):
    torch.manual_seed(0)
    classes, size = data
    nets = [build(name, classes=classes, channels=3, size=size).eval() for name in (student, teacher)]
    x = torch.rand(1, 3, size, size)
    compare({"lwkd": timed(lwkd.pair, *nets, x), "two forward passes": timed(passes, *nets, x)})
