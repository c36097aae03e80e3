"""Measurements on a GPU are made in IEEE float32, whatever the switches say; the check of forward mode holds there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tolerances import IEEE_PASSES, rms_error
from torchvision.models.resnet import BasicBlock, ResNet

import lwkd
from lwkd.signals import Hessian, Jacobian


def resnets() -> tuple[Any, ...]:
    torch.manual_seed(0)
    student, teacher = (ResNet(BasicBlock, [blocks] * 4, num_classes=10) for blocks in (1, 2))
    x = torch.randn(8, 3, 64, 64)
    return student.eval(), teacher.eval(), lwkd.pair(student, teacher, x[:2]), x


@pytest.mark.parametrize("signal", [Jacobian(), Hessian()], ids=lambda signal: signal.name)
def test_in_default_precision(signal: Any, cuda: torch.device) -> None:
    """cuDNN's convolutions are TF32 by default."""
    student, teacher, pairing, x = resnets()
    exact = signal.measure(copy.deepcopy(student).double(), copy.deepcopy(teacher).double(), pairing, x.double())
    before = torch.backends.cudnn.conv.fp32_precision
    assert before == "tf32"
    student, teacher, x = student.to(cuda), teacher.to(cuda), x.to(cuda)
    signal.check(student, teacher, pairing, x, None, seed=0)
    found = signal.measure(student, teacher, pairing, x)
    assert rms_error(found.cpu(), exact) < IEEE_PASSES
    assert torch.backends.cudnn.conv.fp32_precision == before
    with torch.autocast("cuda", torch.bfloat16):
        assert rms_error(signal.measure(student, teacher, pairing, x).cpu(), exact) < IEEE_PASSES
